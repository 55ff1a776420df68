"""Plans of the real library, by the tiles of the kernels that it finds."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import has_kernel
from problems import BF16

from flash_attn._abi import Design
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.plan import BackwardPlan, CachePlan, plan_backward, plan_cache

pytestmark = pytest.mark.gpu
H200 = 132
"""Multiprocessors of the GPU on which the plans below were measured."""


def on_h200(family: str) -> bool:
    found = torch.cuda.get_device_properties(0)
    forced = os.environ.get("FLASH_ATTN_FORCE_FAMILY", "sm90")
    return (found.major, found.multi_processor_count, forced) == (9, H200, family)


def cache_plan(queries: int, keys: int, num_splits: int = 0, aligned: bool = True) -> CachePlan:
    """Return the plan of one sequence with 32 heads over 8 of 128 elements."""
    library = gpu.prepared(0).library
    return plan_cache(
        library, 0, BF16, 1, queries, 32, 8, keys, (128, 128), num_splits, aligned, 0.125, 0.0, False
    )


def backward_plan(head_dim: int, keys: int, right: int = -1, wants_keys: bool = True) -> BackwardPlan:
    library = gpu.prepared(0).library
    return plan_backward(library, 0, BF16, 1, keys, 32, 8, head_dim, -1, right, wants_keys)


@pytest.fixture(autouse=True)
def kernels():
    if not all(has_kernel(BF16, d, way) for d in (64, 128) for way in ("split", "backward")):
        pytest.skip("this build is trimmed")


def test_bounds():
    assert cache_plan(1, 64) == CachePlan(1, Design.MMA)
    assert 1 < cache_plan(1, 1 << 20).num_splits <= 128
    assert cache_plan(7, 4096, num_splits=5).num_splits == 5
    assert cache_plan(2048, 4096, aligned=False).design == Design.MMA
    for head_dim in (64, 128):
        assert backward_plan(head_dim, 1 << 20).key_parts == 1
        assert backward_plan(head_dim, 128, wants_keys=False) == BackwardPlan(1, head_dim)
        assert backward_plan(head_dim, 128) == BackwardPlan(4, head_dim)


def test_what_was_measured_on_an_h200():
    if not on_h200("sm90"):
        pytest.skip("for kernels of sm90 on an H200")
    assert cache_plan(1, 65536).num_splits in (16, 32)
    assert cache_plan(512, 4096) == CachePlan(1, Design.WGMMA)
    assert cache_plan(128, 4096) == CachePlan(5, Design.WGMMA)
    assert [backward_plan(128, 2048, right).key_parts for right in (-1, 0)] == [1, 4]
    assert [backward_plan(64, keys).key_parts for keys in (1024, 2048, 4096)] == [4, 2, 1]
