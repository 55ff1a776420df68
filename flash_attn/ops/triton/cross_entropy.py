"""Cross entropy over large vocabularies: no copy of the logits is kept, and the gradient may overwrite them.

For a row x scaled by logit_scale, with lse = log(sum(exp(x))) and label y among V classes,
loss = lse - (1 - label_smoothing) x_y - label_smoothing mean(x) + lse_square_scale lse^2. The last term is
the z-loss (Chowdhery et al., "PaLM", section 5). Logits may be split over a process group by vocabulary
(tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn._arguments import (
    as_flag,
    as_float,
    as_int,
    check_device,
    check_floating,
    check_integers,
    fail,
)
from flash_attn._dispatch import are_entries_known
from flash_attn._forward_only import differentiable_once

LOGITS_AT_ONCE = 2**22


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Split the rows of (n, V) so that a block is cheap to hold in fp32."""
    step = max(1, LOGITS_AT_ONCE // max(1, logits.shape[1]))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _widened(logits: Tensor, logit_scale: float) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(dtype) * logit_scale


class _Shard:
    """The part of the vocabulary that this process holds."""

    def __init__(self, num_classes: int, process_group: Any) -> None:
        self.group = process_group
        self.world = 1 if process_group is None else torch.distributed.get_world_size(process_group)
        rank = 0 if process_group is None else torch.distributed.get_rank(process_group)
        self.first, self.num_classes = rank * num_classes, num_classes

    def locate(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Return each label's local class, clamped into this part, and whether it lies in it and counts."""
        local = labels - self.first
        here = (local >= 0) & (local < self.num_classes) & (labels != ignore_index)
        return local.clamp(0, self.num_classes - 1), here

    def logsumexp(self, lse: Tensor) -> Tensor:
        """Combine the LSE of every part."""
        if self.world == 1:
            return lse
        parts = [torch.empty_like(lse) for _ in range(self.world)]
        torch.distributed.all_gather(parts, lse.contiguous(), group=self.group)
        return torch.stack(parts).logsumexp(0)

    def sum(self, x: Tensor) -> Tensor:
        """Add up every part."""
        if self.world > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x


class _Terms(NamedTuple):
    """What the loss is made of beside logits, labels and LSE."""

    shard: _Shard
    smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int

    @property
    def total(self) -> int:
        """The number of classes of all processes."""
        return self.shard.num_classes * self.shard.world


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, known_lse: Tensor | None, terms: _Terms,
                inplace_backward: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        shard, smoothing, logit_scale, lse_square_scale, ignore_index = terms
        index, here = shard.locate(labels, ignore_index)
        ignored = labels == ignore_index
        lse_parts, picked_parts = [], []
        for rows in _row_blocks(logits):
            x = _widened(logits[rows], logit_scale)
            if known_lse is None:
                lse_parts.append(x.logsumexp(-1))
            picked = x.gather(1, index[rows, None]).squeeze(1) * here[rows] * (1.0 - smoothing)
            picked_parts.append(picked + x.sum(-1) * (smoothing / terms.total) if smoothing else picked)
        empty = _widened(logits.new_empty(0), 1.0)
        lse = torch.cat(lse_parts) if lse_parts else empty
        if known_lse is not None:
            lse = known_lse.to(empty.dtype)
        lse = shard.logsumexp(lse)
        picked = shard.sum(torch.cat(picked_parts) if picked_parts else empty)
        z_losses = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
        losses = (lse - picked).masked_fill(ignored, 0.0) + z_losses
        losses = losses.masked_fill(~(ignored | (labels >= 0) & (labels < terms.total)), nan)
        ctx.save_for_backward(logits, labels, lse)
        ctx.terms, ctx.inplace = terms, inplace_backward
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    @differentiable_once("cross_entropy_loss")
    def backward(ctx: Any, dlosses: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        return _gradient(dlosses, logits, labels, lse, ctx.terms, ctx.inplace), *(None,) * 4


def _gradient(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, terms: _Terms, inplace: bool
) -> Tensor:
    """Return the gradient of the logits, written over them if `inplace`."""
    shard, smoothing, logit_scale, lse_square_scale, ignore_index = terms
    index, here = shard.locate(labels, ignore_index)
    weight = (dlosses * logit_scale).masked_fill(labels == ignore_index, 0.0).to(lse.dtype)
    dlogits = logits.detach() if inplace else torch.empty_like(logits)
    for rows in _row_blocks(logits):
        x = _widened(logits[rows], logit_scale)
        dx = (x - lse[rows, None]).exp_() * (1.0 + 2.0 * lse_square_scale * lse[rows, None])
        if smoothing:
            dx -= smoothing / terms.total
        dx.scatter_add_(1, index[rows, None], here[rows, None].to(dx.dtype) * (smoothing - 1.0))
        dlogits[rows] = (dx * weight[rows, None]).to(logits.dtype)
    return dlogits


def _check_tensors(logits: Any, labels: Any, lse: Any) -> None:
    check_floating(logits, "logits")
    check_integers(labels, "labels")
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] == 0:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        fail(ValueError, "logits", "(n, V) with V > 0 and labels (n,)", shapes)
    check_device(labels, "labels", logits, "logits")
    if lse is not None:
        check_floating(lse, "precomputed_lse")
        check_device(lse, "precomputed_lse", logits, "logits")
        if lse.shape != labels.shape:
            fail(ValueError, "precomputed_lse", f"of shape {tuple(labels.shape)}", tuple(lse.shape))


def _check_labels(labels: Tensor, total: int, ignore_index: int) -> None:
    """Check on CPU that labels are classes, or `ignore_index`."""
    if not are_entries_known(labels):
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= total))]
    if wrong.numel():
        fail(ValueError, "labels", f"in [0, {total - 1}], or ignore_index ({ignore_index})", int(wrong[0]))


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return (losses, z_losses), one per row, both fp32; z_losses are part of losses and carry no gradient.

    Args:
        logits: (n, V), or this process's (n, V / world size) of them with `process_group`.
        labels: integers (n,); rows of `ignore_index` give zero loss and gradient.
        precomputed_lse: fp32 (n,), taken instead of computing it where there is neither smoothing nor scale.
        label_smoothing: weight of the uniform distribution over the classes, in [0, 1].
        logit_scale: factor of the logits.
        lse_square_scale: weight of the z-loss.
        inplace_backward: write the gradient over `logits`.
        process_group: torch.distributed group over which the vocabulary is split.
    Raises:
        TypeError: tensors or numbers of a wrong type.
        ValueError: wrong shapes or devices, a smoothing outside of [0, 1], or labels that are (known on CPU)
            no classes; on CUDA their loss is NaN.
        NotImplementedError: a number that requires grad; and in the backward of a gradient.
    """
    _check_tensors(logits, labels, precomputed_lse)
    smoothing = as_float(label_smoothing, "label_smoothing")
    ignore_index = as_int(ignore_index, "ignore_index")
    if not 0.0 <= smoothing <= 1.0:
        fail(ValueError, "label_smoothing", "in [0, 1]", smoothing)
    logit_scale = as_float(logit_scale, "logit_scale")
    lse_square_scale = as_float(lse_square_scale, "lse_square_scale")
    shard = _Shard(logits.shape[1], process_group)
    terms = _Terms(shard, smoothing, logit_scale, lse_square_scale, ignore_index)
    labels = labels.long()
    _check_labels(labels, terms.total, ignore_index)
    known_lse = precomputed_lse if smoothing == 0.0 and logit_scale == 1.0 else None
    return _CrossEntropy.apply(
        logits, labels, known_lse, terms, as_flag(inplace_backward, "inplace_backward")
    )  # fmt: skip
