"""What the pages say that a program can say: `python -m bench.docs` writes it, `--check` names what differs.

Between `<!-- begin: NAME -->` and `<!-- end -->` a page holds what the function of that name returns: tables of
`bench/results/*.json`, the command line's options, the checkpoints that are known by name.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import typer

from fastrerank.cli import app
from fastrerank.engine.families import FAMILIES
from fastrerank.rerankers.recognise import published_checkpoints

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- begin: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LABELS = {
    "sentence-transformers": "sentence-transformers, default",
    "onnxruntime-int8": "ONNX Runtime dynamic int8",
    "onnxruntime-fp32": "ONNX Runtime fp32",
    "openvino-int8": "OpenVINO int8, calibrated by NNCF",
    "openvino-bf16": "OpenVINO bf16",
    "openvino-fp32": "OpenVINO fp32",
    "ctranslate2-int8": "CTranslate2 int8",
    "ctranslate2-fp32": "CTranslate2 fp32",
    "torch-bf16": "torch bf16",
    "torch-fp32": "torch fp32",
}


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """A Markdown table whose last `right` columns are numbers."""
    rule = ["---"] * (len(columns) - right) + ["---:"] * right
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, rule, *rows))


def _ms(seconds: Sequence[float]) -> str:
    ms = 1e3 * median(seconds)
    return f"{ms:.0f} ms" if ms >= 20 else f"{ms:.1f} ms" if ms >= 2 else f"{ms:.2f} ms"


def _encoders(name: str) -> str:
    result = _result(name)
    timed = {row["name"]: row for row in result["engines"] if row["state"] == "ok" and row["seconds"]}
    base = timed["sentence-transformers"]["seconds"]
    rows = []
    for row in sorted(timed.values(), key=lambda row: median(row["seconds"])):
        if row["name"] == "sentence-transformers-ids":
            continue
        label = f"**fastrerank {row['precision']}**" if row["ours"] else LABELS[row["name"]]
        speed = result["flop"] / median(row["seconds"])
        faster = median(theirs / ours for theirs, ours in zip(base, row["seconds"], strict=True))
        peak = result["peaks"].get(row["precision"])
        memory = f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else ""
        share = f"{speed / peak:.0%}".replace("%", " %") if peak else ""
        rows.append(
            [label, f"{1e3 * median(row['seconds']):.0f}", f"{faster:.1f}", f"{speed / 1e9:.0f}", share, memory]
        )
    columns = ["engine", "ms", "× sentence-transformers", "GFLOP/s", "of the host's peak", "peak MiB"]
    host, work = result["host"], result["workload"]
    about = (
        f"One query and {work['documents']} passages of DL19, {work['tokens']:,} tokens, from token ids to scores; "
        f"{host['threads']} threads of {host['cores']} cores, {host['cpu']}: `{host['command']}`.\n\n"
    )
    return about + _table(columns, rows, right=5)


def cpu_minilm() -> str:
    """MiniLM-L6 on a CPU with AVX-512 and bfloat16 products."""
    return _encoders("cpu-minilm")


def cpu_minilm_amx() -> str:
    """The same on a CPU with AMX."""
    return _encoders("cpu-minilm-amx")


def gpu() -> str:
    """The largest workloads on a GPU, each against its rival's best way."""
    rows = []
    for model in _result("gpu-encoders")["models"]:
        found = {row["name"]: row["seconds"] for row in model["rows"] if row["state"] == "ok"}
        ours = found["fastrerank"]["100"]
        best = min((times["100"] for name, times in found.items() if not name.startswith("fastrerank")), key=median)
        name = {"xlmr-large": "bge-reranker-v2-m3", "minilm": "MiniLM-L6", "modernbert-base": "ModernBERT-base"}
        what = f"{name[model['name']]}'s shape, 100 passages"
        rows.append([what, _ms(ours), _ms(best), "sentence-transformers at its best batch size"])
    for file in ("gpu-llm", "gpu-llm-large"):
        for model in _result(file)["llms"]:
            found = {row["name"]: row["seconds"] for row in model["rows"] if row["state"] == "ok"}
            name = {"qwen3-0.6b": "Qwen3-0.6B", "qwen3-4b": "Qwen3-4B", "llama-3.1-8b": "Llama-3.1-8B"}[model["name"]]
            rows.append(
                [
                    f"Qwen3-Reranker's prompts of 100 passages, {name}'s shape",
                    _ms(found["fastrerank"]["100"]),
                    _ms(found["transformers"]["100"]),
                    "transformers, sorted batches, last logits only",
                ]
            )
    cur = {(row["case"], row["way"]): row["call"] for row in _result("gpu-cur")["cur"]}
    for case, what in (
        ("10,000,000 x 256 int8, k 100", "one query"),
        ("10,000,000 x 256 int8, k 100, 32 queries", "32 queries"),
    ):
        rows.append(
            [
                f"exact best 100 of 10,000,000 int8 vectors, {what}",
                _ms(cur[case, "ops.cur_topk"]),
                _ms(cur[case, "torch products + topk, bfloat16"]),
                "torch, bfloat16 products and `topk`",
            ]
        )
    return _table(["", "fastrerank", "rival", ""], rows)


