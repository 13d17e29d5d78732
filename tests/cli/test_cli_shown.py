"""What the command line shows: help at 80 columns, tables, folders in place of files, options that do not fit."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers_tiny import save_tiny_cross_encoder
from judged import pool
from rich.console import Console
from test_cli import LongestFirst, on_a_terminal
from test_words import COMMANDS

import fastrerank
from fastrerank.cli import app, doctor, main
from fastrerank.cli import shared as cli_shared
from fastrerank.data.datasets import load_dataset
from fastrerank.data.documents import read_documents
from fastrerank.evaluation import System, compare
from fastrerank.evaluation.systems import parse_system, read_systems
from fastrerank.evaluation.table import print_comparison
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.explain import print_tokens
from fastrerank.rerankers.options import load_keywords


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    assert main([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_no_name_at_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(command, capsys, monkeypatch)
    assert max(map(len, shown.splitlines())) <= 80
    words = {word.rstrip(".:") for word in re.findall(r"[\w@.:-]+", shown)}
    assert COMMANDS[command] <= words
    if "--method" in COMMANDS[command]:
        assert set(fastrerank.list_methods()) <= words
    if "--dtype" in COMMANDS[command]:
        assert {one.value for one in cli_shared.Dtype} <= words
    if len(COMMANDS[command]) > 8:
        assert {"Model", "Computing"} <= words  # grouped


def test_every_option_with_a_default_says_it() -> None:
    """A default is shown; only what is off, or nothing, without the option has none."""
    without = set()
    for name, command in _commands(typer.main.get_command(app)):
        for parameter in command.params:
            optional = parameter.opts[0].startswith("--") and not parameter.required
            if optional and not getattr(parameter, "is_flag", False):
                says = isinstance(parameter.show_default, str) or (
                    parameter.show_default and parameter.default is not None
                )
                if not says:
                    without.add((name, parameter.opts[0]))
    assert {option for _, option in without} <= {
        "--model",
        "--heads",
        "--systems",
        "--with-run",
        "--out",
        "--run",
        "--trec-run",
        "--qrels",
        "--queries",
        "--explain-html",
    }


def _commands(group: Any, name: str = "") -> Any:
    yield name, group
    for part, command in getattr(group, "commands", {}).items():
        yield from _commands(command, f"{name} {part}".strip())


def test_max_length_and_engine_reach_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load(model: str, **options: Any) -> Any:
        asked.append({"model": model, **options})
        return LongestFirst()

    monkeypatch.setattr(fastrerank, "load", load)
    (tmp_path / "d.txt").write_text("a\n")
    given = ["rank", "q", str(tmp_path / "d.txt"), "--model", "m", "--max-length", "64", "--engine", "padded"]
    assert main(given) == 0
    assert asked == [{"model": "m", "method": None, "max_length": 64, "engine": "padded"}]


def test_max_length_changes_what_a_real_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_cross_encoder(tmp_path / "model")
    text = "cats sleep all day a flea lives up to a year " * 4
    (tmp_path / "d.txt").write_text(f"{text}\ncats\n")
    for length in (16, 40):
        given = [
            "rank",
            "how long",
            str(tmp_path / "d.txt"),
            "--model",
            str(model),
            "--json",
            "--max-length",
            str(length),
        ]
        assert main([*given, "--engine", "native"]) == 0
        hits = json.loads(capsys.readouterr().out)
        want = fastrerank.CrossEncoder(model, max_length=length).rank("how long", [text, "cats"], return_documents=True)
        assert [hit["score"] for hit in hits] == [hit["score"] for hit in want]


def test_an_option_that_the_method_does_not_know_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_cross_encoder(tmp_path / "model")
    (tmp_path / "d.txt").write_text("a\n")
    assert main(["rank", "q", str(tmp_path / "d.txt"), "--model", str(model), "--heads", "1-2"]) == 2
    error = capsys.readouterr().err
    assert "Invalid value for --heads: the method of this checkpoint does not know it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rank", "q", "HERE", "--model", "m"], "FILE"),
        (["eval", "DATA", "--model", "m", "--qrels", "HERE", "--trec-run", "DATA", "--queries", "DATA"], "--qrels"),
        (["eval", "DATA", "--systems", "HERE"], "--systems"),
        (["eval", "DATA", "--with-run", "old=HERE"], "--with-run"),
        (["index", "build", "x", "--items", "HERE", "--queries", "DATA", "--model", "m"], "--items"),
        (["index", "build", "x", "--items", "DATA", "--queries", "HERE", "--model", "m"], "--queries"),
        (["heads", "DATA", "--save", "x.toml", "--model", "m", "--trec-run", "HERE"], "--trec-run"),
        (["serve", "--model", "m", "--api-key-file", "HERE"], "--api-key-file"),
    ],
)
def test_a_folder_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    here, data = tmp_path / "texts", tmp_path / "data.jsonl"
    here.mkdir()
    (here / "one.txt").write_text("a\n")
    data.write_text('{"text": "a"}\n')
    given = [argument.replace("HERE", str(here)).replace("DATA", str(data)) for argument in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert f"{here} is a folder: name a file in it, such as {here / 'one.txt'}" in error
    assert "no such file" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("width", [80, 60])
def test_numbers_are_right_aligned_and_names_whole(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = shown_table(
        monkeypatch, width, ("head", "score", "share"), [("13-18", "0.5", "1e-05"), ("1-2", "-12.25", "3 %")]
    )
    rows = [[cell[1:-1] for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [cell.rstrip() for cell in rows[0]] == ["13-18", *(cell.rstrip() for cell in rows[0][1:])]
    for column in (1, 2):
        assert all(row[column] == row[column].rstrip() != "" for row in rows), rows
    name = "sentence-transformers/a-very-long-name-of-a-checkpoint/snapshots/0123456789abcdef0123456789abcdef01234567"
    text = "\n".join(shown_table(monkeypatch, width, ("what", "found"), [("model", name), ("method", "embedding")]))
    assert f"model: {name}" in text.replace("\r", "")
    assert "method: embedding" in text


def shown_table(monkeypatch: pytest.MonkeyPatch, width: int, columns: Any, rows: Any, **more: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, no_color=True)
    monkeypatch.setattr(cli_shared, "Console", lambda: console)
    cli_shared.print_table(columns, rows, **more)
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()


def test_a_comparison_names_its_systems_whole_at_80_columns() -> None:
    names = ["cross-encoder/ms-marco-MiniLM-L6-v2 int8 of a folder", "BAAI/bge-reranker-v2-m3 with 512 tokens"]

    class Kept:
        def rank(self, _query: str, documents: list[str]) -> list[dict[str, Any]]:
            return [{"corpus_id": i, "score": -float(i)} for i in range(len(documents))]

    found = compare([System(name.replace("/", "-"), ranker=Kept()) for name in names], {"a": pool(4), "b": pool(4, 1)})
    for width in (80, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_comparison(found, console)
        text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
        for name in names:
            assert name.replace("/", "-") in text
        if width == 80:
            assert re.search(r"│ 2 +│", text)
            assert f"\n2  {names[0].replace('/', '-')}\n" in text


def test_explained_documents_are_numbered_as_the_input() -> None:
    hits = [
        {"corpus_id": 11, "score": 2.0, "tokens": [("owl", 1.0)]},
        {"corpus_id": 0, "score": 1.0, "tokens": [("cat", 0.5)]},
    ]
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_tokens(console, hits)
    assert console.file.getvalue().splitlines() == [
        "  1    2.0000  document 11: owl(+1.0000)",
        "  2    1.0000  document  0: cat(+0.5000)",
    ]


def test_an_unknown_option_of_a_system_names_the_valid_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"'dtyp' is no option of any method; one of .*dtype, .*threads") as caught:
        parse_system("m,dtyp=int8")
    assert "num_threads" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'heads' is no option of method embedding; one of cache_folder, device"):
        parse_system("m,method=embedding,heads=1-2")
    with pytest.raises(ValueError, match="'window' is no option of method icr"):
        parse_system("m,window=3", {"method": "icr"})
    path = tmp_path / "systems.toml"
    path.write_text('[systems.a]\nmodel = "m"\nmax_lenght = 5\n')
    with pytest.raises(ValueError, match=r"systems\.toml: \[systems\.a\]: 'max_lenght' is no option .*max_length"):
        read_systems(path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert main(["eval", str(tmp_path / "data.jsonl"), "--model", "m,dtyp=int8"]) == 2
    assert "'dtyp' is no option of any method" in capsys.readouterr().err


def test_keywords_are_those_of_the_classes() -> None:
    assert {"device", "dtype", "max_length", "num_threads", "engine"} <= set(load_keywords("cross-encoder"))
    for method in fastrerank.list_methods():
        found = set(load_keywords(method))
        assert {"device", "dtype", "max_length", "num_threads", "revision", "trust_remote_code"} <= found
        assert not {"self", "model", "model_name_or_path", "preset", "options"} & found
    assert {"window", "algorithm", "template", "memory_limit"} <= set(load_keywords("listwise"))
    assert issubclass(fastrerank.CrossEncoder, Reranker)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a",}', "not JSON, one object a line, at column 1[34]: "),
        ("[", "not JSON, one object a line, at column 2: expecting value"),
        ('{"txt": "b", "id": 1}', r"string field 'text': the fields are 'txt', 'id' \(--text-field names another\)"),
        ('{"text": 3}', "string field 'text': it is a number"),
        ('{"text": null}', "string field 'text': it is null"),
        ('["a"]', "string field 'text': the line is an array"),
        ("{}", "the object is empty"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_row_that_is_wrong_is_named_by_line_column_and_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{message}"):
        read_documents([str(path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"qid": "1",}', "not JSON, one object a line, at column 1[23]: "),
        ('{"qid": "1", "query": "q"}', "no 'candidates', where list is needed; the fields are 'qid', 'query'"),
        (
            '{"qid": "1", "query": "q", "candidates": [{"docid": "a", "text": "t"}, {"docid": "b"}]}',
            r"no 'text' in candidates\[1\], where str is needed; the fields are 'docid'",
        ),
        ('{"qid": "1", "query": "q", "candidates": ["a"]}', r"candidates\[0\] is str, where an object with 'docid'"),
        (
            '{"qid": "1", "query": "q", "candidates": [{"docid": "a", "text": 5.5}]}',
            r"'text' is float in candidates\[0\], where str is needed",
        ),
        ('{"qid": "1", "query": "q", "candidates": [], "ideal_rels": [1, [2]]}', r"'ideal_rels\[1\]' is list"),
        ("3", "the line is int, where an object with 'candidates' is needed"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_judged_row_that_is_wrong_is_named_by_field(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"qid": "0", "query": "q", "candidates": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        load_dataset(path)


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_says_no_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bool) -> None:
    """Also where the tools of a driver are installed, which then fail, and where the CUDA kernels are built."""
    monkeypatch.setattr(doctor, "_DEVICE_FILES", (str(tmp_path / "absent"),))
    if broken:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    built = {
        "built": True,
        "runtime": "13.0",
        "architectures": ["80-real"],
        "devices": [],
        "problem": "CUDA driver version is insufficient for CUDA runtime version",
    }
    monkeypatch.setattr(doctor, "cuda_info", lambda: built)
    found = doctor.report()
    assert found["gpu"] == "no GPU"
    assert found["cuda kernels"] == "CUDA 13.0 for sm 80-real; no GPU"
    assert "driver" not in json.dumps({**found, "platform": ""})
    # and where a GPU is there, what is wrong with its driver is said
    (tmp_path / "absent").touch()
    found = doctor.report()
    assert "insufficient" in found["cuda kernels"]
    if broken:
        assert found["gpu"].startswith("there is a GPU, but nvidia-smi failed")


def test_a_warning_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_cross_encoder(tmp_path / "model")
    (tmp_path / "d.txt").write_text("a\n")
    assert main(["rank", "q", str(tmp_path / "d.txt"), "--model", str(model), "--method", "embedding"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastrerank: warning: {model} was trained as a classifier")


def test_serve_prints_its_address_on_a_terminal_only(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    from fastrerank.serve.run import url_of

    assert url_of("127.0.0.1", 8080) == "http://127.0.0.1:8080/"
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80/"
    assert url_of("::", 80) == "http://[::1]:80/"
    code = """
