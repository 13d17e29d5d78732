"""Checkpoints that somebody broke on purpose: mutations by seed, and the process that loads them.

Run as a program it is that process: it reads folders, a line each, and answers with what loading and scoring gave. It
is a process of its own because a signal must not end the test, with a bound on the memory that it may come to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAIRS = [
    ("the owl sleeps by day", "cats sleep all day"),
    ("how long do cats live", "a flea lives up to one year"),
    ("river", "the old bank by the river light green stone"),
]
MEMORY = 1 << 30  # that a worker may add to what it has once everything is imported
NUMBERS: list[Any] = [
    0,
    -1,
    -2,
    1,
    2,
    3,
    5,
    7,
    True,
    False,
    None,
    "4",
    "x",
    1.5,
    4.0,
    float("nan"),
    float("inf"),
    1e308,
    -1e-300,
    10**9,
    2**31,
    2**63,
    10**30,
    [],
    {},
    [1],
    {"a": 1},
    ["full_attention"],
]
MODEL_TYPES = ("bert", "roberta", "electra", "distilbert", "modernbert", "xlm-roberta", "llama", "t5", "nothing", 3)


# ---- mutations: each changes a folder that is its own


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def config_value(folder: Path, draw: random.Random) -> None:
    config = _json(folder / "config.json")
    config[draw.choice(sorted(config))] = draw.choice(NUMBERS)
    (folder / "config.json").write_text(json.dumps(config))


def size_value(folder: Path, draw: random.Random) -> None:
    config = _json(folder / "config.json")
    words = (
        "hidden",
        "layers",
        "heads",
        "size",
        "dim",
        "position",
        "eps",
        "pad",
        "window",
        "attention",
        "rope",
        "types",
    )
    keys = [key for key in config if any(word in key for word in words)]
    for _ in range(draw.choice((1, 1, 2))):
        config[draw.choice(sorted(keys))] = draw.choice(NUMBERS)
    (folder / "config.json").write_text(json.dumps(config))


def config_lacks(folder: Path, draw: random.Random) -> None:
    config = _json(folder / "config.json")
    del config[draw.choice(sorted(config))]
    (folder / "config.json").write_text(json.dumps(config))


def model_type(folder: Path, draw: random.Random) -> None:
    (folder / "config.json").write_text(
        json.dumps(_json(folder / "config.json") | {"model_type": draw.choice(MODEL_TYPES)})
    )


def config_text(folder: Path, draw: random.Random) -> None:
    file = folder / draw.choice(("config.json", "tokenizer_config.json", "tokenizer.json"))
    text = file.read_text()
    deep = "[" * 100_000
    variants: list[Callable[[], bytes]] = [
        lambda: text[: draw.randrange(len(text))].encode(),
        lambda: b"",
        lambda: b"[]",
        lambda: b"null",
        lambda: text.encode("utf-16"),
        lambda: b"\xff" + text.encode(),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: f'{{"a": {deep}'.encode(),
        lambda: text.replace("{", '{"deep": ' + '{"a":' * 20_000 + "1" + "}" * 20_000 + ",", 1).encode(),
        lambda: text.replace("{", '{"digits": ' + "9" * 6000 + ",", 1).encode(),
        lambda: text.replace("{", '{"hidden_size": 8, "model_type": "nothing", "version": "1.0",', 1).encode(),
        lambda: bytes(len(text)),
    ]
    file.write_bytes(draw.choice(variants)())


def odd_place(folder: Path, draw: random.Random) -> None:
    """A folder, a link to itself or nothing where a file belongs; a link to the file is no harm."""
    file = folder / draw.choice(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    kept = folder / "kept"
    file.rename(kept)
    kind = draw.choice(("folder", "loop", "nothing", "device", "link"))
    if kind == "folder":
        file.mkdir()
    elif kind != "nothing":
        file.symlink_to({"loop": file, "device": Path("/dev/null"), "link": kept}[kind])


def tokenizer_limit(folder: Path, draw: random.Random) -> None:
    settings = _json(folder / "tokenizer_config.json")
    settings["model_max_length"] = draw.choice([x for x in NUMBERS if x not in (1, 2, 3, 5, 7, 1.5, 4.0) or x is True])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer_ids(folder: Path, draw: random.Random) -> None:
    """Ids that the table of embeddings does not have."""
    tokenizer = _json(folder / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    far = draw.choice((10**6, 2**31 - 1, 2**32 - 1, len(vocabulary) + 1))
    for word in draw.sample(sorted(vocabulary), 40):
        vocabulary[word] += far
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def _save(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> None:
    from safetensors.numpy import save_file

    (folder / name).unlink(missing_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name, {"format": "pt"})


def tensor_lacks(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    for name in draw.sample(sorted(tensors), min(len(tensors), draw.choice((1, 1, 3)))):
        del tensors[name]
    _save(folder, tensors)


def tensor_shape(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    odd = [
        np.float32(1).reshape(()),
        value[None],
        value[:0],
        value[:-1],
        np.concatenate([value, value[:1]]),
        value.reshape(-1),
        value.T,
        value[..., :1],
        np.zeros((1,) * 9, np.float32),
    ]
    tensors[name] = draw.choice([some for some in odd if some.shape != value.shape])
    _save(folder, tensors)


def tensor_type(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    kind = draw.choice((np.float16, np.float64, np.int64, np.uint16, np.uint8, np.bool_))
    names = sorted(tensors) if draw.random() < 0.3 else [draw.choice(sorted(tensors))]
    for name in names:
        tensors[name] = tensors[name].astype(kind)
    _save(folder, tensors)


def tensor_value(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    name = draw.choice(sorted(tensors))
    flat = tensors[name].reshape(-1).copy()
    flat[draw.randrange(len(flat)) if draw.random() < 0.5 else slice(None)] = draw.choice((np.nan, np.inf, -np.inf))
    tensors[name] = flat.reshape(tensors[name].shape)
    _save(folder, tensors)


def tensor_extra(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    base = draw.choice(sorted(tensors))
    name = draw.choice(
        (
            base + "2",
            "x." + base,
            base.replace("bias", "beta"),
            base.rpartition(".")[0] + ".gamma",
            "score.weight",
            "linear.weight",
            "classifier.2.weight",
            base.replace(".0.", ".77."),
            "",
            "a" * 5000,
            "../../etc/passwd",
        )
    )
    if draw.random() < 0.3:
        tensors[name] = tensors.pop(base)
    else:
        tensors[name] = np.ones(draw.choice(((3,), (), (40, 40))), np.float32)
    _save(folder, tensors)


def tensor_swap(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    one, other = draw.sample(sorted(tensors), 2)
    if tensors[one].shape != tensors[other].shape:  # two of one shape would be another model
        tensors[one], tensors[other] = tensors[other], tensors[one]
    _save(folder, tensors)


def file_cut(folder: Path, draw: random.Random) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    kind = draw.choice(("cut", "early", "more", "empty", "zeros"))
    changed = {
        "cut": content[: draw.randrange(len(content))],
        "early": content[: draw.randrange(300)],
        "more": content + b"\0" * draw.choice((1, 4, 4096)),
        "empty": b"",
        "zeros": bytes(len(content)),
    }
    file.write_bytes(changed[kind])


def header_lies(folder: Path, draw: random.Random) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    text: bytes | None = None
    kind = draw.randrange(14)
    if kind == 0:
        entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]
    elif kind == 1:
        entry["data_offsets"] = [draw.choice((-4, 2**63, 10**30, 1.5, None, "0")), draw.choice((0, 2**64, 8))]
    elif kind == 2:
        entry["shape"] = draw.choice(([-1], [2**32, 2**32], [1.5], "x", None, [10**30], {}, [[3]], [0, 2**62], []))
    elif kind == 3:
        entry["dtype"] = draw.choice(("F99", "", None, 3, "F8_E4M3", "BOOL", "F4"))
    elif kind == 4:
        header[name] = draw.choice((None, 3, [], "x", {}))
    elif kind == 5:
        del entry[draw.choice(sorted(entry))]
    elif kind == 6:
        header["__metadata__"] = draw.choice((3, {"format": 3}, None, [], {"format": "tf"}))
    elif kind == 7:
        text = b'{"a":' * 50_000
    elif kind == 8:
        text = json.dumps(header).replace("{", "{" + json.dumps(name) + ": " + json.dumps(entry) + ",", 1).encode()
    elif kind == 9:
        text = b"\xff\xfe" + json.dumps(header).encode()
    elif kind == 10:
        text = json.dumps(header).encode()[:-3]
    elif kind == 11:
        other = draw.choice([key for key in header if key not in ("__metadata__", name)])
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == 12:
        text = json.dumps(header).encode() + b" " * draw.choice((1, 7, 5000))  # no harm: unaligned values
    text = json.dumps(header).encode() if text is None else text
    size = len(text) if kind != 13 else draw.choice((0, 1, 2**63, 2**64 - 1, len(text) + 1, len(text) - 1, 10**8 + 1))
    file.write_bytes(size.to_bytes(8, "little") + text + values)


def shards(folder: Path, draw: random.Random) -> None:
    tensors = _tensors(folder)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map: dict[str, Any] = {name: file for file, some in parts.items() for name in some}
    first, second = parts
    name = draw.choice(parts[first])
    kind = draw.choice(
        (
            "right",
            "right",
            "gone",
            "other",
            "up",
            "absolute",
            "number",
            "twice",
            "lacks",
            "unnamed",
            "deep",
            "list",
            "null",
            "folder",
            "cut",
        )
    )
    index: Any = {"metadata": {"total_size": draw.choice((0, 10**30, -1))}, "weight_map": weight_map}
    (folder / "model.safetensors").unlink()
    if kind == "gone":
        weight_map[name] = "model-00003-of-00003.safetensors"
    elif kind == "other":
        weight_map[name] = second
    elif kind in ("up", "absolute", "number"):
        weight_map[name] = {"up": "../" + first, "absolute": str(folder / first), "number": 3}[kind]
    elif kind == "lacks":
        weight_map["x.weight"] = first
    elif kind == "unnamed":
        del weight_map[name]
    for file, some in parts.items():
        extra = [name] if kind == "twice" and file == second else []
        _save(folder, {key: tensors[key] for key in some + extra}, file)
    if kind == "folder":
        (folder / second).unlink()
        (folder / second).mkdir()
    elif kind == "cut":
        (folder / second).write_bytes((folder / second).read_bytes()[:-5])
    text = json.dumps({"list": [], "null": None}.get(kind, index)) if kind != "deep" else "[" * 100_000
    (folder / "model.safetensors.index.json").write_text(text)


def modules_file(folder: Path, draw: random.Random) -> None:
    """What a sentence-transformers save says of its modules; for folders that have one."""
    file = folder / "modules.json"
    if not file.exists():
        tensor_shape(folder, draw)
        return
    entries = json.loads(file.read_text())
    entry = draw.choice(entries)
    kind = draw.randrange(9)
    if kind == 0:
        entry["path"] = draw.choice(("../..", "/etc", "", "nothing", "C:\\x", "a\0b"))
    elif kind == 1:
        entry["type"] = draw.choice(
            ("os.system", "", "pylate.models.Dense", "x.MultiVectorMask", "x.Dense", "x.WordWeights")
        )
    elif kind == 2:
        entry[draw.choice(("path", "type"))] = draw.choice((3, None, [], {}))
    elif kind == 3:
        entries = draw.choice((3, {}, "x", [3], [[]]))
    elif kind == 4:
        config = _json(folder / "2_Dense/config.json")
        config[draw.choice(sorted(config))] = draw.choice(NUMBERS)
        (folder / "2_Dense/config.json").write_text(json.dumps(config))
    elif kind == 5:
        (folder / "1_Pooling/config.json").write_text(
            json.dumps(
                draw.choice(
                    (
                        {"pooling_mode": "max"},
                        {"pooling_mode": 3},
                        {"pooling_mode_mean_tokens": "yes"},
                        {"pooling_mode": []},
                        {"pooling_mode_mean_tokens": False},
                        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
                    )
                )
            )
        )
    elif kind == 6:
        tensor_shape(folder / "2_Dense", draw)
    elif kind == 7:
        draw.choice((tensor_value, tensor_lacks, file_cut, header_lies))(folder / "2_Dense", draw)
    else:
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({draw.choice(("prompts", "model_type", "similarity_fn_name")): draw.choice((3, [], "ColBERT"))})
        )
    file.write_text(json.dumps(entries))


MUTATIONS = (
    config_value,
    size_value,
    size_value,
    config_lacks,
    model_type,
    config_text,
    odd_place,
    tokenizer_limit,
    tokenizer_ids,
    tensor_lacks,
    tensor_shape,
    tensor_type,
    tensor_value,
    tensor_extra,
    tensor_swap,
    file_cut,
    header_lies,
    header_lies,
    shards,
    shards,
    modules_file,
)


def make(base: Path, folder: Path, seed: int, count: int = 1) -> list[str]:
    """Copy a checkpoint and break it; return the names of the mutations, the same for the same seed."""
    draw = random.Random(seed)
    shutil.copytree(base, folder)
    done = []
    for _ in range(count):
        mutation = MUTATIONS[seed % len(MUTATIONS)] if not done else draw.choice(MUTATIONS)
        try:
            mutation(folder, draw)
        except Exception:  # of json, NumPy or safetensors
            if not done:
                raise  # a second mutation may meet files that the first left unreadable
        done.append(mutation.__name__)
    return done


# ---- the process that loads


def outcome(folder: Path, engine: str | None) -> dict[str, Any]:
    """What loading and scoring a folder gives: {"scores": [...]} or {"error": type, "message": text}."""
    from fastrerank import CrossEncoder, EmbeddingReranker

    try:
        if folder.name.startswith("vectors"):
            model: Any = EmbeddingReranker(folder, engine=engine, num_threads=1)
            scores = [model.score(query, [text])[0] for query, text in PAIRS]
        else:
            model = CrossEncoder(folder, engine=engine, num_threads=1)
            scores = model.predict(PAIRS, activation_fn="identity")
    except BaseException as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "bases": [t.__name__ for t in type(error).__mro__],
        }
    return {"scores": np.asarray(scores, np.float64).reshape(-1).tolist()}


def transformers_scores(folder: Path) -> list[float] | None:
    """What transformers itself gives for a classifier that it loads without making weights up; else None."""
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        from fastrerank.checkpoints.checkpoint import open_checkpoint

        rows, limit = [], open_checkpoint(folder).max_seq_length
        for query, text in PAIRS:
            inputs = tokenizer(query, text, return_tensors="pt", truncation=limit is not None, max_length=limit)
            with torch.inference_mode():
                rows.append(model.eval()(**inputs).logits[0].double().numpy())
    except Exception:  # it refuses: then there is no other score to compare with
        return None
    return np.concatenate(rows).tolist()


def work() -> None:
    import resource

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for folder in sys.argv[2:]:
        outcome(Path(folder), None)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        ask = transformers_scores(folder) if request["reference"] else outcome(folder, request["engine"])
        print(json.dumps(ask), flush=True)


class Worker:
    """The process, started anew when it has died."""

    def __init__(self, warm: list[Path]) -> None:
        self._warm = [str(folder) for folder in warm]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, folder: Path, engine: str | None = None, reference: bool = False) -> Any:
        """The answer; {"died": return code} if there is none."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "work", *self._warm],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"},
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"folder": str(folder), "engine": engine, "reference": reference}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        self._process = None
        return {"died": process.wait()}

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


if __name__ == "__main__":
    work()
