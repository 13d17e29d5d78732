"""Columns of pandas, polars, pyarrow and datasets are texts; their tables are refused, with the column to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers_tiny import save_tiny_cross_encoder

import fastrerank
from fastrerank.inputs.columns import as_column, table_columns
from fastrerank.inputs.tokenizer import check_texts
from fastrerank.search import CURIndex

QUERIES = ["how long do fleas live", "who sleeps"]
TEXTS = ["cats sleep all day", "a flea lives up to a year"]
TABLE = {"query": QUERIES, "text": TEXTS, "id": ["a", "b"]}

polars = pytest.importorskip("polars")
datasets = pytest.importorskip("datasets")

COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "pandas Series": lambda texts: pd.Series(texts, index=[7, 3][: len(texts)]),
    "pandas string Series": lambda texts: pd.Series(texts, dtype="string"),
    "pandas Arrow Series": lambda texts: pd.Series(texts, dtype=pd.ArrowDtype(pa.string())),
    "pandas categories": lambda texts: pd.Series(texts, dtype="category"),
    "pandas Index": pd.Index,
    "pandas array": lambda texts: pd.array(texts, dtype="string"),
    "polars Series": polars.Series,
    "polars categories": lambda texts: polars.Series(texts, dtype=polars.Categorical),
    "pyarrow Array": pa.array,
    "pyarrow ChunkedArray": lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
    "pyarrow dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "datasets column": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
    "numpy": lambda texts: np.array(texts, dtype=object),
}
TABLES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "pandas": (pd.DataFrame, "df['text']"),
    "polars": (polars.DataFrame, "df['text']"),
    "polars lazily": (polars.LazyFrame, "df.collect()['text']"),
    "pyarrow Table": (pa.table, "table['text']"),
    "pyarrow RecordBatch": (pa.RecordBatch.from_pydict, "batch['text']"),
    "datasets": (datasets.Dataset.from_dict, "dataset['text']"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> fastrerank.CrossEncoder:
    return fastrerank.CrossEncoder(save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_is_scored_as_its_list(model: fastrerank.CrossEncoder, kind: str) -> None:
    column = COLUMNS[kind](TEXTS)
    assert check_texts(column, "documents") == TEXTS
    want = model.rank(QUERIES[0], TEXTS, return_documents=True)
    assert model.rank(QUERIES[0], column, return_documents=True) == want
    assert np.array_equal(model.score(QUERIES[0], column), model.score(QUERIES[0], TEXTS))
    many = model.score_many(COLUMNS[kind](QUERIES), [column, TEXTS])
    assert all(np.array_equal(a, b) for a, b in zip(many, model.score_many(QUERIES, [TEXTS, TEXTS]), strict=True))


@pytest.mark.parametrize("kind", ["pandas", "polars", "pyarrow"])
def test_columns_of_lists_and_of_pairs(model: fastrerank.CrossEncoder, kind: str) -> None:
    column = {"pandas": pd.Series, "polars": polars.Series, "pyarrow": pa.array}[kind]
    lists = [TEXTS, TEXTS[:1]]
    for found, want in zip(model.score_many(QUERIES, column(lists)), model.score_many(QUERIES, lists), strict=True):
        assert np.array_equal(found, want)
    pairs = list(map(list, zip(QUERIES, TEXTS, strict=True)))
    assert np.array_equal(model.predict(column(pairs)), model.predict(pairs))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_where_texts_belong_names_its_columns(model: fastrerank.CrossEncoder, kind: str) -> None:
    make, example = TABLES[kind]
    table = make(TABLE)
    calls: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("documents", lambda: model.rank("q", table)),
        ("documents", lambda: model.score("q", table)),
        ("documents", lambda: model.score_many(["a", "b", "c"], table)),
        ("queries", lambda: model.score_many(table, [TEXTS] * 3)),
        ("items", lambda: CURIndex.build(model, table, QUERIES, progress=False)),
        ("anchor_queries", lambda: CURIndex.build(model, TEXTS, table, progress=False)),
        ("items", lambda: CURIndex.from_scores(np.ones((2, 2)), items=table)),
    )
    for name, call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{name} must be a list, tuple, 1-D array or column of str, got a ")
        assert "with columns 'query', 'text', 'id'; pass one of its columns: " in message
        assert message.endswith(example)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_where_pairs_belong_shows_how_its_rows_become_pairs(model: fastrerank.CrossEncoder, kind: str) -> None:
    table = TABLES[kind][0]({"query": QUERIES, "text": TEXTS})
    with pytest.raises(
        TypeError,
        match=r"^inputs must be a sequence of .* pairs, got .* columns 'query', 'text'; pass "
        "its rows as pairs: ",
    ) as caught:
        model.predict(table)
    advice = str(caught.value).rpartition("as pairs: ")[2]
    pairs = eval(advice, dict.fromkeys(("df", "table", "batch", "dataset"), table))  # what the message says works
    assert np.array_equal(model.predict(pairs), model.predict(list(zip(QUERIES, TEXTS, strict=True))))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_one_column_is_a_table(kind: str) -> None:
    table = TABLES[kind][0]({"passage": TEXTS})
    assert table_columns(table) == ["passage"]
    with pytest.raises(TypeError, match=r"with column 'passage'; pass one of its columns: .*\['passage'\]$"):
        check_texts(table, "documents")


def test_many_and_no_columns() -> None:
    with pytest.raises(TypeError, match=r"'7' and 3 more; pass one of its columns: df\['10'\]$"):
        as_column(pd.DataFrame({str(i): ["a"] for i in range(11)}), "documents")
    with pytest.raises(TypeError, match=r"with no columns; pass one of its columns: a column$"):
        as_column(pd.DataFrame(), "documents")


def test_a_missing_value_is_called_one() -> None:
    for column in (pd.Series(["a", None], dtype=object), pa.array(["a", None]), polars.Series(["a", None])):
        with pytest.raises(TypeError, match=r"documents\[1\] must be str, got NoneType"):
            check_texts(column, "documents")
    for dtype in ("str", "string"):
        with pytest.raises(TypeError, match=r"documents\[1\] must be str, got \w+ \(a missing value: drop it"):
            check_texts(pd.Series(["a", None], dtype=dtype), "documents")


def test_an_index_is_built_from_columns(model: fastrerank.CrossEncoder) -> None:
    index = CURIndex.build(model, pd.Series(TEXTS, index=[5, 9]), polars.Series(QUERIES), progress=False)
    assert index.texts([0, 1]) == TEXTS


def test_adapters_of_other_frameworks(model: fastrerank.CrossEncoder) -> None:
    table = pd.DataFrame({"query": QUERIES, "text": TEXTS})
    rerankers = pytest.importorskip("fastrerank.integrations.rerankers", exc_type=ImportError)
    ranker = rerankers.FastRanker(model)
    assert [hit.text for hit in ranker.rank("q", table["text"]).results] == [
        hit["text"] for hit in model.rank("q", TEXTS, return_documents=True)
    ]
    with pytest.raises(TypeError, match=r"docs must be .*df\['text'\]"):
        ranker.rank("q", table)
    from fastrerank.integrations.beir import FastReranker
    from fastrerank.integrations.langchain import FastRerankCrossEncoder

    for call in (FastReranker(model).predict, FastRerankCrossEncoder(model).score):
        with pytest.raises(TypeError, match=r"df\[\['query', 'text'\]\]\.values\.tolist\(\)"):
            call(table)
