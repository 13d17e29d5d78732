"""The comparison of attention read-outs runs from its command to its JSON, on tiny shapes."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
from typer.testing import CliRunner

from bench.harness import timing
from bench.harness.results import write_json
from bench.icr import engines as icr_engines
from bench.icr import gpu as gpu_icr
from bench.icr.gpu_texts import Ours, Published, TokenisedOnce
from bench.run import app


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines' processes are forked from one that has imported what they need: eight times that takes half a minute."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*icr_engines.FastRerank.modules])
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("forked")
def test_cpu(tmp_path: Path, data_folder: Path) -> None:
    found = tmp_path / "icr.json"
    command = ["icr", "--tiny", "--dtype", "float32", "--rounds", "1", "--no-memory", "--threads", "1"]
    result = CliRunner().invoke(
        app, [*command, "--data", str(data_folder), "--cache", str(tmp_path), "--json", str(found)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(found.read_text())["results"]["float32"]["rows"]
    assert [row["state"] for row in rows] == ["ok"] * 5
    assert all(row["seconds"] for row in rows)
    checked = {row["name"]: row["check"] for row in rows if row["check"]}
    assert set(checked) == {"eager-float32", "two-pass-float32", "fastrerank-float32"}


class Log:
    def print(self, *_: object, **__: object) -> None:
        pass


def gpu_options(folder: Path, **changes: Any) -> gpu_icr.Options:
    given: dict[str, Any] = {
        "device": "cpu",
        "tiny": True,
        "rounds": 2,
        "parts": gpu_icr.PARTS,
        "data": (folder / "nowhere",),
        "cache": folder,
        "command": "python -m bench.run icr",
    }
    return gpu_icr.Options(**(given | changes))


@pytest.fixture(scope="module")
def gpu_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[gpu_icr._Bench, Path]:
    """The benchmark of a GPU, run on tiny shapes on this CPU, and the JSON that it wrote."""
    folder = tmp_path_factory.mktemp("icr")
    made: list[gpu_icr._Bench] = []

    class Kept(gpu_icr._Bench):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_icr, "_Bench", Kept)
        gpu_icr.run(gpu_options(folder), Log(), lambda found: write_json(found, folder / "gpu.json"))
    return made[0], folder / "gpu.json"


def test_gpu_form_on_a_cpu(gpu_form: tuple[gpu_icr._Bench, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bench, file = gpu_form
    assert bench.found.sound, [(row.name, row.detail) for row in bench.found.text_rows]
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 2 * 4
    assert len(found["text_rows"]) == 2 * 5
    assert str(file.parent) not in found["texts"]
    assert all(len(row["seconds"]) == 2 for row in (*found["rows"], *found["text_rows"]))
    for row in found["text_rows"]:
        assert len(row["tokenising"]) == 2
        assert all(0 < part < whole for part, whole in zip(row["tokenising"], row["seconds"], strict=True))
        assert (row["score_error"] is None) == (row["name"] == "fastrerank-core")
    gpu_icr.show(bench.found, markdown=True)
    printed = capsys.readouterr().out
    assert "from token ids to masses" in printed
    assert "from texts to the documents' scores" in printed
    whole, few = (bench._body(layers).state_dict() for layers in (3, 2))
    assert all(torch.equal(whole[name], few[name]) for name in few)


def test_what_is_wrong_from_texts_is_not_timed(
    gpu_form: tuple[gpu_icr._Bench, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _ = gpu_form
    engine = Ours(bench._tokenizer, bench._scorers["fastrerank"])
    query, documents = bench._requests[0]
    right = engine.explained(query, documents[:4])
    masses = [1.2 * some for some in right.masses]
    wrong = {
        "": right,
        "error": right._replace(masses=masses, scores=1.2 * right.scores),
        "scores are not": right._replace(scores=right.scores[::-1]),
        "spans: other tokens": right._replace(prompt=replace(right.prompt, spans=right.prompt.spans + 1)),
    }
    for detail, asked in wrong.items():
        row = gpu_icr.Row(engine.name, 4, 0)
        bench._check(row, engine, asked)
        assert (row.state, row.detail[: len(detail)]) == ("WRONG" if detail else "ok", detail)

    with monkeypatch.context() as patch:
        patch.setattr(bench.found, "text_bounds", {})
        row = gpu_icr.Row(engine.name, 4, 0)
        bench._check(row, engine, right)
        assert (row.state, bench.found.text_bounds) == ("failed", {})  # no bound of its own making

    def unproved(self: Published, text: str, place: int) -> None:
        right_prove(self, text, place + 1)

    right_prove = Published._prove
    monkeypatch.setattr(Published, "_prove", unproved)
    bench.found.text_rows.clear()
    bench.texts(2)
    states = {row.name: (row.state, len(row.seconds)) for row in bench.found.text_rows}
    assert states.pop("published") == ("failed", 0)
    assert set(states.values()) == {("ok", 2)}


def test_published_text_work_is_quadratic_and_finds_the_same_tokens(gpu_form: tuple[gpu_icr._Bench, Path]) -> None:
    bench, _ = gpu_form
    query = " who knows? "
    documents = ["The owl [3] sleeps.", "x", "7 mice (12 owls)", "{braces}\nand a second line", "東京は大きい"]
    counted: list[int] = []

    class Counting:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __call__(self, text: str, **given: Any) -> Any:
            counted.append(len(text))
            return self.tokenizer(text, **given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

    sizes = []
    for copies in (1, 2, 4):
        some = documents * copies
        counted.clear()
        published = Published(Counting(bench._tokenizer), bench._two_pass).prompt(query, some)
        sizes.append(sum(counted))
        once = TokenisedOnce(bench._tokenizer, bench._two_pass).prompt(query, some)
        ours = Ours(bench._tokenizer, bench._scorers["fastrerank"]).explained(query, some).prompt
        for name in ("context", "tail", "empty_tail", "spans"):
            np.testing.assert_array_equal(getattr(published, name), getattr(once, name), err_msg=name)
            np.testing.assert_array_equal(getattr(published, name), getattr(ours, name), err_msg=name)
    assert (sizes[2] - sizes[1]) > 2.5 * (sizes[1] - sizes[0])  # 2 times if it were linear, 4 in the limit


def test_what_the_gpu_form_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="part 'masses' is unknown; valid are ids, texts"):
        gpu_icr.run(gpu_options(tmp_path, parts=("masses",)), Log())
    monkeypatch.setattr(gpu_icr.gpu_icr_texts, "make_tokenizer", lambda *_: None)
    monkeypatch.setattr(gpu_icr.gpu_icr_texts, "requests", lambda *_: [("query", ["document"])] * 3)
    with pytest.raises(ValueError, match="--rounds must be at most 2"):
        gpu_icr.run(gpu_options(tmp_path, rounds=3), Log())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["--device", "cuda", "icr", "--tiny"])
    assert result.exit_code == 2
    assert "finds no usable CUDA device" in result.output


def test_two_pass_is_eager() -> None:
    """The rival that recomputes the rows' attention finds what materialised attention holds."""
    import decoders

    icr_engines.register_two_pass()
    prompt = icr_engines.random_prompt(200, decoders.VOCABULARY)
    found = []
    for kind, attention in ((icr_engines.Eager, "eager"), (icr_engines.TwoPass, "bench-two-pass")):
        engine = kind(Path(), Path(), 1)
        engine._model = decoders.build("qwen3").model
        engine._model.set_attn_implementation(attention)
        found.append(engine.scores(prompt))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max()
    assert torch.is_tensor(engine._model.norm.weight)


def test_core_heads() -> None:
    assert max(icr_engines.core_heads(24, 14)) == (10, 13)
    assert len(icr_engines.core_heads(32, 32)) == 8
    assert icr_engines.increments([(1, 10), (2, 20), (4, 44)]) == [10.0, 12.0]
