"""The data of calls on their way from a public function to a backend: records without algorithms.

b = batch, s = sequence length, h = query heads, hk = heads of keys and values, d and dv = head dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Options = tuple[float, float | None, bool, Any, float, Tensor | None, Tensor | None]
"""How scores are to be formed, as the caller said it, unchecked: (dropout_p, softmax_scale, causal,
window_size, softcap, alibi_slopes, s_aux). A plain tuple, which every torch's compiler can trace.
"""

Tables = tuple[Tensor | None, Tensor | None, bool]
"""(rotary_cos, rotary_sin, rotary_interleaved) as the caller said it."""

Record = TypeVar("Record", bound=tuple)
new: Callable[[type[Record], Iterable[Any]], Record] = tuple.__new__
"""Make a record of all of its fields, in half the time that `Record(*fields)` takes."""

Shapes = tuple[torch.Size, torch.Size, torch.Size]
"""Those of q, k and v, or of q and the cache."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dq, dk and dv, None where one is not wanted."""

Outputs = tuple[Tensor, Any, Tensor | None, Tensor | None]
"""(out, lse, S_dmask, rng_state); lse is a Tensor, or None where the caller did not need one."""


class Scoring(NamedTuple):
    """How scores are formed from q and k: windows are -1 where unlimited, causal is a right window of 0."""

    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    dropout_p: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None


class Sequences(NamedTuple):
    """How sequences are packed end to end, and which of their keys are used.

    The lengths of the longest ones may be larger than they are. With a `block_table` keys lie in pages.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    leftpad_k: Tensor | None = None
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None


class Forward(NamedTuple):
    """Attention of q (b, sq, h, d), k (b, sk, hk, d) and v (b, sk, hk, dv).

    Of packed `sequences` q is (total_q, h, d), and k and v are (total_k, hk, d or dv), or pages (num_blocks,
    page_size, hk, d or dv), for which `num_splits` counts. Without `need_lse` the LSE may be left out.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None
    shapes: Shapes
    scoring: Scoring
    sequences: Sequences | None
    num_splits: int
    return_softmax: bool
    generator: torch.Generator | None
    need_lse: bool


class Differentiated(NamedTuple):
    """What a backward reads: the gradient of the output, and the tensors of the forward."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor


class Backward(NamedTuple):
    """The gradients of a `Forward`, those that are wanted, to be written where `gradients` lie."""

    tensors: Differentiated
    gradients: Gradients
    scoring: Scoring
    sequences: Sequences | None
    deterministic: bool
    rng_state: Tensor | None


class Cache(NamedTuple):
    """A KV cache and how its rows are found; see `flash_attn_with_kvcache`."""

    k: Tensor
    v: Tensor
    seqlens: Tensor | int | None
    batch_idx: Tensor | None
    leftpad: Tensor | None
    block_table: Tensor | None

    @property
    def capacity(self) -> int:
        """Number of keys that one sequence has room for."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]


class Rotary(NamedTuple):
    """Rotary tables cos, sin (s_ro, rotary_dim / 2) and the layout of pairs."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


class CacheForward(NamedTuple):
    """Attention of q (b, sq, h, d) over a cache, to which k (b, s_new, hk, d) and v are appended first.

    k and v are both None where nothing is. `num_splits` 0 leaves the choice to the backend.
    """

    q: Tensor
    cache: Cache
    k: Tensor | None
    v: Tensor | None
    shapes: Shapes
    rotary: Rotary | None
    scoring: Scoring
    out: Tensor | None
    num_splits: int
    need_lse: bool


class Angles(NamedTuple):
    """Tables cos, sin (s_ro, rotary_dim / 2), and where in them the tokens of a tensor stand.

    Positions past the tables are an error where they are known (on CPU); elsewhere their tokens are left as
    they are.
    """

    cos: Tensor
    sin: Tensor
    offsets: int | Tensor
    cu_seqlens: Tensor | None = None


class Rotation(NamedTuple):
    """The rotation of x (b, s, h, d), or (total, h, d) of packed sequences, by its angles; back if
    `conjugate`.
    """

    x: Tensor
    angles: Angles
    interleaved: bool
    conjugate: bool
    inplace: bool
