"""Modules under the names of earlier releases."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from fastrerank._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_earlier_name_is_the_module_of_today(old: str) -> None:
    if old.startswith(("engine.", "ops.")):
        pytest.importorskip("torch")
    new = importlib.import_module(f"fastrerank.{MOVED[old]}")
    sys.modules.pop(f"fastrerank.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"fastrerank\.{old} is now fastrerank\.{MOVED[old]};"):
        module = importlib.import_module(f"fastrerank.{old}")
    assert module is new
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == f"fastrerank.{MOVED[old]}"


def test_modules_of_a_moved_package_are_not_imported_twice() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import fastrerank.cur.index as old; "
        "from fastrerank.search.index import CURIndex; assert old.CURIndex is CURIndex; "
        "from fastrerank.datasets import load_dataset; from fastrerank.text import Tokenizer; import fastrerank; "
        "assert fastrerank.cur is sys.modules['fastrerank.search']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
