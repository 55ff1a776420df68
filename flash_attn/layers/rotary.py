"""Rotary position embedding (Su et al., "RoFormer", section 3.2), with XPos scaling (Sun et al., 2022).

A pair (x1, x2) at position m becomes (x1 cos - x2 sin, x2 cos + x1 sin) with the angle m * theta of its
frequency. Pairs are (0, 1), (2, 3).. when interleaved, else (i, i + rotary_dim / 2). Computed in fp32 (fp64
for fp64 input). Backward is the rotation by the opposite angle, so autograd keeps only the tables. On CUDA
a kernel of the library rotates 16-bit heads; torch operations do what it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_attn import _cuda_rotary

Offsets = int | Tensor


def _pairs(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    rotated = x[..., :rotary_dim]
    if interleaved:
        return rotated[..., ::2], rotated[..., 1::2]
    half = rotary_dim // 2
    return rotated[..., :half], rotated[..., half:]


def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, conjugate: bool = False
) -> Tensor:
    """Rotate x (..., s, h, d) in place by cos, sin (..., s, rotary_dim / 2); `conjugate` rotates back."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.unsqueeze(-2).to(compute), sin.unsqueeze(-2).to(compute)
    if conjugate:
        sin = -sin
    first, second = _pairs(x, 2 * cos.shape[-1], interleaved)
    x1, x2 = first.to(compute), second.to(compute)
    rotated_first, rotated_second = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    first.copy_(rotated_first)
    second.copy_(rotated_second)
    return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, conjugate: bool = False) -> Tensor:
    """Return x (..., s, h, d) rotated by cos, sin (..., s, rotary_dim / 2)."""
    return rotate_(x.clone(), cos, sin, interleaved, conjugate)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x (b, s, h, d) by cos, sin ([b,] s, rotary_dim / 2), in plain differentiable operations."""
    rotary_dim = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = _pairs(x, rotary_dim, interleaved)
    pair = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def _check_tables(cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(f"cos and sin must be (seqlen_ro, rotary_dim / 2), got {shapes}")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"cos must have at most head_dim / 2 = {head_dim / 2:g} columns, got {cos.shape[1]}")


def _check_positions(positions: Tensor, seqlen_ro: int, known: bool) -> None:
    if known and positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < seqlen_ro:
        last = int(positions.max())
        raise ValueError(
            f"seqlen_offsets must keep positions below cos's {seqlen_ro} rows, got position {last}"
        )


def _check_offset(offset: int, seqlen: int, seqlen_ro: int) -> None:
    if not 0 <= offset <= offset + seqlen <= seqlen_ro:
        last = seqlen_ro - seqlen
        raise ValueError(f"seqlen_offsets must be in [0, {last}] (rows of cos - seqlen), got {offset}")


def _gather(cos: Tensor, sin: Tensor, seqlen: int, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Return the tables' rows from the offset on: (s, n), or (b, s, n) for one offset per sequence."""
    if isinstance(offsets, int):
        return cos[offsets : offsets + seqlen], sin[offsets : offsets + seqlen]
    positions = offsets.long().unsqueeze(-1) + torch.arange(seqlen, device=offsets.device)
    _check_positions(positions, cos.shape[0], offsets.device.type == "cpu")
    return _rows(cos, sin, positions, (positions >= 0) & (positions < cos.shape[0]))


