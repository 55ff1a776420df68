"""Bad input of the packed variants: the message names the packed tensor, not a part of it."""

from __future__ import annotations

import pytest
import torch
from problems import int32, zeros
from refusals import needing_gradients, raises

import flash_attn

INT8, FP32 = torch.int8, torch.float32
Q = zeros(2, 10, 4, 32)

QKVPACKED, KVPACKED = flash_attn.flash_attn_qkvpacked_func, flash_attn.flash_attn_kvpacked_func
VARLEN_QKVPACKED = flash_attn.flash_attn_varlen_qkvpacked_func
VARLEN_KVPACKED = flash_attn.flash_attn_varlen_kvpacked_func
PACKED = {
    "qkv a list": (TypeError, "qkv", QKVPACKED, ([1],)),
    "qkv of two": (ValueError, "qkv", QKVPACKED, (zeros(2, 5, 2, 4, 32),)),
    "qkv of rank 4": (ValueError, "qkv", QKVPACKED, (zeros(5, 3, 4, 32),)),
    "qkv head dim": (ValueError, "qkv", QKVPACKED, (zeros(2, 5, 3, 4, 300),)),
    "qkv dtype": (TypeError, "qkv", QKVPACKED, (zeros(2, 5, 3, 4, 32, dtype=INT8),)),
    "kv of three": (ValueError, "kv", KVPACKED, (Q, zeros(2, 5, 3, 4, 32))),
    "kv heads": (ValueError, "kv", KVPACKED, (Q, zeros(2, 5, 2, 3, 32))),
    "kv dtype": (TypeError, "kv", KVPACKED, (Q, zeros(2, 5, 2, 4, 32, dtype=FP32))),
    "kv batch": (ValueError, "kv", KVPACKED, (Q, zeros(3, 5, 2, 4, 32))),
    "kv with a q of rank 3": (ValueError, "q", KVPACKED, (Q[0], zeros(2, 5, 2, 4, 32))),
    "packed varlen": (
        ValueError, "qkv", VARLEN_QKVPACKED, (zeros(5, 2, 4, 32), int32(0, 5), 5)
    ),
    "packed varlen cu_seqlens": (
        TypeError, "cu_seqlens ", VARLEN_QKVPACKED,
        (zeros(5, 3, 4, 32), int32(0, 5).long(), 5),
    ),
    "packed varlen max_seqlen": (
        ValueError, "max_seqlen ", VARLEN_QKVPACKED, (zeros(5, 3, 4, 32), int32(0, 5), 4)
    ),
    "packed varlen kv": (
        ValueError, "kv", VARLEN_KVPACKED,
        (zeros(5, 4, 32), zeros(5, 2, 3, 32), int32(0, 5), int32(0, 5), 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("grad", [False, True])
def test_packed(case, grad):
    kind, name, function, arguments = PACKED[case]
    raises(kind, name, function, *(needing_gradients(arguments) if grad else arguments))


@pytest.mark.parametrize("named", [{"dropout_p": 2.0}, {"softcap": -1.0}], ids=str)
def test_other_arguments_keep_their_names(named):
    (name,) = named
    raises(ValueError, name, QKVPACKED, zeros(2, 5, 3, 4, 32), **named)
    raises(ValueError, name, KVPACKED, Q, zeros(2, 5, 2, 4, 32), **named)
    raises(ValueError, name, VARLEN_QKVPACKED, zeros(5, 3, 4, 32), int32(0, 5), 5, **named)
    raises(ValueError, name, VARLEN_KVPACKED, Q[0], zeros(5, 2, 4, 32), *(int32(0, 5),) * 2, 5, 5, **named)
