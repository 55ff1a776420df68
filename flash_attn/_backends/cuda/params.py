"""What the parameter structs of all attention calls have in common, and what a call's failure means."""

from __future__ import annotations

from typing import NoReturn

import torch

from flash_attn import _abi
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.library import Library, arch_of, build_command
from flash_attn._backends.cuda.tensors import DTYPE_NAMES, DTYPES, Places
from flash_attn._calls import Scoring

Sizes = tuple[int, int, int, int, int, int]
"""(batch, seqlen_q, seqlen_k, total_q, num_heads, num_heads_k), lengths of the longest sequence if packed."""

FIXED_LENGTH = (0, 0, 0, 0)

_pack = _abi.FORWARD_PARAMS.pack


Geometry = tuple[Sizes, int, tuple[int, int], tuple[int, int], tuple[int, int, int, int]]
"""What a call is told of its tensors beside their places: sizes, rows of k, head dims of q and k and of v and
out, strides of batch and head of the LSE, and the addresses of cu_seqlens_q, cu_seqlens_k, seqused_k and
leftpad_k, 0 for none.
"""


def pack_forward(
    places: Places, geometry: Geometry, scoring: Scoring, buffers: tuple[int, int, int], dtype: torch.dtype,
    device: int, family: int,
) -> bytes:  # fmt: skip
    """Pack ForwardParams; ALiBi slopes and sinks are as `readable_scoring` returns them.

    `buffers` are the addresses of the LSE, the rng_state and the tile counter.
    """
    addresses, strides, _ = places
    sizes, total_k, head_dims, lse_strides, sequences = geometry
    batch, seqlen_q, seqlen_k, total_q, num_heads, num_heads_k = sizes
    softmax_scale, softcap, window_left, window_right, dropout_p, slopes, sinks = scoring
    lse_at, rng_at, counter_at = buffers
    slopes_at = slopes_stride = 0
    if slopes is not None:
        slopes_at, slopes_stride = slopes.data_ptr(), num_heads if slopes.dim() == 2 else 0
    return _pack(
        *addresses, lse_at, *sequences, slopes_at, 0 if sinks is None else sinks.data_ptr(), rng_at, 0,
        counter_at, *strides, *lse_strides, slopes_stride, total_q, total_k, batch, num_heads, num_heads_k,
        seqlen_q, seqlen_k, *head_dims,
        window_left, window_right, DTYPES[dtype], device, family, softmax_scale, softcap, dropout_p,
        1.0 / (1.0 - dropout_p) if dropout_p else 1.0,
    )  # fmt: skip


def fail(
    status: int, dtype: torch.dtype, device: int, head_dim: int, library: Library,
    direction: _abi.Direction = _abi.Direction.FORWARD,
) -> NoReturn:  # fmt: skip
    """Raise what a nonzero status means; a kernel that is missing comes with the command that builds it."""
    text = (library.last_error() or b"").decode() or f"status {status}"
    if status in (_abi.Status.NOT_BUILT, _abi.Status.UNSUPPORTED_DEVICE):
        major, minor = gpu.capability(device)
        arch = arch_of(10 * major + minor, library.family)
        command = build_command(arch, head_dim, DTYPE_NAMES[dtype], direction)
        text = f"{text}; build it with `{command}`"
    raise RuntimeError(f"flash_attn: {text}")
