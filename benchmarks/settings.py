"""The attention problems that are measured, and their cost in FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

TOTAL_TOKENS = 16384
MODEL_DIM = 2048
HEAD_DIMS = (64, 128, 256)
MASKS = ("full", "causal")
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""FLOPs of each direction over those of the forward: the backward has five matrix products to its two."""
DEVICE_TABLES = ("forward", "backward", "decode", "prefill")
TABLES = (*DEVICE_TABLES, "host")
"""What `python -m benchmarks compare` measures: device time of attention, and the host time of a call."""
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Setting:
    """One self-attention problem: `TOTAL_TOKENS` tokens in sequences of `seqlen`, `MODEL_DIM` wide."""

    head_dim: int
    mask: str
    seqlen: int

    @property
    def batch(self) -> int:
        return max(1, TOTAL_TOKENS // self.seqlen)

    @property
    def num_heads(self) -> int:
        return max(1, MODEL_DIM // self.head_dim)

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, seqlen, num_heads, head_dim): the shape of q, k and v."""
        return self.batch, self.seqlen, self.num_heads, self.head_dim

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of QK^T and PV, two per multiply-add; a causal mask halves them."""
        dense = 4 * self.batch * self.num_heads * self.seqlen**2 * self.head_dim
        return dense // 2 if self.causal else dense

    def tflops(self, milliseconds: float, direction: str) -> float:
        """The speed, in TFLOP/s, of a pass in a direction of `WORK` that took `milliseconds`."""
        return WORK[direction] * self.forward_flops / milliseconds * 1e-9


def all_settings(
    head_dims: Sequence[int] = HEAD_DIMS,
    masks: Sequence[str] = MASKS,
    seqlens: Sequence[int] = SEQLENS,
) -> Iterator[Setting]:
    """Every combination, in the order of the table: head dim, then mask, then sequence length."""
    for head_dim, mask, seqlen in product(head_dims, masks, seqlens):
        yield Setting(head_dim, mask, seqlen)
