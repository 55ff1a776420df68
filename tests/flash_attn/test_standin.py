"""The stand-in refuses what a kernel would fault on, or read wrong; what it computes, other tests see."""

from __future__ import annotations

import math

import pytest
import torch
from standin import FIELDS, StandIn, make, memory
from standin.params import STRUCTS

from flash_attn import _abi, flash_attn_func, flash_attn_with_kvcache
from flash_attn.layers.rotary import apply_rotary_emb

INVALID = int(_abi.Status.INVALID_ARGUMENT)
BF16 = torch.bfloat16


class Altering(StandIn):
    """Alters a field of what it is given, where it lies: "forward.q" is of the forward in a backward."""

    def __init__(self, kind, field, value):
        super().__init__(hopper=True)
        self.kind, self.field, self.value = kind, field, value

    def alter(self, kind, field, packed):
        head, _, rest = field.partition(".")
        values = list(STRUCTS[kind][1].unpack(packed))
        i = FIELDS[kind].index(head)
        if rest:
            values[i] = self.alter("forward", rest, values[i])
        else:
            values[i] = self.value(values[i]) if callable(self.value) else self.value
        return STRUCTS[kind][1].pack(*values)

    def _run(self, kind, calls, compute, packed, stream):
        if kind == self.kind:
            packed = self.alter(kind, self.field, packed)
        return super()._run(kind, calls, compute, packed, stream)


def call(kind):
    """Make a call that a kernel of this kind serves, with everything that it can have."""
    q, k, v = make(seqlen_q=5, seqlen_k=16, head_dim=32)
    if kind == "rotary":
        angles = torch.rand(9, 8)
        return apply_rotary_emb(q, angles.cos().to(BF16), angles.sin().to(BF16))
    if kind == "cache":
        new, angles = k[:, :5].clone(), torch.rand(40, 8)
        return flash_attn_with_kvcache(
            q, k, v, new, new, angles.cos().to(BF16), angles.sin().to(BF16), num_splits=3,
            cache_seqlens=torch.tensor([3, 8], dtype=torch.int32), causal=True,
        )  # fmt: skip
    leaves = [x.requires_grad_(kind == "backward") for x in (q, k, v)]
    out, *_ = flash_attn_func(
        *leaves, window_size=(3, 4), alibi_slopes=torch.rand(4), deterministic=True, return_attn_probs=True
    )
    if kind == "backward":
        out.backward(torch.randn_like(out))
    return out


def one_more(x):
    return x + 1


def two_more(x):
    return x + 2


def far_away(x):
    return x + 2**46


