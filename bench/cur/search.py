"""Budgeted search on real scores: recall of the exact best k at equal numbers of calls, and the time of searching.

Scores are MaxSim of all-MiniLM-L6-v2 for SciFact claims and all 5,183 abstracts: 809 anchor queries, 300 test queries.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrerank import CURIndex, ops
from fastrerank.search.tuning import Curve, chart, recall

BUDGETS = {10: [50, 100, 200, 500], 100: [100, 200, 500]}
SCIFACT = "scifact-bm25-top100.jsonl.gz"
Matrix = NDArray[Any]


def run(
    data: Path, storages: tuple[str, ...], json_file: Path | None, picture: Path | None, command: str, part: str
) -> None:
    """Print the tables, and write them; raises FileNotFoundError where the data is missing."""
    folder = data / "cur"
    for path in (folder / "scifact_anchor.npy", folder / "scifact_test.npy", data / SCIFACT):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: give the folder that holds it with --data")
    anchors = np.load(folder / "scifact_anchor.npy").astype(np.float32)
    exact = np.load(folder / "scifact_test.npy").astype(np.float32)
    curves: list[Curve] = []
    timings: list[dict[str, Any]] = []
    if part == "large":
        storages, timings = (), [_large()]
    for storage in storages:
        index = CURIndex.from_scores(anchors, storage=storage)
        print(f"{storage}: {index.settings}")
        if part != "time":
            curves += _curves(index, exact, f"CURIndex, {storage}")
            curves += _curves(index, exact, f"CURIndex, {storage}, 5 rounds", rounds=5)
        if part != "recall":
            timings += [_timed(index, exact, budget, storage) for budget in (100, 200, 500)]
    if part in ("recall", "all"):
        plain = CURIndex.from_scores(anchors, anchors="random", ridge=0)
        curves += _curves(plain, exact, "ANNCUR, pseudo-inverse", rounds=2, first=0.5)
        curves += _bm25(data, exact)
    for curve in curves:
        cells = "  ".join(f"{b}: {r:.4f}" for b, r in zip(curve.budgets, curve.recalls, strict=True))
        print(f"recall@{curve.k:<4d} {curve.name:34s} {cells}   ({curve.queries} queries)")
    for row in timings:
        print(
            f"{row['storage']}, budget {row['budget']}: {row['ms']:.1f} ms per query alone, of which scan "
            f"{row['scan_ms']:.1f}, fit {row['fit_ms']:.1f}; "
            f"{row['ms_together']:.2f} ms per query of {row['together']} together"
        )
    if json_file is not None:
        found = {
            "command": command,
            "threads": ops.num_threads(),
            "isa": ops.isa(),
            "numpy": np.__version__,
            "recall": [vars(curve) for curve in curves],
            "time": timings,
        }
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if picture is not None and curves:
        shown = [c for c in curves if c.k == 10 and "5 rounds" not in c.name and "int8" not in c.name]
        picture.write_text(chart(shown, "SciFact: recall of the exact best 10 of 5,183"))


def _curves(index: CURIndex, exact: Matrix, name: str, **options: Any) -> list[Curve]:
    """A curve for each k; what is scored depends on the budget alone, so both are read off one search."""
    found: dict[int, list[float]] = {k: [] for k in BUDGETS}
    for budget in sorted({budget for budgets in BUDGETS.values() for budget in budgets}):
        most = max(k for k, budgets in BUDGETS.items() if budget in budgets)
        ids, _ = index.search_many(lambda query, item: exact[query, item], len(exact), most, budget, **options)
        for k, budgets in BUDGETS.items():
            if budget in budgets:
                found[k].append(recall(ids[:, :k], exact))
    return [Curve(k, budgets, found[k], len(exact), name) for k, budgets in BUDGETS.items()]


def _bm25(data: Path, exact: Matrix) -> list[Curve]:
    """Retrieve and rerank: the data holds 100 BM25 candidates of the first 100 test queries, so budgets end there."""
    places = {
        docid: place for place, docid in enumerate(json.loads((data / "cur" / "scifact_docids.json").read_text()))
    }
    with gzip.open(data / SCIFACT, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    lists = [[places[c["docid"]] for c in row["candidates"]] for row in rows]
    some = exact[: len(lists)]
    own = np.mean([some[i, ids].max() for i, ids in enumerate(lists)])
    other = np.mean([some[i - 1, ids].max() for i, ids in enumerate(lists)])
    if own <= other:
        raise ValueError("the rows of scifact_test.npy are not the queries of the SciFact file, in its order")
    curves = []
    for k, budgets in BUDGETS.items():
        used = [budget for budget in budgets if k <= budget <= 100]
        found = []
        for budget in used:
            best = np.full((len(lists), k), -1)
            for row, ids in enumerate(lists):
                kept = np.array(ids[:budget])
                order = kept[np.argsort(-some[row, kept], kind="stable")][:k]
                best[row, : len(order)] = order
            found.append(recall(best, some))
        curves.append(Curve(k, used, found, len(lists), "BM25 candidates, reranked"))
    return curves


def _large() -> dict[str, Any]:
    """One query over a million items of width 256 in int8, scores of rank 64 with noise: the scan against the rest."""
    random = np.random.default_rng(0)
    left, right = random.normal(size=(257, 64)).astype(np.float32), random.normal(size=(64, 1_000_000))
    scores = left @ right.astype(np.float32)
    scores += 0.3 * random.standard_normal(scores.shape, dtype=np.float32)
    index = CURIndex.from_scores(scores[:256], storage="int8", ridge=0.02, anchors="random")
    exact = np.broadcast_to(scores[256], (64, scores.shape[1]))
    return _timed(index, exact, 200, "1,000,000 x 256 int8", together=8)


def _timed(index: CURIndex, exact: Matrix, budget: int, storage: str, together: int = 64) -> dict[str, Any]:
    """Milliseconds per query without the scorer, whose scores are looked up; medians of 6 after 3 to warm up."""

    def measured(work: Callable[[int], None]) -> tuple[float, list[dict[str, float]]]:
        times, parts = [], []
        for turn in range(9):
            begin = time.perf_counter()
            work(turn)
            times.append(time.perf_counter() - begin - index.last_usage["seconds"]["scorer"])
            parts.append(index.last_usage["seconds"])
        return 1e3 * median(times[3:]), parts[3:]

    alone, parts = measured(lambda turn: _none(index.search(lambda ids: exact[turn][ids], 10, budget)))
    many, _ = measured(lambda _: _none(index.search_many(lambda q, i: exact[q, i], together, 10, budget)))
    stages = {f"{name}_ms": 1e3 * median(part[name] for part in parts) for name in ("scan", "fit")}
    return {
        "storage": storage,
        "budget": budget,
        "ms": alone,
        **stages,
        "together": together,
        "ms_together": many / together,
    }


def _none(_: object) -> None:
    return None
