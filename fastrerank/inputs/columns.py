"""Columns of pandas, polars, pyarrow and datasets as texts, and their tables refused; none of these is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["as_column", "describe", "pairs_of_columns", "table_columns"]

_TEXT_NAMES = ("text", "document", "passage", "content", "contents", "body")
_SHOWN = 8  # columns that a message names


def as_column(values: Any, name: str) -> Any:
    """Return a column as a list of Python objects, a table as an error, and anything else as it is.

    Args:
        values: what a caller passed where texts belong. A pandas, polars or pyarrow column becomes a list.
        name: the caller's argument, for the message.

    Raises TypeError for a table, naming its columns: to iterate over it gives the columns' names, not texts.

    Example:
        >>> as_column(pandas.Series(["the owl"]), "documents")                           # doctest: +SKIP
        ['the owl']
    """
    if isinstance(values, (list, tuple)):
        return values
    columns = table_columns(values)
    if columns is not None:
        example = f"{_variable(values)}[{_likely(columns)!r}]" if columns else "a column"
        raise TypeError(
            f"{name} must be a list, tuple, 1-D array or column of str, got a {type(values).__name__} with "
            f"{_listed(columns)}; pass one of its columns: {example}"
        )
    for method in ("to_pylist", "to_list"):  # pyarrow's; pandas' and polars'
        convert = getattr(values, method, None)
        if callable(convert):
            return convert()
    return values


def pairs_of_columns(values: Any, name: str) -> Any:
    """Same as `as_column` where (query, document) pairs belong: the error says how a table's rows become pairs."""
    columns = table_columns(values)
    if columns is None:
        return as_column(values, name)
    first, second = (columns[0], columns[1]) if len(columns) > 1 else ("query", "document")
    module = type(values).__module__.partition(".")[0]
    table = _variable(values)
    if module == "pandas":
        example = f"{table}[[{first!r}, {second!r}]].values.tolist()"
    elif module == "polars":
        example = f"{table}.select({first!r}, {second!r}).rows()"
    else:
        plain = ".to_pylist()" if module == "pyarrow" else ""
        example = f"list(zip({table}[{first!r}]{plain}, {table}[{second!r}]{plain}))"
    raise TypeError(
        f"{name} must be a sequence of (query, document) pairs, got a {type(values).__name__} with {_listed(columns)}; "
        f"pass its rows as pairs: {example}"
    )


def table_columns(values: Any) -> list[Any] | None:
    """Return the names of a table's columns, None for what is no table.

    A table is what has `column_names` (pyarrow, datasets) or `columns` (pandas, polars, Spark), and is no mapping.
    """
    if isinstance(values, (str, bytes, list, tuple, Mapping)):
        return None
    if type(values).__name__ == "LazyFrame":  # its `columns` warns
        return list(values.collect_schema().names())
    for attribute in ("column_names", "columns"):
        names = getattr(values, attribute, None)
        if names is not None and hasattr(names, "__iter__") and not isinstance(names, (str, Mapping)):
            return list(names)
    return None


def describe(value: object) -> str:
    """Return what a value is, for a message: the name of its type, and for a missing value that it is one.

    Example:
        >>> describe(float("nan"))
        'float (a missing value: drop it, or put a text in its place)'
    """
    kind = type(value).__name__
    missing = kind in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return f"{kind} (a missing value: drop it, or put a text in its place)" if missing else kind


def _variable(values: Any) -> str:
    kind = type(values).__name__
    if kind == "LazyFrame":
        return "df.collect()"
    return "df" if "Frame" in kind else {"RecordBatch": "batch", "Dataset": "dataset"}.get(kind, "table")


def _likely(columns: list[Any]) -> Any:
    return next((name for name in columns if str(name).lower() in _TEXT_NAMES), columns[-1])


def _listed(columns: list[Any]) -> str:
    if not columns:
        return "no columns"
    shown = ", ".join(map(repr, columns[:_SHOWN]))
    rest = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    return f"{'column' if len(columns) == 1 else 'columns'} {shown}{rest}"
