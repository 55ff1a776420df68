"""Dropout masks from a counter-based generator, identical on CPU and CUDA and for every tile shape.

Philox4x32 with 7 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). One call
gives 128 bits: 16 bits for each of the 8 elements that one lane of a 16 x 16 tile of scores owns in the
tensor core's layout.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
TILE = 16
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def new_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw (seed, offset), int64[2] on `device`, from `generator` or the device's default one."""
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device, generator=generator)


def keep_threshold(dropout_p: float) -> int:
    """Return the bound below which an element's 16 random bits keep it, rounded in fp32 as the kernels do."""
    p = torch.tensor(dropout_p, dtype=torch.float32, device="cpu")
    return int((1.0 - p) * 65536.0 + 0.5)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt 4 x 32-bit counters held in int64 tensors (Salmon et al., section 3.3).

    The product of two 32-bit words wraps around in int64, which keeps its low 64 bits exact.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(rng_state: Tensor, dropout_p: float, heads: range, rows: range, cols: range) -> Tensor:
    """Return which elements survive dropout, bool (len(heads), len(rows), len(cols)).

    `heads` are values of b * num_heads + h; `rows` and `cols` are positions relative to the start of the
    sequence.
    """
    seed, offset = rng_state.tolist()
    arange = partial(torch.arange, device=rng_state.device)
    row_tiles = arange(rows.start // TILE, -(-rows.stop // TILE))
    col_tiles = arange(cols.start // TILE, -(-cols.stop // TILE))
    # Axes: head, row tile, row % 8, column tile, pair of columns; the words add the halves of the tile.
    lane = arange(8).view(8, 1, 1) * 4 + arange(4)
    c0 = (row_tiles.view(-1, 1, 1, 1) << 5) | lane
    c1 = col_tiles.view(-1, 1)
    c2 = arange(heads.start, heads.stop).view(-1, 1, 1, 1, 1)
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    words = philox((c0, c1, c2, torch.full_like(c0, offset & _WORD)), (seed & _WORD, (seed >> 32) & _WORD))
    threshold = keep_threshold(dropout_p)
    halves = torch.stack([half < threshold for word in words for half in (word & 0xFFFF, word >> 16)])
    # (column half, row half, column parity, head, row tile, row, column tile, pair) -> (head, rows, columns)
    keep = halves.view(2, 2, 2, *c0.shape).permute(3, 4, 1, 5, 6, 0, 7, 2)
    keep = keep.reshape(len(heads), len(row_tiles) * TILE, len(col_tiles) * TILE)
    first_row, first_col = rows.start % TILE, cols.start % TILE
    return keep[:, first_row : first_row + len(rows), first_col : first_col + len(cols)]
