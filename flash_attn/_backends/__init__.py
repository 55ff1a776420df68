"""The two backends, each a package with the same functions, and which of them computes with a tensor.

Arguments come validated from the operations (`_operations`, `_kvcache`, `_rotary_autograd`).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from flash_attn import _device
from flash_attn._backends import cpu, cuda
from flash_attn._calls import Backward, CacheForward, Forward, Outputs, Rotation, Shapes


class Backend(Protocol):
    """What computes a call where its tensors are."""

    def forward(self, call: Forward) -> Outputs:
        """Return (out, lse, S_dmask, rng_state): lse (b, h, sq), or (h, total_q) of packed sequences.

        The last two are None without dropout, S_dmask also without `return_softmax`.
        """

    def backward(self, call: Backward) -> Tensor:
        """Write the gradients, zero past packed sequences; return softmax_d (see `_layout`)."""

    def forward_kvcache(self, call: CacheForward) -> tuple[Tensor, Any]:
        """Append k and v to the cache, then return (out, lse (b, h, sq))."""

    def num_key_parts(self, q: Tensor, k_cache: Tensor, shapes: Shapes, capacity: int) -> int:
        """Return into how many parts `forward_kvcache` splits the keys where it may choose.

        Raises:
            RuntimeError: it has no kernel for such a call.
        """

    def rotate(self, call: Rotation) -> Tensor:
        """Return x rotated, x itself if `inplace`."""


def of(x: Tensor) -> Backend:
    """Return the backend that computes with a tensor."""
    return cuda if _device.on_cuda(x) else cpu
