"""Train the embedded demo model: `python -m gllm_ray.demo.train --output DIRECTORY`.

A `LlamaForCausalLM` of three million parameters learns the running interpreter's standard library
and short questions with their answers. The same interpreter, library versions, seed and number of
steps see the same data in the same order.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gllm_ray.demo.corpus import Conversation, Corpus, build_corpora

VOCAB_SIZE = 4096
MAX_POSITION_EMBEDDINGS = 1024
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role ' ~ message['role'] ~ ' must be system, user or assistant') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""
# Rows and length of a batch, in turn: mostly short rows, which are fast, and enough long ones
# for positions up to MAX_POSITION_EMBEDDINGS.
BATCH_SHAPES = ((16, 256), (16, 256), (16, 256), (4, 1024))
TOKENS_PER_BATCH = 4096
HELD_OUT_TOKENS = 40_960


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained.

    Attributes:
        steps: Optimizer steps; the learning rate rises, then falls to zero, over them.
        seed: Decides which pieces of the corpus each step sees.
        learning_rate: The highest one, of both optimizers.
        batch_shapes: (rows, tokens a row) of each batch, in turn.
    """

    steps: int
    seed: int
    learning_rate: float = 5e-3
    batch_shapes: tuple[tuple[int, int], ...] = BATCH_SHAPES

    def scale(self, step: int) -> float:
        """Return the fraction of `learning_rate` that `step`, from 0, is taken with."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """A corpus as token ids.

    Attributes:
        code: All modules, each followed by the end token; shape [num_code_tokens].
        chat: All conversations as the chat template renders them; shape [num_chat_tokens].
        chat_starts: Where in `chat` each conversation begins.
    """

    code: torch.Tensor
    chat: torch.Tensor
    chat_starts: list[int]


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of `VOCAB_SIZE` tokens from `corpus`."""
    bpe = Tokenizer(models.BPE())
    # A line break and an indentation are tokens of their own, so that a prompt may end in either.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n| {2,}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spoken = [turn["content"] for turns in corpus.conversations for turn in turns]
    bpe.train_from_iterator(corpus.modules + spoken, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=MAX_POSITION_EMBEDDINGS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tokenize(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> TokenStreams:
    """Encode and concatenate the documents of `corpus`."""
    modules = tokenizer([text + END for text in corpus.modules], verbose=False)["input_ids"]
    conversations = [_render(turns, tokenizer) for turns in corpus.conversations]
    starts = [0]
    for ids in conversations[:-1]:
        starts.append(starts[-1] + len(ids))
    return TokenStreams(
        torch.tensor([token for ids in modules for token in ids]),
        torch.tensor([token for ids in conversations for token in ids]),
        starts,
    )


def _render(turns: Conversation, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.apply_chat_template(turns, return_dict=False)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, its weights drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(streams: TokenStreams, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield token ids, [rows, length] of each batch shape in turn: half code, half chat."""
    rng = random.Random(recipe.seed)
    for rows, length in islice(cycle(recipe.batch_shapes), recipe.steps):
        last_code, last_chat = len(streams.code) - length, len(streams.chat) - length
        code = [rng.randint(0, last_code) for _ in range(rows // 2)]
        chat = [min(rng.choice(streams.chat_starts), last_chat) for _ in range(rows - rows // 2)]
        yield torch.stack(
            [streams.code[start : start + length] for start in code]
            + [streams.chat[start : start + length] for start in chat]
        )


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, and AdamW for the embedding and the norms.

    Muon needs a fraction of the tokens that AdamW alone needs for the same loss; three
    Newton-Schulz iterations instead of five keep it cheap on a CPU.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    rate = recipe.learning_rate
    return [
        torch.optim.Muon(matrices, rate, adjust_lr_fn="match_rms_adamw", ns_steps=3),
        torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: LlamaForCausalLM, streams: TokenStreams, recipe: Recipe) -> Iterator[float]:
    """Train `model` in place; yield the loss of each step in nats per token."""
    optimizers = build_optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, recipe.scale) for each in optimizers]
    model.train()
    for input_ids in batches(streams, recipe):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        yield loss.item()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats per token over the first `HELD_OUT_TOKENS` of `tokens`."""
    model.eval()
    length = MAX_POSITION_EMBEDDINGS // 2
    rows = tokens[:HELD_OUT_TOKENS].unfold(0, length, length)
    losses = [model(input_ids=row, labels=row).loss.item() for row in rows.split(4)]
    return sum(losses) / len(losses)


def main() -> None:
    """Train, evaluate, and save the model with a record of how it was made."""
    parser = argparse.ArgumentParser(prog="python -m gllm_ray.demo.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=750, help="optimizer steps (default 750)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe = Recipe(args.steps, args.seed)
    began = time.monotonic()
    training, held_out = build_corpora(args.seed)
    tokenizer = train_tokenizer(training)
    streams = tokenize(training, tokenizer)
    model = build_model(tokenizer)
    print(
        f"{model.num_parameters():,} parameters; {len(streams.code):,} tokens of code, "
        f"{len(streams.chat):,} of conversation",
        flush=True,
    )
    losses: list[float] = []
    for step, loss in enumerate(train(model, streams, recipe), start=1):
        losses.append(loss)
        if step % 10 == 0 or step == args.steps:
            mean = sum(losses[-10:]) / len(losses[-10:])
            seconds = time.monotonic() - began
            print(f"step {step}/{args.steps}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    duration_s, cpu_time_s = round(time.monotonic() - began), round(time.process_time())

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.bfloat16().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    unseen = tokenize(held_out, tokenizer)
    record = {
        "num_parameters": model.num_parameters(),
        "training_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "held_out_code_loss": round(evaluate(model.float(), unseen.code), 4),
        "held_out_chat_loss": round(evaluate(model.float(), unseen.chat), 4),
        "loss_unit": "nats per token; training: mean of the last 100 steps",
        "num_code_tokens": len(streams.code),
        "num_chat_tokens": len(streams.chat),
        "num_trained_tokens": args.steps * TOKENS_PER_BATCH,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "learning_rate": recipe.learning_rate,
        "duration_s": duration_s,
        "cpu_time_s": cpu_time_s,
        "hardware": f"{args.threads} threads on {os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps(record, indent=2)
    (args.output / "training.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
