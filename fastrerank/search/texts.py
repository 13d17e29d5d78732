"""The items' texts: one UTF-8 buffer that may be a memory map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Texts"]

_CHECKED = 1 << 24  # bytes that are decoded at a time


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
        content = self.data[begin : int(self.ends[position])].tobytes()
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise ValueError(f"the index's text {position} is not UTF-8 ({error}); build the index anew") from error

    def check(self) -> None:
        """Raise ValueError unless all ends ascend within the buffer and every text is UTF-8."""
        self.check_ends()
        sizes = np.diff(self.ends, prepend=0)
        starts = (self.ends - sizes)[sizes > 0]
        broken = starts[self.data[starts] & 0xC0 == 0x80]  # the middle of a character
        if broken.size:
            raise ValueError(f"the text at byte {int(broken[0])} begins within a character")
        begin = 0
        while begin < len(self.data):  # decoded in pieces of whole texts
            last = np.searchsorted(self.ends, begin + _CHECKED, side="left")
            end = int(self.ends[min(int(last), len(self.ends) - 1)])
            try:
                self.data[begin:end].tobytes().decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise ValueError(f"the texts are not UTF-8 at byte {begin + error.start}") from error
            begin = end

    def check_ends(self) -> None:
        """Raise ValueError unless the ends ascend and the last is the buffer's end. Reads no text."""
        ends = self.ends
        if (ends[:1] < 0).any() or (np.diff(ends) < 0).any():
            raise ValueError("the ends of the texts go down")
        last = int(ends[-1]) if len(ends) else 0
        if last != len(self.data):
            raise ValueError(f"the texts end at byte {last} of {len(self.data)}")

    def append(self, texts: Sequence[str]) -> Texts:
        """These texts and then `texts`."""
        more = Texts.of(texts)
        start = int(self.ends[-1]) if len(self) else 0
        return Texts(np.concatenate([self.data, more.data]), np.concatenate([self.ends, more.ends + start]))

    def take(self, positions: Iterable[int]) -> Texts:
        """The texts at `positions`."""
        return Texts.of([self[int(position)] for position in positions])
