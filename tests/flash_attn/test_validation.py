"""Bad input: every case is an exception of the right type, whose message names the argument."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import uses_kernels
from problems import int32, zeros
from refusals import needing_gradients, raises

import flash_attn
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    flash_attn_gpu,
)

BF16, FP32 = torch.bfloat16, torch.float32
Q, K = zeros(2, 10, 4, 32), zeros(2, 12, 2, 32)

FIXED = {
    "q is a list": (TypeError, "q", ([1.0], K, K), {}),
    "k is None": (TypeError, "k", (Q, None, K), {}),
    "v is a number": (TypeError, "v", (Q, K, 3), {}),
    "dtype mixed, k": (TypeError, "k", (Q, K.half(), K), {}),
    "dtype mixed, v": (TypeError, "v", (Q, K, K.float()), {}),
    "dtype unsupported": (TypeError, "q", (Q.int(), K.int(), K.int()), {}),
    "complex": (TypeError, "q", (Q.cfloat(), K.cfloat(), K.cfloat()), {}),
    "head dim 0": (ValueError, "q", (Q[..., :0], K[..., :0], K[..., :0]), {}),
    "head dim 257": (ValueError, "q", (zeros(2, 10, 4, 257), zeros(2, 12, 2, 257), zeros(2, 12, 2, 257)), {}),
    "head dims differ": (ValueError, "k", (Q, zeros(2, 12, 2, 40), zeros(2, 12, 2, 40)), {}),
    "h not divisible by hk": (ValueError, "k", (Q, zeros(2, 12, 3, 32), zeros(2, 12, 3, 32)), {}),
    "no KV heads": (ValueError, "k", (Q, zeros(2, 12, 0, 32), zeros(2, 12, 0, 32)), {}),
    "rank of q": (ValueError, "q", (Q[0], K, K), {}),
    "rank of k": (ValueError, "k", (Q, K[0], K[0]), {}),
    "rank of v": (ValueError, "v", (Q, K, K[0]), {}),
    "batch sizes differ": (ValueError, "k", (Q, K[:1], K[:1]), {}),
    "k and v differ": (ValueError, "v", (Q, K, K[:, :5]), {}),
    "batch sizes of k and v differ": (ValueError, "v", (Q, K, K[:1]), {}),
    "heads of k and v differ": (ValueError, "v", (Q, K, K[:, :, :1]), {}),
    "head dim 0 of v": (ValueError, "v", (Q, K, K[..., :0]), {}),
    "head dim 257 of v": (ValueError, "v", (Q, K, zeros(2, 12, 2, 257)), {}),
    "head dim 257 of v, fp32": (ValueError, "v", (Q.float(), K.float(), torch.zeros(2, 12, 2, 257)), {}),
    "dropout_p 1": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": 1.0}),
    "dropout_p negative": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": -0.1}),
    "dropout_p 1 in fp32": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": 1 - 1e-9}),
    "dropout_p nan": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": math.nan}),
    "dropout_p a string": (TypeError, "dropout_p", (Q, K, K), {"dropout_p": "0.1"}),
    "dropout with softcap": (ValueError, "softcap", (Q, K, K), {"dropout_p": 0.1, "softcap": 5.0}),
    "softcap negative": (ValueError, "softcap", (Q, K, K), {"softcap": -1.0}),
    "softcap nan": (ValueError, "softcap", (Q, K, K), {"softcap": math.nan}),
    "softcap infinite": (ValueError, "softcap", (Q, K, K), {"softcap": math.inf}),
    "softcap infinite in fp32": (ValueError, "softcap", (Q, K, K), {"softcap": 1e39}),
    "softcap 0 in fp32": (ValueError, "softcap", (Q, K, K), {"softcap": 1e-46}),
    "softcap None": (TypeError, "softcap", (Q, K, K), {"softcap": None}),
    "scale a string": (TypeError, "softmax_scale", (Q, K, K), {"softmax_scale": "1"}),
    "scale nan": (ValueError, "softmax_scale", (Q, K, K), {"softmax_scale": math.nan}),
    "scale infinite in fp32": (ValueError, "softmax_scale", (Q, K, K), {"softmax_scale": -1e39}),
    "window an int": (TypeError, "window_size", (Q, K, K), {"window_size": 5}),
    "window of three": (TypeError, "window_size", (Q, K, K), {"window_size": (1, 2, 3)}),
    "window of floats": (TypeError, "window_size[1]", (Q, K, K), {"window_size": (1, 2.5)}),
    "window of None": (TypeError, "window_size[0]", (Q, K, K), {"window_size": (None, 1)}),
    "alibi a list": (TypeError, "alibi_slopes", (Q, K, K), {"alibi_slopes": [0.1] * 4}),
    "alibi bf16": (TypeError, "alibi_slopes", (Q, K, K), {"alibi_slopes": zeros(4)}),
    "alibi too short": (ValueError, "alibi_slopes", (Q, K, K), {"alibi_slopes": zeros(2, dtype=FP32)}),
    "alibi wrong batch": (ValueError, "alibi_slopes", (Q, K, K), {"alibi_slopes": zeros(3, 4, dtype=FP32)}),
    "alibi elsewhere": (
        ValueError,
        "alibi_slopes",
        (Q, K, K),
        {"alibi_slopes": zeros(4, dtype=FP32, device="meta")},
    ),
}


@pytest.mark.parametrize("case", FIXED)
@pytest.mark.parametrize("grad", [False, True])
def test_fixed_length(case, grad):
    kind, name, tensors, named = FIXED[case]
    tensors = needing_gradients(tensors) if grad else tensors
    raises(kind, name, flash_attn.flash_attn_func, *tensors, **named)


PAGED = zeros(4, 16, 2, 32)
VARLEN = {
    "cu_seqlens_q int64": (TypeError, "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 4, 10])}),
    "cu_seqlens_k int64": (TypeError, "cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 4, 12])}),
    "cu_seqlens_q a list": (TypeError, "cu_seqlens_q", {"cu_seqlens_q": [0, 4, 10]}),
    "cu_seqlens_q elsewhere": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32(0, 4, 10).to("meta")}),
    "cu_seqlens_q empty": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32()}),
    "cu_seqlens_q of rank 2": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32(0, 4, 10)[None]}),
    "cu_seqlens_k of another length": (ValueError, "cu_seqlens_k", {"cu_seqlens_k": int32(0, 12)}),
    "cu_seqlens_q decreasing": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32(0, 7, 4)}),
    "cu_seqlens_k decreasing": (ValueError, "cu_seqlens_k", {"cu_seqlens_k": int32(0, 7, 4)}),
    "cu_seqlens_q not from 0": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32(1, 4, 10)}),
    "cu_seqlens_q past the end": (ValueError, "cu_seqlens_q", {"cu_seqlens_q": int32(0, 4, 11)}),
    "cu_seqlens_k past the end": (ValueError, "cu_seqlens_k", {"cu_seqlens_k": int32(0, 4, 13)}),
    "max_seqlen_q too small": (ValueError, "max_seqlen_q", {"max_seqlen_q": 5}),
    "max_seqlen_k too small": (ValueError, "max_seqlen_k", {"max_seqlen_k": 7}),
    "max_seqlen_q negative": (ValueError, "max_seqlen_q", {"max_seqlen_q": -1}),
    "max_seqlen_q beyond int32": (ValueError, "max_seqlen_q", {"max_seqlen_q": 2**31 - 1}),
    "max_seqlen_k beyond int32": (ValueError, "max_seqlen_k", {"max_seqlen_k": 2**40}),
    "max_seqlen_q a float": (TypeError, "max_seqlen_q", {"max_seqlen_q": 6.0}),
    "rank of q": (ValueError, "q", {"q": Q}),
    "tokens of k and v differ": (ValueError, "v", {"v": zeros(11, 2, 32)}),
    "head dim of v": (ValueError, "v", {"v": zeros(12, 2, 300)}),
    "alibi of another batch": (ValueError, "alibi_slopes", {"alibi_slopes": zeros(3, 4, dtype=FP32)}),
    "block_table int64": (TypeError, "block_table", {"k": PAGED, "v": PAGED,
                                                     "block_table": torch.zeros(2, 2, dtype=torch.int64)}),
    "block_table of another batch": (ValueError, "block_table", {"k": PAGED, "v": PAGED,
                                                                 "block_table": int32(0, 1)[None]}),
    "block_table past the pages": (ValueError, "block_table", {"k": PAGED, "v": PAGED,
                                                               "block_table": int32(0, 4)[:, None]}),
    "page size": (ValueError, "k", {"k": zeros(4, 8, 2, 32), "v": zeros(4, 8, 2, 32),
                                    "block_table": int32(0, 1)[:, None]}),
    "sequence longer than its pages": (ValueError, "cu_seqlens_k", {
        "k": PAGED, "v": PAGED, "block_table": int32(0, 1)[:, None],
        "cu_seqlens_k": int32(0, 17, 20), "max_seqlen_k": 17}),
}  # fmt: skip


def varlen_arguments(**changes):
    base = {
        "q": zeros(10, 4, 32), "k": zeros(12, 2, 32), "v": zeros(12, 2, 32), "cu_seqlens_q": int32(0, 4, 10),
        "cu_seqlens_k": int32(0, 4, 12), "max_seqlen_q": 6, "max_seqlen_k": 8,
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize("case", VARLEN)
def test_varlen(case):
    kind, name, changes = VARLEN[case]
    raises(kind, name, flash_attn.flash_attn_varlen_func, **varlen_arguments(**changes))


@pytest.mark.parametrize("name", ["seqused_k", "leftpad_k"])
@pytest.mark.parametrize(
    "value, kind",
    [(int32(1, 2, 3), ValueError), (int32(1, 9), ValueError), (int32(-1, 2), ValueError),
     (torch.zeros(2), TypeError), (3, TypeError)],
    ids=["shape", "too large", "negative", "dtype", "type"],
)  # fmt: skip
def test_varlen_key_bounds(name, value, kind):
    raises(
        kind,
        name,
        _flash_attn_varlen_forward,
        *varlen_arguments().values(),
        0.0,
        None,
        False,
        **{name: value},
    )


def test_leftpad_with_pages():
    arguments = varlen_arguments(k=zeros(4, 16, 2, 32), v=zeros(4, 16, 2, 32)).values()
    named = {"block_table": int32(0, 1)[:, None], "leftpad_k": int32(0, 0)}
    raises(ValueError, "leftpad_k", _flash_attn_varlen_forward, *arguments, 0.0, None, False, **named)


STATE = torch.tensor([3, 4])
BOTH = zeros(2, 12, 2, 2, 32)
BACKWARD = {
    "dout of another length": (ValueError, "dout", {"dout": Q[:, :3]}),
    "dout of another dtype": (TypeError, "dout", {"dout": Q.half()}),
    "dout elsewhere": (ValueError, "dout", {"dout": Q.to("meta")}),
    "dout None": (TypeError, "dout", {"dout": None}),
    "out of another dtype": (TypeError, "out", {"out": Q.float()}),
    "out of other heads": (ValueError, "out", {"out": Q[:, :, :2]}),
    "softmax_lse of another length": (ValueError, "softmax_lse", {"softmax_lse": zeros(2, 4, 9, dtype=FP32)}),
    "softmax_lse of another dtype": (TypeError, "softmax_lse", {"softmax_lse": zeros(2, 4, 10)}),
    "softmax_lse None": (TypeError, "softmax_lse", {"softmax_lse": None}),
    "dq of k's shape": (ValueError, "dq", {"dq": K.clone()}),
    "dk of another dtype": (TypeError, "dk", {"dk": K.float()}),
    "dk elsewhere": (ValueError, "dk", {"dk": K.to("meta")}),
    "dv a number": (TypeError, "dv", {"dv": 3}),
    "dk expanded": (ValueError, "dk", {"dk": K[:1].clone().expand(2, -1, -1, -1)}),
    "dk and dv the same": (ValueError, "dv", {"dk": BOTH[:, :, 0], "dv": BOTH[:, :, 0]}),
    "dk and dv of one row": (ValueError, "dv", {"dk": BOTH[:, :, 0], "dv": BOTH.flatten(2, 3)[:, :, 1:3]}),
    "dq and dv of one memory": (ValueError, "dv", {"dq": BOTH.flatten()[: Q.numel()].view_as(Q),
                                                   "dv": BOTH[:, :, 1]}),
    "rng_state missing": (TypeError, "rng_state", {"dropout_p": 0.1}),
    "rng_state of one": (ValueError, "rng_state", {"dropout_p": 0.1, "rng_state": STATE[:1]}),
    "rng_state int32": (ValueError, "rng_state", {"dropout_p": 0.1, "rng_state": STATE.int()}),
    "rng_state elsewhere": (ValueError, "rng_state", {"dropout_p": 0.1, "rng_state": STATE.to("meta")}),
}  # fmt: skip


def backward_arguments(changes):
    base = {
        "dout": Q, "q": Q, "k": K, "v": K, "out": Q, "softmax_lse": zeros(2, 4, 10, dtype=FP32),
        "dq": Q.clone(), "dk": K.clone(), "dv": K.clone(), "dropout_p": 0.0, "softmax_scale": 1.0,
        "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "alibi_slopes": None, "deterministic": False,
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case):
    kind, name, changes = BACKWARD[case]
    raises(kind, name, _flash_attn_backward, **backward_arguments(changes))


def test_parts_of_a_packed_gradient_may_be_written():
    packed, fused = zeros(2, 12, 3, 2, 32), zeros(2, 12, 8, 32)
    q = K.clone()
    tensors = {"dout": q, "q": q, "out": q, "softmax_lse": zeros(2, 2, 12, dtype=FP32)}
    given = dict(zip(("dq", "dk", "dv"), packed.unbind(2), strict=True))
    _flash_attn_backward(**backward_arguments(tensors | given))
    given = {"dq": fused[:, :10, :4], "dk": fused[:, :, 4:6], "dv": fused[:, :, 6:]}
    _flash_attn_backward(**backward_arguments(given))


def test_any_gradient_may_be_left_out():
    for given in ({"dq": None}, {"dk": None}, {"dv": None}, {"dq": None, "dk": None, "dv": None}):
        assert _flash_attn_backward(**backward_arguments(given)).shape == (2, 4, 128)


@pytest.mark.parametrize("name", ["dout", "out", "dv"])
def test_backward_of_another_head_dim_of_v(name):
    """What has v's head dim, in v's and then in q's."""
    right = {"dout": Q[..., :24], "out": Q[..., :24], "v": K[..., :24], "dv": K[..., :24].clone()}
    _flash_attn_backward(**backward_arguments(right))
    wrong = K if name == "dv" else Q
    raises(ValueError, name, _flash_attn_backward, **backward_arguments(right | {name: wrong}))


