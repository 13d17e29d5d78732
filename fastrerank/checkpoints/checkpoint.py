"""Checkpoints: a local folder or a hub id opened as configuration files, and weights that are read on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastrerank.checkpoints.config_values import InvalidConfig, check_sizes, shown
from fastrerank.checkpoints.layouts import TOKEN_PROJECTION, marked_layout, refuse_marked_layout
from fastrerank.checkpoints.tensors import Tensor, Tensors, find_weight_files
from fastrerank.runtime.naming import model_name, shortened

__all__ = [
    "Checkpoint",
    "Module",
    "Tensor",
    "Tensors",
    "max_length_of",
    "open_checkpoint",
    "position_limit",
    "read_json",
    "untrained",
]

# Everything that loading a checkpoint can need, once without and once with pickled weights. The hub matches these
# with fnmatch, where * also crosses folder borders.
_CONFIG_PATTERNS = ["*.json", "*.txt", "*.jinja", "*.model", TOKEN_PROJECTION]
_SAFETENSORS_PATTERNS = ["model.safetensors", "model-*.safetensors", "*/model.safetensors", "*/model-*.safetensors"]
_PICKLE_PATTERNS = ["pytorch_model*.bin", "*/pytorch_model*.bin"]
_IGNORE_PATTERNS = ["onnx/*", "openvino/*", "coreml/*", "*/onnx/*", "*/openvino/*", "tf_model*", "flax_model*"]

_TOKENIZER_LIMIT = ("tokenizer_config.json", "model_max_length")
_SENTENCE_CONFIGS = [
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
# Families that number positions from pad_token_id + 1.
_PADDED_POSITIONS = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"}
# Families with a learned table of absolute positions: a longer input has no row to read.
_LEARNED_POSITIONS = {"bert", "electra", "distilbert", "albert", "ernie", *_PADDED_POSITIONS}
# tokenizer_config.json writes "no limit" as 1e30.
_SANE_LENGTH = 10_000_000
# Module types of sentence-transformers that carry weights of their own.
_WEIGHTED_MODULES = {"Transformer", "Dense", "LayerNorm", "WeightedLayerPooling", "CNN", "LSTM"}


@dataclass(frozen=True)
class Module:
    """One entry of a sentence-transformers `modules.json`.

    `type` is the last dotted component ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", ...), `path` the
    module's folder (which need not exist for modules without files), `config` its config.json ({} if it has none),
    `dotted` the whole name of its class.
    """

    type: str
    path: Path
    config: dict[str, Any]
    dotted: str = ""

    def __repr__(self) -> str:
        return f"Module({self.type!r}, {shortened(str(self.path))!r})"

    def tensors(self) -> Tensors:
        """Open the module's weights; their values are read on demand. Raises as `Checkpoint.tensors` does."""
        return Tensors.open(self.path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its configuration files, and its weights on demand.

    Attributes:
        path: the root folder (the sentence-transformers root, where there is one).
        transformer_path: the folder with the transformer's config.json, weights and tokenizer; often `path` itself.
        config: the transformer's config.json.
        modules: the entries of modules.json in order; [] for a plain transformers folder.
        st_config: config_sentence_transformers.json; {} if absent.
        max_seq_length: the checkpoint's limit in tokens, special tokens included; None if it states none.

    Example:
        >>> checkpoint = open_checkpoint("path/to/model")  # doctest: +SKIP
        >>> with checkpoint.tensors() as tensors:          # doctest: +SKIP
        ...     print(checkpoint.config["model_type"], len(tensors))
    """

    path: Path
    transformer_path: Path
    config: dict[str, Any]
    modules: list[Module] = field(default_factory=list)
    st_config: dict[str, Any] = field(default_factory=dict)
    max_seq_length: int | None = None
    trust_remote_code: bool = False

    def __repr__(self) -> str:
        kind, names = self.config.get("model_type"), self.config.get("architectures") or []
        return f"Checkpoint({model_name(self.path)!r}, model_type={kind!r}, architectures={names!r})"

    def sentence_config(self) -> dict[str, Any]:
        """What sentence-transformers saved about its Transformer module; {} for a plain transformers folder."""
        if not self.modules:
            return {}
        return next(filter(None, (read_json(self.transformer_path / name) for name in _SENTENCE_CONFIGS)), {})

    def tensors(self) -> Tensors:
        """Open the transformer's weights; their values are read on demand, see `Tensors`.

        Raises FileNotFoundError if there are none, ValueError naming the file if one is damaged, and ImportError if
        they are a PyTorch pickle and torch is not installed.
        """
        return Tensors.open(self.transformer_path)

    def activation(self) -> str | None:
        """Name of the saved cross-encoder activation, as sentence-transformers resolves it; None if none is saved.

        Returns "identity", "sigmoid", "relu", "tanh", ...: the lower-case class name of a `torch.` class. A class from
        elsewhere raises ValueError, unless trust_remote_code is set: then its dotted path is returned unchanged.
        """
        nested = self.config.get("sentence_transformers")
        saved = self.st_config.get("activation_fn")
        if saved is None and isinstance(nested, Mapping):
            saved = nested.get("activation_fn")
        if saved is None:
            saved = self.config.get("sbert_ce_default_activation_function")
        if saved is None:
            return None
        if not isinstance(saved, str):
            raise ValueError(f"{self.path}: the saved activation function must be a dotted path, got {saved!r}")
        if saved.startswith("torch."):
            return saved.rpartition(".")[2].lower()
        if self.trust_remote_code:
            return saved
        raise ValueError(
            f"{self.path}: the saved activation function {saved!r} is not part of torch, and loading it would run code "
            "that came with the checkpoint. Pass activation_fn to choose one, or trust_remote_code=True to allow it."
        )


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: bool | str | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a local folder or a hub repository, as `from_pretrained` finds it, without loading weights.

    Args:
        model: a folder, or a hub id such as "cross-encoder/ms-marco-MiniLM-L6-v2". A folder wins over a hub id.
        revision, cache_folder, local_files_only, token: handed to huggingface_hub.snapshot_download; HF_HUB_OFFLINE
            and the other environment variables of huggingface_hub apply. Not used for a folder.
        trust_remote_code: see `Checkpoint.activation`. No code of a checkpoint is ever imported here.

    Raises:
        FileNotFoundError: the folder or its config.json is missing.
        OSError: the hub could not provide the repository.
        ValueError: a configuration file is malformed, holds a size that no model can have, or marks a multi-vector
            model (ColBERT), which no method serves.

    Example:
        >>> open_checkpoint("path/to/model").max_seq_length  # doctest: +SKIP
        512
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a folder or a hub id (str or os.PathLike), got {type(model).__name__}")
    if not os.fspath(model):
        raise ValueError('model must be a folder or a hub id, got the empty string ("." is the working folder)')
    folder = Path(os.fspath(model)).expanduser()
    if folder.is_dir():
        return _open_folder(folder, trust_remote_code)
    if folder.is_file():
        raise NotADirectoryError(f"model must be a checkpoint folder or a hub id, but {folder} is a file")
    if not isinstance(model, str) or _looks_like_path(model):
        raise FileNotFoundError(f"the checkpoint folder {folder} does not exist; pass an existing folder or a hub id")
    return _open_folder(
        _download(model, revision, cache_folder, local_files_only, token, trust_remote_code), trust_remote_code
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; {} if there is no such file. ValueError naming the file if it is malformed."""
    content = _read_json_value(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Most tokens that a model with learned absolute positions can read; None for every other family.

    RoBERTa-style families number positions from pad_token_id + 1, so 514 rows serve 512 tokens.
    """
    rows = config.get("max_position_embeddings")
    model_type = config.get("model_type")
    relative = config.get("position_embedding_type", "absolute") != "absolute"
    if model_type not in _LEARNED_POSITIONS or not isinstance(rows, int) or relative:
        return None
    return rows - _position_offset(config)


def max_length_of(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The checkpoint's limit in tokens: what sentence-transformers uses, and never more than there are positions.

    The first that is stated of `max_seq_length` (sentence_bert_config.json and its siblings) and `model_max_length`
    (tokenizer_config.json), cut to the number of positions in config.json; None if nothing states a limit.
    """
    limits: list[int] = []
    for name, key in (*((name, "max_seq_length") for name in _SENTENCE_CONFIGS), _TOKENIZER_LIMIT):
        value = read_json(folder / name).get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{folder / name}: {key} must be a number of tokens, got {shown(value)}")
        if not limits and 1 <= value <= _SANE_LENGTH:
            limits.append(int(value))
    rows = config.get("max_position_embeddings")
    if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
        limits.append(rows - _position_offset(config))
    return min(limits, default=None)


def untrained(checkpoint: Checkpoint, missing: str = "") -> ValueError:
    """Return the error for a checkpoint without a classification head, `missing` being a tensor of it."""
    architectures = checkpoint.config.get("architectures") or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures):
        return ValueError(
            f"{checkpoint.path} is a language model without a trained classification head; load(..., "
            "method='pointwise') ranks by the logits of its labels"
        )
    lacking = f" (the weights lack {missing!r})" if missing else ""
    return ValueError(
        f"{checkpoint.path} has no trained classification head{lacking}, so it cannot score pairs as a cross-encoder; "
        "its vectors can serve load(..., method='late-interaction') or load(..., method='embedding')"
    )


def _position_offset(config: Mapping[str, Any]) -> int:
    if config.get("model_type") not in _PADDED_POSITIONS:
        return 0
    pad = config.get("pad_token_id")
    return (pad if isinstance(pad, int) else 1) + 1


def _read_json_value(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from error
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or an int of more digits than Python reads
        raise ValueError(f"{path}: malformed JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{path}: malformed JSON (nested too deep)") from error


def _open_folder(root: Path, trust_remote_code: bool) -> Checkpoint:
    modules = _read_modules(root)
    transformer_path = next((module.path for module in modules if module.type == "Transformer"), root)
    config_file = transformer_path / "config.json"
    if not config_file.is_file():
        hint = "is not a Hugging Face checkpoint"
        if (transformer_path / "adapter_config.json").is_file():
            hint = "holds an adapter only: merge it into its base model first"
        raise FileNotFoundError(f"{config_file} does not exist: {transformer_path} {hint}")
    config = read_json(config_file)
    try:
        check_sizes(config)
    except InvalidConfig as error:
        raise InvalidConfig(f"{transformer_path}: {error}") from None
    checkpoint = Checkpoint(
        path=root,
        transformer_path=transformer_path,
        config=config,
        modules=modules,
        st_config=read_json(root / "config_sentence_transformers.json"),
        max_seq_length=max_length_of(transformer_path, config),
        trust_remote_code=trust_remote_code,
    )
    marked = marked_layout(
        (root, transformer_path),
        config,
        [module.dotted for module in modules],
        checkpoint.st_config,
        checkpoint.sentence_config(),
    )
    refuse_marked_layout(root, marked)
    return checkpoint


def _read_modules(root: Path) -> list[Module]:
    path = root / "modules.json"
    entries = _read_json_value(path)
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of modules, found {type(entries).__name__}")
    modules = []
    for position, entry in enumerate(entries):
        if not (isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)):
            raise ValueError(f'{path}: entry {position} must be an object with "type" and "path", got {entry!r}')
        relative = PurePosixPath(entry["path"].replace("\\", "/"))
        if relative.is_absolute() or ".." in relative.parts or ":" in entry["path"]:
            raise ValueError(f"{path}: entry {position} points outside the checkpoint: {entry['path']!r}")
        folder = root / relative
        kind = entry["type"]
        modules.append(Module(kind.rpartition(".")[2], folder, read_json(folder / "config.json"), kind))
    return modules


def _looks_like_path(model: str) -> bool:
    """True for a str that cannot be a hub id ("name" or "owner/name") or is plainly meant as a path."""
    marked = model.startswith((".", "/", "~")) or model.endswith("/") or "\\" in model
    return marked or model.count("/") > 1


def _download(
    model: str,
    revision: str | None,
    cache_folder: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: bool | str | None,
    trust_remote_code: bool,
) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=None if cache_folder is None else os.fspath(cache_folder),
                local_files_only=local_files_only,
                token=token,
                allow_patterns=patterns,
                ignore_patterns=_IGNORE_PATTERNS,
            )
        )

    patterns = _CONFIG_PATTERNS + _SAFETENSORS_PATTERNS + (["*.py"] if trust_remote_code else [])
    try:
        root = fetch(patterns)
        if _lacks_weights(root):
            root = fetch(patterns + _PICKLE_PATTERNS)
    except (OSError, ValueError) as error:
        # One sentence: the libraries' own messages run over several lines and repeat the traceback's content.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise OSError(
            f"{model!r} is not a local folder, and the Hugging Face hub did not provide it{at}: {reason.rstrip('.')}. "
            "Check the name and the connection (token for a private or gated repository; HF_HUB_OFFLINE and "
            "local_files_only allow only what is already cached), or pass the path of a downloaded folder."
        ) from error
    return root


def _lacks_weights(root: Path) -> bool:
    modules = _read_modules(root)
    folders = [module.path for module in modules if module.type in _WEIGHTED_MODULES] or [root]
    return any(not find_weight_files(folder) for folder in folders)
