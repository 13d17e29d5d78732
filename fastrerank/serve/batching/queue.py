"""The queue: small requests in order of arrival, large ones in turn, and how batches are taken from it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from fastrerank.rerankers.call import NO_OPTIONS, CallOptions

__all__ = ["Piece", "Request", "Speed", "Waiting"]

# Share of a batch that one request may take while others wait. A request with more is large: it is scored in slices
# between the batches of small ones, so that thousands of documents let small requests pass.
LARGEST_SHARE = 0.5
# A slice of a large request lasts about SLICE_SECONDS, as a small request may have to wait for one. It has at least
# LEAST_SLICE_TOKENS: below a few hundred tokens, the call itself costs more than they do.
SLICE_SECONDS, LEAST_SLICE_TOKENS = 0.05, 512
# The lower bound of the estimate. A long run without a space is one token; texts of such runs must not teach the queue
# that a batch of ordinary texts has room for ten times as many.
LEAST_TOKENS_PER_BYTE = 0.1
# The upper bound: a token has at least one byte. Tokens beyond it belong to the prompt around the texts.
MOST_TOKENS_PER_BYTE = 1.0
# Bytes of text from which a batch counts fully; the estimate from a few letters is poor, so small batches count less.
TELLING_BYTES = 8 << 10
# Tokens of a pair beside its texts before the first batch: the special tokens of an encoder.
PAIR_TOKENS = 3.0


@dataclass(eq=False)
class Request:
    """One query with N documents, and the progress of their scoring.

    Attributes:
        query: one for all documents, or a list with one for each.
        sizes: bytes of each (query, document) pair, at least 1.
        whole: the documents are scored in one batch, as list methods need it.
        explain: `explained` gets the documents' tokens with their scores.
        large: scored in slices, in turn with other large ones.
        heavy: one slice may take long, as it cannot be made small.
        options: of the reranker's call; only requests with equal ones share one.
        arrived, deadline, started: `time.monotonic`; None for no deadline, and before a batch took the first document.
        future: gets float32 (N,), or the exception that ended the request. The caller may cancel it.
        tokens, compute, tokenized: tokens of its scored documents, seconds of their batches, and seconds of tokenising
            among these.
        exact: whether `tokens` was counted; else a batch's tokens are divided by bytes.
        waiting_bytes: bytes of the documents that no batch has taken.
        overhead: bytes in each of `sizes` that stand for tokens outside the pair's texts.
    """

    query: str | list[str]
    documents: list[str]
    sizes: list[int]
    whole: bool
    deadline: float | None
    explain: bool = False
    large: bool = False
    heavy: bool = False
    options: CallOptions = NO_OPTIONS
    overhead: int = 0
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    future: Future[npt.NDArray[np.float32]] = field(default_factory=Future)
    next: int = 0  # the first document that no batch has taken
    tokens: int = 0
    exact: bool = True
    compute: float = 0.0
    tokenized: float = 0.0
    missing: int = 0  # documents without a score
    waiting_bytes: int = 0
    scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    explained: list[list[tuple[str, float]]] | None = None

    def __post_init__(self) -> None:
        self.missing = len(self.documents)
        self.waiting_bytes = sum(self.sizes)
        self.scores = np.full(len(self.documents), np.nan, np.float32)

    def asked(self, begin: int, end: int) -> list[tuple[str, list[str]]]:
        """Return documents [begin, end) as (query, its documents), in their order."""
        if isinstance(self.query, str):
            return [(self.query, self.documents[begin:end])]
        pairs = zip(self.query[begin:end], self.documents[begin:end], strict=True)
        return [(query, [text for _, text in group]) for query, group in groupby(pairs, key=itemgetter(0))]

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
    """Documents [begin, end) of a request, in one batch, and their bytes."""

    request: Request
    begin: int
    end: int
    bytes: int


class _Line:
    """Requests in order, and the sum of their bytes.

    The sum is maintained, so adding, removing and reading cost the same however many requests wait.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.requests: OrderedDict[int, Request] = OrderedDict()

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def first(self) -> Request:
        """The next; there must be one."""
        return next(iter(self.requests.values()))

    def piece(self, request: Request, end: int) -> Piece:
        """Take the documents of `request` up to `end`. A request without further documents leaves."""
        piece = Piece(request, request.next, end, sum(request.sizes[request.next : end]))
        request.next = end
        request.waiting_bytes -= piece.bytes
        self.bytes -= piece.bytes
        if end == len(request.documents):
            del self.requests[id(request)]
        return piece


