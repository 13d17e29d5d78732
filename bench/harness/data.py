"""Real text for the comparison: TREC DL 2019 passage queries, each with its 100 BM25 passages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DL19 = "dl19-passage-bm25-top100.jsonl.gz"
MAX_LENGTH = 512


@dataclass(frozen=True)
class Pairs:
    """One query with N documents, as text and as the token ids that every engine gets.

    `ids` and `types`: N int32 arrays (tokens of the pair,), special tokens included; never padded.
    """

    query: str
    documents: list[str]
    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int32]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Equals the tokens of each pair, int64 (N,)."""
        return np.array([len(row) for row in self.ids], np.int64)

    def head(self, count: int) -> Pairs:
        """Equals the same query with its first `count` documents."""
        return Pairs(self.query, self.documents[:count], self.ids[:count], self.types[:count])


class PairTokenizer:
    """Equals `tokenizers` on (query, document), cut to `max_length` tokens at the longer side's end.

    Examples
    --------
    >>> tokenizer = PairTokenizer(Path("checkpoint"))            # doctest: +SKIP
    >>> tokenizer.pairs("a query", ["a document"]).lengths       # doctest: +SKIP
    array([6])
    """

    def __init__(self, checkpoint: Path, max_length: int = MAX_LENGTH) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def pairs(self, query: str, documents: Sequence[str]) -> Pairs:
        """Equals `Pairs` of this query and these documents."""
        encodings = self._tokenizer.encode_batch([(query, document) for document in documents])
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        types = [np.array(encoding.type_ids, np.int32) for encoding in encodings]
        return Pairs(query, list(documents), ids, types)


@dataclass(frozen=True)
class Workload:
    """What one run measures.

    `pairs`: the measured query; `calibration`: other queries, for rivals that calibrate;
    `requests`: one further query per latency sample with 200 documents, as text only.
    """

    pairs: Pairs
    calibration: list[Pairs]
    requests: list[tuple[str, list[str]]]


def load(folder: Path, tokenizer: PairTokenizer, *, documents: int, length: str) -> Workload:
    """Equals the DL19 query whose token count is the median of the 43, with `documents` passages.

    A list of more than 100 goes on with the next query's passages. With length "512" document i is passages i, i+1, ...
    of the list joined until the pair fills 512 tokens, so that every pair has exactly 512.

    Raises
    ------
    FileNotFoundError: no DL19 file in `folder`. ValueError: a length that is neither "natural" nor "512".
    """
    if length not in ("natural", "512"):
        raise ValueError(f"length={length!r} is unknown; valid are 'natural', '512'")
    path = folder / DL19
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder that holds {DL19} with --data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    queries = [row["query"] for row in rows]
    passages = [[candidate["text"] for candidate in row["candidates"]] for row in rows]

    def request(index: int, count: int) -> tuple[str, list[str]]:
        found: list[str] = []
        step = index
        while len(found) < count:
            found += passages[step % len(passages)]
            step += 1
        return queries[index], (_joined(tokenizer, queries[index], found) if length == "512" else found)[:count]

    totals = [int(tokenizer.pairs(query, texts).lengths.sum()) for query, texts in zip(queries, passages, strict=True)]
    middle = int(np.argsort(totals, kind="stable")[len(totals) // 2])
    others = [index for index in range(len(rows)) if index != middle]
    calibration = [tokenizer.pairs(*request(index, 15)) for index in others[:20]]
    return Workload(tokenizer.pairs(*request(middle, documents)), calibration, [request(i, 200) for i in others[20:]])


def _joined(tokenizer: PairTokenizer, query: str, passages: list[str]) -> list[str]:
    """Documents that fill `MAX_LENGTH` tokens together with the query, from following passages (cyclic)."""
    own = [len(row) for row in tokenizer.pairs(query, passages).ids]
    overhead = len(tokenizer.pairs(query, [""]).ids[0])
    joined = []
    for start in range(len(passages)):
        pieces, filled, step = [], overhead, start
        while filled < MAX_LENGTH:
            pieces.append(passages[step % len(passages)])
            filled += own[step % len(passages)] - overhead
            step += 1
        joined.append(" ".join(pieces))
    return joined
