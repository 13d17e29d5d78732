"""`Seq2SeqScorer` on tiny T5s against transformers' full logits, one prompt at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch
import transformers

from fastrerank.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fastrerank.engine.torch import linear as torch_linear
from fastrerank.engine.torch import seq2seq
from fastrerank.engine.torch.seq2seq import Seq2SeqScorer
from fastrerank.engine.usage import Cost

DEVICE = os.environ.get("FASTRERANK_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
BOUND = 2e-5
_SIZES = {
    "vocab_size": 120,
    "d_model": 40,
    "d_kv": 12,
    "num_heads": 3,
    "d_ff": 70,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
# tie_word_embeddings=False is how a T5 1.1 says that it does not scale the decoder's output.
_V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1.0": ("T5", {}),
    "v1.1": ("T5", _V11),
    "mt5": ("MT5", _V11),
    "umt5": ("UMT5", _V11),
}
LENGTHS = (5, 1, 17, 60, 2, 17, 33)
LABELS = np.array([7, 3, 119, 0, 7])
PREFIX = (11, 42)
Saved = Callable[[str], Path]
_LOADED: dict[Any, Seq2SeqScorer] = {}


def build(kind: str) -> Any:
    """A model in evaluation mode, of which every weight counts: norms and the head are no ones and no copies."""
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**(_SIZES | settings))
    )
    if kind != "v1.0":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(120, 40) * 0.2)
    for parameter_name, parameter in model.named_parameters():
        if "layer_norm" in parameter_name:
            torch.nn.init.normal_(parameter, 1, 0.3)
        elif "EncDecAttention" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 0.3)  # or all tokens weigh alike
        elif "relative_attention_bias" in parameter_name:
            torch.nn.init.normal_(parameter, 0, 1.5)
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(kind)` -> folder of its checkpoint. Do not write to it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(made[kind])
        return made[kind]

    return folder


def load(folder: Path, **options: Any) -> Seq2SeqScorer:
    """A loaded scorer, kept for other tests: change nothing in it."""
    key = (folder, *sorted(options.items()))
    if key not in _LOADED:
        _LOADED[key] = Seq2SeqScorer.load(open_checkpoint(folder), device=DEVICE, **options)
    return _LOADED[key]


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(2, 120, length).astype(np.int32) for length in lengths]


def skip_unless_causal(kind: str) -> None:
    """UMT5's decoder sees the tokens after its own in transformers 5.17, which loading refuses to follow."""
    if kind == "umt5":
        with torch.inference_mode():
            given = {"input_ids": torch.tensor([[3, 4]]), "use_cache": False}
            model = build(kind)
            first = [model(decoder_input_ids=torch.tensor([[0, n]]), **given).logits[0, 0] for n in (5, 7)]
        if not torch.allclose(*first, rtol=1e-4, atol=1e-4):
            pytest.skip(f"UMT5's decoder of transformers {transformers.__version__} is not causal")


def full(model: Any, texts: Sequence[np.ndarray], prefix: Sequence[int] = ()) -> np.ndarray:
    """transformers' logits of the whole vocabulary at the decoder's last position, one prompt at a time."""
    start = torch.tensor([[0, *prefix]], device=model.device)
    with torch.inference_mode():
        rows = [
            model(input_ids=torch.tensor(ids[None].astype(np.int64), device=model.device), decoder_input_ids=start)
            .logits[0, -1]
            .double()
            .cpu()
            .numpy()
            for ids in texts
        ]
    return np.stack(rows)


