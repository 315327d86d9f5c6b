"""Which implementation of paged attention a stage runs."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch

from gllm_ray.config import AttentionName
from gllm_ray.errors import ConfigError
from gllm_ray.model.attention import reference
from gllm_ray.model.attention.cpp_attention import OperatorAttention
from gllm_ray.model.attention.reference import PagedAttention
from gllm_ray.model.kv_cache import AttentionGeometry, LayerKvCache
from gllm_ray.model.operators.build import OperatorsUnavailableError, load_operators

# See `LayerKvCache.write`.
WriteKv = Callable[[LayerKvCache, torch.Tensor, torch.Tensor, torch.Tensor], None]

_TITLES = {"cpp": "the C++ operator", "triton": "the Triton kernels"}
_HALVES = (torch.bfloat16, torch.float16)
# Of a head, for kernels that hold tiles of keys and values in the memory of a processor.
_MAX_WIDTH = 256
# Of a latent with its rotary key: DeepSeek's.
_MAX_LATENT_WIDTH = 576
# What xformers' operator `triton_splitk` takes.
_XFORMERS_WIDTHS = (16, 32, 64, 128, 256)
_XFORMERS_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """An implementation of paged attention.

    Attributes:
        description: What it is and, where it is not the fastest, why; for the log.
        attend: See `reference.paged_attention`.
        write: Stores keys and values; see `LayerKvCache.write`.
        is_graph_safe: Whether a forward pass of decodes can be captured in a CUDA graph: it waits
            for nothing, and reads lengths and block tables from the device alone.
    """

    description: str
    attend: PagedAttention = reference.paged_attention
    write: WriteKv = LayerKvCache.write
    is_graph_safe: bool = False


class Gpu(NamedTuple):
    """What attention asks of a GPU.

    Attributes:
        capability: NVIDIA's compute capability, as (major, minor).
        num_processors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    num_processors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSetting:
    """What attention has to work with on a stage.

    Attributes:
        gpu: Where the stage computes; None on CPU.
        dtype: Of queries and of the KV cache.
        geometries: What each attention module caches.
        block_size: Tokens of a KV block.
    """

    gpu: Gpu | None
    dtype: torch.dtype
    geometries: tuple[AttentionGeometry, ...]
    block_size: int


class AttentionUnavailableError(Exception):
    """An implementation cannot run here; says why."""


