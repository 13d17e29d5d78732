"""What every reranker promises: parity with the reference, odd texts, ties, threads, forks, no torch."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import reference
import tiny as factory
import torch

import fastrerank
from fastrerank import CrossEncoder, EmbeddingReranker, LateInteractionReranker, ops
from fastrerank.engine.native.encoder import DTYPES
from fastrerank.rerankers import pair_engine

Tiny = Callable[..., Path]
METHODS = {"cross-encoder": CrossEncoder, "late-interaction": LateInteractionReranker, "embedding": EmbeddingReranker}
QUERY = "where do old cats sleep?"
TEXTS = factory.texts(20, seed=1)
# Scores against transformers in float32; cosines are at most 1.
BOUND = 2e-5
ODD = {
    "empty": "",
    "blanks": " \t\n ",
    "long": "owl " * 50_000,
    "one long word": "a" * 200_000,
    "surrogate": "a \ud800 b",
    "only surrogates": "\udfff\ud83d",
    "NUL": "a\x00b\x00",
    "right to left": "שלום עולם \u202eabc",
    "emoji": "🦉👩\u200d👧 owl",
    "combining": "e\u0301" * 50,
    "special": "[SEP] [CLS] [PAD] [MASK]",
    "private": "\ue000\uffff\U0010ffff",
}


@pytest.fixture(params=METHODS)
def reranker(request: pytest.FixtureRequest, tiny: Tiny) -> Any:
    return METHODS[request.param](tiny("bert"))


@pytest.fixture(scope="module")
def queries(data_folder: Path) -> list[tuple[str, list[str]]]:
    """Eight real queries with ten real passages each."""
    with gzip.open(data_folder / "dl19-passage-bm25-top100.jsonl.gz", "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(8)]
    return [(row["query"], [candidate["text"] for candidate in row["candidates"][:10]]) for row in rows]


@pytest.fixture(scope="module")
def torch_max_sim(minilm: Path, queries: list[tuple[str, list[str]]]) -> Callable[[str], list[np.ndarray]]:
    """`torch_max_sim(precision)` -> scores per query by transformers' model, one text at a time."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)

    @cache
    def scores(precision: str) -> list[np.ndarray]:
        model = AutoModel.from_pretrained(minilm).eval()
        if precision == "bfloat16":
            model = model.bfloat16()
        elif precision != "float32":
            model = reference.quantise(model, int(precision))

        def vectors(text: str) -> torch.Tensor:
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            return torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].double(), dim=-1)

        with torch.inference_mode():
            return [
                np.array([float((vectors(query) @ vectors(text).T).amax(1).mean()) for text in texts])
                for query, texts in queries
            ]

    return scores


