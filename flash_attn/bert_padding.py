"""Between padded batches (b, s, ...) and packed tokens (total, ...) for varlen functions; differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_attn._arguments import as_size, check_device, check_tensor, fail
from flash_attn._dispatch import are_entries_known, is_traced
from flash_attn._validation import check_range

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


def _check_rank(x: Any, name: str, rank: int) -> None:
    """Check that `x` is a tensor of at least `rank` dimensions."""
    check_tensor(x, name)
    if x.dim() < rank:
        fail(ValueError, name, f"a tensor of at least {rank} dimensions", f"shape {tuple(x.shape)}")


def _check_indices(indices: Any, x: Tensor, name: str, rows: int) -> None:
    """Check `indices` into `rows` rows, beside x; their range only on CPU."""
    _check_rank(indices, "indices", 1)
    if indices.dtype not in (torch.int32, torch.int64):
        fail(TypeError, "indices", "of dtype torch.int32 or torch.int64", indices.dtype)
    if indices.dim() != 1:
        fail(ValueError, "indices", "of shape (n,)", tuple(indices.shape))
    check_device(indices, "indices", x, name)
    if are_entries_known(indices):
        check_range(indices, "indices", 0, rows - 1)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Return rows `indices` (n,), int32 or int64, of `input` (total, ...): (n, ...).

    Raises:
        TypeError, ValueError: no tensors, or indices of another kind or (known on CPU) out of range.
    """
    _check_rank(input, "input", 1)
    _check_indices(indices, input, "input", input.shape[0])
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Return (first_axis_dim, ...) holding `values` (n, ...) at rows `indices` (n,), zero elsewhere.

    `indices` are int32 or int64, all different.

    Raises:
        TypeError, ValueError: as in `index_first_axis`, or a number of indices other than n.
    """
    _check_rank(values, "values", 1)
    return _put(values, "values", indices, as_size(first_axis_dim, "first_axis_dim"))


def _put(values: Tensor, name: str, indices: Tensor, rows: int) -> Tensor:
    _check_indices(indices, values, name, rows)
    if not is_traced(values) and indices.shape[0] != values.shape[0]:
        fail(
            ValueError, "indices", f"of shape ({values.shape[0]},), as {name} has rows", tuple(indices.shape)
        )
    out = values.new_zeros(rows, *values.shape[1:])
    return out.index_copy(0, indices.long(), values)


def _check_mask(mask: Any, name: str, hidden_states: Tensor) -> None:
    """Check that `mask` lies beside hidden_states (b, s, ...): (b, s), of bools or real numbers."""
    _check_rank(hidden_states, "hidden_states", 2)
    _check_rank(mask, name, 2)
    if mask.dtype.is_complex:
        fail(TypeError, name, "of bools or real numbers", mask.dtype)
    if mask.shape != hidden_states.shape[:2]:
        fail(ValueError, name, f"of shape {tuple(hidden_states.shape[:2])}", tuple(mask.shape))
    check_device(mask, name, hidden_states, "hidden_states")


def _check_entries(right: Tensor, name: str, allowed: str) -> None:
    """Check that all of `right` holds; reads it on any device, as packing synchronises anyway."""
    if not is_traced(right) and not bool(right.all()):
        fail(ValueError, name, allowed, f"{int((~right).sum())} other entries")


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
    Raises:
        TypeError, ValueError: no tensors, or masks of another shape or of entries other than 0 and 1.
    """
    _check_mask(attention_mask, "attention_mask", hidden_states)
    _check_entries((attention_mask == 0) | (attention_mask == 1), "attention_mask", "0 or 1")
    if unused_mask is not None:
        _check_mask(unused_mask, "unused_mask", hidden_states)
        free = (unused_mask == 0) | ((unused_mask == 1) & (attention_mask == 0))
        _check_entries(free, "unused_mask", "0 or 1, and 0 where attention_mask is 1")
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
    Raises:
        TypeError, ValueError: no tensors, or lengths of another shape, below 0, or longer than a row.
    """
    name = "attention_mask_in_length"
    _check_mask(attention_mask_in_length, name, hidden_states)
    whole = attention_mask_in_length == attention_mask_in_length.int()
    _check_entries(whole & (attention_mask_in_length >= 0), name, "whole numbers of at least 0")
    used = attention_mask_in_length.sum(-1, keepdim=True)
    seqlen = attention_mask_in_length.shape[1]
    _check_entries(used <= seqlen, name, f"of at most {seqlen} tokens a row")
    positions = torch.arange(seqlen, device=used.device)
    hidden, indices = _select(hidden_states, positions < used)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden, indices, _cumulative(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: return (batch, seqlen, ...), zero but for `hidden_states` at `indices`.

    Raises:
        TypeError, ValueError: as in `index_put_first_axis`, where batch * seqlen is `first_axis_dim`.
    """
    _check_rank(hidden_states, "hidden_states", 1)
    batch, seqlen = as_size(batch, "batch"), as_size(seqlen, "seqlen")
    return _put(hidden_states, "hidden_states", indices, batch * seqlen).unflatten(0, (batch, seqlen))
