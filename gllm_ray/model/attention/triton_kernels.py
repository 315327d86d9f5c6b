"""Triton kernels of paged attention: attend, combine the parts of long contexts, write.

A program attends with a tile of rows over a stretch of one sequence's context. The rows are the
query heads of one KV head for some successive tokens, so each key and value is read once for all
of them. Lengths and block tables are read from device memory, and a grid depends on nothing else
than sizes the host knows, so that the kernels can be captured in a CUDA graph.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_sequence(row_starts, first_sequence, num_sequences, tile, TILE_TOKENS: tl.constexpr):
    """The last sequence whose tiles begin at or before this one.

    Counted so that no prefix sum is needed, sequence `i` begins at tile `row / TILE_TOKENS + i`;
    that leaves room for at least as many tiles as it has.
    """
    first_row = tl.load(row_starts + first_sequence)
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        row = tl.load(row_starts + first_sequence + middle) - first_row
        if row // TILE_TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    row = tl.load(row_starts + first_sequence + low) - first_row
    return first_sequence + low, tile - (row // TILE_TOKENS + low)


@triton.jit(
    do_not_specialize=[
        "first_sequence",
        "num_sequences",
        "num_parts",
        "table_stride",
        "scale",
        "softcap",
    ]
)
def attend(
    output,
    part_outputs,
    part_sums,
    query,
    keys,
    values,
    sinks,
    row_starts,
    context_lens,
    block_tables,
    first_sequence,
    num_sequences,
    num_parts,
    table_stride,
    scale,
    softcap,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    GROUP: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    IN_PARTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    TILE_KEY_WIDTH: tl.constexpr,
    TILE_REST_WIDTH: tl.constexpr,
    VALUES_ARE_KEY_TILE: tl.constexpr,
    TILE_VALUE_WIDTH: tl.constexpr,
):
    """Grid: tiles of rows, KV heads, parts of the context.

    The first `TILE_KEY_WIDTH` numbers of queries and keys are in one tile, others in a second; the
    values of latents may be that first tile.

    Scores are in units of log2: `scale`, without a soft cap, and `softcap`, with one, have that
    factor in them, and `scale` is divided by the soft cap.

    Source: FlashAttention-2 (Dao, arXiv 2307.08691), algorithm 1; parts of the context as in
    Flash-Decoding (Dao et al., 2023). Deviations: paged, grouped, windows, soft caps, sinks.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    TILE_TOKENS: tl.constexpr = 1 if ONE_ROW else TILE_ROWS // GROUP
    if ONE_ROW:
        sequence = first_sequence + tile
        tile_of_sequence = 0
    else:
        sequence, tile_of_sequence = _find_sequence(
            row_starts, first_sequence, num_sequences, tile, TILE_TOKENS
        )
    first_row = tl.load(row_starts + sequence)
    num_rows = tl.load(row_starts + sequence + 1) - first_row
    first_token = tile_of_sequence * TILE_TOKENS
    if first_token >= num_rows:
        return
    num_tokens = tl.minimum(TILE_TOKENS, num_rows - first_token)
    first_position = tl.load(context_lens + sequence) - num_rows + first_token

    rows = tl.arange(0, TILE_ROWS)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = tokens < num_tokens
    positions = first_position + tokens
    key_columns = tl.arange(0, TILE_KEY_WIDTH)
    value_columns = tl.arange(0, TILE_VALUE_WIDTH)
    query_rows = (first_row + first_token + tokens).to(tl.int64)
    queries = tl.load(
        query
        + query_rows[:, None] * query_row_stride
        + heads[:, None] * query_head_stride
        + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_WIDTH)[None, :],
        other=0.0,
    )

    if TILE_REST_WIDTH > 0:
        rest_columns = TILE_KEY_WIDTH + tl.arange(0, TILE_REST_WIDTH)
        rest_of_queries = tl.load(
            query
            + query_rows[:, None] * query_row_stride
            + heads[:, None] * query_head_stride
            + rest_columns[None, :],
            mask=is_row[:, None] & (rest_columns < KEY_WIDTH)[None, :],
            other=0.0,
        )

    end = first_position + num_tokens
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, first_position - WINDOW + 1) // TILE_KEYS * TILE_KEYS
    if IN_PARTS:
        tiles_of_part = tl.cdiv(tl.cdiv(end - begin, TILE_KEYS), num_parts)
        begin += part * tiles_of_part * TILE_KEYS
        end = tl.minimum(end, begin + tiles_of_part * TILE_KEYS)

    largest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    if HAS_SINKS:
        if part == 0:  # a sink is a key that all parts together see once
            largest = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
            total = tl.full([TILE_ROWS], 1.0, tl.float32)
    result = tl.zeros([TILE_ROWS, TILE_VALUE_WIDTH], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    for first_key in range(begin, end, TILE_KEYS):
        key_positions = first_key + tl.arange(0, TILE_KEYS)
        is_key = key_positions < end
        block = tl.load(table + key_positions // BLOCK_SIZE, mask=is_key, other=0)
        slots = block.to(tl.int64) * BLOCK_SIZE + key_positions % BLOCK_SIZE
        tile_keys = tl.load(
            keys
            + kv_head.to(tl.int64) * key_head_stride
            + slots[None, :] * key_slot_stride
            + key_columns[:, None],
            mask=is_key[None, :] & (key_columns < KEY_WIDTH)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, tile_keys, input_precision="ieee")
        if TILE_REST_WIDTH > 0:
            rest_of_keys = tl.load(
                keys
                + kv_head.to(tl.int64) * key_head_stride
                + slots[None, :] * key_slot_stride
                + rest_columns[:, None],
                mask=is_key[None, :] & (rest_columns < KEY_WIDTH)[:, None],
                other=0.0,
            )
            scores = tl.dot(rest_of_queries, rest_of_keys, acc=scores, input_precision="ieee")
        scores *= scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)  # softcap * tanh(scores)
        is_seen = is_key[None, :] & (key_positions[None, :] <= positions[:, None])
        if WINDOW > 0:
            is_seen &= key_positions[None, :] > positions[:, None] - WINDOW
        scores = tl.where(is_seen, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(largest - base)
        if VALUES_ARE_KEY_TILE:
            tile_values = tl.trans(tile_keys)
        else:
            tile_values = tl.load(
                values
                + kv_head.to(tl.int64) * value_head_stride
                + slots[:, None] * value_slot_stride
                + value_columns[None, :],
                mask=is_key[:, None] & (value_columns < VALUE_WIDTH)[None, :],
                other=0.0,
            )
        total = total * decay + tl.sum(weights, 1)
        result = result * decay[:, None]
        result = tl.dot(
            weights.to(tile_values.dtype), tile_values, acc=result, input_precision="ieee"
        )
        largest = new_largest

    total = tl.where(total == 0.0, 1.0, total)  # of rows, or parts, that see nothing
    result = result / total[:, None]
    is_stored = is_row[:, None] & (value_columns < VALUE_WIDTH)[None, :]
    rows_and_heads = query_rows * (tl.num_programs(1) * GROUP) + heads
    if IN_PARTS:
        parts = rows_and_heads * num_parts + part
        places = parts[:, None] * VALUE_WIDTH + value_columns[None, :]
        tl.store(part_outputs + places, result, mask=is_stored)
        tl.store(part_sums + parts, largest + tl.log2(total), mask=is_row)
    else:
        places = rows_and_heads[:, None] * VALUE_WIDTH + value_columns[None, :]
        tl.store(output + places, result.to(output.dtype.element_ty), mask=is_stored)


@triton.jit(do_not_specialize=["num_parts"])
def combine(
    output,
    part_outputs,
    part_sums,
    num_parts,
    VALUE_WIDTH: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_VALUE_WIDTH: tl.constexpr,
):
    """Add the parts of each row and head up by their share of the softmax.

    Grid: rows times heads. `part_sums` are log2 of each part's sum of weights.
    """
    row_and_head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE_VALUE_WIDTH)
    is_column = columns < VALUE_WIDTH
    part = tl.arange(0, TILE_PARTS)
    is_part = part < num_parts
    parts = row_and_head * num_parts + part
    sums = tl.load(part_sums + parts, mask=is_part, other=float("-inf"))
    shares = tl.exp2(sums - tl.max(sums, 0))
    outputs = tl.load(
        part_outputs + parts[:, None] * VALUE_WIDTH + columns[None, :],
        mask=is_part[:, None] & is_column[None, :],
        other=0.0,
    )
    result = tl.sum(outputs * shares[:, None], 0) / tl.sum(shares, 0)
    places = row_and_head * VALUE_WIDTH + columns
    tl.store(output + places, result.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def write(
    keys,
    values,
    new_keys,
    new_values,
    slots,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    new_key_row_stride,
    new_key_head_stride,
    new_value_row_stride,
    new_value_head_stride,
    NUM_HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TILE_KEY: tl.constexpr,
    TILE_VALUE: tl.constexpr,
):
    """Store the keys and values of a row at its slot. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    offsets = tl.arange(0, TILE_KEY)
    heads, columns = offsets // KEY_WIDTH, offsets % KEY_WIDTH
    source = new_keys + row * new_key_row_stride + heads * new_key_head_stride + columns
    target = keys + slot * key_slot_stride + heads * key_head_stride + columns
    tl.store(target, tl.load(source, mask=heads < NUM_HEADS), mask=heads < NUM_HEADS)
    offsets = tl.arange(0, TILE_VALUE)
    heads, columns = offsets // VALUE_WIDTH, offsets % VALUE_WIDTH
    source = new_values + row * new_value_row_stride + heads * new_value_head_stride + columns
    target = values + slot * value_slot_stride + heads * value_head_stride + columns
    tl.store(target, tl.load(source, mask=heads < NUM_HEADS), mask=heads < NUM_HEADS)
