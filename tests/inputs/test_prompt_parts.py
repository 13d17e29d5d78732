"""The cache of documents' ids, threads, and the parts that prompts are compiled from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

import prompt_tokenizers as styles
from prompt_tokenizers import tokenizer_of
from tokenizers import AddedToken

from fastrerank.inputs.prompts import Template
from fastrerank.inputs.prompts.prompt_tokenizer import Prompt, PromptTokenizer
from fastrerank.inputs.prompts.token_cache import TokenCache, Tokens
from fastrerank.inputs.text_pieces import TextTokenizer

QUERY = "where do owls sleep?"


def test_documents_are_tokenised_once_per_content():
    prompts = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"))
    start = prompts.cache_info
    documents = [f"document number {i}" for i in range(20)]
    prompts.encode(QUERY, [documents])
    middle = prompts.cache_info
    assert middle.misses - start.misses == 20
    prompts.encode("another query", [documents[::-1], documents[5:15]])
    end = prompts.cache_info
    assert end.misses == middle.misses
    assert end.hits - middle.hits == 20  # each content once a call, at whatever place it stands


def test_the_cache_is_bounded_and_least_recently_used():
    cache: TokenCache[str] = TokenCache(10_000)
    tokens = Tokens(np.arange(100, dtype=np.int32), 0, 100, False)
    for i in range(100):
        cache.put("kind", str(i), tokens)
        assert cache.get("kind", "0") is not None  # used all the time, so never dropped
        assert cache.info().bytes <= 10_000
    assert cache.get("kind", "1") is None
    assert cache.get("kind", "99") is not None
    assert 5 < cache.info().entries < 20
    cache.put("kind", "large", Tokens(np.zeros(5_000, np.int32), 0, 0, False))
    assert cache.get("kind", "large") is None
    small = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"), cache_bytes=3000)
    for i in range(50):
        small.encode("q", [[f"document number {i}"]])
    assert 0 < small.cache_info.bytes <= 3000
    none = PromptTokenizer(tokenizer_of("qwen"), Template.load("first"), cache_bytes=0)
    assert none.encode("q", [["d"]])[0].ids.tolist() == small.encode("q", [["d"]])[0].ids.tolist()


@pytest.mark.parametrize("style", ["qwen", "llama2", "gemma"])
def test_one_object_serves_many_threads(style):
    prompts = PromptTokenizer(tokenizer_of(style), Template.load("first"), cache_bytes=20_000)
    work = [(f"query {i % 7}", [[f"text {j * i % 23} owl" for j in range(2 + i % 9)]]) for i in range(200)]
    expected = [prompts.whole_ids(query, lists[0]) for query, lists in work[:60]]

    def encode(item: tuple[str, list[list[str]]]) -> list[Prompt]:
        return prompts.encode(*item)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(encode, work))
    assert [prompt.ids.tolist() for (prompt,) in results[:60]] == expected
    assert prompts.cache_info.bytes <= 20_000


def test_splitting_at_markers_is_leftmost_longest():
    tokenizer = styles.byte_level(None)
    tokenizer.add_special_tokens([AddedToken("<a>", normalized=False), AddedToken("<a><b>", normalized=False)])
    text = TextTokenizer(tokenizer, [])
    parts = text.split("x<a><b><a> y")
    assert [part if isinstance(part, str) else part.content for part in parts] == ["x", "<a><b>", "<a>", " y"]


def test_only_what_the_template_writes_becomes_a_marker():
    tokenizer = styles.byte_level(None)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "<b>", "\n\n", "owl")])
    text = TextTokenizer(tokenizer, ["<think>\n\nowl"])
    assert list(text.markers) == ["<think>"]
    kept = [tokenizer.token_to_id(token) for token in ("<b>", "\n\n", "owl")]
    assert next(iter(text.encode(["<b>\n\nowl"], True))) == kept


def test_cuts_stand_where_no_token_can_cross():
    text = TextTokenizer(tokenizer_of("llama2").backend_tokenizer, [])
    cut = text.cut("\n[B] ")
    assert cut is not None
    assert text.cut("x") is None
    assert text.cut("東京") is None
    vocabulary = tokenizer_of("llama2").get_vocab()
    for place in (cut.first, cut.last):
        assert not any("\n[B]▁"[place - 1 : place + 1] in token for token in vocabulary)
