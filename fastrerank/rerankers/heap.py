"""A heap that asks its comparisons in batches: all sift-downs that can proceed do so in the same step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["heap_top"]

Q = TypeVar("Q", bound=Hashable)


@dataclass
class _Sift:
    """One sift-down: the node at `place` goes down a heap of `size` nodes."""

    place: int
    size: int


def heap_top(
    n: int, top_k: int, arity: int, decide: Callable[[tuple[int, ...], bool], int | list[Q]]
) -> Generator[list[Q], None, list[int]]:
    """Equal to the sequential heapsort: sift down nodes (n - 2) // arity .. 0, then extract the root top_k times.

    Args:
        n: documents, numbered; the heap starts in their order. top_k: how many to extract, at most n are.
        arity: children of a node; those of place p are arity * p + 1 .. arity * p + arity.
        decide: gets the documents of a parent and its children, and whether the next extraction waits for this
            decision. Returns the position of the largest, 0 to stop; or the questions it needs answered first.

    Yields questions that must be answered before it is resumed, none twice in a list; returns the top documents.

    A sift-down at place p reads p and its children. The sequential algorithm has settled these once no earlier
    sift-down stands at a child: earlier ones are below it or elsewhere, later ones behind it. So sift-downs run in
    a pipeline, and each decision is taken on the documents that the sequential algorithm would see.
    """
    heap = list(range(n))
    size, top_k = n, min(top_k, n)
    running = [_Sift(place, n) for place in range((n - 2) // arity, -1, -1)] if n > 1 else []
    top: list[int] = []
    hollow = False  # the root is extracted, and the last node has not taken its place yet
    while len(top) < top_k:
        questions: dict[Q, None] = {}
        moved = False
        places = {sift.place for sift in running}
        if not hollow and 0 not in places:
            top.append(heap[0])
            size -= 1
            hollow = moved = True
        elif hollow and places.isdisjoint(_path(size, arity)):
            heap[0] = heap[size]
            running.append(_Sift(0, size))
            hollow, moved = False, True
        else:
            waited = _path(size, arity) if hollow else set(range(arity + 1))
            for sift in list(running):
                children = range(arity * sift.place + 1, min(arity * sift.place + arity + 1, sift.size))
                if not places.isdisjoint(children):
                    continue
                answer = (
                    decide(tuple(heap[i] for i in (sift.place, *children)), sift.place in waited) if children else 0
                )
                if isinstance(answer, list):
                    questions.update(dict.fromkeys(answer))
                    continue
                moved = True
                places.remove(sift.place)
                if answer == 0:
                    running.remove(sift)
                    continue
                child = children[answer - 1]
                heap[sift.place], heap[child] = heap[child], heap[sift.place]
                sift.place = child
                places.add(child)
        if not moved:
            yield list(questions)
    return top


def _path(place: int, arity: int) -> set[int]:
    """`place` and all nodes above it: a sift-down that stands on one of them may still reach `place`."""
    path = {place}
    while place > 0:
        place = (place - 1) // arity
        path.add(place)
    return path