def _rows(cos: Tensor, sin: Tensor, positions: Tensor, rotates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables' rows at `positions`, the identity (cos 1, sin 0) where not `rotates`."""
    at, rotates = torch.where(rotates, positions, 0), rotates.unsqueeze(-1)
    return torch.where(rotates, cos[at], 1.0), torch.where(rotates, sin[at], 0.0)


def _gather_varlen(
    cos: Tensor, sin: Tensor, total: int, offsets: Offsets, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos, sin (total, n) for packed sequences; tokens past the last get the identity."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    inside = sequence < bounds.shape[0] - 1
    sequence = sequence.clamp(max=bounds.shape[0] - 2)
    start = bounds[sequence] if isinstance(offsets, int) else bounds[sequence] - offsets.long()[sequence]
    positions = torch.where(inside, tokens - start + (offsets if isinstance(offsets, int) else 0), 0)
    _check_positions(positions, cos.shape[0], cu_seqlens.device.type == "cpu")
    return _rows(cos, sin, positions, inside & (positions >= 0) & (positions < cos.shape[0]))


def _check_index(index: Offsets | None, name: str, x: Tensor, length: int | None) -> None:
    """Check integers of one dimension beside x, `length` of them if it is given."""
    if not isinstance(index, Tensor):
        return
    if index.is_floating_point() or index.dim() != 1 or length not in (None, index.shape[0]):
        expected = "any" if length is None else length
        raise ValueError(
            f"{name} must be integers of shape ({expected},), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"{name} must be on the device of x ({x.device}), got {index.device}")


class Angles(NamedTuple):
    """Tables cos, sin (seqlen_ro, rotary_dim / 2), and where in them the tokens of a tensor stand.

    Positions past the tables are an error where they are known (on CPU); elsewhere their tokens are left as
    they are.
    """

    cos: Tensor
    sin: Tensor
    offsets: Offsets
    cu_seqlens: Tensor | None = None

    def check(self, x: Tensor) -> None:
        """Check that the tables fit x (b, s, h, d), or (total, h, d) with `cu_seqlens`.

        Raises:
            ValueError: they do not.
        """
        _check_tables(self.cos, self.sin, x.shape[-1])
        _check_index(self.cu_seqlens, "cu_seqlens", x, None)
        batch = x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        _check_index(self.offsets, "seqlen_offsets", x, batch)
        if isinstance(self.offsets, int) and self.cu_seqlens is None:
            _check_offset(self.offsets, x.shape[1], self.cos.shape[0])
        elif self.cos.shape[0] == 0 and x.numel():
            raise ValueError(f"cos must have at least one row, got {tuple(self.cos.shape)}")

    def rotate(self, x: Tensor, interleaved: bool, conjugate: bool = False, inplace: bool = False) -> Tensor:
        """Return x rotated, or rotated back with `conjugate`; x itself if `inplace`."""
        cos, sin, offsets, cu_seqlens = self
        if _cuda_rotary.can_rotate(x, cos, sin, interleaved):
            return _cuda_rotary.rotate(x, cos, sin, offsets, cu_seqlens, interleaved, conjugate, inplace)
        if cu_seqlens is None:
            tables = _gather(cos, sin, x.shape[1], offsets)
        else:
            tables = _gather_varlen(cos, sin, x.shape[0], offsets, cu_seqlens)
        return (rotate_ if inplace else rotate)(x, *tables, interleaved, conjugate)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return what a backward must keep, in the order in which `kept` takes it."""
        offsets = self.offsets if isinstance(self.offsets, Tensor) else None
        return self.cos, self.sin, offsets, self.cu_seqlens


def kept(
    offset: Offsets, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None
) -> Angles:
    """Return the angles of saved tensors; `offset` counts where it is an int."""
    return Angles(cos, sin, offset if offsets is None else offsets, cu_seqlens)


class _ApplyRotary(torch.autograd.Function):
    """Rotation of one tensor, in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, interleaved: bool, inplace: bool, offset: int, *tables: Any) -> Tensor:
        ctx.save_for_backward(*tables)
        ctx.interleaved, ctx.offset = interleaved, offset
        if inplace:
            ctx.mark_dirty(x)
        return kept(offset, *tables).rotate(x, interleaved, inplace=inplace)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        angles = kept(ctx.offset, *ctx.saved_tensors)
        return angles.rotate(dout, ctx.interleaved, conjugate=True), *(None,) * 7


def angles_of(x: Tensor, cos: Tensor, sin: Tensor, offsets: Offsets, cu_seqlens: Tensor | None) -> Angles:
    """Return the angles of x (b, s, h, d), or (total, h, d) with `cu_seqlens`, once all is checked.

    Raises:
        ValueError: x has another number of dimensions, or `Angles.check` refuses.
    """
    rank = 4 if cu_seqlens is None else 3
    if x.dim() != rank:
        raise ValueError(f"x must be a tensor of {rank} dimensions, got shape {tuple(x.shape)}")
    angles = Angles(cos, sin, offsets, cu_seqlens)
    angles.check(x)
    return angles


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: Offsets = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first rotary_dim elements of each head of x; differentiable in x.

    Args:
        x: (b, s, h, d), or (total, h, d) with `cu_seqlens`; any floating dtype.
        cos, sin: (seqlen_ro, rotary_dim / 2), rotary_dim <= d.
        interleaved: pairs are (0, 1), (2, 3).. instead of halves.
        inplace: overwrite x and return it.
        seqlen_offsets: position of each sequence's first token: int, or integer tensor (b,).
        cu_seqlens: int32 (b + 1), bounds of packed sequences; tokens past the last are left as they are.
        max_seqlen: longest packed sequence; accepted for compatibility.
    Raises:
        ValueError: tables that do not fit x, or (known on CPU) positions past their end. On CUDA tokens past
            the end are left as they are.
    """
    angles = angles_of(x, cos, sin, seqlen_offsets, cu_seqlens)
    return _ApplyRotary.apply(x, interleaved, inplace, _offset(angles), *angles.tensors())


apply_rotary_emb_func = apply_rotary_emb


def _select_qk(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Return the views q and k of a packed (b, s, 3, h, d) or (b, s, h_q + 2 h_k, d) tensor."""
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv must be (b, s, 3, h, d), got {tuple(qkv.shape)}")
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.dim() != 4 or num_heads_q is None:
        raise ValueError("qkv must have 5 dimensions, or 4 with num_heads_q given, "
                         f"got {qkv.dim()} with num_heads_q {num_heads_q}")  # fmt: skip
    num_heads_k = (qkv.shape[2] - num_heads_q) // 2
    if num_heads_k < 0 or qkv.shape[2] != num_heads_q + 2 * num_heads_k:
        total = qkv.shape[2]
        raise ValueError(f"num_heads_q must leave an even number of the {total} heads, got {num_heads_q}")
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


class _ApplyRotaryParts(torch.autograd.Function):
    """In-place rotation of the parts that `select` returns; `tables` has four tensors of each."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, select: Callable[[Tensor], tuple[Tensor, ...]], interleaved: bool,
        offset: int, *tables: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(*tables)
        ctx.select, ctx.interleaved, ctx.offset = select, interleaved, offset
        ctx.mark_dirty(packed)
        _rotate_parts(select(packed), offset, tables, interleaved, conjugate=False)
        return packed

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradient = dout.clone()
        tables = ctx.saved_tensors
        _rotate_parts(ctx.select(gradient), ctx.offset, tables, ctx.interleaved, conjugate=True)
        return gradient, *(None,) * (3 + len(tables))


def _rotate_parts(
    parts: tuple[Tensor, ...], offset: int, tables: Sequence[Any], interleaved: bool, conjugate: bool
) -> None:
    for i, part in enumerate(parts):
        kept(offset, *tables[4 * i : 4 * i + 4]).rotate(part, interleaved, conjugate, inplace=True)


def _offset(angles: Angles) -> int:
    return angles.offsets if isinstance(angles.offsets, int) else 0


def apply_rotary_emb_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
    interleaved: bool = False, seqlen_offsets: Offsets = 0, num_heads_q: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate q and k inside `qkv` in place and return it; differentiable.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, h_q + 2 h_k, d) with `num_heads_q`.
        cos, sin: (seqlen_ro, rotary_dim / 2); `cos_k`, `sin_k` are those of k where they differ (XPos).
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
    Raises:
        ValueError: as in `apply_rotary_emb`, or a qkv of another shape.
    """
    q, _ = _select_qk(qkv, num_heads_q)
    of_q = Angles(cos, sin, seqlen_offsets)
    of_k = of_q if cos_k is None or sin_k is None else Angles(cos_k, sin_k, seqlen_offsets)
    of_q.check(q)
    of_k.check(q)
    select = partial(_select_qk, num_heads_q=num_heads_q)
    tables = *of_q.tensors(), *of_k.tensors()
    return _ApplyRotaryParts.apply(qkv, select, interleaved, _offset(of_q), *tables)


def _select_k(kv: Tensor) -> tuple[Tensor]:
    """Return the view k of a packed (b, s, 2, h, d) tensor."""
    return (kv[:, :, 0],)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
) -> Tensor:
    """Rotate k inside `kv` (b, s, 2, h, d) in place and return it; the rest as in `apply_rotary_emb`."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be (b, s, 2, h, d), got {tuple(kv.shape)}")
    angles = Angles(cos, sin, seqlen_offsets)
    angles.check(kv)
    return _ApplyRotaryParts.apply(kv, _select_k, interleaved, _offset(angles), *angles.tensors())


class RotaryEmbedding(nn.Module):
    """Rotary embedding of packed qkv, or of q and packed kv, with cached tables.

    Args:
        dim: rotary_dim, the number of elements rotated per head.
        base: frequency i is base^(-2 i / dim).
        interleaved: as in `apply_rotary_emb`.
        scale_base: XPos decay length, None for none.
        device: of the tables.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self, dim: int, base: float = 10000.0, interleaved: bool = False, scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._exact_frequencies(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _exact_frequencies(self, device: torch.device | str | None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None,
                              dtype: torch.dtype | None = None) -> None:  # fmt: skip
        """Compute the tables for positions 0 .. seqlen where the cached ones do not serve."""
        cached = self._cos_cached
        if (
            cached is not None and cached.device == device and cached.dtype == dtype
            and seqlen <= self._seq_len_cached and not (self.training and cached.is_inference())
        ):  # fmt: skip
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        usable = self.inv_freq.dtype == torch.float32 and not self.inv_freq.is_meta
        frequencies = self.inv_freq.to(device) if usable else self._exact_frequencies(device)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power.unsqueeze(1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self, qkv: Tensor, kv: Tensor | None = None, seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None, num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Rotate in place and return qkv, or (q, kv) if `kv` is given.

        Args:
            qkv: (b, s, 3, h, d), (b, s, h_q + 2 h_k, d) with `num_heads_q`, or q (b, s, h, d) with `kv`.
            kv: (b, s, 2, hk, d).
            seqlen_offset: int or integer tensor (b,), position of the first token.
            max_seqlen: length of the tables; needed to avoid a synchronisation when `seqlen_offset` is a CUDA
            tensor.
        """
        seqlen = qkv.shape[1]
        if max_seqlen is None:
            largest = seqlen_offset if isinstance(seqlen_offset, int) else int(seqlen_offset.max())
            max_seqlen = seqlen + largest
        self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        assert cos is not None and sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )  # fmt: skip
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        kv = apply_rotary_emb_kv_(kv, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k,
                                  self.interleaved, seqlen_offset)  # fmt: skip
        return q, kv