CHANGES = [
    *(("forward", name, value) for name in ("q", "k", "v", "out") for value in (0, two_more, far_away)),
    *(("forward", f"{name}_row_stride", value) for name in "qkv" for value in (one_more, -8, 2**40)),
    ("forward", "out_head_stride", 0), ("forward", "out_batch_stride", 8),
    ("forward", "softmax_lse", far_away), ("forward", "softmax_lse", two_more),
    ("forward", "lse_head_stride", 2**30), ("forward", "alibi_slopes", far_away),
    ("forward", "alibi_batch_stride", 2**30), ("forward", "tile_counter", 16),
    ("forward", "cu_seqlens_k", far_away), ("forward", "cu_seqlens_q", far_away),
    ("forward", "seqused_k", 4), ("forward", "leftpad_k", 4), ("forward", "sinks", 4),
    ("forward", "seqlen_k", 17), ("forward", "seqlen_q", 6), ("forward", "seqlen_q", 0),
    ("forward", "batch", 3), ("forward", "batch", -1), ("forward", "num_heads", 3),
    ("forward", "num_heads_k", 0), ("forward", "num_heads_k", 4), ("forward", "head_dim", 30),
    ("forward", "head_dim", 264), ("forward", "head_dim_v", 0), ("forward", "window_left", -2),
    ("forward", "window_right", -5), ("forward", "dtype", 7), ("forward", "family", 3),
    ("forward", "softmax_scale", math.nan), ("forward", "softcap", -1.0), ("forward", "dropout_p", 1.0),
    ("forward", "dropout_p", 0.5),
    *(("backward", name, far_away) for name in ("dq", "dk", "dv", "dout", "softmax_d", "dq_accumulator")),
    *(("backward", name, 0) for name in ("dk", "dout", "softmax_d", "softmax_lse_log2", "dq_accumulator")),
    ("backward", "row_sums", 0),
    ("backward", "semaphores", far_away), ("backward", "rows", 5), ("backward", "rows", 256),
    ("backward", "key_rows", 16), ("backward", "key_parts", 0), ("backward", "key_parts", 3),
    ("backward", "key_partials", 0), ("backward", "dq_row_stride", one_more),
    ("backward", "dv_head_stride", 0),
    ("backward", "dout_batch_stride", one_more), ("backward", "forward.softmax_lse", 0),
    ("backward", "forward.out", lambda x: x + 8), ("backward", "forward.k_row_stride", 1),
    *(("cache", name, far_away) for name in ("k_new", "v_new", "rotary_cos", "q_rotated", "out_partial")),
    *(("cache", name, 0) for name in ("k_new", "rotary_sin", "q_rotated", "out_partial", "lse_partial")),
    ("cache", "lse_partial", lambda x: x + 64), ("cache", "k_new_row_stride", 3), ("cache", "num_splits", 0),
    ("cache", "num_splits", 129), ("cache", "num_splits", 4), ("cache", "design", 2),
    ("cache", "rotary_interleaved", -1), ("cache", "rotary_dim", 8), ("cache", "rotary_dim", 48),
    ("cache", "rotary_cos", lambda x: x + 8), ("cache", "page_size", 8), ("cache", "page_size", 16),
    ("cache", "seqlen_new", -1), ("cache", "seqlen_new", 6), ("cache", "cache_entries", 3),
    ("cache", "cache_seqlens", 4), ("cache", "cache_batch_idx", 4), ("cache", "forward.k", 0),
    ("cache", "forward.seqused_k", 4), ("cache", "forward.seqlen_k", 17),
    ("rotary", "x", 0), ("rotary", "out", far_away), ("rotary", "x_row_stride", 4), ("rotary", "cos", 2),
    ("rotary", "sin", far_away), ("rotary", "interleaved", 2), ("rotary", "conjugate", -1),
    ("rotary", "fp32_tables", 3), ("rotary", "rotary_dim", 8), ("rotary", "table_rows", 2**20),
    ("rotary", "offsets", 4), ("rotary", "cu_seqlens", 4), ("rotary", "rows", 11), ("rotary", "head_dim", 12),
]  # fmt: skip


@pytest.mark.parametrize("kind, field, value", CHANGES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_a_kernel_would_fault_on_is_refused(install, kind, field, value):
    install(Altering(kind, field, value))
    with pytest.raises(RuntimeError, match=f"the stand-in refuses {kind}: "):
        call(kind)


@pytest.mark.parametrize("kind", STRUCTS)
def test_the_calls_that_are_altered_are_served(install, kind):
    library = StandIn()
    install(library)
    assert call(kind).isfinite().all()
    records = {"forward": library.calls, "backward": library.backward_calls, "cache": library.cache_calls}
    assert len({**records, "rotary": library.rotary_calls}[kind]) == 1


def test_memory_that_nobody_holds_any_more_is_refused():
    x = torch.empty(2**22, dtype=BF16)
    address = x.data_ptr()
    del x
    with pytest.raises(memory.Refused, match="is not in memory that somebody holds"):
        memory.Memory().view("x", address, (4,), (1,), BF16)


@pytest.mark.parametrize(
    "shape, strides, overlaps",
    [((3, 4), (4, 1), False), ((3, 4), (0, 1), True), ((3, 4), (3, 1), True), ((2, 3), (3, 2), False),
     ((2, 2, 2), (1, 2, 3), True), ((1, 4), (0, 1), False)],
)  # fmt: skip
def test_overlaps_itself(shape, strides, overlaps):
    assert memory.overlaps_itself(torch.zeros(40).as_strided(shape, strides)) == overlaps
