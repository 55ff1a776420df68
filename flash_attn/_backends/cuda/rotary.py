"""Rotation on CUDA: one struct, one call of the library; torch operations do what its kernel cannot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash_attn import _abi
from flash_attn._abi import ROTARY_MULTIPLE
from flash_attn._backends.cpu.rotary import rotate as rotate_by_operations
from flash_attn._backends.cuda import gpu
from flash_attn._backends.cuda.tensors import DTYPES, NOT_PACKED, PACKED, contiguous, readable
from flash_attn._calls import Rotation
from flash_attn._validation import INT32_MAX

_pack = _abi.ROTARY_PARAMS.pack


def _can_rotate(call: Rotation) -> bool:
    """Return whether the kernel takes these tensors as they are."""
    x, (cos, sin, _, cu_seqlens), interleaved, _, _ = call
    rotary_dim = 2 * cos.shape[1]
    return (
        x.dtype in DTYPES
        and cos.dtype == sin.dtype
        and cos.dtype in (x.dtype, torch.float32)
        and rotary_dim % (ROTARY_MULTIPLE // 2 if interleaved else ROTARY_MULTIPLE) == 0
        and x.numel() > 0 < rotary_dim
        and (cu_seqlens is None or cu_seqlens.shape[0] > 1)
        and readable(x)
        and gpu.has_library()
    )


def _as_int32(index: Tensor, name: str) -> Tensor:
    """Return positions in the kernel's type: what does not fit is not in the tables either way."""
    if index.dtype != torch.int32:
        index = index.long().clamp(-INT32_MAX, INT32_MAX).to(torch.int32)
    return contiguous(index, name)


def rotate(call: Rotation) -> Tensor:
    """Rotate; see `Backend.rotate`.

    Raises:
        RuntimeError: the GPU is too old, or CUDA reports an error.
    """
    if not _can_rotate(call):
        return rotate_by_operations(call)
    x, (cos, sin, offsets, cu_seqlens), interleaved, conjugate, inplace = call
    if inplace:
        increment_version(x)  # a backward that has saved x must see that it changed
    out = x if inplace else torch.empty_like(x)
    if not readable(out):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = contiguous(cos, "cos", 16), contiguous(sin, "sin", 16)
    starts = _as_int32(offsets, "seqlen_offsets") if isinstance(offsets, Tensor) else None
    first = 0 if isinstance(offsets, Tensor) else min(offsets, INT32_MAX)
    bounds = None if cu_seqlens is None else _as_int32(cu_seqlens, "cu_seqlens")
    batch_stride = NOT_PACKED if bounds is None else PACKED
    *lengths, num_heads, head_dim = x.shape
    batch, seqlen = lengths if bounds is None else (bounds.numel() - 1, 0)
    device = x.get_device()
    stream = gpu.raw_stream(device)
    library = gpu.prepared(device).library
    packed = _pack(
        x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        0 if starts is None else starts.data_ptr(), 0 if bounds is None else bounds.data_ptr(),
        *batch_stride, *x.stride()[:-1], *batch_stride, *out.stride()[:-1],
        x.numel() // (num_heads * head_dim), batch, seqlen, num_heads, head_dim, 2 * cos.shape[1],
        min(cos.shape[0], INT32_MAX), first, interleaved, conjugate, DTYPES[x.dtype],
        cos.dtype == torch.float32, device,
    )  # fmt: skip
    if library.rotary(packed, stream):
        raise RuntimeError(f"flash_attn: {(library.last_error() or b'').decode()}")
    return out
