"""AttentionReranker: parity with two eager forwards of transformers, edge cases, windows, refusals."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_models import DOCUMENTS, FAMILIES, HEADS, QUERY, STORIES, Eager, filtered, save

import fastrerank
from fastrerank.rerankers.attention import AttentionReranker, filtered_sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint of a family; the trained one for "stories"."""
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family == "stories":
            if not STORIES.is_dir():
                pytest.skip("shared/models/stories260K is not here")
            return STORIES
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return checkpoint


@pytest.fixture(scope="module")
def llama(folder: Any) -> AttentionReranker:
    return AttentionReranker(folder("llama"), dtype="float32")


@pytest.fixture(scope="module")
def core(folder: Any) -> AttentionReranker:
    return AttentionReranker(folder("llama"), preset="core", heads=HEADS, dtype="float32")


def check(reranker: AttentionReranker, eager: Eager, documents: list[str], query: str = QUERY) -> None:
    ours, expected = reranker.token_masses(query, documents), eager.masses(query, documents, reranker.calibrate)
    assert [len(one) for one in ours] == [len(one) for one in expected]
    largest = max(float(np.abs(one).max(initial=0)) for one in expected)
    assert largest > 0
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)
    scores, wanted = reranker.score(query, documents), np.array([filtered(one) for one in expected])
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    ranking = [hit["corpus_id"] for hit in reranker.rank(query, documents)]
    assert (np.diff(wanted[ranking]) <= 2e-5).all()


@pytest.mark.parametrize("preset", ["icr", "qrhead", "core"])
@pytest.mark.parametrize("family", [*FAMILIES, "stories"])
def test_equals_two_eager_forwards(folder: Any, family: str, preset: str) -> None:
    heads = None if preset == "icr" else HEADS
    path = folder(family)
    reranker = AttentionReranker(path, preset=preset, heads=heads, dtype="float32")
    eager = Eager(path, reranker.prompts, heads)
    check(reranker, eager, DOCUMENTS[: 3 if family == "stories" else None])
    assert reranker.last_usage["forwards"] == 1


def test_without_calibration_and_with_another_instruction(folder: Any) -> None:
    path = folder("llama")
    reranker = AttentionReranker(path, calibrate=False, instruction="qa", dtype="float32")
    assert reranker.prompts.instruction.startswith("Please answer the following question")
    check(reranker, Eager(path, reranker.prompts, None), DOCUMENTS)
    own = AttentionReranker(path, instruction="Rank them.", dtype="float32")
    assert own.prompts.instruction == "Rank them."


@pytest.mark.parametrize("documents", [["one document"], [""], ["", ""], ["a {b} [2] c", "<|eot_id|> is text"]])
def test_few_and_odd_documents(llama: AttentionReranker, folder: Any, documents: list[str]) -> None:
    if "<|eot_id|>" in documents[-1]:  # the reference would parse it
        assert np.isfinite(llama.score(QUERY, documents)).all()
        assert "<|eot_id|>" in "".join(llama.prompts.encode(QUERY, documents).pieces(1))
        return
    check(llama, Eager(folder("llama"), llama.prompts, None), documents)


def test_no_documents(llama: AttentionReranker) -> None:
    assert llama.score("who?", []).shape == (0,)
    assert llama.rank("who?", []) == []
    assert llama.token_masses("who?", []) == []


def test_a_span_of_one_token_scores_nothing(folder: Any) -> None:
    # Without its label and without a token behind it an empty document is the space before it.
    mistral = AttentionReranker(folder("mistral"), preset="core", heads=HEADS, dtype="float32")
    (masses, _) = mistral.token_masses(QUERY, ["", "the owl"])
    assert len(masses) == 1
    assert masses[0] != 0
    assert mistral.score(QUERY, ["", "the owl"])[0] == 0


def test_the_empty_query_keeps_the_order(llama: AttentionReranker, core: AttentionReranker) -> None:
    for reranker in (llama, core):
        for query in ("N/A", " N/A\n"):
            assert (reranker.score(query, DOCUMENTS) == 0).all()
            assert [hit["corpus_id"] for hit in reranker.rank(query, DOCUMENTS)] == list(range(len(DOCUMENTS)))
            assert all((masses == 0).all() for masses in reranker.token_masses(query, DOCUMENTS))


def test_duplicates_stand_apart(llama: AttentionReranker) -> None:
    masses = llama.token_masses(QUERY, ["the owl"] * 3)
    assert len({len(one) for one in masses}) == 1
    assert not np.array_equal(masses[0], masses[1])  # they have other neighbours


def test_runs_repeat_bitwise(core: AttentionReranker, llama: AttentionReranker) -> None:
    for reranker in (core, llama):
        first = reranker.token_masses(QUERY, DOCUMENTS)
        for _ in range(2):
            for a, b in zip(first, reranker.token_masses(QUERY, DOCUMENTS), strict=True):
                assert a.tobytes() == b.tobytes()


