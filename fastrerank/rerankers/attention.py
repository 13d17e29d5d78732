"""Rankings read off the attention that a query pays to documents: ICR, QRHead and CoRe in one forward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.loading import plan
from fastrerank.inputs.limits import TextLimits, TooLong
from fastrerank.inputs.prompts.attention_policy import Policy, read_preset
from fastrerank.inputs.prompts.attention_prompts import AttentionPrompt, AttentionPrompts
from fastrerank.inputs.screening import load_fast
from fastrerank.inputs.tokenizer import check_texts
from fastrerank.rerankers.attention_context import Context
from fastrerank.rerankers.base import Reranker, Scores, Usage, check_threshold, check_top_k, order, ranked
from fastrerank.rerankers.call import LIMITS, NO_OPTIONS, CallOptions
from fastrerank.rerankers.recognise import names_of
from fastrerank.runtime.types import DeviceLike, DtypeLike, Hit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastrerank.rerankers.call import Options

__all__ = [
    "AttentionReranker",
    "core",
    "filtered_sum",
    "icr",
    "instruction_text",
    "load_prompts",
    "qrhead",
    "word_limit",
]

log = logging.getLogger("fastrerank")

Masses = npt.NDArray[np.float32]
Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Answer:
    """What one query makes of its documents: scores (N,), each span's masses, and where each document was read.

    `read`: a prompt and the document's number in it.
    """

    scores: Scores
    masses: list[Masses]
    read: list[tuple[AttentionPrompt, int]]

    def tokens(self, document: int) -> list[str]:
        """The texts of the tokens of a document's span."""
        prompt, number = self.read[document]
        return prompt.pieces(number)