@pytest.mark.usefixtures("isa")
def test_cosines_of_minilm_equal_sentence_transformers(minilm: Path, queries: list[tuple[str, list[str]]]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    ours = EmbeddingReranker(minilm)
    for query, texts in queries:
        cosines = sentence_transformers.util.cos_sim(theirs.encode([query]), theirs.encode(texts))[0].numpy()
        scores = ours.score(query, texts)
        assert np.abs(scores - cosines).max() <= BOUND
        assert np.ptp(cosines) > 0.05
        np.testing.assert_allclose(np.linalg.norm(ours.encode(texts), axis=1), 1, atol=1e-6)


@pytest.mark.usefixtures("isa")
def test_max_sim_of_minilm_equals_torch(
    minilm: Path, queries: list[tuple[str, list[str]]], torch_max_sim: Callable[[str], list[np.ndarray]]
) -> None:
    model = LateInteractionReranker(minilm)
    for (query, texts), expected in zip(queries, torch_max_sim("float32"), strict=True):
        assert np.abs(model.score(query, texts) - expected).max() <= BOUND
        # The same ranking but for scores closer than the error.
        sequence = [expected[row["corpus_id"]] for row in model.rank(query, texts)]
        assert (np.diff(sequence) <= 2 * BOUND).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_max_sim_of_minilm_in_low_precision(
    isa: str,
    minilm: Path,
    queries: list[tuple[str, list[str]]],
    torch_max_sim: Callable[[str], list[np.ndarray]],
    dtype: str,
) -> None:
    # Not worse than torch's bfloat16 model; for int8, than the same quantisation simulated in torch.
    exact = np.concatenate(torch_max_sim("float32"))
    quantised = "127" if isa == "avx2" else "255"
    rounded = np.concatenate(torch_max_sim("bfloat16" if dtype == "bfloat16" else quantised))
    model = LateInteractionReranker(minilm, dtype=dtype)
    scores = np.concatenate([model.score(query, texts) for query, texts in queries])
    assert np.sqrt(np.mean((scores - exact) ** 2)) <= np.sqrt(np.mean((rounded - exact) ** 2))


@pytest.mark.parametrize("kind", [LateInteractionReranker, EmbeddingReranker])
def test_int8_reads_documents_in_int8_and_queries_in_bfloat16(tiny: Tiny, kind: Any) -> None:
    def vectors(engine: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batch = model._tokenizer.singles(texts)
        vectors = engine.forward(batch.ids, batch.type_ids, batch.offsets)
        return vectors, batch.offsets if len(vectors) == batch.offsets[-1] else np.arange(len(texts) + 1)

    model, precise = kind(tiny("bert"), dtype="int8"), kind(tiny("bert"), dtype="bfloat16")
    (query, _), (documents, offsets) = vectors(precise.engine, [QUERY]), vectors(model.engine, TEXTS)
    np.testing.assert_array_equal(model.score(QUERY, TEXTS), ops.max_sim(query, documents, offsets))
    assert (query != vectors(model.engine, [QUERY])[0]).any()
    assert (documents != vectors(precise.engine, TEXTS)[0]).any()
    assert precise.query_engine is precise.engine


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_many_is_bitwise_score_per_query(tiny: Tiny, dtype: str) -> None:
    queries = [QUERY, "a", "light", "one"]
    documents = [TEXTS[:7], [], TEXTS[7:8], TEXTS]
    for kind in METHODS.values():
        model = kind(tiny("bert"), dtype=dtype)
        together = model.score_many(queries, documents)
        assert [len(scores) for scores in together] == [7, 0, 1, 20]
        for query, texts, scores in zip(queries, documents, together, strict=True):
            assert scores.dtype == np.float32
            np.testing.assert_array_equal(scores, model.score(query, texts))
        assert model.score_many([], []) == []
        with pytest.raises(ValueError, match="one list per query: 4, got 1"):
            model.score_many(queries, [[]])
        with pytest.raises(TypeError, match=r"documents\[1\]\[0\] must be str, got NoneType"):
            model.score_many(["a", "b"], [["a"], [None]])


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean"])
@pytest.mark.parametrize("kind", METHODS.values())
def test_odd_texts_get_finite_scores_and_do_not_touch_the_others(tiny: Tiny, family: str, kind: Any) -> None:
    model = kind(tiny(family))
    mixed = [*TEXTS, *ODD.values()]
    scores = model.score(QUERY, mixed)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores[: len(TEXTS)], model.score(QUERY, TEXTS))
    assert len(model.rank(QUERY, mixed)) == len(mixed)
    for name, text in ODD.items():
        assert np.isfinite(model.score(text, ["owl", "cat", text])).all(), name
    model.score(QUERY, ["owl", ODD["long"]])
    assert model.last_usage["truncated"] == 1


def test_texts_that_are_not_str_are_named_by_position(reranker: Any) -> None:
    for wrong, kind in ((None, "NoneType"), (b"owl", "bytes"), (3, "int"), (2.5, "float"), (["owl"], "list")):
        with pytest.raises(TypeError, match=rf"documents\[2\] must be str, got {kind}"):
            reranker.score(QUERY, ["owl", "cat", wrong])
        with pytest.raises(TypeError, match=rf"documents\[0\] must be str, got {kind}"):
            reranker.rank(QUERY, [wrong, "owl"])
        with pytest.raises(TypeError, match=rf"query must be str, got {kind}"):
            reranker.rank(wrong, ["owl"])
    for wrong in ("owl", None, 3, {"owl": 1}, b"owl"):
        with pytest.raises(TypeError, match="documents must be a list"):
            reranker.score(QUERY, wrong)


def test_empty_requests(reranker: Any) -> None:
    scores = reranker.score(QUERY, [])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32
    assert reranker.rank(QUERY, []) == []
    assert reranker.rank(QUERY, (), top_k=3) == []


def test_duplicates_tie_and_keep_their_order(reranker: Any) -> None:
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[0]]
    rows = reranker.rank(QUERY, texts)
    scores = reranker.score(QUERY, texts)
    assert [row["corpus_id"] for row in rows] == sorted(range(6), key=lambda i: (-scores[i], i))
    for some in ((0, 2, 5), (1, 4)):
        assert len({scores[i] for i in some}) == 1
        assert [row["corpus_id"] for row in rows if row["corpus_id"] in some] == list(some)
    assert reranker.rank(QUERY, texts, top_k=2, return_documents=True) == [
        row | {"text": texts[row["corpus_id"]]} for row in rows[:2]
    ]


