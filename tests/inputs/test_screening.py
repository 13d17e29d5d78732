"""Tokenizer files that would panic, end the process or never end: refused when loaded, never another id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizer_mutations
from long_texts import KINDS

from fastrerank.inputs import Tokenizer
from fastrerank.inputs.screening import load_fast


def folder_of(path: Path, data: dict[str, Any]) -> Path:
    (path / "tokenizer.json").write_text(json.dumps(data))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    return path


def replaced(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data[name] = value

    return change


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SEQUENCE = [{"Sequence": {"id": "A", "type_id": 0}}]
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "deep trie": ("t5", lambda data: data["model"]["vocab"].append(["a" * 200_000, -1.0]), "a string of 200,001 bytes"),
    "charsmap": (
        "bert",
        replaced("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "Precompiled",
    ),
    "template": (
        "bert",
        replaced(
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "no", "type_id": 0}}, *SEQUENCE],
                "pair": [*SEQUENCE, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            },
        ),
        "special tokens|not a readable",
    ),
    "no length": ("bert", replaced("pre_tokenizer", {"type": "FixedLength", "length": 0}), "not a readable"),
    "recursion": ("qwen", replaced("pre_tokenizer", split(r"(?<a>.\g<a>|.)")), "calls a regular expression in itself"),
    "growth": (
        "bert",
        replaced(
            "normalizer",
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}] * 60,
            },
        ),
        "times as long",
    ),
    "prefix": ("bert", replaced("normalizer", {"type": "Prepend", "prepend": "a" * 5000}), "times as long"),
    "merges": ("qwen", lambda data: data["model"].update(continuing_subword_prefix="東" * 3), "not a readable"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tokenizers_that_end_the_process_are_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, damage, message = DAMAGE[name]
    data = json.loads(KINDS[kind]().to_str())
    damage(data)
    folder = folder_of(tmp_path, data)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["deep trie", "charsmap", "growth", "recursion"])
def test_tokenizers_of_prompts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    kind, damage, message = DAMAGE[name]
    data = json.loads(KINDS[kind]().to_str())
    damage(data)
    with pytest.raises(ValueError, match=f"tokenizer.json.*({message})"):
        load_fast(folder_of(tmp_path, data))


def outcomes(path: Path, kind: str, seeds: range) -> list[str]:
    """What came of every mutation, loaded in a process of its own."""
    KINDS[kind]().save(str(path / "tokenizer.json"))
    done = subprocess.run(
        [sys.executable, tokenizer_mutations.__file__, str(path), json.dumps(list(seeds))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RUST_BACKTRACE": "0"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (kind, lines[-1:], done.returncode, done.stderr[-500:])
    assert lines.pop() == "end"
    return [line.split(" ", 1)[1] for line in lines]


def check_mutations(path: Path, kind: str, seeds: range) -> None:
    found = outcomes(path, kind, seeds)
    assert len(found) == len(seeds)
    assert [line for line in found if not line.startswith(("refused", "right"))] == []
    assert {line.split()[0] for line in found} == {"refused", "right"}


@pytest.mark.parametrize("kind", ["bert", "qwen", "xlm-roberta"])
def test_damaged_tokenizers_are_refused_or_give_the_right_ids(tmp_path: Path, kind: str) -> None:
    check_mutations(tmp_path, kind, range(25))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_tokenizers_are_refused_or_give_the_right_ids_at_length(tmp_path: Path, kind: str) -> None:
    check_mutations(tmp_path, kind, range(25, 525))
