"""What the logit rules of a micro-batch's sequences do to their logits, before any draw."""

from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import torch

from gllm_ray.messages import LogitRules, ScheduledSequence
from gllm_ray.model.inputs import to_device
from gllm_ray.model.running_outputs import RunningOutput, RunningOutputs

# Of a repetition penalty, either way: as a float32 it is neither 0 nor infinite, so what is ruled
# out stays so, for minus infinity times 0 is no number.
_MAX_FACTOR = 1e30
_NONE_LEFT = (
    "no token is left that may come next: allowed_token_ids, bad_words, min_tokens and what the "
    "output has to match rule out all of them; relax one of these"
)


class _Change(NamedTuple):
    rules: LogitRules
    forbidden: Sequence[int]  # tokens, whatever is allowed
    output: RunningOutput | None  # where the rules depend on it

    @property
    def forbids_some(self) -> bool:
        return bool(self.forbidden or self.rules.allowed_token_ids)

    def permits(self, token_id: int) -> bool:
        allowed = self.rules.allowed_token_ids
        return token_id not in self.forbidden and (not allowed or token_id in allowed)


class LogitChanges:
    """The rules of some rows, and what these depend on.

    Args:
        changes: By row.

    Attributes:
        rows: The rows that change.
    """

    def __init__(self, changes: dict[int, _Change]) -> None:
        self.rows = tuple(changes)
        self._changes = changes

    @classmethod
    def of(cls, drawn: Sequence[ScheduledSequence], outputs: RunningOutputs) -> Self:
        """Those of the sequences that draw, one per row of the logits."""
        changes = {}
        for row, sequence in enumerate(drawn):
            rules = sequence.sampling.logit_rules
            if rules is None:
                continue
            forbidden = list(rules.end_token_ids) if sequence.end < rules.min_end else []
            output = outputs.of(sequence) if rules.needs_output else None
            if output is not None and output.bad_words is not None:
                forbidden += output.bad_words.next_tokens()
            change = _Change(rules, forbidden, output)
            if change.forbids_some or rules.logit_bias or output is not None:
                changes[row] = change
        return cls(changes)

    def note(self, token_ids: Sequence[int], refused: Container[int] = ()) -> dict[int, str]:
        """Note what was drawn.

        Args:
            token_ids: A token for each row of the logits.
            refused: The rows whose grammar did not take it.

        Returns:
            The rows that had no token left to draw, and why: any other is drawn before one that is
            ruled out.
        """
        failures = {}
        for row, change in self._changes.items():
            if not change.permits(token_ids[row]) or (change.forbids_some and row in refused):
                failures[row] = _NONE_LEFT
            if change.output is not None:
                change.output.add(token_ids[row])
        return failures

    def apply(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        """Change some rows' logits in place, as vLLM does.

        Args:
            logits: float32 `[len(rows), vocab_size]`.
            rows: Which ones they are; those that have no rules stay as they are.
        """
        if not self.rows:
            return
        numbered = [
            (number, self._changes[row]) for number, row in enumerate(rows) if row in self._changes
        ]
        _keep_allowed(logits, [(n, c.rules) for n, c in numbered if c.rules.allowed_token_ids])
        _forbid(logits, [(n, c.forbidden) for n, c in numbered if c.forbidden])
        _add_biases(logits, [(n, c.rules) for n, c in numbered if c.rules.logit_bias])
        _penalize(logits, [(n, c) for n, c in numbered if c.rules.has_penalties])


NO_CHANGES = LogitChanges({})


def _keep_allowed(logits: torch.Tensor, rows: Sequence[tuple[int, LogitRules]]) -> None:
    allowed = ((number, _one_row(rules.allowed_token_ids)) for number, rules in rows)
    if (cells := _cells(logits, allowed)) is not None:
        kept = logits[cells.index]
        logits[to_device(np.array([number for number, _ in rows]), logits.device)] = -torch.inf
        logits[cells.index] = kept


@lru_cache(maxsize=256)  # they are the same at every draw
def _one_row(token_ids: tuple[int, ...]) -> np.ndarray:
    return np.array([token_ids])


def _forbid(logits: torch.Tensor, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
    forbidden = ((number, np.array([token_ids])) for number, token_ids in rows)
    if (cells := _cells(logits, forbidden)) is not None:
        logits[cells.index] = -torch.inf


def _add_biases(logits: torch.Tensor, rows: Sequence[tuple[int, LogitRules]]) -> None:
    biases = ((number, _bias_columns(rules.logit_bias)) for number, rules in rows)
    if (cells := _cells(logits, biases)) is not None:
        logits[cells.index] += cells.values


@lru_cache(maxsize=256)  # they are the same at every draw
def _bias_columns(biases: tuple[tuple[int, float], ...]) -> np.ndarray:
    return np.array(biases).T


def _penalize(logits: torch.Tensor, rows: Sequence[tuple[int, _Change]]) -> None:
    counts = ((number, change.output.counts.columns) for number, change in rows)
    if (cells := _cells(logits, counts)) is None:
        return
    penalties = np.ones((3, len(logits)))
    for number, (rules, *_) in rows:
        penalties[:, number] = (
            min(max(rules.repetition_penalty, 1 / _MAX_FACTOR), _MAX_FACTOR),
            rules.frequency_penalty,
            rules.presence_penalty,
        )
    by_row = to_device(penalties, logits.device).float()
    repetition, frequency, presence = by_row[:, cells.index[0]]
    found = logits[cells.index]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= frequency * cells.values
    found -= presence * (cells.values > 0)
    logits[cells.index] = found


class _Cells(NamedTuple):
    index: tuple[torch.Tensor, torch.Tensor]  # rows and token ids
    values: torch.Tensor  # float32


def _cells(logits: torch.Tensor, columns: Iterable[tuple[int, np.ndarray]]) -> _Cells | None:
    """On the device: rows with token ids, each once, and a value for each if there are any.

    A token id beyond the logits, as an embedding may have more rows, is left out.
    """
    numbered = [(number, column) for number, column in columns if column.size]
    if not numbered:
        return None
    numbers, found = zip(*numbered, strict=True)
    rows = np.repeat(np.array(numbers, dtype=np.int32), [column.shape[1] for column in found])
    table = np.concatenate([rows[None], np.concatenate(found, axis=1)])
    table = to_device(table[:, table[1] < logits.shape[-1]], logits.device)
    return _Cells((table[0].long(), table[1].long()), table[-1].float())
