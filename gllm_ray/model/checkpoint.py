"""What can be known of a checkpoint without loading it: where it lies, and whether it is served.

Only JSON is read and no tensor library is imported, so any process may check a model.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gllm_ray.config import PACKAGE_SCHEME, ModelConfig, resolve_package_path
from gllm_ray.errors import ConfigError
from gllm_ray.model.architectures import refusal_reason
from gllm_ray.model.quantized_checkpoint import quantized_format

_METADATA_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
# Subfolders and consolidated files hold the same weights once more, in other layouts.
_IGNORED_FILES = ["*/*", "consolidated*"]
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_LENGTH_DEPENDENT_ROPES = ("longrope", "su")
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
# The first number in a tensor's name is its layer, whatever the architecture calls layers.
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model directory that passed every check that needs no weights.

    Attributes:
        directory: Where config.json lies.
        max_model_len: Tokens of prompt and output a sequence may have.
    """

    directory: Path
    max_model_len: int


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """Find a model and refuse what cannot be served, before any memory is taken.

    Weights are not downloaded; those of a local directory must be there.

    Raises:
        ConfigError: The path is missing, holds no safetensors weights, needs code of its own, is
            quantized in a way that cannot be read, is of an unsupported architecture, or is too
            short for `max_model_len`.
    """
    reads_weights = model.load_format != "dummy"
    directory = find_directory(model.path, model.revision)
    config = read_json(directory / "config.json")
    if (quantization := config.get("quantization_config")) and reads_weights:
        try:
            quantized_format(quantization)
        except ConfigError as error:
            raise ConfigError(f"model.path={model.path!r}: {error}") from None
    model_type = str(config.get("model_type"))
    reason = refusal_reason(model_type, config)
    if reason is not None:
        raise ConfigError(
            f"model.path={model.path!r}: model_type {model_type!r} is not supported: {reason}"
        )
    if reads_weights and local_directory(model.path) is not None:
        find_weight_files(model)
    return Checkpoint(
        directory=directory,
        max_model_len=_max_model_len(model, config),
    )


def find_weight_files(model: ModelConfig, layers: range | None = None) -> tuple[Path, ...]:
    """The safetensors files of a model; those of a model id that are not here are downloaded.

    Args:
        model: Which model.
        layers: Leave out the files that hold nothing but other layers.

    Raises:
        ConfigError: One of them is missing.
    """
    directory = find_directory(model.path, model.revision)
    names = _weight_file_names(directory, layers)
    directory = find_directory(model.path, model.revision, weight_files=names)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        others = sorted(file.name for file in directory.glob("*.bin"))
        hint = f"; it has {', '.join(others)}, so convert it to safetensors" if others else ""
        raise ConfigError(
            f"model.path={model.path!r}: there is no {missing[0]} in {str(directory)!r}, and only "
            f"safetensors weights are read{hint}"
        )
    return tuple(directory / name for name in names)


def find_directory(
    path: str, revision: str | None = None, *, weight_files: Sequence[str] = ()
) -> Path:
    """The local directory of a path, a `package://` address or a Hugging Face model id.

    A model id is downloaded, of its weights these files.

    Raises:
        ConfigError: There is no such directory, and no such model can be downloaded.
    """
    directory = local_directory(path)
    if directory is not None:
        return directory
    if path.count("/") > 1 or path.startswith((".", "/", "~", PACKAGE_SCHEME)):
        raise ConfigError(
            f"model.path={path!r}: there is no directory {resolve_package_path(path)!r}"
        )
    return _download(path, revision, [*_METADATA_FILES, *weight_files])


def local_directory(path: str) -> Path | None:
    """Where a path or a `package://` address leads; None: it is none, but perhaps a model id."""
    directory = Path(resolve_package_path(path)).expanduser()
    return directory if directory.is_dir() else None


def read_json(file: Path) -> dict[str, Any]:
    """The object that one of a checkpoint's files holds.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path: there is no {file.name} in {str(file.parent)!r}") from None
    except ValueError as error:
        raise ConfigError(f"model.path: {str(file)!r} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {str(file)!r} must hold a JSON object")
    return content


def _download(model_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=files,
                ignore_patterns=_IGNORED_FILES,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path={model_id!r}: there is no such directory, and the Hugging Face Hub "
            f"cannot provide revision {revision or 'main'}: {str(error).splitlines()[0]}"
        ) from None


def _max_model_len(model: ModelConfig, config: dict[str, Any]) -> int:
    limit = _num_positions(config)
    if limit is None and model.max_model_len is None:
        raise ConfigError(
            f"model.path={model.path!r}: its config.json sets none of {', '.join(_LENGTH_KEYS)}; "
            "set model.max_model_len"
        )
    if model.max_model_len is None:
        return int(limit)
    if limit is not None and model.max_model_len > limit:
        raise ConfigError(
            f"model.max_model_len={model.max_model_len}: the model can serve {limit} positions; "
            "lower it"
        )
    return model.max_model_len


def _num_positions(config: dict[str, Any]) -> int | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in _LENGTH_DEPENDENT_ROPES:
        # Past the original length these turn every key of the batch another way.
        key = "original_max_position_embeddings"
        return config.get(key) or rope.get(key)
    return next((config[key] for key in _LENGTH_KEYS if config.get(key)), None)


def _weight_file_names(directory: Path, layers: range | None) -> list[str]:
    if not (directory / _INDEX_FILE).is_file():
        return [_SINGLE_FILE]
    files: dict[str, str] = read_json(directory / _INDEX_FILE).get("weight_map", {})
    return sorted({file for tensor, file in files.items() if _is_of(tensor, layers)})


def _is_of(tensor: str, layers: range | None) -> bool:
    """Whether a tensor belongs to one of these layers, or to none."""
    layer = _LAYER.search(tensor)
    return layers is None or layer is None or int(layer[1]) in layers
