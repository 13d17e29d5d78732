"""Model.run: every readout against the model itself, whatever the batch is made of and however it is divided."""

from __future__ import annotations

import re
from typing import Any

import decoders
import numpy as np
import pytest

pytest.importorskip("torch")
import torch
import torch_families as families
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from fastrerank.engine.batch import Batch, Segment
from fastrerank.engine.readouts import Masses, Mean, Reading, Rows, Tokens
from fastrerank.engine.torch.model import Model, place
from fastrerank.engine.usage import Cost

LENGTHS = (5, 1, 17, 9)


def body(family: str) -> Any:
    model = decoders.build(family) if family in decoders.FAMILIES else families.build(family)
    return getattr(model, model.base_model_prefix)


def load(family: str, **options: Any) -> Model:
    runner, reason = place(body(family))
    return Model(runner, on_cpu=4096, reason=reason, **options)


def batch(seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    return Batch.of_ids([random.integers(5, 100, n) for n in LENGTHS])


def alone(family: str, ids: np.ndarray) -> torch.Tensor:
    """The last hidden states of a text alone, by the model's own attention."""
    tensor = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        states: torch.Tensor = body(family)(input_ids=tensor, attention_mask=torch.ones_like(tensor))[0][0]
    return states


def texts(some: Batch) -> list[np.ndarray]:
    return np.split(some.ids, some.offsets[1:-1])


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("budget", [4096, 18, 1])
@pytest.mark.parametrize("family", ["bert", "llama", "bloom"])
def test_every_readout_equals_the_model_on_each_segment_alone(family: str, budget: int) -> None:
    model, some = load(family), batch()
    model.budget = budget
    states = [alone(family, ids) for ids in texts(some)]
    at = np.array([4, 0, -1, 3])
    for readout, expected in (
        (Rows(at), torch.stack([states[n][at[n]] for n in (0, 1, 3)])),
        (Rows.last(some), torch.stack([state[-1] for state in states])),
        (Mean(), torch.stack([state.mean(0) for state in states])),
        (Tokens(), torch.cat(states)),
    ):
        values, cost = model.run(some, readout)
        assert values.dtype == torch.float32
        assert close(values, expected)
        assert torch.equal(model.run(some, readout, on_host=True)[0], values)
        doubled, _ = model.run(some, readout, lambda x: 2 * x)
        assert torch.equal(doubled, 2 * values)
        assert cost.tokens >= len(some.ids)
        assert (cost.forwards == 1) == (budget == 4096)


def test_segments_see_their_prefix_and_a_prefix_may_be_read_itself() -> None:
    model = load("llama")
    random = np.random.default_rng(1)
    prefix, *tails = [random.integers(5, 100, n) for n in (11, 4, 6, 1)]
    some = Batch.of([Segment(prefix, causal=True), *(Segment(tail, prefix=0, causal=True) for tail in tails)])
    whole = [alone("llama", prefix), *(alone("llama", np.concatenate([prefix, tail])) for tail in tails)]
    expected = torch.stack([state[-1] for state in whole])
    for budget in (4096, 16, 1):
        model.budget = budget
        values, cost = model.run(some, Rows.last(some))
        assert close(values, expected)
        assert cost.prefix_tokens == 11 * cost.forwards
    dependants, _ = model.run(some, Rows(np.array([-1, 3, -1, 0])))
    assert close(dependants, expected[[1, 3]])


def test_common_beginnings_are_computed_once_and_read_by_nobody() -> None:
    model, plain = load("llama", shares=True), load("llama")
    some = Batch.of_ids(decoders.prompts())
    values, cost = model.run(some, Rows.last(some))
    expected, whole = plain.run(some, Rows.last(some))
    assert close(values, expected)
    assert cost.tokens < whole.tokens == len(some.ids)
    assert cost.prefix_tokens > 0
    first = Rows(np.zeros(len(some), np.int64))  # a row of the beginning itself
    assert torch.equal(model.run(some, first)[0], plain.run(some, first)[0])


@pytest.mark.parametrize("family", ["bert", "llama", "roberta"])
def test_embeddings_stand_for_ids(family: str) -> None:
    model, some = load(family), batch()
    table = model.runner.backbone.get_input_embeddings()
    with torch.inference_mode():
        embeddings = table(torch.from_numpy(some.ids))
    given = Batch(some.ids, some.offsets, embeddings=embeddings)
    for budget in (4096, 18):
        model.budget = budget
        assert torch.equal(model.run(given, Tokens())[0], model.run(some, Tokens())[0])
    placeholders = Batch(np.full(len(some.ids), 10**6), some.offsets, embeddings=embeddings)
    if family != "roberta":  # which counts its positions over ids that are not padding
        assert torch.equal(model.run(placeholders, Mean())[0], model.run(given, Mean())[0])


def test_positions_of_one_row_are_the_callers() -> None:
    model, some = load("llama"), batch()
    counted = np.concatenate([np.arange(n) for n in LENGTHS])
    plain, _ = model.run(some, Tokens())
    assert torch.equal(model.run(Batch(some.ids, some.offsets, position_ids=counted), Tokens())[0], plain)
    moved, _ = model.run(Batch(some.ids, some.offsets, position_ids=2 * counted), Tokens())
    assert not close(moved, plain)


def test_positions_of_three_rows_equal_a_model_that_places_images() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLTextConfig(**sizes, **heads, max_position_embeddings=512, rope_parameters=rope)
    config._attn_implementation = "eager"
    network = decoders.randomise(Qwen2_5_VLTextModel(config), 0)
    some, random = batch(), np.random.default_rng(2)
    positions = random.integers(0, 40, (3, len(some.ids)))
    expected = []
    for ids, rows in zip(texts(some), np.split(positions, some.offsets[1:-1], axis=1), strict=True):
        tensor = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            states = network(
                input_ids=tensor,
                position_ids=torch.from_numpy(rows)[:, None],
                attention_mask=torch.ones_like(tensor),
                use_cache=False,
            )
        expected.append(states[0][0])
    runner, reason = place(network)
    assert reason == ""
    model = Model(runner, on_cpu=4096)
    for budget in (4096, 18):
        model.budget = budget
        placed = Batch(some.ids, some.offsets, position_ids=positions)
        assert close(model.run(placed, Tokens())[0], torch.cat(expected))


def test_masses_are_a_readout_of_the_same_run() -> None:
    model = load("llama")
    reading = Reading.of(np.arange(5, 40), np.arange(50, 58), None, 2, 30)
    values, cost = model.run(reading.batch, Masses(reading, {0: None}))
    assert values.shape == (28,)
    assert cost == Cost(1, 43, 43)
    assert 0 < values.sum() <= 4  # a row pays 1 in each of four heads


def test_a_padded_model_refuses_what_it_cannot_express() -> None:
    model, some = load("bloom"), batch()
    for extra in ({"prefix": np.array([-1, 0, -1, -1])}, {"position_ids": np.arange(len(some.ids))}):
        with pytest.raises(ValueError, match="padded batches, which take token ids without prefixes"):
            model.run(Batch(some.ids, some.offsets, **extra), Tokens())
    reading = Reading.of(np.arange(5, 40), np.arange(50, 58), None, 2, 30)
    with pytest.raises(ValueError, match="attention masses are read of packed rows"):
        model.run(Batch.of_ids([reading.shared]), Masses(reading, {0: None}))


def test_memory_that_runs_out_halves_the_budget_until_one_segment_is_left() -> None:
    model, some = load("llama"), batch()
    expected, _ = model.run(some, Rows.last(some))
    read, sizes = model.runner.read, []

    def scarce(part: Batch, readout: Any) -> Any:
        sizes.append(len(part.ids))
        if len(part.ids) > 17:
            raise torch.OutOfMemoryError
        return read(part, readout)

    model.runner.read = scarce
    values, cost = model.run(some, Rows.last(some))
    assert torch.equal(values, expected)
    assert model.budget <= 17 < max(sizes)
    assert cost == Cost(cost.forwards, len(some.ids))
    model.runner.read = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError, match=r"one document of \d+ tokens does not fit in the memory of cpu"):
        model.run(some, Tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": np.array([0, 5, 5, 32])}, "document 1 has no tokens"),
        ({"offsets": np.array([0, 9, 5, 32])}, "offsets must not decrease"),
        ({"offsets": np.array([0, 5])}, "offsets must go from 0 to the number of ids, 32"),
        ({"types": np.zeros(3, np.int64)}, "types must have as many entries as ids: 32, got 3"),
        ({"ids": np.full(32, 7) + 200 * (np.arange(32) == 8)}, "document 2: token id 207 is outside the vocabulary"),
        ({"ids": np.full(600, 7), "offsets": np.array([0, 80, 600])}, "document 1 has 520 tokens, the model takes 512"),
        ({"ids": np.zeros(0, np.int64), "offsets": np.array([0])}, "batch must hold at least one segment"),
    ],
)
def test_wrong_batches_are_named(changes: Any, message: str) -> None:
    some = batch()
    given = {"ids": some.ids, "offsets": some.offsets} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        load("llama").run(Batch(**given), Tokens())
