"""How a transformers model reaches the paged cache: two registered attention functions.

`PAGED` writes and reads the cache of the current forward pass. No mask function is registered
under that name, so models build no mask. `PROBE` computes nothing; it notes what each attention
module caches and which mask it asks for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from gllm_ray.errors import ConfigError
from gllm_ray.model.attention.backend import AttentionBackend
from gllm_ray.model.attention.latent_attention import attend_latents
from gllm_ray.model.attention.latent_projection import find_projection
from gllm_ray.model.attention.reference import ScoreRule
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache

PAGED = "gllm_ray_paged"
PROBE = "gllm_ray_probe"

_pass: ContextVar["_PagedPass"] = ContextVar("pass")
_geometries: ContextVar[dict[nn.Module, AttentionGeometry]] = ContextVar("geometries")


@dataclass(frozen=True, slots=True)
class _PagedPass:
    """What the attention modules need in one forward pass."""

    inputs: PackedInputs
    caches: Mapping[nn.Module, LayerKvCache]
    backend: AttentionBackend
    stores_only: bool = False


class _Stored(Exception):  # noqa: N818 - nothing is wrong
    """Unwinds a layer whose keys and values are stored, and of which nothing else is wanted."""


@dataclass(frozen=True, slots=True)
class _MaskRecord:
    """What a model asked of its mask: causal, within a window or not."""

    window: int | None


@contextmanager
def paged_forward(
    inputs: PackedInputs, caches: Mapping[nn.Module, LayerKvCache], backend: AttentionBackend
) -> Iterator[None]:
    """Within it, models that use `PAGED` attend over these rows and caches."""
    with _within(_PagedPass(inputs, caches, backend)):
        yield


@contextmanager
def for_rows(inputs: PackedInputs) -> Iterator[None]:
    """Within it, and a `paged_forward`, models attend over these rows instead."""
    with _within(replace(_pass.get(), inputs=inputs)):
        yield


@contextmanager
def store_rows(inputs: PackedInputs) -> Iterator[None]:
    """Within it, and a `paged_forward`, a layer stores the keys and values of these rows and ends.

    The body of the `with` statement ends there, too.
    """
    with suppress(_Stored), _within(replace(_pass.get(), inputs=inputs, stores_only=True)):
        yield


def rows_under_way() -> PackedInputs | None:
    """What is being attended over; None outside of `paged_forward`."""
    return current.inputs if (current := _pass.get(None)) else None


@contextmanager
def _within(current: _PagedPass) -> Iterator[None]:
    token = _pass.set(current)
    try:
        yield
    finally:
        _pass.reset(token)


@contextmanager
def probe_forward() -> Iterator[dict[nn.Module, AttentionGeometry]]:
    """Within it, models that use `PROBE` fill the mapping that is handed out."""
    geometries: dict[nn.Module, AttentionGeometry] = {}
    token = _geometries.set(geometries)
    try:
        yield geometries
    finally:
        _geometries.reset(token)


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **options: Any,  # noqa: ANN401 - what a model may pass is transformers' convention
) -> tuple[torch.Tensor, None]:
    current = _pass.get()
    inputs, cache = current.inputs, current.caches[module]
    current.backend.write(cache, inputs.slot_mapping, key[0], value[0])
    if inputs.copied_slots is not None:
        cache.copy(*inputs.copied_slots)
    if current.stores_only:
        raise _Stored
    rule = ScoreRule(
        scale=options.get("scaling") or query.shape[-1] ** -0.5,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    attend = current.backend.attend
    if cache.geometry.latent is not None:
        attend = partial(attend_latents, attend)
    return attend(query[0], cache, inputs, rule).unsqueeze(0), None


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _MaskRecord | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    geometries = _geometries.get()
    if module in geometries:
        raise ConfigError(f"{type(module).__name__} attends twice per token; it cannot be served")
    if attention_mask is not None and attention_mask.window == 0:
        raise ConfigError(f"{type(module).__name__} has a sliding window of 0; it cannot be served")
    latent = find_projection(module)
    geometries[module] = AttentionGeometry(
        key_shape=(key.shape[1], key.shape[3]),
        value_shape=(value.shape[1], value.shape[3]),
        window=attention_mask.window if attention_mask is not None else None,
        latent=latent,
        has_softcap=options.get("softcap") is not None,
        has_sinks=options.get("s_aux") is not None,
    )
    value_width = latent.value_width if latent is not None else value.shape[3]
    return query.new_zeros(1, query.shape[2], query.shape[1], value_width), None


def _probe_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    **_: object,
) -> _MaskRecord:
    """Note the window, and refuse a mask that is not causal within it."""
    if local_size == 0:
        return _MaskRecord(0)  # Qwen2-MoE asks for it where none of its layers has a window
    reach = local_size or 4
    query = torch.tensor(2 * reach)
    is_allowed = [
        bool(mask_function(0, 0, query, query - distance)) for distance in (-1, 0, reach - 1, reach)
    ]
    if is_allowed != [False, True, True, local_size is None]:
        raise ConfigError(
            "the model asks for an attention mask other than a causal one with or without a "
            "sliding window; it cannot be served"
        )
    return _MaskRecord(local_size)


AttentionInterface.register(PAGED, _paged_attention)
AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