def test_varlen_backward():
    q, k = zeros(10, 4, 32), zeros(12, 2, 32)
    lse = zeros(4, 10, dtype=FP32)
    tail = 0.0, 1.0, False, -1, -1, 0.0, None, False
    gradients = q.clone(), k.clone(), k.clone()
    arguments = q, q, k, k, q, lse, *gradients, int32(0, 10), int32(0, 12), 10, 12, *tail
    _flash_attn_varlen_backward(*arguments)
    raises(ValueError, "softmax_lse", _flash_attn_varlen_backward, *arguments[:5], lse[:, 1:], *arguments[6:])
    raises(
        ValueError, "cu_seqlens_q", _flash_attn_varlen_backward, *arguments[:9], int32(0, 11), *arguments[10:]
    )
    raises(ValueError, "dv", _flash_attn_varlen_backward, *arguments[:8], arguments[7], *arguments[9:])


@pytest.mark.parametrize("out, kind", [(Q.float(), TypeError), (Q[:1], ValueError), (3, TypeError)])
def test_given_out(out, kind):
    raises(kind, "out", flash_attn_gpu.fwd, Q, K, K, out, None, 0.0, 1.0, False, -1, -1, 0.0, False, None)


def test_given_out_of_another_head_dim():
    tail = None, 0.0, 1.0, False, -1, -1, 0.0, False, None
    given = zeros(2, 10, 4, 24)
    assert flash_attn_gpu.fwd(Q, K, K[..., :24], given, *tail)[0] is given
    raises(ValueError, "out", flash_attn_gpu.fwd, Q, K, K[..., :24], Q, *tail)
    raises(ValueError, "out", flash_attn_gpu.fwd, Q, K, K, given, *tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_of_the_cpu_alone(device, dtype):
    q, k = Q.to(device, dtype), K.to(device, dtype)
    if uses_kernels(device):
        raises(TypeError, "q", flash_attn.flash_attn_func, q, k, k)
    else:
        assert flash_attn.flash_attn_func(q, k, k).dtype == dtype


def test_a_tensor_on_another_device(device):
    q, k = Q.to(device), K.to(device)
    raises(ValueError, "k", flash_attn.flash_attn_func, q, k.to("meta"), k)
    raises(ValueError, "v", flash_attn.flash_attn_func, q, k, k.to("meta"))


@pytest.mark.gpu
class TestOnCuda:
    """What CUDA cannot do, yet or ever, on a real GPU."""

    @pytest.fixture(autouse=True)
    def need_cuda(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA GPU")

    def test_devices_mixed(self):
        raises(ValueError, "k", flash_attn.flash_attn_func, Q.cuda(), K, K)
        raises(ValueError, "k", flash_attn.flash_attn_func, Q, K.cuda(), K)
        raises(ValueError, "v", flash_attn.flash_attn_func, Q.cuda(), K.cuda(), K)
        alibi = zeros(4, dtype=FP32)
        raises(
            ValueError,
            "alibi_slopes",
            flash_attn.flash_attn_func,
            Q.cuda(),
            K.cuda(),
            K.cuda(),
            alibi_slopes=alibi,
        )

    @pytest.mark.parametrize("name", ["dout", "out", "softmax_lse", "dq", "dk", "dv", "rng_state"])
    def test_backward_devices_mixed(self, name):
        arguments = backward_arguments({"dropout_p": 0.1, "rng_state": STATE})
        there = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        raises(ValueError, name, _flash_attn_backward, **there | {name: arguments[name]})

    def test_backward_lse_dtype(self):
        arguments = {
            n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in backward_arguments({}).items()
        }
        arguments["softmax_lse"] = arguments["softmax_lse"].double()
        raises(TypeError, "softmax_lse", _flash_attn_backward, **arguments)

    def test_pages(self):
        arguments = varlen_arguments(
            k=zeros(4, 16, 2, 32), v=zeros(4, 16, 2, 32), block_table=int32(0, 1)[:, None], dropout_p=0.1
        )
        arguments = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        with pytest.raises(NotImplementedError, match="block_table"):
            flash_attn.flash_attn_varlen_func(**arguments)
