"""Between padded batches (b, s, ...) and packed tokens (total, ...) for varlen functions; differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "rearrange",  # noqa: F822 - found by __getattr__
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    """Offer einops' `rearrange` under this module's name, importing einops only when asked."""
    if name == "rearrange":
        from einops import rearrange

        return rearrange
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return rows `indices` (n,), int32 or int64, of `input` (total, ...): (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return (first_axis_dim, ...) holding `values` (n, ...) at rows `indices` (n,), zero elsewhere.

    `indices` are int32 or int64, all different.
    """
    out = values.new_zeros(first_axis_dim, *values.shape[1:])
    return out.index_copy(0, indices.long(), values)


def _cumulative(lengths: Tensor) -> Tensor:
    """Return cu_seqlens int32 (b + 1,) of lengths (b,)."""
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _select(hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of (b, s, ...) where mask (b, s) is nonzero, and their flat indices."""
    indices = mask.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask selects.

    Args:
        hidden_states: (b, s, ...).
        attention_mask: (b, s), bool or int, 1 for the tokens in use.
        unused_mask: (b, s), 1 for tokens to keep room for without using them.
    Returns:
        hidden (total, ...), indices int64 (total,) into the flattened batch, cu_seqlens int32 (b + 1,), the
        longest length as int, and the lengths in use, int32 (b,). All but the last count the unused tokens.
    """
    mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = mask.sum(-1, dtype=torch.int32)
    hidden, indices = _select(hidden_states, mask)
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden, indices, _cumulative(lengths), longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack rows that hold several sequences end to end.

    Args:
        hidden_states: (b, s, ...).
        attention_mask_in_length: (b, s), integers: row i starts with the lengths of its sequences, then
            zeros.
    Returns:
        hidden (total, ...), indices int64 (total,) into the flattened batch, cu_seqlens int32 (one entry per
        sequence, plus one), and the longest sequence as int.
    """
    used = attention_mask_in_length.sum(-1, keepdim=True)
    positions = torch.arange(attention_mask_in_length.shape[1], device=used.device)
    hidden, indices = _select(hidden_states, positions < used)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden, indices, _cumulative(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: return (batch, seqlen, ...), zero but for `hidden_states` at `indices`."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
