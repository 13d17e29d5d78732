"""What a queue learns of tokens: instructions and prompts around the texts do not make texts look longer."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from serve_fakes import Lengths

from fastrerank.inputs.limits import TextLimits
from fastrerank.rerankers.base import Scores, Usage
from fastrerank.rerankers.call import LIMITS, NO_OPTIONS, CallOptions
from fastrerank.serve.batching.admission import measure
from fastrerank.serve.batching.batcher import AsyncReranker, TooLarge
from fastrerank.serve.batching.queue import MOST_TOKENS_PER_BYTE, PAIR_TOKENS, Speed

ENGLISH = 0.25  # tokens of a byte


class Prompting(Lengths):
    """A pair has `fixed` tokens, a quarter of a token for each letter of its texts, and those of its instruction."""

    call_options: ClassVar[frozenset[str]] = frozenset({"instruction"}) | LIMITS

    def __init__(self, fixed: int, rate: float = ENGLISH) -> None:
        super().__init__()
        self.fixed, self.rate = fixed, rate

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        scores = super()._score_many(queries, documents, usage)
        said = len(call.instruction or "")
        usage.query_tokens = [
            sum(self.fixed + int(self.rate * (len(query) + len(text) + said)) for text in texts)
            for query, texts in zip(queries, documents, strict=True)
        ]
        usage.tokens = sum(usage.query_tokens)
        return scores


@pytest.fixture
def shared(request: Any) -> Any:
    one = AsyncReranker(Prompting(*request.param), max_wait_ms=0)
    yield one
    one.close()


def ask(shared: AsyncReranker, query: str, texts: list[str], times: int = 1, **options: Any) -> None:
    for _ in range(times):
        assert shared.submit(query, texts, **options).result(30).shape == (len(texts),)


PASSAGES = ["a passage of about three hundred letters " * 7] * 10_000


@pytest.mark.parametrize("shared", [(3,)], indirect=True)
def test_long_instructions_are_counted_and_teach_nothing_of_texts(shared: AsyncReranker) -> None:
    ask(shared, "q", ["a"], times=5, instruction="rank what helps, " * 300)
    assert shared.speed.tokens_per_byte < 0.4
    assert shared.speed.pair_tokens < 50
    ask(shared, "who is it?", PASSAGES)
    with pytest.raises(TooLarge):  # the same instruction with each of so many documents is 12 million tokens
        shared.submit("who is it?", PASSAGES, instruction="rank what helps, " * 300)


@pytest.mark.parametrize("shared", [(160,)], indirect=True)
def test_the_prompt_around_short_texts_is_no_text(shared: AsyncReranker) -> None:
    """As a chat template: its tokens are many times those of a short pair."""
    ask(shared, "who is it?", ["an owl"], times=30)
    speed = shared.speed
    assert speed.tokens_per_byte == pytest.approx(0.3, abs=0.1)
    assert speed.pair_tokens == pytest.approx(160, rel=0.2)
    for count, length in ((1, 16), (100, 16), (100, 1000)):  # what any request is estimated at is near the truth
        sizes = measure("q" * 16, ["a" * length] * count, TextLimits(), None, speed).sizes
        true = count * (160 + ENGLISH * (16 + length))
        assert speed.tokens(sum(sizes)) == pytest.approx(true, rel=0.3)
    ask(shared, "who is it?", PASSAGES[:5_000])


@pytest.mark.parametrize("shared", [(3, 1.0)], indirect=True)
def test_many_documents_of_a_letter_teach_little_of_passages(shared: AsyncReranker) -> None:
    ask(shared, "q", list("abcdefghij") * 10, times=25)
    assert shared.speed.tokens_per_byte < 0.45
    assert shared.submit("who is it?", PASSAGES).result(30).shape == (10_000,)


def test_the_rate_stays_within_what_texts_can_have() -> None:
    speed = Speed()
    for _ in range(50):
        speed.note(1 << 14, 1 << 18, 0.1, pairs=16)
    assert speed.tokens_per_byte <= MOST_TOKENS_PER_BYTE
    assert speed.pair_tokens == pytest.approx(((1 << 18) - (1 << 14)) / 16, rel=0.01)
    for _ in range(50):  # what one kind of requests taught passes
        speed.note(1 << 14, 1 << 12, 0.1, pairs=16)
    assert speed.pair_tokens <= (1 << 12) / 16
    dense = Speed()
    for _ in range(100):
        dense.note(1 << 14, 1 << 14, 0.1, pairs=16)
    assert dense.tokens_per_byte == pytest.approx(1.0, abs=0.05)  # as of digits
    assert dense.pair_tokens == PAIR_TOKENS


def test_an_instruction_counts_with_each_pair_and_once_in_a_list() -> None:
    speed, texts = Speed(), ["a" * 100] * 10
    plain = sum(measure("q", texts, TextLimits(), None, speed).sizes)
    pairs = sum(measure("q", texts, TextLimits(), None, speed, "i" * 1000).sizes)
    listed = sum(measure("q", texts, TextLimits(), None, speed, "i" * 1000, whole=True).sizes)
    assert np.subtract([pairs, listed], plain).tolist() == [10_000, 1000]
    cut = measure("q", texts, TextLimits(), 64, speed, "i" * 1000).sizes
    assert sum(cut) == 10 * speed.bytes(64)  # no more than the model reads
