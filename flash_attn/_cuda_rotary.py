"""CUDA backend of `layers.rotary`: packs `_abi.RotaryParams`, calls the library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash_attn import _abi, _cuda, _gpu
from flash_attn._abi import ROTARY_MULTIPLE
from flash_attn._validation import INT32_MAX

_pack = _abi.ROTARY_PARAMS.pack


def can_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None, interleaved: bool
) -> bool:
    """Return whether the kernel takes these tensors as they are; else torch operations do."""
    rotary_dim = 2 * cos.shape[1]
    return (
        _gpu.serves(x)
        and x.dtype in _cuda.DTYPES
        and cos.dtype == sin.dtype
        and cos.dtype in (x.dtype, torch.float32)
        and rotary_dim % (ROTARY_MULTIPLE // 2 if interleaved else ROTARY_MULTIPLE) == 0
        and x.numel() > 0 < rotary_dim
        and (cu_seqlens is None or cu_seqlens.shape[0] > 1)
        and _cuda.readable(x)
        and _gpu.has_library()
    )


def _as_int32(index: Tensor, name: str) -> Tensor:
    """Return positions in the kernel's type: what does not fit is not in the tables either way."""
    if index.dtype != torch.int32:
        index = index.long().clamp(-INT32_MAX, INT32_MAX).to(torch.int32)
    return _cuda.contiguous(index, name)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None, interleaved: bool,
    conjugate: bool, inplace: bool,
) -> Tensor:  # fmt: skip
    """Return x (b, s, h, d), or (total, h, d) with `cu_seqlens`, rotated; x itself if `inplace`.

    Raises:
        RuntimeError: the GPU is too old, or CUDA reports an error.
    """
    if inplace:
        increment_version(x)  # a backward that has saved x must see that it changed
    out = x if inplace else torch.empty_like(x)
    if not _cuda.readable(out):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = _cuda.contiguous(cos, "cos", 16), _cuda.contiguous(sin, "sin", 16)
    starts = _as_int32(offsets, "seqlen_offsets") if isinstance(offsets, Tensor) else None
    bounds = None if cu_seqlens is None else _as_int32(cu_seqlens, "cu_seqlens")
    batch_stride = _cuda.NOT_PACKED if bounds is None else _cuda.PACKED
    *lengths, num_heads, head_dim = x.shape
    batch, seqlen = lengths if bounds is None else (bounds.numel() - 1, 0)
    device = x.get_device()
    stream = _gpu.raw_stream(device)
    library = _gpu.prepared(device).library
    packed = _pack(
        x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        0 if starts is None else starts.data_ptr(), 0 if bounds is None else bounds.data_ptr(),
        *batch_stride, *x.stride()[:-1], *batch_stride, *out.stride()[:-1],
        x.numel() // (num_heads * head_dim), batch, seqlen, num_heads, head_dim, 2 * cos.shape[1],
        min(cos.shape[0], INT32_MAX), min(offsets, INT32_MAX) if starts is None else 0, interleaved,
        conjugate,
        _cuda.DTYPES[x.dtype], cos.dtype == torch.float32, device,
    )  # fmt: skip
    if library.rotary(packed, stream):
        raise RuntimeError(f"flash_attn: {(library.last_error() or b'').decode()}")
    return out