def test_many_threads(llama: AttentionReranker) -> None:
    expected = [llama.score(f"{i} owls", DOCUMENTS) for i in range(6)]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        found[i] = llama.score(f"{i} owls", DOCUMENTS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, scores in enumerate(expected):
        np.testing.assert_array_equal(found[i], scores)


def test_score_many_equals_score(core: AttentionReranker) -> None:
    lists = [DOCUMENTS, DOCUMENTS[:2], []]
    for query, scores, documents in zip("abc", core.score_many(list("abc"), lists), lists, strict=True):
        np.testing.assert_array_equal(scores, core.score(query, documents))


def test_explain_carries_the_tokens(core: AttentionReranker) -> None:
    masses = core.token_masses(QUERY, DOCUMENTS)
    hits = core.rank(QUERY, DOCUMENTS, explain=True, return_documents=True)
    assert "tokens" not in core.rank(QUERY, DOCUMENTS)[0]
    for hit in hits:
        number = hit["corpus_id"]
        text = "".join(token for token, _ in hit["tokens"])
        assert text.startswith(f" {DOCUMENTS[number]}")
        assert [mass for _, mass in hit["tokens"]] == [float(mass) for mass in masses[number]]


def test_explained_in_shared_batches(core: AttentionReranker) -> None:
    async def run() -> Any:
        async with fastrerank.AsyncReranker(core) as shared:
            jobs = [
                shared.rank(query, DOCUMENTS, explain=explain) for query in (QUERY, "why") for explain in (True, False)
            ]
            return await asyncio.gather(*jobs)

    expected = [core.rank(query, DOCUMENTS, explain=explain) for query in (QUERY, "why") for explain in (True, False)]
    assert asyncio.run(run()) == expected


def test_words_are_cut(folder: Any) -> None:
    reranker = AttentionReranker(folder("llama"), words_per_document=2, dtype="float32")
    cut = reranker.score(QUERY, ["one two three four", "five"])
    assert reranker.last_usage["truncated"] == 1
    np.testing.assert_array_equal(cut, reranker.score(QUERY, ["one two", "five"]))
    whole = AttentionReranker(folder("llama"), words_per_document=0, dtype="float32")
    assert whole.prompts.words is None
    with pytest.raises(ValueError, match="words_per_document must be None or an int of at least 0, got -1"):
        AttentionReranker(folder("llama"), words_per_document=-1)


class TestWindows:
    """Prompts that are longer than the limit."""

    def rank_in_windows(self, reranker: AttentionReranker, size: int, documents: list[str]) -> list[int]:
        """Windows of `size` from the end of the list: the better half of each goes on."""
        waiting, placed = list(range(len(documents))), []
        while waiting:
            window = waiting[-size:]
            scores = reranker.score(QUERY, [documents[i] for i in window])
            best = [window[i] for i in np.argsort(-scores, kind="stable")]
            kept = 0 if len(window) == len(waiting) else len(window) - len(window) // 2
            placed = best[kept:] + placed
            waiting = waiting[: -len(window)] + best[:kept]
        return placed

    def test_ranking_and_report(self, folder: Any, llama: AttentionReranker, caplog: Any) -> None:
        documents = [f"the {word} sleeps by day" for word in "abcdefghi"]
        need = [llama.prompts.encode(QUERY, documents[:n]).longest for n in (4, 5)]
        small = AttentionReranker(folder("llama"), max_length=need[1] - 1, dtype="float32")
        with caplog.at_level(logging.WARNING, "fastrerank"):
            hits = small.rank(QUERY, documents)
        assert "do not fit" in caplog.text
        assert [hit["corpus_id"] for hit in hits] == self.rank_in_windows(llama, 4, documents)
        assert [hit["score"] for hit in hits] == list(range(9, 0, -1))
        assert small.last_usage["comparisons"] == small.last_usage["forwards"] == 4
        assert small.last_usage["truncated"] == 0
        assert all(len(masses) for masses in small.token_masses(QUERY, documents))
        caplog.clear()
        assert small.score(QUERY, documents[:4]).tolist() == llama.score(QUERY, documents[:4]).tolist()
        assert "do not fit" not in caplog.text
        assert small.last_usage["comparisons"] == 1

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_documents_longer_than_the_limit_are_cut(self, folder: Any, count: int) -> None:
        small = AttentionReranker(folder("llama"), max_length=160, words_per_document=0, dtype="float32")
        documents = [f"{i} owls sleep by day. " * 60 for i in range(count)]
        assert sorted(small.score(QUERY, documents)) == list(range(1, count + 1))
        assert small.last_usage["truncated"] == count

    def test_a_query_without_room(self, folder: Any) -> None:
        small = AttentionReranker(folder("llama"), max_length=70, dtype="float32")
        with pytest.raises(ValueError, match="leave no room for documents"):
            small.score("owl " * 80, ["a", "b"])

    def test_limits(self, folder: Any) -> None:
        for wrong in (0, 513):
            with pytest.raises(ValueError, match=f"max_length must be at least 1 and at most 512.*got {wrong}"):
                AttentionReranker(folder("llama"), max_length=wrong)


class TestContext:
    """Documents whose keys and values are kept."""

    @pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mistral"])
    def test_equals_the_reranker_bitwise(self, folder: Any, family: str) -> None:
        reranker = AttentionReranker(folder(family), preset="core", heads=HEADS, dtype="float32")
        context = reranker.context(DOCUMENTS)
        tokens = len(reranker.prompts.encode("", DOCUMENTS).context)
        assert reranker.last_usage["tokens"] == tokens
        assert context.nbytes == tokens * reranker.scorer.kept_bytes > 0
        for query in (QUERY, "another one", "N/A", ""):
            np.testing.assert_array_equal(context.score(query), reranker.score(query, DOCUMENTS))
            assert context.rank(query, explain=True) == reranker.rank(query, DOCUMENTS, explain=True)
        context.score(QUERY)
        assert reranker.last_usage["tokens"] < tokens

    def test_bounds(self, llama: AttentionReranker) -> None:
        need = llama.context(DOCUMENTS).nbytes
        assert llama.context(DOCUMENTS, max_bytes=need).nbytes == need
        with pytest.raises(ValueError, match=f"max_bytes must be at least {need:,}"):
            llama.context(DOCUMENTS, max_bytes=need - 1)
        with pytest.raises(ValueError, match="only documents that fit into one prompt can be kept"):
            llama.context(["the owl " * 100] * 6)
        empty = llama.context([])
        assert empty.nbytes == 0
        assert empty.rank("who?") == []


class TestRefusals:
    """What cannot be served is said."""

    def test_no_published_heads(self, folder: Any) -> None:
        for method in ("qrhead", "core"):
            with pytest.raises(ValueError, match=f"no {method} heads are published .*`fastrerank heads"):
                fastrerank.load(str(folder("llama")), method=method)

    def test_heads(self, folder: Any, tmp_path: Path) -> None:
        for wrong, message in (
            ([(3, 0)], r"\(3, 0\) is not in the model, which has 3 layers"),
            ([(0, 4)], r"\(0, 4\) is not in the model, which has 4 heads"),
            ([(0, -1)], "numbered from 0"),
            ([], "at least one"),
            ([(0, 1, 2)], "pairs"),
            ([("0", 1)], "pairs of int"),
            ("nq", r"heads must be .* published list of this checkpoint \(none\)"),
        ):
            with pytest.raises(ValueError, match=message):
                AttentionReranker(folder("llama"), preset="core", heads=wrong)
        with pytest.raises(FileNotFoundError, match="no preset file"):
            AttentionReranker(folder("llama"), heads=tmp_path / "none.toml")
        (tmp_path / "bad.toml").write_text("heads = 3")
        with pytest.raises(ValueError, match="is no preset file"):
            AttentionReranker(folder("llama"), heads=tmp_path / "bad.toml")

    def test_presets_and_models(self, folder: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="preset must be one of icr, qrhead, core, got 'x'"):
            AttentionReranker(folder("llama"), preset="x")
        import decoders
        import prompt_tokenizers

        prompt_tokenizers.save("gpt2", tmp_path)
        decoders.save(tmp_path, "bloom", vocab_size=1000)
        with pytest.raises(ValueError, match="BloomModel cannot be read: its attention does not run packed"):
            AttentionReranker(tmp_path)

    def test_published_lists(self, tmp_path: Path) -> None:
        """A checkpoint is told by its name and its number of layers."""
        from fastrerank.inputs.prompts.attention_policy import Policy

        lists = Policy.load("qrhead").known(["llama-3.1-8b-instruct"], 32)
        assert list(lists) == ["nq", "lme"]
        assert lists["nq"][0] == (14, 22)
        assert len(lists["lme"]) == 16
        assert Policy.load("qrhead").known(["llama-3.1-8b-instruct"], 16) == {}
        assert len(Policy.load("core").known(["meta-llama-3.1-8b-instruct"], 32)["nq"]) == 8
        named = save(
            tmp_path / "phi-4",
            "phi3",
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=10,
            hidden_size=80,
        )
        reranker = AttentionReranker(named, preset="core", dtype="float32")
        assert reranker.scorer.layers == 24
        assert AttentionReranker(named, preset="core", heads="nq-half", dtype="float32").scorer.layers == 20

    def test_texts(self, llama: AttentionReranker) -> None:
        with pytest.raises(TypeError, match=r"documents\[1\] must be str"):
            llama.score("who?", ["a", None])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="query must be str"):
            llama.token_masses(3, ["a"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="top_k must be None"):
            llama.rank("who?", ["a"], top_k=-1)


@pytest.mark.parametrize("method", ["icr", "qrhead", "core"])
def test_load(folder: Any, method: str) -> None:
    reranker = fastrerank.load(str(folder("llama")), method=method, heads=HEADS)
    assert isinstance(reranker, fastrerank.AttentionReranker)
    assert reranker.method == reranker.policy.name == method
    assert "arXiv" in fastrerank.list_methods()[method]


def test_the_filter() -> None:
    random = np.random.default_rng(0)
    for size in range(6):
        for values in (random.normal(size=size), np.zeros(size), np.r_[np.ones(size), -9.0]):
            masses = values.astype(np.float32)
            assert filtered_sum(masses) == pytest.approx(filtered(masses.astype(np.float64)), abs=1e-12)
