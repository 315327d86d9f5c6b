"""Which model is served."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from gllm_ray.errors import ConfigError
from gllm_ray.strict_schema import StrictModel

PACKAGE_SCHEME = "package://"
_PACKAGE_PATH = re.compile(r"package://[A-Za-z_]\w*/.+")
AttentionName = Literal["auto", "triton", "xformers", "flash3", "torch", "cpp"]
ToolParserName = Literal["auto", "none", "hermes", "llama3_json"]


class ModelConfig(StrictModel):
    """Which model, and how its weights are read."""

    path: str = Field(
        min_length=1,
        description="A directory, a Hugging Face id, or `package://<package>/<directory>`.",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="The name clients use; null: `path` as written."
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Where the tokenizer lies; null: with the model."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a Hugging Face id."
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="auto: requests that leave `temperature`, `top_p`, `top_k`, `min_p` or "
        "`repetition_penalty` out have that of the model's generation_config.json, if there is "
        "one; none: OpenAI's.",
    )
    tool_parser: ToolParserName = Field(
        default="auto",
        description="How the model spells the tool calls that it decides on by itself; hermes: "
        "`<tool_call>` around JSON, as Qwen2.5, Qwen3 and Hermes; llama3_json: JSON alone, as "
        "Llama 3; auto: by its chat template; none: it makes no such calls.",
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="dummy: seeded random weights; only config.json is read."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of weights, KV cache and activations; auto: as in config.json, but on cpu "
        "float32 for float16.",
    )
    quantization: Literal["int8"] | None = Field(
        default=None,
        description="int8: weights of linear layers are stored as int8 with a scale for each "
        "output; cpu only. null: none.",
    )
    attention_backend: AttentionName = Field(
        default="auto",
        description="triton: our own kernels; xformers for decodes, with triton; flash3: "
        "FlashAttention-3; torch: slow, and takes everything; cpp: our own operator for cpu. auto: "
        "triton or cpp, by the device, else torch.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="Compute decodes without CUDA graphs, as other micro-batches are.",
    )
    compile: bool = Field(
        default=False,
        description="Compile norms, MLPs and rotary embeddings by torch.compile, which takes up "
        "to a minute more at start; cuda only.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Prompt and output tokens of a sequence; null: what the model was made for.",
    )

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_name or self.path

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path.startswith(PACKAGE_SCHEME) and not _PACKAGE_PATH.fullmatch(self.path):
            raise ValueError(f"path={self.path!r}: must be package://<package>/<directory>")
        is_directory = self.path.startswith((PACKAGE_SCHEME, "/", ".", "~"))
        if self.revision is not None and (is_directory or os.path.isdir(self.path)):
            raise ValueError(
                f"revision={self.revision!r}: must be left out when path is a directory"
            )
        return self


def resolve_package_path(path: str) -> str:
    """Replace `package://pkg/dir` by the directory inside the installed package.

    Raises:
        ConfigError: There is no such package.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return path
    package, _, directory = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{path}: must name an installed package, and {package!r} is none")
    return str(Path(spec.origin).parent / directory)
