"""Heads found from labelled queries: the published rules against eager attention, resuming, preset files, the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_models import Eager, filtered, save

from fastrerank.cli import commands as cli
from fastrerank.data.datasets import Candidate, JudgedQuery
from fastrerank.rerankers.attention import AttentionReranker
from fastrerank.rerankers.attention_heads import HeadScores, score_heads

TEXTS = ["the owl sleeps", "mice hunt by night", "rank the passages", "a query and documents"]


def query(number: int, *grades: int) -> JudgedQuery:
    names = [f"{number}.{i}" for i in range(len(grades))]
    candidates = tuple(Candidate(name, f"{TEXTS[(number + i) % 4]} {i}") for i, name in enumerate(names))
    return JudgedQuery(str(number), f"where is {number}?", candidates, dict(zip(names, grades, strict=True)))


QUERIES = [query(0, 0, 1, 0), query(1, 2, 0, 1, 0), query(2, 0, 0), query(3, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


def expected(folder: Path, rule: str, some: JudgedQuery) -> np.ndarray:
    """The rule's score of every head, from the attention of eager forwards."""
    preset = "core" if rule == "contrast" else "qrhead"
    prompts = AttentionReranker(folder, preset=preset, heads=[(0, 0)], dtype="float32").prompts
    eager = Eager(folder, prompts, None)
    places = np.arange(len(some.candidates))
    if rule != "contrast":
        places = np.random.default_rng(42).permutation(places)
    texts = [some.candidates[i].text for i in places]
    grades = np.array([some.judgements[some.candidates[i].docid] for i in places])
    found = eager.by_head(some.query, texts, extra=0)
    result = np.zeros((3, 4))
    if rule != "contrast":
        found = [a - b for a, b in zip(found, eager.by_head("N/A", texts, extra=0), strict=True)]
    for layer, head in np.ndindex(3, 4):
        if rule == "contrast":
            sums = np.array([one[layer, head].sum() for one in found])
            chances = []
            for positive in sums[grades > 0]:
                both = np.exp(np.array([positive, *sums[grades == 0]]) / 0.1)
                chances.append(both[0] / both.sum())
            result[layer, head] = np.mean(chances)
            continue
        scores = np.array([filtered(one[layer, head]) for one in found])
        if rule == "gold":
            result[layer, head] = scores[grades > 0].sum()
        else:
            gains = grades[np.argsort(-scores, kind="stable")]
            discounts = 1 / np.log2(np.arange(2, len(gains) + 2))
            result[layer, head] = (gains * discounts).sum() / (np.sort(grades)[::-1] * discounts).sum()
    return result


@pytest.mark.parametrize("rule", ["ndcg", "gold", "contrast"])
def test_rules(folder: Path, rule: str) -> None:
    found = score_heads(folder, QUERIES, rule=rule, dtype="float32")
    usable = [QUERIES[0], QUERIES[1]] + ([] if rule == "contrast" else [QUERIES[3]])
    assert (found.queries, found.skipped) == (len(usable), 4 - len(usable))
    wanted = np.mean([expected(folder, rule, one) for one in usable], axis=0)
    np.testing.assert_allclose(found.scores, wanted, rtol=0, atol=2e-5)


def test_resumes_where_it_ended(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"

    class Stop(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        score_heads(folder, QUERIES, state=state, progress=stop, dtype="float32")
    state.write_text(state.read_text() + '{"qid": "2", "sco')  # ended while it wrote
    calls: list[tuple[int, int]] = []
    found = score_heads(folder, QUERIES, state=state, progress=lambda *done: calls.append(done), dtype="float32")
    assert calls == [(n, 4) for n in (1, 2, 3, 4)]
    assert len(state.read_text().splitlines()) == 5
    whole = score_heads(folder, QUERIES, dtype="float32")
    np.testing.assert_array_equal(found.scores, whole.scores)
    with pytest.raises(ValueError, match="holds the scores of another run"):
        score_heads(folder, QUERIES, rule="gold", state=state, dtype="float32")


def test_preset_file(folder: Path, tmp_path: Path) -> None:
    scores = HeadScores(np.array([[0.1, 0.9], [0.9, 0.2]]), 7, 0, {"preset": "core", "rule": "contrast"})
    assert scores.best(3) == [(0, 1), (1, 0), (1, 1)]
    assert scores.save(tmp_path / "found.toml", 2) == [(0, 1), (1, 0)]
    reranker = AttentionReranker(folder, preset="core", heads=tmp_path / "found.toml", dtype="float32")
    assert reranker.scorer.heads == ((0, 1), (1, 0))
    assert reranker.scorer.layers == 2


def test_refusals(folder: Path) -> None:
    with pytest.raises(ValueError, match="rule must be one of ndcg, gold, contrast, got 'x'"):
        score_heads(folder, QUERIES, rule="x")
    with pytest.raises(ValueError, match="none of the 1 queries can be used"):
        score_heads(folder, QUERIES[2:3], dtype="float32")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        score_heads(folder, QUERIES, rule="contrast", temperature=0.0)


def test_command_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    data, found, page = tmp_path / "data.jsonl", tmp_path / "found.toml", tmp_path / "page.html"
    rows = [
        {
            "qid": one.qid,
            "query": one.query,
            "candidates": [{"docid": c.docid, "text": c.text, "rel": one.judgements[c.docid]} for c in one.candidates],
        }
        for one in QUERIES
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", str(folder), "--dtype", "float32"]
    command = ["heads", str(data), "--save", str(found), "--rule", "contrast", "--top", "2", "--json", *model]
    assert cli.main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["heads"]) == 2
    assert not found.with_suffix(".progress.jsonl").exists()
    (tmp_path / "texts.txt").write_text("the owl <b>\nmice & cats\n")
    ask = ["rank", "who?", str(tmp_path / "texts.txt"), "--method", "core", "--heads", str(found), *model]
    assert cli.main([*ask, "--explain-html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "owl" in "".join(lines)
    written = page.read_text()
    assert "&lt;" in written
    assert "<b>" not in written
    assert "http" not in written.replace("http-equiv", "")
    assert cli.main([*ask, "--json", "--explain"]) == 0
    assert "tokens" in json.loads(capsys.readouterr().out)[0]
    pairs = ["rank", "who?", str(tmp_path / "texts.txt"), "--method", "icr", "--heads", "0-1,1-2", *model]
    assert cli.main(pairs) == 0
    assert cli.main([*ask[:4], "core", *model]) == 1  # no published heads
    assert "fastrerank heads" in capsys.readouterr().err
