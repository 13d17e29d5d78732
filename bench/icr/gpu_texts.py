"""Attention read-outs from texts: how the published scheme finds its spans, how one tokenisation does, and ours.

All use preset "icr"'s prompt in Llama 3's layout, and a byte-level BPE tokenizer trained on the benchmark's own text.
"""

from __future__ import annotations

import gzip
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.harness import data
from bench.icr.engines import IcrPrompt, TwoPass, document_scores, of_prompt
from bench.llm import models as llm_models
from fastrerank.inputs.prompts.attention_policy import Policy, layout_of
from fastrerank.inputs.prompts.attention_prompts import EMPTY_QUERY, AttentionPrompts
from fastrerank.rerankers.attention import AttentionReranker
from fastrerank.rerankers.base import Reranker

Request = tuple[str, list[str]]
KIND = "llama"
POLICY = Policy.load("icr")
INSTRUCTION = POLICY.instructions[POLICY.instruction]
INTRODUCTION, QUERY = " Here are some paragraphs:", "Query:"
_BOS = "<|begin_of_text|>"
_SPECIALS = {_BOS: 0, "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eot_id|>": 9}


def make_tokenizer(texts: Path, first_special: int) -> Any:
    """Equals transformers' fast tokenizer with Llama 3's special tokens; `texts` is the folder with the DL19 file."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    wording = (f"user{INTRODUCTION} \n\n", f"{INSTRUCTION} \n\n{QUERY} {EMPTY_QUERY}", "assistant")
    made = llm_models.train_tokenizer(texts / data.DL19, _SPECIALS, first_special, wording)
    made.post_processor = TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, made.token_to_id(_BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=_BOS)


def requests(texts: Path, tokenizer: Any, documents: int, tokens: int) -> list[Request]:
    """Equals every query of the DL19 file with so many documents, each cut to `tokens` tokens.

    Document i is passages i, i + 1, ... of the query's list (cyclic), joined and cut.
    """
    with gzip.open(texts / data.DL19, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    backend, found = tokenizer.backend_tokenizer, []
    for row in rows:
        passages = [" ".join(one["text"].split()) for one in row["candidates"]]
        sizes = [len(one.ids) for one in backend.encode_batch(passages, add_special_tokens=False)]
        joined = []
        for start in range(documents):
            size, step, pieces = 0, start, []
            while size < 1.1 * tokens:
                pieces.append(passages[step % len(passages)])
                size += sizes[step % len(passages)]
                step += 1
            joined.append(" ".join(pieces))
        encodings = backend.encode_batch(joined, add_special_tokens=False)
        cut = [text[: one.offsets[:tokens][-1][1]] for text, one in zip(joined, encodings, strict=True)]
        found.append((row["query"], [text.rstrip() for text in cut]))
    return found


class Asked(NamedTuple):
    """What an engine made of a request: its prompt, the documents' scores and their tokens' masses, in their order."""

    prompt: IcrPrompt
    scores: NDArray[np.float64]
    masses: list[NDArray[np.float64]]


class TextEngine(ABC):
    """From a query and its documents, best first, to their scores; `tokenising`: the last call's text work, seconds."""

    name: ClassVar[str]
    setup: ClassVar[str]
    tokenising = 0.0

    @abstractmethod
    def scores(self, query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        """Equals the scores of the documents (N,), on the host."""

    @abstractmethod
    def explained(self, query: str, documents: Sequence[str]) -> Asked:
        """Equals the same with what led to it."""


class InTwoPasses(TextEngine):
    """The published prompt as text, then the two passes, then the documents' filtered sums."""

    def __init__(self, tokenizer: Any, two_pass: TwoPass) -> None:
        layout = layout_of(KIND, tokenizer.get_vocab(), None)
        assert layout is not None
        self.tokenizer, self.two_pass = tokenizer, two_pass
        self.start, self.separator, self.suffix = f"{layout.prefix}{INTRODUCTION}", layout.separator, layout.suffix

    @abstractmethod
    def prompt(self, query: str, documents: Sequence[str]) -> IcrPrompt:
        """Equals the prompt in token ids; the last document stands first."""

    def scores(self, query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return self._ask(query, documents)[2]

    def explained(self, query: str, documents: Sequence[str]) -> Asked:
        prompt, masses, scores = self._ask(query, documents)
        spans = prompt.spans[::-1] - prompt.spans[0, 0]
        return Asked(prompt, scores, [masses[a:b].astype(np.float64) for a, b in spans])

    def _ask(self, query: str, documents: Sequence[str]) -> tuple[IcrPrompt, NDArray[Any], NDArray[np.float64]]:
        start = time.perf_counter()
        prompt = self.prompt(query, documents)
        self.tokenising = time.perf_counter() - start
        masses = self.two_pass.scores(prompt)
        return prompt, masses, document_scores(masses, prompt)[::-1]


class Published(InTwoPasses):
    """The text work of the published code, with each of its calls of the tokenizer; see `_lay_out` and `_ids`.

    What it does besides is left out: it collects garbage and empties the allocator's cache in each pass.
    """

    name = "published"
    setup = "spans by tokenising the growing prompt behind every document, for N/A and the query; two passes"

    def prompt(self, query: str, documents: Sequence[str]) -> IcrPrompt:
        empty_ids, empty_first, _ = self._ids(EMPTY_QUERY, documents)
        ids, first, spans = self._ids(query, documents)
        assert first == empty_first
        return IcrPrompt(ids[:first], ids[first:], empty_ids[first:], np.array(spans))

    def _ids(self, query: str, documents: Sequence[str]) -> tuple[NDArray[np.int64], int, list[tuple[int, int]]]:
        """What one pass takes: spans, the prompt's ids from one more tokenisation, every document's token strings."""
        text, first, spans = self._lay_out(query, documents)
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        for begin, end in spans:
            self.tokenizer.convert_ids_to_tokens(ids[begin:end])
        return ids.numpy(), first, spans

    def _lay_out(self, query: str, documents: Sequence[str]) -> tuple[str, int, list[tuple[int, int]]]:
        """The prompt's text, where the instruction's tokens begin, and the documents' tokens.

        Lengths are added up piece by piece, and the prompt so far is tokenised behind every document to prove the sum.
        """
        separator = self._size(self.separator) - 1  # without the token that the tokenizer puts first
        text = self.start
        place = self._size(text + self.separator) - separator
        self._prove(text, place)
        spans = []
        for number, document in enumerate(reversed(documents)):
            piece = f"{self.separator}{POLICY.label.format(number=number + 1)} {document}"
            text += piece
            begin = place + separator
            place += self._size(piece) - 1
            spans.append((begin, place))
            self._prove(text, place)
        tail = f"{self.separator}{INSTRUCTION}{self.separator}{QUERY}"
        question = f" {query.strip()}{self.suffix}"
        self._size(tail)  # with the question's it says where the read rows end
        self._size(question)
        return text + tail + question, place + separator, spans

    def _size(self, text: str) -> int:
        return int(self.tokenizer(text, return_tensors="pt").input_ids.size(1))

    def _prove(self, text: str, place: int) -> None:
        size = self._size(text)
        if size != place:
            raise RuntimeError(f"the prompt so far has {size} tokens, its pieces {place}: the scheme ends here")


class TokenisedOnce(InTwoPasses):
    """The same prompt tokenised once, its spans from the tokens' places in the text."""

    name = "two-pass, tokenised once"
    setup = "the whole prompt in one call of the tokenizer, spans from its offsets; the same two passes"

    def prompt(self, query: str, documents: Sequence[str]) -> IcrPrompt:
        pieces, spans = [self.start], []
        place = len(self.start)
        for number, document in enumerate(reversed(documents)):
            piece = f"{POLICY.label.format(number=number + 1)} {document}"
            spans.append((place + len(self.separator), place + len(self.separator) + len(piece)))
            pieces.append(piece)
            place = spans[-1][1]
        tail = f"{INSTRUCTION}{self.separator}{QUERY} "
        text = self.separator.join([*pieces, tail])
        backend = self.tokenizer.backend_tokenizer
        whole = backend.encode(f"{text}{query.strip()}{self.suffix}")
        ids, places = np.array(whole.ids), np.array(whole.offsets)
        first = int(np.searchsorted(places[:, 1], len(text) - len(tail), "right"))
        begins, ends = np.array(spans).T
        tokens = np.searchsorted(places[:, 1], begins, "right"), np.searchsorted(places[:, 0], ends, "left")
        empty = backend.encode(f"{tail}{EMPTY_QUERY}{self.suffix}", add_special_tokens=False).ids
        return IcrPrompt(ids[:first], ids[first:], np.array(empty), np.stack(tokens, 1))


class _Loaded(AttentionReranker):
    """An `AttentionReranker` of a model and a tokenizer that are in memory, with no document seen before."""

    def __init__(self, tokenizer: Any, scorer: Any) -> None:
        Reranker.__init__(self)
        self.policy, self.scorer, self.calibrate, self.max_length = POLICY, scorer, True, scorer.max_length
        self.prompts = AttentionPrompts(tokenizer, POLICY, model_type=KIND, instruction=INSTRUCTION, words=POLICY.words)


class Ours(TextEngine):
    """`AttentionReranker.score`."""

    name = "fastrerank"
    setup = "AttentionReranker.score of documents that it has not seen before"

    def __init__(self, tokenizer: Any, scorer: Any) -> None:
        self.reranker = _Loaded(tokenizer, scorer)

    def scores(self, query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        scores = self.reranker.score(query, documents)
        self.tokenising = self.reranker.last_usage["seconds"]["tokenize"]
        return scores.astype(np.float64)

    def explained(self, query: str, documents: Sequence[str]) -> Asked:
        rows = sorted(self.reranker.rank(query, documents, explain=True), key=lambda row: row["corpus_id"])
        masses = [np.array([mass for _, mass in row["tokens"]]) for row in rows]
        prompt = of_prompt(self.reranker.prompts.encode(query, documents))
        return Asked(prompt, np.array([row["score"] for row in rows]), masses)


class OursSeen(Ours):
    name = "fastrerank, seen"
    setup = "the same, of documents whose tokens it has kept from an earlier call"


class OursCore(Ours):
    name = "fastrerank-core"
    setup = "the same as the first with eight heads, the last in a layer below the middle"
