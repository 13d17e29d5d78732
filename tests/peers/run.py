"""Run the peers' own tests of cross-encoder inference on `fastrerank.CrossEncoder` in place of theirs.

    python tests/peers/run.py                          # source distributions from the package index
    python tests/peers/run.py --checkout FOLDER 6.0.0  # tests of a checkout of sentence-transformers, as of a version

Each suite names its version, the files that are run, and every test that is skipped with its reason. Source
distributions from 4.1 on leave the tests of cross-encoders out, so that these need a checkout. Nothing of the peers is
kept: archives are unpacked into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TRAINS = "training is refused by name: CrossEncoderTrainer or fit() of sentence_transformers does it"
SAVES = "saving is refused by name: save_pretrained() of sentence_transformers does it"
WEIGHTS = "expects numbers of real weights or a data set of the hub"
HEADLESS = "the checkpoint has no trained head, and none is made up"
MODULES = "builds or changes torch modules, which are not here"
RANKS_LABELS = "label= ranks by a label of several, where sentence-transformers raises"
WARNINGS = "expects warnings in the log of transformers; here they are Python's DeprecationWarning or ValueError"
NAMES = "reads the class of an activation object; here it is a NumPy function"
TEMPLATES = "reads the peer's own modules: model[0].preprocess(), input_formatter"

OLD_SKIPS = [
    (r"test_pretrained_stsb", WEIGHTS),
    (r"test_train_stsb", TRAINS),
    (r"test_load_with_revision", MODULES),
    (r"test_rank\b|test_rank\[", WEIGHTS),
    (r"test_safe_serialization", SAVES),
]
SKIPS = [
    *OLD_SKIPS,
    (r"test_trainer|test_train_", TRAINS),
    (r"test_push_to_hub|test_model_card|test_conversion_ignores", SAVES),
    (r"test_pretrained|test_qwen3_reranker|test_bge_reranker", WEIGHTS),
    (r"losses/", TRAINS),
    (r"test_backends", "needs exported models of optimum; backend= is accepted with a warning"),
    (r"test_num_labels_fresh_model|test_load_activation_fn_from_kwargs", HEADLESS),
    (r"_dense_|without_transformer|without_scores|low_precision_logits|test_predict_batch_size_1|module_call", MODULES),
    (r"test_rank_multiple_labels", RANKS_LABELS),
    (r"test_rank_convert_kwargs_deprecated|test_logger_warning|rank_args_decorator|init_args_decorator", WARNINGS),
    (r"test_default_activation_fn\b", NAMES),
    (r"test_load_activation_fn_from_config\[|test_load_activation_fn_from_config_custom", SAVES),
    (r"chat_template|pair_roles|mixed_batch|single_pair_role|rejected|configured_chat", TEMPLATES),
    (r"two_devices", "needs a GPU"),
]

# Files of a checkout that are about inference; the others train, save or write model cards.
OF_INFERENCE = (
    "test_model.py",
    "test_cross_encoder.py",
    "test_multi_process.py",
    "test_pretrained.py",
    "test_backends.py",
    "evaluation",
)


@dataclass(frozen=True)
class Suite:
    """One peer's tests: the files to run, regular expressions of skipped tests with reasons, or why there are none."""

    package: str
    version: str
    files: tuple[str, ...] = ()
    skips: tuple[tuple[str, str], ...] = ()
    absent: str = ""


NOT_SHIPPED = "its source distribution holds no tests of cross-encoders"
SUITES = (
    Suite("sentence-transformers", "2.7.0", ("tests/rerankers/test_cross_encoder.py",), tuple(OLD_SKIPS)),
    Suite("sentence-transformers", "3.4.1", ("tests/rerankers/test_cross_encoder.py",), tuple(OLD_SKIPS)),
    Suite("sentence-transformers", "4.1.0", absent=f"{NOT_SHIPPED}; run with --checkout"),
    Suite("sentence-transformers", "5.1.2", absent=f"{NOT_SHIPPED}; run with --checkout"),
    Suite("sentence-transformers", "6.2.0", absent=f"{NOT_SHIPPED}; rerankers/test_drop_in.py sweeps its public names"),
    Suite("FlagEmbedding", "1.3.5", absent=NOT_SHIPPED),
    Suite("beir", "2.2.0", absent=NOT_SHIPPED),
    Suite("rerankers", "0.10.0", absent="its one test of cross-encoders replaces rank() by a mock"),
    Suite("mteb", "2.26.24", absent="its tests of rerankers load models and data sets of the hub"),
    Suite(
        "haystack, langchain, cohere, infinity-emb, vllm",
        "-",
        absent="no tests of rerankers in the package index; "
        "integrations/test_integrations.py and serve/test_serve_clients.py run their own classes and clients",
    ),
)


def unpacked(suite: Suite, folder: Path) -> Path:
    """Download a source distribution from the package index and return the folder that it unpacks to."""
    wanted = f"{suite.package}=={suite.version}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--no-build-isolation", wanted, "-d", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(path for path in folder.iterdir() if path.is_dir())


def run(suite: Suite, root: Path, folder: Path) -> dict[str, int]:
    """Run a suite and return how many tests passed, failed and were skipped; pytest's report goes to stdout."""
    made = folder / "checkpoints"
    made.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(root), str(HERE), str(HERE.parent / "support")])
    settings = {"PYTHONPATH": paths, "PEER_FOLDER": str(made), "PEER_SKIPS": json.dumps(suite.skips)}
    if not (root / "tests" / "utils.py").is_file():
        settings["PEER_UTILS"] = "1"
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rsf",
        "-p",
        "substitute",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "--tb=short",
        "-o",
        "addopts=",
        *suite.files,
    ]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **settings, **offline}, text=True, capture_output=True, check=False
    )
    print(done.stdout + done.stderr[-2000:])
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    if done.returncode not in (0, 1) and not counts:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", nargs=2, metavar=("FOLDER", "VERSION"))
    given = parser.parse_args().checkout
    table: list[tuple[str, str]] = []
    broken = False
    with tempfile.TemporaryDirectory() as name:
        suites = SUITES
        if given:
            files = [f"tests/cross_encoder/{one}" for one in OF_INFERENCE]
            found = tuple(file for file in files if (Path(given[0]) / file).exists())
            suites = (Suite("sentence-transformers", given[1], found, tuple(SKIPS)),)
        for number, suite in enumerate(suites):
            label = f"{suite.package} {suite.version}"
            if suite.absent:
                table.append((label, suite.absent))
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            counts = run(suite, Path(given[0]) if given else unpacked(suite, folder), folder)
            broken |= bool(set(counts) & {"failed", "error", "errors"}) or not counts.get("passed")
            table.append((label, ", ".join(f"{count} {word}" for word, count in counts.items())))
    for label, result in table:
        print(f"{label}: {result}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
