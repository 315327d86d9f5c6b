"""One stage without a cluster: a shard of the model and the KV cache of its layers."""

import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from gllm_ray.config import ServiceConfig, kv_cache_of
from gllm_ray.messages import (
    MicroBatch,
    SampledTokens,
    SamplingParams,
    ScheduledSequence,
    StageInfo,
)
from gllm_ray.model.allocator import keep_freed_memory
from gllm_ray.model.attention.backend import (
    AttentionBackend,
    AttentionSetting,
    choose_attention,
    find_gpu,
)
from gllm_ray.model.attention.interface import paged_forward
from gllm_ray.model.checkpoint import find_directory, find_weight_files, open_checkpoint
from gllm_ray.model.compilation import compile_parts
from gllm_ray.model.constraints import RunningGrammars
from gllm_ray.model.decode_graphs import (
    Capture,
    DecodeGraphs,
    DecodeSetting,
    cuda_capture,
    graph_sizes,
)
from gllm_ray.model.dequantization import dequantized
from gllm_ray.model.experts import speed_up_experts
from gllm_ray.model.fusion import fuse_operators
from gllm_ray.model.inputs import PackedInputs, pack
from gllm_ray.model.kv_cache import (
    AttentionGeometry,
    LayerKvCache,
    allocate_kv_cache,
    block_bytes,
)
from gllm_ray.model.linear import quantize_linears, speed_up_linears
from gllm_ray.model.next_tokens import draw_tokens
from gllm_ray.model.operators.build import OperatorsUnavailableError
from gllm_ray.model.prompt_scoring import decoding_once, score_prompts
from gllm_ray.model.quantized_checkpoint import quantized_format
from gllm_ray.model.running_outputs import RunningOutputs
from gllm_ray.model.shard import Shard
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.model.weights import SafetensorsReader, dummy_tensors
from gllm_ray.stages.shard_settings import choose_dtype, choose_layers, prepare_device
from gllm_ray.stages.timeline import PhaseClock

logger = logging.getLogger(__name__)


