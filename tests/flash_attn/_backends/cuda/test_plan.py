"""Plans of the library: asked for once for each shape, kept by what they depend on, and forced by tests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from plans import forced
from problems import BF16, qkv
from standin import StandIn, unpack

from flash_attn import _abi, flash_attn_func, flash_attn_with_kvcache
from flash_attn._abi import Design


class Planner(StandIn):
    """Records what it is asked to plan; with a `refusal`, it makes no plan."""

    def __init__(self, refusal=0):
        super().__init__()
        self.asked, self.refusal = [], refusal

    def plan_cache(self, packed, plan):
        self.asked.append(unpack("cache", packed))
        return self.refusal or super().plan_cache(packed, plan)

    def plan_backward(self, packed, plan):
        self.asked.append(unpack("backward", packed))
        return self.refusal or super().plan_backward(packed, plan)


@pytest.fixture
def library(install):
    planner = Planner()
    install(planner)
    return planner


@dataclass
class Decode:
    """A call over a cache; the fields are what its plan depends on."""

    batch: int = 2
    queries: int = 1
    heads: tuple[int, int] = (4, 2)
    keys: int = 200
    head_dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = BF16
    num_splits: int = 0
    softmax_scale: float = 0.125
    softcap: float = 0.0

    def run(self, **named):
        q, k, v = qkv(self.batch, self.queries, self.keys, self.heads, self.head_dims, self.dtype)
        numbers = {"softmax_scale": self.softmax_scale, "softcap": self.softcap}
        return flash_attn_with_kvcache(q, k, v, num_splits=self.num_splits, **numbers, **named)


OTHERS = [
    {"batch": 3}, {"queries": 2}, {"heads": (4, 1)}, {"keys": 201}, {"head_dims": (64, 32)},
    {"dtype": torch.float16}, {"num_splits": 1}, {"softmax_scale": -0.125}, {"softcap": 2.0},
]  # fmt: skip


def test_a_plan_is_asked_for_once(library):
    for _ in range(3):
        Decode().run()
    (params,) = library.asked
    assert (params.forward.batch, params.forward.seqlen_q, params.forward.seqlen_k) == (2, 1, 200)
    assert (params.forward.num_heads, params.forward.num_heads_k, params.num_splits) == (4, 2, 0)
    assert (params.forward.head_dim, params.forward.head_dim_v) == (64, 64)
    assert len(library.cache_calls) == 3


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_shape_has_a_plan_of_its_own(library, other):
    Decode().run()
    Decode(**other).run()
    assert len(library.asked) == 2 and library.asked[0] != library.asked[1]


def test_slopes_and_unaligned_caches_have_plans_of_their_own(library):
    Decode().run()
    Decode().run(alibi_slopes=torch.rand(4))
    Decode(head_dims=(64, 59)).run()
    plain, biased, odd = library.asked
    assert biased.forward.alibi_slopes and not plain.forward.alibi_slopes
    assert plain.forward.k_row_stride % 8 == 0 != odd.forward.k_row_stride % 8


def test_another_library_plans_anew(install):
    planners = Planner(), Planner()
    for planner in planners:
        install(planner)
        Decode().run()
    assert [len(planner.asked) for planner in planners] == [1, 1]


def test_a_backward_is_planned_by_its_mask_and_wanted_gradients(library):
    def run(causal=False, only_q=False):
        q, k, v = qkv(1, 20, 30, (4, 2), 64)
        for x in (q,) if only_q else (q, k, v):
            x.requires_grad_()
        flash_attn_func(q, k, v, causal=causal).sum().backward()

    for named in ({}, {}, {"causal": True}, {"only_q": True}):
        run(**named)
    plain, causal, only_q = library.asked
    assert (plain.forward.window_right, causal.forward.window_right) == (-1, 0)
    assert plain.dk and causal.dk and not only_q.dk
    assert [params.key_parts for params, _ in library.backward_calls] == [2, 2, 2, 1]


@pytest.mark.parametrize("refusal", [_abi.Status.NOT_BUILT, _abi.Status.CUDA_ERROR])
def test_a_plan_that_is_refused_says_how_to_build_the_kernel(install, refusal):
    install(Planner(refusal))
    command = "pip install ." if refusal == _abi.Status.NOT_BUILT else "is not built"
    with pytest.raises(RuntimeError, match=f"{command}`?$") as over_cache:
        Decode().run()
    q, k, v = qkv(1, 8, 8, grad=True)
    out = flash_attn_func(q, k, v)
    with pytest.raises(RuntimeError, match=f"{command}`?$") as backward:
        out.sum().backward()
    for caught, direction in ((over_cache, "split"), (backward, "backward")):
        named = f"FLASH_ATTN_DIRECTIONS=forward,{direction}" in str(caught.value)
        assert named == (refusal == _abi.Status.NOT_BUILT)


def test_a_plan_can_be_forced(library):
    with pytest.raises(KeyError), forced(5, Design.WGMMA):
        Decode().run()
        raise KeyError
    Decode().run()
    (wanted, _), (planned, _) = library.cache_calls
    assert (wanted.num_splits, wanted.design) == (5, Design.WGMMA)
    assert (planned.num_splits, planned.design) == (3, Design.MMA) and len(library.asked) == 1
