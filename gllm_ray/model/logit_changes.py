"""What the logit rules of a micro-batch's sequences do to their logits, before any draw."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import torch

from gllm_ray.messages import LogitRules, ScheduledSequence
from gllm_ray.model.inputs import to_device
from gllm_ray.model.token_counts import RunningCounts, TokenCounts

# Of a repetition penalty, either way: as a float32 it is neither 0 nor infinite, so what is ruled
# out stays so, for minus infinity times 0 is no number.
_MAX_FACTOR = 1e30


class _Change(NamedTuple):
    rules: LogitRules
    may_end: bool
    counts: TokenCounts | None  # where there are penalties


class LogitChanges:
    """The rules of some rows, and the counts of the tokens before.

    Args:
        changes: By row.

    Attributes:
        rows: The rows that change.
    """

    def __init__(self, changes: dict[int, _Change]) -> None:
        self.rows = tuple(changes)
        self._changes = changes

    @classmethod
    def of(cls, drawn: Sequence[ScheduledSequence], counts: RunningCounts) -> Self:
        """Those of the sequences that draw, one per row of the logits."""
        changes = {}
        for row, sequence in enumerate(drawn):
            rules = sequence.sampling.logit_rules
            if rules is None:
                continue
            may_end = sequence.end >= rules.min_end
            known = counts.of(sequence) if rules.has_penalties else None
            if not may_end or rules.logit_bias or known is not None:
                changes[row] = _Change(rules, may_end, known)
        return cls(changes)

    def count(self, token_ids: Sequence[int]) -> None:
        """Note what was drawn, a token for each row of the logits."""
        for row, change in self._changes.items():
            if change.counts is not None:
                change.counts.add(token_ids[row])

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
        _forbid_ends(logits, [(number, c.rules) for number, c in numbered if not c.may_end])
        _add_biases(logits, [(number, c.rules) for number, c in numbered if c.rules.logit_bias])
        _penalize(logits, [(number, c) for number, c in numbered if c.counts is not None])


NO_CHANGES = LogitChanges({})


def _forbid_ends(logits: torch.Tensor, rows: Sequence[tuple[int, LogitRules]]) -> None:
    ends = ((number, np.array([rules.end_token_ids])) for number, rules in rows)
    if (cells := _cells(logits, ends)) is not None:
        logits[cells.index] = -torch.inf


def _add_biases(logits: torch.Tensor, rows: Sequence[tuple[int, LogitRules]]) -> None:
    biases = ((number, _bias_columns(rules.logit_bias)) for number, rules in rows)
    if (cells := _cells(logits, biases)) is not None:
        logits[cells.index] += cells.values


@lru_cache(maxsize=256)  # they are the same at every draw
def _bias_columns(biases: tuple[tuple[int, float], ...]) -> np.ndarray:
    return np.array(biases).T


def _penalize(logits: torch.Tensor, rows: Sequence[tuple[int, _Change]]) -> None:
    counts = ((number, change.counts.columns) for number, change in rows)
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
