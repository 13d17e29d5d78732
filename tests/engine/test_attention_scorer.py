"""AttentionScorer: every family against eager attention, the early exit against the full run, bitwise."""

from __future__ import annotations

from typing import Any

import decoders
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrerank.engine.readouts import Masses, Reading
from fastrerank.engine.torch.attention import AttentionScorer, check_heads
from fastrerank.engine.torch.decoder import find_layers

PACKED = [family for family in decoders.FAMILIES if family not in (*decoders.PADDED, *decoders.WHOLE)]
HEADS: list[Any] = [None, [(2, 3)], [(0, 1), (1, 2)], [(0, 0)]]


def body(family: str, **changes: Any) -> Any:
    model = decoders.build(family, **changes)
    return getattr(model, model.base_model_prefix)


def reading(seed: int = 0, context: int = 90, begin: int = 2, end: int = 80) -> Reading:
    """A prompt whose two tails begin alike."""
    random = np.random.default_rng(seed)
    parts = [random.integers(3, decoders.VOCABULARY, n) for n in (context, 7, 13, 5)]
    return Reading.of(parts[0], np.concatenate(parts[1:3]), np.concatenate([parts[1], parts[3]]), begin, end)


def eager(model: Any, prompt: Reading, heads: Any) -> np.ndarray:
    """The mean over the rows with the first branch less that with the second: two forwards, float64 sums."""
    total = np.zeros(prompt.end - prompt.begin)
    for branch, sign in zip(prompt.branches, (1, -1), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.shared, branch]))[None]
        with torch.inference_mode():
            attentions = model(ids, output_attentions=True, use_cache=False).attentions
        for layer, rows in enumerate(attentions):
            for head in range(rows.shape[1]):
                if heads is None or (layer, head) in heads:
                    part = rows[0, head, prompt.first :, prompt.begin : prompt.end].double().mean(0)
                    total += sign * part.numpy()
    return total


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_equals_eager_and_the_full_run(family: str, heads: Any) -> None:
    scorer = AttentionScorer.from_model(body(family), heads)
    full = AttentionScorer.from_model(body(family), heads, early_exit=False)
    end = 90 if family in ("mistral", "gemma2", "gemma3", "qwen2") else 80  # what their windows of 8 still see
    prompt = reading(begin=2 if end == 80 else 60, end=end)
    masses, cost = scorer.masses(prompt)
    expected = eager(body(family), prompt, heads)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(masses, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert masses.tobytes() == full.masses(prompt)[0].tobytes()
    assert masses.tobytes() == scorer.masses(prompt)[0].tobytes()
    assert (cost.forwards, cost.tokens, cost.prefix_tokens) == (1, 90 + 7 + 13 + 5, 97)


@pytest.mark.parametrize("family", PACKED)
def test_kept_keys_give_the_same_bits(family: str) -> None:
    scorer = AttentionScorer.from_model(body(family), [(0, 1), (1, 2)])
    prompt = reading(begin=60, end=90)
    kept, cost = scorer.keep(prompt.shared[:90])
    assert cost.tokens == 90
    assert kept.nbytes == 90 * scorer.kept_bytes
    assert len(kept.keys) == 2
    assert len(kept.values) == 1  # the last layer that is read needs none
    masses, cost = scorer.masses(prompt, kept)
    assert masses.tobytes() == scorer.masses(prompt)[0].tobytes()
    assert cost.tokens == 25
    with pytest.raises(ValueError, match="does not begin with the context whose keys were kept"):
        scorer.masses(reading(seed=1), kept)


def test_no_layer_above_is_run_and_nothing_unused_is_held() -> None:
    scorer = AttentionScorer.from_model(body("llama"), [(0, 1), (1, 2)])
    stack = find_layers(scorer.model.runner.backbone)
    assert len(stack) == 2
    assert isinstance(stack[1].mlp, torch.nn.Identity)
    assert isinstance(stack[1].self_attn.o_proj, torch.nn.Identity)
    assert stack[1].self_attn.k_proj.keys.out_features == 8  # one key head of two
    assert list(stack[1].self_attn.v_proj.children()) == []
    whole = AttentionScorer.from_model(body("olmo2"), [(1, 2)])
    assert (
        type(find_layers(whole.model.runner.backbone)[1].self_attn.k_proj).__name__ != "_Narrow"
    )  # a norm over all heads


def test_masses_by_head_add_up() -> None:
    scorer = AttentionScorer.from_model(body("qwen3"))
    prompt, found = reading(), {}
    scorer.masses_by_head(prompt, found.__setitem__)
    assert sorted(found) == [0, 1, 2]
    assert found[0].shape == (4, 78)
    total = np.sum([found[layer].astype(np.float64).sum(0) for layer in found], axis=0)
    masses, _ = scorer.masses(prompt)
    np.testing.assert_allclose(masses, total, rtol=0, atol=1e-6 * np.abs(total).max())


def test_mass_is_conserved() -> None:
    """Rows of weight 1 / n over all the keys that they see: as many as there are heads and layers."""
    scorer = AttentionScorer.from_model(body("llama"))
    random = np.random.default_rng(0)
    context, tail = random.integers(3, 120, 50), random.integers(3, 120, 1)
    prompt = Reading.of(np.concatenate([context, tail]), tail, None, 0, 51)
    masses, _ = scorer.masses(prompt)
    seen = eager_rest(context, tail)
    assert masses.sum() + seen == pytest.approx(12, abs=1e-5)


def eager_rest(context: np.ndarray, tail: np.ndarray) -> float:
    """What the last row pays to itself."""
    ids = torch.from_numpy(np.concatenate([context, tail, tail]))[None]
    with torch.inference_mode():
        return float(sum(a[0, :, -1, -1].sum() for a in body("llama")(ids, output_attentions=True).attentions))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    scorer = AttentionScorer.from_model(body("llama"), dtype=dtype)
    prompt = reading()
    masses, _ = scorer.masses(prompt)
    assert masses.dtype == np.float32
    half = body("llama").to(getattr(torch, dtype))
    single = eager(body("llama"), prompt, None)
    theirs = np.linalg.norm(eager(half, prompt, None) - single)
    assert np.linalg.norm(masses - single) <= 2 * theirs


def test_branches() -> None:
    """One tail that the other begins with, equal tails, and no other tail."""
    ids = np.arange(3, 30)
    longer = Reading.of(ids, np.array([5, 6, 7]), np.array([5, 6]), 0, 20)
    assert [list(branch) for branch in longer.branches] == [[7]]
    np.testing.assert_allclose(longer.weights, [1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 1 / 3], rtol=1e-6)
    same = Reading.of(ids, np.array([5, 6]), np.array([5, 6]), 0, 20)
    assert same.branches == ()
    assert (same.weights == 0).all()
    alone = Reading.of(ids, np.array([5, 6]), None, 0, 20)
    assert alone.tokens == alone.longest == 29
    scorer = AttentionScorer.from_model(body("llama"))
    assert (scorer.masses(same)[0] == 0).all()
    (mass, _), (other, _) = scorer.masses(longer), scorer.masses(Reading.of(ids, np.array([5, 6]), None, 0, 20))
    (first, _) = scorer.masses(Reading.of(ids, np.array([5, 6, 7]), None, 0, 20))
    np.testing.assert_allclose(mass, first - other, rtol=0, atol=1e-5 * np.abs(mass).max())


def test_refusals() -> None:
    scorer = AttentionScorer.from_model(body("llama"))
    with pytest.raises(ValueError, match="the prompt has 613 tokens, the model takes 512"):
        scorer.masses(Reading.of(np.full(600, 5), np.full(13, 5), None, 0, 9))
    with pytest.raises(ValueError, match="token id 120 is outside the vocabulary of 120"):
        scorer.masses(Reading.of(np.full(9, 120), np.full(3, 5), None, 0, 9))
    with pytest.raises(ValueError, match="BloomModel cannot be read: its attention does not run packed"):
        AttentionScorer.from_model(body("bloom"))
    assert check_heads([(1, 2), (0, 3), (1, 2)], {"num_hidden_layers": 2}) == ((0, 3), (1, 2))


def test_a_model_whose_attention_is_other_is_refused() -> None:
    model = body("llama")
    attention = find_layers(model)[1].self_attn
    whole = attention.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        if model.config._attn_implementation == "fastrerank":
            attention.scaling = 0.9  # what only our attention is told
        return whole(*args, **kwargs)

    attention.forward = twice
    with pytest.raises(ValueError, match=r"attention masses of LlamaModel differ|does not run packed"):
        AttentionScorer.from_model(model)


def test_a_model_with_a_layer_without_attention_is_refused_with_the_reason() -> None:
    model = body("llama")
    find_layers(model)[0].self_attn.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(ValueError, match=r"LlamaModel cannot be read: .* attention call 0, not 1"):
        AttentionScorer.from_model(model, [(1, 0)])


def test_memory_is_linear() -> None:
    """No tensor that a forward makes is as large as read rows x keys: the largest is a few vectors per token."""
    scorer = AttentionScorer.from_model(body("llama", max_position_embeddings=4096))
    prompt = Reading.of(np.full(1500, 5), np.arange(3, 103), np.arange(4, 104), 0, 1400)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            several = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(one.numel() for one in several if isinstance(one, torch.Tensor))
            return result

    with torch.inference_mode(), Watch():
        scorer.model.runner.read(prompt.batch, Masses(prompt, scorer._weights))
    rows = prompt.tokens - prompt.first
    assert rows == 200
    assert 1500 * 32 <= max(sizes) <= 1728 * 64 < rows * 1400