def test_work_split_into_blocks_gives_the_same(reranker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reranker.score(QUERY, TEXTS)
    rows = reranker.rank(QUERY, TEXTS)
    modules = [sys.modules[type(reranker).__module__]]
    if isinstance(reranker, CrossEncoder):
        modules.append(pair_engine)
    sizes = {"BLOCK_PAIRS": 3, "BLOCK_TEXTS": 3, "BLOCK_TOKENS": 50}  # 20 texts of 3 to 42 tokens
    found = [(module, name) for module in modules for name in sizes if hasattr(module, name)]
    assert found
    for module, name in found:
        monkeypatch.setattr(module, name, sizes[name])
    np.testing.assert_array_equal(reranker.score(QUERY, TEXTS), expected)
    assert reranker.last_usage["forwards"] > 5
    assert reranker.rank(QUERY, TEXTS) == rows
    many = reranker.score_many([QUERY, "a", QUERY], [TEXTS[:9], [], TEXTS])
    np.testing.assert_array_equal(np.concatenate(many), np.concatenate([expected[:9], expected]))


def test_other_containers_of_texts(reranker: Any) -> None:
    expected = reranker.score(QUERY, TEXTS)
    for some in (tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)):
        np.testing.assert_array_equal(reranker.score(QUERY, some), expected)


def test_texts_come_back_by_place_from_any_container(reranker: Any) -> None:
    rows = reranker.rank(QUERY, dict(enumerate(TEXTS[:9])).values(), return_documents=True)
    assert rows == reranker.rank(QUERY, TEXTS[:9], return_documents=True)


def test_an_iterator_of_texts_is_read_once(reranker: Any) -> None:
    rows = reranker.rank(QUERY, TEXTS, return_documents=True)
    assert reranker.rank(QUERY, iter(TEXTS), return_documents=True) == rows
    np.testing.assert_array_equal(reranker.score(QUERY, (text for text in TEXTS)), reranker.score(QUERY, TEXTS))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"query": "q: ", "document": "d: "}, ("q: ", "d: ")),
        ({"query": "q: ", "passage": "p: "}, ("q: ", "p: ")),
        ({"document": "", "passage": "p: "}, ("", "")),
        ({"corpus": "c: "}, ("", "c: ")),
        ({}, ("", "")),
    ],
)
def test_prompts_are_those_that_sentence_transformers_takes(
    tiny: Tiny, tmp_path: Path, stored: dict[str, str], expected: tuple[str, str]
) -> None:
    folder = Path(shutil.copytree(tiny("bert"), tmp_path / "model"))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": stored}))
    modules = [{"type": "s.Transformer", "path": ""}, {"type": "s.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model = EmbeddingReranker(folder)
    assert (model.query_prompt, model.document_prompt) == expected
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"include_prompt": False}))
    if any(expected):
        with pytest.raises(ValueError, match="include_prompt is false"):
            EmbeddingReranker(folder)
    else:
        EmbeddingReranker(folder)


