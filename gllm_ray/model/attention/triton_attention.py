"""Paged attention by our own Triton kernels; see `triton_kernels` for how they work."""

import math
from dataclasses import dataclass, replace

import torch

from gllm_ray.model.attention import triton_kernels
from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import LayerKvCache, with_dense_rows

# The smallest tile that tensor cores multiply.
_MIN_TILE = 16
# Of rows, and of keys; and the bytes of the rows' queries, and of the keys, which lie beside each
# other in the shared memory of a program, 99 KiB on the smallest GPUs.
_MAX_TILE_ROWS, _MAX_TILE_KEYS = 128, 64
_ROWS_BYTES, _KEYS_BYTES = 2**15, 2**14
# The widest keys that a tile is filled up for to a power of 2; of wider ones, latents, that would
# take nearly twice the memory.
_MAX_KEY_TILE = 256
# Above this many results, a tile is divided among eight warps instead of four.
_MAX_RESULTS_OF_FOUR_WARPS = 2**13
# The contexts of decodes are cut into parts while there are fewer programs than this for each
# processor, but into no more parts than this, and none may become shorter than this.
_PROGRAMS_PER_PROCESSOR = 4
_MAX_PARTS = 32
_MIN_PART_KEYS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """Sequences that are attended to by one launch.

    Attributes:
        first_sequence: The first of them.
        num_sequences: How many.
        num_tiles: Tiles of rows, some of which may be empty.
        tile_rows: Rows of a tile.
        num_parts: Into how many parts each context is cut.
        one_row: Whether each sequence has one row.
    """

    first_sequence: int
    num_sequences: int
    num_tiles: int
    tile_rows: int
    num_parts: int
    one_row: bool


