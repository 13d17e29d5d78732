"""Arrays on their way to a GPU: buffers are used again when their copy has been made, and never before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastrerank.engine.torch.placement import PinnedBuffers, upload  # noqa: E402

HERE = torch.device("cpu")


class Copied:
    """An event that lies behind copies as long as the test says so."""

    done = True

    def query(self) -> bool:
        return Copied.done

    def record(self, _: Any) -> None:
        pass


class Ordinary(PinnedBuffers):
    """Buffers of ordinary memory; `to` of a tensor on its own device copies nothing, so what is returned shows them."""

    def _new(self, size: int) -> tuple[Any, Any]:
        return torch.empty(size, dtype=torch.uint8), Copied()


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Ordinary:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(Copied, "done", True)
    return Ordinary()


def test_values_shapes_and_dtypes_arrive(buffers: Ordinary) -> None:
    strided = np.arange(40, dtype=np.int64).reshape(5, 8)[:, ::2]
    for array in (np.arange(6, dtype=np.int32).reshape(2, 3), np.float32([1.5]), strided, np.array([True, False])):
        found = buffers.upload(array, HERE)
        assert found.numpy().dtype == array.dtype
        np.testing.assert_array_equal(found.numpy(), array)
    empty = upload(np.zeros((0, 3), np.float32), HERE)
    assert empty.shape == (0, 3)


def test_a_buffer_is_taken_again_when_its_copy_is_made(buffers: Ordinary) -> None:
    first = buffers.upload(np.zeros(4, np.int64), HERE)
    Copied.done = False
    second = buffers.upload(np.ones(4, np.int64), HERE)
    assert first.data_ptr() != second.data_ptr()
    assert first.tolist() == [0] * 4
    Copied.done = True
    assert buffers.upload(np.ones(4, np.int64), HERE).data_ptr() in (first.data_ptr(), second.data_ptr())


def test_the_smallest_buffer_that_fits_is_taken(buffers: Ordinary) -> None:
    large = buffers.upload(np.zeros(1 << 20, np.uint8), HERE)
    small = buffers.upload(np.zeros((1 << 20) + 1, np.uint8), HERE)  # does not fit in the first
    assert {large.untyped_storage().nbytes(), small.untyped_storage().nbytes()} == {1 << 20, 1 << 21}
    again = buffers.upload(np.zeros(9, np.uint8), HERE)
    assert again.data_ptr() == large.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_a_gpu_gets_is_not_overwritten() -> None:
    device = torch.device("cuda", 0)
    arrays = [np.full(1 << 18, n, np.int32) for n in range(40)]
    found = [upload(array, device) for array in arrays]
    for tensor, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
