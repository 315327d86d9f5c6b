"""Train the embedded demo model: `python -m gllm_ray.demo.train --output DIRECTORY`.

A `LlamaForCausalLM` of four million parameters learns the running interpreter's standard library
and short questions with their answers. The same interpreter, library versions, seed and number of
steps see the same data in the same order.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
BATCH_TOKENS = 4096
HELD_OUT_TOKENS = 40_960


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


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary of `VOCAB_SIZE` tokens from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
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
        intermediate_size=512,
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


def batches(streams: TokenStreams, seed: int) -> Iterator[torch.Tensor]:
    """Yield token ids of shape `BATCH_SHAPES` in turn: half code, half conversations."""
    rng = random.Random(seed)
    while True:
        for rows, length in BATCH_SHAPES:
            code = [rng.randrange(len(streams.code) - length) for _ in range(rows // 2)]
            chat = [
                min(rng.choice(streams.chat_starts), len(streams.chat) - length)
                for _ in range(rows - len(code))
            ]
            yield torch.stack(
                [streams.code[start : start + length] for start in code]
                + [streams.chat[start : start + length] for start in chat]
            )


def train(
    model: LlamaForCausalLM, streams: TokenStreams, steps: int, seed: int, learning_rate: float
) -> Iterator[tuple[int, float]]:
    """Train `model` in place; yield each step's number and its loss in nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = max(1, steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    for step, input_ids in zip(range(1, steps + 1), batches(streams, seed), strict=False):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step, loss.item()


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
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps (default 1600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    training, held_out = build_corpora(args.seed)
    dialogue = [turn["content"] for turns in training.conversations for turn in turns]
    tokenizer = train_tokenizer([*training.modules, *dialogue])
    streams, held_out_streams = tokenize(training, tokenizer), tokenize(held_out, tokenizer)
    model = build_model(tokenizer)
    print(
        f"{model.num_parameters():,} parameters; {len(streams.code):,} tokens of code, "
        f"{len(streams.chat):,} of conversation",
        flush=True,
    )
    recent: list[float] = []
    for step, loss in train(model, streams, args.steps, args.seed, args.learning_rate):
        recent = [*recent[-99:], loss]
        if step % 20 == 0 or step == args.steps:
            mean = sum(recent) / len(recent)
            print(
                f"step {step}/{args.steps}  loss {mean:.3f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    record = {
        "num_parameters": model.num_parameters(),
        "training_loss": round(sum(recent) / len(recent), 4),
        "held_out_code_loss": round(evaluate(model, held_out_streams.code), 4),
        "held_out_chat_loss": round(evaluate(model, held_out_streams.chat), 4),
        "loss_unit": "nats per token; training: mean of the last 100 steps",
        "num_code_tokens": len(streams.code),
        "num_chat_tokens": len(streams.chat),
        "num_trained_tokens": args.steps * BATCH_TOKENS,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "duration_s": round(time.monotonic() - began),
        "hardware": f"{args.threads} CPU cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.bfloat16().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
