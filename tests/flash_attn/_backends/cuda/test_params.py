"""What the CUDA path packs passes the library's own check of its parameters."""

from __future__ import annotations

import pytest
import torch
from checker import Checker
from standin import StandIn, make

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn._backends.cuda import library as _library

LENGTHS = torch.tensor([5, 9], dtype=torch.int32)


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    return Checker(tmp_path_factory.mktemp("checks"))


@pytest.fixture
def seen(install, checker):
    """Names of the operations that were called, each with parameters that pass."""
    names, library = [], StandIn()

    def operation(name):
        def call(packed, stream):
            assert checker.check(name, packed) == (0, "")
            names.append(name)
            return 0

        return call

    for name in ("forward", "backward", "cache", "dropout_probs"):
        setattr(library, name, operation(name))
    install(library)
    return names


@pytest.mark.parametrize(
    "arguments", [{"causal": True}, {"window_size": (3, 70000), "softcap": 3.0}], ids=str
)
@pytest.mark.parametrize("head_dims", [(64, 64), (59, 17)], ids=str)
def test_fixed_length(seen, arguments, head_dims):
    q, k, v = (x.requires_grad_() for x in make(head_dim=head_dims[0], head_dim_v=head_dims[1]))
    flash_attn_func(q, k, v, **arguments).sum().backward()
    assert seen == ["forward", "backward"]


def test_varlen(seen):
    q, k, v = (x[0].requires_grad_() for x in make(batch=1, seqlen_q=14, seqlen_k=14))
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    flash_attn_varlen_func(q, k, v, bounds, bounds, 7, 7, deterministic=True).sum().backward()
    assert seen == ["forward", "backward"]


def test_dropout(seen):
    flash_attn_func(*make(), dropout_p=0.25, return_attn_probs=True)
    assert seen == ["forward", "dropout_probs"]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("num_splits", [0, 1, 128])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_cache(seen, paged, num_splits, rows):
    q, k_cache, v_cache = make(seqlen_q=rows, seqlen_k=48)
    new = k_cache[:, :2].clone(), v_cache[:, :2].clone()
    cos, sin = torch.rand(2, 50, 8).bfloat16()
    table = torch.arange(2, dtype=torch.int32).view(2, 1) if paged else None
    flash_attn_with_kvcache(
        q, k_cache, v_cache, *new, cos, sin, LENGTHS, block_table=table, causal=True,
        rotary_interleaved=False, num_splits=num_splits,
    )  # fmt: skip
    assert seen == ["cache"]


@pytest.mark.skipif(not _library.library_path().exists(), reason="no library is built")
def test_the_built_library_refuses_null_and_no_heads():
    library = _library.load()
    for operation in ("forward", "backward", "cache", "rotary", "dropout_probs"):
        for packed in (None, bytes(_library.PARAMS.get(operation, _library.PARAMS["forward"]).size)):
            assert getattr(library, operation)(packed, 0) == 4
            assert library.last_error().startswith(f"flash_attn_{operation}: ".encode())
    for operation in ("forward_kernel", "backward_kernel", "cache_kernel"):
        assert getattr(library, operation)(None) is None
        assert library.last_error() == f"flash_attn_{operation}: params must not be null here".encode()
