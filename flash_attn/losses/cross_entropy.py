"""Cross entropy as a module; see `flash_attn.ops.triton.cross_entropy` for the formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

REDUCTIONS = ("mean", "sum", "none")


class CrossEntropyLoss(nn.Module):
    """Cross entropy of logits (n, V) against labels (n,), reduced over the rows that count.

    Args:
        reduction: "mean", "sum" or "none".
        return_z_loss: return the z-loss too; it is part of the loss and carries no gradient.
        The others are those of `cross_entropy_loss`.
    Raises:
        ValueError: another reduction.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss of input (n, V) for target (n,): fp32 scalar, or (n,) without reduction."""
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        counted = (target != self.ignore_index).sum()
        loss, z_loss = self._reduce(losses, counted), self._reduce(z_losses, counted)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduce(self, losses: Tensor, counted: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        return losses.sum() / counted if self.reduction == "mean" else losses.sum()
