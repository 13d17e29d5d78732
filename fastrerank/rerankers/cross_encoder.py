"""Cross-encoders: query and document read together, one score each. A drop-in for sentence-transformers' class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.dtype import Dtype
from fastrerank.engine.heads import module_head
from fastrerank.engine.loading import plan, warm_up
from fastrerank.inputs.tokenizer import Tokenizer, check_texts
from fastrerank.rerankers import activations
from fastrerank.rerankers.base import Scores, Usage, check_threshold, check_top_k, order, ranked
from fastrerank.rerankers.call import LIMITS, NO_OPTIONS, CallOptions
from fastrerank.rerankers.compat import Config, Device, fitting_length, init_options, predict_options
from fastrerank.rerankers.conversations import as_pairs
from fastrerank.rerankers.labels import label_scores, named_label, resolve_label
from fastrerank.rerankers.pair_calls import PairCalls
from fastrerank.rerankers.pair_engine import chat_pairs, forward_blocks, load_pair_engine
from fastrerank.rerankers.peer_interface import ModelCardData, PeerInterface

if TYPE_CHECKING:
    import torch

    from fastrerank.runtime.types import DeviceLike, DtypeLike, EngineName, Hit

__all__ = ["CrossEncoder"]


class CrossEncoder(PeerInterface, PairCalls):
    """Like `sentence_transformers.CrossEncoder`: same scores, no padding, no torch.

    Args:
        model_name_or_path: hub id or local folder of a sequence classification checkpoint, or of a
            sentence-transformers cross-encoder made of modules (with Dense, or a language model with LogitScore), or of
            a language model that answers yes or no: a published reranker, or any with `chat_template`.
        device: "cpu", "cuda", "cuda:1", or a list of devices that share the work; None: a usable GPU, else the CPU.
        dtype: "float32" (equals the reference), "bfloat16", "int8" (native engine only), "float16" (torch engines
            only), or torch's dtypes of these names; "auto": float32 on a CPU, bfloat16 on a GPU. Heads and activations
            are float32 in all of them.
        max_length: tokens per pair; None for the checkpoint's limit. More than the model has positions warns and means
            all positions. Documents are cut to fit; the query is cut only if it alone does not fit. `last_usage` tells
            what was cut.
        activation_fn: callable or name ("identity", "sigmoid", "softmax", ...); None: the checkpoint's, else sigmoid if
            it has one label. A saved class of torch is used as it is; any other is imported with trust_remote_code.
        num_labels: what the checkpoint is expected to have; None takes any.
        label: the label that ranks where the head has several: its name in config.json's id2label, or its number.
            None takes the label that is named relevant, entailment, yes or true; without one, `rank` and `score` ask.
        num_threads: CPU threads of a call; None for `fastrerank.set_num_threads`'s, or torch's own on a torch engine.
        engine: "native" (CPU kernels), "torch" (any Hugging Face model, packed without padding) or "padded" (any, in
            padded batches); None: native on a CPU if the family is native, else torch, else padded, said in the log.
        memory_limit: bytes, or a fraction of the device's memory, that a torch engine may come to; None for 0.9.
        prompts, default_prompt_name: texts by name that `prompt_name` puts before the query, or into a system turn
            where a chat template renders the pairs.
        chat_template: source of a chat template for the roles "query" and "document", in place of the checkpoint's; ""
            joins pairs as the tokenizer does; a dict of several by their names, of which a call chooses one by
            processing_kwargs={"chat_template": {"chat_template": name}}, else "default"; None: the checkpoint's, where
            it has one (docs/explanation/numerics.md).
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.
        legacy, options: positional and keyword arguments of other sentence-transformers releases; `backend` is accepted
            with a warning, `model_card_data` gets what evaluators measure.

    Raises ValueError for a checkpoint without a trained classification head, that the engine cannot run, or with
    damaged weights; ImportError if the engine needs torch and it is missing; OSError if it cannot be found.

    Paper: Passage Re-ranking with BERT, Nogueira and Cho 2019, arXiv 1901.04085.

    Example:
        >>> model = CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")                   # doctest: +SKIP
        >>> model.predict([("how long do fleas live", "A flea lives up to a year.")])     # doctest: +SKIP
        array([8.6], dtype=float32)
        >>> model.rank("how long do fleas live", ["Fleas are insects.", "A year."])[0]    # doctest: +SKIP
        {'corpus_id': 1, 'score': 3.2}
    """

    method: ClassVar[str] = "cross-encoder"
    independent: ClassVar[bool] = True
    call_options: ClassVar[frozenset[str]] = frozenset({"label", "instruction"}) | LIMITS

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *legacy: Any,
        device: DeviceLike | None = None,
        dtype: DtypeLike = "auto",
        max_length: int | None = None,
        activation_fn: Any = None,
        num_labels: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        num_threads: int | None = None,
        engine: EngineName | None = None,
        memory_limit: float | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        label: str | int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = {
            "model_name_or_path": model_name_or_path,
            "device": device,
            "dtype": Dtype.of(dtype),
            "max_length": max_length,
            "activation_fn": activation_fn,
            "num_labels": num_labels,
            "cache_folder": cache_folder,
            "chat_template": chat_template,
        }
        given = init_options(given, legacy, options)
        if given["model_name_or_path"] is None:
            raise TypeError("CrossEncoder needs model_name_or_path: a hub id or a local folder")
        checkpoint = open_checkpoint(
            given["model_name_or_path"],
            revision=revision,
            cache_folder=given["cache_folder"],
            local_files_only=local_files_only,
            token=token,
            # A stored activation is code only if the caller did not choose another one.
            trust_remote_code=trust_remote_code,
        )
        self.checkpoint = checkpoint
        self._backend = options.get("backend", "torch")
        self.model_card_data = options.get("model_card_data") or ModelCardData()
        chosen = plan(checkpoint.config, engine, given["device"], given["dtype"])
        self.device = Device(chosen.device) if isinstance(chosen.device, str) else chosen.device
        self.dtype = chosen.dtype
        modular = any(module.type == "Dense" for module in checkpoint.modules)
        head = module_head(checkpoint.modules) if modular else None
        self._chat = chat_pairs(checkpoint, given["chat_template"])
        self.engine = load_pair_engine(
            checkpoint,
            head,
            chosen,
            self._chat,
            given=given["chat_template"] is not None,
            num_threads=num_threads,
            memory_limit=memory_limit,
        )
        self.num_labels = self.engine.width
        if given["num_labels"] not in (None, self.num_labels):
            raise ValueError(
                f"num_labels is {given['num_labels']}, but the head in {checkpoint.path} has {self.num_labels}; "
                "an untrained head is not made up"
            )
        limit = checkpoint.max_seq_length if given["max_length"] is None else given["max_length"]
        self._tokenizer = Tokenizer.load(checkpoint.transformer_path, fitting_length(limit, checkpoint.config))
        self._saved_text = (checkpoint.sentence_config().get("processing_kwargs") or {}).get("text") or {}
        self.activation_fn = given["activation_fn"]
        self._saved_activation = activations.sigmoid if self.num_labels == 1 else activations.identity
        if self.activation_fn is None:
            saved = checkpoint.activation()
            if saved is not None:
                self._saved_activation = activations.saved(saved, str(checkpoint.path))
            self.activation_fn = self._saved_activation
        activations.resolve(self.activation_fn)
        stored = checkpoint.st_config.get("prompts") or {}
        self.prompts: dict[str, str] = {**stored, **(prompts or {})}
        self.default_prompt_name = default_prompt_name or checkpoint.st_config.get("default_prompt_name")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name must be one of prompts, {list(self.prompts)}, got {self.default_prompt_name!r}"
            )
        self.config = Config(checkpoint, self.num_labels)
        if "classifier_dropout" in options:
            self.config.classifier_dropout = options["classifier_dropout"]
        self._multi_label = checkpoint.config.get("problem_type") == "multi_label_classification"
        self.label = named_label(self.labels) if label is None else resolve_label(label, self.labels)
        name = given["model_name_or_path"]
        self._arguments = {  # reload it in another process; the token is a secret and stays out
            "model_name_or_path": str(checkpoint.path.absolute()) if Path(name).expanduser().is_dir() else name,
            "device": given["device"],
            "dtype": str(given["dtype"]),
            "num_labels": given["num_labels"],
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "local_files_only": local_files_only,
            "cache_folder": given["cache_folder"],
            "num_threads": num_threads,
            "engine": engine,
            "memory_limit": memory_limit,
            "default_prompt_name": default_prompt_name,
            "chat_template": given["chat_template"],
            "label": label,
        }

    @property
    def raw_is_logit(self) -> bool:
        """Whether a raw score is a logit: always."""
        return True

    @property
    def mteb_model_meta(self) -> Any:
        """The metadata that `mteb.evaluate` files results under; AttributeError without mteb."""
        try:
            from fastrerank.rerankers.mteb_protocol import model_meta
        except ImportError as error:
            raise AttributeError(f"mteb_model_meta needs mteb: {error}") from None
        return model_meta(self)

    def warmup(self) -> CrossEncoder:
        """Do now what the first calls would do, such as capturing CUDA graphs on a GPU, and return self."""
        warm_up(self.engine)
        return self

    def activated(self, scores: Scores) -> Scores:
        """Return what `rank` shows for raw scores: their `activation_fn`, or the label's probability among several."""
        if self.num_labels > 1:
            return activations.sigmoid(scores)
        return self._activate(scores[:, None], activations.resolve(self.activation_fn))

    def _positions(self, scores: Scores, shown: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Positions ordered by the shown scores, as activations such as GELU change the order; ties by raw score."""
        return order(shown, scores)

    @overload
    def predict(
        self,
        inputs: Any = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Any = ...,
        apply_softmax: bool | None = ...,
        convert_to_numpy: bool = ...,
        *,
        convert_to_tensor: Literal[True],
        label: str | int | None = ...,
        **options: Any,
    ) -> torch.Tensor: ...

    @overload
    def predict(
        self,
        inputs: Any = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Any = ...,
        apply_softmax: bool | None = ...,
        *,
        convert_to_numpy: Literal[False],
        convert_to_tensor: Literal[False] = ...,
        label: str | int | None = ...,
        **options: Any,
    ) -> list[torch.Tensor] | torch.Tensor: ...

    @overload
    def predict(
        self,
        inputs: Any = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Any = ...,
        apply_softmax: bool | None = ...,
        convert_to_numpy: Literal[True] = ...,
        convert_to_tensor: Literal[False] = ...,
        *,
        label: str | int | None = ...,
        **options: Any,
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def predict(
        self,
        inputs: Any = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int = ...,
        show_progress_bar: bool | None = ...,
        activation_fn: Any = ...,
        apply_softmax: bool | None = ...,
        convert_to_numpy: bool = ...,
        convert_to_tensor: bool = ...,
        *,
        label: str | int | None = ...,
        **options: Any,
    ) -> npt.NDArray[np.float32] | list[torch.Tensor] | torch.Tensor: ...

    def predict(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        *,
        label: str | int | None = None,
        **options: Any,
    ) -> Any:
        """Score (query, document) pairs.

        Args:
            inputs: sequence of pairs, one pair, or a 1-D (one pair) or 2-D array of str. Where a chat template renders
                the pairs, a pair may be messages of the roles "query" and "document", behind a "system" message or
                none.
            prompt, prompt_name: text put before each query; a name of `self.prompts`.
            batch_size: must be positive; work is split by tokens, so it changes neither speed nor scores.
            show_progress_bar: True draws a bar on stderr; None and False do not.
            activation_fn: replaces the model's for this call.
            apply_softmax: over the labels, where there are several.
            convert_to_numpy, convert_to_tensor: array, tensor, or (both False) a list of tensors; tensors need torch.
            label: the column to return where there are several labels, by name or number; None returns all.
            options: `instruction`, `max_tokens_per_doc`, `max_tokens_per_query`, `truncation_side`, `truncate` as in
                `score`; `max_length`, or `processing_kwargs={"text": {"max_length": 256}, "chat_template": {...}}` for
                this call; `sentences`, `activation_fct`, `num_workers`, `device`, `pool`, `chunk_size`: of other
                releases.

        Returns float32 (N,), or (N, num_labels) for several labels; without the first axis for one pair.
        Raises TypeError naming the position of what is not a pair of str, ValueError for batch_size < 1.

        Example:
            >>> model.predict([("who?", "the owl"), ("who?", "the cat")])  # doctest: +SKIP
            array([0.91, 0.03], dtype=float32)
        """
        if "inputs1" in options:  # MTEB's protocol: loaders of queries and documents, and raw scores
            from fastrerank.rerankers.mteb_protocol import score_batches

            return score_batches(self, **(options if label is None else options | {"label": label}))
        limits, chat_options = self._processing(options)
        inputs, activation_fn = predict_options(inputs, activation_fn, options, "predict", self.device)
        _check_batch_size(batch_size)
        pairs, systems, single = as_pairs(inputs)
        function = activations.resolve(self.activation_fn if activation_fn is None else activation_fn)
        column = None if label is None else resolve_label(label, self.labels)
        prefix = self._prompt(prompt, prompt_name, limits)
        groups = self._prompted(prefix, systems, len(pairs))
        with self._call() as usage:
            logits = np.zeros((len(pairs), self.num_labels), np.float32)
            for text, members in groups.items():
                tokenize = self._pair_list(text, limits.limits, chat_options)
                own = [pairs[i] for i in members] if systems else pairs
                logits[members] = forward_blocks(self.engine, tokenize, own, usage, bool(show_progress_bar))
            self._finite([logits])
        scores = self._activate(logits, function)
        if apply_softmax and scores.ndim > 1:
            scores = activations.softmax(scores)
        if column is not None and scores.ndim > 1:
            scores = scores[:, column]
        return _converted(scores[0] if single else scores, convert_to_numpy, convert_to_tensor, single)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        *,
        raw: bool = False,
        score_threshold: float | None = None,
        label: str | int | None = None,
        **options: Any,
    ) -> list[Hit]:
        """Return documents sorted by activated score, best first; ties by raw score, then by position.

        Args:
            query: the query. documents: N str.
            top_k: how many to return; None for all.
            return_documents: whether each entry carries its "text".
            raw: whether "score" is the raw score of `score`, which then ranks.
            score_threshold: leaves out documents whose "score" is lower.
            label: the label that ranks where the head has several, by name or number; None for `self.label`. Its raw
                score is its logit minus the log-sum-exp of the others, and "score" its softmax. Under
                multi_label_classification (config.json) they are its logit and its sigmoid. With `activation_fn` in
                this call, "score" is that label's column of the activated logits.
            prompt, prompt_name, batch_size, show_progress_bar, activation_fn, options: as in `predict`.

        Raises ValueError if the model has several labels and nothing tells which one ranks and for a score_threshold
        that is not finite, TypeError naming the position of a text that is not a str.

        Example:
            >>> model.rank("who?", ["the owl", "the cat"], top_k=1)  # doctest: +SKIP
            [{'corpus_id': 0, 'score': 0.91}]
        """
        limits, chat_options = self._processing(options)
        _, activation_fn = predict_options((), activation_fn, options, "rank", self.device)
        _check_batch_size(batch_size)
        check_top_k(top_k)
        check_threshold(score_threshold)
        column = self._column(label)
        prefix = self._prompt(prompt, prompt_name, limits)
        (checked,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        function = None if activation_fn is None else activations.resolve(activation_fn)
        with self._call() as usage:
            pairs = [(checked, text) for text in texts]
            tokenize = self._pair_list(prefix, limits.limits, chat_options)
            logits = forward_blocks(self.engine, tokenize, pairs, usage, bool(show_progress_bar))
            self._finite([logits])
        scores = label_scores(logits, column, self._multi_label)
        if function is None or raw:
            shown = scores if raw else self.activated(scores)
        else:
            shown = self._activate(logits, function)
            shown = shown[:, column] if shown.ndim > 1 else shown
        return ranked(
            self._positions(scores, shown), shown, texts if return_documents else None, top_k, score_threshold
        )

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        column = self._column(call.label)
        pairs = [(query, text) for query, texts in zip(queries, documents, strict=True) for text in texts]
        lengths: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        tokenize = self._pair_list(self._prompt(None, None, call), call.limits)
        logits = forward_blocks(self.engine, tokenize, pairs, usage, lengths=lengths)
        flat = label_scores(logits, column, self._multi_label)
        bounds = np.cumsum([0, *map(len, documents)])
        total = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        usage.query_tokens = [int(total[end] - total[begin]) for begin, end in pairwise(bounds)]
        return [flat[begin:end] for begin, end in pairwise(bounds)]

    def _activate(self, logits: npt.NDArray[np.float32], function: activations.Activation) -> Scores:
        """Activated scores of (N, num_labels) logits: (N,) for one label."""
        scores = np.asarray(function(logits), np.float32)
        return scores[:, 0] if self.num_labels == 1 and scores.ndim > 1 else scores


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")


def _converted(scores: Any, to_numpy: bool, to_tensor: bool, single: bool) -> Any:
    if to_numpy and not to_tensor:
        return scores
    try:
        import torch
    except ImportError:
        raise ImportError("tensors as results need torch: pip install 'fastrerank[torch]'") from None
    tensor = torch.tensor(np.asarray(scores))
    return tensor if to_tensor or single else list(tensor)
