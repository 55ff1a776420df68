"""A small set of calls that touches every kernel, for NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/gpu/sanitizer.py [head_dim ...]

and the same with initcheck and, with a library built for it (docs/kernels.md), racecheck. Inputs are made on
the CPU: copies initialise them for the tool. FLASH_ATTN_FORCE_FAMILY picks the kernel family.
"""

import itertools
import sys

import torch

from flash_attn import build_info, flash_attn_func, flash_attn_qkvpacked_func
from flash_attn._abi import HEAD_DIMS
from flash_attn._backends.cuda.tensors import DTYPE_NAMES
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, flash_attn_varlen_func

DTYPES = [dtype for dtype, name in DTYPE_NAMES.items() if name in build_info()["dtypes"]]
WINDOWS = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "windowed": (False, (40, 17))}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.autograd.grad(out, inputs, random(*out.shape, dtype=out.dtype))


def fixed_length(head_dim: int, dtype: torch.dtype) -> None:
    """Odd lengths, more queries than keys, GQA, narrower head dims, with and without score modifiers."""
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).cuda()
    modifiers = (
        {},
        {"softcap": 20.0},
        {"alibi_slopes": slopes},
        {"dropout_p": 0.17, "return_attn_probs": True},
    )
    for (seqlen_q, seqlen_k), (causal, window) in itertools.product(((131, 197), (70, 33)), WINDOWS.values()):
        q = random(2, seqlen_q, 4, head_dim - 8, dtype=dtype)
        k, v = (random(2, seqlen_k, 2, head_dim - 8, dtype=dtype) for _ in range(2))
        for modifier in modifiers:
            flash_attn_func(q, k, v, causal=causal, window_size=window, **modifier)
        flash_attn_func(q, k, v[..., : head_dim // 2].contiguous(), causal=causal, window_size=window)


def fixed_length_backward(head_dim: int, dtype: torch.dtype) -> None:
    """The same, with semaphores and without, of all inputs, of some, and of a packed one. Less in fp16."""
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).cuda()
    modifiers = ({}, {"deterministic": True}, {"softcap": 20.0, "alibi_slopes": slopes}, {"dropout_p": 0.17})
    lengths = ((131, 197), (70, 33))
    if dtype == torch.float16:
        modifiers, lengths = modifiers[:1], lengths[:1]
    for (seqlen_q, seqlen_k), (causal, window) in itertools.product(lengths, WINDOWS.values()):
        named = {"causal": causal, "window_size": window}
        q = random(2, seqlen_q, 4, head_dim - 8, dtype=dtype).requires_grad_()
        k, v = (random(2, seqlen_k, 2, head_dim - 8, dtype=dtype).requires_grad_() for _ in range(2))
        for modifier in modifiers:
            gradients(flash_attn_func(q, k, v, **named, **modifier), q, k, v)
        gradients(flash_attn_func(q, k.detach(), v.detach(), **named), q)
        gradients(flash_attn_func(q.detach(), k, v, **named), k, v)
        narrow = v[..., : head_dim // 2].detach().contiguous().requires_grad_()
        gradients(flash_attn_func(q, k, narrow, **named), q, k, narrow)
    qkv = random(1, 140, 3, 2, head_dim, dtype=dtype).requires_grad_()
    gradients(flash_attn_qkvpacked_func(qkv, causal=True), qkv)


def varlen(head_dim: int, dtype: torch.dtype, backward: bool) -> None:
    """Empty sequences on both sides, tokens past the last sequence, unused and padding keys."""
    cu_seqlens_q = torch.tensor([0, 0, 65, 66, 203], dtype=torch.int32).cuda()
    cu_seqlens_k = torch.tensor([0, 7, 7, 136, 300], dtype=torch.int32).cuda()
    q = random(410, 2, head_dim, dtype=dtype)
    k, v = (random(300, 1, head_dim, dtype=dtype) for _ in range(2))
    for causal, window in WINDOWS.values():
        flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, 137, 164, causal=causal, window_size=window
        )
        for deterministic in (False, True) if backward else ():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = flash_attn_varlen_func(
                *leaves, cu_seqlens_q, cu_seqlens_k, 137, 164, causal=causal, window_size=window,
                deterministic=deterministic,
            )  # fmt: skip
            gradients(out, *leaves)
    used = torch.tensor([5, 0, 100, 90], dtype=torch.int32).cuda()
    skipped = torch.tensor([1, 0, 3, 20], dtype=torch.int32).cuda()
    _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        137,
        164,
        0.0,
        head_dim**-0.5,
        True,
        leftpad_k=skipped,
        seqused_k=used,
    )


def main() -> None:
    head_dims = [int(argument) for argument in sys.argv[1:]] or HEAD_DIMS
    for head_dim, dtype in itertools.product(head_dims, DTYPES):
        backward = "backward" in build_info()["directions"]
        fixed_length(head_dim, dtype)
        if backward:
            fixed_length_backward(head_dim, dtype)
        varlen(head_dim, dtype, backward)
    torch.cuda.synchronize()
    print(f"ran head dims {head_dims}")


if __name__ == "__main__":
    main()