class StageWorker:
    """Holds the layers of one stage and runs micro-batches through them.

    Attributes:
        bytes_read: Bytes of weights read from the checkpoint by `load`.
    """

    def __init__(self, config: ServiceConfig, stage_id: int) -> None:
        self._config = config
        self._stage_id = stage_id
        self._device = torch.device(config.pipeline.device)
        self._shard: Shard
        self._attention: AttentionBackend
        self._geometries: dict[nn.Module, AttentionGeometry] = {}
        self._caches: dict[nn.Module, LayerKvCache] = {}
        self._graphs: DecodeGraphs | None = None
        self._grammars = RunningGrammars(lambda: Tokenizer.for_model(config.model).grammars)
        self._outputs = RunningOutputs()
        self._held_by_others = 0  # bytes of the GPU, by other stages of this process
        self.bytes_read = 0

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds tokens."""
        return self._stage_id == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage draws tokens."""
        return self._stage_id == self._config.pipeline.num_stages - 1

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between stages; known after `load`."""
        return self._shard.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, KV cache and hidden states; known after `load`."""
        return self._shard.dtype

    @property
    def device(self) -> torch.device:
        """Where the stage computes."""
        return self._device

    @torch.inference_mode()
    def load(self) -> StageInfo:
        """Check the checkpoint, build this stage's shard and read its weights.

        Raises:
            ConfigError: The checkpoint or the layer split cannot be served.
        """
        clock = PhaseClock()
        checkpoint = open_checkpoint(self._config.model)
        if self.is_last and (tokenizer := self._config.model.tokenizer) is not None:
            find_directory(tokenizer)  # for grammars, which come later
        clock.end("checkpoint")
        transformers_logging.disable_progress_bar()
        self._device = prepare_device(self._config)
        if self._device.type == "cuda":
            self._held_by_others = torch.cuda.memory_allocated(self._device)
        model_config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
        layers = choose_layers(self._config, model_config, self._stage_id)
        dtype = choose_dtype(self._config, model_config, self._device)
        # transformers is not to dequantize what we do, or not to run it as it is stored.
        quantization = vars(model_config).pop("quantization_config", None)
        shard = Shard(model_config, layers, dtype, self._device)
        clock.end("model")
        self._load_weights(shard, range(*layers), quantization)
        num_parameters = shard.num_parameters
        clock.end("weights")
        self._convert_weights(shard)
        clock.end("conversion")
        self._shard = shard
        self._max_model_len = checkpoint.max_model_len
        kv_cache_bytes = self._probe()
        if self._device.type == "cpu":
            keep_freed_memory()
        kv_block_bytes = block_bytes(
            self._geometries, self._config.kv_cache.block_size, shard.dtype
        )
        clock.end("probe")
        return StageInfo(
            stage_id=self._stage_id,
            node=socket.gethostname(),
            first_layer=layers[0],
            last_layer=layers[1],
            num_parameters=num_parameters,
            weight_bytes=shard.weight_bytes,
            kv_block_bytes=kv_block_bytes,
            max_kv_blocks=kv_cache_bytes // kv_block_bytes - self._uses_graphs,
            attention=self._attention.description,
            startup_s=clock.times_s,
        )

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Reserve the KV cache; block ids run from 0 to `num_blocks - 1`."""
        self._reserve(num_blocks + self._uses_graphs)
        if self._uses_graphs:
            try:
                self._graphs = self._capture(cuda_capture(), reserved_block=num_blocks)
            except RuntimeError as error:
                logger.warning("decodes run without CUDA graphs, which cannot be made: %s", error)

    @torch.inference_mode()
    def execute(
        self, batch: MicroBatch, hidden: torch.Tensor | None, continued: Sequence[int] = ()
    ) -> torch.Tensor | SampledTokens:
        """Run a micro-batch through this stage.

        Args:
            batch: What to compute; every stage gets the same.
            hidden: `[num_tokens, hidden_size]` from the previous stage, None on the first.
            continued: For the first stage, the tokens of the micro-batch that this one continues.

        Returns:
            Hidden states of the same shape, or on the last stage a token for each sequence whose
            `sampling` is set, and the log probabilities of prompts that are asked for.
        """
        if self.is_last and batch.scored_chunks:
            return self._score(batch, hidden, continued)
        if self._graphs is not None and self._graphs.takes(batch):
            output = self._graphs.run(batch, hidden, continued)
        else:
            inputs = pack(batch, self._config.kv_cache.block_size, self._device, continued)
            output = self._forward(inputs, hidden)
        return self._draw(output, batch) if self.is_last else output

    def _score(
        self, batch: MicroBatch, hidden: torch.Tensor | None, continued: Sequence[int]
    ) -> SampledTokens:
        """`execute` on the last stage, where log probabilities of prompts are asked for."""
        inputs = pack(batch, self._config.kv_cache.block_size, self._device, continued)
        with decoding_once(self._shard.model):
            logits = self._forward(inputs, hidden)
            prompt_logprobs = score_prompts(
                batch,
                lambda rows: self._forward(replace(inputs, sample_rows=rows), hidden),
                self._device,
            )
        return self._draw(logits, batch)._replace(prompt_logprobs=prompt_logprobs)

    def _draw(self, logits: torch.Tensor, batch: MicroBatch) -> SampledTokens:
        sampled = draw_tokens(logits, batch, self._grammars, self._outputs)
        if not sampled.token_ids and self._device.type == "cuda":
            # Its answer says that all stages are through with it; tokens were waited for.
            torch.cuda.current_stream(self._device).synchronize()
        return sampled

    def forget_sequences(self) -> None:
        """All that goes on is going to be prefilled again."""
        self._grammars.clear()
        self._outputs.clear()

    def _load_weights(
        self, shard: Shard, layers: range, quantization: Mapping[str, Any] | None
    ) -> None:
        if self._config.model.load_format == "dummy":
            shard.load(dummy_tensors(shard.parameters_to_load(), shard.dtype, self._device))
            return
        reader = SafetensorsReader(find_weight_files(self._config.model, layers))
        stored = quantized_format(quantization) if quantization else None
        shard.load(dequantized(reader.tensors, stored, shard.dtype))
        self.bytes_read = reader.bytes_read

    def _convert_weights(self, shard: Shard) -> None:
        if self._config.model.quantization == "int8":
            quantize_linears(shard.model)  # a tied head gets weights of its own
        if self._device.type == "cpu":
            with suppress(OperatorsUnavailableError):  # then attention's description says why
                speed_up_linears(shard.model)
                speed_up_experts(shard.model)
                fuse_operators(shard.model)
        if self._config.model.compile:
            compile_parts(shard.model)

    def _forward(self, inputs: PackedInputs, hidden: torch.Tensor | None) -> torch.Tensor:
        with paged_forward(inputs, self._caches, self._attention):
            return self._shard.forward(inputs, hidden)

    @property
    def _uses_graphs(self) -> bool:
        """Whether decodes are to run from CUDA graphs; they need one KV block for themselves."""
        is_eager = self._config.model.enforce_eager or self._device.type == "cpu"
        return self._attention.is_graph_safe and not is_eager

    def _reserve(self, num_blocks: int) -> None:
        num_slots = num_blocks * self._config.kv_cache.block_size
        self._caches = allocate_kv_cache(self._geometries, num_slots, self.dtype, self._device)

    @torch.inference_mode()
    def _capture(self, capture: Capture, reserved_block: int) -> DecodeGraphs:
        sizes = graph_sizes(self._config.scheduler.max_decodes)
        hidden = torch.zeros(sizes[-1], self.hidden_size, dtype=self.dtype, device=self._device)
        block_size = self._config.kv_cache.block_size
        setting = DecodeSetting(
            sizes=sizes,
            max_blocks=-(-self._max_model_len // block_size),
            block_size=block_size,
            reserved_block=reserved_block,
            hidden=None if self.is_first else hidden,
            is_last=self.is_last,
            device=self._device,
        )
        return DecodeGraphs(self._forward, capture, setting)

    def _probe(self) -> int:
        """Learn what the attention modules cache, and how many bytes their cache may take."""
        self._geometries = self._shard.probe(num_tokens=1, num_samples=1)
        self._attention = choose_attention(
            self._config.model.attention_backend,
            AttentionSetting(
                gpu=find_gpu(self._device),
                dtype=self.dtype,
                geometries=tuple(self._geometries.values()),
                block_size=self._config.kv_cache.block_size,
            ),
        )
        kv_cache = kv_cache_of(self._config, self._stage_id)
        if self._device.type == "cpu":
            return kv_cache.kv_cache_bytes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        held = torch.cuda.memory_allocated(self._device)
        self._run_largest_batches(self._max_model_len)
        activations = torch.cuda.max_memory_allocated(self._device) - held
        if self._uses_graphs:
            activations *= 2  # graphs have memory of their own, for no larger batches
        torch.cuda.empty_cache()
        if kv_cache.kv_cache_bytes is not None:
            return kv_cache.kv_cache_bytes
        free, total = torch.cuda.mem_get_info(self._device)
        share = kv_cache.memory_utilization * self._config.pipeline.gpus_per_stage
        own = held - self._held_by_others
        return max(0, min(int(total * share) - own, free) - activations)

    def _run_largest_batches(self, max_model_len: int) -> None:
        """Reach the peak of the activations, those of attention and sampler included."""
        num_rows = self._config.scheduler.max_batch_tokens
        chunk = min(num_rows, max_model_len)
        self._reserve(num_blocks=1)
        # A draw from every row; then as many prefill rows as can be, at the end of their contexts.
        for chunks in ([1] * num_rows, [chunk] * -(-num_rows // chunk)):
            batch = self._batch_in_block_0(chunks, max_model_len)
            hidden = torch.zeros(batch.num_tokens, self.hidden_size, dtype=self.dtype)
            self.execute(batch, None if self.is_first else hidden.to(self._device))
        self._caches = {}

    def _batch_in_block_0(self, chunks: list[int], max_model_len: int) -> MicroBatch:
        """Sequences of one short decode or one long-context chunk each, all of them drawn from."""
        block_size = self._config.kv_cache.block_size
        starts = [max_model_len - chunk if chunk > 1 else 0 for chunk in chunks]
        return MicroBatch(
            batch_id=0,
            sequences=tuple(
                ScheduledSequence(
                    seq_id=index,
                    epoch=0,
                    start=start,
                    token_ids=(0,) * chunk,
                    block_table=(0,) * -(-(start + chunk) // block_size),
                    sampling=SamplingParams(temperature=1.0),
                )
                for index, (start, chunk) in enumerate(zip(starts, chunks, strict=True))
            ),
        )
