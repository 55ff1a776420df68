"""Rotary position embedding (Su et al., "RoFormer", section 3.2), with XPos scaling (Sun et al., 2022).

A pair (x1, x2) at position m becomes (x1 cos - x2 sin, x2 cos + x1 sin) with the angle m * theta of its
frequency. Pairs are (0, 1), (2, 3).. when interleaved, else (i, i + rotary_dim / 2). Computed in fp32 (fp64
for fp64 input). Backward is the rotation by the opposite angle, so autograd keeps only the tables. On CUDA
a kernel of the library rotates 16-bit heads; torch operations do what it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_attn._arguments import as_flag, as_float, as_int, as_position, check_floating, fail
from flash_attn._backends.cpu.rotary import turned
from flash_attn._calls import Angles
from flash_attn._rotary import Offsets, angles_of, check_x
from flash_attn._rotary_autograd import rotate_parts


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x (b, s, h, d) by cos, sin ([b,] s, rotary_dim / 2), in plain differentiable operations."""
    rotary_dim = 2 * cos.shape[-1]
    return torch.cat([turned(x[..., :rotary_dim], cos, sin, interleaved), x[..., rotary_dim:]], dim=-1)


def rotate_all(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: Offsets, cu_seqlens: Tensor | None,
    interleaved: bool, conjugate: bool, inplace: bool,
) -> Tensor:  # fmt: skip
    """Return x (b, s, h, d), or (total, h, d) with `cu_seqlens`, rotated, or back with `conjugate`.

    Raises:
        TypeError, ValueError: as in `apply_rotary_emb`.
    """
    check_x(x, "x", 4 if cu_seqlens is None else 3)
    angles = angles_of(x, cos, sin, seqlen_offsets, cu_seqlens)
    return rotate_parts(x, [(x, angles)], None, interleaved, conjugate, inplace)


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: Offsets = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate the first rotary_dim elements of each head of x; differentiable in x, cos and sin.

    Args:
        x: (b, s, h, d), or (total, h, d) with `cu_seqlens`; any floating dtype.
        cos, sin: (seqlen_ro, rotary_dim / 2), rotary_dim <= d, floating, on x's device.
        interleaved: pairs are (0, 1), (2, 3).. instead of halves.
        inplace: overwrite x and return it. Where x is a leaf that requires grad, or a view of one, another
            tensor over the same memory is returned; it has the gradient, x remains a leaf.
        seqlen_offsets: position of each sequence's first token: an integer, or integer tensor (b,) or ().
        cu_seqlens: int32 (b + 1), bounds of packed sequences; tokens past the last are left as they are.
        max_seqlen: longest packed sequence; accepted for compatibility.
    Raises:
        TypeError: x, tables or indices that are no tensors or of a wrong dtype, an offset that is no integer.
        ValueError: tables that do not fit x, or (known on CPU) positions past their end. On CUDA tokens past
            the end are left as they are.
    """
    return rotate_all(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, False, inplace)


apply_rotary_emb_func = apply_rotary_emb


def _select_qk(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Return the views q and k of a packed (b, s, 3, h, d) or (b, s, h_q + 2 h_k, d) tensor."""
    if qkv.dim() == 5:
        return qkv[:, :, 0], qkv[:, :, 1]
    assert num_heads_q is not None
    num_heads_k = (qkv.shape[2] - num_heads_q) // 2
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


