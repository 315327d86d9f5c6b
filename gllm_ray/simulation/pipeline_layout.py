"""Which layers of a model each stage holds, and what they take of its devices' memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo
from gllm_ray.partition import explicit_layers, split_layers
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.model_shape import LayerShape, ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLayout:
    """A model cut into stages, and each stage cut over the devices that compute it together.

    Attributes:
        model: The model.
        layer_ranges: The half-open range of layers of each stage, in order.
        tensor_parallel: Devices that share each stage.
    """

    model: ModelShape
    layer_ranges: tuple[tuple[int, int], ...]
    tensor_parallel: int = 1

    @classmethod
    def split(cls, model: ModelShape, num_stages: int, tensor_parallel: int = 1) -> Self:
        """Cut the model as the engine does by default: the slowest stage as fast as can be.

        Raises:
            ConfigError: There are more stages than layers, or the devices cannot share a layer.
        """
        parameters = [layer.num_parameters() for layer in model.layers]
        ranges = split_layers(parameters, model.head_parameters, num_stages)
        model.check_shards(tensor_parallel)
        return cls(model=model, layer_ranges=tuple(ranges), tensor_parallel=tensor_parallel)

    @classmethod
    def explicit(
        cls, model: ModelShape, num_layers: Sequence[int], tensor_parallel: int = 1
    ) -> Self:
        """Give each stage its number of layers.

        Raises:
            ConfigError: They do not add up, or the devices cannot share a layer.
        """
        ranges = explicit_layers(num_layers, model.num_layers)
        model.check_shards(tensor_parallel)
        return cls(model=model, layer_ranges=tuple(ranges), tensor_parallel=tensor_parallel)

    @property
    def num_stages(self) -> int:
        """Depth of the pipeline."""
        return len(self.layer_ranges)

    @property
    def num_layers(self) -> list[int]:
        """Layers of each stage."""
        return [last - first for first, last in self.layer_ranges]

    def layers(self, stage_id: int) -> tuple[LayerShape, ...]:
        """The layers of a stage."""
        first, last = self.layer_ranges[stage_id]
        return self.model.layers[first:last]

    def is_last(self, stage_id: int) -> bool:
        """Whether a stage holds the head."""
        return stage_id == self.num_stages - 1

    def num_parameters(self, stage_id: int) -> int:
        """Weights on each device of a stage; embedding and head are cut by their rows."""
        model, shards = self.model, self.tensor_parallel
        layers = sum(layer.num_parameters(shards) for layer in self.layers(stage_id))
        embedding = model.embedding_parameters if stage_id == 0 else 0
        has_own_head = self.is_last(stage_id) and not (stage_id == 0 and model.is_tied)
        head = model.head_parameters if has_own_head else 0
        return layers + (embedding + head) // shards

    def kv_bytes_per_token(self, stage_id: int) -> int:
        """Bytes of a token in the KV cache of each device of a stage."""
        first, last = self.layer_ranges[stage_id]
        shards = self.tensor_parallel
        return sum(self.model.kv_bytes_per_token(i, shards) for i in range(first, last))

    def hop_bytes(self, load: StepLoad) -> int:
        """Bytes of hidden states from one stage to the next."""
        return load.num_tokens * self.model.hidden_size * self.model.value_bytes

    def stage_infos(
        self,
        *,
        device_name: str,
        memory_bytes: int,
        memory_utilization: float,
        block_size: int,
        activation_bytes: Sequence[int] | None = None,
    ) -> list[StageInfo]:
        """What each device of each stage holds; `partition.size_kv_cache` takes the tightest.

        Args:
            device_name: For messages.
            memory_bytes: Memory of a device.
            memory_utilization: Share of it for weights, activations and KV cache, 0 to 1.
            block_size: Tokens of a KV block.
            activation_bytes: Of each stage; None: activations must fit into what
                `memory_utilization` leaves.

        Raises:
            ConfigError: The weights of a stage do not fit.
        """
        infos = []
        for stage_id, (first, last) in enumerate(self.layer_ranges):
            num_parameters = self.num_parameters(stage_id)
            weight_bytes = num_parameters * self.model.value_bytes
            block_bytes = block_size * self.kv_bytes_per_token(stage_id)
            usable_bytes = int(memory_utilization * memory_bytes)
            others = 0 if activation_bytes is None else activation_bytes[stage_id]
            if weight_bytes + others > usable_bytes:
                activations = f" and about {others} of activations" if others else ""
                raise ConfigError(
                    f"stage {stage_id} of {self.num_stages}: {weight_bytes} bytes of weights on "
                    f"each {device_name}{activations}, of which {usable_bytes} bytes are usable; "
                    "add stages, raise tensor_parallel or memory_utilization, or take larger "
                    "devices"
                )
            infos.append(
                StageInfo(
                    stage_id=stage_id,
                    node=device_name,
                    first_layer=first,
                    last_layer=last,
                    num_parameters=num_parameters,
                    weight_bytes=weight_bytes,
                    kv_block_bytes=block_bytes,
                    max_kv_blocks=(usable_bytes - weight_bytes - others) // block_bytes,
                )
            )
        return infos
