"""Random problems for paged attention, and their answer by definition."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from gllm_ray.messages import MicroBatch, ScheduledSequence
from gllm_ray.model.attention.latent_projection import LatentProjection
from gllm_ray.model.attention.reference import PagedAttention, ScoreRule
from gllm_ray.model.inputs import pack
from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens cached before, tokens in the batch), and how they attend."""

    sequences: list[tuple[int, int]]
    block_size: int
    num_kv_heads: int
    group: int
    key_width: int
    value_width: int
    window: int | None
    softcap: float | None
    has_sinks: bool
    seed: int
    caches_latents: bool = False  # so values are the first numbers of keys


def latents_in(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    """The same cases with latents in the cache, which many heads share, as wide as DeepSeek's."""
    return st.builds(
        replace,
        cases,
        num_kv_heads=st.just(1),
        group=st.sampled_from([1, 4, 12, 16, 20, 64]),
        key_width=st.sampled_from([24, 72, 320, 576]),
        value_width=st.sampled_from([8, 24, 64, 256, 512]),
        caches_latents=st.just(True),
    ).filter(lambda case: case.value_width <= case.key_width)


def _any_projection(case: Case) -> LatentProjection:
    """One for keys and values of a number each, which plain attention does not ask for."""
    num_heads = case.num_kv_heads * case.group
    rotary_width = case.key_width - case.value_width
    return LatentProjection(
        linear=torch.nn.Linear(case.value_width, 2 * num_heads, bias=False),
        num_heads=num_heads,
        key_width=1 + rotary_width,
        value_width=1,
        rotary_width=rotary_width,
    )


class Problem:
    """Random tensors for a case, in a cache of NaN with shuffled blocks.

    `slots_first` lays the cache out as on a GPU, where the heads of a slot lie side by side.
    """

    def __init__(
        self,
        case: Case,
        dtype=torch.float32,
        scale: float = 0.7,
        device: torch.device = CPU,
        slots_first: bool = False,
    ):
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        def unwritten(width):
            num_slots = (num_blocks + 2) * case.block_size
            shape = (case.num_kv_heads, num_slots, width)
            if slots_first:
                shape = (num_slots, case.num_kv_heads, width)
            cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
            return cache.transpose(0, 1) if slots_first else cache

        num_heads = case.num_kv_heads * case.group
        lengths = [start + count for start, count in case.sequences]
        num_blocks = sum(-(-length // case.block_size) for length in lengths)
        blocks = torch.randperm(num_blocks + 2, generator=generator).tolist()
        self.case = case
        self.keys = [randn(case.num_kv_heads, length, case.key_width) for length in lengths]
        self.values = [
            keys[..., : case.value_width]
            if case.caches_latents
            else randn(case.num_kv_heads, length, case.value_width)
            for keys, length in zip(self.keys, lengths, strict=True)
        ]
        self.query = randn(num_heads, sum(n for _, n in case.sequences), case.key_width)
        self.rule = ScoreRule(
            scale=scale, softcap=case.softcap, sinks=randn(num_heads) if case.has_sinks else None
        )
        keys = unwritten(case.key_width)
        in_keys = keys[..., : case.value_width]
        self.cache = LayerKvCache(
            geometry=AttentionGeometry(
                key_shape=(case.num_kv_heads, case.key_width),
                value_shape=(case.num_kv_heads, case.value_width),
                window=case.window,
                latent=_any_projection(case) if case.caches_latents else None,
            ),
            keys=keys,
            values=in_keys if case.caches_latents else unwritten(case.value_width),
        )
        sequences = []
        for seq_id, ((start, count), length) in enumerate(
            zip(case.sequences, lengths, strict=True)
        ):
            table = [blocks.pop() for _ in range(-(-length // case.block_size))]
            sequences.append(
                ScheduledSequence(
                    seq_id=seq_id,
                    epoch=0,
                    start=start,
                    token_ids=tuple(range(count)),
                    block_table=tuple(table),
                    sampling=None,
                )
            )
        self.inputs = pack(
            MicroBatch(batch_id=0, sequences=tuple(sequences)), case.block_size, device
        )
        self.write_past()

    def write_past(self) -> None:
        """Store what earlier batches computed."""
        size = self.case.block_size
        tables = self.inputs.block_tables.tolist()
        for (start, _), table, keys, values in zip(
            self.case.sequences, tables, self.keys, self.values, strict=True
        ):
            slots = [table[position // size] * size + position % size for position in range(start)]
            slots = torch.tensor(slots, dtype=torch.long, device=keys.device)
            self.cache.write(slots, keys[:, :start], values[:, :start])

    def paged(self, attend: PagedAttention) -> torch.Tensor:
        starts = [start for start, _ in self.case.sequences]
        new_keys = [keys[:, start:] for keys, start in zip(self.keys, starts, strict=True)]
        new_values = [values[:, start:] for values, start in zip(self.values, starts, strict=True)]
        if new_keys:
            self.cache.write(
                self.inputs.slot_mapping, torch.cat(new_keys, dim=1), torch.cat(new_values, dim=1)
            )
        return attend(self.query, self.cache, self.inputs, self.rule)

    def dense(self) -> torch.Tensor:
        """The definition, one query row and one head at a time, in double precision."""
        case, rows = self.case, []
        row = 0
        for (start, count), keys, values in zip(
            case.sequences, self.keys, self.values, strict=True
        ):
            for position in range(start, start + count):
                first = 0 if case.window is None else max(0, position - case.window + 1)
                heads = []
                for head, query in enumerate(self.query[:, row].double()):
                    kv_head = head // case.group
                    seen = slice(first, position + 1)
                    scores = keys[kv_head, seen].double() @ query * self.rule.scale
                    if case.softcap is not None:
                        scores = case.softcap * torch.tanh(scores / case.softcap)
                    if self.rule.sinks is not None:
                        scores = torch.cat([scores, self.rule.sinks[head : head + 1].double()])
                    weights = torch.softmax(scores, dim=0)[: position + 1 - first]
                    heads.append(weights @ values[kv_head, seen].double())
                rows.append(torch.stack(heads))
                row += 1
        return torch.stack(rows)
