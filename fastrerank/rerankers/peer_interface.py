"""The rest of what `sentence_transformers.CrossEncoder` has: done here, or refused by name with where it is done."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fastrerank.checkpoints.checkpoint import Checkpoint
from fastrerank.engine.dtype import Dtype
from fastrerank.engine.loading import Encoder
from fastrerank.inputs.tokenizer import Tokenizer
from fastrerank.rerankers.activations import Activation
from fastrerank.rerankers.compat import Config, Device, SharedTokenizer, check_same_device, fitting_length

if TYPE_CHECKING:
    from fastrerank.inputs.prompts.chat_pairs import ChatPairs

__all__ = ["REFUSED", "ModelCardData", "ModelView", "PeerInterface"]

Self = TypeVar("Self", bound="PeerInterface")

_TRAIN = "train with CrossEncoderTrainer or fit() of sentence_transformers and load the folder that it saved"
_SAVE = "sentence_transformers.CrossEncoder(model).{name}() writes it; here the checkpoint's folder is only read"
_ADAPTER = "load and merge adapters with sentence_transformers and peft, save, and load that folder"
_MODULE = "there are no torch modules: sentence_transformers.CrossEncoder(model) has {name}"
_TEXT = "tokenizer(query, document) gives the ids of a pair; predict() tokenises by itself"
_MOVE = "the model stays on the device that it was loaded on: say device= when you load it"

# Public names of the peer's class that are missing here, by the advice that an access gives.
_REFUSED_FOR = {
    _TRAIN: (
        "fit old_fit smart_batching_collate smart_batching_collate_text_only gradient_checkpointing_enable zero_grad"
    ),
    _SAVE: "save save_pretrained save_to_hub push_to_hub state_dict",
    _ADAPTER: (
        "active_adapter active_adapters add_adapter check_peft_compatible_model delete_adapter disable_adapters "
        "enable_adapters get_adapter_state_dict load_adapter merge set_adapter"
    ),
    _TEXT: "preprocess tokenize",
    _MOVE: "cuda ipu mtia share_memory to_empty xpu",
    _MODULE: (
        "T_destination add_module append apply buffers call_super_init children clear_placement_cache dump_patches "
        "extend extra_repr forward get_buffer get_extra_state get_parameter get_submodule insert load_state_dict "
        "modules named_buffers named_children named_modules named_parameters parameters pop register_backward_hook "
        "register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook "
        "register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook "
        "register_module register_parameter register_state_dict_post_hook register_state_dict_pre_hook "
        "requires_grad_ set_extra_state set_submodule type"
    ),
}
# Such a name -> the advice.
REFUSED = {name: advice for advice, names in _REFUSED_FOR.items() for name in names.split()}


class ModelCardData(SimpleNamespace):
    """Stores the results of sentence-transformers evaluators; it has no other use.

    Attributes:
        eval_results_dict: evaluator -> its metrics.
        training_logs: always []; here nothing is trained.
    """

    def __init__(self, **values: Any) -> None:
        self.eval_results_dict: dict[Any, dict[str, Any]] = {}
        self.training_logs: list[dict[str, Any]] = []
        super().__init__(**values)

    def __repr__(self) -> str:
        return f"ModelCardData({len(self.eval_results_dict)} evaluations)"

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:  # noqa: ARG002
        """Keep the metrics of an evaluator."""
        self.eval_results_dict[evaluator] = dict(metrics)


class ModelView:
    """What `model.model` is: the engine, with the `config`, `device` and `dtype` that a transformers model has."""

    def __init__(self, engine: Encoder, config: Config, device: Device | list[str], dtype: Dtype) -> None:
        self.engine, self.config, self.device, self.dtype = engine, config, device, dtype

    def __getattr__(self, name: str) -> Any:
        if name == "engine":  # the object is not complete yet
            raise AttributeError(name)
        return getattr(self.engine, name)

    def __repr__(self) -> str:
        return f"ModelView({type(self.engine).__name__}, dtype={self.dtype!r}, device={self.device!r})"


class PeerInterface:
    """Methods and attributes of `sentence_transformers.CrossEncoder` beside scoring."""

    model_type: ClassVar[str] = "CrossEncoder"
    model_card_data_class: ClassVar[type] = ModelCardData
    default_huggingface_organization: ClassVar[str] = "cross-encoder"

    checkpoint: Checkpoint
    config: Config
    device: Device | list[str]
    dtype: Dtype
    engine: Encoder
    model_card_data: Any
    prompts: dict[str, str]
    activation_fn: Any
    _chat: ChatPairs | None
    _tokenizer: Tokenizer
    _backend: str
    _saved_activation: Activation
    _arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in REFUSED:
            reason = REFUSED[name].format(name=name)
            raise AttributeError(f"{type(self).__name__} has no {name}, as fastrerank only runs models: {reason}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def tokenizer(self) -> SharedTokenizer:
        """The `tokenizers.Tokenizer`, with a part of transformers' interface: see `SharedTokenizer`."""
        return SharedTokenizer(self._tokenizer, self.checkpoint.config)

    @property
    def processor(self) -> SharedTokenizer:
        """Same as `tokenizer`."""
        return self.tokenizer

    @property
    def model(self) -> ModelView:
        """The engine that computes the scores, with `config`, `device` and `dtype`."""
        return ModelView(self.engine, self.config, self.device, self.dtype)

    @property
    def transformers_model(self) -> ModelView:
        """Same as `model`."""
        return self.model

    @property
    def max_seq_length(self) -> int | None:
        """Tokens per pair, special tokens included; may be assigned, for the calls that follow."""
        return self._tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self._tokenizer.max_length = self._tokenizer.checked_max_length(fitting_length(value, self.checkpoint.config))

    @property
    def max_length(self) -> int | None:
        """Same as `max_seq_length`."""
        return self.max_seq_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        self.max_seq_length = value

    @property
    def modalities(self) -> list[str]:
        """What pairs are read as: ["text"], and "message" where a chat template renders them."""
        return ["text"] if self._chat is None else ["text", "message"]

    def supports(self, modality: Any) -> bool:
        """Whether `modality` is one of `modalities`."""
        return modality in self.modalities

    @property
    def default_activation_function(self) -> Any:
        """Same as `activation_fn`."""
        return self.activation_fn

    def has_peft_compatible_model(self) -> bool:
        """Return False: adapters are merged before a model is loaded here."""
        return False

    @property
    def training(self) -> bool:
        """False: there is no training mode."""
        return False

    def get_default_activation_fn(self) -> Activation:
        """Return the checkpoint's activation: what it saved, else sigmoid for one label and identity for several."""
        return self._saved_activation

    def get_backend(self) -> str:
        """Return `backend` as it was given, "torch" where none was; `engine` is what runs."""
        return self._backend

    def get_max_seq_length(self) -> int | None:
        """Return `max_length`."""
        return self.max_length

    def get_model_kwargs(self) -> list[str]:
        """Return []: `predict` passes no further keywords to a model."""
        return []

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `predict` takes `inputs` as one pair."""
        if hasattr(inputs, "ndim"):
            return bool(inputs.size) and inputs.ndim < 2
        if isinstance(inputs, (list, tuple)):
            return len(inputs) > 0 and not isinstance(inputs[0], (list, tuple))
        return not hasattr(inputs, "__iter__")

    def set_keep_in_fp32_modules(self, module_names: list[str]) -> None:
        """Accept any names: the head computes in float32 in every precision."""
        if not isinstance(module_names, (list, tuple)) or not all(isinstance(name, str) for name in module_names):
            raise ValueError(f"module_names must be a list of str, got {module_names!r}")

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | Path | None = None) -> Any:
        """Return `evaluator(self, output_path)`, for evaluators of sentence-transformers.

        Example:
            >>> model.evaluate(CrossEncoderRerankingEvaluator(samples, name="dev"))  # doctest: +SKIP
            {'dev_map': 0.71, 'dev_mrr@10': 0.73, 'dev_ndcg@10': 0.78}
        """
        if output_path is not None:
            Path(output_path).mkdir(parents=True, exist_ok=True)
        return evaluator(self, output_path)

    def train(self: Self, mode: bool = True) -> Self:
        """Return self if `mode` is False; raise ValueError for True: there is no training mode."""
        if mode:
            raise ValueError(f"train() cannot switch to training: fastrerank only runs models; {_TRAIN}")
        return self

    def eval(self: Self) -> Self:
        """Return self: there is no training mode."""
        return self

    def cpu(self: Self) -> Self:
        """Same as `to("cpu")`."""
        return self.to("cpu")

    def to(self: Self, device: Any) -> Self:
        """Return self if `device` is where the model is, or a torch dtype that it has; ValueError for any other."""
        if type(device).__name__ == "dtype":
            return self._cast(Dtype.of(device), "to()")
        check_same_device(device, self.device)
        return self

    def compile(self: Self, *_: Any, **__: Any) -> Self:
        """Return self: the kernels are compiled."""
        return self

    def float(self: Self) -> Self:
        """Return self if the weights are float32; ValueError if not: precision is chosen when they are packed."""
        return self._cast("float32", "float()")

    def bfloat16(self: Self) -> Self:
        """Return self if the weights are bfloat16; ValueError if not: precision is chosen when they are packed."""
        return self._cast("bfloat16", "bfloat16()")

    def half(self: Self) -> Self:
        """Return self if the weights are float16; ValueError if not: precision is chosen when they are packed."""
        return self._cast("float16", "half()")

    def double(self: Self) -> Self:
        """Raise ValueError: nothing computes in float64."""
        return self._cast("float64", "double()")

    def _cast(self: Self, dtype: str, call: str) -> Self:
        if self.dtype == dtype:
            return self
        how = {
            "float64": "dtype='float32' is the most precise",
            "float16": "load with dtype='bfloat16', or with dtype='float16' on a torch engine",
        }.get(dtype, f"load with dtype={dtype!r}")
        raise ValueError(f"{call} cannot change weights that are packed as {self.dtype}: {how}")

    def start_multi_process_pool(self, target_devices: list[str] | None = None, *_: Any, **__: Any) -> dict[str, Any]:
        """Return an empty pool: one call already uses every CPU it may; `predict` accepts the pool.

        `target_devices` may name where the model is, as often as it likes; ValueError for other devices.
        """
        if target_devices is not None:
            check_same_device(target_devices, self.device)
        return {"input": None, "output": None, "processes": []}

    def stop_multi_process_pool(self, pool: dict[str, Any]) -> None:
        """Accept what `start_multi_process_pool` returned."""

    def __copy__(self: Self) -> Self:
        """A second object with settings of its own that shares the weights, which nothing changes."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        made._local = threading.local()  # type: ignore[attr-defined]  # usage of the last call, of the base class
        made._tokenizer = copy.copy(self._tokenizer)  # has max_length of its own
        made.prompts = dict(self.prompts)
        made.config = copy.copy(self.config)
        made.model_card_data = copy.copy(self.model_card_data)
        if isinstance(made.model_card_data, ModelCardData):
            made.model_card_data.eval_results_dict = dict(made.model_card_data.eval_results_dict)
        return made

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the checkpoint's name and the settings, which reload it; neither weights nor the token."""
        chosen = None if self.activation_fn is self._saved_activation else self.activation_fn
        settings = {"prompts": self.prompts, "max_length": self.max_length, "activation_fn": chosen}
        return _load_anew, (type(self), {**self._arguments, **settings})


def _load_anew(kind: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return kind(**arguments)
