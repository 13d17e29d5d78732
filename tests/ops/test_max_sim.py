"""`ops.max_sim` against its reference, in every instruction-set level."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank import ops
from fastrerank.ops import reference

LEVELS = ops.cpu_info()["supported"]


def case(queries: int, lengths: list[int], width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    query = random.normal(size=(queries, width)).astype(np.float32)
    tokens = random.normal(size=(sum(lengths), width)).astype(np.float32)
    return query, tokens, np.cumsum([0, *lengths])


def sums_bound(query: np.ndarray, tokens: np.ndarray) -> float:
    """Rounding of one dot product of D terms in any order, twice the statistical bound: 2 sqrt(D) 2^-24 |a| |b|."""
    largest = np.linalg.norm(query, axis=1).max() * np.linalg.norm(tokens, axis=1).max()
    return 2 * np.sqrt(query.shape[1] + 1) * 2.0**-24 * largest


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 70),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    width=st.integers(1, 70),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_equals_the_reference_in_every_level(
    queries: int, lengths: list[int], width: int, seed: int, threads: int
) -> None:
    query, tokens, offsets = case(queries, lengths, width, seed)
    exact = reference.max_sim(query.astype(np.float64), tokens.astype(np.float64), offsets)
    for level in LEVELS:
        ops.set_isa(level)
        try:
            result = ops.max_sim(query, tokens, offsets, threads=threads)
        finally:
            ops.set_isa(None)
        assert result.dtype == np.float32
        assert np.abs(result - exact).max() <= sums_bound(query, tokens)


@pytest.mark.usefixtures("isa")
def test_error_is_at_most_twice_that_of_the_reference_in_float32() -> None:
    query, tokens, offsets = case(32, [50] * 40, 384, 0)
    exact = reference.max_sim(query.astype(np.float64), tokens.astype(np.float64), offsets)
    plain = reference.max_sim(query, tokens, offsets)
    ours = ops.max_sim(query, tokens, offsets)
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 2 * np.sqrt(np.mean((plain - exact) ** 2))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=60), seed=st.integers(0, 100), data=st.data())
def test_a_document_is_bitwise_the_same_in_any_company(lengths: list[int], seed: int, data: st.DataObject) -> None:
    query, tokens, offsets = case(9, lengths, 33, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    shuffled = np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in order])
    shuffled_offsets = np.cumsum([0, *(lengths[i] for i in order)])
    for level in LEVELS:
        ops.set_isa(level)
        try:
            together = ops.max_sim(query, tokens, offsets, threads=1)
            for threads in (1, 2, 3):
                again = ops.max_sim(query, shuffled, shuffled_offsets, threads=threads)
                np.testing.assert_array_equal(again, together[list(order)])
        finally:
            ops.set_isa(None)


@pytest.mark.usefixtures("isa")
def test_all_negative_products_are_not_lifted_to_zero() -> None:
    # Rows and columns that only fill up a vector must not take part in the maximum.
    query = np.ones((3, 5), np.float32)
    tokens = -np.ones((3, 5), np.float32) * np.array([[1], [2], [3]], np.float32)
    np.testing.assert_array_equal(ops.max_sim(query, tokens, np.array([0, 1, 3])), [-5.0, -10.0])


@pytest.mark.parametrize("width", [1, 5, 6, 7, 13, 384])
@pytest.mark.usefixtures("isa")
def test_reads_nothing_beyond_the_last_token(width: int) -> None:
    memory = np.full(3 * width + 4096, np.nan, np.float32)
    memory[: 3 * width] = 1
    tokens = memory[: 3 * width].reshape(3, width)
    result = ops.max_sim(np.ones((2, width), np.float32), tokens, np.array([0, 1, 3]))
    np.testing.assert_array_equal(result, [width, width])


@pytest.mark.usefixtures("isa")
def test_example_of_no_documents_and_of_other_layouts() -> None:
    query, tokens = np.eye(2, 4, dtype=np.float32), np.eye(4, dtype=np.float32)
    assert ops.max_sim(query, tokens, np.array([0, 1, 4])).tolist() == [0.5, 0.5]
    assert ops.max_sim(query, tokens[:0], np.array([0])).shape == (0,)
    columns = np.asfortranarray(tokens.astype(np.float64))
    assert ops.max_sim(query, columns, np.array([0, 1, 4], np.int32)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("query", "tokens", "offsets", "message"),
    [
        (np.zeros((0, 4)), np.zeros((2, 4)), [0, 2], "at least one token"),
        (np.zeros((1, 4)), np.zeros((2, 3)), [0, 2], "same width"),
        (np.zeros(4), np.zeros((2, 4)), [0, 2], "matrices"),
        (np.zeros((1, 4)), np.zeros((2, 4)), [0, 0, 2], "at least one token"),
        (np.zeros((1, 4)), np.zeros((2, 4)), [0, 3, 2], "offsets"),
        (np.zeros((1, 4)), np.zeros((2, 4)), [1, 2], "start at 0"),
        (np.zeros((1, 4)), np.zeros((2, 4)), [0, 1], "end at the number of tokens"),
        (np.zeros((1, 4)), np.zeros((2, 4)), [], "offsets must be"),
        (np.full((1, 4), np.nan), np.zeros((2, 4)), [0, 2], "NaN"),
    ],
)
def test_arguments_that_do_not_fit(query: np.ndarray, tokens: np.ndarray, offsets: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.max_sim(query, tokens, np.array(offsets, np.int64))


def test_levels_and_threads_are_checked() -> None:
    with pytest.raises(ValueError, match="portable"):
        ops.set_isa("mmx")
    for threads in (0, -1, 1.5):
        with pytest.raises(ValueError, match="positive int"):
            ops.set_num_threads(threads)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="positive int"):
            ops.num_threads(threads)  # type: ignore[arg-type]


def test_the_environment_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRERANK_ISA", "portable")
    assert ops.isa() == "portable"
    monkeypatch.setenv("FASTRERANK_ISA", "sse9")
    with pytest.raises(ValueError, match="FASTRERANK_ISA"):
        ops.isa()
