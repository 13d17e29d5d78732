"""The LLM benchmark on tiny shapes: all engines score the same prompts, checked first; CPU and GPU form, end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
import torch
from typer.testing import CliRunner

from bench import run
from bench.cross_encoder import gpu_models
from bench.everything import comparison as gpu
from bench.everything import report as gpu_report
from bench.harness.timing import EngineError, Worker, _Verbs, tie_band
from bench.llm import cpu as llm
from bench.llm import engines as llm_engines
from bench.llm import gpu as gpu_llm
from bench.llm import models as llm_models
from bench.llm import report as llm_report

CPU = torch.device("cpu")


class Inline:
    """A worker in this process: spawning one per engine would take a minute."""

    def __init__(self, name: str, checkpoint: Path, cache: Path, *, threads: int) -> None:
        self.verbs = _Verbs(llm_engines.ENGINES[name](checkpoint, cache, threads))

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def call(self, verb: str, *arguments: Any) -> Any:
        try:
            return getattr(self.verbs, verb)(*arguments)
        except Exception as error:
            raise EngineError(f"{verb}: {type(error).__name__}: {error}") from error


class Log:
    def print(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-llm")


@pytest.fixture(scope="module")
def texts(cache: Path) -> Path:
    return gpu_models.synthetic(cache, documents=40)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(llm, "Worker", Inline)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the rivals set it, in what is a process of their own in a real run


def options(cache: Path, texts: Path, **changes: Any) -> llm.Options:
    given: dict[str, Any] = {
        "dtypes": ("float32",),
        "documents": 12,
        "rounds": 2,
        "threads": 1,
        "memory": False,
        "tiny": True,
        "data": texts,
        "cache": cache,
        "command": "python -m bench.run llm",
    }
    return llm.Options(**(given | changes))


@pytest.mark.usefixtures("inline")
def test_the_command_measures_every_engine_and_keeps_the_other_precision(cache: Path, texts: Path) -> None:
    file = cache / "cpu-llm.json"
    for dtype in ("bfloat16", "float32"):
        given = ["llm", "--tiny", "--docs", "12", "--rounds", "2", "--threads", "1", "--dtype", dtype]
        given += ["--data", str(texts), "--cache", str(cache), "--json", str(file), "--markdown"]
        done = CliRunner().invoke(run.app, given)
        assert done.exit_code == 0, (done.output, done.exception)
        assert f"**{dtype}: from token ids to scores**" in done.output
        assert f"**{dtype}: peak memory**" in done.output
    found = json.loads(file.read_text())
    assert found["workload"]["documents"] == 12
    assert set(found["results"]) == {"float32", "bfloat16"}
    for dtype, result in found["results"].items():
        assert result["command"].startswith("python -m bench.run")
        assert {"torch", "transformers", "sentence-transformers"} <= set(result["versions"])
        rows = {row["name"]: row for row in result["rows"]}
        assert [(row["state"], row["detail"]) for row in rows.values()] == [("ok", "")] * 4
        assert all(len(row["seconds"]) == 2 for row in rows.values())
        assert all(row["memory"]["imports"] <= row["memory"]["scores"] for row in rows.values())
        shared, apart = rows[f"fastrerank-{dtype}"], rows[f"fastrerank-unshared-{dtype}"]
        assert apart["tokens"] == rows[f"transformers-{dtype}"]["tokens"] == found["workload"]["tokens"]
        assert shared["tokens"] < 0.7 * apart["tokens"]
        assert shared["flop"] < apart["flop"] < rows[f"transformers-{dtype}"]["flop"]
        assert rows[f"sentence-transformers-{dtype}"]["tokenise_seconds"] > 0
        assert result["floors"]["operations"] > 0


@pytest.mark.usefixtures("inline")
def test_wrong_and_failing_engines_are_not_timed(cache: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llm_engines.FastRerank.scores
    off = 1e-3 * np.arange(12) % 2  # far less than a rounding of bfloat16, far more than one of float32

    def wrong(self: Any, pairs: Any) -> Any:
        return right(self, pairs) + off[: len(pairs.ids)]

    llm_models.build(llm_models.tiny(llm_models.CPU_SHAPE), cache, texts, "float32")
    monkeypatch.setattr(llm_engines.FastRerankUnshared, "scores", wrong)
    monkeypatch.setattr(llm_models, "SUFFIX", "<|im_end|>")
    found = llm.run(options(cache, texts), Log())
    rows = {row.name: row for row in found.results["float32"].rows}
    assert rows["fastrerank-float32"].state == "ok"
    assert rows["fastrerank-unshared-float32"].state == "WRONG"
    assert "at most" in rows["fastrerank-unshared-float32"].detail
    assert not rows["fastrerank-unshared-float32"].seconds
    # The folder's chat template was written with the whole suffix.
    assert rows["sentence-transformers-float32"].state == "failed"
    assert "renders other prompts" in rows["sentence-transformers-float32"].detail
    assert not found.sound
    assert llm_report.tables(found)


def test_an_engine_runs_in_a_process_of_its_own_and_says_what_it_took(cache: Path, texts: Path) -> None:
    model = llm_models.build(llm_models.tiny(llm_models.CPU_SHAPE), cache, texts, "float32")
    with Worker("llm/fastrerank-float32", model.path, cache, threads=1) as worker:
        worker.call("imports")
        imports = worker.call("peak_bytes")
        worker.call("load")
        worker.call("take", model.workload(texts, 12))
        scores = worker.call("scores")[1]
        assert np.isfinite(scores).all()
        assert imports <= worker.call("peak_bytes")
        assert worker.call("spent")["forwards"] == 1


def test_the_gpu_form_checks_and_times_all_shapes(cache: Path, texts: Path) -> None:
    given: dict[str, Any] = {
        "device": "cpu",
        "tiny": True,
        "rounds": 2,
        "parts": ("ceilings", "llm"),
        "models": (),
        "llms": ("qwen3-0.6b", "llama-3.1-8b"),
        "compile": False,
        "seconds": 0.0,
        "data": (texts,),
        "cache": cache,
        "command": "python -m bench.run llm",
    }
    saved = []
    found = gpu.run(gpu.Options(**given), Log(), lambda one: saved.append(len(one.llms)))
    assert found.sound
    assert saved[-1] == 2
    for model in found.llms:
        assert [(row.name, row.detail) for row in model.rows] == [(kind.name, "") for kind in gpu_llm.ENGINES]
        small, large = gpu_llm.TINY_SIZES
        for row in model.rows:
            assert [len(row.seconds[size]) for size in (small, large)] == [2, 2]
            assert (row.batch is None) == row.name.startswith("fastrerank")
        theirs, ours, apart = model.rows[0], model.rows[2], model.rows[3]
        assert theirs.tokens == apart.tokens == model.tokens
        assert ours.tokens[large] < 0.7 * apart.tokens[large]
        assert ours.prefix_tokens[large] > 0
    text = str(gpu_report.tables(found))
    assert "llama-3.1-8b: 30 documents, from token ids to scores" in text


def test_wrong_scores_of_the_gpu_form_are_not_timed(cache: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_llm.FastRerank.scores
    monkeypatch.setattr(gpu_llm.FastRerankUnshared, "scores", lambda self, pairs: right(self, pairs)[::-1].copy())
    monkeypatch.setattr(gpu_llm.SentenceTransformers, "tokenise", lambda *_: 1 / 0)
    found = gpu_llm.measure("qwen3-4b", None, texts, cache, CPU, tiny=True, rounds=1, say=lambda _: None)
    rows = {row.name: row for row in found.rows}
    assert rows["fastrerank-unshared"].state == "WRONG"
    assert rows["sentence-transformers"].state == "failed"
    assert "ZeroDivisionError" in rows["sentence-transformers"].detail
    assert not rows["fastrerank-unshared"].seconds
    assert rows["fastrerank"].seconds


def test_the_cuda_command_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = CliRunner().invoke(run.app, ["--device", "cuda", "llm"])
    assert done.exit_code == 1
    assert "no usable CUDA device" in done.output


def test_prompts_are_qwen3_rerankers(cache: Path, texts: Path) -> None:
    for shape in (llm_models.CPU_SHAPE, llm_models.SHAPES["llama-3.1-8b"]):
        model = llm_models.build(shape, cache, texts, "bfloat16", weights=False)
        pairs, tokenizer = model.workload(texts, 12), model.tokenizer()
        first = shape.first_special
        for ids, document in zip(pairs.ids, pairs.documents, strict=True):
            text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            assert text == (
                "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
                'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
                "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
                f"<Query>: {pairs.query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
                "</think>\n\n"
            )
            special = [first + 1, first + 2, first + 1, first + 2, first + 1, first + 24, first + 25]
            assert [i for i in ids.tolist() if i >= first] == special
            assert max(ids) < shape.settings["vocab_size"]
        assert [tokenizer.id_to_token(label) for label in model.labels] == ["yes", "no"]


def test_operations_are_counted_prompt_by_prompt() -> None:
    shape = llm_models.tiny(llm_models.SHAPES["qwen3-0.6b"])
    s, lengths, prefix = shape.settings, np.array([5, 9, 6]), 4
    hidden, q, kv, inner = s["hidden_size"], 4 * 16, 2 * 16, s["intermediate_size"]
    keys, rest = 2 * hidden * kv, 2 * hidden * q + 3 * hidden * inner
    whole = shared = 0
    for layer in range(s["num_hidden_layers"]):
        for length in lengths.tolist():
            whole += sum(keys + rest + 2 * q * (place + 1) for place in range(length))
        last = layer == s["num_hidden_layers"] - 1
        read = [(place + 1, False) for place in range(prefix)]
        read += [(place + 1, place == n - 1) for n in lengths.tolist() for place in range(prefix, n)]
        shared += sum(keys + (rest + 2 * q * seen if not last or end else 0) for seen, end in read)
    assert shape.flop(lengths, 7) == 2 * (whole + 3 * 7 * hidden)
    assert shape.shared_flop([(prefix, lengths)]) == 2 * (shared + 3 * 2 * hidden)


def test_swapped_documents_are_found() -> None:
    assert tie_band(np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0])) == {"swaps": 1.0, "widest_swap": 1.0}
    assert tie_band(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == {"swaps": 0.0, "widest_swap": 0.0}
