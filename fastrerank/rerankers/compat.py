"""Arguments of older and newer sentence-transformers releases, mapped to ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastrerank.checkpoints.checkpoint import Checkpoint, position_limit
from fastrerank.engine.dtype import Dtype
from fastrerank.inputs.backend import encode_batch, guarded
from fastrerank.inputs.tokenizer import Tokenizer
from fastrerank.runtime.naming import shortened

__all__ = [
    "OTHER_KEYWORDS",
    "Config",
    "Device",
    "SharedTokenizer",
    "check_same_device",
    "fitting_length",
    "init_options",
    "predict_options",
    "processing_options",
]

_RENAMED = {
    "model_name": "model_name_or_path",
    "cache_dir": "cache_folder",
    "default_activation_function": "activation_fn",
}
_POSITIONAL = ("num_labels", "max_length", "activation_fn", "device")
# Dictionaries of arguments for parts that do not exist here: their entries that have an effect, and our names.
_DICTIONARIES: dict[str, dict[str, str]] = {
    "model_kwargs": {"torch_dtype": "dtype", "dtype": "dtype"},
    "automodel_args": {"torch_dtype": "dtype", "dtype": "dtype"},
    "processor_kwargs": {"model_max_length": "max_length", "chat_template": "chat_template"},
    "tokenizer_kwargs": {"model_max_length": "max_length", "chat_template": "chat_template"},
    "tokenizer_args": {"model_max_length": "max_length", "chat_template": "chat_template"},
    "config_kwargs": {"num_labels": "num_labels"},
    "config_args": {"num_labels": "num_labels"},
}
# The head is always float32, and inference has no dropout.
_WITHOUT_EFFECT = ("keep_in_fp32_modules", "classifier_dropout", "model_card_data")
# What `init_options` reads. It refuses modules with the reason.
OTHER_KEYWORDS = frozenset({*_RENAMED, *_DICTIONARIES, *_WITHOUT_EFFECT, "backend", "modules"})
_BACKENDS = ("torch", "onnx", "openvino")
_FAILURE = "the checkpoint's tokenizer fails on a text".__str__
_PREDICT_WITHOUT_EFFECT = ("num_workers", "device", "pool", "chunk_size")
_RANK_WITHOUT_EFFECT = ("apply_softmax", "convert_to_numpy", "convert_to_tensor", *_PREDICT_WITHOUT_EFFECT)


def init_options(given: dict[str, Any], legacy: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Return `given` with positional `legacy` and other releases' keyword `options` merged in.

    Deprecated spellings warn once per place, and so does a backend that is not run here. Raises TypeError for an
    unknown keyword or one given twice, ValueError for an unknown backend or for modules.
    """
    if len(legacy) > len(_POSITIONAL):
        raise TypeError(f"CrossEncoder takes at most {1 + len(_POSITIONAL)} positional arguments")
    found = dict(zip(_POSITIONAL, legacy, strict=False))
    if legacy:
        _deprecated("positional arguments after the model", "keywords " + ", ".join(found))
    for key, value in options.items():
        if key in _RENAMED:
            _deprecated(key, _RENAMED[key])
            found[_RENAMED[key]] = value
        elif key in _DICTIONARIES:
            found |= _from_dictionary(key, value)
        elif key == "backend":
            _check_backend(value)
        elif key == "modules":
            raise ValueError("modules cannot be passed as objects; give a folder that sentence-transformers saved")
        elif key not in _WITHOUT_EFFECT:
            raise TypeError(f"CrossEncoder got an unexpected keyword argument {key!r}")
    for key, value in found.items():
        if value is None:
            continue
        if given[key] not in (None, "auto") and given[key] != value:
            raise TypeError(f"{key} is given twice, as {given[key]!r} and {value!r}")
        given[key] = value
    return given


def _from_dictionary(name: str, values: dict[str, Any] | None) -> dict[str, Any]:
    found = {}
    for key, value in (values or {}).items():
        target = _DICTIONARIES[name].get(key)
        if target is None:
            warnings.warn(f"{name}[{key!r}] has no effect in fastrerank", UserWarning, stacklevel=5)
        else:
            found[target] = Dtype.of(value) if target == "dtype" else value
    return found


def _check_backend(backend: Any) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    if backend != "torch":
        warnings.warn(
            f"backend {backend!r} is not used: fastrerank reads the checkpoint's own weights, and engine= chooses what "
            "runs them",
            UserWarning,
            stacklevel=4,
        )


def predict_options(
    inputs: Any, activation_fn: Any, options: dict[str, Any], call: str, device: str | list[str]
) -> tuple[Any, Any]:
    """Return (inputs, activation_fn) with `sentences` and `activation_fct` of older releases merged in.

    `device` is where the model is: a call may name it, and no other.
    """
    for key, value in options.items():
        if key == "sentences" and call == "predict":
            _deprecated("sentences", "inputs")
            inputs = value
        elif key == "activation_fct":
            _deprecated("activation_fct", "activation_fn")
            activation_fn = value if activation_fn is None else activation_fn
        elif key not in (_PREDICT_WITHOUT_EFFECT if call == "predict" else _RANK_WITHOUT_EFFECT):
            raise TypeError(f"{call}() got an unexpected keyword argument {key!r}")
        elif key == "device" and value is not None:
            check_same_device(value, device)
    if inputs is None:
        raise TypeError("predict() needs inputs: a sequence of (query, document) pairs")
    return inputs, activation_fn


