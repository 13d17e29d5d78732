"""What a request costs, estimated before anything is tokenised, and whether the queue has room for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fastrerank.inputs.limits import TextLimits
from fastrerank.serve.batching.queue import Speed

__all__ = ["HEAVY_BYTES", "REQUEST_SHARE", "Measured", "Overloaded", "TooLarge", "admit", "measure"]

# Share of the queue that large requests together, and so one alone, may take. The rest is for small requests.
REQUEST_SHARE = 0.75
# A text of HEAVY_BYTES takes long to tokenise, even if the model reads few of its tokens. Tokenising BYTES_AS_ONE bytes
# takes about as long as computing the tokens of one byte.
HEAVY_BYTES, BYTES_AS_ONE = 256 << 10, 64


class Overloaded(RuntimeError):
    """The queue is full. `retry_after`: seconds after which there should be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after), self.__dict__  # the default leaves retry_after out


class TooLarge(ValueError):
    """The request exceeds the share of the queue that one request may have, so it can never be accepted."""


@dataclass(frozen=True)
class Measured:
    """Bytes of a request.

    `sizes`: what the model reads of each pair. `effort`: their sum and the cost of tokenising. `longest`: the longest
    text. `overhead`: what each size includes for the tokens that every pair has.
    """

    sizes: list[int]
    effort: int
    longest: int
    overhead: int


def measure(
    query: str | list[str],
    texts: list[str],
    limits: TextLimits,
    max_length: int | None,
    speed: Speed,
    instruction: str | None = None,
    whole: bool = False,
) -> Measured:
    """Return what the pairs of `texts` with their query cost. The query counts once for each document.

    The `instruction` counts once for each document too, or once in all where the documents are scored as a `whole`.
    A pair counts no more than the tokens that the model reads: the call's limits, or the reranker's `max_length`.

    Example:
        >>> measure("who?", ["the owl", "a cat"], TextLimits(), 512, Speed()).sizes
        [21, 19]
    """
    # A lone surrogate has no UTF-8 form; any replacement gives its size.
    own = [query] * len(texts) if isinstance(query, str) else query
    known = {one: len(one.encode("utf-8", "replace")) for one in set(own)}
    bases = [known[one] for one in own]
    lengths = [len(text.encode("utf-8", "replace")) for text in texts]

    def most(tokens: int | None) -> int:
        return sys.maxsize if tokens is None else speed.bytes(tokens)

    pair, first, second = (
        most(tokens)
        for tokens in (limits.max_length or max_length, limits.max_tokens_per_query, limits.max_tokens_per_doc)
    )
    said = len((instruction or "").encode("utf-8", "replace"))
    each = -(-said // max(1, len(texts))) if whole else said
    overhead = speed.overhead()
    sizes = [
        min(pair, min(base, first) + min(length, second) + each + overhead)
        for base, length in zip(bases, lengths, strict=True)
    ]
    effort = sum(sizes) + (sum(known.values()) + sum(lengths) + each * len(texts)) // BYTES_AS_ONE
    return Measured(sizes, effort, max((*known.values(), *lengths, said), default=0), overhead)


def admit(size: int, load: int, large_load: int, speed: Speed, queue: int) -> None:
    """Raise TooLarge or Overloaded where a queue of `queue` tokens has no room for a request of `size` bytes.

    `load` bytes wait or are computed; `large_load` of large requests, where this is one.

    Example:
        >>> admit(1000, 0, 0, Speed(), 1000)
    """
    tokens, share = speed.tokens(size), int(REQUEST_SHARE * queue)
    if tokens > share:
        raise TooLarge(
            f"the request is about {tokens} tokens (a query counts with each document), but one request may be at "
            f"most {share}, {REQUEST_SHARE:.0%} of max_queue_tokens={queue}: send fewer documents at a time"
        )
    for held, most in ((load, queue), (large_load, share)):
        if held and speed.tokens(held + size) > most:
            excess = held + size - speed.bytes(most)
            limit = f"max_queue_tokens={queue}" if most == queue else f"{most}, what large requests may take of it"
            raise Overloaded(
                f"{speed.tokens(held)} tokens wait, {tokens} more would exceed {limit}",
                retry_after=speed.seconds(min(excess, held)),
            )
