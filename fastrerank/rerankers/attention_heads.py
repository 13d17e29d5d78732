"""Which heads retrieve: every head of a model scored on labelled queries, by the rules of QRHead and of CoRe."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.data.datasets import JudgedQuery
from fastrerank.engine.loading import plan
from fastrerank.inputs.prompts.attention_policy import Policy, write_preset
from fastrerank.inputs.prompts.attention_prompts import AttentionPrompt
from fastrerank.rerankers.attention import filtered_sum, instruction_text, load_prompts, word_limit
from fastrerank.runtime.types import DeviceLike, DtypeLike

__all__ = ["HEADS", "RULES", "HeadScores", "score_heads"]

log = logging.getLogger("fastrerank")

# Rule -> preset whose prompts it reads.
RULES = {"ndcg": "qrhead", "gold": "qrhead", "contrast": "core"}
# Heads that the methods keep.
HEADS = {"qrhead": 16, "core": 8}
_TEMPERATURE = 0.1
_SHUFFLE_SEED = 42  # documents are shuffled, so that no head is scored by a place in the prompt
_CUTOFF = 10

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score for every head.

    Attributes:
        scores: float64 (layers, heads), means over queries. queries: how many there were. skipped: those without a
            relevant document, or for "contrast" without another one, or that do not fit into one prompt.
        about: preset, rule and what else a preset file says of them.
    """

    scores: Matrix
    queries: int
    skipped: int
    about: dict[str, str | int | float]

    def __repr__(self) -> str:
        layers, heads = self.scores.shape
        preset, rule = self.about.get("preset"), self.about.get("rule")
        return f"HeadScores({layers} layers of {heads} heads, {self.queries} queries, preset={preset!r}, rule={rule!r})"

    def best(self, count: int) -> list[tuple[int, int]]:
        """Return the `count` best (layer, head) pairs, best first; ties by layer and head."""
        order = np.argsort(-self.scores, axis=None, kind="stable")[:count]
        return [(int(i) // self.scores.shape[1], int(i) % self.scores.shape[1]) for i in order]

    def save(self, path: str | Path, count: int | None = None) -> list[tuple[int, int]]:
        """Write a preset file that `AttentionReranker(heads=path)` takes, and return its heads.

        `count` None: as many as the published method keeps.
        """
        heads = self.best(HEADS[str(self.about["preset"])] if count is None else count)
        write_preset(Path(path), heads, {**self.about, "queries": self.queries})
        return heads


def score_heads(
    model: str | Path,
    queries: Sequence[JudgedQuery],
    *,
    rule: str = "ndcg",
    temperature: float = _TEMPERATURE,
    instruction: str | None = None,
    words_per_document: int | None = None,
    state: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: DeviceLike | None = None,
    dtype: DtypeLike = "auto",
    num_threads: int | None = None,
    memory_limit: float | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
    token: bool | str | None = None,
) -> HeadScores:
    """Score every head of a decoder by how well it alone tells relevant documents, one forward per query.

    Args:
        model: hub id or local folder of a decoder.
        queries: labelled queries, from `fastrerank.data.datasets.load_dataset`; candidates without a judgement, or with
            grade 0, are not relevant.
        rule: "ndcg" (QRHead): nDCG@10 of the head's own calibrated and filtered document scores; "gold" (QRHead on
            long dialogues): the sum of these scores over the relevant documents; "contrast" (CoRe): the softmax of the
            attention that each relevant document gets among those that are not relevant, without calibration.
        temperature: of that softmax; published: 0.1 for Llama and Phi, 0.001 for Mistral and Granite.
        instruction, words_per_document: as in `AttentionReranker`.
        state: file that takes up each query's scores; a run that finds one goes on behind its last query.
        progress: called with (queries done, queries).
        device and the rest: as in `AttentionReranker`.

    Raises ValueError for an unknown rule, a model that cannot be read, no usable query, or a state file of another run.

    Papers: QRHead (arXiv 2506.09944), CoRe (arXiv 2510.02219).

    Example:
        >>> found = score_heads("path/to/model", load_dataset("nq.jsonl"), rule="contrast")        # doctest: +SKIP
        >>> found.save("core.toml")                                                                # doctest: +SKIP
        [(13, 18), (13, 1), ...]
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    policy = Policy.load(RULES[rule])
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        cache_folder=cache_folder,
        local_files_only=local_files_only,
        token=token,
        trust_remote_code=trust_remote_code,
    )
    chosen = plan(checkpoint.config, "torch", device, dtype)
    if len(chosen.devices) != 1:
        raise ValueError(f"device must be one device, got {device!r}")
    text = instruction_text(instruction, policy)
    prompts = load_prompts(checkpoint, policy, text, word_limit(words_per_document, policy))

    from fastrerank.engine.readouts import Reading
    from fastrerank.engine.torch.attention import AttentionScorer

    scorer = AttentionScorer.load(
        checkpoint,
        None,
        dtype=chosen.dtype,
        device=chosen.devices[0],
        num_threads=num_threads,
        memory_limit=memory_limit,
    )
    about: dict[str, str | int | float] = {"preset": policy.name, "rule": rule, "model": checkpoint.path.name}
    if rule == "contrast":
        about["temperature"] = float(temperature)
    log_ = _State(state, about | {"instruction": text, "layers": scorer.layers, "heads": scorer.head_count})
    limits = [limit for limit in (scorer.max_length, scorer.budget) if limit is not None]
    total: Matrix = np.zeros((scorer.layers, scorer.head_count))
    used = skipped = 0
    for number, query in enumerate(queries):
        found = log_.known(query.qid)
        if found is None:
            found = np.zeros(0)
            asked = _ask(prompts, query, rule, min(limits, default=None))
            if asked is not None:
                prompt, grades = asked
                begin, end = int(prompt.spans[:, 0].min()), int(prompt.spans[:, 1].max())
                other = None if rule == "contrast" else prompt.empty_tail
                reading = Reading.of(prompt.context, prompt.tail, other, begin, end)
                rows: dict[int, Matrix] = {}

                def each(
                    layer: int,
                    masses: npt.NDArray[np.float32],
                    prompt: AttentionPrompt = prompt,
                    grades: npt.NDArray[np.int64] = grades,
                    rows: dict[int, Matrix] = rows,
                ) -> None:
                    rows[layer] = _rate(masses, prompt, grades, rule, temperature)

                scorer.masses_by_head(reading, each)
                found = np.stack([rows[layer] for layer in range(scorer.layers)])
            log_.add(query.qid, found)
        if found.size:
            total, used = total + found, used + 1
        else:
            skipped += 1
        if progress is not None:
            progress(number + 1, len(queries))
    if not used:
        raise ValueError(
            f"none of the {len(queries)} queries can be used: each needs a relevant candidate"
            + (" and another one" if rule == "contrast" else "")
        )
    if skipped:
        log.warning("%d of %d queries were left out: no relevant candidate, or too long", skipped, len(queries))
    return HeadScores(total / used, used, skipped, about)


def _ask(
    prompts: Any, query: JudgedQuery, rule: str, limit: int | None
) -> tuple[AttentionPrompt, npt.NDArray[np.int64]] | None:
    """The query's prompt and its documents' grades; without its last irrelevant candidates where all do not fit."""
    grades = np.array([max(0, query.judgements.get(one.docid, 0)) for one in query.candidates], np.int64)
    places = np.arange(len(grades))
    if rule != "contrast":
        places = np.random.default_rng(_SHUFFLE_SEED).permutation(places)
    while (grades[places] > 0).any() and (rule != "contrast" or (grades[places] == 0).any()):
        prompt = prompts.encode(query.query, [query.candidates[i].text for i in places])
        if limit is None or prompt.longest <= limit:
            return prompt, grades[places]
        spare = np.flatnonzero(grades[places] == 0)
        if not len(spare):
            return None
        over = prompt.longest - limit
        sizes = np.cumsum(prompt.sizes[spare][::-1])
        places = np.delete(places, spare[::-1][: int(np.searchsorted(sizes, over)) + 1])
    return None


def _rate(
    masses: npt.NDArray[np.float32],
    prompt: AttentionPrompt,
    grades: npt.NDArray[np.int64],
    rule: str,
    temperature: float,
) -> Matrix:
    """What the rule gives each head of a layer, from its masses (H, S): float64 (H,)."""
    begin = int(prompt.spans[:, 0].min())
    if rule == "contrast":
        sums = np.stack([masses[:, a - begin : b - begin].sum(1, dtype=np.float64) for a, b in prompt.own.tolist()], 1)
        positive, negative = sums[:, grades > 0], sums[:, grades == 0]
        both = np.concatenate([positive[:, :, None], np.repeat(negative[:, None], positive.shape[1], 1)], 2)
        both = np.exp((both - both.max(2, keepdims=True)) / temperature)
        return np.asarray((both[:, :, 0] / both.sum(2)).mean(1))
    scores = np.array([[filtered_sum(row[a - begin : b - begin]) for a, b in prompt.spans] for row in masses])
    if rule == "gold":
        return np.asarray(scores[:, grades > 0].sum(1))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :_CUTOFF]
    discounts = 1 / np.log2(np.arange(2, _CUTOFF + 2))
    ideal = np.sort(grades)[::-1][:_CUTOFF]
    return np.asarray((grades[order] * discounts[: order.shape[1]]).sum(1) / (ideal * discounts[: len(ideal)]).sum())


class _State:
    """A file with a line of settings and one of scores per query; without a path nothing is kept."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._found: dict[str, Matrix] = {}
        if self._path is None:
            return
        if not self._path.exists():
            self._path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != settings:
            raise ValueError(
                f"{self._path} holds the scores of another run ({lines[0] if lines else 'it is empty'}): remove it, or "
                "name another file"
            )
        complete = []
        for line in lines[1:]:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the run was ended while it wrote
                break
            self._found[row["qid"]] = np.array(row["scores"], np.float64)
            complete.append(line)
        if len(complete) < len(lines) - 1:
            self._path.write_text("".join(line + "\n" for line in [lines[0], *complete]), encoding="utf-8")

    def known(self, qid: str) -> Matrix | None:
        return self._found.get(qid)

    def add(self, qid: str, scores: Matrix) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"qid": qid, "scores": scores.tolist()}) + "\n")
