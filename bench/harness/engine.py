"""The protocol of an engine under comparison, and padded length-sorted batches for those that need them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bench.harness.data import Pairs, PairTokenizer

BATCHES = (4, 8, 16, 32)
Scores = NDArray[np.float32]
Ids = NDArray[np.int64]


class Engine(ABC):
    """One inference engine at one precision.

    Class attributes: `name` (unique), `precision`, `package` (the distribution whose version is reported), `modules`
    (what must be importable), `setup` (one line for the report), `settings` (configurations that the sweep tries, none
    if there is nothing to choose), `calibrated` (needs sample data), `on_text` (its scores include tokenising).
    """

    name: ClassVar[str]
    precision: ClassVar[str]
    package: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    setup: ClassVar[str]
    settings: ClassVar[tuple[dict[str, Any], ...]] = ()
    calibrated: ClassVar[bool] = False
    on_text: ClassVar[bool] = False

    def __init__(self, checkpoint: Path, cache: Path, threads: int) -> None:
        self.checkpoint, self.cache, self.threads = checkpoint, cache, threads
        self.calibration: Sequence[Pairs] = ()

    @classmethod
    def missing(cls) -> list[str]:
        """Equals the modules that are not installed; empty when the engine can run."""
        return [module for module in cls.modules if importlib.util.find_spec(module) is None]

    @classmethod
    def version(cls) -> str:
        """Equals the version of the engine's package."""
        return importlib.metadata.version(cls.package)

    def convert(self) -> None:  # noqa: B027  (not every engine converts)
        """Writes what `load` needs under `cache`, with `calibration` where data is needed; nothing when it is there."""

    @abstractmethod
    def load(self) -> None:
        """Makes the engine ready to score."""

    def use(self, setting: dict[str, Any]) -> None:  # noqa: B027  (nor has settings)
        """Switches to one of `settings`."""

    @abstractmethod
    def scores(self, pairs: Pairs) -> Scores:
        """Equals the raw logits, float32 (N,), in the order of `pairs`."""

    def rank(self, query: str, documents: list[str]) -> list[tuple[int, float]]:
        """Equals (document index, score) best first, from text: the engine's own call where it has one.

        The rivals that rerank nothing by themselves get the shortest way: `tokenizers`, `scores`, a sort.
        """
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = PairTokenizer(self.checkpoint)
        scores = self.scores(self._tokenizer.pairs(query, documents))
        return [(int(index), float(scores[index])) for index in np.argsort(-scores, kind="stable")]

    def stages(self) -> dict[str, float]:
        """Equals seconds per named stage of the last `rank` or `scores`; empty when the engine does not say."""
        return {}

    def _folder(self, kind: str, *packages: str) -> Path:
        """The cache folder of a conversion, named after the versions that made it."""
        return self.cache / "-".join([kind, *(f"{name}{importlib.metadata.version(name)}" for name in packages)])


class PaddedEngine(Engine):
    """An engine that takes padded batches: pairs sorted by length, `batch` at a time, each padded to its longest."""

    settings = tuple({"batch": batch} for batch in BATCHES)
    batch = 8

    def use(self, setting: dict[str, Any]) -> None:
        self.batch = setting["batch"]

    def scores(self, pairs: Pairs) -> Scores:
        order = np.argsort([-len(row) for row in pairs.ids], kind="stable")
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        out = np.empty(len(order), np.float32)
        for rows, logits in zip(batches, self._run([self._pad(pairs, rows) for rows in batches]), strict=True):
            out[rows] = logits
        return out

    def _pad(self, pairs: Pairs, rows: NDArray[np.intp]) -> dict[str, Ids]:
        width = max(len(pairs.ids[row]) for row in rows)
        inputs = {
            "input_ids": np.full((len(rows), width), self._pad_id, np.int64),
            "attention_mask": np.zeros((len(rows), width), np.int64),
            "token_type_ids": np.zeros((len(rows), width), np.int64),
        }
        for line, row in enumerate(rows):
            length = len(pairs.ids[row])
            inputs["input_ids"][line, :length] = pairs.ids[row]
            inputs["attention_mask"][line, :length] = 1
            inputs["token_type_ids"][line, :length] = pairs.types[row]
        return inputs

    @property
    def _pad_id(self) -> int:
        if not hasattr(self, "_pad_id_value"):
            self._pad_id_value = int(config_of(self.checkpoint)["pad_token_id"])
        return self._pad_id_value

    @abstractmethod
    def _run(self, batches: list[dict[str, Ids]]) -> list[Scores]:
        """Equals the logits, float32 (B,), of each padded batch."""


def config_of(checkpoint: Path) -> dict[str, Any]:
    """Equals the checkpoint's config.json."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config