def _check_qkv(qkv: Tensor, num_heads_q: Any) -> int | None:
    """Check the shape of a packed qkv; return `num_heads_q`, None where the shape tells it."""
    check_floating(qkv, "qkv")
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            fail(ValueError, "qkv", "(b, s, 3, h, d)", tuple(qkv.shape))
        return None
    if qkv.dim() != 4 or num_heads_q is None:
        got = f"{qkv.dim()} with num_heads_q {num_heads_q}"
        fail(ValueError, "qkv", "of 5 dimensions, or of 4 with num_heads_q given", got)
    num_heads_q, total = as_int(num_heads_q, "num_heads_q"), qkv.shape[2]
    if not 0 <= num_heads_q <= total or (total - num_heads_q) % 2:
        allowed = f"such that an even number of the {total} heads remains"
        fail(ValueError, "num_heads_q", allowed, num_heads_q)
    return num_heads_q


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
        TypeError, ValueError: as in `apply_rotary_emb`, or a qkv of another shape.
    """
    select = partial(_select_qk, num_heads_q=_check_qkv(qkv, num_heads_q))
    q, k = select(qkv)
    of_q = angles_of(q, cos, sin, seqlen_offsets, None)
    of_k = of_q
    if cos_k is not None or sin_k is not None:
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        of_k = angles_of(k, cos_k, sin_k, seqlen_offsets, None)
    return rotate_parts(qkv, [(q, of_q), (k, of_k)], select, interleaved)


def _select_k(kv: Tensor) -> tuple[Tensor]:
    """Return the view k of a packed (b, s, 2, h, d) tensor."""
    return (kv[:, :, 0],)


def _part_of_kv(kv: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: Offsets) -> tuple[Tensor, Angles]:
    """Return k of a packed kv and its angles, once they are checked."""
    check_floating(kv, "kv")
    if kv.dim() != 5 or kv.shape[2] != 2:
        fail(ValueError, "kv", "(b, s, 2, h, d)", tuple(kv.shape))
    (k,) = _select_k(kv)
    return k, angles_of(k, cos, sin, seqlen_offsets, None)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
) -> Tensor:
    """Rotate k inside `kv` (b, s, 2, h, d) in place and return it; the rest as in `apply_rotary_emb`."""
    return rotate_parts(kv, [_part_of_kv(kv, cos, sin, seqlen_offsets)], _select_k, interleaved)


class _Tables(NamedTuple):
    """Tables of positions 0 .. seqlen; those of k differ under XPos alone."""

    seqlen: int = 0
    cos: Tensor | None = None
    sin: Tensor | None = None
    cos_k: Tensor | None = None
    sin_k: Tensor | None = None
    without_gradients: bool = False  # made with grad mode off, perhaps in inference mode


def _entry(name: str) -> Any:
    """Return a property of `RotaryEmbedding`: an entry of its tables, under the name that others know."""

    def write(module: RotaryEmbedding, value: Any) -> None:
        module._tables = module._tables._replace(**{name: value})

    return property(lambda module: getattr(module._tables, name), write)


def _are_plausible(values: Tensor) -> bool:
    """Return whether memory that may be unset holds frequencies or scales: in (0, 1] and monotonic."""
    steps = values.diff()
    return bool(((values > 0) & (values <= 1)).all() and ((steps <= 0).all() or (steps >= 0).all()))


class RotaryEmbedding(nn.Module):
    """Rotary embedding of packed qkv, or of q and packed kv, with cached tables.

    The buffers `inv_freq` and, with XPos, `scale` may be changed before the tables are made. They always hold
    values: `to_empty` keeps them, and memory that takes the place of a buffer on the meta device is filled
    unless it holds plausible values already.

    Args:
        dim: rotary_dim, the number of elements rotated per head, even.
        base: frequency i is base^(-2 i / dim).
        interleaved: as in `apply_rotary_emb`.
        scale_base: XPos decay length, None for none.
        device: of the buffers.
    Raises:
        TypeError, ValueError: dim is no positive even integer, base or scale_base no positive number.
    """

    BUFFERS = ("inv_freq", "scale")
    inv_freq: Tensor
    scale: Tensor | None
    _tables = _Tables()  # one tuple, so that an exception or another thread never leaves parts of two
    _seq_len_cached = _entry("seqlen")
    _cos_cached, _sin_cached = _entry("cos"), _entry("sin")
    _cos_k_cached, _sin_k_cached = _entry("cos_k"), _entry("sin_k")

    def __init__(
        self, dim: int, base: float = 10000.0, interleaved: bool = False, scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.base = as_int(dim, "dim"), as_float(base, "base")
        self.interleaved = as_flag(interleaved, "interleaved")
        self.scale_base = None if scale_base is None else as_float(scale_base, "scale_base")
        if self.dim <= 0 or self.dim % 2:
            fail(ValueError, "dim", "positive and even", self.dim)
        for value, name in ((self.base, "base"), (self.scale_base, "scale_base")):
            if value is not None and value <= 0.0:
                fail(ValueError, name, "positive", value)
        for name in self.BUFFERS:
            self.register_buffer(name, self._exact(name, device), persistent=False)

    def _exact(self, name: str, device: torch.device | str | None) -> Any:
        """Compute what a buffer holds unless somebody changes it."""
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        if name == "inv_freq":
            return self.base ** -(even / self.dim)
        return None if self.scale_base is None else (even + 0.4 * self.dim) / (1.4 * self.dim)

    def _values(self, name: str, device: torch.device | None) -> Any:
        """Return a buffer in fp32, computed anew where it is on meta or, being rounded, too coarse."""
        held = getattr(self, name)
        if held is None or held.is_meta or held.dtype not in (torch.float32, torch.float64):
            return self._exact(name, device)
        return held.to(device=device, dtype=torch.float32)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.BUFFERS and type(value) in (Tensor, nn.Parameter) and not value.is_meta:
            held = getattr(self, name, None)
            if held is not None and held.is_meta and not _are_plausible(value.detach()):
                value.detach().copy_(self._exact(name, value.device))
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = {name: getattr(self, name) for name in self.BUFFERS}
        super()._apply(fn, recurse)
        for name, held in before.items():
            value = getattr(self, name)
            if value is not held and type(value) is Tensor and not value.is_meta:
                value.copy_(self._exact(name, value.device) if held.is_meta else held)
        return self

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None,
                              dtype: torch.dtype | None = None) -> _Tables:  # fmt: skip
        """Return the tables of positions 0 .. seqlen, computed where the cached ones do not serve."""
        cached, gradients = self._tables, torch.is_grad_enabled()
        cos = cached.cos
        if (
            cos is not None and cos.device == device and cos.dtype == dtype and seqlen <= cached.seqlen
            and not (gradients and (cached.without_gradients or self.inv_freq.requires_grad))
        ):  # fmt: skip
            return cached
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, self._values("inv_freq", device))
        cos, sin = angles.cos(), angles.sin()
        made = [cos, sin]
        if self.scale_base is not None:
            power = (positions - seqlen // 2) / self.scale_base
            scale = self._values("scale", device) ** power.unsqueeze(1)
            made = [cos * scale, sin * scale, cos / scale, sin / scale]
        cos, sin, *of_k = [x.to(dtype) for x in made]
        cos_k, sin_k = of_k or (None, None)
        tables = _Tables(seqlen, cos, sin, cos_k, sin_k, not gradients)
        self._tables = tables
        return tables

    def forward(
        self, qkv: Tensor, kv: Tensor | None = None, seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None, num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Rotate in place and return qkv, or (q, kv) if `kv` is given; see `apply_rotary_emb` on leaves.

        Args:
            qkv: (b, s, 3, h, d), (b, s, h_q + 2 h_k, d) with `num_heads_q`, or q (b, s, h, d) with `kv`.
            kv: (b, s, 2, hk, d).
            seqlen_offset: integer, or integer tensor (b,) or (), position of the first token.
            max_seqlen: length of the tables; needed to avoid a synchronisation when `seqlen_offset` is a CUDA
            tensor.
        Raises:
            TypeError, ValueError: as in `apply_rotary_emb`, or a `max_seqlen` that is too short.
        """
        if kv is None:
            _check_qkv(qkv, num_heads_q)
            seqlen = qkv.shape[1]
        else:
            check_x(qkv, "qkv", 4)
            check_x(kv, "kv", 5)
            seqlen = max(qkv.shape[1], kv.shape[1])
        length = self._length(seqlen, seqlen_offset, max_seqlen)
        # Subclasses that make tables of their own assign the attributes and return nothing.
        tables = self._update_cos_sin_cache(length, device=qkv.device, dtype=qkv.dtype) or self._tables
        _, cos, sin, cos_k, sin_k, _ = tables
        assert cos is not None and sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )  # fmt: skip
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        part = _part_of_kv(kv, cos_k, sin_k, seqlen_offset)  # before q is written to
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, rotate_parts(kv, [part], _select_k, self.interleaved)

    @staticmethod
    def _length(seqlen: int, offset: Any, max_seqlen: Any) -> int:
        """Return how many positions the tables must hold."""
        least = seqlen
        if not isinstance(offset, Tensor):
            least = seqlen + max(0, as_position(offset, "seqlen_offset"))
        elif max_seqlen is None and offset.numel():
            least = seqlen + max(0, as_int(offset.max(), "seqlen_offset"))
        if max_seqlen is None:
            return least
        max_seqlen = as_int(max_seqlen, "max_seqlen")
        if max_seqlen < least:
            fail(ValueError, "max_seqlen", f"at least {least} (seqlen + seqlen_offset)", max_seqlen)
        return max_seqlen