class TritonAttention:
    """The kernels behind the signatures of the reference; they never wait for the device.

    A batch takes two launches: the decodes it begins with, whose contexts may be cut into parts,
    and the rest.

    Args:
        num_processors: Streaming multiprocessors of the GPU.
    """

    def __init__(self, num_processors: int) -> None:
        self._num_processors = num_processors

    def write(
        self, cache: LayerKvCache, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """See `LayerKvCache.write`."""
        num_heads, num_rows, key_width = keys.shape
        value_width = values.shape[-1]
        keys, values = with_dense_rows(keys), with_dense_rows(values)
        if num_rows == 0:
            return
        triton_kernels.write[(num_rows,)](
            cache.keys,
            cache.values,
            keys,
            values,
            slots,
            *_strides(cache.keys, cache.values, keys, values),
            NUM_HEADS=num_heads,
            KEY_WIDTH=key_width,
            VALUE_WIDTH=value_width,
            TILE_KEY=_power_of_2(num_heads * key_width),
            TILE_VALUE=_power_of_2(num_heads * value_width),
        )

    def attend(
        self, query: torch.Tensor, cache: LayerKvCache, inputs: PackedInputs, rule: ScoreRule
    ) -> torch.Tensor:
        """See `reference.paged_attention`."""
        query, cache = with_dense_rows(query), _split_kv_head(cache, len(query))
        output = query.new_empty(query.shape[1], query.shape[0], cache.values.shape[-1])
        if inputs.num_leading_decodes:
            self.attend_decodes(output, query, cache, inputs, rule)
        if inputs.num_leading_decodes < inputs.num_sequences:
            self._attend_chunks(output, query, cache, inputs, rule)
        return output

    def attend_decodes(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        cache: LayerKvCache,
        inputs: PackedInputs,
        rule: ScoreRule,
    ) -> None:
        """Fill in the output of the leading decodes."""
        num_decodes = inputs.num_leading_decodes
        launch = _Launch(
            first_sequence=0,
            num_sequences=num_decodes,
            num_tiles=num_decodes,
            tile_rows=_min_tile_rows(query, cache),
            num_parts=self._num_parts(num_decodes * len(cache.keys), cache, inputs),
            one_row=True,
        )
        _attend(output, query, cache, inputs, rule, launch)

    def _attend_chunks(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        cache: LayerKvCache,
        inputs: PackedInputs,
        rule: ScoreRule,
    ) -> None:
        num_decodes = inputs.num_leading_decodes
        num_others = inputs.num_sequences - num_decodes
        tile_rows = max(_min_tile_rows(query, cache), _max_tile_rows(cache))
        tile_tokens = tile_rows // (len(query) // len(cache.keys))
        launch = _Launch(
            first_sequence=num_decodes,
            num_sequences=num_others,
            num_tiles=(query.shape[1] - num_decodes) // tile_tokens + num_others,
            tile_rows=tile_rows,
            num_parts=1,
            one_row=False,
        )
        _attend(output, query, cache, inputs, rule, launch)

    def _num_parts(self, num_programs: int, cache: LayerKvCache, inputs: PackedInputs) -> int:
        """By nothing but sizes that the host knows."""
        longest = inputs.tables.block_tables.shape[1] * inputs.block_size
        if cache.geometry.window is not None:
            longest = min(longest, cache.geometry.window)
        wanted = self._num_processors * _PROGRAMS_PER_PROCESSOR // num_programs
        return max(1, min(wanted, longest // _MIN_PART_KEYS, _MAX_PARTS))


def _attend(
    output: torch.Tensor,
    query: torch.Tensor,
    cache: LayerKvCache,
    inputs: PackedInputs,
    rule: ScoreRule,
    launch: _Launch,
) -> None:
    num_heads, num_kv_heads = len(query), len(cache.keys)
    key_width, value_width = query.shape[-1], output.shape[-1]
    key_tile, rest_tile = _tile_widths(key_width)
    part_outputs = part_sums = output
    if launch.num_parts > 1:
        shape = (launch.num_sequences, num_heads, launch.num_parts)
        part_outputs = output.new_empty(*shape, value_width, dtype=torch.float32)
        part_sums = output.new_empty(*shape, dtype=torch.float32)
    triton_kernels.attend[(launch.num_tiles, num_kv_heads, launch.num_parts)](
        output,
        part_outputs,
        part_sums,
        query,
        cache.keys,
        cache.values,
        query if rule.sinks is None else rule.sinks,
        *inputs.tables,
        launch.first_sequence,
        launch.num_sequences,
        launch.num_parts,
        inputs.tables.block_tables.stride(0),
        *_log2_factors(rule),
        *_strides(query, cache.keys, cache.values),
        GROUP=num_heads // num_kv_heads,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        BLOCK_SIZE=inputs.block_size,
        WINDOW=cache.geometry.window or 0,
        HAS_SOFTCAP=rule.softcap is not None,
        HAS_SINKS=rule.sinks is not None,
        ONE_ROW=launch.one_row,
        IN_PARTS=launch.num_parts > 1,
        TILE_ROWS=launch.tile_rows,
        TILE_KEYS=_tile_size(_MAX_TILE_KEYS, _KEYS_BYTES, cache),
        TILE_KEY_WIDTH=key_tile,
        TILE_REST_WIDTH=rest_tile,
        VALUES_ARE_KEY_TILE=cache.geometry.latent is not None and value_width == key_tile,
        TILE_VALUE_WIDTH=_tile_width(value_width),
        num_warps=8 if launch.tile_rows * value_width > _MAX_RESULTS_OF_FOUR_WARPS else 4,
    )
    if launch.num_parts > 1:
        triton_kernels.combine[(launch.num_sequences * num_heads,)](
            output,
            part_outputs,
            part_sums,
            launch.num_parts,
            VALUE_WIDTH=value_width,
            TILE_PARTS=_MAX_PARTS,
            TILE_VALUE_WIDTH=_tile_width(value_width),
        )


def _log2_factors(rule: ScoreRule) -> tuple[float, float]:
    """What the kernel takes as `scale` and `softcap`, where 2 takes the place of e."""
    if rule.softcap is None:
        return rule.scale * math.log2(math.e), 1.0
    return rule.scale / rule.softcap, rule.softcap * math.log2(math.e)


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Those of rows and of heads, of tensors `[heads, rows, width]`."""
    return [tensor.stride(dim) for tensor in tensors for dim in (1, 0)]


def _split_kv_head(cache: LayerKvCache, num_heads: int) -> LayerKvCache:
    """A KV head that more query heads share than a tile has rows, as several in one memory."""
    group = num_heads // len(cache.keys)
    if len(cache.keys) > 1 or group <= (most := _max_tile_rows(cache)):
        return cache
    num_groups = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= most)
    return replace(
        cache,
        keys=cache.keys.expand(num_groups, -1, -1),
        values=cache.values.expand(num_groups, -1, -1),
    )


def _min_tile_rows(query: torch.Tensor, cache: LayerKvCache) -> int:
    """Room for the query heads of a KV head."""
    return max(_MIN_TILE, _power_of_2(len(query) // len(cache.keys)))


def _max_tile_rows(cache: LayerKvCache) -> int:
    return _tile_size(_MAX_TILE_ROWS, _ROWS_BYTES, cache)


def _tile_size(most: int, num_bytes: int, cache: LayerKvCache) -> int:
    """As many keys, or queries as wide, as fit into the bytes; a power of 2."""
    width = max(sum(_tile_widths(cache.keys.shape[-1])), _tile_width(cache.values.shape[-1]))
    size = num_bytes // (width * cache.keys.element_size())
    return max(_MIN_TILE, min(most, (1 << size.bit_length()) // 2))


def _tile_widths(key_width: int) -> tuple[int, int]:
    """Of the tile of keys, and of another for the rest of keys that are too wide for one."""
    if key_width <= _MAX_KEY_TILE or key_width == _power_of_2(key_width):
        return _tile_width(key_width), 0
    first = _power_of_2(key_width) // 2
    return first, _tile_width(key_width - first)


def _tile_width(width: int) -> int:
    return max(_MIN_TILE, _power_of_2(width))


def _power_of_2(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()
