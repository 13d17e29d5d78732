"""Label logits of packed decoders against transformers' full logits, one prompt at a time, in every family."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import decoders
import torch

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.torch import causal
from fastrerank.engine.torch.causal import CausalScorer
from fastrerank.engine.torch.decoder import PackedDecoder
from fastrerank.engine.usage import Cost

LABELS = np.array([7, 3, 119, 50])
STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`scorer(family)` -> float32 scorer of its tiny checkpoint, made once."""
    made: dict[str, CausalScorer] = {}

    def load(family: str) -> CausalScorer:
        if family not in made:
            made[family] = CausalScorer.load(open_checkpoint(decoders.save(tmp_path_factory.mktemp(family), family)))
        return made[family]

    return load


def relative(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_logits_equal_transformers(family: str, scorer: Any) -> None:
    engine, prompts = scorer(family), decoders.prompts()
    expected = decoders.full_logits(decoders.build(family), prompts, LABELS)
    assert np.ptp(expected, axis=0).min() > 0.1
    ours, _ = engine.label_logits(prompts, LABELS)
    assert ours.dtype == np.float32
    assert relative(ours, expected) <= 2e-5
    packed = family not in (*decoders.PADDED, *decoders.WHOLE)
    assert engine.model.runner.packed == (family not in decoders.PADDED)
    assert isinstance(engine.model.runner, PackedDecoder) == packed
    assert engine.model.shares == packed
    assert bool(engine.reason) != packed
    if packed:  # GPT-2 puts its output in the shape of its input
        assert engine.model.runner.prunes == (family != "gpt2"), "the last layer computes more rows than are read"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt-neox"])
def test_sharing_prefixes_changes_the_work_and_not_the_result(family: str, scorer: Any) -> None:
    engine, prompts = scorer(family), decoders.prompts()
    shared, cost = engine.label_logits(prompts, LABELS)
    engine.model.shares = False
    try:
        alone, full = engine.label_logits(prompts, LABELS)
    finally:
        engine.model.shares = True
    distinct = prompts[:-1]  # the last one is a copy
    assert full == Cost(1, sum(map(len, distinct)), 0)
    assert cost == Cost(1, full.tokens - 5 * 40, 40)
    # A sliding window cuts a shared prefix off in pieces, so sums are grouped otherwise there.
    assert np.array_equal(shared, alone) if family != "gemma2" else relative(shared, alone) <= 1e-6


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_prompt_scores_the_same_in_any_company(family: str, scorer: Any) -> None:
    engine, prompts = scorer(family), decoders.prompts()
    engine.model.shares = False
    try:
        together, _ = engine.label_logits(prompts, LABELS)
        order = np.random.default_rng(1).permutation(len(prompts))
        permuted, _ = engine.label_logits([prompts[i] for i in order], LABELS)
        alone = np.concatenate([engine.label_logits([ids], LABELS)[0] for ids in prompts])
    finally:
        engine.model.shares = True
    assert np.array_equal(together[order], permuted)
    assert np.array_equal(together, alone)
    assert np.array_equal(together[2], together[-1])
    permuted, _ = engine.label_logits([prompts[i] for i in order], LABELS)
    assert np.array_equal(engine.label_logits(prompts, LABELS)[0][order], permuted)


@pytest.mark.parametrize("budget", [1, 50, 120, 10_000])
@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_a_token_budget_changes_batches_only(family: str, budget: int, scorer: Any) -> None:
    engine, prompts = scorer(family), decoders.prompts()
    expected, _ = engine.label_logits(prompts, LABELS)
    before, engine.model.budget = engine.model.budget, budget
    try:
        ours, cost = engine.label_logits(prompts, LABELS)
    finally:
        engine.model.budget = before
    assert np.array_equal(ours, expected)
    # Every prefix is followed by one prompt at least, so no batch is more than the budget and the longest prompt.
    assert cost.forwards >= cost.tokens / (budget + max(map(len, prompts)))


def test_labels_come_in_the_order_asked_and_rows_are_sliced_once(scorer: Any) -> None:
    engine, prompts = scorer("llama"), decoders.prompts()
    ours, _ = engine.label_logits(prompts, LABELS)
    reordered, _ = engine.label_logits(prompts, LABELS[[2, 0]])
    assert np.allclose(reordered, ours[:, [2, 0]], rtol=1e-6)
    rows = dict(engine._head._rows)
    engine.label_logits(prompts, LABELS)
    assert engine._head._rows == rows
    assert all(len(weight) <= len(LABELS) or len(weight) <= 16 for weight, _ in rows.values())


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records every size that a dispatched operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(value):
                self.sizes.append(tuple(value.shape))
        return result


def test_no_tensor_of_the_vocabulary_is_made(tmp_path: Path) -> None:
    # 997 is no other size of this model.
    engine = CausalScorer.load(open_checkpoint(decoders.save(tmp_path, "llama-tied", vocab_size=997)))
    with _Allocations() as seen:
        engine.label_logits(decoders.prompts(), LABELS)
    assert len(seen.sizes) > 100
    assert not [size for size in seen.sizes if 997 in size and size != (997, 32)]  # (997, 32): the weight itself


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_half_precision_errs_no_more_than_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    folder, prompts = decoders.save(tmp_path, family), decoders.prompts()
    exact = decoders.full_logits(decoders.build(family).double(), prompts, LABELS)
    plain = decoders.full_logits(decoders.build(family).to(getattr(torch, dtype)), prompts, LABELS)
    ours, _ = CausalScorer.load(open_checkpoint(folder), dtype=dtype).label_logits(prompts, LABELS)
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 2 * np.sqrt(np.mean((plain - exact) ** 2))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_classifier_reads_its_own_head(family: str, tmp_path: Path) -> None:
    model = decoders.build_classifier(family, labels=2)
    model.save_pretrained(tmp_path)
    prompts, labels = decoders.prompts(), np.array([0, 1])
    ours, _ = CausalScorer.load(open_checkpoint(tmp_path), head="classification").label_logits(prompts, labels)
    assert relative(ours, decoders.full_logits(model, prompts, labels)) <= 2e-5


def test_trained_weights() -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    prefix = random.integers(3, 512, 90)
    prompts = [np.concatenate([prefix, random.integers(3, 512, n)]) for n in (40, 3, 200)]
    labels = np.array([400, 11, 509])
    ours, cost = CausalScorer.load(open_checkpoint(STORIES)).label_logits(prompts, labels)
    assert relative(ours, decoders.full_logits(model, prompts, labels)) <= 2e-5
    assert cost == Cost(1, 90 + 243, 90)


def test_a_head_that_does_something_unknown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = decoders.save(tmp_path, "granite")
    monkeypatch.setattr(causal, "_logit_options", lambda _: {})
    with pytest.raises(ValueError, match=r"differ by .* from its own head's"):
        CausalScorer.load(open_checkpoint(folder))


def test_a_layer_that_cannot_be_pruned_is_computed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = decoders.save(tmp_path, "llama")
    whole = PackedDecoder.read

    def wrong(self: Any, batch: Any, readout: Any) -> Any:
        states = whole(self, batch, readout)
        return states + 1 if self.prunes else states

    monkeypatch.setattr(PackedDecoder, "read", wrong)
    engine = CausalScorer.load(open_checkpoint(folder))
    assert not engine.model.runner.prunes
    prompts = decoders.prompts()
    expected = decoders.full_logits(decoders.build("llama"), prompts, LABELS)
    assert relative(engine.label_logits(prompts, LABELS)[0], expected) <= 2e-5


def test_out_of_memory_halves_the_budget_and_goes_on(scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompts = scorer("olmo2"), decoders.prompts()
    expected, _ = engine.label_logits(prompts, LABELS)
    runner, calls = engine.model.runner, []
    real = runner.read

    def read(batch: Any, readout: Any) -> Any:
        calls.append(len(batch.ids))
        if len(batch.ids) > 120:
            raise torch.OutOfMemoryError
        return real(batch, readout)

    monkeypatch.setattr(runner, "read", read)
    before = engine.model.budget
    try:
        ours, _ = engine.label_logits(prompts, LABELS)
        assert engine.model.budget < before
        assert max(calls) > 120
    finally:
        engine.model.budget = before
    assert relative(ours, expected) <= 1e-6


def test_threads_share_a_scorer(scorer: Any) -> None:
    engine, prompts = scorer("qwen2"), decoders.prompts()
    expected, _ = engine.label_logits(prompts, LABELS)
    failures: list[Any] = []

    def work() -> None:
        for _ in range(3):
            ours, _ = engine.label_logits(prompts, LABELS)
            if not np.array_equal(ours, expected):
                failures.append(ours)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("prompts", "labels", "message"),
    [
        ([np.array([], np.int32)], [1], "prompt 0 has no tokens"),
        ([np.array([1]), np.array([200])], [1], "prompt 1: token id 200 is outside"),
        ([np.array([-1])], [1], "token id -1 is outside"),
        ([np.arange(3, 103).repeat(6)], [1], "prompt 0 has 600 tokens, the model takes 512"),
        ([np.array([1])], [120], "labels must be a list of numbers from 0 to 119"),
        ([np.array([1])], [], "labels must be"),
    ],
)
def test_wrong_input_is_named(prompts: Any, labels: Any, message: str, scorer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        scorer("llama").label_logits(prompts, np.array(labels, np.int64))


def test_no_prompts(scorer: Any) -> None:
    logits, cost = scorer("llama").label_logits([], LABELS)
    assert logits.shape == (0, 4)
    assert cost == Cost()
