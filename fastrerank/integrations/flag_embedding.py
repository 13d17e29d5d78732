"""FlagEmbedding: `FlagReranker` and its `compute_score`, for callers that only change the import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrerank.checkpoints.checkpoint import position_limit
from fastrerank.engine import loading
from fastrerank.inputs.columns import pairs_of_columns
from fastrerank.integrations.loading import call_options
from fastrerank.rerankers.activations import sigmoid
from fastrerank.rerankers.cross_encoder import CrossEncoder
from fastrerank.rerankers.pairs import score_pairs

__all__ = ["FlagReranker"]

Pair = tuple[str, str]


class FlagReranker:
    """`FlagEmbedding.FlagReranker`'s interface on `fastrerank.CrossEncoder`: raw logits, or their sigmoid.

    Positional arguments have FlagEmbedding's order.

    Args:
        model_name_or_path: hub id or local folder of a cross-encoder.
        use_fp16: bfloat16 in place of float32; on GPUs only, as in FlagEmbedding. `use_bf16`: the same on CPUs too.
        query_instruction_for_rerank, query_instruction_format: a text, and the format of it and a query ("{}{}" puts it
            before the query). passage_instruction_for_rerank, passage_instruction_format: the same for passages.
        trust_remote_code, cache_dir: as `trust_remote_code` and `cache_folder` of `fastrerank.CrossEncoder`.
        devices: "cpu", "cuda:0", a number of a GPU, or a list of them; `device`: the same.
        batch_size: changes nothing: work is split by tokens.
        query_max_length: tokens of a query; None for three quarters of `max_length`, as in FlagEmbedding.
        max_length: tokens of a pair, or the positions that the checkpoint has, if these are fewer; the passage is cut
            to what the query leaves. None for the checkpoint's limit; queries are then cut only where they do not fit.
        normalize: whether `compute_score` applies a sigmoid.
        label: the label that scores where the head has several, by name or number.
        options: further keywords of `fastrerank.CrossEncoder`.

    Raises TypeError for an unknown keyword, ValueError for a head with several labels where nothing tells which one
    scores.

    Example:
        >>> FlagReranker("BAAI/bge-reranker-base").compute_score([("who?", "the owl")])      # doctest: +SKIP
        [3.1]
    """

    def __init__(
        self,
        model_name_or_path: str,
        use_fp16: bool = False,
        query_instruction_for_rerank: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_rerank: str | None = None,
        passage_instruction_format: str = "{}{}",
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        devices: Any = None,
        batch_size: int = 128,
        query_max_length: int | None = None,
        max_length: int | None = 512,
        normalize: bool = False,
        *,
        device: Any = None,
        use_bf16: bool = False,
        label: str | int | None = None,
        **options: Any,
    ) -> None:
        if devices is not None and device is not None:
            raise TypeError(f"devices and device say the same: give one, got {devices!r} and {device!r}")
        chosen = _device(device if devices is None else devices)
        on_gpu = loading.usable_gpu() if chosen is None else "cpu" not in str(chosen)
        if "dtype" not in options:
            options["dtype"] = "bfloat16" if use_bf16 or (use_fp16 and on_gpu) else "float32"
        elif use_fp16 or use_bf16:
            raise TypeError("dtype, use_fp16 and use_bf16 say the same: give one of them")
        self.model = CrossEncoder(
            model_name_or_path, device=chosen, trust_remote_code=trust_remote_code, cache_folder=cache_dir, **options
        )
        self.query_instruction_for_rerank, self.query_instruction_format = (
            query_instruction_for_rerank,
            query_instruction_format,
        )
        self.passage_instruction_for_rerank, self.passage_instruction_format = (
            passage_instruction_for_rerank,
            passage_instruction_format,
        )
        self.batch_size, self.query_max_length, self.max_length = batch_size, query_max_length, max_length
        self.normalize, self.label = normalize, label
        self._positions = position_limit(self.model.checkpoint.config)
        _check_format("query_instruction_format", query_instruction_format)
        _check_format("passage_instruction_format", passage_instruction_format)
        self.model.check_options(**self._limits(query_max_length, max_length), **call_options(label))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; see `fastrerank.CrossEncoder.tokenizer`."""
        return self.model.tokenizer

    def __repr__(self) -> str:
        return f"FlagReranker({self.model!r})"

    def compute_score(
        self,
        sentence_pairs: Pair | Sequence[Pair],
        batch_size: int | None = None,
        query_max_length: int | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
    ) -> list[float]:
        """Return one score per pair; one pair gives a list of one, no pairs an empty one.

        Args:
            batch_size: changes nothing. query_max_length, max_length, normalize: for this call; None for the object's.
        """
        pairs = list(pairs_of_columns(sentence_pairs, "sentence_pairs"))
        if pairs and isinstance(pairs[0], str):
            pairs = [sentence_pairs]
        queries, passages = self._inputs(pairs)
        limits = self._limits(
            self.query_max_length if query_max_length is None else query_max_length,
            self.max_length if max_length is None else max_length,
        )
        scores = score_pairs(self.model, queries, passages, **limits, **call_options(self.label))
        if self.normalize if normalize is None else normalize:
            scores = sigmoid(scores)
        values: list[float] = scores.tolist()
        return values

    def _limits(self, query_max_length: int | None, max_length: int | None) -> dict[str, Any]:
        """The limits of a call as `CrossEncoder.score` takes them."""
        found: dict[str, Any] = {}
        if max_length is not None:
            found["max_length"] = max_length if self._positions is None else min(max_length, self._positions)
            query_max_length = max_length * 3 // 4 if query_max_length is None else query_max_length
        if query_max_length is not None:
            found["max_tokens_per_query"] = query_max_length
        return found

    def _inputs(self, pairs: Sequence[Any]) -> tuple[list[str], list[str]]:
        """Queries and passages with their instructions; what is no pair raises TypeError naming its position."""
        for i, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"sentence_pairs[{i}] must be a (query, passage) pair, got {type(pair).__name__}")
        query = self.query_instruction_format, self.query_instruction_for_rerank
        passage = self.passage_instruction_format, self.passage_instruction_for_rerank
        return [_instructed(*query, pair[0]) for pair in pairs], [_instructed(*passage, pair[1]) for pair in pairs]


def _check_format(name: str, form: str) -> None:
    try:
        form.format("", "")
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"{name} must be a format of two texts, such as '{{}}{{}}': instruction and text; got {form!r}"
        ) from error


def _instructed(form: str, instruction: str | None, text: str) -> str:
    """The text under its instruction. A literal backslash-n in the format is a line break, as in FlagEmbedding."""
    return text if instruction is None else form.replace("\\n", "\n").format(instruction, text)


def _device(devices: Any) -> Any:
    """The device in `CrossEncoder`'s form: a number is a GPU's, and repeated names count once."""
    if isinstance(devices, (list, tuple)):
        named = list(dict.fromkeys(_device(one) for one in devices))
        if not named:
            raise ValueError("devices must be None, a device or a non-empty list of devices, got an empty list")
        return named[0] if len(named) == 1 else named
    if isinstance(devices, int) and not isinstance(devices, bool):
        return f"cuda:{devices}"
    return devices
