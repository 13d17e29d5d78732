"""Calls into the Rust tokenizers, whose panics become a ValueError that names the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TokenizingError", "encodable", "encode_batch", "encode_one", "guarded", "is_panic"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN = 40

T = TypeVar("T")


class TokenizingError(ValueError):
    """The checkpoint's tokenizer fails on a text."""


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of Rust code, which is no Exception and has no importable class."""
    return type(error).__name__ == "PanicException"


def guarded(call: Callable[[], T], what: Callable[[], str]) -> T:
    """`call()`, or TokenizingError with the text of `what()` where Rust code panics or gives up."""
    try:
        return call()
    except BaseException as error:
        # TypeError is for arguments that are not texts; the library raises a plain Exception for everything else.
        if is_panic(error) or type(error) is Exception:
            raise TokenizingError(f"{what()}: {str(error)[:200]}") from None
        raise


def encodable(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8 form, as U+FFFD."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_batch(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, spans: bool = False
) -> list[tokenizers.Encoding]:
    """Encodings of texts without special tokens; `spans`: with the characters that each token stands for.

    Raises TokenizingError naming the first text that the tokenizer fails on.
    """
    call = tokenizer.encode_batch if spans else tokenizer.encode_batch_fast
    try:
        return call(list(texts), add_special_tokens=False)
    except TypeError:
        if not any(map(_SURROGATE.search, texts)):
            raise
        return encode_batch(tokenizer, [*map(encodable, texts)], spans=spans)
    except BaseException as error:
        if not (is_panic(error) or type(error) is Exception):
            raise
        if len(texts) > 1:  # one after the other, to find the one that fails
            return [encode_batch(tokenizer, [text], spans=spans)[0] for text in texts]
        raise TokenizingError(_failure(texts[0], error)) from None


def encode_one(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    """Encoding of one text without special tokens, with spans; TokenizingError where the tokenizer fails on it."""
    return encode_batch(tokenizer, [text], spans=True)[0]


def _failure(text: str, error: BaseException) -> str:
    shown = repr(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
    return f"the checkpoint's tokenizer fails on the text {shown} of {len(text):,} characters ({str(error)[:200]})"
