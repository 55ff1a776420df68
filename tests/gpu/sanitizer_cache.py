"""As sanitizer.py, for the kernels of `flash_attn_with_kvcache`, of pages and of the rotary embedding."""

import itertools
import sys

import torch
from sanitizer import DTYPES, random

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn._abi import HEAD_DIMS
from flash_attn.layers.rotary import apply_rotary_emb

CAPACITY, PAGE = 208, 16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).cuda()


def angles(rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return random(CAPACITY, rotary_dim // 2, dtype=dtype), random(CAPACITY, rotary_dim // 2, dtype=dtype)


def contiguous(head_dim: int, dtype: torch.dtype) -> None:
    """Queries for each tile, split keys or not, new keys with and without rotation, that fit and do not."""
    cos, sin = angles(16, dtype)
    for seqlen_q, interleaved in itertools.product((1, 10, 100), (False, True)):
        q = random(2, seqlen_q, 6, head_dim, dtype=dtype)
        k, v = (random(2, seqlen_q, 2, head_dim, dtype=dtype) for _ in range(2))
        k_cache, v_cache = (random(3, CAPACITY, 2, head_dim, dtype=dtype) for _ in range(2))
        tables = {"rotary_cos": cos, "rotary_sin": sin}
        for num_splits, softcap, rotary in ((1, 0.0, {}), (1, 20.0, tables), (3, 20.0, tables)):
            flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=int32(130, CAPACITY - 1), causal=True,
                cache_batch_idx=int32(2, 0), cache_leftpad=int32(0, 5), num_splits=num_splits,
                rotary_interleaved=interleaved, softcap=softcap, **rotary,
            )  # fmt: skip


def paged(head_dim: int, dtype: torch.dtype) -> None:
    """Pages, one of them outside the cache; decoding beside prefill."""
    k, v = (random(30, PAGE, 1, head_dim, dtype=dtype) for _ in range(2))
    table = torch.arange(26).int().view(2, -1)
    table[0, 2] = 99
    flash_attn_with_kvcache(
        random(2, 1, 4, head_dim, dtype=dtype), k, v, random(2, 1, 1, head_dim, dtype=dtype),
        random(2, 1, 1, head_dim, dtype=dtype), cache_seqlens=int32(40, 207), block_table=table.cuda(),
        num_splits=5, return_softmax_lse=True,
    )  # fmt: skip
    flash_attn_varlen_func(
        random(70, 4, head_dim, dtype=dtype), k, v, int32(0, 1, 66), int32(0, 33, 233), 65, 200,
        causal=True, window_size=(90, 0), block_table=table.cuda(), return_attn_probs=True,
    )  # fmt: skip


def rotary(head_dim: int, dtype: torch.dtype) -> None:
    for interleaved, inplace in itertools.product((False, True), (False, True)):
        apply_rotary_emb(random(2, 9, 5, head_dim, dtype=dtype), *angles(16, dtype), interleaved, inplace, 3)
    apply_rotary_emb(
        random(20, 5, head_dim, dtype=dtype), *angles(32, dtype), seqlen_offsets=int32(3, 205),
        cu_seqlens=int32(0, 7, 15), max_seqlen=8,
    )  # fmt: skip


def main() -> None:
    head_dims = [int(argument) for argument in sys.argv[1:]] or HEAD_DIMS
    for head_dim, dtype in itertools.product(head_dims, DTYPES):
        contiguous(head_dim - 8, dtype)
        paged(head_dim, dtype)
        contiguous(head_dim - 5, dtype)  # rows that are not aligned to 16 bytes
        paged(head_dim - 5, dtype)
        rotary(head_dim, dtype)
    torch.cuda.synchronize()
    print(f"ran head dims {head_dims}")


if __name__ == "__main__":
    main()
