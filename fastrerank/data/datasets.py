"""Judged ranking data: reads JSONL rows, TREC runs with judgements and BEIR folders; writes runs."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrerank.data.documents import not_json
from fastrerank.runtime.naming import shortened

__all__ = ["Candidate", "JudgedQuery", "Run", "judged_query", "load_dataset", "read_trec_run", "write_trec_run"]

Run = dict[str, list[tuple[str, float]]]
"""Query id -> (document id, score) pairs, best first."""


@dataclass(frozen=True)
class Candidate:
    """One document that the first stage returned for a query."""

    docid: str
    text: str


@dataclass(frozen=True)
class JudgedQuery:
    """One query, its candidates in first-stage order, and every relevance judgement that is known of it.

    `judgements` maps document ids to grades. It also holds judged documents that are not candidates: with them, nDCG
    and recall equal trec_eval's. A query without any judgement is reranked but enters no mean.
    """

    qid: str
    query: str
    candidates: tuple[Candidate, ...]
    judgements: Mapping[str, int]

    def __repr__(self) -> str:
        counts = f"{len(self.candidates)} candidates, {len(self.judgements)} judgements"
        return f"JudgedQuery({self.qid!r}, {shortened(self.query)!r}, {counts})"


def load_dataset(
    source: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    qrels: str | os.PathLike[str] | None = None,
    queries: str | os.PathLike[str] | None = None,
) -> list[JudgedQuery]:
    """Read judged queries from JSONL rows, from TREC files, or from a BEIR folder. Every file may be gzip-compressed.

    Args:
        source: one of
            a JSONL file of rows `{"qid", "query", "candidates": [{"docid", "text", "rel"?}], "ideal_rels"?}`;
            a BEIR folder (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`), with `run`;
            the documents' texts, JSONL (`docid`, `_id` or `id`; `text` or `contents`; `title`?) or `docid<TAB>text`,
            with `run`, `qrels` and `queries`.
        run: TREC run file: it says which documents are candidates, and their order.
        qrels: judgements, TREC (`qid 0 docid grade`) or BEIR (`qid<TAB>docid<TAB>grade`, with a header line).
        queries: JSONL (`qid`, `_id` or `id`; `text` or `query`) or `qid<TAB>text`.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a row that does not follow the format, named by file and line; a run whose texts are missing.

    Example:
        >>> queries = load_dataset("scifact/", run="bm25.trec")                          # doctest: +SKIP
    """
    source = Path(source)
    if source.is_dir():
        if run is None:
            raise ValueError(
                f"{source} is a BEIR folder, which holds no candidates: pass run= (--trec-run), a first-stage TREC run"
            )
        corpus = _existing(source / "corpus.jsonl")
        queries = queries or _existing(source / "queries.jsonl")
        qrels = qrels or _existing(source / "qrels" / "test.tsv")
        return _load_trec(corpus, Path(run), Path(qrels), Path(queries))
    if run is None:
        if qrels is not None or queries is not None:
            raise ValueError("qrels and queries go with run (--trec-run): JSONL rows already hold theirs")
        return [_at(source, number, judged_query, row) for number, row in _json_rows(source)]
    if qrels is None or queries is None:
        raise ValueError(
            "a TREC run needs qrels (--qrels) and queries (--queries) too, unless the data set is a BEIR folder"
        )
    return _load_trec(source, Path(run), Path(qrels), Path(queries))


def judged_query(row: Mapping[str, Any]) -> JudgedQuery:
    """One row of the JSONL format as a `JudgedQuery`.

    `ideal_rels` holds the grades of all relevant documents of the query. Grades beyond the candidates' become
    judgements of other documents, so that the ideal ranking of nDCG is complete. nDCG@10 needs only the ten highest;
    Recall counts those that are listed.

    Raises:
        ValueError: a missing or wrongly typed field, or a document that is twice among the candidates.

    Example:
        >>> candidates = [{"docid": "d", "text": "t", "rel": 1}]
        >>> row = {"qid": "1", "query": "q", "candidates": candidates, "ideal_rels": [2, 1]}
        >>> sorted(judged_query(row).judgements.values())
        [1, 2]
    """
    rows = _field(row, "candidates", list)
    candidates = tuple(
        Candidate(_field(c, "docid", str, f"candidates[{i}]"), _field(c, "text", str, f"candidates[{i}]"))
        for i, c in enumerate(rows)
    )
    counts = Counter(candidate.docid for candidate in candidates)
    if len(counts) != len(candidates):
        raise ValueError(f"document {counts.most_common(1)[0][0]!r} is more than once among the candidates")
    judgements = {
        str(c["docid"]): _field(c, "rel", int, f"candidates[{i}]")
        for i, c in enumerate(rows)
        if c.get("rel") is not None
    }
    ideal = _field(row, "ideal_rels", list) if row.get("ideal_rels") is not None else []
    for i, grade in enumerate(ideal):
        if not isinstance(grade, int) or isinstance(grade, bool):
            raise ValueError(f"'ideal_rels[{i}]' is {type(grade).__name__}, where int is needed")
    missing = Counter(ideal) - Counter(judgements.values())
    for number, grade in enumerate(missing.elements()):
        judgements[f"\tjudged, not a candidate {number}"] = grade  # no TREC document id has white space
    return JudgedQuery(_field(row, "qid", str), _field(row, "query", str), candidates, judgements)


def _field(row: Any, name: str, kind: type, where: str = "") -> Any:
    """The field `name` of a JSON object; `where` is the object's own place in its line, for the message."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # ids are often written as JSON numbers
    if not isinstance(value, kind) or isinstance(value, bool):
        inside = f" in {where}" if where else ""
        if not isinstance(row, Mapping):
            raise ValueError(f"{where or 'the line'} is {type(row).__name__}, where an object with {name!r} is needed")
        if name in row:
            raise ValueError(f"{name!r} is {type(value).__name__}{inside}, where {kind.__name__} is needed")
        fields = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"no {name!r}{inside}, where {kind.__name__} is needed; the fields are {fields}")
    return value


def read_trec_run(path: str | os.PathLike[str]) -> Run:
    """Read a TREC run (`qid Q0 docid rank score tag`), each query's documents sorted by score, ties in file order.

    Raises:
        ValueError: a line without six columns, a score that is no number, or a document that a query has twice.

    Example:
        >>> read_trec_run("bm25.trec")["q1"][0]                                          # doctest: +SKIP
        ('d7', 12.5)
    """
    run: Run = {}
    for number, line in _lines(Path(path)):
        columns = line.split()
        if len(columns) != 6:
            raise ValueError(
                f"{path}:{number}: a TREC run has 6 columns (qid Q0 docid rank score tag), this line {len(columns)}"
            )
        run.setdefault(columns[0], []).append((columns[2], _at(Path(path), number, float, columns[4])))
    for qid, hits in run.items():
        docid, count = Counter(docid for docid, _ in hits).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{path}: query {qid!r} has document {docid!r} {count} times")
    return {qid: sorted(hits, key=lambda hit: -hit[1]) for qid, hits in run.items()}


def write_trec_run(path: str | os.PathLike[str], run: Run, *, tag: str = "fastrerank") -> None:
    """Write `run` in TREC format: `qid Q0 docid rank score tag`, one line per document, ranks from 1.

    trec_eval ignores the rank column, reads scores as float32 and breaks ties by document id. So that it sees the order
    given here, a score that is not below the one before it is written as the next smaller float32.

    Args:
        path: the file to write.
        run: query id -> (document id, score) pairs, best first.
        tag: name of the run, without spaces.

    Raises:
        ValueError: a NaN score, or white space in an id or in the tag.

    Example:
        >>> write_trec_run("/dev/stdout", {"q1": [("d7", 2.5), ("d2", 2.5)]})           # doctest: +SKIP
        q1 Q0 d7 1 2.5 fastrerank
        q1 Q0 d2 2 2.4999998 fastrerank
    """
    lines = []
    for qid, hits in run.items():
        previous = np.float32(np.inf)
        for rank, (docid, score) in enumerate(hits, start=1):
            for name in (qid, docid, tag):
                if not name or any(character.isspace() for character in name):
                    raise ValueError(f"a TREC run cannot hold the name {name!r}: it is empty or has white space in it")
            if np.isnan(score):
                raise ValueError(f"query {qid!r}, document {docid!r}: the score is NaN")
            written = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
            lines.append(f"{qid} Q0 {docid} {rank} {written} {tag}\n")
            previous = written
    Path(path).write_text("".join(lines), encoding="utf-8")


def _load_trec(texts: Path, run_path: Path, qrels_path: Path, queries_path: Path) -> list[JudgedQuery]:
    run = read_trec_run(run_path)
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(qrels_path):
        columns = line.split()
        if number == 1 and columns[:1] == ["query-id"]:
            continue
        if len(columns) not in (3, 4):
            raise ValueError(
                f"{qrels_path}:{number}: judgements have 3 (BEIR) or 4 (TREC) columns, this line {len(columns)}"
            )
        qrels.setdefault(columns[0], {})[columns[-2]] = _at(qrels_path, number, int, columns[-1])
    queries = dict(_texts(queries_path, ("qid", "_id", "id"), ("text", "query")))
    needed = {docid for hits in run.values() for docid, _ in hits}
    documents = {
        docid: text for docid, text in _texts(texts, ("docid", "_id", "id"), ("text", "contents")) if docid in needed
    }
    for kind, path, absent in (
        ("queries", queries_path, run.keys() - queries),
        ("documents", texts, needed - documents.keys()),
    ):
        if absent:
            raise ValueError(
                f"{path}: {len(absent)} {kind} of {run_path} have no text there, for example {min(absent)!r}"
            )
    return [
        JudgedQuery(qid, queries[qid], tuple(Candidate(d, documents[d]) for d, _ in hits), qrels.get(qid, {}))
        for qid, hits in run.items()
    ]


def _texts(path: Path, ids: Sequence[str], fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of every row of a JSONL or two-column file; a title goes before the text, as BEIR does it."""
    for number, line in _lines(path):
        if not line.startswith("{"):
            identifier, tab, text = line.partition("\t")
            if not tab:
                raise ValueError(f"{path}:{number}: neither a JSON object nor id<TAB>text")
            yield identifier, text
            continue
        row = _at(path, number, _parsed, line)
        identifier = next((name for name in ids if name in row), ids[0])
        body = next((name for name in fields if name in row), fields[0])
        text = _at(path, number, _field, row, body, str)
        title = row.get("title") or ""
        yield _at(path, number, _field, row, identifier, str), f"{title} {text}".strip() if title else text


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        yield number, _at(path, number, _parsed, line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(not_json(error)) from error
    except RecursionError:
        raise ValueError("the JSON value is nested too deep") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank, of a plain or gzip-compressed UTF-8 file."""
    with path.open("rb") as handle:
        compressed = handle.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not readable as UTF-8 text: {error}") from error


def _at(path: Path, number: int, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`, with file and line in front of the message of a ValueError."""
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from error


def _existing(path: Path) -> Path:
    """`path`, or the same with .gz added where only that exists."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if compressed.exists() and not path.exists() else path