def find_gpu(device: torch.device) -> Gpu | None:
    """The facts about this device, if it is a GPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def choose_attention(name: AttentionName, setting: AttentionSetting) -> AttentionBackend:
    """The implementation of this name, which may have to be built first.

    Args:
        name: `auto` means the one made for the device, and torch where that cannot run.
        setting: What it has to work with.

    Raises:
        ConfigError: The one that is named cannot run here.
    """
    own = "cpp" if setting.gpu is None else "triton"
    try:
        return _MAKERS[own if name == "auto" else name](setting)
    except AttentionUnavailableError as error:
        if name == "auto":
            return AttentionBackend(f"torch, slower than {_TITLES[own]}, because {error}")
        raise ConfigError(
            f"model.attention_backend={name!r}: cannot run here, because {error}; use auto"
        ) from None


def _torch(_: AttentionSetting) -> AttentionBackend:
    return AttentionBackend("torch")


def _cpp(setting: AttentionSetting) -> AttentionBackend:
    _refuse_unless(
        setting.dtype in (torch.float32, torch.bfloat16), f"it does not take {setting.dtype}"
    )
    try:
        operators = OperatorAttention(load_operators())
    except OperatorsUnavailableError as error:
        raise AttentionUnavailableError(str(error)) from error
    return AttentionBackend("C++ operator", operators.attend, operators.write)


def _triton(setting: AttentionSetting) -> AttentionBackend:
    gpu = _check_triton(setting)
    from gllm_ray.model.attention.triton_attention import TritonAttention

    kernels = TritonAttention(gpu.num_processors)
    return AttentionBackend("Triton kernels", kernels.attend, kernels.write, is_graph_safe=True)


def _check_triton(setting: AttentionSetting) -> Gpu:
    gpu = _gpu(setting, (8, 0))
    _refuse_unless(setting.dtype in (torch.float32, *_HALVES), f"it does not take {setting.dtype}")
    for geometry in setting.geometries:
        _refuse_wide_heads(geometry)
    _refuse_unless_importable("triton")
    return gpu


def _xformers(setting: AttentionSetting) -> AttentionBackend:
    gpu = _check_triton(setting)  # which computes the chunks of prompts
    _refuse_extras(setting)
    _refuse_unless(
        not any(geometry.window or geometry.has_softcap for geometry in setting.geometries),
        "it takes neither a sliding window nor a soft cap",
    )
    _refuse_widths_beyond(setting, _XFORMERS_WIDTHS)
    _refuse_unless(
        setting.block_size % _XFORMERS_BLOCK_SIZE == 0,
        f"kv_cache.block_size={setting.block_size} is no multiple of {_XFORMERS_BLOCK_SIZE}",
    )
    _refuse_unless_importable("xformers.ops.fmha")
    _refuse_unless_xformers_is_whole()
    from gllm_ray.model.attention.xformers_attention import XformersAttention

    kernels = XformersAttention(gpu.num_processors)
    return AttentionBackend(
        "xformers for decodes, without CUDA graphs, and Triton kernels",
        kernels.attend,
        kernels.write,
    )


def _flash3(setting: AttentionSetting) -> AttentionBackend:
    _gpu(setting, (8, 0), (9, 0))
    _refuse_extras(setting)
    _refuse_widths_beyond(setting, range(8, _MAX_WIDTH + 1, 8))
    _refuse_unless_importable("flash_attn_interface")
    from gllm_ray.model.attention import flash3_attention

    return AttentionBackend("FlashAttention-3", flash3_attention.attend, is_graph_safe=True)


_MAKERS: dict[AttentionName, Callable[[AttentionSetting], AttentionBackend]] = {
    "torch": _torch,
    "cpp": _cpp,
    "triton": _triton,
    "xformers": _xformers,
    "flash3": _flash3,
}


def _gpu(setting: AttentionSetting, first: tuple[int, int], last: tuple[int, int] = (99, 0)) -> Gpu:
    """The stage's GPU, if it is of one of these compute capabilities."""
    gpu = setting.gpu
    if gpu is None:
        raise AttentionUnavailableError("it takes GPUs only")
    _refuse_unless(
        first <= gpu.capability <= last,
        f"it does not take a GPU of compute capability {gpu.capability[0]}.{gpu.capability[1]}",
    )
    return gpu


def _refuse_latents(setting: AttentionSetting) -> None:
    _refuse_unless(
        all(geometry.latent is None for geometry in setting.geometries),
        "it does not take the latents this model caches",
    )


def _refuse_wide_heads(geometry: AttentionGeometry) -> None:
    widths = [geometry.key_shape[1], geometry.value_shape[1]]
    if (latent := geometry.latent) is not None:
        _refuse_unless(
            widths[0] <= _MAX_LATENT_WIDTH,
            f"it takes latents of up to {_MAX_LATENT_WIDTH} numbers, not {widths[0]}",
        )
        widths = [latent.key_width, latent.value_width]
    _refuse_unless(
        max(widths) <= _MAX_WIDTH,
        f"it takes heads of up to {_MAX_WIDTH} numbers, not {max(widths)}",
    )


def _refuse_extras(setting: AttentionSetting) -> None:
    """Refuse what only our own implementations take."""
    _refuse_latents(setting)
    _refuse_unless(setting.dtype in _HALVES, f"it does not take {setting.dtype}")
    _refuse_unless(
        not any(geometry.has_sinks for geometry in setting.geometries),
        "it does not take attention sinks",
    )


def _refuse_widths_beyond(setting: AttentionSetting, widths: Container[int]) -> None:
    for geometry in setting.geometries:
        key_width, value_width = geometry.key_shape[1], geometry.value_shape[1]
        _refuse_unless(
            key_width == value_width and key_width in widths,
            f"it does not take keys of {key_width} and values of {value_width} numbers",
        )


def _refuse_unless_importable(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise AttentionUnavailableError(f"{module} cannot be imported ({error})") from error


def _refuse_unless_xformers_is_whole() -> None:
    """Refuse an xformers that only warns when it is imported, and then refuses every call.

    What computes decodes is in Triton, but asks for an extension that wants one release of CUDA.
    """
    # Nothing public tells.
    error = getattr(import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    reason = str(error).partition("Please")[0]
    _refuse_unless(error is None, f"xformers is not whole ({' '.join(reason.split())})")


def _refuse_unless(condition: bool, reason: str) -> None:
    if not condition:
        raise AttentionUnavailableError(reason)
