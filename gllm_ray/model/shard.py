"""One stage of any transformers decoder: its own layers, and the ends it needs.

The model class of the checkpoint is built on the meta device and pruned there: layers of other
stages become pass-throughs, the layer before the first own one returns what the previous stage
sent, and the modules before or after the stack lose their weights where they are not needed.
Then the model's own `forward` runs: rotary embeddings, per-layer types, embedding and logit
scaling stay its business.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from gllm_ray.errors import ConfigError
from gllm_ray.model.attention.interface import PAGED, PROBE, probe_forward
from gllm_ray.model.attention.latent_projection import cache_latents
from gllm_ray.model.expert_stacks import stack_experts
from gllm_ray.model.inputs import PackedInputs
from gllm_ray.model.kv_cache import AttentionGeometry
from gllm_ray.model.last_layer import skip_unread_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of a whole model, by what takes time.

    Attributes:
        layers: One per decoder layer.
        head: What runs after them, a tied head included.
    """

    layers: tuple[int, ...]
    head: int


def count_parameters(config: PreTrainedConfig) -> ParameterCounts:
    """Build a model without memory and count its parameters."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    decoder, layers = _find_layers(model)
    _, after = _ends(model, decoder, layers)
    return ParameterCounts(
        layers=tuple(_num_parameters(layer) for layer in layers),
        head=sum(map(_num_parameters, after.values())),
    )


class Shard:
    """The layers `[first_layer, last_layer)` of a model, with embedding and head at the ends.

    Attributes:
        dtype: Type of the weights and of the hidden states.
        device: Where the weights lie.
        model: The pruned model; known after `load`.
    """

    model: PreTrainedModel

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._config = config
        self._first_layer, self._last_layer = layers
        self._received: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self._first_layer == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes logits."""
        return self._last_layer == self._config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between stages."""
        return self._config.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters held, a tied one counted once."""
        return _num_parameters(self.model)

    @property
    def weight_bytes(self) -> int:
        """Memory the weights take, persistent buffers included."""
        tensors = self.model.state_dict().values()
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def parameters_to_load(self) -> dict[str, torch.Tensor]:
        """Names and shapes of the shard's own tensors, a tied one once, without memory."""
        with torch.device("meta"):
            model = self._pruned_class()(self._config)
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in model.all_tied_weights_keys
        }

    def load(self, tensors: Mapping[str, object]) -> None:
        """Take the shard's own tensors out of a checkpoint's, through transformers' conversions.

        Raises:
            ConfigError: A tensor is missing or has another shape than config.json says.
        """
        model, report = self._pruned_class().from_pretrained(
            None,
            config=self._config,
            state_dict=stack_experts(tensors, self._config, self.dtype, self.device),
            dtype=self.dtype,
            device_map={"": self.device},
            attn_implementation=PAGED,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        for fault in ("missing_keys", "mismatched_keys"):
            if report[fault]:
                raise ConfigError(
                    f"model.path={self._config.name_or_path!r}: its weights do not fit its "
                    f"config.json, {fault.replace('_', ' ')}: {sorted(report[fault])[:3]}"
                )
        cache_latents(model)
        if self._holds_tied_head(model) and not self.is_first:
            # The head holds the weight now, and nothing embeds.
            names = {module: name for name, module in model.named_modules()}
            model.set_submodule(names[model.get_input_embeddings()], _NoEmbedding())
        self.model = model

    def probe(self, num_tokens: int, num_samples: int) -> dict[nn.Module, AttentionGeometry]:
        """Run the shard once without attention, and note what each attention module caches.

        Args:
            num_tokens: Rows of the packed batch.
            num_samples: Rows whose logits are computed, on the last stage.
        """
        positions = torch.arange(num_tokens, device=self.device)
        hidden = torch.zeros(num_tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        self.model.set_attn_implementation(PROBE)
        try:
            with probe_forward() as geometries:
                self._forward(
                    torch.zeros_like(positions)[None],
                    positions[None],
                    positions[-num_samples:],
                    None if self.is_first else hidden,
                )
        finally:
            self.model.set_attn_implementation(PAGED)
        return geometries

    def forward(self, inputs: PackedInputs, hidden: torch.Tensor | None) -> torch.Tensor:
        """Run the stage over a packed batch.

        Args:
            inputs: The batch.
            hidden: `[num_tokens, hidden_size]` of the previous stage, None on the first.

        Returns:
            `[num_tokens, hidden_size]`, or on the last stage the logits `[num_samples,
            vocab_size]` of the sampled rows.
        """
        return self._forward(inputs.input_ids, inputs.position_ids, inputs.sample_rows, hidden)

    def _forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sample_rows: torch.Tensor,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        self._received = None if hidden is None else hidden.unsqueeze(0)
        tokens = {"input_ids": input_ids} if self.is_first else {"inputs_embeds": self._received}
        try:
            if self.is_last:
                output = self.model(
                    **tokens, position_ids=position_ids, use_cache=False, logits_to_keep=sample_rows
                )
                return output.logits[0]
            self.model.get_decoder()(**tokens, position_ids=position_ids, use_cache=False)
            return self._sent[0]
        finally:
            self._received = self._sent = None

    def _pruned_class(self) -> type[PreTrainedModel]:
        """The model's class, pruned as soon as it is built, so that transformers can load it."""
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)]

        def build(model: PreTrainedModel, config: PreTrainedConfig) -> None:
            model_class.__init__(model, config)
            self._prune(model)

        # transformers looks weight conversions up by the name of the class.
        namespace = {"__init__": build, "__module__": model_class.__module__}
        return type(model_class.__name__, (model_class,), namespace)

    def _prune(self, model: PreTrainedModel) -> None:
        decoder, layers = _find_layers(model)
        for index, layer in enumerate(layers):
            if not self._first_layer <= index < self._last_layer:
                _strip(layer)
        before, after = _ends(model, decoder, layers)
        if not self.is_first:
            layers[self._first_layer - 1].forward = self._receive
            for name, module in before.items():
                if not (self._holds_tied_head(model) and module is model.get_input_embeddings()):
                    model.set_submodule(name, _NoEmbedding())
        if self.is_last:
            skip_unread_rows(layers[-1])
        else:
            layers[self._last_layer - 1].register_forward_hook(self._send)
            for name in after:
                model.set_submodule(name, nn.Identity())
            model.all_tied_weights_keys = {}
        # The rest of the checkpoint belongs to the other stages.
        model._keys_to_ignore_on_load_unexpected = {"."}  # noqa: SLF001 - the loader's own switch

    def _holds_tied_head(self, model: PreTrainedModel) -> bool:
        return self.is_last and bool(model.all_tied_weights_keys)

    def _receive(self, *_: object, **__: object) -> torch.Tensor:
        return self._received

    def _send(self, _: nn.Module, __: tuple[object, ...], output: torch.Tensor) -> None:
        self._sent = output


class _NoEmbedding(nn.Module):
    """Adds nothing, where a later stage's `forward` still adds position embeddings."""

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros(())


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    decoder = model.get_decoder()
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return decoder, module
    raise ConfigError(f"{type(model).__name__} has no list of decoder layers; it cannot be served")


def _ends(
    model: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules with weights that run before, and those that run after the layers, by name."""
    names = {module: name for name, module in model.named_modules()}
    parents = [module for module in model.modules() if decoder in module.modules()]
    ends = [
        module
        for parent in parents
        for module in parent.children()
        if module not in parents and module is not layers and _num_parameters(module)
    ]
    before = {names[module]: module for module in ends if isinstance(module, nn.Embedding)}
    after = {names[module]: module for module in ends if not isinstance(module, nn.Embedding)}
    return before, after


def _strip(layer: nn.Module) -> None:
    """Make a layer of another stage a pass-through; its plain attributes stay readable."""
    layer._modules.clear()  # noqa: SLF001 - no public way to drop what a module holds
    layer._parameters.clear()  # noqa: SLF001
    layer._buffers.clear()  # noqa: SLF001
    layer.forward = _pass_through


def _pass_through(hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return hidden


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
