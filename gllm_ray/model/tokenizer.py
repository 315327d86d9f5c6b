"""Text to tokens: encoding, the chat template, which tokens end an output, and how to sample.

Only what the `tokenizers` library can read is served, and never code that came with a model.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from jinja2 import TemplateSyntaxError

from gllm_ray.config import ModelConfig, ToolParserName
from gllm_ray.errors import ConfigError, InvalidRequestError
from gllm_ray.model.chat_template import (
    TEMPLATE_REFUSALS,
    find_named_roles,
    guess_tool_parser,
    variables_of,
)
from gllm_ray.model.checkpoint import find_directory, read_json
from gllm_ray.model.detokenizer import (
    ByteLevelDecoder,
    Detokenizer,
    StopRule,
    TextDecoder,
    WindowDecoder,
)
from gllm_ray.model.generation_config import SamplingDefaults
from gllm_ray.model.grammar import GrammarCompiler
from gllm_ray.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough for any decoder to see whether the first output token continues a text.
_NUM_CONTEXT_TOKENS = 8


class Tokenizer:
    """A model's tokenizer; safe to use from several threads.

    Args:
        tokenizer: What `transformers` loaded.
        stop_token_ids: Tokens that end an output.
        vocab_size: Rows of the model's embedding; None: as many as the tokenizer has tokens.
        sampling_defaults: Of requests to the model.
        tool_parser: See `ModelConfig.tool_parser`.

    Attributes:
        vocabulary: Its tokens.
        max_token_chars: No token stands for more characters than this.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        stop_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        sampling_defaults: SamplingDefaults = SamplingDefaults(),  # noqa: B008 - it is frozen
        tool_parser: ToolParserName = "auto",
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Settings a tokenizer.json may carry; a prompt is served whole or refused.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = {
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.vocabulary = Vocabulary(self._backend, self._special_ids)
        self._tool_parser = tool_parser
        self.stop_token_ids = stop_token_ids
        self.sampling_defaults = sampling_defaults
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self.max_token_chars = max(map(len, self._backend.get_vocab()))

    @classmethod
    def load(
        cls,
        path: str,
        revision: str | None = None,
        *,
        model_directory: Path | None = None,
        generation_config: Literal["auto", "none"] = "auto",
        tool_parser: ToolParserName = "auto",
    ) -> Self:
        """Load a tokenizer from wherever a model may lie.

        Args:
            path: A directory, a `package://` address or a Hugging Face model id.
            revision: Branch, tag or commit, if `path` is a model id.
            model_directory: Where config.json and generation_config.json lie, if not at `path`.
            generation_config: Whether generation_config.json says how to sample; its end tokens
                count in any case.
            tool_parser: See `ModelConfig.tool_parser`.

        Raises:
            ConfigError: There is no tokenizer, it needs code from the model's repository, its chat
                template is no template, or generation_config.json is no JSON object or says to
                sample in a way that does not exist.
        """
        # It imports torch, which is for those who load a tokenizer to wait for.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        directory = find_directory(path, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"no usable tokenizer at {path!r}: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"tokenizer at {path!r} is a {type(tokenizer).__name__}: a tokenizer.json is needed"
            )
        _compile_chat_template(tokenizer, path)
        config = _read_if_any((model_directory or directory) / "config.json")
        config |= config.get("text_config", {})
        generation = _read_if_any((model_directory or directory) / "generation_config.json")
        said = generation if generation_config == "auto" else {}
        eos = (tokenizer.eos_token_id, config.get("eos_token_id"), generation.get("eos_token_id"))
        return cls(
            tokenizer,
            stop_token_ids=frozenset(_token_ids(eos)),
            vocab_size=config.get("vocab_size"),
            sampling_defaults=SamplingDefaults.of(said),
            tool_parser=tool_parser,
        )

    @classmethod
    def for_model(cls, model: ModelConfig) -> Self:
        """Load the tokenizer that a configuration names; see `load`."""
        path, revision, directory = model.path, model.revision, None
        if model.tokenizer is not None:
            directory = find_directory(path, revision)
            path, revision = model.tokenizer, None
        return cls.load(
            path,
            revision,
            model_directory=directory,
            generation_config=model.generation_config,
            tool_parser=model.tool_parser,
        )

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Makes grammars of these tokens; takes up to some seconds at the first call.

        Raises:
            InvalidRequestError: That cannot be done.
        """
        return GrammarCompiler(self._backend.to_str(), self.stop_token_ids)

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return "tools" in variables_of(self._tool_template)

    @cached_property
    def reads_tool_calls(self) -> bool:
        """Whether the chat template shows earlier tool calls to the model."""
        return "tool_calls" in self._tool_template

    @cached_property
    def named_roles(self) -> frozenset[str]:
        """The roles whose messages the chat template shows to the model with a name."""
        return find_named_roles(self._render)

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """What the chat template may be told beside the conversation and its tools."""
        given = {"messages", "raise_exception", "strftime_now", *self._tokenizer.special_tokens_map}
        taken = signature(self._tokenizer.apply_chat_template).parameters
        return frozenset(variables_of(self._tool_template) - given - taken.keys())

    @cached_property
    def tool_parser(self) -> ToolParserName:
        """How the model spells the tool calls that it decides on; never auto."""
        if self._tool_parser != "auto":
            return self._tool_parser
        return guess_tool_parser(self._tool_template)

    @property
    def _tool_template(self) -> str:
        """The chat template of conversations with tools; empty: there is none."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return template or ""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, by default with the special tokens the model expects around one."""
        # As a batch of one, because other threads go on only while a batch is encoded.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, in which a special token has its name."""
        return self._decode(token_ids, ())

    def text_offsets(self, token_ids: Sequence[int], text: str) -> list[int]:
        """How many characters of the text that tokens were made of stand before each of them.

        Special tokens that the text does not spell, as those around it, have no part in it.
        """
        decoder: TextDecoder
        if self.vocabulary.is_byte_level:
            decoder = ByteLevelDecoder(self.vocabulary.token_bytes)
        else:
            decoder = WindowDecoder(self.decode)
        offsets, num_chars = [], 0
        for token_id in token_ids:
            # A tokenizer may spell a text in another way, so that its tokens' is longer.
            offsets.append(min(num_chars, len(text)))
            is_special = token_id in self._special_ids
            if not is_special or text.startswith(self.decode([token_id]), num_chars):
                num_chars += len(decoder.step(token_id))
        return offsets

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **options: Any,  # noqa: ANN401 - templates take what they like
    ) -> list[int]:
        """Tokens of a conversation, up to where the model's answer begins.

        Args:
            messages: Each with `role` and `content`, and what else belongs to the role.
            tools: What the model may call, if anything.
            options: Of transformers' method of this name, or among `template_variables`.

        Raises:
            InvalidRequestError: There is no template, or it refuses the messages or the tools.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions instead", param="messages"
            )
        try:
            text = self._render(messages, tools, **options)
            text.encode()  # to say in Unicode's words what is wrong with half a surrogate pair
            return self.encode(text, add_special_tokens=False)
        except TEMPLATE_REFUSALS as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            tokenize=False,
            **{"add_generation_prompt": True} | options,
        )
        return str(text)

    def new_detokenizer(
        self,
        prompt_ids: Sequence[int],
        rule: StopRule = StopRule(),  # noqa: B008 - it is a tuple
        shown_tokens: Collection[str] = (),
        *,
        skips_special: bool = True,
    ) -> Detokenizer:
        """A detokenizer for one output.

        Args:
            prompt_ids: What the output continues.
            rule: Where its text ends.
            shown_tokens: The special tokens that have text in any case.
            skips_special: Whether the others have none; else the text of each is its name.
        """
        shown = self._special_ids
        if skips_special:
            shown = shown & set(map(self._backend.token_to_id, shown_tokens))
        decoder: TextDecoder
        if self.vocabulary.is_byte_level:
            bytes_of = self.vocabulary.text_bytes
            names = {token_id: self.vocabulary.token_bytes(token_id) for token_id in shown}
            decoder = ByteLevelDecoder(
                (lambda id_: names.get(id_) or bytes_of(id_)) if names else bytes_of
            )
        else:
            hidden = self._special_ids - shown
            decoder = WindowDecoder(
                lambda ids: self._decode(ids, hidden), prompt_ids[-_NUM_CONTEXT_TOKENS:]
            )
        return Detokenizer(decoder, rule)

    def _decode(self, token_ids: Sequence[int], hidden_ids: Collection[int]) -> str:
        ids = [token_id for token_id in token_ids if token_id not in hidden_ids]
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def _compile_chat_template(tokenizer: "PreTrainedTokenizerFast", path: str) -> None:
    """Find the mistakes that transformers would find at the first chat."""
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template at {path!r} has a mistake in line {error.lineno}: {error.message}"
        ) from error
    except TEMPLATE_REFUSALS:
        pass  # It compiled, and may want other messages.


def _read_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_ids(fields: Iterable[int | list[int] | None]) -> Iterator[int]:
    """All ids of fields that may hold one, several or none."""
    for field in fields:
        if field is not None:
            yield from [field] if isinstance(field, int) else field
