"""What waits to be scored: requests in the order of their arrival, and the rule by which a batch is taken from them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Piece", "Request", "Speed", "take"]

# Share of a batch that one request may take while others wait: a request of thousands of documents lets small ones
# pass, and no small one is more than a few batches away.
LARGEST_SHARE = 0.5


@dataclass(eq=False)
class Request:
    """One query with N documents, and how far they are.

    Attributes:
        sizes: bytes of each (query, document) pair.
        whole: the documents are scored together or not at all, as methods of lists need it.
        arrived, deadline, started: `time.monotonic`; None for no deadline, and before a batch took the first document.
        future: gets float32 (N,), or the exception that ended the request. The caller may cancel it.
        tokens, compute: tokens of its scored documents, and seconds of the batches that they were in.
        exact: whether `tokens` was counted; else it is the batches' tokens shared out by bytes.
    """

    query: str
    documents: list[str]
    sizes: list[int]
    whole: bool
    deadline: float | None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    future: Future[npt.NDArray[np.float32]] = field(default_factory=Future)
    next: int = 0  # the first document that no batch has taken
    tokens: int = 0
    exact: bool = True
    compute: float = 0.0
    missing: int = 0  # documents without a score
    scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        self.missing = len(self.documents)
        self.scores = np.full(len(self.documents), np.nan, np.float32)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the documents that no batch has taken."""
        return sum(self.sizes[self.next :])

    def end(self, error: BaseException | None = None) -> None:
        """Set the future's result; a request that has ended before, or was cancelled, stays as it is."""
        try:
            if error is None:
                self.future.set_result(self.scores)
            else:
                self.future.set_exception(error)
        except InvalidStateError:
            return


@dataclass(frozen=True)
class Piece:
    """Documents [begin, end) of a request, in one batch."""

    request: Request
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return sum(self.request.sizes[self.begin : self.end])


def take(waiting: list[Request], budget: int) -> list[Piece]:
    """Take a batch of about `budget` bytes from requests in the order of their arrival; at least one document.

    Every request in turn gives at most `LARGEST_SHARE` of the budget; what is left goes to those that have more, the
    longest waiting first. Requests that are taken to their end are removed from `waiting`.
    """
    ends = {id(request): request.next for request in waiting}
    left = budget
    for share in (int(budget * LARGEST_SHARE), budget):
        for request in waiting:
            begin = end = ends[id(request)]
            if request.whole:
                # Too large for what is left, it waits for a batch that it can begin.
                if begin == 0 and (request.waiting_bytes <= left or left == budget):
                    end = len(request.documents)
                    left -= request.waiting_bytes
            else:
                taken = 0
                while end < len(request.documents):
                    size = request.sizes[end]
                    if left < budget and (taken + size > share or size > left):
                        break
                    end, taken, left = end + 1, taken + size, left - size
            ends[id(request)] = end
    pieces = []
    for request in waiting:
        if ends[id(request)] > request.next:
            pieces.append(Piece(request, request.next, ends[id(request)]))
            request.next = ends[id(request)]
    waiting[:] = [request for request in waiting if request.next < len(request.documents)]
    return pieces


class Speed:
    """Tokens per byte of text and tokens per second, as running means over batches."""

    def __init__(self) -> None:
        self.tokens_per_byte = 0.3  # of English in WordPiece; corrected by the first batches
        self.tokens_per_second = 0.0
        self._lock = threading.Lock()

    def note(self, size: int, tokens: int, seconds: float) -> None:
        """Count a batch of `size` bytes."""
        if size <= 0 or tokens <= 0:
            return
        with self._lock:
            self.tokens_per_byte += 0.2 * (tokens / size - self.tokens_per_byte)
            rate = tokens / max(seconds, 1e-6)
            known = self.tokens_per_second
            self.tokens_per_second = rate if known == 0 else known + 0.2 * (rate - known)

    def tokens(self, size: int) -> int:
        """About how many tokens `size` bytes are."""
        return int(size * self.tokens_per_byte)

    def bytes(self, tokens: int) -> int:
        """About how many bytes hold `tokens` tokens."""
        return max(1, int(tokens / self.tokens_per_byte))

    def seconds(self, size: int) -> float:
        """About how long `size` bytes take; 1 before the first batch."""
        return self.tokens(size) / self.tokens_per_second if self.tokens_per_second else 1.0
