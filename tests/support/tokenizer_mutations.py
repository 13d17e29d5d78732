"""Damaged tokenizer.json files, and a process of its own that loads them and says what came of it."""

from __future__ import annotations

import base64
import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**32 - 1,
    2**63,
    1e308,
    "",
    "x",
    "�",
    "x" * 20000,
    [],
    {},
    [[]],
    [None],
    [["a", 1]],
    {"a": 2**32 - 1},
    {"String": ""},
    {"Regex": "(a*)*$"},
    {"Regex": "("},
    {"Regex": "(" * 3000 + ")" * 3000},
    "é" * 7,
    {"type": "Sequence", "normalizers": []},
    {"type": "Nope"},
    "<0x00>",
    [0, "a"],
    base64.b64encode(b"\xff" * 40).decode(),
    {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\x10\0\0\0" + bytes(range(256)) * 4).decode()},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
    {"type": "Metaspace", "replacement": "▁▁", "prepend_scheme": "always"},
]
TEXTS = ["", "a", "The owl sleeps, 7 mice.", "東京は é", "\0 \n", "x" * 300, "[SEP] </s> <unk>", "!!!!    ...."]


def mutated(original: dict[str, Any], seed: int) -> dict[str, Any]:
    """A copy of a tokenizer.json with one to three places changed: replaced, deleted, doubled, nested or exchanged."""
    choose = random.Random(seed)
    data = copy.deepcopy(original)
    for _ in range(choose.choice((1, 1, 2, 3))):
        node: Any = data
        path: list[Any] = []
        while isinstance(node, (dict, list)) and node and (not path or choose.random() < 0.75):
            key = choose.choice(list(node)) if isinstance(node, dict) else choose.randrange(len(node))
            path.append(key)
            node = node[key]
        if not path:
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        kind = choose.randrange(7)
        if kind == 0 and isinstance(holder, dict):
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(node))
        elif kind == 2:
            for _ in range(choose.choice((2, 200))):
                node = [node]
            holder[path[-1]] = node
        elif kind == 3 and isinstance(holder, dict):
            other = choose.choice(list(holder))
            holder[path[-1]], holder[other] = holder[other], holder[path[-1]]
        elif kind == 4 and isinstance(holder, dict) and "vocab" in original["model"]:
            holder["zz" * 30000 if choose.random() < 0.5 else "<0x41>"] = copy.deepcopy(choose.choice(NASTY))
        else:
            holder[path[-1]] = copy.deepcopy(choose.choice(NASTY))
    return data


def main(folder: Path, seeds: list[int]) -> None:
    """Load every mutation of folder/tokenizer.json and print its seed before, and what came of it behind."""
    import tokenizers

    from fastrerank.inputs import Tokenizer

    original = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for seed in seeds:
        print(f"{seed} ", end="", flush=True)
        place = folder / "mutated"
        place.mkdir(exist_ok=True)
        (place / "tokenizer.json").write_text(json.dumps(mutated(original, seed)))
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (place / "config.json").write_text('{"model_type": "bert"}')
        try:
            ours = Tokenizer.load(place)
            batches = [ours.singles([text]) for text in TEXTS]
            ours.pairs("who?", TEXTS)
        except ValueError as error:
            print("refused", str(error).replace("\n", " ")[:100], flush=True)
            continue
        reference = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
        reference.no_truncation()
        reference.no_padding()
        wrong = [
            text for text, batch in zip(TEXTS, batches, strict=True) if batch.ids.tolist() != reference.encode(text).ids
        ]
        print(f"other ids for {wrong}" if wrong else "right", flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
