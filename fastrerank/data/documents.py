"""Documents for the command line: lines, paragraphs or JSONL rows of files and of standard input."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMATS = ("auto", "lines", "paragraphs", "jsonl")


def read_documents(files: Sequence[str], format: str = "auto", text_field: str = "text") -> tuple[list[str], list[str]]:
    """The texts of all documents of `files`, in order, and the names of the files that are not valid UTF-8.

    Args:
        files: paths; "-" is standard input. gzip-compressed files are unpacked.
        format: "lines" (one document a line), "paragraphs" (separated by blank lines; the lines of one are joined with
            spaces), "jsonl" (objects with `text_field`), or "auto": jsonl for `.jsonl` and `.ndjson` files and for
            standard input whose first line is a JSON object with `text_field`, else lines.
            Blank lines are no documents in any of them.
        text_field: the field of a JSONL row that holds the text.

    Raises:
        OSError: a file that cannot be read.
        ValueError: an unknown format, a cut-off gzip file, or a JSONL line without a string in `text_field`.

    Example:
        >>> read_documents(["-"], "paragraphs")                                          # doctest: +SKIP
        (['first paragraph', 'second paragraph'], [])
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: one of {', '.join(FORMATS)}")
    documents: list[str] = []
    undecodable = []
    for name in files:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            try:
                raw = gzip.decompress(raw)
            except EOFError as error:
                raise ValueError(f"{name}: the gzip file is cut off") from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{name}: the gzip file is damaged: {error}") from error
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("utf-8-sig", errors="replace")
            undecodable.append(name)
        # splitlines() would also split at form feeds and Unicode separators, which are text here
        lines = text.replace("\r\n", "\n").split("\n")
        kind = _guess(name, lines, text_field) if format == "auto" else format
        if kind == "jsonl":
            documents.extend(_jsonl(name, lines, text_field))
        elif kind == "paragraphs":
            documents.extend(_paragraphs(lines))
        else:
            documents.extend(line for line in lines if line.strip())
    return documents, undecodable


def _guess(name: str, lines: Sequence[str], text_field: str) -> str:
    if name.removesuffix(".gz").lower().endswith((".jsonl", ".ndjson")):
        return "jsonl"
    first = next((line for line in lines if line.strip()), "") if name == "-" else ""
    try:
        row = json.loads(first)
    except ValueError:
        return "lines"
    return "jsonl" if isinstance(row, dict) and text_field in row else "lines"


def _jsonl(name: str, lines: Sequence[str], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}:{number}: {not_json(error)}") from error
        except RecursionError:
            raise ValueError(f"{name}:{number}: the JSON value is nested too deep") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise ValueError(
                f"{name}:{number}: not an object with a string field {text_field!r}: {_found(row, text_field)} "
                "(--text-field names another)"
            )
        yield row[text_field]


def not_json(error: json.JSONDecodeError) -> str:
    """Return what is wrong with a line that is not JSON, and at which of its columns, from 1.

    Example:
        >>> try:
        ...     json.loads('{"text": "a",}')
        ... except json.JSONDecodeError as error:
        ...     print(not_json(error))
        not JSON, one object a line, at column 14: illegal trailing comma before end of object
    """
    message = error.msg[:1].lower() + error.msg[1:]
    return f"not JSON, one object a line, at column {error.colno}: {message}"


def _found(row: object, field: str) -> str:
    if not isinstance(row, dict):
        return f"the line is {_kind(row)}"
    if field in row:
        return f"it is {_kind(row[field])}"
    return f"the fields are {', '.join(map(repr, row))}" if row else "the object is empty"


def _kind(value: object) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return kinds[type(value)]


def _paragraphs(lines: Sequence[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
