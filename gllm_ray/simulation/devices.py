"""Accelerators: peaks, efficiencies, and how long a matrix product takes on them."""

from collections.abc import Mapping
from functools import cache
from math import ceil

from pydantic import Field

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.calibrations import Calibration, find_calibration, read_calibrations
from gllm_ray.simulation.model_shape import DTYPE_BYTES, Gemm

_SMALLEST_TILE = 16


class Device(Calibration):
    """An accelerator.

    An efficiency is the share of the peak that is reached; a launch is what an operation costs
    beyond its work.
    """

    memory_bytes: int = Field(gt=0, description="Memory of the device.")
    bandwidth_bytes_s: float = Field(gt=0, description="Nominal memory bandwidth.")
    peak_flops: dict[str, float] = Field(
        description="Nominal dense operations a second of matrix products, by data type."
    )
    tile: int = Field(
        ge=_SMALLEST_TILE,
        description="Rows are rounded up to a multiple of this, and below it to a power of two.",
    )
    gemm_launch_s: float = Field(ge=0, description="Launch of a matrix product.")
    compute_efficiency: float = Field(gt=0, le=1, description="Matrix products, of peak_flops.")
    bandwidth_efficiency: float = Field(gt=0, le=1, description="Weights read, of the bandwidth.")
    roofline_exponent: float = Field(
        ge=1, description="How sharp the knee between memory and compute is: 1 adds the two times."
    )
    elementwise_floor_s: float = Field(
        ge=0,
        description="The least for norms, rotary embedding, activation and sums of a layer.",
    )
    elementwise_efficiency: float = Field(gt=0, le=1, description="The same, of the bandwidth.")
    decode_launch_s: float = Field(ge=0, description="Attention of a layer's decodes.")
    decode_efficiency: float = Field(gt=0, le=1, description="KV cache read, of the bandwidth.")
    prefill_launch_s: float = Field(ge=0, description="Attention of a layer's prefill chunks.")
    prefill_efficiency: float = Field(
        gt=0, le=1, description="Attention of prefill, of peak_flops, masked pairs counted."
    )

    def flops(self, dtype: str) -> float:
        """Nominal operations a second in a data type.

        Raises:
            ConfigError: The device has no figure for it.
        """
        if dtype not in self.peak_flops:
            raise ConfigError(
                f"device={self.name!r}: peak_flops has no {dtype}; must be one of "
                f"{', '.join(self.peak_flops)}"
            )
        return self.peak_flops[dtype]

    def tiled_rows(self, num_rows: float) -> int:
        """The rows that a matrix product of `num_rows` computes, those that fill tiles included."""
        rows = ceil(num_rows)
        if rows > self.tile:
            return -(-rows // self.tile) * self.tile
        return min(self.tile, max(_SMALLEST_TILE, 1 << (rows - 1).bit_length())) if rows else 0

    def gemm_time_s(
        self, gemm: Gemm, num_rows: float, dtype: str, num_matrices: float = 1
    ) -> float:
        """The time of a matrix product: a roofline with tile steps and a rounded knee.

        With `compute` and `memory` the times of its operations and of its bytes, it is
        `launch + (compute**p + memory**p)**(1/p)`.

        Args:
            gemm: The matrix of weights.
            num_rows: Rows that each matrix is multiplied with.
            dtype: Of rows and weights.
            num_matrices: Matrices of the same size in one launch, such as those of experts.
        """
        weights, tiled = gemm.inputs * gemm.outputs, self.tiled_rows(num_rows)
        compute = 2 * num_matrices * tiled * weights / self.flops(dtype) / self.compute_efficiency
        values = num_matrices * (weights + num_rows * (gemm.inputs + gemm.outputs))
        memory = values * DTYPE_BYTES[dtype] / self.bandwidth_bytes_s / self.bandwidth_efficiency
        slower, faster = max(compute, memory), min(compute, memory)
        power = self.roofline_exponent
        knee: float = (1 + (faster / slower) ** power) ** (1 / power)
        return self.gemm_launch_s + slower * knee

    def elementwise_time_s(self, num_bytes: float) -> float:
        """The time of reading and writing `num_bytes`, without a floor."""
        return num_bytes / self.bandwidth_bytes_s / self.elementwise_efficiency


@cache
def known_devices() -> Mapping[str, Device]:
    """The devices that come with the package."""
    return read_calibrations("devices.json", Device)


def find_device(name: str) -> Device:
    """A device that comes with the package.

    Raises:
        ConfigError: There is no device of this name.
    """
    return find_calibration("device", name, known_devices())
