"""The torch engine against transformers on one document at a time, packed and padded, in every family."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
import tiny as factory
import torch
import torch_families as families
import transformers

from fastrerank.checkpoints.checkpoint import open_checkpoint
from fastrerank.engine.batch import Segment, pack
from fastrerank.engine.heads import Head
from fastrerank.engine.torch import backbone as torch_backbone
from fastrerank.engine.torch import row as torch_row
from fastrerank.engine.torch.encoder import DTYPES, TorchEncoder

BOUND = 2e-5
Saved = Callable[[str], Path]
_LOADED: dict[Any, TorchEncoder] = {}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved(family)` -> folder of its tiny checkpoint with three labels. Do not write to it."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = families.save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


def load(folder: Path, head: Head | None = None, **options: Any) -> TorchEncoder:
    """A loaded encoder, kept for other tests: change nothing in it."""
    key = (folder, head, *sorted(options.items()))
    if key not in _LOADED:
        _LOADED[key] = TorchEncoder.load(open_checkpoint(folder), head, **options)
    return _LOADED[key]


def close(ours: np.ndarray, expected: np.ndarray, bound: float = BOUND) -> bool:
    return ours.shape == expected.shape and bool(np.abs(ours - expected).max() <= bound * np.abs(expected).max())


def agrees(ours: np.ndarray, family: str, output: int) -> bool:
    """Within `BOUND` of transformers' float32.

    Where that is itself further than `BOUND` from its float64, as of a model that multiplies rounding errors (6e-5 in
    mobilebert's token vectors), it says nothing within `BOUND`: then at most twice as far from float64.
    """
    plain, exact = families.results(family)[output], families.results(family, "float64")[output]
    if close(plain, exact):
        return close(ours, plain)
    return ours.shape == exact.shape and bool(np.abs(ours - exact).max() <= 2 * np.abs(plain - exact).max())


@pytest.mark.parametrize("family", families.PACKED)
def test_the_reference_spreads(family: str) -> None:
    # Parity of constant logits, or of tokens that do not look at each other, would prove nothing.
    logits, _ = families.results(family)
    assert np.ptp(logits, axis=0).max() > 0.3
    ids, types, offsets = families.documents(family, (12,))
    changed = ids.copy()
    changed[3] = 5 + (ids[3] - 4) % (factory.VOCABULARY - 5)
    before, after = (families.run(families.build(family), some, types, offsets)[1] for some in (ids, changed))
    assert np.abs(after - before)[-1].max() > 1e-3


@pytest.mark.parametrize("family", [*families.PACKED, *families.PADDED])
@pytest.mark.parametrize("packed", [None, False])
def test_logits_and_token_vectors_equal_transformers(saved: Saved, family: str, packed: bool | None) -> None:
    documents = families.documents(family)
    engine = load(saved(family), packed=packed)
    assert engine.packed == (packed is None and family not in (*families.PADDED, "eurobert"))
    assert engine.packed or engine.model.runner.pads == (family not in families.UNPADDED)
    assert agrees(engine.forward(*documents), family, 0)
    if families.results(family)[1] is not None:
        vectors = load(saved(family), Head("tokens"), packed=packed)
        assert vectors.packed == (packed is None and family not in families.PADDED)
        assert agrees(vectors.forward(*documents), family, 1)


@pytest.mark.parametrize("family", families.PACKED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_in_half_precision_is_no_worse_than_torchs(saved: Saved, family: str, dtype: str) -> None:
    _, exact = families.results(family, "float64")
    _, plain = families.results(family, dtype)
    ours = load(saved(family), Head("tokens"), dtype=dtype).forward(*families.documents(family))
    assert np.linalg.norm(ours - exact) <= 2 * np.linalg.norm(plain - exact)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_float32_as_stored(saved: Saved, family: str, dtype: str) -> None:
    engine = load(saved(family), dtype=dtype)
    stored = families.build(family).state_dict()
    named = {name: value for name, value in engine._head.named_parameters() if value.ndim == 2}
    assert named
    for name, value in named.items():
        assert value.dtype == torch.float32
        source = name.removeprefix("model.").replace("rows.", f"{families.build(family).base_model_prefix}.")
        assert torch.equal(value, stored.get(source, stored.get(name.removeprefix("model."), value[:0]))), name
    assert {value.dtype for value in engine.model.runner.backbone.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "mistral", "deberta"])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10), data=st.data())
def test_a_document_scores_the_same_in_any_company(
    saved: Saved, family: str, lengths: list[int], data: st.DataObject
) -> None:
    engine = load(saved(family))
    ids, types, offsets = families.documents(family, lengths, seed=len(lengths))
    spans = [slice(begin, end) for begin, end in pairwise(offsets)]
    alone = np.concatenate([engine.forward(ids[s], types[s], np.array([0, s.stop - s.start])) for s in spans])
    assert close(engine.forward(ids, types, offsets), alone)
    order = data.draw(st.permutations(range(len(lengths))))
    rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
    permuted = np.cumsum([0, *(lengths[i] for i in order)])
    assert close(engine.forward(ids[rows], types[rows], permuted), alone[list(order)])


@pytest.mark.parametrize("family", ["bert", "mistral", "deberta"])
@pytest.mark.parametrize("readout", ["first", "last", "mean", "tokens"])
def test_readouts_and_batches(tmp_path: Path, family: str, readout: Any) -> None:
    families.save(tmp_path, family)
    documents = families.documents(family)
    _, tokens = families.results(family)
    spans = [slice(begin, end) for begin, end in pairwise(documents[2])]
    expected = {
        "tokens": tokens,
        "first": np.stack([tokens[span][0] for span in spans]),
        "last": np.stack([tokens[span][-1] for span in spans]),
        "mean": np.stack([tokens[span].mean(0) for span in spans]),
    }[readout]
    engine = TorchEncoder.load(open_checkpoint(tmp_path), Head(readout))
    for engine.model.budget in (4096, 200, 60, 1):
        assert close(engine.forward(*documents), expected)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_a_padding_token_inside_a_text_is_not_counted(saved: Saved, family: str) -> None:
    ids, types, offsets = families.documents(family, (12, 5, 30), seed=3)
    ids[[2, 3, 8, 12, 46]] = 1
    expected, _ = families.run(families.build(family), ids, types, offsets)
    assert close(load(saved(family)).forward(ids, types, offsets), expected)
    assert close(load(saved(family), packed=False).forward(ids, types, offsets), expected)


@pytest.mark.parametrize("family", ["qwen3", "llama-without-pad"])
@pytest.mark.parametrize("packed", [None, False])
def test_decoders_read_the_last_token_that_their_model_reads(saved: Saved, family: str, packed: bool | None) -> None:
    ids, types, offsets = families.documents(family, (9, 4, 1, 3))
    ids[[7, 8, 11, 13, 14, 15, 16]] = 0  # padding tokens at the end of texts, and texts of nothing else
    expected, _ = families.run(families.build(family), ids, types, offsets)
    assert close(load(saved(family), packed=packed).forward(ids, types, offsets), expected)


@pytest.mark.parametrize("family", families.WINDOWED)
def test_windows_end_where_the_reference_ends_them(saved: Saved, family: str) -> None:
    # Parity at every length shows it; here that the windows cut something off in these models at all.
    ids, types, offsets = families.documents(family, (60,))
    windowed = load(saved(family), Head("tokens"))
    states = windowed.forward(ids, types, offsets)
    whole = TorchEncoder.load(open_checkpoint(saved(family)), Head("tokens"))
    original = torch_row.Row.intervals
    try:
        torch_row.Row.intervals = lambda self, _: original(self, None)  # type: ignore[method-assign]
        assert not close(whole.forward(ids, types, offsets), states, 1e-2)
    finally:
        torch_row.Row.intervals = original  # type: ignore[method-assign]


def stretched(folder: Path, rope_type: str) -> tuple[Path, Callable[[], Any]]:
    """A Llama or Phi-3 whose rotary frequencies depend on the longest text, and a function that builds it anew."""
    settings = families._DECODER | {"max_position_embeddings": 64, "num_labels": 3, "vocab_size": factory.VOCABULARY}
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
        settings |= {"original_max_position_embeddings": 16}
    else:
        settings |= {"max_position_embeddings": 16}

    def make() -> Any:
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**settings, rope_parameters=dict(rope))
        )
        factory.randomised(model)
        return model.eval()

    make().save_pretrained(folder)
    return folder, make


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("packed", [True, False])
def test_rotary_positions_that_stretch_with_the_longest_text(tmp_path: Path, rope_type: str, packed: bool) -> None:
    folder, make = stretched(tmp_path, rope_type)
    ids, types, offsets = families.documents("llama", (5, 40, 12, 30, 16, 17, 3))
    expected = np.concatenate(
        [families.run(make(), ids[a:b], types[a:b], np.array([0, b - a]))[0] for a, b in pairwise(offsets)]
    )
    engine = TorchEncoder.load(open_checkpoint(folder), packed=packed)
    assert engine.packed == packed
    for _ in range(2):
        assert close(engine.forward(ids, types, offsets), expected)


@pytest.mark.parametrize("family", [*families.DECODERS, "modernbert", "bert"])
def test_segments_with_a_shared_prefix_see_what_they_would_alone(saved: Saved, family: str) -> None:
    # In a decoder, prefix and segment are one causal text. A bidirectional prefix sees itself only, so there is no
    # single text to compare with: for encoders, the prefix is checked alone, and against dependants that change.
    runner = load(saved(family), Head("tokens")).model.runner
    random = np.random.default_rng(0)
    prefix, *texts = [random.integers(5, factory.VOCABULARY, n) for n in (11, 5, 1, 17, 9)]
    segments = [Segment(prefix, causal=runner.causal)]
    segments += [Segment(text, prefix=0, causal=runner.causal) for text in texts]
    batch = pack(segments)
    with torch.inference_mode():
        states = runner.hidden(batch).double().numpy()

    def alone(ids: np.ndarray) -> np.ndarray:
        return families.run(families.build(family), ids, 0 * ids, np.array([0, len(ids)]))[1]

    assert close(states[:11], alone(prefix))
    for n, text in enumerate(texts, 1):
        rows = states[batch.starts[n] : batch.ends[n]]
        if runner.causal:
            assert close(rows, alone(np.concatenate([prefix, text]))[11:])
        else:
            with torch.inference_mode():
                pair = pack([segments[0], Segment(text, prefix=0)])
                assert close(runner.hidden(pair).double().numpy()[11:], rows)
            assert not close(rows, alone(text), 1e-2)


@pytest.mark.parametrize("family", ["bert", "qwen2", "deberta"])
def test_many_threads_may_call_one_object(saved: Saved, family: str) -> None:
    engine = load(saved(family))
    calls = [families.documents(family, (3 + n, 20, 1 + n), seed=n) for n in range(8)]
    expected = [engine.forward(*call) for call in calls]
    start = threading.Barrier(4)

    def work(number: int) -> list[np.ndarray]:
        start.wait()
        return [engine.forward(*calls[(number + n) % 8]) for n in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for number, results in enumerate(pool.map(work, range(4))):
            for n, result in enumerate(results):
                assert close(result, expected[(number + n) % 8])


@pytest.mark.parametrize("family", ["bert", "deberta"])
@pytest.mark.parametrize("readout", ["mean", "tokens"])
def test_running_out_of_memory_halves_the_budget_and_goes_on(
    tmp_path: Path, family: str, readout: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    families.save(tmp_path, family)
    engine = TorchEncoder.load(open_checkpoint(tmp_path), Head(readout))
    documents = families.documents(family)
    expected = engine.forward(*documents)
    forward, sizes = engine.model.runner.backbone.forward, []

    def scarce(*args: Any, **inputs: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 170:
            raise torch.OutOfMemoryError("no memory for that")
        return forward(*args, **inputs)

    monkeypatch.setattr(engine.model.runner.backbone, "forward", scarce)
    with caplog.at_level(logging.WARNING, "fastrerank"):
        assert close(engine.forward(*documents), expected)
    assert engine.model.budget <= 170 < max(sizes)
    assert "out of memory on cpu: going on with" in caplog.text
    sizes.clear()
    assert close(engine.forward(*documents), expected)
    assert max(sizes) <= 170  # it has learned


def test_one_document_that_does_not_fit_is_an_error(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEncoder.load(open_checkpoint(saved("bert")))

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(engine.model.runner.backbone, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        engine.forward(*families.documents("bert"))


def test_what_speaks_against_packing_is_said(saved: Saved) -> None:
    for family, words in (
        ("deberta", "computes its attention itself"),
        ("mpnet", "computes its attention itself"),
        ("t5", "no separate encoder"),
    ):
        assert words in load(saved(family)).reason
        with pytest.raises(ValueError, match=f"cannot run .* packed: .*{words}.*engine='padded' runs it"):
            TorchEncoder.load(open_checkpoint(saved(family)), packed=True)
    assert load(saved("bert")).reason == ""


def test_a_backbone_that_does_not_run_packed_as_it_says_is_found_out(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Positions that are wrong by one, and a mask that lets a document see its neighbour.
    position_ids = torch_backbone.PackedBackbone.position_ids
    monkeypatch.setattr(torch_backbone.PackedBackbone, "position_ids", lambda self, b: position_ids(self, b) + 1)
    assert "packed hidden states differ" in TorchEncoder.load(open_checkpoint(saved("bert"))).reason
    monkeypatch.undo()

    def leaking(self: torch_row.Row, _: int | None) -> torch.Tensor:
        lo, hi, plo, phi = self.table[2:6]
        return torch.stack([torch.zeros_like(lo), torch.full_like(hi, len(hi)), plo, phi])

    monkeypatch.setattr(torch_row.Row, "intervals", leaking)
    for dtype in DTYPES:
        engine = TorchEncoder.load(open_checkpoint(saved("bert")), dtype=dtype)
        assert "packed hidden states differ" in engine.reason
        assert not engine.packed
    documents = families.documents("bert")
    assert close(TorchEncoder.load(open_checkpoint(saved("bert"))).forward(*documents), families.results("bert")[0])


def test_only_a_model_that_cannot_pack_is_padded_for_it(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: Any, window: int | None) -> torch.Tensor:
        raise torch_row.CannotPack(f"no window {window} here")

    monkeypatch.setattr(torch_row.Row, "intervals", refuses)
    engine = TorchEncoder.load(open_checkpoint(saved("bert")))
    assert (engine.packed, engine.reason) == (False, "no window None here")

    def breaks(_: Any, __: int | None) -> torch.Tensor:
        raise RuntimeError("the kernel failed")

    monkeypatch.setattr(torch_row.Row, "intervals", breaks)
    with pytest.raises(RuntimeError, match="the kernel failed"):
        TorchEncoder.load(open_checkpoint(saved("bert")))


def test_a_head_whose_backbone_pools_otherwise_runs_whole(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(saved("bert")).readout == "first"
    pool = transformers.models.bert.modeling_bert.BertPooler.forward
    monkeypatch.setattr(
        transformers.models.bert.modeling_bert.BertPooler,
        "forward",
        lambda self, states: pool(self, states.flip(1)),
    )
    documents = families.documents("bert")
    engine = TorchEncoder.load(open_checkpoint(saved("bert")))
    assert engine.readout == "last"  # the last row, as the flipped pooler reads it
    model = families.build("bert")
    assert close(engine.forward(*documents), families.run(model, *documents)[0])
    forward = transformers.BertModel.forward

    @functools.wraps(forward)
    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        output = forward(self, *args, **options)
        output.pooler_output = None if output.pooler_output is None else 2 * output.pooler_output
        return output

    monkeypatch.undo()
    monkeypatch.setattr(transformers.BertModel, "forward", scaled)
    engine = TorchEncoder.load(open_checkpoint(saved("bert")))
    assert (engine.readout, engine.packed) == ("logits", False)
    assert "BertModel pools its rows in a way of its own" in engine.reason
    assert close(engine.forward(*documents), families.run(model, *documents)[0])


def test_a_model_of_ours_called_from_outside_is_refused(saved: Saved) -> None:
    model = load(saved("bert")).model.runner.backbone
    with pytest.raises(RuntimeError, match="inside fastrerank only"):
        model(torch.ones((1, 3), dtype=torch.long))


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_wrong_ids_types_and_offsets(saved: Saved, family: str) -> None:
    engine = load(saved(family))
    long = factory.MAX_LENGTH + 1

    def forward(ids: list[int], offsets: list[int], types: list[int] | None = None) -> np.ndarray:
        return engine.forward(np.array(ids, np.int32), None if types is None else np.array(types), np.array(offsets))

    for wrong in (-1, factory.VOCABULARY, 2**31 - 1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {factory.VOCABULARY}"):
            forward([5, 6, wrong], [0, 1, 3])
    if family != "deberta":
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
    with pytest.raises(ValueError, match=r"token type 2 cannot be given to XLNet.*declares no token types"):
        load(saved("xlnet")).forward(np.array([5, 6], np.int32), np.array([0, 2]), np.array([0, 2]))
    assert forward([], [0]).shape == (0, 3)
    assert forward([5], [0, 1]).shape == (1, 3)
