"""`fastrerank eval` of several systems: how they are said, what is printed and written, and wrong usage."""

from __future__ import annotations

import json

import pytest
from helpers_tiny import save_tiny_cross_encoder
from judged import pool, rows_file
from test_cli import CLI, on_a_terminal

from fastrerank.cli import main
from fastrerank.evaluation import Comparison, write_trec_run
from fastrerank.evaluation.systems import parse_run, parse_system, read_systems


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return [save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"), seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("text", "name", "model", "options"),
    [
        ("BAAI/bge", "bge", "BAAI/bge", {"device": "cpu"}),
        ("small=BAAI/bge,dtype=int8", "small", "BAAI/bge", {"device": "cpu", "dtype": "int8"}),
        ("./a=b", "a=b", "./a=b", {"device": "cpu"}),
        ("m,threads=2,device=cuda:1", "m 2 cuda:1", "m", {"device": "cuda:1", "num_threads": 2}),
        (
            "m,heads=13-18,14-31,calibrate=false,memory_limit=0.5",
            "m 13-18,14-31 false 0.5",
            "m",
            {"device": "cpu", "heads": ((13, 18), (14, 31)), "calibrate": False, "memory_limit": 0.5},
        ),
        (
            "m,revision=1e5,instruction=find, or not",
            "m 1e5 find, or not",
            "m",
            {"device": "cpu", "revision": "1e5", "instruction": "find, or not"},
        ),
    ],
)
def test_systems_on_the_command_line(text, name, model, options):
    system = parse_system(text, {"device": "cpu"})
    assert (system.name, system.model, dict(system.options)) == (name, model, options)


def test_runs_on_the_command_line():
    assert [(s.name, s.run) for s in map(parse_run, ["runs/bm25.trec.gz", "old=x.trec", "plain"])] == [
        ("bm25", "runs/bm25.trec.gz"),
        ("old", "x.trec"),
        ("plain", "plain"),
    ]


def test_systems_from_a_file(tmp_path):
    path = tmp_path / "systems.toml"
    path.write_text(
        '[systems.small]\nmodel = "BAAI/bge"\nthreads = 2\n[systems."of a folder"]\nmodel = "./m"\nheads = "1-2"\n'
        'dtype = "int8"\n[systems.old]\nrun = "old.trec"\n'
    )
    small, folder, old = read_systems(path, {"dtype": "float32"})
    assert (small.model, small.options) == ("BAAI/bge", {"dtype": "float32", "num_threads": 2})
    assert (folder.name, folder.model, folder.options) == (
        "of a folder",
        str(tmp_path / "m"),
        {"dtype": "int8", "heads": ((1, 2),)},
    )
    assert old.run == tmp_path / "old.trec"
    for text, message in (
        ("[systems", "not readable as TOML"),
        ("[models.a]\nmodel = 'm'", "must hold tables"),
        ("[systems.a]\ndtype = 'int8'", "must have model or run"),
        ("[systems.a]\nmodel = 'm'\nmethod = 'magic'", "method must be one of"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_systems(path)
        assert str(path) in str(caught.value)


@pytest.fixture
def data(tmp_path):
    return rows_file(tmp_path / "data.jsonl", pool(5))


def test_the_command_compares_and_writes(data, tiny, tmp_path, capsys):
    run_file = tmp_path / "old.trec"
    write_trec_run(run_file, {"q0": [("d0-3", 2.0), ("d0-1", 1.0)]})
    models = ["--model", f"one={tiny[0]}", "--model", f"two={tiny[1]},dtype=int8"]
    code = main(
        [
            "eval",
            str(data),
            *models,
            "--with-run",
            f"old={run_file}",
            "--baseline",
            "one",
            "--dtype",
            "float32",
            "--measure",
            "nDCG@5",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert rows[0][:4] == ["dataset", "system", "nDCG@5", "nDCG@5 difference"]
    assert [row[:2] for row in rows[1:]] == [["data", name] for name in ("first-stage", "one", "two", "old")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert "report.html" in captured.err
    kept = Comparison.load(tmp_path / "out")
    assert [kept.systems[name]["options"]["dtype"] for name in ("one", "two")] == ["float32", "int8"]
    assert f"{kept.results['data']['two'].metrics['nDCG@5']:.4f}" == rows[3][2]
    assert sorted(path.name for path in (tmp_path / "out" / "runs" / "data").iterdir()) == [
        "first-stage.trec",
        "old.trec",
        "one.trec",
        "two.trec",
    ]


def test_the_command_fails_by_name_after_the_others_are_printed(data, tiny, tmp_path, capsys):
    (tmp_path / "systems.toml").write_text(f"[systems.good]\nmodel = '{tiny[0]}'\n[systems.bad]\nmodel = './gone'\n")
    assert main(["eval", str(data), "--systems", str(tmp_path / "systems.toml"), "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["results"]["data"]["good"]["latency_ms"]["p50"] > 0
    assert [failure["system"] for failure in result["failures"]] == ["bad"]
    warning, error = captured.err.splitlines()
    assert warning.startswith("fastrerank: warning: system 'bad' failed: FileNotFoundError")
    assert error == "fastrerank: error: 1 of 2 systems failed: 'bad'"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "a", "--model", "b", "--run", "x.trec"], "--run"),
        (["--model", "a", "--model", "a"], "one name"),
        (["--model", "a,dtype="], "dtype has no value"),
        (["--model", "a,method=magic"], "method must be one of"),
        (["--with-run", "gone.trec"], "no such file"),
        (["--systems", "gone.toml"], "--systems"),
        (["--model", "a", "--baseline", "b"], "baseline 'b'"),
        (["--model", "a", "--measure", "magic"], "'magic' is not known"),
        (["DATA", "--model", "a"], "two data sets are named 'data'"),
        (["DATA", "--model", "a", "--qrels", "DATA"], "go with one data set"),
    ],
)
def test_wrong_usage(data, capsys, arguments, named):
    arguments = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert main(["eval", str(data), *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1


def test_progress_on_a_terminal(data, tiny):
    shown = on_a_terminal([*CLI, "eval", str(data), "--model", f"one={tiny[0]},num_threads=1"], COLUMNS="140")
    assert "1/1 one: data" in shown
    assert "5/5" in shown
