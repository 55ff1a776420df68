"""Calls that tests of templates/problem make: tensors of every layout, and the parameters that name them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from flash_attn._abi import ForwardParams, Mask

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True, database=None)
WINDOW = st.one_of(st.sampled_from([-1, 0, 1, 2000]), st.integers(2, 300))
THREADS = st.sampled_from([1, 7, 32, 128])
GUARD = 0x5A5A


class Rows(ctypes.Structure):
    """The structure of tests/templates/problem.cpp that names rows of a tile."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("batch", "head", "group", "first_row", "max_rows"))


@dataclass
class Call:
    """Tensors as params name them; `starts` are those of packed sequences, None where lengths are fixed."""

    params: ForwardParams
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    starts_q: np.ndarray | None
    starts_k: np.ndarray | None

    @property
    def entries(self) -> range:
        """Batch entries that are launched: with packed sequences one more, for the rows past the last."""
        return range(self.params.batch + (self.starts_q is not None))

    def queries(self, x: np.ndarray, batch: int) -> np.ndarray:
        """Return a batch entry's rows of a tensor laid out as Q."""
        if self.starts_q is None:
            return x[batch]
        return x[self.starts_q[batch] :][: np.diff(self.starts_q, append=len(x))[batch]]

    def keys(self, x: np.ndarray, batch: int) -> np.ndarray:
        """Return the same of a tensor laid out as K: none past the last sequence."""
        if self.starts_k is None:
            return x[batch]
        return x[slice(*self.starts_k[batch : batch + 2])] if batch < self.params.batch else x[:0]

    def lse_rows(self, batch: int) -> np.ndarray:
        """Return a batch entry's LSE (query, head)."""
        return self.lse[batch].T if self.starts_q is None else self.queries(self.lse.T, batch)


def strides_of(x: np.ndarray, name: str) -> dict[str, int]:
    """Return the strides of a tensor (.., row, head, element), as params hold them."""
    names = ("batch", "row", "head")[-x.ndim + 1 :]
    return {f"{name}_{of}_stride": step // x.itemsize for of, step in zip(names, x.strides[:-1], strict=True)}


@st.composite
def heads(draw: st.DrawFn, rows: tuple[int, ...], count: int, dim: int) -> np.ndarray:
    """A tensor (.., row, head, element), with elements between rows, and between heads, that are nobody's."""
    whole = np.full((*rows, count + draw(st.integers(0, 1)), dim + 8), GUARD, np.uint16)
    return whole[..., :count, :dim]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A call of fixed or packed sequences; past the last packed one there may be rows of Q."""
    batch, packed = draw(st.integers(1, 3)), draw(st.booleans())
    heads_k, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    head_dim, head_dim_v = draw(st.sampled_from([8, 24])), draw(st.sampled_from([8, 16]))
    longest_q, longest_k = draw(st.integers(1, 12)), draw(st.integers(0, 12))
    rows_q, rows_k = (batch, longest_q), (batch, longest_k)
    starts_q = starts_k = None
    if packed:
        counts = (st.lists(st.integers(0, n), min_size=batch, max_size=batch) for n in (longest_q, longest_k))
        starts_q, starts_k = (np.cumsum([0, *draw(count)]).astype(np.int32) for count in counts)
        rows_q, rows_k = (int(starts_q[-1]) + draw(st.integers(0, 9)),), (int(starts_k[-1]),)
    tensors = {
        "q": draw(heads(rows_q, heads_k * group, head_dim)),
        "k": draw(heads(rows_k, heads_k, head_dim)),
        "v": draw(heads(rows_k, heads_k, head_dim_v)),
        "out": draw(heads(rows_q, heads_k * group, head_dim_v)),
    }
    lse = np.full((*rows_q[:-1], heads_k * group, rows_q[-1] + 1), GUARD, np.float32)[..., :-1]
    strides = {k: v for name, x in tensors.items() for k, v in strides_of(x, name).items()}
    params = ForwardParams(
        batch=batch, num_heads=heads_k * group, num_heads_k=heads_k, head_dim=head_dim, head_dim_v=head_dim_v,
        seqlen_q=longest_q, seqlen_k=longest_k, total_q=np.prod(rows_q), total_k=np.prod(rows_k),
        cu_seqlens_q=starts_q.ctypes.data if packed else None,
        cu_seqlens_k=starts_k.ctypes.data if packed else None,
        **{name: x.ctypes.data for name, x in tensors.items()}, **strides,
        softmax_lse=lse.ctypes.data, lse_head_stride=lse.strides[-2] // 4,
        lse_batch_stride=0 if packed else lse.strides[0] // 4,
    )  # fmt: skip
    return Call(params, **tensors, lse=lse, starts_q=starts_q, starts_k=starts_k)


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Call, Rows, list[tuple[int, int]]]:
    """A call, rows of a tile in it, and these as (query, head); perhaps none."""
    call = draw(calls())
    num_heads = call.params.num_heads
    group = draw(st.sampled_from([1, num_heads // call.params.num_heads_k]))
    batch, head = draw(st.sampled_from(call.entries)), draw(st.integers(0, num_heads // group - 1))
    count = len(call.queries(call.q, batch))
    every = [(query, head * group + i) for query in range(count) for i in range(group)]
    first, most = draw(st.integers(0, len(every) + 3)), draw(st.sampled_from([1, 3, 8, 64]))
    return call, Rows(batch, head, group, first, most), every[first : first + most]


@st.composite
def windows(draw: st.DrawFn) -> tuple[Mask, int, int]:
    """A mask class, and windows that it serves."""
    mask = draw(st.sampled_from([*Mask, Mask.WINDOWED]))
    if mask == Mask.WINDOWED:
        return mask, draw(WINDOW), draw(WINDOW)
    return mask, -1, 0 if mask == Mask.CAUSAL else -1


def visible(seqlen_q: int, seqlen_k: int, left: int, right: int) -> np.ndarray:
    """Return whether query i sees key j, aligned to the bottom right."""
    i, j = np.indices((seqlen_q, seqlen_k))
    distance = j - (i + seqlen_k - seqlen_q)
    return ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
