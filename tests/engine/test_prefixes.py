"""Common prefixes of token sequences: groups, what they save, and segments for packing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrerank.engine.prefixes import Group, share_prefixes, to_segments

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=7)


def saved(groups: list[Group]) -> int:
    return sum((len(group.members) - 1) * group.length for group in groups)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, st.integers(1, 4))
def test_groups_hold_every_sequence_once_and_share_what_they_say(lists: list[list[int]], least: int) -> None:
    sequences = [np.array(ids) for ids in lists]
    groups = share_prefixes(sequences, least)
    assert sorted(i for group in groups for i in group.members) == list(range(len(sequences)))
    for group in groups:
        assert group.length == 0 if len(group.members) == 1 else group.length >= least
        for i in group.members:
            assert len(sequences[i]) > group.length
            assert np.array_equal(sequences[i][: group.length], sequences[group.members[0]][: group.length])
    # never worse than one group of all
    if len(sequences) > 1:
        most = min(map(len, lists)) - 1
        common = next((n for n in range(most) if len({ids[n] for ids in lists}) > 1), most)
        assert saved(groups) >= (common * (len(lists) - 1) if common >= least else 0)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES)
def test_segments_spell_the_sequences(lists: list[list[int]]) -> None:
    sequences = [np.array(ids) for ids in lists]
    groups = share_prefixes(sequences, least=1)
    segments, ends = to_segments(sequences, groups)
    assert sorted(ends[ends >= 0].tolist()) == list(range(len(sequences)))
    for segment, end in zip(segments, ends.tolist(), strict=True):
        assert segment.causal
        if end >= 0:
            before = [] if segment.prefix is None else segments[segment.prefix].ids.tolist()
            assert before + segment.ids.tolist() == lists[end]
    assert sum(len(segment.ids) for segment in segments) == sum(map(len, lists)) - saved(groups)


def test_pairs_are_grouped_by_their_left_document() -> None:
    head, documents = list(range(100, 120)), [[n] * (10 + n) for n in range(6)]
    pairs = list(itertools.permutations(range(6), 2))
    groups = share_prefixes([np.array(head + documents[i] + [99] + documents[j] + [98]) for i, j in pairs])
    assert len(groups) == 6
    for group in groups:
        lefts = {pairs[i][0] for i in group.members}
        assert len(lefts) == 1
        assert group.length == 20 + 10 + lefts.pop() + 1


def test_a_wide_group_takes_what_narrow_ones_leave() -> None:
    head, left = list(range(100, 160)), list(range(200, 290))
    rows = [[*head, *left, 1], [*head, *left, 2], [*head, 3], [*head, 4]]
    groups = share_prefixes([np.array(ids) for ids in rows])
    assert groups == [Group((0, 1), 150), Group((2, 3), 60)]


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        share_prefixes([np.array([1]), np.array([], np.int64)])