class AttentionReranker(Reranker):
    """Scores documents by the attention that the rows of a query pay to their tokens, in any decoder, with no training.

    All documents stand in one prompt, an instruction and the query behind them. A token's mass is the attention that it
    gets, averaged over the rows of instruction and query and summed over heads, less what it gets with "N/A" in the
    query's place. A document's score is the sum of its tokens' masses, without those at or below their mean less twice
    their standard deviation. Both queries share one forward; no layer above the last one that is read is run.

    Args:
        model: hub id or local folder of a decoder.
        preset: "icr" (all heads), "qrhead" or "core" (few heads; other spans, rows and order, see
            docs/howto/attention.md).
        heads: (layer, head) pairs, both from 0, in place of the preset's; or the name of a published list ("nq",
            "lme"); or a file that `fastrerank heads` wrote.
        instruction: "ie" (find information) or "qa" (answer the question), or a text of one's own.
        words_per_document: longer documents are cut; None for the preset's limit, 0 for none.
        calibrate: whether the masses behind "N/A" are taken off.
        device: "cpu", "cuda", "cuda:1"; None: a usable GPU, else the CPU.
        dtype: "float32", "bfloat16" or "float16" for the backbone; "auto": float32 on a CPU, bfloat16 on a GPU. Masses
            are float32 in all of them.
        max_length: tokens of a prompt; None for what the model's positions allow.
        num_threads: CPU threads of a call; None for torch's own setting.
        memory_limit: bytes, or a fraction of the device's memory, that the process may come to; None for 0.9.
        revision, cache_folder, local_files_only, token, trust_remote_code: as in huggingface_hub.

    Where the documents do not fit into one prompt they are ranked in windows from the end of the list, the better half
    of each going on into the next; a warning and `last_usage["comparisons"]` say so, and scores are then N less the
    rank. Raises ValueError for a checkpoint without known heads, one whose attention does not run packed, and heads
    that it does not have; ImportError without torch and transformers.

    Papers: ICR (arXiv 2410.02642), QRHead (arXiv 2506.09944), CoRe (arXiv 2510.02219).

    Example:
        >>> reranker = AttentionReranker("meta-llama/Llama-3.1-8B-Instruct", preset="core")        # doctest: +SKIP
        >>> reranker.score("how long do fleas live", ["Fleas are insects.", "Up to a year."])      # doctest: +SKIP
        array([0.02, 0.41], dtype=float32)
    """

    method: ClassVar[str] = "icr"
    independent: ClassVar[bool] = False
    call_options: ClassVar[frozenset[str]] = frozenset({"instruction"}) | LIMITS - {"truncation_side"}

    def __init__(
        self,
        model: str | Path,
        *,
        preset: str = "icr",
        heads: Heads | str | Path | None = None,
        instruction: str | None = None,
        words_per_document: int | None = None,
        calibrate: bool = True,
        device: DeviceLike | None = None,
        dtype: DtypeLike = "auto",
        max_length: int | None = None,
        num_threads: int | None = None,
        memory_limit: float | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
    ) -> None:
        super().__init__()
        self.policy = Policy.load(preset)
        self.method = preset  # type: ignore[misc]  # one class serves three methods
        words = word_limit(words_per_document, self.policy)
        text = instruction_text(instruction, self.policy)
        checkpoint = open_checkpoint(
            model,
            revision=revision,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        self.checkpoint, self.instruction = checkpoint, text
        chosen = plan(checkpoint.config, "torch", device, dtype)
        if len(chosen.devices) != 1:
            raise ValueError(f"device must be one device for a language model, got {device!r}")
        self.device, self.dtype, self.calibrate = chosen.devices[0], chosen.dtype, bool(calibrate)
        self.heads = find_heads(checkpoint, self.policy, heads)
        positions = checkpoint.config.get("max_position_embeddings")
        if max_length is not None and (max_length < 1 or (positions is not None and max_length > positions)):
            most = "" if positions is None else f" and at most {positions}, the model's positions"
            raise ValueError(f"max_length must be at least 1{most}, got {max_length}")
        self.prompts = load_prompts(checkpoint, self.policy, text, words)

        from fastrerank.engine.torch.attention import AttentionScorer

        self.scorer = AttentionScorer.load(
            checkpoint,
            self.heads,
            dtype=self.dtype,
            device=self.device,
            num_threads=num_threads,
            memory_limit=memory_limit,
        )
        limits = (max_length, positions, self.scorer.max_length, self.scorer.budget)
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self.prompts.room = self.max_length

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        explain: bool = False,
        *,
        raw: bool = False,  # noqa: ARG002
        score_threshold: float | None = None,
        **options: Unpack[Options],
    ) -> list[Hit]:
        """Return documents sorted by `score`, as `Reranker.rank` does; `raw` changes nothing: masses are shown as such.

        With `explain` each entry carries "tokens": the text of each token of the document's span with its mass, as
        [(text, mass), ...].
        """
        call = self.check_options(**options)
        return self._rank(query, documents, top_k, return_documents, explain, None, score_threshold, call)

    def context(self, documents: Sequence[str], max_bytes: int | None = None) -> Context:
        """Keep the keys and values of documents that several queries will be asked about; see `Context`.

        Args:
            documents: N str that fit into one prompt. max_bytes: most that may be kept; None for no bound.

        Raises ValueError, before anything runs, for documents that do not fit into one prompt or into `max_bytes`.

        Example:
            >>> context = reranker.context(documents)                                  # doctest: +SKIP
            >>> context.nbytes, context.score("who hoots?")                            # doctest: +SKIP
            (1228800, array([0.31, 0.04], dtype=float32))
        """
        return Context(self, documents, max_bytes)

    def token_masses(self, query: str, documents: Sequence[str]) -> list[Masses]:
        """Return the masses of the tokens of each document's span, float32 (tokens,), before any are left out.

        Spans are the preset's: with the label or without, with the token behind the document or without.

        Example:
            >>> [len(masses) for masses in reranker.token_masses("who?", ["the owl", "the cat"])]  # doctest: +SKIP
            [5, 5]
        """
        return self._answer(query, documents).masses

    def _rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None,
        return_documents: bool,
        explain: bool,
        context: Context | None,
        score_threshold: float | None = None,
        call: CallOptions = NO_OPTIONS,
    ) -> list[Hit]:
        check_top_k(top_k)
        check_threshold(score_threshold)
        texts = check_texts(documents, "documents")
        answer = self._answer(query, texts, context, call)
        rows = ranked(order(answer.scores), answer.scores, texts if return_documents else None, top_k, score_threshold)
        for row in rows if explain else ():
            number = row["corpus_id"]
            row["tokens"] = list(zip(answer.tokens(number), map(float, answer.masses[number]), strict=True))
        return rows

    def _answer(
        self, query: str, documents: Sequence[str], context: Context | None = None, call: CallOptions = NO_OPTIONS
    ) -> Answer:
        (checked,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        with self._call() as usage:
            answer = self._ask(checked, texts, usage, context, call)
            self._finite([answer.scores])
        return answer

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        return [
            self._ask(query, texts, usage, None, call).scores for query, texts in zip(queries, documents, strict=True)
        ]

    def _ask(
        self,
        query: str,
        documents: list[str],
        usage: Usage,
        context: Context | None = None,
        call: CallOptions = NO_OPTIONS,
    ) -> Answer:
        if not documents:
            return Answer(np.zeros(0, np.float32), [], [])
        limits = call.limits
        limit = self.max_length
        if limits.max_length is not None:
            if limit is not None and limits.max_length > limit:
                raise ValueError(f"max_length must be at most {limit}, the limit of a prompt, got {limits.max_length}")
            limit = limits.max_length
        prompts = self.prompts.with_instruction(self._instruction(call))
        with usage.stage("tokenize"):
            query, cut = prompts.shorten(query, limits.max_tokens_per_query)
            usage.query_truncated |= cut
            prompt = prompts.encode(query, documents, limits.max_tokens_per_doc)
        too_long = limit is not None and prompt.longest > limit
        if not limits.truncate and (cut or too_long or prompt.truncated.any()):
            raise self._too_long(prompt, cut, limits, limit)
        if limit is not None and too_long:
            if context is not None:
                raise ValueError(f"the query makes a prompt of {prompt.longest} tokens, the limit is {limit}")
            return self._in_windows(query, documents, prompt, usage, prompts, limit, limits.max_tokens_per_doc)
        usage.truncated += int(prompt.truncated.sum())
        return self._read(prompt, usage, None if context is None else context.before(prompt.context, usage))

    def _instruction(self, call: CallOptions) -> str | None:
        return None if call.instruction is None else instruction_text(call.instruction, self.policy)

    def _too_long(self, prompt: AttentionPrompt, cut: bool, limits: TextLimits, limit: int | None) -> TooLong:
        """The error of a call that may cut nothing: of the first text or prompt that would be cut."""
        if cut and limits.max_tokens_per_query is not None:
            return TooLong("the query", limits.max_tokens_per_query + 1, limits.max_tokens_per_query)
        if limit is not None and prompt.longest > limit:
            return TooLong("the prompt", prompt.longest, limit)
        document = f"document {int(np.argmax(prompt.truncated))}"
        if limits.max_tokens_per_doc is not None:
            return TooLong(document, limits.max_tokens_per_doc + 1, limits.max_tokens_per_doc)
        words = self.prompts.words or 0
        return TooLong(document, words + 1, words, "words")

    def _read(self, prompt: AttentionPrompt, usage: Usage, before: Any = None) -> Answer:
        """One forward over a prompt that fits."""
        from fastrerank.engine.readouts import Reading

        begin, end = int(prompt.spans[:, 0].min()), int(prompt.spans[:, 1].max())
        other = prompt.empty_tail if self.calibrate else None
        usage.comparisons += 1
        usage.steps += 1
        with usage.stage("compute"):
            if other is not None and np.array_equal(prompt.tail, other):
                mass = np.zeros(end - begin, np.float32)  # each row has the weight 1/n - 1/n
            else:
                reading = Reading.of(prompt.context, prompt.tail, other, begin, end)
                mass, cost = self.scorer.masses(reading, before)
                usage.add(cost)
        masses = [mass[first - begin : last - begin] for first, last in prompt.spans.tolist()]
        scores = np.array([filtered_sum(one) for one in masses], np.float32)
        return Answer(scores, masses, [(prompt, i) for i in range(len(masses))])

    def _in_windows(
        self,
        query: str,
        documents: list[str],
        prompt: AttentionPrompt,
        usage: Usage,
        prompts: AttentionPrompts,
        limit: int,
        max_tokens_per_doc: int | None,
    ) -> Answer:
        """Windows from the end of the list: the better half of each goes on into the next."""
        count = len(documents)
        room = limit - (prompt.longest - int(prompt.sizes.sum()))
        labels = prompts.encode(query, documents, most=0).sizes
        most = room // min(count, 2) - int(labels.max())
        if most < 1:
            raise ValueError(
                f"the query and the fixed text leave no room for documents: {limit - room} of "
                f"{limit} tokens are taken before the first one"
            )
        most = most if max_tokens_per_doc is None else min(most, max_tokens_per_doc)
        prompt = prompts.encode(query, documents, most)
        usage.truncated += int(prompt.truncated.sum())
        log.warning(
            "%d documents of %d tokens do not fit into %d: they are ranked in windows, which is less exact",
            count,
            int(prompt.sizes.sum()),
            room,
        )
        sizes, waiting = prompt.sizes, list(range(count))
        placed: list[int] = []
        masses: dict[int, Masses] = {}
        read: dict[int, tuple[AttentionPrompt, int]] = {}
        while waiting:
            fits = np.cumsum(sizes[waiting][::-1]) <= room
            size = max(1, int(fits.sum()))
            window = waiting[-size:]
            answer = self._read(prompts.encode(query, [documents[i] for i in window], most), usage)
            best = [window[i] for i in order(answer.scores)]
            for number, i in enumerate(window):
                masses[i], read[i] = answer.masses[number], answer.read[number]
            kept = 0 if size == len(waiting) else size - max(1, size // 2)
            placed = best[kept:] + placed
            waiting = waiting[:-size] + best[:kept]
        scores = np.empty(count, np.float32)
        scores[placed] = np.arange(count, 0, -1)
        return Answer(scores, [masses[i] for i in range(count)], [read[i] for i in range(count)])


icr = partial(AttentionReranker, preset="icr")
qrhead = partial(AttentionReranker, preset="qrhead")
core = partial(AttentionReranker, preset="core")


def filtered_sum(masses: Masses) -> float:
    """Sum of the masses above their mean less twice their standard deviation (unbiased); 0 for fewer than two.

    Example:
        >>> filtered_sum(np.array([1.0, 1, 1, 1, 1, 1, 1, -9], np.float32))
        7.0
    """
    if len(masses) < 2:
        return 0.0
    wide = masses.astype(np.float64)
    return float(wide[wide > wide.mean() - 2 * wide.std(ddof=1)].sum())


def find_heads(
    checkpoint: Checkpoint, policy: Policy, wanted: Heads | str | Path | None
) -> tuple[tuple[int, int], ...] | None:
    """Return the heads to read, None for all: one's own, those of a file, or the policy's for this checkpoint."""
    known = policy.known(names_of(checkpoint), checkpoint.config.get("num_hidden_layers"))
    if isinstance(wanted, str) and wanted in known:
        return known[wanted]
    if isinstance(wanted, (str, Path)):
        if isinstance(wanted, str) and not wanted.endswith(".toml") and "/" not in wanted:
            some = ", ".join(known) or "none"
            raise ValueError(
                f"heads must be (layer, head) pairs, a preset file (.toml) or a published list of this checkpoint "
                f"({some}), got {wanted!r}"
            )
        return tuple(read_preset(wanted)["heads"])
    if wanted is not None:
        return tuple(wanted)
    if policy.heads == "all":
        return None
    if known:
        return next(iter(known.values()))
    rule = "contrast" if policy.name == "core" else "ndcg"
    raise ValueError(
        f"no {policy.name} heads are published for {checkpoint.path}: find them with `fastrerank heads QUERIES.jsonl "
        f"--model MODEL --rule {rule} --save FILE.toml` and give heads=FILE.toml, or give heads=[(layer, "
        "head), ...]; preset 'icr' reads all heads"
    )


def load_prompts(checkpoint: Checkpoint, policy: Policy, instruction: str, words: int | None) -> AttentionPrompts:
    """The prompts of a policy in the checkpoint's token ids."""
    tokenizer = load_fast(checkpoint.transformer_path, trust_remote_code=checkpoint.trust_remote_code)
    kind = str(checkpoint.config.get("model_type") or "")
    return AttentionPrompts(tokenizer, policy, model_type=kind, instruction=instruction, words=words)


def instruction_text(wanted: str | None, policy: Policy) -> str:
    if wanted is None:
        return policy.instructions[policy.instruction]
    (text,) = check_texts([wanted], "instruction", scalar=True)
    return policy.instructions.get(text, text)


def word_limit(wanted: int | None, policy: Policy) -> int | None:
    if wanted is None:
        return policy.words
    if isinstance(wanted, bool) or not isinstance(wanted, (int, np.integer)) or wanted < 0:
        raise ValueError(f"words_per_document must be None or an int of at least 0, got {wanted!r}")
    return int(wanted) or None
