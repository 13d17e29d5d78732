"""The command line: what it prints where, in which form, and with which exit code."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
from helpers_tiny import save_tiny_cross_encoder

import fastrerank
from fastrerank.cli import main

CLI = [sys.executable, "-m", "fastrerank.cli"]


class LongestFirst:
    """Scores a document by its length."""

    def rank(self, _query, documents, top_k=None, return_documents=False):
        order = sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i))[:top_k]
        hits = [{"corpus_id": i, "score": float(len(documents[i]))} for i in order]
        return [hit | {"text": documents[hit["corpus_id"]]} for hit in hits] if return_documents else hits


@pytest.fixture
def loads(monkeypatch):
    """Replaces `fastrerank.load` by one that needs no checkpoint, and holds the arguments of its calls."""
    calls = []

    def load(model, **options):
        calls.append({"model": model} | options)
        return LongestFirst()

    monkeypatch.setattr(fastrerank, "load", load)
    return calls


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_cross_encoder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("bb\n\n  \ndddd\tx\nccc\n")
    return path


def texts(capsys):
    return [hit["text"] for hit in json.loads(capsys.readouterr().out)]


@pytest.mark.usefixtures("loads")
def test_rank_prints_tab_separated_values_away_from_a_terminal(lines, capsys):
    assert main(["rank", "q", str(lines), "--model", "m"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "rank\tscore\ttext\n1\t6.0000\tdddd x\n2\t3.0000\tccc\n3\t2.0000\tbb\n"
    assert captured.err == ""


@pytest.mark.usefixtures("loads")
def test_rank_json_is_one_array_and_nothing_else(lines, capsys):
    assert main(["rank", "q", str(lines), "--model", "m", "--json", "--top-k", "2"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [
        {"corpus_id": 1, "score": 6.0, "text": "dddd\tx"},
        {"corpus_id": 2, "score": 3.0, "text": "ccc"},
    ]
    assert captured.err == ""


def test_options_reach_load(loads, lines):
    options = ["--method", "embedding", "--dtype", "int8", "--device", "cpu", "--threads", "1"]
    assert main(["rank", "q", str(lines), "--model", "m", *options]) == 0
    assert loads == [{"model": "m", "method": "embedding", "dtype": "int8", "device": "cpu", "num_threads": 1}]


@pytest.mark.usefixtures("loads")
def test_documents_of_every_format(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("one\ntwo\n\n \nthree\f3\n\n\n")
    (tmp_path / "r.jsonl").write_text('{"text": "alpha", "n": 1}\n\n{"text": "be\\u2028ta"}\n')
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"body": "packed"}\n'))
    (tmp_path / "bom.txt").write_bytes("\ufeffword\r\nother\u2028same line\r\n".encode())

    def ranked(*arguments):
        assert main(["rank", "q", "--model", "m", "--json", *map(str, arguments)]) == 0
        return set(texts(capsys))

    assert ranked(tmp_path / "p.txt", "--format", "paragraphs") == {"one two", "three\f3"}
    assert ranked(tmp_path / "p.txt") == {"one", "two", "three\f3"}
    assert ranked(tmp_path / "r.jsonl") == {"alpha", "be\u2028ta"}
    assert ranked(tmp_path / "r.jsonl", "--format", "lines") == {'{"text": "alpha", "n": 1}', '{"text": "be\\u2028ta"}'}
    assert ranked(tmp_path / "z.jsonl.gz", "--text-field", "body") == {"packed"}
    assert ranked(tmp_path / "bom.txt") == {"word", "other\u2028same line"}
    assert ranked(tmp_path / "p.txt", tmp_path / "r.jsonl") == {"one", "two", "three\f3", "alpha", "be\u2028ta"}


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("files", [["-"], []])
@pytest.mark.parametrize(
    ("piped", "expected"), [("a\nbb\n", {"a", "bb"}), ('{"text": "a"}\n{"text": "bb"}\n', {"a", "bb"})]
)
def test_rank_reads_standard_input(monkeypatch, capsys, files, piped, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    assert main(["rank", "q", *files, "--model", "m", "--json"]) == 0
    assert set(texts(capsys)) == expected


@pytest.mark.usefixtures("loads")
def test_odd_text_is_printed_and_survives_json(tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "\ud800 \x1b[31mred\x00 \u05d0 \U0001f600"}) + "\n")
    assert main(["rank", "q", str(tmp_path / "odd.jsonl"), "--model", "m", "--json"]) == 0
    assert texts(capsys) == ["\ud800 \x1b[31mred\x00 \u05d0 \U0001f600"]
    assert main(["rank", "q", str(tmp_path / "odd.jsonl"), "--model", "m"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.usefixtures("loads")
def test_undecodable_bytes_are_reported(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert main(["rank", "q", str(tmp_path / "latin.txt"), "--model", "m", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["text"] == "caf\ufffd"
    assert captured.err.startswith("fastrerank: warning:")
    assert "latin.txt" in captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "command"),
        (["frobnicate"], "frobnicate"),
        (["rank"], "QUERY"),
        (["rank", "q", "LINES"], "--model"),
        (["rank", "q", "absent.txt", "--model", "m"], "absent.txt"),
        (["rank", "q", "LINES", "--model", "m", "--method", "magic"], "late-interaction"),
        (["rank", "q", "LINES", "--model", "m", "--dtype", "int3"], "bfloat16"),
        (["rank", "q", "LINES", "--model", "m", "--device", "tpu"], "cuda:"),
        (["rank", "q", "LINES", "--model", "m", "--format", "xml"], "paragraphs"),
        (["rank", "q", "LINES", "--model", "m", "--top-k", "0"], "--top-k"),
        (["rank", "q", "LINES", "--model", "m", "--threads", "0"], "--threads"),
        (["rank", "q", "LINES", "--model", "m", "--unknown"], "--unknown"),
        (["eval", "absent.jsonl", "--model", "m"], "absent.jsonl"),
        (["eval", "LINES"], "--model"),
        (["eval", "LINES", "--model", "m", "--run", "absent/run.trec"], "--run"),
        (["bench", "gpu"], "cross-encoder"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(loads, lines, capsys, arguments, named):
    assert main([str(lines) if a == "LINES" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastrerank: error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert loads == []


def test_failed_work_exits_1_with_one_line(monkeypatch, lines, capsys):
    def load(_model, **_options):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(fastrerank, "load", load)
    assert main(["rank", "q", str(lines), "--model", "m"]) == 1
    assert capsys.readouterr().err == "fastrerank: error: first line second line\n"
    monkeypatch.setenv("FASTRERANK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="first line"):
        main(["rank", "q", str(lines), "--model", "m"])


def test_an_unforeseen_error_says_what_it_is(monkeypatch, lines, capsys):
    def load(_model, **_options):
        raise KeyError("hidden_size")

    monkeypatch.setattr(fastrerank, "load", load)
    assert main(["rank", "q", str(lines), "--model", "m"]) == 1
    assert "KeyError: 'hidden_size' (FASTRERANK_TRACEBACK=1" in capsys.readouterr().err


@pytest.mark.usefixtures("loads")
def test_a_damaged_jsonl_line_is_named(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert main(["rank", "q", str(tmp_path / "bad.jsonl"), "--model", "m"]) == 1
    assert "bad.jsonl:2: not an object with a string field 'text'" in capsys.readouterr().err


@pytest.fixture
def dataset(tmp_path):
    candidates = [{"docid": "a", "text": "a", "rel": 0}, {"docid": "b", "text": "bbb", "rel": 1}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"qid": q, "query": "q", "candidates": candidates}) + "\n" for q in "12"))
    return path


@pytest.mark.usefixtures("loads")
def test_eval_json_and_run(dataset, tmp_path, capsys):
    run = tmp_path / "run.trec"
    assert main(["eval", str(dataset), "--model", "m", "--json", "--run", str(run)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["queries"], result["judged"], captured.err) == (2, 2, "")
    assert (result["first_stage"]["MRR@10"], result["reranked"]["MRR@10"]) == (0.5, 1.0)
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"]
    assert run.read_text().splitlines()[:2] == ["1 Q0 b 1 3.0 fastrerank", "1 Q0 a 2 1.0 fastrerank"]


@pytest.mark.usefixtures("loads")
def test_eval_table(dataset, capsys):
    assert main(["eval", str(dataset), "--model", "m", "--top-k", "1"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["measure", "first stage", "reranked"]
    assert ["MRR@10", "0.5000", "0.5000"] in rows
    assert rows[-1][0] == "latency p95 [ms]"


@pytest.mark.usefixtures("loads")
def test_eval_of_a_beir_folder_needs_a_run(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--model", "m"]) == 1
    assert "--trec-run" in capsys.readouterr().err


def test_bench_runs_the_clone_s_benchmark(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fastrerank, "__file__", str(tmp_path / "site-packages" / "fastrerank" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "cross-encoder"]) == 1
    assert "in a clone of the repository" in capfd.readouterr().err
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "run.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit('--fail' in sys.argv)\n")
    assert main(["bench", "cross-encoder", "--against", "onnxruntime", "-n", "3"]) == 0
    assert capfd.readouterr().out == "['cross-encoder', '--against', 'onnxruntime', '-n', '3']\n"
    assert main(["bench", "cross-encoder", "--fail"]) == 1
    assert "the benchmark failed" in capfd.readouterr().err


def test_version(capsys):
    assert main(["version"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{fastrerank.__version__}\n" * 2


@pytest.mark.parametrize("command", [[], ["index"]])
def test_a_command_that_is_missing_is_named(capsys, command):
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Missing command" in err


def test_doctor_reports_without_importing_torch():
    code = "import sys; from fastrerank.cli import main; main(['doctor', '--json']); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    report, torch_imported = printed.rsplit("\n", 2)[:2]
    assert torch_imported == "False"
    found = json.loads(report)
    assert found["fastrerank"] == fastrerank.__version__
    assert found["cpu"] in found["cpu levels"]
    assert found["threads"] >= 1
    assert found["packages"].keys() == {"numpy", "tokenizers", "safetensors", "huggingface_hub"}
    assert all(found["packages"].values())


def test_a_real_checkpoint_from_another_process(tiny):
    command = [*CLI, "rank", "how long do fleas live", "-", "--model", str(tiny), "--json"]
    piped = "a flea lives up to a year\ncats sleep all day\n"
    done = subprocess.run(command, input=piped, capture_output=True, text=True, check=True)
    hits = json.loads(done.stdout)
    assert {hit["text"] for hit in hits} == set(piped.splitlines())
    reranker = fastrerank.load(str(tiny))
    assert hits == reranker.rank("how long do fleas live", piped.splitlines(), return_documents=True)
    assert done.stderr == ""


def test_a_missing_checkpoint_and_an_empty_input(tiny, tmp_path, lines):
    command = [*CLI, "rank", "q", str(lines), "--model", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "nowhere" in done.stderr
    command = [*CLI, "rank", "q", "-", "--model", str(tiny), "--json"]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert done.stderr.startswith("fastrerank: warning:")


def test_output_whose_reader_has_gone(tiny, lines):
    command = [*CLI, "rank", "q", str(lines), "--model", str(tiny)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def on_a_terminal(command, **environment):
    """What `command` writes to a terminal that is both its standard output and its standard error."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    terminal, end = pty.openpty()
    subprocess.run(command, stdout=end, stderr=end, env=kept | {"TERM": "xterm-256color"} | environment)
    os.close(end)
    return _read_all(terminal)


def test_table_on_a_terminal(tiny, lines):
    lines.write_text(lines.read_text() + "a flea lives up to a year and cats sleep all day long\n")
    shown = on_a_terminal([*CLI, "rank", "q", str(lines), "--model", str(tiny)], COLUMNS="40")
    assert "rank" in shown
    assert "│" in shown
    assert "…" in shown  # the long document is cut to the width
    assert "4 documents in" in shown


def test_progress_bar_on_a_terminal_only(tiny, dataset):
    command = [*CLI, "eval", str(dataset), "--model", str(tiny)]
    assert "2/2" in on_a_terminal(command)
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


def test_colour_on_a_terminal_only():
    command = [*CLI, "rank", "--help"]
    colour = re.compile(r"\x1b\[(\d+;)*3\d")
    assert colour.search(on_a_terminal(command))
    assert not colour.search(on_a_terminal(command, NO_COLOR="1"))
    assert b"\x1b" not in subprocess.run(command, capture_output=True, check=True).stdout


def _read_all(terminal: int) -> str:
    chunks = []
    try:
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    os.close(terminal)
    return b"".join(chunks).decode()
