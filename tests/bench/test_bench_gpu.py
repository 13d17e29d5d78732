"""The GPU benchmark on tiny shapes on this CPU: every part runs, and checks what it should before it times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
import torch
from typer.testing import CliRunner

from bench import kernels as gpu_kernels
from bench import run
from bench.cross_encoder import cpu as cross_encoder
from bench.cross_encoder import gpu_engines, gpu_models
from bench.cur import gpu as gpu_cur
from bench.everything import comparison as gpu
from bench.everything import profile as gpu_profile
from bench.everything import report as gpu_report

CPU = torch.device("cpu")
NAMES = tuple(gpu_models.SHAPES)


def options(cache: Path, **changes: Any) -> gpu.Options:
    given: dict[str, Any] = {
        "device": "cpu",
        "tiny": True,
        "rounds": 1,
        "parts": gpu.PARTS,
        "models": NAMES,
        "llms": (),
        "compile": False,
        "seconds": float("inf"),
        "data": (cache / "nowhere",),
        "cache": cache,
        "command": "python -m bench.run all",
    }
    return gpu.Options(**(given | changes))


class Log:
    def print(self, *_: Any, **__: Any) -> None:
        pass


def plain_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """What `varlen_attn` computes on a GPU, document by document."""
    assert ends_q.dtype == torch.int32
    assert torch.equal(ends_q, ends_k)
    lengths = ends_q.diff().tolist()
    assert max(lengths) == longest_q == longest_k
    parts = []
    for some in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in some]
        place = torch.arange(len(some[0]))
        apart = place[None] - place[:, None]  # key minus query
        left, right = window_size
        seen = ((left < 0) | (-apart <= left)) & ((right < 0) | (apart <= right))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale))
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.nightly
def test_the_command_runs_every_part_and_writes_what_it_found(cache: Path) -> None:
    file = cache / "gpu.json"
    given = ["--device", "cpu", "all", "--tiny", "--no-compile", "--rounds", "2", "--cache", str(cache)]
    given += ["--llms", "qwen3-0.6b"]
    done = CliRunner().invoke(run.app, [*given, "--data", str(cache / "nowhere"), "--json", str(file), "--markdown"])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(file.read_text())
    assert [llm["name"] for llm in found["llms"]] == ["qwen3-0.6b"]
    assert {"torch", "transformers", "sentence-transformers"} <= set(found["host"]["versions"])
    assert found["host"]["command"].startswith("python -m bench.run")
    assert set(found["ceilings"]) == {"matmul", "copy"}
    assert "synthetic words" in found["notes"][0]
    assert not any(str(cache) in note for note in found["notes"])
    assert [model["name"] for model in found["models"]] == list(NAMES)
    for model in found["models"]:
        rows = {row["name"]: row for row in model["rows"]}
        assert rows.pop("fastrerank-varlen")["state"] == "not here"
        assert {row["state"] for row in rows.values()} == {"ok"}
        assert all(len(row["seconds"][size]) == 2 for row in rows.values() for size in ("6", "40"))
        assert model["profile"]["kinds"]["matmul"] > 0
        assert f"**{model['name']}: from token ids to scores**" in done.output
    states = {one["way"]: one["state"] for one in found["attention"]}
    assert states == {"ops.attention": "ok", "varlen_attn": "not here", "padded SDPA": "ok"}
    assert {(one["way"], one["state"]) for one in found["attention_mass"]} == {
        ("ops.attention_mass", "ok"),
        ("torch, float32", "ok"),
    }
    assert {one["way"]: one["state"] for one in found["cur"]} == {
        "ops.cur_topk": "not here",
        "kernels alone": "not here",
        "torch products + topk, bfloat16": "ok",
        "torch in two passes, bfloat16": "ok",
    }
    assert {one["state"] for one in found["label_logits"]} == {"ok"}
    assert {one["way"].split(",")[0] for one in found["label_logits"]} == {"ops.label_logits", "torch"}
    assert set(found["models"][1]["latency"]) == {"fastrerank", "sentence-transformers"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["all"], "give --tiny"),
        (["all", "--tiny", "--parts", "engine"], "part 'engine' is unknown; valid are ceilings"),
        (["all", "--tiny", "--only", "bert"], "model 'bert' is unknown"),
        (["all", "--tiny", "--llms", "gpt"], "language model 'gpt' is unknown; valid are qwen3-0.6b"),
        (["llm", "--tiny", "--dtype", "int8"], "--dtype 'int8' is unknown; valid are float32, bfloat16"),
        (["llm", "--only", "qwen3-4b"], "--only is for the comparison on a GPU"),
        (["--device", "cuda", "llm", "--docs", "20"], "--docs is for the comparison on a CPU"),
        (["--device", "cuda", "cross-encoder"], "on a GPU run `all`"),
    ],
)
def test_what_cannot_run_is_said(given: list[str], message: str) -> None:
    done = CliRunner().invoke(run.app, given)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_of_one_says_so() -> None:
    done = CliRunner().invoke(run.app, ["--device", "cuda", "all"])
    assert done.exit_code == 1
    assert "no usable CUDA device" in done.output


@pytest.mark.nightly
def test_varlen_and_compiled_engines_score_as_ours_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gpu_engines, gpu_kernels):
        monkeypatch.setattr(module, "find_varlen", lambda _: plain_varlen)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: compiler(model, backend="eager", **given))
    torch._dynamo.reset()
    found = gpu.run(options(cache, parts=("engines", "attention")), Log())
    assert {one.state for one in found.attention} == {"ok"}
    for model in found.models:
        kinds = (*gpu_engines.RIVALS, *gpu_engines.OURS)
        assert [(row.name, row.detail) for row in model.rows] == [(kind.name, "") for kind in kinds]
    assert gpu_report.tables(found)
    compiled = gpu.run(options(cache, parts=("engines",), models=("minilm",), compile=True), Log())
    kinds = (*gpu_engines.RIVALS, *gpu_engines.OURS, *gpu_engines.COMPILED)
    assert [(row.name, row.detail) for row in compiled.models[0].rows] == [(kind.name, "") for kind in kinds]
    late = gpu.run(options(cache, parts=("engines",), models=("minilm",), compile=True, seconds=0.0), Log())
    states = {row.name: (row.state, row.detail) for row in late.models[0].rows}
    assert states["fastrerank-compiled"][0] == "left out"
    assert "0 s are left" in states["fastrerank-compiled"][1]


def test_wrong_and_failing_engines_are_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Any, pairs: Any) -> Any:
        return right(self, pairs)[::-1].copy()

    def failing(*_: Any) -> Any:
        raise IndexError("no such head")

    right = gpu_engines.Packed.scores
    monkeypatch.setattr(gpu_engines.Packed, "scores", wrong)
    monkeypatch.setattr(gpu_engines.SentenceTransformersTuned, "scores", failing)
    found = gpu.run(options(cache, parts=("engines",), models=("modernbert-base",)), Log())
    rows = {row.name: row for row in found.models[0].rows}
    assert rows["fastrerank"].state == "WRONG"
    assert "at most" in rows["fastrerank"].detail
    assert rows["sentence-transformers-tuned"].state == "failed"
    assert "IndexError: no such head" in rows["sentence-transformers-tuned"].detail
    assert not rows["fastrerank"].seconds
    assert rows["sentence-transformers"].seconds
    assert not found.sound

    monkeypatch.setattr(gpu_kernels.ops, "attention", lambda q, *_: q)
    found = gpu.run(options(cache, parts=("attention",), models=("minilm",)), Log())
    assert {one.way: one.state for one in found.attention}["ops.attention"] == "WRONG"
    assert not found.sound


def test_a_scan_that_misses_the_best_is_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_cur_device import scan_in_torch

    monkeypatch.setattr(gpu_cur, "_missing", lambda _: "")
    monkeypatch.setattr(gpu_cur._cur_cuda, "_launch", scan_in_torch)
    found = gpu.run(options(cache, parts=("cur",), models=()), Log())
    assert {one.state for one in found.cur} == {"ok"}
    assert found.cur[0].error == found.cur[1].error == 0
    assert any("Scan of packed items" in table.title for table in gpu_report.tables(found))
    monkeypatch.setattr(gpu_cur.ops, "cur_topk", lambda *given: (torch.arange(given[2])[None], None))
    found = gpu.run(options(cache, parts=("cur",), models=()), Log())
    assert [one.state for one in found.cur] == ["WRONG", "ok", "ok", "ok"]


def test_wrong_attention_masses_are_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_kernels.ops.attention_mass
    monkeypatch.setattr(gpu_kernels.ops, "attention_mass", lambda *given: 1.01 * right(*given))
    found = gpu.run(options(cache, parts=("attention_mass",), models=()), Log())
    states = {one.way: one.state for one in found.attention_mass}
    assert states == {"ops.attention_mass": "WRONG", "torch, float32": "ok"}
    assert not found.sound


def test_wrong_label_logits_are_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_kernels.ops.label_logits
    monkeypatch.setattr(gpu_kernels.ops, "label_logits", lambda *a, **b: [x * 1.01 for x in right(*a, **b)])
    found = gpu.run(options(cache, parts=("label_logits",), models=()), Log())
    states = {one.way: one.state for one in found.label_logits}
    assert states.pop("ops.label_logits") == "WRONG"
    assert set(states.values()) == {"ok"}
    assert not found.sound


def test_our_torch_engine_is_compared_on_a_cpu_where_it_is_named() -> None:
    native = ("fastrerank-float32", "fastrerank-bfloat16", "fastrerank-int8")
    assert "fastrerank-torch" not in cross_encoder.select([])
    chosen = cross_encoder.select(["sentence-transformers", "fastrerank-torch"])
    assert chosen == (*native, "fastrerank-torch", "sentence-transformers", "sentence-transformers-ids")
    with pytest.raises(ValueError, match="'fastrerank-float32' names no rival"):
        cross_encoder.select(["fastrerank-float32"])


def test_operations_are_counted_pair_by_pair() -> None:
    lengths = np.array([1, 5, 9, 30])
    for window in (None, 1, 3, 9, 40):
        counted = 0
        for length in lengths:
            place = np.arange(length)
            counted += int((np.abs(place[:, None] - place[None]) < (window or 1000)).sum())
        assert gpu_models.key_pairs(lengths, window) == counted
    config = {
        "model_type": "modernbert",
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "local_attention": 4,
    }
    model = gpu_models.GpuModel(gpu_models.SHAPES["modernbert-base"], Path(), config, "")
    linear = 2 * 45 * (4 * 16 + 3 * 4 * 6)
    attention = 2 * 4 * (gpu_models.key_pairs(lengths) + gpu_models.key_pairs(lengths, 3))
    assert model.flop(lengths) == 2 * (linear + attention + 4 * 20)


def test_a_profile_adds_up() -> None:
    work = [("kernel", 10.0, 20.0), ("nvjet_tst", 5.0, 9.0), ("nvjet_tst", 15.0, 25.0), ("Memcpy DtoH", 30.0, 31.0)]
    found = gpu_profile._gpu_profile(work)
    assert found.span == pytest.approx(26e-6)
    assert found.gaps == pytest.approx(6e-6)  # 9 to 10 and 25 to 30
    assert found.launches == 4
    assert found.kinds == pytest.approx({"attention": 10e-6, "matmul": 14e-6, "copies, casts": 1e-6})
    assert found.longest[0] == ("nvjet_tst", 2, pytest.approx(14e-6))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "activations"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "element-wise"),
        ("void at::native::elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies, casts"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16>", "embeddings, gathers"),
        ("triton_per_fused_native_layer_norm_0", "norms"),
        ("triton_red_fused_sum_3", "fused by torch.compile"),
    ],
)
def test_kernels_are_sorted_by_their_names(name: str, kind: str) -> None:
    assert gpu_profile.kind_of(name) == kind


def test_synthetic_pairs_are_as_long_as_the_real_ones(cache: Path) -> None:
    folder = gpu_models.synthetic(cache / "long", queries=3, documents=100)
    assert gpu_models.corpus((cache / "nowhere", folder)) == (folder, f"DL19 passages of {gpu_models.data.DL19}")
    path, what = gpu_models.tokenizer_of(folder, cache, real_text=False)
    work = gpu.data.load(folder, gpu.data.PairTokenizer(path.parent), documents=100, length="natural")
    assert "trained on these texts" in what
    expected = np.interp([10, 50, 90], gpu_models._PERCENTS, gpu_models._TOKENS)
    np.testing.assert_allclose(np.percentile(work.pairs.lengths, [10, 50, 90]), expected, rtol=0.25)


def test_a_part_that_fails_is_said_and_the_others_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("no such kernel")

    monkeypatch.setattr(gpu_kernels, "mass_cases", broken)
    saved: list[int] = []
    parts = ("attention_mass", "label_logits")
    found = gpu.run(options(cache, parts=parts), Log(), lambda some: saved.append(len(some.failures)))
    assert not found.sound
    assert list(found.failures) == ["attention_mass"]
    assert "no such kernel" in found.failures["attention_mass"]
    assert {one.state for one in found.label_logits} == {"ok"}
    assert saved == [1, 1, 1]