def soak() -> str:
    """The server under honest and hostile traffic."""
    result = _result("cpu-soak")
    resident = {name: f"{size / 2**20:.0f} MiB" for name, size in result["resident"].items()}
    rows = [
        ["honest requests answered, all right", f"{result['honest']['200']:,}, {result['wrong']} wrong"],
        ["hostile requests and clients", f"{sum(sum(one.values()) for one in result['hostile'].values()):,}"],
        ["longest answer of `/health`", f"{result['health_longest']:.2f} s of {result['health_asked']:,}"],
        ["memory after the warm-up, at the end", f"{resident['warm']}, {resident['end']}"],
        ["after its worker was killed", f"{result['killed']['status']}, exit {result['killed']['exit_code']}"],
    ]
    return f"`{result['host']['command']}`, {result['minutes']:.0f} minutes.\n\n" + _table(["", ""], rows)


def models() -> str:
    """Checkpoints that are known by name, and the encoder families that the native engine runs."""
    rows = []
    for one in published_checkpoints():
        names = ", ".join(f"`{name}`" for name in (*one.patterns, *one.names)).replace("|", "\\|")
        rows.append([names, ", ".join(f"`{method}`" for method in one.methods), f"`{one.template}`", one.source])
    families = [[f"`{name}`", "native, torch", "float32, bfloat16, int8; float16 through torch"] for name in FAMILIES]
    return (
        "### Encoders by `model_type`\n\n"
        + _table(["model_type", "engine", "dtype"], families)
        + "\n### Language models by name\n\nNames are matched in small letters, without the owner; patterns at "
        "their beginning.\n\n" + _table(["name", "methods", "template", "source"], rows)
    )


def command_line() -> str:
    """Every command with its arguments and options."""
    parts: list[str] = []

    def add(path: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                add(f"{path} {name}", child)
            return
        about = inspect.cleandoc(command.help or "").split("\f")[0]
        rows = []
        for parameter in command.params:
            given = ", ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
            if parameter.param_type_name == "argument":
                given = f"`{parameter.name.upper()}`"
            text = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
            rows.append([given, text])
        parts.append(f"## {path}\n\n{about}\n\n" + (_table(["", ""], rows) if rows else ""))

    add("fastrerank", typer.main.get_command(app))
    return "\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (cpu_minilm, cpu_minilm_amx, gpu, soak, models, command_line)
}


def filled(text: str) -> str:
    """Return a page with its blocks as the program says them; ValueError naming a block that nobody writes."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"no block is named {match[2]!r}; there are {', '.join(BLOCKS)}")
        return f"{match[1]}\n{BLOCKS[match[2]]().strip()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def main(check: bool) -> int:
    """Write all pages, or with `check` say which differ; returns the exit code."""
    differing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = filled(text)
        if text != wanted:
            differing.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(wanted, encoding="utf-8")
    for name in differing:
        print(f"{name}: {'differs; run `make docs`' if check else 'written'}")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
