"""`CURIndex`: the best k of N items under an expensive scorer, from few of its calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank import ops
from fastrerank.inputs.columns import as_column
from fastrerank.rerankers.base import Reranker
from fastrerank.rerankers.independence import check_independent
from fastrerank.runtime.naming import shortened
from fastrerank.search import contents as state
from fastrerank.search.build import Build, Progress, identity, same_scorer
from fastrerank.search.candidates import candidates_of
from fastrerank.search.checks import as_ids, as_scores, positive, relative_ridge, share
from fastrerank.search.contents import Contents, Settings
from fastrerank.search.making import made
from fastrerank.search.search import Effort, PairScorer, Plan, adaptive_search, best, round_sizes
from fastrerank.search.solver import least_norm
from fastrerank.search.starts import first_items, prior_of
from fastrerank.search.texts import Texts
from fastrerank.search.tuning import Trial, tune

__all__ = ["CURIndex", "Settings"]

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_MEMORY = 1 << 29  # bytes that the fits of one batch of queries may take


class CURIndex:
    """Item vectors, and a search for the items that an expensive scorer likes best.

    Vectors are the items' scores for K anchor queries (`from_scores`, `build`: ANNCUR, arXiv 2210.12579, and ADACUR,
    arXiv 2305.02996) or any embeddings (`from_vectors`: AXN, arXiv 2405.03651). `search` scores some items exactly,
    fits a linear model of the scores on the vectors, scores the items that it likes best, and so on.

    An item's id is its place in the order of adding, and stays when others are removed. One object may be searched
    from many threads, also while another adds or removes: a search sees the items that were there when it began.

    Example:
        >>> random = np.random.default_rng(0)
        >>> scores = random.normal(size=(8, 3)) @ random.normal(size=(3, 500))
        >>> index = CURIndex.from_scores(scores[:7])
        >>> ids, found = index.search(lambda ids: scores[7][ids], k=5, budget=50)
        >>> ids.tolist() == np.argsort(-scores[7])[:5].tolist()
        True
    """

    def __init__(self, contents: Contents, *, candidates: str = "scan") -> None:
        self._contents = contents
        self._candidates_of = candidates_of(candidates)
        self._changing = threading.Lock()
        self._local = threading.local()

    def __repr__(self) -> str:
        held = self._contents
        scorer = f", scorer={shortened(str(held.scorer))!r}" if held.scorer else ""
        return f"CURIndex({self.count} items, {held.kind} of width {self.width}{scorer})"

    @classmethod
    def from_scores(
        cls,
        anchor_scores: npt.ArrayLike,
        *,
        storage: str = "float32",
        scales: str | None = None,
        ridge: float | None = None,
        anchors: str | npt.ArrayLike = "greedy",
        seed: int = 0,
        items: Sequence[str] | None = None,
        candidates: str = "scan",
    ) -> CURIndex:
        """An index whose item vectors are the columns of `anchor_scores`.

        Args:
            anchor_scores: (K, N): scores of N items for K anchor queries, of the scorer that `search` will call. Use
                logits, not probabilities: saturated scores are not low-rank.
            storage: "float32", "bfloat16" or "int8".
            scales: of int8, "item" or "anchor".
            ridge: relative, see `Settings`; 0 is the published pseudo-inverse; None: chosen on held-out queries.
            anchors: items of first rounds: "greedy", "leverage" or "random", or their ids, the first ones first.
            seed: of the random draws.
            items: the N items' texts, for `search_reranker`.
            candidates: "scan" is exact; "faiss" and "usearch" find items in an approximate graph, for N from 10^7 on.

        Raises TypeError, ValueError naming the argument; for NaN and infinity too.

        Example:
            >>> CURIndex.from_scores(np.eye(3, 10), storage="int8").count
            10
        """
        matrix = as_scores("anchor_scores", anchor_scores)
        held = made("scores", matrix, storage, scales, ridge, anchors, seed, items)
        return cls(held, candidates=candidates)

    @classmethod
    def from_vectors(
        cls,
        item_vectors: npt.ArrayLike,
        *,
        storage: str = "float32",
        scales: str | None = None,
        ridge: float | None = None,
        anchors: str | npt.ArrayLike = "greedy",
        seed: int = 0,
        items: Sequence[str] | None = None,
        candidates: str = "scan",
    ) -> CURIndex:
        """An index on given item vectors (N, K), one row per item, such as a dual encoder's: AXN.

        The other arguments are those of `from_scores`.

        Example:
            >>> CURIndex.from_vectors(np.eye(10, 3)).width
            3
        """
        vectors = as_scores("item_vectors", np.asarray(item_vectors).T)
        held = made("vectors", vectors, storage, scales, ridge, anchors, seed, items)
        return cls(held, candidates=candidates)

    @classmethod
    def build(
        cls,
        reranker: Any,
        items: Sequence[str],
        anchor_queries: Sequence[str],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        block: int = 4096,
        progress: bool | Progress = True,
        **options: Any,
    ) -> CURIndex:
        """An index from the reranker's scores of every item for every anchor query: K times N of its calls.

        Args:
            reranker: has `score_many(queries, documents)`, and scores a document whatever the others are.
            items: N texts. anchor_queries: K texts, queries like those to come.
            checkpoint: a folder where scores are kept while they are made. If it holds those of an interrupted build
                of the same items, queries and reranker, the build goes on there; one block of scores at most is lost.
                It is deleted by `save`, once the index is on the disk, or by you.
            block: scores between two writes to the checkpoint.
            progress: a bar on standard error where that is a terminal; or a function of scores made and all scores.
            options: storage, scales, ridge, anchors, seed, candidates of `from_scores`.

        Raises TypeError, ValueError naming the argument, or the checkpoint where it belongs to another build, and
        ValueError for a method that compares documents.

        Example:
            >>> index = CURIndex.build(reranker, passages, train_queries, checkpoint="build")  # doctest: +SKIP
        """
        check_independent(reranker, "an index holds scores of single pairs")
        if isinstance(reranker, Reranker):
            reranker.check_options()  # a head with several labels must say now which one scores
        items, anchor_queries = as_column(items, "items"), as_column(anchor_queries, "anchor_queries")
        job = Build(reranker, items, anchor_queries, checkpoint, block)
        index = cls.from_scores(job.scores(progress), items=items, **options)
        index._contents = replace(
            index._contents, queries=Texts.of(list(anchor_queries)), scorer=identity(reranker), unsaved=job.folder
        )
        return index

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], mmap: bool = True, *, verify: bool = True, candidates: str = "scan"
    ) -> CURIndex:
        """Open a saved index.

        Args:
            path: the folder. mmap: vectors stay in the file and are read when they are needed, else all at once.
            verify: compare checksums, and look whether texts are UTF-8, which reads every file once.

        A save of another process to the folder changes no file: an index that is open stays as it was loaded. A file
        that is written over or cut is noticed when a search begins, which then raises ValueError; one that is cut
        during a search ends the process with SIGBUS. `top_k` takes microseconds, so it looks at the files 20 times a
        second at most: for 50 ms after a look, a change is as one during a search. With mmap=False none of it matters.

        Raises FileNotFoundError without an index there, ValueError naming a damaged file, or one whose contents no save
        writes: ids that repeat or are not ascending, anchors that are no items, texts that end beyond the file, ...
        """
        return cls(state.open_folder(Path(path), mmap=mmap, verify=verify), candidates=candidates)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to the folder `path`. Until the last moment, an index that is there stays whole.

        Shards that the folder holds already are not written again. Savers of one folder wait for one another,
        and the last one's index stays. A save that fails leaves no files.
        Raises FileExistsError for a folder with other files, OSError if the disk refuses.
        """
        with self._changing:
            self._contents.check_files()
            self._contents = state.save(self._contents, Path(path))

    def add(self, anchor_scores: npt.ArrayLike, items: Sequence[str] | None = None) -> Ids:
        """Add n items and return their ids, int64 (n,). `save` puts them on the disk.

        Args:
            anchor_scores: (K, n): their scores for the anchor queries, or their vectors as columns.
            items: their texts, exactly if the index holds texts.
        """
        items = as_column(items, "items")
        vectors = as_scores("anchor_scores", anchor_scores, self.width)
        with self._changing:
            old = self._contents
            old.check_files()
            self._contents = state.add(old, vectors, items)
            first = old.count if old.ids is None else old.following
        return np.arange(first, first + vectors.shape[1])

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove items. The others keep their ids, and no id is given twice. ValueError for an id that is not there."""
        with self._changing:
            self._contents.check_files()
            self._contents = state.remove(self._contents, self._contents.positions("ids", as_ids("ids", ids)))

    @property
    def settings(self) -> Settings:
        """How `search` spends a budget where the call does not say; `tune` sets it, and it may be assigned."""
        return self._contents.settings

    @settings.setter
    def settings(self, value: Settings) -> None:
        with self._changing:
            self._contents = replace(self._contents, settings=value)

    @property
    def width(self) -> int:
        """K, the length of an item's vector."""
        return self._contents.width

    @property
    def count(self) -> int:
        """N, the number of items."""
        return self._contents.count

    def __len__(self) -> int:
        return self.count

    @property
    def ids(self) -> Ids:
        """The items' ids, ascending, int64 (N,)."""
        held = self._contents
        held.check_files()
        return held.named(np.arange(held.count))

    @property
    def last_usage(self) -> dict[str, Any]:
        """The cost of this thread's last search: {"calls", "rounds", "batches", "error", "seconds"}, see `Effort`."""
        effort: Effort | None = getattr(self._local, "effort", None)
        return {} if effort is None else dict(vars(effort))

    def info(self) -> dict[str, Any]:
        """What the index holds and how it searches, for people and JSON."""
        held = self._contents
        return {
            "items": held.count,
            "width": held.width,
            "storage": held.shards[0].storage,
            "bytes": sum(shard.nbytes for shard in held.shards),
            "vectors": "anchor queries' scores" if held.kind == "scores" else "given",
            "texts": held.texts is not None,
            "settings": vars(held.settings),
            "scorer": held.scorer,
        }

    def texts(self, ids: npt.ArrayLike) -> list[str]:
        """The texts of the items `ids`. ValueError where the index holds none."""
        held = self._contents
        if held.texts is None:
            raise ValueError("the index holds no texts: give items= when it is made")
        held.check_files()
        return [held.texts[int(place)] for place in held.positions("ids", as_ids("ids", ids))]

    def vectors(self) -> npt.NDArray[np.float32]:
        """The stored item vectors as columns, float32 (K, N), in the order of `ids`."""
        held = self._contents
        held.check_files()
        return np.concatenate([shard.vectors() for shard in held.shards], axis=1)

    def top_k(self, query_vectors: npt.ArrayLike, k: int = 100) -> tuple[Ids, npt.NDArray[np.float32]]:
        """The k items of largest product with each query vector, exactly, over the stored values.

        Args:
            query_vectors: (B, K) or (K,).

        Returns ids int64 (B, k) and products float32 (B, k), each by product descending, then id ascending. Raises
        ValueError for a wrong width, k below 1 or above N, NaN.
        """
        held = self._contents
        queries = np.atleast_2d(np.asarray(query_vectors, np.float32))
        if queries.ndim != 2 or queries.shape[1] != held.width:
            raise ValueError(f"query_vectors must be (B, {held.width}), got shape {np.shape(query_vectors)}")
        held.check_searchable(seldom=True)
        places, products = ops.cur_topk(queries, held.shards, positive("k", k, held.count, "the number of items"))
        return held.named(places), products

    def search(
        self,
        score_items: Callable[[Ids], Any],
        k: int = 10,
        budget: int = 200,
        rounds: int | None = None,
        *,
        first: float | None = None,
        ridge: float | None = None,
        seeds: npt.ArrayLike | None = None,
        prior: npt.ArrayLike | None = None,
        mix: float = 0.0,
        threads: int | None = None,
    ) -> tuple[Ids, Floats]:
        """The k best items that at most `budget` calls of the scorer find, with their exact scores.

        Args:
            score_items: takes item ids int64 (n,), returns n finite numbers, higher is better. No item comes twice.
            k: at most `budget` and N.
            budget: calls, one per item; of more than N, N are made, and the answer is exact.
            rounds: fits and scans, see `Settings`. 1 scores the first items only; 2 is ANNCUR: anchors, then rerank.
            first: share of the budget for the first round; where `rounds` is given, by default at least 0.75 / rounds.
            ridge: relative, see `Settings`; 0 is the published pseudo-inverse.
            seeds: ids of items that this query scores first, best first, for example of BM25; anchors fill up the
                first round, and what exceeds it is left out.
            prior: a query vector (K,) that is believed before any score: a dual encoder's, where the vectors are. By
                default the mean of the anchor queries, or 0 for given vectors.
            mix: above 0, the fitted query vector does not start from `prior` but is mixed with it: AXN's lambda.
            threads: CPU threads of the scans.

        Returns ids int64 (k,) and scores float64 (k,), by score descending, then id ascending. Raises ValueError for
        impossible arguments and for scores that are not n finite numbers, RuntimeError if the scorer raises; both name
        the items.

        Example:
            >>> index.search(lambda ids: model.score(query, [texts[i] for i in ids]), k=10)  # doctest: +SKIP
        """
        if not callable(score_items):
            raise TypeError(f"score_items must be callable, got {type(score_items).__name__}")
        ids, scores = self.search_many(
            lambda _, ids: score_items(ids),
            1,
            k,
            budget,
            rounds,
            first=first,
            ridge=ridge,
            seeds=None if seeds is None else [seeds],
            prior=prior,
            mix=mix,
            threads=threads,
        )
        return ids[0], scores[0]

    def search_many(
        self,
        score_pairs: PairScorer,
        queries: int,
        k: int = 10,
        budget: int = 200,
        rounds: int | None = None,
        *,
        first: float | None = None,
        ridge: float | None = None,
        seeds: Sequence[npt.ArrayLike] | None = None,
        prior: npt.ArrayLike | None = None,
        mix: float = 0.0,
        threads: int | None = None,
    ) -> tuple[Ids, Floats]:
        """`search` for many queries at once: a round of all of them is one call of the scorer and one scan.

        Args:
            score_pairs: takes numbers of queries and item ids, both int64 (n,), returns n numbers.
            queries: how many, B. seeds: one list per query. prior: (K,) or (B, K). The rest: see `search`.

        Returns ids (B, k) and scores (B, k). More queries than 512 MB of fits hold are searched in several batches.
        """
        held = self._contents
        count = held.check_searchable()
        queries = positive("queries", queries)
        k = positive("k", k, count, "the number of items")
        budget = min(positive("budget", budget), count)
        if budget < k:
            raise ValueError(f"budget must be at least k={k}, got {budget}: the answer holds scored items only")
        settings = held.settings
        if first is None:
            first = settings.first if rounds is None else max(settings.first, 0.75 / positive("rounds", rounds))
        turns = settings.rounds if rounds is None else positive("rounds", rounds)
        sizes = round_sizes(budget, turns, share("first", first))
        ridge = held.spread * (settings.ridge if ridge is None else relative_ridge(ridge))
        start = first_items(held, queries, sizes[0], seeds)
        mix = share("mix", mix)
        if mix > 0 and prior is None:
            raise ValueError(f"mix={mix} needs a prior to mix with")
        believed = prior_of(held, prior, queries, ridge)
        effort, found = Effort(), self._candidates_of(held.shards, threads)

        def score(begin: int, numbers: Ids, places: Ids) -> Any:
            return score_pairs(numbers + begin, held.named(places))

        ids, scores = np.empty((queries, k), np.int64), np.empty((queries, k))
        group = max(1, int(_MEMORY // (8 * budget * (budget + held.width))))
        for begin in range(0, queries, group):
            part = slice(begin, min(begin + group, queries))
            own = believed if believed is None or len(believed) == 1 else believed[part]
            plan = Plan(sizes, start[part], ridge, own, mix)
            some = adaptive_search(found, partial(score, begin), plan, effort, held.named)
            ids[part], scores[part] = best(*some, k)
        self._local.effort = effort
        return held.named(ids), scores

    def search_reranker(
        self,
        reranker: Any,
        query: str | Sequence[str],
        k: int = 10,
        budget: int = 200,
        rounds: int | None = None,
        **options: Any,
    ) -> tuple[Ids, Floats]:
        """`search` with a reranker over the items' texts; of a list of queries, all rounds share its batches.

        Args:
            reranker: has `score_many`; the one that the index was built with.
            query: a text, or B texts. The rest: see `search` and `search_many`.

        Returns ids (k,) and scores (k,), or (B, k) for a list. Raises ValueError if the index holds no texts, for a
        method that compares documents, and naming both rerankers if this is not the one it was built with.

        Example:
            >>> ids, scores = index.search_reranker(reranker, "who?", k=10, budget=200)  # doctest: +SKIP
        """
        held = self._contents
        if held.texts is None:
            raise ValueError("the index holds no texts: give items= when it is made, or call search with a function")
        check_independent(reranker, "a search scores a few items at a time")
        same_scorer(held.scorer, reranker)
        texts = held.texts
        single = isinstance(query, str)
        queries = [query] if isinstance(query, str) else list(as_column(query, "query"))
        if not queries:
            raise ValueError("query must be a text or a non-empty list of texts")

        def score(numbers: Ids, ids: Ids) -> Floats:
            places = held.positions("ids", ids)
            asked, begins = np.unique(numbers, return_index=True)  # rounds hold a query's items in one run
            runs = np.split(places, begins[1:])
            parts = reranker.score_many([queries[i] for i in asked], [[texts[int(p)] for p in run] for run in runs])
            return np.concatenate([np.asarray(part, np.float64) for part in parts])

        if single and options.get("seeds") is not None:
            options["seeds"] = [options["seeds"]]
        ids, scores = self.search_many(score, len(queries), k, budget, rounds, **options)
        return (ids[0], scores[0]) if single else (ids, scores)

    def tune(self, k: int = 10, budget: int = 200, *, queries: int = 48, seed: int = 0) -> list[Trial]:
        """Choose `settings` for searches of this k and budget on anchor queries that are held out, and set them.

        Args:
            k, budget: of the searches to come. queries: how many are held out, at most half. seed: which.

        Returns the settings that were tried and their recall, the chosen ones first. Nothing is scored: the anchor
        queries' scores are in the index. Raises ValueError for an index on given vectors.

        Example:
            >>> index.tune(k=10, budget=200)[0].settings  # doctest: +SKIP
            Settings(rounds=10, first=0.1, ridge=0.02)
        """
        trials = tune(self, k, budget, queries=queries, seed=seed)
        self.settings = trials[0].settings
        return trials

    def estimate(self, ids: npt.ArrayLike, scores: npt.ArrayLike, *, ridge: float | None = None) -> Floats:
        """Estimated scores of all items from exact scores of some, float64 (N,), in the order of the index's ids.

        With `ridge=0` that is ANNCUR's `scores @ pinv(R[:, ids]) @ R`, in float64 over the stored values R.
        """
        held = self._contents
        chosen = held.positions("ids", as_ids("ids", ids))
        values = np.asarray(scores, np.float64)
        if values.shape != chosen.shape:
            raise ValueError(f"scores must have one value for each of {len(chosen)} ids, got shape {values.shape}")
        vectors = self.vectors().astype(np.float64)
        some = vectors[:, chosen]
        relative = held.settings.ridge if ridge is None else relative_ridge(ridge)
        if relative == 0:
            weights = least_norm(some, values)
        else:
            prior = np.zeros(held.width) if held.kind == "vectors" else np.full(held.width, 1 / held.width)
            dual = some.T @ some + relative * held.spread * np.eye(len(chosen))
            weights = prior + some @ np.linalg.solve(dual, values - prior @ some)
        result: Floats = weights @ vectors
        return result