def loaded_model(folder: Path, dtype: Any = torch.float32) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(str(folder), dtype=dtype).eval()


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["start", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_full_logits(saved: Saved, kind: str, prefix: tuple[int, ...]) -> None:
    if prefix:
        skip_unless_causal(kind)
    expected = full(loaded_model(saved(kind)), prompts(), prefix)
    built = full(build(kind), prompts(), prefix)
    assert np.abs(expected - built).max() <= 1e-5 * np.abs(built).max()  # what was saved is what was built
    scorer = load(saved(kind), decoder_prefix=prefix)
    assert scorer.decoder_prefix == prefix
    assert scorer.reason == ""
    assert scorer.labels == 120
    logits, _ = scorer.label_logits(prompts(), np.arange(120))
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= BOUND * np.abs(expected).max()
    some, _ = scorer.label_logits(prompts(), LABELS)
    assert np.abs(some - logits[:, LABELS]).max() <= 1e-6 * np.abs(logits).max()
    assert np.ptp(expected[:, 7]) > 0.05 * np.abs(expected).max()  # prompts can be told apart


@pytest.mark.parametrize("kind", ["v1.0", "v1.1", "mt5"])
def test_the_scale_of_the_decoders_output_is_the_models_own(saved: Saved, kind: str) -> None:
    assert load(saved(kind)).scale == (40**-0.5 if kind == "v1.0" else 1.0)


def test_what_the_decoder_begins_with_changes_the_logits(saved: Saved) -> None:
    plain, _ = load(saved("v1.0")).label_logits(prompts(), LABELS)
    forced, _ = load(saved("v1.0"), decoder_prefix=PREFIX).label_logits(prompts(), LABELS)
    assert np.abs(plain - forced).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_within_twice_plain_torchs_error(saved: Saved, kind: str, dtype: str) -> None:
    skip_unless_causal(kind)
    texts = prompts((9, 30, 3, 41, 22, 14) * 4, 1)
    exact = full(loaded_model(saved(kind)).double(), texts, PREFIX)
    plain = full(loaded_model(saved(kind), getattr(torch, dtype)).to(DEVICE), texts, PREFIX)
    ours, _ = load(saved(kind), dtype=dtype, decoder_prefix=PREFIX).label_logits(texts, np.arange(120))
    errors = [float(np.sqrt(np.mean((values - exact) ** 2))) for values in (ours, plain)]
    assert errors[0] <= 2 * errors[1]


def test_float16_keeps_the_output_layers_in_float32_and_bfloat16_does_not(saved: Saved) -> None:
    for dtype, expected in (("float16", torch.float32), ("bfloat16", torch.bfloat16)):
        scorer = load(saved("v1.1"), dtype=dtype)
        for stack in (scorer.model.runner.backbone, scorer.model.runner._decoder):
            layer = stack.block[1].layer[-1].DenseReluDense
            assert layer.wo.weight.dtype == expected
            assert layer.wi_0.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_absorbed_cross_attention_is_transformers_cross_attention(kind: str) -> None:
    """In float64: the same states, to rounding of float32 where ours sums in float32."""
    model = build(kind)
    torch.manual_seed(1)
    x, states = torch.randn(4, 3, 40), torch.randn(4, 19, 40)
    seen = torch.arange(19) < torch.tensor([19, 1, 7, 12])[:, None]
    with torch.inference_mode():
        attention = model.decoder.block[1].layer[1].EncDecAttention
        ours = seq2seq._absorbed_attention(attention, x, states, seen)
        hidden = torch.where(seen, 0.0, float("-inf")).double()[:, None, None]
        expected = attention.double()(x.double(), mask=hidden, key_value_states=states.double())[0]
        assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()
        own = model.decoder.block[0].layer[0].SelfAttention
        ours = seq2seq._own_attention(own, x, own.compute_bias(3, 3))
        later = torch.full((3, 3), float("-inf")).triu(1).double()[None, None]
        expected = own.double()(x.double(), mask=later)[0]
        assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_a_prompts_logits_move_by_rounding_only_in_company(saved: Saved, kind: str) -> None:
    scorer = load(saved(kind))
    texts = prompts()
    together, _ = scorer.label_logits(texts, LABELS)
    alone = np.concatenate([scorer.label_logits([text], LABELS)[0] for text in texts])
    others = prompts((90, 3, 5, 77), 5)
    company, _ = scorer.label_logits([*others[:2], *texts, *others[2:]], LABELS)
    scale = np.abs(alone).max()
    assert np.abs(together - alone).max() <= 1e-5 * scale
    assert np.abs(company[2:-2] - alone).max() <= 1e-5 * scale
    order = np.random.default_rng(0).permutation(len(texts))
    permuted, _ = scorer.label_logits([texts[i] for i in order], LABELS)
    assert np.abs(permuted - together[order]).max() <= 1e-5 * scale


def test_each_prompt_may_have_labels_of_its_own(saved: Saved) -> None:
    scorer = load(saved("v1.1"))
    texts = prompts((6, 9, 4))
    logits, _ = scorer.label_logits(texts, np.arange(120))
    own = np.array([[1, 5], [118, 5], [0, 0]])
    some, _ = scorer.label_logits(texts, own)
    assert np.abs(some - np.take_along_axis(logits, own, 1)).max() <= 1e-6 * np.abs(logits).max()


def test_cost_counts_forwards_and_tokens_with_padding_and_equal_prompts_once(saved: Saved) -> None:
    scorer = Seq2SeqScorer.load(open_checkpoint(saved("v1.0")), device=DEVICE, decoder_prefix=PREFIX)
    texts = prompts((4, 9, 5, 8))
    _, cost = scorer.label_logits(texts, LABELS)
    assert cost == Cost(1, 4 * (9 + 3), 0)
    logits, again = scorer.label_logits([texts[0], texts[1], texts[0], texts[0]], LABELS)
    assert again == Cost(1, 2 * (9 + 3), 0)
    np.testing.assert_array_equal(logits[2:], logits[[0, 0]])
    scorer.model.budget = 20
    split, cost = scorer.label_logits(texts, LABELS)
    assert cost == Cost(2, 2 * (9 + 3) + 2 * (5 + 3), 0)
    whole, _ = load(saved("v1.0"), decoder_prefix=PREFIX).label_logits(texts, LABELS)
    assert np.abs(split - whole).max() <= 1e-5 * np.abs(whole).max()
    none, cost = scorer.label_logits([], LABELS)
    assert none.shape == (0, 5)
    assert cost == Cost()


def test_running_out_of_memory_halves_the_budget_and_goes_on(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = Seq2SeqScorer.load(open_checkpoint(saved("v1.0")), device=DEVICE)
    texts = prompts((10,) * 12, 3)
    expected, _ = scorer.label_logits(texts, LABELS)
    decode = seq2seq.DecoderStep.decode

    def failing(self: Any, states: Any, seen: Any) -> Any:
        if len(states) > 3:
            raise torch.OutOfMemoryError("too much")
        return decode(self, states, seen)

    monkeypatch.setattr(seq2seq.DecoderStep, "decode", failing)
    with caplog.at_level(logging.WARNING, "fastrerank"):
        logits, cost = scorer.label_logits(texts, LABELS)
    assert "out of memory" in caplog.text
    assert scorer.model.budget <= 30
    assert cost.tokens == 12 * 11  # what failed is not counted
    assert cost.forwards >= 4
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_many_threads_share_one_scorer(saved: Saved) -> None:
    scorer = load(saved("v1.1"))
    calls = [prompts((3 + n, 20, 1 + n), n) for n in range(6)]
    expected = [scorer.label_logits(call, LABELS) for call in calls]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for (logits, cost), right in zip(
                pool.map(lambda call: scorer.label_logits(call, LABELS), calls), expected, strict=True
            ):
                assert cost == right[1]
                assert np.abs(logits - right[0]).max() <= 1e-5 * np.abs(right[0]).max()


@pytest.mark.skipif(DEVICE != "cpu", reason="packed layers are the CPU's")
def test_the_encoder_runs_on_packed_linear_layers(saved: Saved) -> None:
    encoder = load(saved("v1.0")).model.runner.backbone
    kinds = {type(module) for module in encoder.modules()}
    assert torch_linear.PackedLinear in kinds
    assert torch.nn.Linear not in kinds


def test_the_checkpoints_limit_holds_until_it_is_lifted(saved: Saved, tmp_path: Path) -> None:
    build("v1.0").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    scorer = Seq2SeqScorer.load(open_checkpoint(tmp_path), device=DEVICE)
    assert scorer.max_length == 30
    long = prompts((30, 33))
    with pytest.raises(ValueError, match="prompt 1 has 33 tokens, 3 more than max_length, 30"):
        scorer.label_logits(long, LABELS)
    scorer.max_length = None
    logits, _ = scorer.label_logits(long, LABELS)
    expected = full(build("v1.0"), long)[:, LABELS]
    assert np.abs(logits - expected).max() <= BOUND * np.abs(expected).max()
    assert load(saved("v1.0")).max_length is None


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ([[5, 6], []], [1], "prompt 1 has no tokens"),
        ([[5, 6], [120]], [1], "prompt 1: token id 120 is outside the vocabulary of 120"),
        ([[-1, 6]], [1], "prompt 0: token id -1"),
        ([[5]], [120], "labels must be from 0 to 119, got 120 to 120"),
        ([[5]], [-1], "labels must be from 0 to 119"),
        ([[5]], [], "K at least 1"),
        ([[5]], [1.0], "labels must be integers"),
        ([[5], [6]], [[1], [2], [3]], r"labels must be integers \(K,\) or \(2, K\)"),
    ],
)
def test_wrong_arguments_are_named(saved: Saved, texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(saved("v1.0")).label_logits([np.array(text, np.int64) for text in texts], np.array(labels))


def test_what_cannot_be_loaded_is_refused(saved: Saved, tmp_path: Path) -> None:
    def checkpoint(name: str, model: Any) -> Checkpoint:
        model.save_pretrained(tmp_path / name)
        return open_checkpoint(tmp_path / name)

    with pytest.raises(ValueError, match="decoder_prefix must be token ids below the vocabulary's size 120, got 120"):
        Seq2SeqScorer.load(open_checkpoint(saved("v1.0")), decoder_prefix=(3, 120))
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=60,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=20,
            decoder_ffn_dim=20,
        )
    )
    with pytest.raises(ValueError, match=r"need T5ForConditionalGeneration .*, got BartForConditionalGeneration"):
        Seq2SeqScorer.load(checkpoint("bart", bart))
    with pytest.raises(ValueError, match="the weights lack 'decoder"):
        Seq2SeqScorer.load(checkpoint("encoder", transformers.T5EncoderModel(build("v1.0").config)))
    broken = build("v1.0")
    with torch.no_grad():
        broken.decoder.block[0].layer[1].EncDecAttention.k.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Seq2SeqScorer.load(checkpoint("nan", broken))
    with pytest.raises(ValueError, match="leaves no room"):
        Seq2SeqScorer.load(open_checkpoint(saved("v1.0")), memory_limit=2.0)


def test_a_model_that_computes_something_else_is_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    absorbed = seq2seq._absorbed_attention
    monkeypatch.setattr(seq2seq, "_absorbed_attention", lambda *given: 1.1 * absorbed(*given))
    with pytest.raises(ValueError, match=r"label logits of T5ForConditionalGeneration differ by .* from its own"):
        Seq2SeqScorer.load(open_checkpoint(saved("v1.0")))
