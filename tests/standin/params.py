"""Packed parameters as names and values, and what every kernel takes for granted of them."""

from __future__ import annotations

import ctypes
import math
import struct
from types import SimpleNamespace

import torch

from flash_attn import _abi

from .memory import need

DTYPES = {int(_abi.Dtype.FP16): torch.float16, int(_abi.Dtype.BF16): torch.bfloat16}
STRUCTS: dict[str, tuple[type[ctypes.Structure], struct.Struct]] = {
    "forward": (_abi.ForwardParams, _abi.FORWARD_PARAMS),
    "backward": (_abi.BackwardParams, _abi.BACKWARD_PARAMS),
    "cache": (_abi.CacheParams, _abi.CACHE_PARAMS),
    "rotary": (_abi.RotaryParams, _abi.ROTARY_PARAMS),
}
FIELDS = {kind: [field[0] for field in structure._fields_] for kind, (structure, _) in STRUCTS.items()}
MAX_SPLITS = 128


def unpack(kind: str, packed: bytes) -> SimpleNamespace:
    """Return the fields of a packed struct, and in `forward` those of the forward that it holds."""
    _, packer = STRUCTS[kind]
    assert len(packed) == packer.size
    fields = dict(zip(FIELDS[kind], packer.unpack(packed), strict=True))
    if "forward" in fields:
        fields["forward"] = unpack("forward", fields["forward"])
    return SimpleNamespace(**fields)


def check_forward(p: SimpleNamespace) -> None:
    """Refuse what no kernel is made for."""
    need(p.dtype in DTYPES, f"dtype is {p.dtype}")
    for name in ("head_dim", "head_dim_v"):
        value = getattr(p, name)
        need(0 < value <= _abi.HEAD_DIMS[-1] and value % 8 == 0, f"{name} is {value}")
    for name in ("batch", "seqlen_q", "seqlen_k", "total_q", "total_k"):
        need(getattr(p, name) >= 0, f"{name} is {getattr(p, name)}")
    heads = p.num_heads, p.num_heads_k
    need(p.num_heads > 0 < p.num_heads_k and p.num_heads % p.num_heads_k == 0, f"heads are {heads}")
    for name in ("window_left", "window_right"):
        need(getattr(p, name) >= -1, f"{name} is {getattr(p, name)}")
    need(math.isfinite(p.softmax_scale), f"softmax_scale is {p.softmax_scale}")
    need(0.0 <= p.softcap < math.inf, f"softcap is {p.softcap}")
    need(0.0 <= p.dropout_p < 1.0, f"dropout_p is {p.dropout_p}")
    need(p.family in list(_abi.Family), f"family is {p.family}")


def check_flags(fields: SimpleNamespace, *names: str) -> None:
    for name in names:
        need(getattr(fields, name) in (0, 1), f"{name} is {getattr(fields, name)}, neither 0 nor 1")