import os, signal, sys, threading
from fastrerank.cli import main
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGTERM)).start()
sys.exit(main(["serve", "--port", "0", "--model", sys.argv[1]]))
"""
    model = save_tiny_cross_encoder(tmp_path / "model")
    shown = on_a_terminal([sys.executable, "-c", code, str(model), "8"])
    port = re.search(r'"port": (\d+)', shown)[1]
    assert f"Serving at http://127.0.0.1:{port}/ (all routes: http://127.0.0.1:{port}/docs). Ctrl-C ends it." in shown
    done = subprocess.run([sys.executable, "-c", code, str(model), "8"], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


def test_raw_scores_and_a_label_are_those_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    import tiny as factory

    model = factory.save(tmp_path / "model", "bert", labels=3)
    texts = ["cat", "old cat"]
    (tmp_path / "d.txt").write_text("\n".join(texts))
    given = ["rank", "owl", str(tmp_path / "d.txt"), "--model", str(model), "--json"]
    assert main(given) == 1  # LABEL_0, LABEL_1, LABEL_2 do not tell
    assert (
        "do not tell which ('LABEL_0', 'LABEL_1', 'LABEL_2'): --label takes a name or a number"
        in capsys.readouterr().err
    )
    shown = []
    for label in ("2", "LABEL_2"):
        assert main([*given, "--label", label]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    want = fastrerank.CrossEncoder(model, label=2)
    assert shown == [want.rank("owl", texts, return_documents=True)] * 2
    assert main([*given, "--label", "2", "--raw"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw == want.rank("owl", texts, return_documents=True, raw=True)
    assert raw[0]["score"] != shown[0][0]["score"]
