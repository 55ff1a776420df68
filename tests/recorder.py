"""A library that records what it is given, so that the CUDA path runs on CPU tensors, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from flash_attn import _abi

STREAM = 4242
MULTIPROCESSORS = 8
FORWARD_FIELDS = [name for name, _ in _abi.ForwardParams._fields_]
BACKWARD_FIELDS = [name for name, _ in _abi.BackwardParams._fields_]
SPLIT_FIELDS = [name for name, _ in _abi.SplitParams._fields_]


def unpack_forward(packed):
    assert len(packed) == _abi.FORWARD_PARAMS.size
    return SimpleNamespace(**dict(zip(FORWARD_FIELDS, _abi.FORWARD_PARAMS.unpack(packed), strict=True)))


def unpack_backward(packed):
    """The fields, and in `forward` those of the forward."""
    assert len(packed) == _abi.BACKWARD_PARAMS.size
    fields = dict(zip(BACKWARD_FIELDS, _abi.BACKWARD_PARAMS.unpack(packed), strict=True))
    return SimpleNamespace(**fields | {"forward": unpack_forward(fields["forward"])})


def unpack_split(packed):
    """The fields, and in `forward` those of the forward."""
    assert len(packed) == _abi.SPLIT_PARAMS.size
    fields = dict(zip(SPLIT_FIELDS, _abi.SPLIT_PARAMS.unpack(packed), strict=True))
    return SimpleNamespace(**fields | {"forward": unpack_forward(fields["forward"])})


class Recorder:
    """Stands in for the loaded library."""

    def __init__(self, status=0, family=0):
        self.calls, self.probs_calls, self.backward_calls, self.split_calls = [], [], [], []
        self.status, self.family = status, family
        self.last_error = lambda: b"kernel forward_sm90_bf16_d64_full is not built"

    def forward(self, packed, stream):
        self.calls.append((unpack_forward(packed), stream))
        return self.status

    def dropout_probs(self, packed, stream):
        self.probs_calls.append((unpack_forward(packed), stream))
        return self.status

    def split(self, packed, stream):
        self.split_calls.append((unpack_split(packed), stream))
        return self.status

    def backward(self, packed, stream):
        self.backward_calls.append((unpack_backward(packed), stream))
        return self.status


def make(
    batch=2,
    seqlen_q=10,
    seqlen_k=12,
    heads=4,
    heads_k=2,
    head_dim=64,
    dtype=torch.bfloat16,
    head_dim_v=None,
):
    q = torch.randn(batch, seqlen_q, heads, head_dim).to(dtype)
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    return q, *(torch.randn(batch, seqlen_k, heads_k, dim).to(dtype) for dim in dims)


def strides(params, name):
    return tuple(getattr(params, f"{name}_{axis}_stride") for axis in ("batch", "row", "head"))