class Waiting:
    """Small requests in the order of their arrival, and large ones, which take turns."""

    def __init__(self) -> None:
        self.small, self.large = _Line(), _Line()

    def __len__(self) -> int:
        return len(self.small) + len(self.large)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.small.requests.values(), self.large.requests.values())

    @property
    def bytes(self) -> int:
        """Bytes of all that waits."""
        return self.small.bytes + self.large.bytes

    def add(self, request: Request) -> None:
        """Append `request`, which has documents, to its line."""
        line = self._line(request)
        line.requests[id(request)] = request
        line.bytes += request.waiting_bytes

    def discard(self, request: Request) -> None:
        """Drop the documents of `request` that no batch has taken. One that does not wait is left as it is."""
        line = self._line(request)
        if line.requests.pop(id(request), None) is not None:
            line.bytes -= request.waiting_bytes

    def late(self, now: float) -> list[Request]:
        """Drop and return the requests whose deadline has come."""
        found = [request for request in self if request.deadline is not None and request.deadline <= now]
        for request in found:
            self.discard(request)
        return found

    def take(self, budget: int) -> list[Piece]:
        """Take a batch of about `budget` bytes from small requests in their order; at least one document.

        Every request in turn gives at most `LARGEST_SHARE` of the budget; what is left goes to those that have more,
        the longest waiting first. Requests that are taken to their end wait no more.
        """
        ends: dict[int, int] = {}
        left = budget
        for share in (int(budget * LARGEST_SHARE), budget):
            for key, request in self.small.requests.items():
                if left <= 0:
                    break
                end = ends.get(key, request.next)
                if request.whole:
                    # Too large for what is left, it waits for a batch that it can begin.
                    if end == 0 and (request.waiting_bytes <= left or left == budget):
                        ends[key] = len(request.documents)
                        left -= request.waiting_bytes
                    continue
                taken = 0
                while end < len(request.documents):
                    size = request.sizes[end]
                    if left < budget and (taken + size > share or size > left):
                        break
                    end, taken, left = end + 1, taken + size, left - size
                if taken:
                    ends[key] = end
        return [self.small.piece(self.small.requests[key], end) for key, end in ends.items()]

    def slice(self, budget: int) -> list[Piece]:
        """Take about `budget` bytes, at least one document, of the large request whose turn it is; all of a whole one.

        The next slice is another's, if there is another.
        """
        request = self.large.first
        end, taken = request.next, 0
        if request.whole:
            end = len(request.documents)
        while end < len(request.documents) and (not taken or taken + request.sizes[end] <= budget):
            taken += request.sizes[end]
            end += 1
        self.large.requests.move_to_end(id(request))
        return [self.large.piece(request, end)]

    def _line(self, request: Request) -> _Line:
        return self.large if request.large else self.small


class Speed:
    """Tokens per byte of text, tokens of a pair beside its text, and tokens per second: running means over batches.

    A batch of P pairs with B bytes of text has about `pair_tokens * P + tokens_per_byte * B` tokens.
    """

    def __init__(self) -> None:
        self.tokens_per_byte = 0.3  # of English in WordPiece; corrected by the first batches
        self.pair_tokens = PAIR_TOKENS
        self.tokens_per_second = 0.0
        self._lock = threading.Lock()

    def note(self, size: int, tokens: int, seconds: float, pairs: int = 0) -> None:
        """Count a batch of `size` bytes of text in `pairs` pairs; 0 where texts are all that it holds."""
        if size <= 0 or tokens <= 0:
            return
        with self._lock:
            outside = False
            if pairs:
                # The bounds of tokens per byte give bounds of a pair's other tokens.
                least = max(0.0, (tokens - MOST_TOKENS_PER_BYTE * size) / pairs)
                most = max(0.0, (tokens - LEAST_TOKENS_PER_BYTE * size) / pairs)
                nearest = min(max(self.pair_tokens, least), most)
                outside = nearest != self.pair_tokens
                self.pair_tokens += 0.2 * (nearest - self.pair_tokens)
            if not outside:
                rate = (tokens - self.pair_tokens * pairs) / size
                rate = min(max(rate, LEAST_TOKENS_PER_BYTE), MOST_TOKENS_PER_BYTE)
                self.tokens_per_byte += 0.2 * min(1.0, size / TELLING_BYTES) * (rate - self.tokens_per_byte)
            rate = tokens / max(seconds, 1e-6)
            known = self.tokens_per_second
            self.tokens_per_second = rate if known == 0 else known + 0.2 * (rate - known)

    def tokens(self, size: int) -> int:
        """About how many tokens `size` bytes are."""
        return int(size * self.tokens_per_byte)

    def bytes(self, tokens: int) -> int:
        """About how many bytes hold `tokens` tokens."""
        return max(1, int(tokens / self.tokens_per_byte))

    def overhead(self) -> int:
        """Return the fixed cost of a pair (special tokens, prompt) as an estimated number of bytes of text."""
        return round(self.pair_tokens / self.tokens_per_byte)

    def seconds(self, size: int) -> float:
        """About how long `size` bytes take; 1 before the first batch."""
        return self.tokens(size) / self.tokens_per_second if self.tokens_per_second else 1.0

    def slice(self, max_batch_tokens: int) -> int:
        """About how many bytes a slice of a large request has: `SLICE_SECONDS`, and no more than a batch."""
        tokens = max(LEAST_SLICE_TOKENS, int(self.tokens_per_second * SLICE_SECONDS))
        return self.bytes(min(max_batch_tokens, tokens))
