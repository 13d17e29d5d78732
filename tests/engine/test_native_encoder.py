"""The native encoder against transformers, in every family, precision and instruction-set level."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
import reference
import tiny as factory
import torch

from fastrerank import CrossEncoder, ops
from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.heads import DenseStep, Head
from fastrerank.engine.native.encoder import DTYPES, NativeEncoder

LEVELS = ops.cpu_info()["supported"]
Tiny = Callable[..., Path]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def encoder(folder: Path, readout: Any = "tokens", dtype: str = "float32", **options: Any) -> NativeEncoder:
    return NativeEncoder.load(open_checkpoint(folder), Head(readout), dtype=dtype, **options)


@pytest.mark.parametrize("family", factory.FAMILIES)
def test_the_reference_spreads(family: str) -> None:
    # A parity test on constant logits, or on tokens that do not look at each other, would prove nothing.
    logits, tokens = reference.results(family, "float64")
    assert np.ptp(logits, axis=0).max() > 0.3
    ids, types, offsets = reference.documents(family)
    last = offsets[-2]
    changed = ids.copy()
    changed[-1] = 5 + (changed[-1] - 4) % (factory.VOCABULARY - 5)
    model = factory.build(family, 3).double()
    _, other = reference.run(model, family, changed[last:], types[last:], offsets[-2:] - last)
    assert np.abs(other - tokens[last:])[0].max() > 1e-3  # the first of 160 tokens sees the last


@pytest.mark.parametrize("family", factory.FAMILIES)
@pytest.mark.parametrize("labels", [1, 3])
def test_float32_logits_equal_transformers(isa: str, tiny: Tiny, family: str, labels: int) -> None:
    expected, _ = reference.results(family, "float32", labels)
    engine = CrossEncoder(tiny(family, labels=labels)).engine
    assert engine.isa == isa
    logits = engine.forward(*reference.documents(family))
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", factory.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_error_against_float64_is_no_worse_than_torchs(tiny: Tiny, family: str, dtype: str) -> None:
    exact_logits, exact = reference.results(family, "float64")
    plain_logits, plain = reference.results(family, dtype)
    tokens = encoder(tiny(family, labels=3), dtype=dtype).forward(*reference.documents(family))
    # In float32 the order of sums differs; in bfloat16 ours must not be worse, as sums and norms stay in float32.
    factor = 2 if dtype == "float32" else 1
    assert rms(tokens - exact) <= factor * rms(plain - exact)
    logits = CrossEncoder(tiny(family, labels=3), dtype=dtype).engine.forward(*reference.documents(family))
    assert rms(logits - exact_logits) <= factor * rms(plain_logits - exact_logits)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_feed_forwards_that_are_wider_than_what_is_read_at_once(tmp_path: Path, family: str, stored: str) -> None:
    # On tiles a float32 feed-forward comes in parts of at most 384 columns: of 288, 288 and 274, with a gate or not.
    config = factory.build(family).config
    config.intermediate_size = 850
    kind = type(factory.build(family))
    factory.randomised(kind(config)).to(getattr(torch, stored)).save_pretrained(tmp_path)
    factory.save_tokenizer(tmp_path, family)
    documents = reference.documents(family)
    plain, exact = (
        reference.run(kind.from_pretrained(tmp_path, dtype=torch.float32).to(dtype), family, *documents)[1]
        for dtype in (torch.float32, torch.float64)
    )
    assert rms(encoder(tmp_path).forward(*documents) - exact) <= 2 * rms(plain - exact)


@pytest.mark.parametrize("family", factory.FAMILIES)
def test_int8_error_is_that_of_its_stated_quantisation(isa: str, tiny: Tiny, family: str) -> None:
    # The same quantisation simulated in float64 has an error of its own. Ours may differ from it where a value near
    # the middle of two levels falls the other way, and by bfloat16 attention on levels that have it: neither adds
    # more than a tenth to what the 8-bit rounding already costs (measured: 0.98 to 1.05 of it). There are only 48
    # logits, so chance weighs more in them (0.7 to 1.2).
    exact_logits, exact = reference.results(family, "float64")
    simulated_logits, simulated = reference.int8_results(family, 127 if isa == "avx2" else 255)
    tokens = encoder(tiny(family, labels=3), dtype="int8").forward(*reference.documents(family))
    assert rms(tokens - exact) <= 1.1 * rms(simulated - exact)
    logits = CrossEncoder(tiny(family, labels=3), dtype="int8").engine.forward(*reference.documents(family))
    assert rms(logits - exact_logits) <= 1.5 * rms(simulated_logits - exact_logits)
    assert rms(tokens - exact) > 0.5 * rms(simulated - exact)  # it is quantised at all


@pytest.mark.parametrize("family", ["bert", "electra-narrow", "roberta", "distilbert", "modernbert"])
@pytest.mark.usefixtures("isa")
def test_precise_layers_of_int8_are_the_last_ones_in_bfloat16(tiny: Tiny, family: str) -> None:
    _, exact = reference.results(family, "float64")
    checkpoint = open_checkpoint(tiny(family, labels=3))
    errors = []
    for n in range(4 + (family == "modernbert")):
        model = NativeEncoder.load(checkpoint, Head("tokens"), dtype="int8", precise_layers=n)
        tokens = model.forward(*reference.documents(family))
        errors.append(rms(tokens - exact))
    np.testing.assert_array_equal(
        tokens, encoder(tiny(family, labels=3), dtype="bfloat16").forward(*reference.documents(family))
    )
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("family", ["bert", "electra-narrow", "roberta", "distilbert", "modernbert", "modernbert-mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_readouts_are_rows_of_the_token_vectors(tiny: Tiny, family: str, dtype: str) -> None:
    inputs = reference.documents(family)
    offsets = inputs[2]
    tokens = encoder(tiny(family, labels=3), "tokens", dtype).forward(*inputs)
    assert tokens.shape == (offsets[-1], encoder(tiny(family, labels=3)).width)
    # The last layer computes only these rows then, and they are bitwise what they are among the others.
    first = encoder(tiny(family, labels=3), "first", dtype).forward(*inputs)
    np.testing.assert_array_equal(first, tokens[offsets[:-1]])
    last = encoder(tiny(family, labels=3), "last", dtype).forward(*inputs)
    np.testing.assert_array_equal(last, tokens[offsets[1:] - 1])
    mean = encoder(tiny(family, labels=3), "mean", dtype).forward(*inputs)
    for d, (begin, end) in enumerate(pairwise(offsets)):
        rows = tokens[begin:end].astype(np.float64)
        bound = (end - begin + 1) * 2.0**-24 * np.abs(rows).mean(axis=0)
        assert (np.abs(mean[d] - rows.mean(axis=0)) <= bound + 1e-12).all()


@pytest.mark.parametrize("readout", ["first", "mean"])
def test_a_head_may_be_wider_than_the_model(tiny: Tiny, readout: Any) -> None:
    checkpoint, inputs = open_checkpoint(tiny("bert")), reference.documents("bert")
    pooled = NativeEncoder.load(checkpoint, Head(readout), dtype="float32").forward(*inputs)
    weight = np.random.default_rng(0).normal(size=(500, pooled.shape[1])).astype(np.float32)
    step = DenseStep(weight, None, "identity")
    wide = NativeEncoder.load(checkpoint, Head(readout, (step,)), dtype="float32").forward(*inputs)
    np.testing.assert_allclose(
        wide, pooled.astype(np.float64) @ weight.T.astype(np.float64), atol=2e-5 * np.abs(wide).max()
    )


_ENCODERS: dict[Any, NativeEncoder] = {}


def cached(tiny: Tiny, family: str, dtype: str, level: str, readout: str) -> NativeEncoder:
    key = (family, dtype, level, readout)
    if key not in _ENCODERS:
        ops.set_isa(level)
        try:
            _ENCODERS[key] = encoder(tiny(family, labels=3), readout, dtype)
        finally:
            ops.set_isa(None)
    return _ENCODERS[key]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 20), st.integers(1, factory.MAX_LENGTH)), min_size=1, max_size=24),
    data=st.data(),
)
def test_a_document_is_bitwise_the_same_in_any_company(
    tiny: Tiny, family: str, dtype: str, level: str, lengths: list[int], data: st.DataObject
) -> None:
    readout = data.draw(st.sampled_from(["first", "last", "mean"]))
    order = data.draw(st.permutations(range(len(lengths))))
    engine = cached(tiny, family, dtype, level, readout)
    ids, types, offsets = reference.documents(family, lengths, seed=len(lengths))
    spans = [slice(begin, end) for begin, end in pairwise(offsets)]
    engine.num_threads = 1
    alone = np.concatenate([engine.forward(ids[s], types[s], np.array([0, s.stop - s.start])) for s in spans])
    rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
    permuted = np.cumsum([0, *(lengths[i] for i in order)])
    for threads in (1, 2, 3):
        engine.num_threads = threads
        np.testing.assert_array_equal(engine.forward(ids, types, offsets), alone)
        np.testing.assert_array_equal(engine.forward(ids[rows], types[rows], permuted), alone[list(order)])


@pytest.mark.parametrize("family", ["bert", "roberta", "electra-narrow", "modernbert", "modernbert-mean"])
@pytest.mark.parametrize("dtype", [*DTYPES, "precise"])
@pytest.mark.parametrize("readout", ["first", "last", "mean", "tokens"])
@pytest.mark.usefixtures("isa")
def test_a_document_is_bitwise_the_same_when_threads_share_it(
    tiny: Tiny, family: str, dtype: str, readout: str
) -> None:
    options = {"dtype": "int8", "precise_layers": 1} if dtype == "precise" else {"dtype": dtype}
    model = NativeEncoder.load(open_checkpoint(tiny(family, labels=3)), Head(readout), **options)
    for count in (3, 4, 5):  # after a round of whole documents one or two are left for 2 or 3 threads
        inputs = reference.documents(family, range(factory.MAX_LENGTH, factory.MAX_LENGTH - count, -1))
        model.num_threads = 1
        expected = model.forward(*inputs)
        for model.num_threads in (2, 3):
            for _ in range(3):
                np.testing.assert_array_equal(model.forward(*inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_token_vectors_are_bitwise_the_same_for_any_thread_count(tiny: Tiny, dtype: str) -> None:
    inputs = reference.documents("modernbert", reference.LENGTHS * 3)
    engine = encoder(tiny("modernbert", labels=3), dtype=dtype, num_threads=1)
    expected = engine.forward(*inputs)
    assert np.isfinite(expected).all()
    for engine.num_threads in (2, 3, 7):
        for _ in range(3):
            np.testing.assert_array_equal(engine.forward(*inputs), expected)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_padding_token_inside_a_text_is_not_counted(tiny: Tiny, family: str, dtype: str) -> None:
    ids, types, offsets = reference.documents(family, (12, 5, 30), seed=3)
    ids[[2, 3, 8, 12, 46]] = 1
    model = factory.build(family, 3)
    expected, _ = reference.run(model, family, ids, types, offsets)
    counted, _ = reference.run(model, family, np.where(ids == 1, 4, ids), types, offsets)
    engine = CrossEncoder(tiny(family, labels=3), dtype=dtype).engine
    logits = engine.forward(ids, types, offsets)
    if dtype == "int8":  # as above: at most half more than the stated quantisation costs these few logits
        stated = reference.quantise(model.double(), 127 if engine.isa == "avx2" else 255)
        simulated, _ = reference.run(stated, family, ids, types, offsets)
        assert rms(logits - expected) <= 1.5 * rms(simulated - expected) < rms(counted - expected) / 2
        return
    tolerance = {"float32": 2e-5, "bfloat16": 3e-2}[dtype] * np.abs(expected).max()
    assert np.abs(logits - expected).max() <= tolerance
    assert np.abs(counted - expected).max() > 0.1


@pytest.mark.usefixtures("isa")
def test_modernbert_windows_end_where_the_reference_ends_them(tiny: Tiny) -> None:
    # With local layers only, a token reaches one window further per layer, and not one token more.
    folder = tiny("modernbert")
    config = open_checkpoint(folder)
    config.config["layer_types"] = ["sliding_attention"] * 2
    config.config["num_hidden_layers"] = 2
    engine = NativeEncoder.load(config, Head("tokens"))
    ids, _, offsets = reference.documents("modernbert", (100,))
    changed = ids.copy()
    changed[50] = 5 + (ids[50] - 4) % (factory.VOCABULARY - 5)
    differ = (engine.forward(ids, None, offsets) != engine.forward(changed, None, offsets)).any(axis=1)
    reach = 2 * factory.MODERNBERT_WINDOW
    np.testing.assert_array_equal(np.flatnonzero(differ), np.arange(50 - reach, 50 + reach + 1))


def sharp(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries whose scores reach thousands for some rows, where exp would overflow, and stay small for others."""
    changed = {}
    for name, tensor in tensors.items():
        if name.endswith(("query.weight", "q_lin.weight", "query.bias", "q_lin.bias")):
            tensor = tensor * 60
        elif name.endswith("Wqkv.weight"):
            tensor = torch.cat([tensor[: len(tensor) // 3] * 60, tensor[len(tensor) // 3 :]])
        changed[name] = tensor
    return changed


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_scores_far_apart_neither_overflow_nor_vanish(tiny: Tiny, family: str, dtype: str) -> None:
    folder = tiny(family, labels=3, change=sharp)
    inputs = reference.documents(family)
    tokens = encoder(folder, dtype=dtype).forward(*inputs)
    np.testing.assert_array_equal(encoder(folder, "last", dtype).forward(*inputs), tokens[inputs[2][1:] - 1])
    model = factory.build(family, 3)
    model.load_state_dict(sharp(model.state_dict()))
    _, plain = reference.run(model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32), family, *inputs)
    _, exact = reference.run(_sharp_float64(family), family, *inputs)
    if dtype == "int8":
        assert np.isfinite(tokens).all()
    else:
        assert rms(tokens - exact) <= 2 * rms(plain - exact)


def _sharp_float64(family: str) -> torch.nn.Module:
    model = factory.build(family, 3).double()
    model.load_state_dict(sharp(model.state_dict()))
    return model


def test_type_ids_left_out_are_zeros(tiny: Tiny) -> None:
    engine = CrossEncoder(tiny("bert")).engine
    ids, types, offsets = reference.documents("bert", (9, 30))
    np.testing.assert_array_equal(engine.forward(ids, None, offsets), engine.forward(ids, 0 * types, offsets))
    assert (engine.forward(ids, types, offsets) != engine.forward(ids, None, offsets)).all()


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_half_precision_checkpoints(tiny: Tiny, family: str, stored: str) -> None:
    folder = tiny(family, labels=3, dtype=stored)
    model = factory.build(family, 3)
    for parameter in model.parameters():  # not the module: that would round rotary frequencies, which are not stored
        parameter.data = parameter.data.to(getattr(torch, stored)).float()
    expected, _ = reference.run(model, family, *reference.documents(family))
    logits = CrossEncoder(folder).engine.forward(*reference.documents(family))
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()


def legacy_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("options", [{"shard_size": "20KB"}, {"change": legacy_norms}, {"change": bare}])
def test_other_layouts_of_the_same_weights_give_the_same_result(tiny: Tiny, options: dict[str, Any]) -> None:
    folder = tiny("bert", labels=3, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shard_size" in options)
    inputs = reference.documents("bert")
    np.testing.assert_array_equal(encoder(folder).forward(*inputs), encoder(tiny("bert", labels=3)).forward(*inputs))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.usefixtures("isa")
def test_inputs_out_of_range(tiny: Tiny, family: str) -> None:
    engine = CrossEncoder(tiny(family)).engine

    def forward(ids: list[int], offsets: list[int], types: list[int] | None = None) -> np.ndarray:
        return engine.forward(
            np.array(ids, np.int32), None if types is None else np.array(types, np.int32), np.array(offsets)
        )

    for wrong in (-1, factory.VOCABULARY, 2**31 - 1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {factory.VOCABULARY}"):
            forward([5, 6, wrong], [0, 1, 3])
    long = factory.MAX_LENGTH + 1
    with pytest.raises(ValueError, match=f"document 1 has {long} tokens, the model takes {factory.MAX_LENGTH}"):
        forward([5] * (long + 2), [0, 2, long + 2])
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        forward([5, 6], [0, 2, 2])
    for offsets in ([1, 2], [0, 1], [0, 3], [0, 2, 1, 2], [-1, 2]):
        with pytest.raises(ValueError, match="offsets"):
            forward([5, 6], offsets)
    with pytest.raises(ValueError, match="types must have as many entries"):
        forward([5, 6], [0, 2], [0])
    if family == "bert":
        for wrong in (-1, 2):
            with pytest.raises(ValueError, match=f"token type {wrong} is outside"):
                forward([5, 6], [0, 2], [0, wrong])
    assert forward([], [0]).shape == (0, 1)
    assert forward([5], [0, 1]).shape == (1, 1)
