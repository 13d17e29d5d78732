"""Tokenising for packed, padding-free forwards: the query once per request, documents cut to fit, thread-safe."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import max_length_of, position_limit, read_json
from fastrerank.inputs.backend import encode_batch, guarded
from fastrerank.inputs.columns import as_column
from fastrerank.inputs.columns import describe as _describe
from fastrerank.inputs.files import load_tokenizer
from fastrerank.inputs.limits import NO_LIMITS, TextLimits, TooLong
from fastrerank.inputs.windows import CHARS_PER_TOKEN, Windows, most_whole

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TokenBatch", "Tokenizer", "check_texts"]

# An Encoding takes some 150 bytes per token, so they are made and dropped in blocks of this many texts and characters.
_BLOCK_TEXTS = 256
_BLOCK_CHARS = 1 << 20
_WORD_END, _LONGEST_WORD = re.compile(r"\w(?= )"), 4096
_PROBES = ("a", "the", "hello", "1", ".")
# Tokenizer classes of transformers that give token types to the model if tokenizer_config.json names no inputs.
_TYPED_CLASSES = {
    "BertTokenizer",
    "ConvBertTokenizer",
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "ElectraTokenizer",
    "FNetTokenizer",
    "LayoutLMTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
}


@dataclass(frozen=True)
class TokenBatch:
    """Sequences packed one after the other, without padding.

    Attributes:
        ids: int32 (T,), token ids of all N sequences, special tokens included.
        type_ids: int32 (T,), token type (segment) ids.
        offsets: int64 (N+1,); sequence i is ids[offsets[i]:offsets[i+1]].
        truncated: bool (N,), whether tokens of sequence i's document (or single text) were left out.
        query_truncated: whether any query was cut, which happens only if it alone exceeds max_length.
    """

    ids: npt.NDArray[np.int32]
    type_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    query_truncated: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class _Template:
    """The special tokens before, between and after the segments, and the type id of every part."""

    specials: tuple[list[int], ...]  # ids, one list more than there are segments
    special_types: tuple[list[int], ...]
    segment_types: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.specials))


class Tokenizer:
    """A checkpoint's tokenizer, equal to transformers' AutoTokenizer with truncation="only_second" for pairs.

    Nothing is set on the underlying tokenizer after loading, so one object serves any number of threads.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`; set nothing on it.
        max_length: the limit in tokens, special tokens included, where a call gives none; None for no limit.

    Example:
        >>> tokenizer = Tokenizer.load(Path("path/to/model"))            # doctest: +SKIP
        >>> batch = tokenizer.pairs("who?", ["the owl", "the cat sat"])  # doctest: +SKIP
        >>> batch.ids[batch.offsets[0] : batch.offsets[1]]               # doctest: +SKIP
        array([ 101, 2040, 1029,  102, 1996, 13547,  102], dtype=int32)
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        max_length: int | None = None,
        *,
        position_limit: int | None = None,
        truncation_side: str = "right",
        use_type_ids: bool = True,
    ) -> None:
        """Take over `tokenizer`: its truncation and padding are switched off here, once, for good."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self._position_limit = position_limit
        self._cut_left = truncation_side == "left"
        self._single = _derive_template(tokenizer, use_type_ids, segments=1)
        self._pair = _derive_template(tokenizer, use_type_ids, segments=2)
        self._word_local = _is_word_local(tokenizer)
        self._windows = Windows(tokenizer)
        self.max_length = self.checked_max_length(max_length)

    def __repr__(self) -> str:
        return f"Tokenizer({self.tokenizer.get_vocab_size()} tokens, max_length={self.max_length})"

    @classmethod
    def load(cls, path: Path, max_length: int | None = None) -> Tokenizer:
        """Load tokenizer.json, or a BERT vocab.txt, from a checkpoint folder.

        Args:
            path: the folder with the transformer's config.json and tokenizer files.
            max_length: limit in tokens, special tokens included; None: the checkpoint's own.

        Raises FileNotFoundError if the folder holds no such tokenizer, and ValueError if it is damaged or max_length
        exceeds the checkpoint's positions.
        """
        path = Path(path)
        config, settings = read_json(path / "config.json"), read_json(path / "tokenizer_config.json")
        tokenizer = load_tokenizer(path, settings)
        return cls(
            tokenizer,
            max_length_of(path, config) if max_length is None else max_length,
            position_limit=position_limit(config),
            truncation_side=settings.get("truncation_side", "right"),
            use_type_ids=_uses_type_ids(config, settings),
        )

    def pairs(
        self, query: str, documents: Sequence[str], max_length: int | None = None, limits: TextLimits = NO_LIMITS
    ) -> TokenBatch:
        """Pack (query, document) for every document; the query is tokenised once.

        The document is cut to fit. The query is cut only if it alone exceeds max_length less the special tokens: then
        to three quarters of that room, and the documents get the rest.

        Args:
            query: the query.
            documents: list, tuple or 1-D array of N str.
            max_length: limit in tokens, special tokens included; None: `self.max_length`.
            limits: further limits of this call; its own `max_length` is not read.

        Raises TypeError naming the position of what is not a str; ValueError for an impossible max_length; TooLong
        where `limits.truncate` is False and a text would be cut.
        """
        (query,) = check_texts([query], "query", scalar=True)
        texts = check_texts(documents, "documents")
        return self._pack_pairs([query] * len(texts), texts, max_length, limits)

    def pair_list(
        self, pairs: Sequence[tuple[str, str]], max_length: int | None = None, limits: TextLimits = NO_LIMITS
    ) -> TokenBatch:
        """Pack (query, document) pairs; like `pairs`, and each distinct query is tokenised once."""
        if isinstance(pairs, (str, bytes, Mapping, Set)) or not hasattr(pairs, "__iter__"):
            raise TypeError(f"pairs must be a sequence of (query, document) pairs, got {_describe(pairs)}")
        flat: list[str] = []
        for position, pair in enumerate(pairs):
            if not isinstance(pair, (list, tuple, np.ndarray)):
                raise TypeError(f"pairs[{position}] must be a (query, document) pair, got {_describe(pair)}")
            if len(pair) != 2:
                raise TypeError(f"pairs[{position}] must be a (query, document) pair, got {len(pair)} items")
            flat += check_texts(pair, f"pairs[{position}]")
        return self._pack_pairs(flat[0::2], flat[1::2], max_length, limits)

    def singles(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        *,
        limits: TextLimits = NO_LIMITS,
        most: int | None = None,
    ) -> TokenBatch:
        """Pack single texts with the special tokens of a single sequence, cut to max_length.

        Args:
            texts: N str.
            max_length: limit in tokens, special tokens included; None: `self.max_length`.
            limits: `truncation_side` and `truncate` of this call.
            most: tokens of a text itself; None for as many as fit.

        Raises TypeError naming the position of what is not a str; ValueError for an impossible max_length; TooLong
        where `limits.truncate` is False and a text would be cut.
        """
        checked = check_texts(texts, "texts")
        template = self._single
        room = _smaller(self._room(max_length, template), most)
        left = limits.cut_left(self._cut_left)
        head, tail = template.specials
        ids = array("i")
        ends = np.zeros(len(checked) + 1, np.int64)
        truncated = np.zeros(len(checked), np.bool_)
        for i, tokens in enumerate(self._encode(checked, room, left)):
            truncated[i] = room is not None and len(tokens) > room
            if room is not None and truncated[i] and not limits.truncate:
                raise TooLong(f"texts[{i}]", len(tokens), room)
            _append(ids, head)
            _append(ids, _cut(tokens, room, left))
            _append(ids, tail)
            ends[i + 1] = len(ids)
        types = np.full(len(ids), template.segment_types[0], np.int32)
        before, after = template.special_types
        _paint(types, ends[:-1], before)
        _paint(types, ends[1:] - len(after), after)
        return TokenBatch(np.array(ids, np.int32), types, ends, truncated)

    def _pack_pairs(
        self, queries: list[str], documents: list[str], max_length: int | None, limits: TextLimits
    ) -> TokenBatch:
        template = self._pair
        room = self._room(max_length, template)
        left = limits.cut_left(self._cut_left)
        before, between, after = template.specials
        heads: dict[str, list[int]] = {}  # query -> everything before the document
        query_truncated = False
        distinct = list(dict.fromkeys(queries))
        # Where there is room for one token only, the document gets it.
        most = _smaller(0 if room == 1 else room, limits.max_tokens_per_query)
        for query, tokens in zip(distinct, self._encode(distinct, most, self._cut_left), strict=True):
            if most is not None and len(tokens) > most:
                if not limits.truncate:
                    raise TooLong("the query", len(tokens), most)
                kept = most if room is None or most < room else room * 3 // 4
                tokens, query_truncated = _cut(tokens, kept, self._cut_left), True
            heads[query] = [*before, *tokens, *between]
        fixed = len(before) + len(between)
        ids = array("i")
        ends = np.zeros(len(documents) + 1, np.int64)
        starts = np.zeros(len(documents), np.int64)  # of the document's own tokens
        truncated = np.zeros(len(documents), np.bool_)
        for i, tokens in enumerate(self._encode(documents, _smaller(room, limits.max_tokens_per_doc), left)):
            head = heads[queries[i]]
            free = None if room is None else room - (len(head) - fixed)
            fits = _smaller(free, limits.max_tokens_per_doc)
            truncated[i] = fits is not None and len(tokens) > fits
            if fits is not None and truncated[i] and not limits.truncate:
                raise TooLong(f"document {i}", len(tokens), fits)
            _append(ids, head)
            starts[i] = len(ids)
            _append(ids, _cut(tokens, fits, left))
            _append(ids, after)
            ends[i + 1] = len(ids)
        first, second = template.segment_types
        types = np.full(len(ids), first, np.int32)
        if first != second:
            spans = np.stack([starts - ends[:-1], ends[1:] - starts], axis=1).ravel()
            types = np.repeat(np.tile(np.array([first, second], np.int32), len(documents)), spans)
        _paint(types, ends[:-1], template.special_types[0])
        _paint(types, starts - len(between), template.special_types[1])
        _paint(types, ends[1:] - len(after), template.special_types[2])
        return TokenBatch(np.array(ids, np.int32), types, ends, truncated, query_truncated)

    def _encode(self, texts: list[str], room: int | None, left: bool) -> Iterator[Sequence[int]]:
        """Token ids of each text without special tokens.

        A long text gives more than `room` of its ids, the first ones, or with `left` the last ones; others give all.
        """
        whole = most_whole(None if left else room)
        for block in _blocks(texts):
            shortened = block if room is None or left else self._shorten(block, room)
            encodings = iter(encode_batch(self.tokenizer, [text for text in shortened if len(text) <= whole]))
            for text, shorter in zip(block, shortened, strict=True):
                tokens: Sequence[int] = next(encodings).ids if len(shorter) <= whole else ()
                if len(shorter) > whole or (room is not None and shorter is not text and len(tokens) <= room):
                    tokens = self._ids(text, room, whole, left)
                yield tokens

    def _ids(self, text: str, room: int | None, whole: int, left: bool) -> Sequence[int]:
        if len(text) > whole:
            return self._windows.ids(text, room, left=left)
        found: list[int] = encode_batch(self.tokenizer, [text])[0].ids
        return found

    def _shorten(self, block: list[str], room: int) -> list[str]:
        """Cut very long texts at the end of a word, far behind what fits, if words are tokenised independently."""
        most = CHARS_PER_TOKEN * room + 64
        if not self._word_local or all(len(text) <= most for text in block):
            return block
        ends = [_WORD_END.search(text, most, most + _LONGEST_WORD) if len(text) > most else None for text in block]
        return [text if end is None else text[: end.end()] for text, end in zip(block, ends, strict=True)]

    def _room(self, max_length: int | None, template: _Template) -> int | None:
        limit = self.max_length if max_length is None else self.checked_max_length(max_length)
        if limit is None:
            return None
        # At least one token of text. In a pair it is the document's if the query has to be cut.
        least = template.size + 1
        if limit < least:
            raise ValueError(f"max_length={limit} leaves no room for text: it must be at least {least}")
        return limit - template.size

    def checked_max_length(self, max_length: int | None) -> int | None:
        """Return `max_length`, or raise TypeError or ValueError if it is no limit that the model's positions allow."""
        if max_length is None:
            return None
        if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)):
            raise TypeError(f"max_length must be an int or None, got {_describe(max_length)}")
        if max_length < 1 or (self._position_limit is not None and max_length > self._position_limit):
            most = "" if self._position_limit is None else f" and at most {self._position_limit}, the model's positions"
            raise ValueError(f"max_length must be at least 1{most}, got {max_length}")
        return int(max_length)


def check_texts(texts: Any, name: str, *, scalar: bool = False) -> list[str]:
    """Return `texts` as a list of str; TypeError naming the argument, the position and what came.

    Args:
        texts: a list, tuple, 1-D numpy array of str (or objects that are str), a column of pandas, polars or pyarrow,
            or another iterable of str. A table is refused, by its columns' names.
        name: the caller's argument, for the message.
        scalar: `texts` is a list of one, whose message names the argument without a position.

    Example:
        >>> check_texts(("a", "b"), "documents")
        ['a', 'b']
        >>> check_texts(["a", None], "documents")
        Traceback (most recent call last):
        ...
        TypeError: documents[1] must be str, got NoneType
    """
    texts = as_column(texts, name)
    if isinstance(texts, (str, bytes, Mapping, Set)) or not hasattr(texts, "__iter__"):
        raise TypeError(f"{name} must be a list, tuple or 1-D array of str, got {_describe(texts)}")
    if isinstance(texts, np.ndarray):
        if texts.ndim != 1:
            raise TypeError(f"{name} must be a 1-D array of str, got {texts.ndim} dimensions")
        texts = texts.tolist()
    checked = list(texts)
    for position, text in enumerate(checked):
        if not isinstance(text, str):
            place = name if scalar else f"{name}[{position}]"
            raise TypeError(f"{place} must be str, got {_describe(text)}")
    return checked


def _uses_type_ids(config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether transformers gives the model token types: as the settings say, else as the named class does.

    The generic classes (PreTrainedTokenizerFast, TokenizersBackend) give none, whatever their post-processor says.
    """
    names = settings.get("model_input_names")
    if names is not None:
        return "token_type_ids" in names
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return not isinstance(name, str) or name.removesuffix("Fast") in _TYPED_CLASSES


def _cut(tokens: Sequence[int], room: int | None, left: bool) -> Sequence[int]:
    if room is None or len(tokens) <= room:
        return tokens
    return tokens[len(tokens) - room :] if left else tokens[:room]


def _smaller(first: int | None, second: int | None) -> int | None:
    """The smaller of two limits, None for none."""
    return min((limit for limit in (first, second) if limit is not None), default=None)


def _append(ids: array[int], tokens: Sequence[int]) -> None:
    try:
        if isinstance(tokens, list):
            ids.fromlist(tokens)  # twice as fast as `extend`
        else:
            ids.extend(tokens)
    except OverflowError:
        most = max(tokens)
        raise ValueError(f"tokenizer.json gives the token id {most}, which no table of embeddings has") from None


def _paint(types: npt.NDArray[np.int32], starts: npt.NDArray[np.int64], special_types: Iterable[int]) -> None:
    """Write the type ids of a run of special tokens behind every start."""
    for offset, value in enumerate(special_types):
        types[starts + offset] = value


def _blocks(texts: list[str]) -> Iterator[list[str]]:
    start, chars = 0, 0
    for i, text in enumerate(texts):
        if i > start and (i - start == _BLOCK_TEXTS or chars + len(text) > _BLOCK_CHARS):
            yield texts[start:i]
            start, chars = i, 0
        chars += len(text)
    if start < len(texts):
        yield texts[start:]


def _derive_template(tokenizer: tokenizers.Tokenizer, use_type_ids: bool, *, segments: int) -> _Template:
    """Read the special tokens' places and all type ids off a post-processed probe."""
    probe = next((text for text in _PROBES if len(tokenizer.encode(text, add_special_tokens=False))), None)
    if probe is None:
        raise ValueError(f"the tokenizer gives no tokens for any of {_PROBES}: its vocabulary is unusable")
    encoding = guarded(
        lambda: tokenizer.encode(probe, probe) if segments == 2 else tokenizer.encode(probe),
        lambda: "the tokenizer's special tokens cannot be put around a text",
    )
    specials: list[list[int]] = [[]]
    special_types: list[list[int]] = [[]]
    segment_types: list[int] = []
    for token, kind, sequence in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        kind = kind if use_type_ids else 0
        if sequence is None:
            specials[-1].append(token)
            special_types[-1].append(kind)
        elif sequence == len(segment_types):
            segment_types.append(kind)
            specials.append([])
            special_types.append([])
        elif sequence != len(segment_types) - 1 or specials[-1]:
            raise ValueError("the tokenizer's post-processor reorders or splits its sequences, which is not supported")
    return _Template(tuple(specials), tuple(special_types), tuple(segment_types))


def _is_word_local(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether tokens up to the end of a word before a space are known not to depend on the text behind it."""
    from tokenizers import pre_tokenizers

    if any(" " in token.content for token in tokenizer.get_added_tokens_decoder().values()):
        return False
    splitter = tokenizer.pre_tokenizer
    if isinstance(splitter, pre_tokenizers.ByteLevel):
        return bool(splitter.use_regex)
    if isinstance(splitter, pre_tokenizers.Sequence):
        return isinstance(splitter[0], pre_tokenizers.WhitespaceSplit)
    return isinstance(splitter, pre_tokenizers.BertPreTokenizer)
