"""Stage times from first principles: a roofline over the matrices, heads and links of a stage."""

from collections import Counter
from collections.abc import Sequence

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.attention_cost import AttentionCost, attention_costs, attention_time_s
from gllm_ray.simulation.devices import Device
from gllm_ray.simulation.hosts import Host
from gllm_ray.simulation.links import Link
from gllm_ray.simulation.model_shape import Gemm, LayerShape
from gllm_ray.simulation.pipeline_layout import PipelineLayout

_LOGIT_BYTES = 4
_SAMPLER_PASSES = 3  # over the logits: their maximum, their sum, the draw


class RooflineCost:
    """Predicts stage times from the shape of the model and the constants of the hardware.

    A stage takes the sum, over its layers, of matrix products, elementwise work, all-reduces,
    prefill attention and decode attention, and of the embedding or the head; or as long as its host
    needs to launch that, if longer. What the host does between micro-batches comes on top.

    Source: the operator model of Vidur (Agrawal et al., MLSys '24). Deviations: closed forms fitted
        to its profiles in place of random forests; embedding, head and host are priced; the prefill
        chunks of a micro-batch count as one sequence, which matters to head and host.
    """

    def __init__(
        self, layout: PipelineLayout, device: Device, host: Host, link: Link | None = None
    ) -> None:
        """Prepare to price micro-batches.

        Args:
            layout: The pipeline.
            device: Each of the devices of each stage.
            host: The process of each stage.
            link: Connects the devices of a stage; required where there are several.

        Raises:
            ConfigError: A link is missing, or the device has no peak for the model's data type.
        """
        if layout.tensor_parallel > 1 and link is None:
            raise ConfigError(
                f"tensor_parallel={layout.tensor_parallel}: must be 1 where no link is given"
            )
        device.flops(layout.model.dtype)
        self._layout = layout
        alike: dict[object, _Stage] = {}
        self._stages = []
        for stage_id in range(layout.num_stages):
            kind = (layout.layers(stage_id), stage_id == 0, layout.is_last(stage_id))
            if kind not in alike:
                alike[kind] = _Stage(layout, stage_id, device, host, link)
            self._stages.append(alike[kind])

    @property
    def layout(self) -> PipelineLayout:
        """The pipeline."""
        return self._layout

    def stage_time_s(self, stage_id: int, load: StepLoad) -> float:
        """The time of a stage; never falls when any part of the load grows."""
        return self._stages[stage_id].time_s(load)

    def attention(self, stage_id: int) -> Sequence[AttentionCost]:
        """What attention adds to the time of a stage, one entry for each window."""
        return self._stages[stage_id].attention


class _Stage:
    """Stages that are alike, with what depends on rows alone kept for each number of rows seen."""

    def __init__(
        self,
        layout: PipelineLayout,
        stage_id: int,
        device: Device,
        host: Host,
        link: Link | None,
    ) -> None:
        self._model, self._shards = layout.model, layout.tensor_parallel
        self._device, self._host, self._link = device, host, link
        self._layers = Counter(layout.layers(stage_id))
        self._is_first, self._is_last = stage_id == 0, layout.is_last(stage_id)
        num_layers = self._layers.total()
        self._floor_s = num_layers * host.layer_launch_s
        self._decode_launch_s = num_layers * device.decode_launch_s
        self._prefill_launch_s = num_layers * device.prefill_launch_s
        self.attention = attention_costs(layout, stage_id, device)
        self._rows_s: dict[int, float] = {}
        self._head_s: dict[int, float] = {}
        self._load: StepLoad | None = None  # the latest, of which stages alike ask in turn
        self._time_s = 0.0

    def time_s(self, load: StepLoad) -> float:
        if load is not self._load:
            self._load, self._time_s = load, self._price(load)
        return self._time_s

    def _price(self, load: StepLoad) -> float:
        num_decodes, num_prefill_tokens = load.num_decodes, load.num_prefill_tokens
        num_rows = num_decodes + num_prefill_tokens
        num_sequences = num_decodes + (num_prefill_tokens > 0)
        time_s = self._rows_s.get(num_rows)
        if time_s is None:
            time_s = self._rows_s[num_rows] = self._price_rows(num_rows)
        if self._is_last:
            head_s = self._head_s.get(num_sequences)
            if head_s is None:
                head_s = self._head_s[num_sequences] = self._price_head(num_sequences)
            time_s += head_s
        if num_decodes:
            time_s += self._decode_launch_s
        if num_prefill_tokens:
            time_s += self._prefill_launch_s
        time_s += attention_time_s(self.attention, load)
        host = self._host
        return max(time_s, self._floor_s) + host.step_s + host.sequence_s * num_sequences

    def _price_rows(self, num_rows: int) -> float:
        time_s = sum(
            count * self._price_layer(layer, num_rows) for layer, count in self._layers.items()
        )
        if self._is_first:
            time_s += self._device.elementwise_time_s(2 * self._hidden_bytes(num_rows))
        return time_s

    def _price_layer(self, layer: LayerShape, num_rows: int) -> float:
        device, dtype = self._device, self._model.dtype
        time_s = sum(
            device.gemm_time_s(gemm, num_rows, dtype) for gemm in layer.gemms(self._shards)
        )
        mlp = layer.mlp
        if mlp.num_experts and num_rows:
            routed_ratio = mlp.num_experts_per_token / mlp.num_experts
            num_touched = mlp.num_experts * (1 - (1 - routed_ratio) ** num_rows)
            rows_each = num_rows * mlp.num_experts_per_token / num_touched
            time_s += sum(
                device.gemm_time_s(gemm, rows_each, dtype, num_touched)
                for gemm in mlp.expert_gemms(layer.hidden_size, self._shards)
            )
        values = num_rows * _elementwise_values(layer, self._shards)
        elementwise_s = device.elementwise_time_s(values * self._model.value_bytes)
        time_s += max(device.elementwise_floor_s, elementwise_s)
        if self._link is not None:
            num_bytes = self._hidden_bytes(num_rows)
            reduce_s = self._link.all_reduce_time_s(num_bytes, self._shards)
            time_s += layer.num_all_reduces * reduce_s
        return time_s

    def _price_head(self, num_rows: int) -> float:
        """The head, and sampling from its logits; only rows that draw a token pass them."""
        num_logits = self._model.vocab_size // self._shards
        head = Gemm(self._model.hidden_size, num_logits)
        head_s = self._device.gemm_time_s(head, num_rows, self._model.dtype)
        logit_bytes = _SAMPLER_PASSES * _LOGIT_BYTES * num_rows * num_logits
        return head_s + self._device.elementwise_time_s(logit_bytes)

    def _hidden_bytes(self, num_rows: int) -> int:
        return num_rows * self._model.hidden_size * self._model.value_bytes


def _elementwise_values(layer: LayerShape, num_shards: int) -> int:
    """Numbers read and written per row by norms, rotary embedding, activation and sums.

    A norm reads and writes the residual stream; a sum reads two and writes one. In a parallel layer
    there is one norm, and one sum of three.
    """
    attention, mlp = layer.attention, layer.mlp
    residual = (2 + 4 if layer.is_parallel else 2 * 2 + 2 * 3) * layer.hidden_size
    rotary = 2 * attention.key_dim * (attention.num_heads + attention.num_kv_heads) // num_shards
    routed = max(1, mlp.num_experts_per_token) * mlp.intermediate_size
    width = (routed + mlp.shared_size) // num_shards
    return residual + rotary + (2 + mlp.is_gated) * width
