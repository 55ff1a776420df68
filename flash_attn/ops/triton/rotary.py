"""Rotary embedding under the name of flash-attn's own kernel; differentiable like the layer's."""

from __future__ import annotations

from torch import Tensor

from flash_attn._rotary import Offsets
from flash_attn.layers.rotary import rotate_all


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: Offsets = 0, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, interleaved: bool = False, inplace: bool = False, conjugate: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate the first rotary_dim elements of each head of x, or rotate them back with `conjugate`.

    Shapes and other arguments as in `flash_attn.layers.rotary.apply_rotary_emb`.

    Raises:
        TypeError, ValueError: as there.
    """
    return rotate_all(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, conjugate, inplace)
