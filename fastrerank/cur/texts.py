"""The items' texts: one UTF-8 buffer that may be a memory map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Texts"]


class Texts:
    """N strings in one buffer: text i is bytes `ends[i - 1]` to `ends[i]`.

    Example:
        >>> texts = Texts.of(["a", "bc"])
        >>> texts[1], len(texts.append(["d"]))
        ('bc', 3)
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Texts of strings; lone surrogates are kept."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, position: int) -> str:
        begin = int(self.ends[position - 1]) if position else 0
        return self.data[begin : int(self.ends[position])].tobytes().decode("utf-8", "surrogatepass")

    def append(self, texts: Sequence[str]) -> Texts:
        """These texts and then `texts`."""
        more = Texts.of(texts)
        start = int(self.ends[-1]) if len(self) else 0
        return Texts(np.concatenate([self.data, more.data]), np.concatenate([self.ends, more.ends + start]))

    def take(self, positions: Iterable[int]) -> Texts:
        """The texts at `positions`."""
        return Texts.of([self[int(position)] for position in positions])
