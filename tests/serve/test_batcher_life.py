"""What an `AsyncReranker` leaves behind: nothing waits when it is closed, no thread stays when it is dropped."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serve_fakes import Lengths, held

from fastrerank.serve.batching import workers
from fastrerank.serve.batching.batcher import AsyncReranker, Closed


def soon(true: Callable[[], bool]) -> bool:
    """Whether `true()` becomes so within ten seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return true()


def test_closing_with_a_grace_time_ends_what_is_being_computed_too() -> None:
    reranker = Lengths()
    reranker.gate.clear()
    shared = AsyncReranker(reranker, workers=1, max_wait_ms=0)
    try:
        computed = shared.submit("q", ["a"])
        reranker.entered.acquire()
        waiting = shared.submit("q", ["b"])
        shared.close(grace=0.01)
        for future in (computed, waiting):
            assert isinstance(future.exception(1), Closed)
    finally:
        reranker.gate.set()
    for thread in shared._threads:
        thread.join(10)
        assert not thread.is_alive()
    assert shared.failure is None
    assert shared.queued_tokens() == 0


def test_closing_without_one_finishes_what_is_being_computed() -> None:
    reranker = Lengths()
    shared, computed = held(reranker, "abc", max_wait_ms=0)
    closing = threading.Thread(target=shared.close)
    closing.start()
    reranker.gate.set()
    closing.join(10)
    assert computed.result(1).tolist() == [2.0]


def test_one_that_is_dropped_ends_its_threads_and_frees_its_reranker() -> None:
    reranker = Lengths()
    shared = AsyncReranker(reranker)
    assert shared.submit("q", ["abc"]).result(10).tolist() == [2.0]
    time.sleep(0.05)  # its threads wait
    threads, model = list(shared._threads), weakref.ref(reranker)
    del shared, reranker
    assert soon(lambda: model() is None and not any(thread.is_alive() for thread in threads))


def test_one_that_is_dropped_finishes_what_somebody_waits_for() -> None:
    reranker = Lengths()
    reranker.gate.clear()
    futures = [AsyncReranker(reranker, workers=1, max_wait_ms=0).submit("q", ["a" * i]) for i in range(1, 4)]
    gc.collect()
    reranker.gate.set()
    assert [future.result(10)[0] for future in futures] == [0.0, 1.0, 2.0]


def test_the_end_of_the_process_waits_for_what_is_computed_and_ends_what_waits(monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "OPEN", weakref.WeakSet())
    reranker = Lengths()
    shared, computed = held(reranker, "abc", max_wait_ms=0)
    waiting = shared.submit("q", ["b"])
    ending = threading.Thread(target=workers._at_exit)
    ending.start()
    with pytest.raises(Closed, match="the process ends"):
        waiting.result(10)
    assert ending.is_alive()
    reranker.gate.set()
    ending.join(10)
    assert not any(thread.is_alive() for thread in shared._threads)
    assert computed.result(10).tolist() == [2.0]


def langchain(reranker: Lengths) -> tuple[Any, Callable[[Any], Any]]:
    documents = pytest.importorskip("langchain_core.documents")
    from fastrerank.integrations.langchain import FastReranker

    given = [documents.Document(page_content="abc")]
    return FastReranker(reranker=reranker), lambda one: asyncio.run(one.acompress_documents(given, "q"))


def llama_index(reranker: Lengths) -> tuple[Any, Callable[[Any], Any]]:
    schema = pytest.importorskip("llama_index.core.schema")
    from fastrerank.integrations.llama_index import FastRerank

    nodes = [schema.NodeWithScore(node=schema.TextNode(text="abc"), score=0.5)]
    return FastRerank(reranker), lambda one: asyncio.run(one.apostprocess_nodes(nodes, query_str="q"))


@pytest.mark.parametrize("framework", [langchain, llama_index])
def test_an_adapter_shares_one_and_frees_it(framework: Any) -> None:
    made, call = framework(Lengths())
    kept = [made]
    del made
    before = {thread for thread in threading.enumerate() if thread.name.startswith("fastrerank-batch")}
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(call, kept * 16))) == 16
    threads = [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("fastrerank-batch") and thread not in before
    ]
    assert len(threads) == 2
    model = weakref.ref(kept[0]._shared.reranker)
    kept.clear()
    assert soon(lambda: model() is None and not any(thread.is_alive() for thread in threads))
