import ctypes
from types import SimpleNamespace

import pytest

from codegen.compilation import cuda_driver


def answers(status, number):
    def version(pointer):
        pointer._obj.value = number
        return status

    return lambda _: SimpleNamespace(cuDriverGetVersion=version)


@pytest.fixture(autouse=True)
def uncached():
    cuda_driver.driver_cuda.cache_clear()
    yield
    cuda_driver.driver_cuda.cache_clear()


@pytest.mark.parametrize(
    ("status", "number", "expected"),
    [(0, 12040, (12, 4)), (0, 13000, (13, 0)), (0, 0, None), (34, 12040, None)],
)
def test_the_driver_tells_its_cuda(monkeypatch, status, number, expected):
    monkeypatch.setattr(ctypes, "CDLL", answers(status, number))
    assert cuda_driver.driver_cuda() == expected


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_driver.driver_cuda() is None


@pytest.mark.parametrize(
    ("built_by", "words"),
    [
        ((12, 0), "driver 525 (CUDA 12.0) or newer"),
        ((12, 7), "driver 525 (CUDA 12.0) or newer"),
        ((12, 9), "driver 550.54 (CUDA 12.4) or newer"),
        ((13, 2), "driver 580 (CUDA 13.0) or newer"),
        ((14, 1), "driver (CUDA 14.0) or newer"),
    ],
)
def test_what_built_programs_need(built_by, words):
    assert cuda_driver.needed_driver(built_by) == words
