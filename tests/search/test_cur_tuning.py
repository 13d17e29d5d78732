"""Tuning, recall curves, candidates from graphs, and the commands of `fastrerank index`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from cur_data import low_rank, noisy

import fastrerank
from fastrerank.cli import commands as cli
from fastrerank.search.ridge import held_out_ridge
from fastrerank.search.tuning import Curve, chart, hold_out, recall, recall_curve, tune


def test_the_ridge_follows_the_noise() -> None:
    assert held_out_ridge(low_rank(0, 50, 500, 5)) == 1e-6
    assert held_out_ridge(noisy(0, 100, 500, noise=0.3)) >= 0.01


def test_low_rank_scores_are_found_with_the_chosen_ridge() -> None:
    exact = low_rank(1, 60, 800, 8)
    index = fastrerank.CURIndex.from_scores(exact[:50])
    ids, _ = index.search_many(lambda q, i: exact[50 + q, i], 10, k=10, budget=60)
    assert recall(ids, exact[50:]) == 1.0


def test_tune_sets_the_best_settings_and_changes_nothing_else() -> None:
    index = fastrerank.CURIndex.from_scores(noisy(1, 60, 400))
    before = index.vectors()
    trials = index.tune(k=5, budget=40, queries=20)
    assert index.settings == trials[0].settings
    assert trials[0].recall >= max(trial.recall for trial in trials) - 0.1
    assert len({trial.settings for trial in trials}) == len(trials)
    np.testing.assert_array_equal(index.vectors(), before)
    rest, exact = hold_out(index, 20)
    assert rest.width == 40
    assert recall_curve(rest, exact, 5, [40]).recalls == [pytest.approx(trials[0].recall)]


def test_held_out_queries_are_not_in_the_index_they_test() -> None:
    scores = noisy(2, 10, 50)
    rest, exact = hold_out(fastrerank.CURIndex.from_scores(scores), 4)
    assert sorted(map(bytes, [*rest.vectors(), *exact])) == sorted(map(bytes, scores))
    with pytest.raises(ValueError, match="no anchor queries to hold out"):
        tune(fastrerank.CURIndex.from_vectors(np.ones((5, 2))), 1, 2)


def test_recall_rises_to_one_and_is_drawn() -> None:
    scores = noisy(3, 60, 300)
    index = fastrerank.CURIndex.from_scores(scores[:50])
    curve = recall_curve(index, scores[50:], 10, [5, 20, 100, 300])
    assert curve.budgets == [20, 100, 300]
    assert curve.recalls[0] < curve.recalls[1] <= curve.recalls[2] == 1.0
    picture = ElementTree.fromstring(chart([curve, Curve(10, [20, 100], [0.1, 0.2], 3, "a & b")], "T < 1"))
    assert len(picture.findall(".//{*}circle")) == 5


@pytest.mark.parametrize(
    ("kind", "module", "package"), [("faiss", "faiss", "faiss-cpu"), ("usearch", "usearch.index", "usearch")]
)
def test_candidates_of_a_graph(kind: str, module: str, package: str, tmp_path: Path) -> None:
    library = pytest.importorskip(module, reason=f"{package} is not installed")
    if kind == "faiss":
        library.omp_set_num_threads(1)  # more would wait for each other in busy loops, in searches this small
    scores = noisy(4, 70, 600)
    for storage in ("float32", "int8"):
        index = fastrerank.CURIndex.from_scores(scores[:50], candidates=kind, storage=storage, ridge=0.02)
        exact = fastrerank.CURIndex.from_scores(scores[:50], storage=storage, ridge=0.02)
        found, best = (
            one.search_many(lambda q, i: scores[50 + q, i], 20, k=10, budget=200)[0] for one in (index, exact)
        )
        assert recall(found, scores[50:]) >= recall(best, scores[50:]) - 0.02
        assert all(len(set(line)) == 10 for line in found.tolist())
    # The graph is made anew where items come and go, and by an index that was loaded.
    index = fastrerank.CURIndex.from_scores(scores[:50, :400], candidates=kind, ridge=0.02)
    index.search(lambda ids: scores[50, ids], k=10, budget=60)
    index.add(scores[:50, 400:])
    index.remove(range(30))
    index.save(tmp_path / "index")
    kept = scores[50:].copy()
    kept[:, :30] = -np.inf
    for one in (index, fastrerank.CURIndex.load(tmp_path / "index", candidates=kind)):
        ids, _ = one.search_many(lambda q, i: scores[50 + q, i], 20, k=10, budget=200)
        assert ids.min() >= 30
        assert ids.max() >= 400
        assert recall(ids, kept) >= 0.9


@pytest.mark.parametrize(
    ("kind", "module", "package"), [("faiss", "faiss", "faiss-cpu"), ("usearch", "usearch.index", "usearch")]
)
def test_a_graph_without_its_package_is_refused(
    kind: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"candidates='{kind}' needs {package}.*pip install {package}"):
        fastrerank.CURIndex.from_scores(np.ones((2, 9)), candidates=kind)


def test_unknown_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must be one of scan, faiss, usearch"):
        fastrerank.CURIndex.from_scores(np.ones((2, 9)), candidates="magic")


def test_the_commands_build_search_tune_and_report(minilm: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["fleas", "jupiter", "bread", "violins", "rivers", "chess", "tax", "snow"]
    items, queries = tmp_path / "items.txt", tmp_path / "queries.txt"
    items.write_text("".join(f"a text about {a} and {b}\n" for a in words for b in words))
    queries.write_text("".join(f"what of {a}\n" for a in words))
    folder, model = str(tmp_path / "index"), ["--model", str(minilm), "--method", "embedding"]
    assert cli.main(["index", "build", folder, "--items", str(items), "--queries", str(queries), *model]) == 0
    assert not (tmp_path / "index" / "build").exists()
    capsys.readouterr()
    assert cli.main(["index", "info", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["width"], found["texts"]) == (64, 8, True)
    assert (
        cli.main(["index", "search", folder, "the game of chess", *model, "--budget", "40", "--top-k", "3", "--json"])
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["usage"]["calls"] == 40
    assert "chess" in answer["hits"][0]["text"]
    assert cli.main(["index", "tune", folder, "--budget", "20", "--top-k", "3", "--queries", "4", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)[0]
    assert vars(fastrerank.CURIndex.load(folder).settings) == {n: chosen[n] for n in ("rounds", "first", "ridge")}
    plot = tmp_path / "plot.svg"
    assert cli.main(["index", "report", folder, "--top-k", "3", "--budgets", "10,30", "--out", str(plot)]) == 0
    assert "budget\tadaptive search\tanchors, then rerank" in capsys.readouterr().out
    ElementTree.fromstring(plot.read_text())
    assert cli.main(["index", "search", str(tmp_path), "q", *model]) == 1
    assert "holds no index" in capsys.readouterr().err
    assert cli.main(["index", "build", folder, "--items", "nothing.txt", "--queries", str(queries), *model]) == 2


def test_the_index_is_imported_without_torch() -> None:
    code = "import sys, fastrerank; fastrerank.CURIndex; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
