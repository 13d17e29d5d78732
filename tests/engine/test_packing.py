"""The packed batch against its definition: which token may look at which, said in words, in plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrerank.engine.batch import (
    Batch,
    PackedBatch,
    Segment,
    pack,
    shares,
    split,
    split_equal,
    split_lengths,
    split_padded,
)


@st.composite
def segment_lists(draw: st.DrawFn) -> list[Segment]:
    count = draw(st.integers(1, 6))
    roots = [i for i in range(count) if i == 0 or draw(st.booleans())]
    segments = []
    for i in range(count):
        length = draw(st.integers(1, 7))
        prefix = None if i in roots else draw(st.sampled_from(roots))
        ids = np.arange(length) + 100 * i
        types = ids % 2 if draw(st.booleans()) else None
        segments.append(Segment(ids, types, prefix, draw(st.booleans())))
    return segments


def visible(segments: list[Segment], window: int | None = None) -> np.ndarray:
    """bool (T, T): whether row i sees row j."""
    tokens = [(n, place) for n, segment in enumerate(segments) for place in range(len(segment.ids))]

    def position(n: int, place: int) -> int:
        prefix = segments[n].prefix
        return place + (0 if prefix is None else len(segments[prefix].ids))

    def sees(n: int, place: int, m: int, other: int) -> bool:
        near = window is None or abs(position(n, place) - position(m, other)) < window
        own = n == m and not (segments[n].causal and other > place)
        return near and (own or segments[n].prefix == m)

    return np.array([[sees(*row, *key) for key in tokens] for row in tokens])


def mask(vectors: tuple[np.ndarray, ...]) -> np.ndarray:
    lo, hi, plo, phi = (vector[:, None] for vector in vectors)
    keys = np.arange(len(lo))[None]
    own, prefix = (keys >= lo) & (keys < hi), (keys >= plo) & (keys < phi)
    assert not (own & prefix).any()  # a key that counts twice would weigh twice
    return own | prefix


def intervals(batch: PackedBatch) -> tuple[np.ndarray, ...]:
    return batch.lo, batch.hi, batch.plo, batch.phi


@given(segment_lists())
def test_rows_see_their_segment_and_its_prefix(segments: list[Segment]) -> None:
    batch = pack(segments)
    np.testing.assert_array_equal(mask(intervals(batch)), visible(segments))
    np.testing.assert_array_equal(batch.ids, np.concatenate([segment.ids for segment in segments]))
    for n, segment in enumerate(segments):
        rows = slice(batch.starts[n], batch.ends[n])
        base = 0 if segment.prefix is None else len(segments[segment.prefix].ids)
        np.testing.assert_array_equal(batch.positions[rows], base + np.arange(len(segment.ids)))
        np.testing.assert_array_equal(batch.types[rows], 0 if segment.type_ids is None else segment.type_ids)
    assert all(vector.dtype == np.int32 for vector in intervals(batch))


@given(segment_lists(), st.integers(1, 12))
def test_windows_are_by_position(segments: list[Segment], size: int) -> None:
    np.testing.assert_array_equal(mask(pack(segments).windowed(size)), visible(segments, size))


@given(segment_lists(), st.integers(0, 5), st.integers(1, 12))
def test_rows_up_to_a_bucket_see_nothing_and_change_nothing(segments: list[Segment], more: int, size: int) -> None:
    batch = pack(segments)
    padded = batch.padded_to(len(batch) + more, pad_id=9)
    assert len(padded) == len(batch) + more
    for vectors, expected in ((intervals(padded), intervals(batch)), (padded.windowed(size), batch.windowed(size))):
        seen = mask(vectors)
        np.testing.assert_array_equal(seen[: len(batch), : len(batch)], mask(expected))
        assert not seen[len(batch) :].any()
        assert not seen[:, len(batch) :].any()
    assert (padded.ids[len(batch) :] == 9).all()
    with pytest.raises(ValueError, match="at least the batch's"):
        batch.padded_to(len(batch) - 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans(), st.data())
def test_documents_pack_like_segments(lengths: list[int], causal: bool, data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True)))
    offsets = np.cumsum([0, *lengths])
    ids, types = np.arange(offsets[-1], dtype=np.int32), np.arange(offsets[-1]) % 3
    ours = Batch(ids, offsets, types).take(chosen).pack(causal)
    spans = [slice(offsets[d], offsets[d + 1]) for d in chosen]
    expected = pack([Segment(ids[span], types[span], causal=causal) for span in spans])
    for name in set(vars(expected)) - {"embeddings", "position_ids"}:
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))
        assert getattr(ours, name).dtype == getattr(expected, name).dtype


@given(segment_lists(), st.integers(1, 20))
def test_splitting_keeps_every_segment_its_prefix_and_the_budget(segments: list[Segment], budget: int) -> None:
    answered = []
    whole = Batch.of(segments)
    for chosen, answers in split(whole.lengths, whole.prefix, budget):
        assert len(chosen) == len(answers)
        batch = whole.take(chosen)
        texts = np.split(batch.ids, batch.offsets[1:-1])
        prefix = np.full(len(batch), -1) if batch.prefix is None else batch.prefix
        answered += chosen[answers].tolist()
        for n, number in enumerate(chosen):
            original = segments[number]
            np.testing.assert_array_equal(texts[n], original.ids)
            assert batch.causal is not None
            assert batch.causal[n] == original.causal
            assert (prefix[n] < 0) == (original.prefix is None)
            if original.prefix is not None:
                assert prefix[prefix[n]] < 0
                np.testing.assert_array_equal(texts[prefix[n]], segments[original.prefix].ids)
        roots = int((prefix < 0).sum())
        assert len(batch.ids) <= budget or len(batch) - roots <= 1 == roots  # what cannot be made smaller
    assert sorted(answered) == list(range(len(segments)))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_splitting_documents(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, np.int64)
    batches = split_lengths(sizes, budget)
    assert sorted(np.concatenate([*batches, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    assert all(sizes[batch].sum() <= budget or len(batch) == 1 for batch in batches)
    padded = split_padded(sizes, budget)
    assert sorted(np.concatenate([*padded, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    assert all(sizes[batch].max() * len(batch) <= budget or len(batch) == 1 for batch in padded)
    ends = [(sizes[batch].max(), sizes[batch].min()) for batch in padded]
    assert all(least >= most for (_, least), (most, _) in pairwise(ends))  # lengths are alike


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 30))
def test_splitting_into_equal_lengths(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, np.int64)
    batches = split_equal(sizes, budget)
    assert sorted(np.concatenate([*batches, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    assert all(len(set(sizes[batch])) == 1 for batch in batches)
    assert all(sizes[batch].sum() <= budget or len(batch) == 1 for batch in batches)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_shares_are_even(lengths: list[int], count: int) -> None:
    sizes = np.array(lengths)
    parts = shares(sizes, count)
    assert len(parts) == count
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    loads = [int(sizes[part].sum()) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


def test_batches_are_even() -> None:
    sizes = np.random.default_rng(0).integers(20, 500, 400)
    loads = [sizes[batch].sum() for batch in split_lengths(sizes, 8192)]
    assert min(loads) > 0.9 * max(loads)


def test_what_cannot_be_packed_is_named() -> None:
    some = np.arange(3)
    for segments, message in (
        ([Segment(some), Segment(some[:0])], "segment 1 has no tokens"),
        ([Segment(some, some[:2])], "segment 0 has 3 tokens and 2 type ids"),
        ([Segment(some, prefix=1)], "segment 0: prefix must be the index of another segment, got 1"),
        ([Segment(some, prefix=0)], "segment 0: prefix must be the index of another segment, got 0"),
        ([Segment(some), Segment(some, prefix=0), Segment(some, prefix=1)], "segment 2: its prefix 1 has a prefix"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(segments)
    for prefix, message in (([0], "got 0"), ([7], "got 7"), ([1, 2, -1], "segment 0: its prefix 1 has a prefix")):
        with pytest.raises(ValueError, match=message):
            split(np.full(len(prefix), 3), np.array(prefix), 10)
    three, alone = np.array([3]), np.array([-1])
    for function in (split_lengths, split_padded, lambda s, b: split(s, None, b), lambda s, b: split(s, alone, b)):
        with pytest.raises(ValueError, match="budget must be at least 1"):
            function(three, 0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        pack([Segment(some)]).windowed(0)
    assert len(pack([])) == 0
    assert split(np.zeros(0, np.int64), np.zeros(0, np.int64), 5) == []