def test_usage_tells_what_a_call_cost(reranker: Any) -> None:
    assert reranker.last_usage == {}
    reranker.score(QUERY, TEXTS)
    usage = reranker.last_usage
    assert usage["forwards"] >= 1
    lengths = [len(reranker._tokenizer.tokenizer.encode(text).ids) for text in TEXTS]
    single = sum(lengths)
    query = len(reranker._tokenizer.tokenizer.encode(QUERY).ids)
    pairs = single + len(TEXTS) * (query - 1)  # one [CLS] less per pair
    assert usage["tokens"] == (pairs if isinstance(reranker, CrossEncoder) else single + query)
    assert usage["truncated"] == 0
    assert not usage["query_truncated"]
    assert {"tokenize", "compute", "total"} <= usage["seconds"].keys()
    assert usage["seconds"]["total"] >= usage["seconds"]["tokenize"] + usage["seconds"]["compute"] > 0
    with ThreadPoolExecutor(1) as pool:  # every thread sees its own last call
        assert pool.submit(lambda: reranker.last_usage).result() == {}
    reranker.score(QUERY, TEXTS[:1])
    assert reranker.last_usage["tokens"] < usage["tokens"]


def test_a_query_that_fills_the_room_is_reported(tiny: Tiny) -> None:
    model = CrossEncoder(tiny("bert"))
    assert np.isfinite(model.score("owl " * 500, ["cat", "light"])).all()
    assert model.last_usage["query_truncated"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_get_what_one_gets(tiny: Tiny, dtype: str, threads: int) -> None:
    requests = [(TEXTS[i % 20], factory.texts(1 + i % 5, seed=i, longest=25)) for i in range(1000)]
    model = CrossEncoder(tiny("bert"), dtype=dtype, num_threads=threads)
    sequential = [model.score(*request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda request: model.score(*request), requests))
    for mine, other in zip(parallel, sequential, strict=True):
        np.testing.assert_array_equal(mine, other)


def _score_in_child(model: Any, connection: Any) -> None:
    connection.send(model.score(QUERY, TEXTS * 4))
    connection.close()


def test_works_in_a_forked_child_after_use(reranker: Any) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform cannot fork")
    reranker.engine.num_threads = 3
    expected = reranker.score(QUERY, TEXTS * 4)  # threads exist now, and do not in the child
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        mine, childs = context.Pipe(duplex=False)
        child = context.Process(target=_score_in_child, args=(reranker, childs))
        child.start()
        childs.close()
        try:
            assert mine.poll(60), "the child hangs"
            np.testing.assert_array_equal(mine.recv(), expected)
        finally:
            child.kill()
            child.join()
    np.testing.assert_array_equal(reranker.score(QUERY, TEXTS * 4), expected)


def test_pickling_says_what_to_do(reranker: Any) -> None:
    if isinstance(
        reranker, fastrerank.CrossEncoder
    ):  # is pickled as what loads it anew: tests/rerankers/test_drop_in.py
        return
    with pytest.raises(TypeError, match="load the checkpoint anew"):
        pickle.dumps(reranker)


def test_load_finds_the_method(tiny: Tiny, minilm: Path, tmp_path: Path) -> None:
    assert set(fastrerank.list_methods()) >= set(METHODS)
    assert all("arXiv" in paper for paper in fastrerank.list_methods().values())
    for method, kind in METHODS.items():
        assert kind.method == method
        model = fastrerank.load(tiny("bert"), method=method, dtype="int8", num_threads=1)
        assert type(model) is kind
        np.testing.assert_array_equal(model.score(QUERY, TEXTS), kind(tiny("bert"), dtype="int8").score(QUERY, TEXTS))
    assert type(fastrerank.load(str(tiny("bert")))) is CrossEncoder
    assert type(fastrerank.load(minilm)) is EmbeddingReranker
    bare = Path(shutil.copytree(tiny("bert"), tmp_path / "bare"))
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"BertModel.*late-interaction.*embedding"):
        fastrerank.load(bare)


def test_a_cross_encoder_on_a_cpu_imports_neither_torch_nor_transformers(tiny: Tiny) -> None:
    code = (
        "import sys, fastrerank\n"
        "heavy = ('torch', 'transformers', 'sentence_transformers', 'scipy')\n"
        "assert not any(name in sys.modules for name in (*heavy, 'tokenizers', 'huggingface_hub')), 'import'\n"
        f"model = fastrerank.load({str(tiny('bert'))!r})\n"
        "print(model.predict([('owl', 'cat')]), model.rank('owl', ['cat', 'owl'], return_documents=True))\n"
        "assert not any(name in sys.modules for name in heavy), 'use'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "corpus_id" in done.stdout