def processing_options(options: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """Take a call's `max_length` and the arguments of its chat template out of its options.

    Raises ValueError for an entry that would change scores and that does not exist here.
    """
    asked = options.pop("processing_kwargs", None) or {}
    text = dict(asked.get("text") or {})
    limit: int | None = options.pop("max_length", None)
    limit = text.pop("max_length", limit)
    others = [f"{name!r}" for name in asked if name not in ("text", "chat_template")]
    others += [f"'text'[{name!r}]" for name, value in text.items() if name != "padding" and value not in (True, None)]
    if others:
        raise ValueError(
            f"processing_kwargs can set 'text'['max_length'] and 'chat_template' only, got {', '.join(others)}"
        )
    return limit, dict(asked.get("chat_template") or {})


def fitting_length(limit: Any, config: Mapping[str, Any]) -> Any:
    """Return `limit`, or with a warning the number of the model's positions where it is more than these.

    Under such a limit sentence-transformers scores short texts and fails on longer ones.
    """
    most = position_limit(config)
    if most is None or isinstance(limit, bool) or not isinstance(limit, (int, np.integer)) or limit <= most:
        return limit
    warnings.warn(
        f"max_length={limit} is more than the model's {most} positions: texts are cut to {most} tokens",
        UserWarning,
        stacklevel=4,
    )
    return most


def check_same_device(asked: Any, device: str | list[str]) -> None:
    """Raise ValueError unless `asked` is where the model is: a device, or a list of the devices.

    A list may name a device several times, as for a pool of processes: one call uses all its threads in any case.
    """

    def names(value: Any) -> set[str]:
        some = value if isinstance(value, (list, tuple)) else [value]
        plain = [f"cuda:{one}" if type(one) is int else str(one) for one in some]
        return {{"cpu:0": "cpu", "cuda": "cuda:0"}.get(name, name) for name in plain}

    if names(asked) != names(device):
        raise ValueError(f"device must be None or {device!r}: the model was loaded there, got {asked!r}")


class Device(str):
    """The name of a device, with the attributes of a `torch.device` that callers read; equal to that device too."""

    __slots__ = ()

    @property
    def type(self) -> str:
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:  # type: ignore[override]  # str.index finds substrings
        number = self.partition(":")[2]
        return int(number) if number else None

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class SharedTokenizer:
    """A `tokenizers.Tokenizer`, with what callers of transformers' tokenizers use to count tokens and to limit them.

    It has all methods and attributes of the former. From the latter it has `tokenize`, `len()`, `model_max_length` and
    the call, without padding, truncation or tensors. Only `model_max_length` can be set, as all threads share it.
    """

    _own: Tokenizer
    _config: Mapping[str, Any]

    def __init__(self, own: Tokenizer, config: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_own", own)
        object.__setattr__(self, "_config", config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model_max_length":
            raise AttributeError(f"{name} cannot be set, only model_max_length: all threads share the tokenizer")
        self._own.max_length = self._own.checked_max_length(fitting_length(value, self._config))

    def __repr__(self) -> str:
        return f"SharedTokenizer({len(self)} tokens, model_max_length={self.model_max_length})"

    @property
    def model_max_length(self) -> int | None:
        """Same as the model's `max_length`."""
        return self._own.max_length

    def __len__(self) -> int:
        return self._own.tokenizer.get_vocab_size()

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without special tokens."""
        return list(encode_batch(self._own.tokenizer, [text], spans=True)[0].tokens)

    def __call__(self, text: Any, text_pair: Any = None, *, add_special_tokens: bool = True) -> dict[str, list[Any]]:
        """Return {"input_ids", "attention_mask"} of a text or a pair, or lists of them for lists of texts."""
        if isinstance(text, str):
            one = guarded(
                lambda: self._own.tokenizer.encode(text, text_pair, add_special_tokens=add_special_tokens), _FAILURE
            )
            return {"input_ids": one.ids, "attention_mask": one.attention_mask}
        some = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))
        found = guarded(lambda: self._own.tokenizer.encode_batch(some, add_special_tokens=add_special_tokens), _FAILURE)
        return {"input_ids": [one.ids for one in found], "attention_mask": [one.attention_mask for one in found]}


class Config(SimpleNamespace):
    """config.json as attributes, under the names that transformers' configurations have."""

    def __init__(self, checkpoint: Checkpoint, num_labels: int) -> None:
        stored = dict(checkpoint.config)
        labels = {int(number): name for number, name in (stored.get("id2label") or {}).items()}
        if len(labels) != num_labels:
            labels = {number: f"LABEL_{number}" for number in range(num_labels)}
        stored.setdefault("classifier_dropout", None)
        stored |= {
            "num_labels": num_labels,
            "id2label": labels,
            "name_or_path": str(checkpoint.path),
            "label2id": {name: number for number, name in labels.items()},
            "_name_or_path": str(checkpoint.path),
        }
        super().__init__(**stored)

    def __copy__(self) -> Config:
        made = Config.__new__(Config)
        vars(made).update(vars(self))
        return made

    def __repr__(self) -> str:
        kind, name = vars(self).get("model_type"), shortened(self.name_or_path)
        return f"Config({name!r}, model_type={kind!r}, num_labels={self.num_labels})"

    def to_dict(self) -> dict[str, Any]:
        """Everything that config.json says, and what was derived from it."""
        return dict(vars(self))


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=4)
