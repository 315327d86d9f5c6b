"""The last layer of a model, of whose output only the rows that tokens are drawn from are read.

The other rows of a prompt leave their keys and values there, and nothing else. So they go through
the layer as far as its attention, and the rows to draw from then go through all of it. Where log
probabilities of prompts are told, all rows do.

Source: ours; transformers computes all rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gllm_ray.model.attention.interface import for_rows, rows_under_way, store_rows
from gllm_ray.model.inputs import PackedInputs, take_sequences, to_device


def skip_unread_rows(layer: nn.Module) -> None:
    """Let the last layer of a model compute no more than is read; other rows come out as zeros."""
    layer.forward = partial(_forward, layer.forward)


def _forward(
    forward: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    *args: Any,  # noqa: ANN401 - what a layer is given is its model's business
    **kwargs: Any,  # noqa: ANN401
) -> torch.Tensor:
    inputs = rows_under_way()
    # The weights of queries, keys and values are read twice, which few rows are not worth.
    if inputs is None or inputs.reads_prompts or 2 * len(inputs.drawn) > hidden.shape[1]:
        return forward(hidden, *args, **kwargs)

    def run(rows: torch.Tensor) -> torch.Tensor:
        given = _take(((hidden, *args), kwargs), hidden.shape[1], rows)
        return forward(*given[0], **given[1])

    unread = _unread_rows(inputs)
    with store_rows(replace(inputs, slot_mapping=inputs.slot_mapping[unread])):
        run(unread)
    output = torch.zeros_like(hidden)
    if len(inputs.drawn):
        rows, to_read = take_sequences(inputs, inputs.drawn.numpy(), last_row_only=True)
        with for_rows(to_read):
            output.index_copy_(1, rows, run(rows))
    return output


def _unread_rows(inputs: PackedInputs) -> torch.Tensor:
    row_starts = inputs.row_starts.numpy()
    is_unread = np.ones(row_starts[-1], dtype=bool)
    is_unread[row_starts[1:][inputs.drawn.numpy()] - 1] = False
    return to_device(np.flatnonzero(is_unread), inputs.slot_mapping.device)


def _take(value: Any, num_tokens: int, rows: torch.Tensor) -> Any:  # noqa: ANN401
    """These rows of whatever has one for each token, `[1, ..., num_tokens, ...]`."""
    if isinstance(value, torch.Tensor):
        axis = next((i for i, size in enumerate(value.shape) if size != 1), 0)
        has_rows = value.ndim and value.shape[axis] == num_tokens
        return value.index_select(axis, rows) if has_rows else value
    if isinstance(value, tuple):
        return tuple(_take(item, num_tokens, rows) for item in value)
    if isinstance(value, dict):
        return {name: _take(item, num_tokens, rows) for name, item in value.items()}
    return value
