"""A bounded cache of documents' token ids."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["CacheInfo", "TokenCache", "Tokens"]

# Bytes of an entry besides its ids and its text: two dictionary slots, two tuples, array headers.
_OVERHEAD = 512


class Tokens(NamedTuple):
    """A document's ids with its fixed neighbours; ids[start:end] are its own, `cut` is whether its limit cut it.

    `places`, where it is kept, is int32 (2, n): where each token starts and ends, in characters of the document.
    """

    ids: npt.NDArray[np.int32]
    start: int
    end: int
    cut: bool
    places: npt.NDArray[np.int32] | None = None


class CacheInfo(NamedTuple):
    """Counts since construction, and what is held now."""

    hits: int
    misses: int
    entries: int
    bytes: int


K = TypeVar("K", bound=Hashable)


class TokenCache(Generic[K]):
    """Least-recently-used map from (kind, text) to Tokens, bounded in bytes; safe to share between threads.

    Example:
        >>> cache = TokenCache[str](1 << 20)
        >>> cache.put("kind", "text", Tokens(np.array([1, 2], np.int32), 0, 2, False))
        >>> cache.get("kind", "text").ids, cache.get("kind", "other")
        (array([1, 2], dtype=int32), None)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[tuple[K, str], tuple[Tokens, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = 0

    def get(self, kind: K, text: str) -> Tokens | None:
        """The entry, which becomes the most recently used one; None if there is none."""
        with self._lock:
            entry = self._entries.get((kind, text))
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end((kind, text))
            return entry[0]

    def put(self, kind: K, text: str, tokens: Tokens) -> None:
        """Store an entry and drop the least recently used ones beyond the limit; one larger than it is not stored."""
        places = 0 if tokens.places is None else tokens.places.nbytes
        size = tokens.ids.nbytes + places + sys.getsizeof(text) + _OVERHEAD
        if size > self.limit:
            return
        with self._lock:
            old = self._entries.pop((kind, text), None)
            self._bytes += size - (0 if old is None else old[1])
            self._entries[kind, text] = (tokens, size)
            while self._bytes > self.limit:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._bytes -= dropped

    def info(self) -> CacheInfo:
        """Hits, misses, entries and bytes."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, len(self._entries), self._bytes)
