"""Exceptions of the package go through pickle and copy, as pools of processes need it."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import fastrerank
from fastrerank.inputs.limits import TooLong

# Arguments of those that take more than a message.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "TooLong": ("a document", 12, 10, "words"),
    "OptionRefused": ("label", "nothing tells which label ranks", "give label="),
    "Overloaded": ("the queue is full", 1.5),
    "Problem": (422, "Validation", "texts is missing", {"Retry-After": "2"}, "texts"),
}


def exceptions() -> Iterator[type[BaseException]]:
    for module in pkgutil.walk_packages(fastrerank.__path__, "fastrerank."):
        if module.name.endswith("__main__") or ".integrations" in module.name:  # these import whole frameworks
            continue
        try:
            found = vars(importlib.import_module(module.name))
        except ImportError:  # an extra is not installed
            continue
        for value in found.values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == module.name:
                yield value


def test_exceptions_survive_pickle_and_copy() -> None:
    classes = sorted(exceptions(), key=lambda one: one.__name__)
    assert {"TooLong", "InvalidConfig"} <= {one.__name__ for one in classes}
    for one in classes:
        error = one(*ARGUMENTS.get(one.__name__, ("a message",)))
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(other) is one
            assert str(other) == str(error)
            assert other.args == error.args
            assert vars(other) == vars(error)


def test_too_long_keeps_what_it_counts() -> None:
    with pytest.raises(TooLong, match="a document has at least 12 words, the limit is 10") as caught:
        raise pickle.loads(pickle.dumps(TooLong("a document", 12, 10, "words")))
    assert (caught.value.tokens, caught.value.limit) == (12, 10)
