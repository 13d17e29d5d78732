"""`fastrerank serve` with faults that a client can ask for: what the soak and tests of failures run.

`python -m bench.serve.faulty --model CHECKPOINT`: a document `PANIC` raises what a panic of native code raises, `BREAK`
a plain exception, and `DIE` ends the worker thread that scored it. Never serve this to anyone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

import fastrerank
from fastrerank.rerankers.base import Reranker, Scores, Usage
from fastrerank.rerankers.call import NO_OPTIONS, CallOptions
from fastrerank.serve.app import Settings, create_app
from fastrerank.serve.batching.batcher import AsyncReranker
from fastrerank.serve.run import serve

__all__ = ["BREAK", "DIE", "PANIC", "Faulty", "Mortal"]

PANIC, BREAK, DIE = "fault: panic", "fault: break", "fault: die"


class PanicException(BaseException):
    """As a panic in a Rust library arrives in Python: not an Exception."""


class Faulty(Reranker):
    """Scores as `inner` does, but raises where a document is `PANIC` or `BREAK`."""

    method: ClassVar[str] = "cross-encoder"
    independent: ClassVar[bool] = True

    def __init__(self, inner: Reranker) -> None:
        super().__init__()
        self.inner = inner

    @property
    def max_length(self) -> int | None:
        """The inner reranker's."""
        return getattr(self.inner, "max_length", None)

    def activated(self, scores: Scores) -> Scores:
        """The inner reranker's."""
        return self.inner.activated(scores)

    def _score_many(
        self, queries: list[str], documents: list[list[str]], usage: Usage, call: CallOptions = NO_OPTIONS
    ) -> list[Scores]:
        for texts in documents:
            if PANIC in texts:
                raise PanicException("called `Result::unwrap()` on an `Err` value")
            if BREAK in texts:
                raise RuntimeError("broken")
        return self.inner._scored(queries, documents, usage, call)


class Mortal(AsyncReranker):
    """Its worker dies of a document `DIE`, behind what catches the errors of scoring."""

    def _note(self, pieces: Any, *rest: Any) -> None:
        if any(DIE in piece.request.documents for piece in pieces):
            raise SystemExit("a worker is killed")
        super()._note(pieces, *rest)


def main(
    model: Annotated[str, typer.Option(help="NAME=CHECKPOINT, or CHECKPOINT")],
    port: Annotated[int, typer.Option()] = 0,
    max_queue_tokens: Annotated[int, typer.Option()] = 2_000_000,
    max_body_mb: Annotated[float, typer.Option()] = 8.0,
    header_timeout: Annotated[float, typer.Option()] = 10.0,
    body_timeout: Annotated[float, typer.Option()] = 30.0,
    dtype: Annotated[str, typer.Option()] = "float32",
) -> None:
    """Serve CHECKPOINT on loopback with faults on request."""
    name, separator, path = model.partition("=")
    inner = fastrerank.load(path if separator else model, device="cpu", dtype=dtype)
    shared = Mortal(Faulty(inner), max_queue_tokens=max_queue_tokens)
    settings = Settings(max_body_bytes=int(max_body_mb * 2**20), body_seconds=body_timeout)
    named = {name if separator else Path(model).name: shared}
    serve(create_app(named, settings), "127.0.0.1", port, grace=10, header_seconds=header_timeout)


if __name__ == "__main__":
    typer.run(main)
