"""Bad input: every case is an exception of the right type, whose message names the argument."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import flash_attn
from flash_attn import _validation
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    flash_attn_gpu,
)

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


def zeros(*shape, dtype=BF16, **extra):
    return torch.zeros(*shape, dtype=dtype, **extra)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def raises(kind, name, function, *arguments, **named):
    with pytest.raises(kind) as caught:
        function(*arguments, **named)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(name), caught.value
    assert ", got " in str(caught.value)


Q, K = zeros(2, 10, 4, 32), zeros(2, 12, 2, 32)

FIXED = {
    "q is a list": (TypeError, "q", ([1.0], K, K), {}),
    "k is None": (TypeError, "k", (Q, None, K), {}),
    "v is a number": (TypeError, "v", (Q, K, 3), {}),
    "dtype mixed, k": (TypeError, "k", (Q, K.half(), K), {}),
    "dtype mixed, v": (TypeError, "v", (Q, K, K.float()), {}),
    "dtype unsupported": (TypeError, "q", (Q.int(), K.int(), K.int()), {}),
    "complex": (TypeError, "q", (Q.cfloat(), K.cfloat(), K.cfloat()), {}),
    "devices mixed, k": (ValueError, "k", (Q, K.to("meta"), K), {}),
    "devices mixed, v": (ValueError, "v", (Q, K, K.to("meta")), {}),
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
    "dropout_p 1": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": 1.0}),
    "dropout_p negative": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": -0.1}),
    "dropout_p nan": (ValueError, "dropout_p", (Q, K, K), {"dropout_p": math.nan}),
    "dropout_p a string": (TypeError, "dropout_p", (Q, K, K), {"dropout_p": "0.1"}),
    "dropout with softcap": (ValueError, "softcap", (Q, K, K), {"dropout_p": 0.1, "softcap": 5.0}),
    "softcap negative": (ValueError, "softcap", (Q, K, K), {"softcap": -1.0}),
    "softcap nan": (ValueError, "softcap", (Q, K, K), {"softcap": math.nan}),
    "softcap infinite": (ValueError, "softcap", (Q, K, K), {"softcap": math.inf}),
    "softcap None": (TypeError, "softcap", (Q, K, K), {"softcap": None}),
    "scale a string": (TypeError, "softmax_scale", (Q, K, K), {"softmax_scale": "1"}),
    "scale nan": (ValueError, "softmax_scale", (Q, K, K), {"softmax_scale": math.nan}),
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
    if grad:
        tensors = [
            x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in tensors
        ]
    raises(kind, name, flash_attn.flash_attn_func, *tensors, **named)


QKVPACKED, KVPACKED = flash_attn.flash_attn_qkvpacked_func, flash_attn.flash_attn_kvpacked_func
VARLEN_QKVPACKED = flash_attn.flash_attn_varlen_qkvpacked_func
VARLEN_KVPACKED = flash_attn.flash_attn_varlen_kvpacked_func
PACKED = {
    "qkv a list": (TypeError, "qkv", QKVPACKED, ([1],)),
    "qkv of two": (ValueError, "qkv", QKVPACKED, (zeros(2, 5, 2, 4, 32),)),
    "qkv of rank 4": (ValueError, "qkv", QKVPACKED, (zeros(5, 3, 4, 32),)),
    "qkv head dim": (ValueError, "qkv", QKVPACKED, (zeros(2, 5, 3, 4, 300),)),
    "qkv dtype": (TypeError, "qkv", QKVPACKED, (zeros(2, 5, 3, 4, 32, dtype=INT8),)),
    "kv of three": (ValueError, "kv", KVPACKED, (Q, zeros(2, 5, 3, 4, 32))),
    "kv heads": (ValueError, "kv", KVPACKED, (Q, zeros(2, 5, 2, 3, 32))),
    "kv dtype": (TypeError, "kv", KVPACKED, (Q, zeros(2, 5, 2, 4, 32, dtype=FP32))),
    "kv batch": (ValueError, "kv", KVPACKED, (Q, zeros(3, 5, 2, 4, 32))),
    "kv with a q of rank 3": (ValueError, "q", KVPACKED, (Q[0], zeros(2, 5, 2, 4, 32))),
    "packed varlen": (
        ValueError, "qkv", VARLEN_QKVPACKED, (zeros(5, 2, 4, 32), int32(0, 5), 5)
    ),
    "packed varlen cu_seqlens": (
        TypeError, "cu_seqlens ", VARLEN_QKVPACKED,
        (zeros(5, 3, 4, 32), int32(0, 5).long(), 5),
    ),
    "packed varlen max_seqlen": (
        ValueError, "max_seqlen ", VARLEN_QKVPACKED, (zeros(5, 3, 4, 32), int32(0, 5), 4)
    ),
    "packed varlen kv": (
        ValueError, "kv", VARLEN_KVPACKED,
        (zeros(5, 4, 32), zeros(5, 2, 3, 32), int32(0, 5), int32(0, 5), 5, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_packed(case):
    kind, name, function, arguments = PACKED[case]
    raises(kind, name, function, *arguments)


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
    "max_seqlen_q a float": (TypeError, "max_seqlen_q", {"max_seqlen_q": 6.0}),
    "rank of q": (ValueError, "q", {"q": Q}),
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


def test_pages_with_gradients():
    arguments = varlen_arguments(
        q=zeros(10, 4, 32).requires_grad_(), k=zeros(4, 16, 2, 32), v=zeros(4, 16, 2, 32)
    )
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(**arguments, block_table=int32(0, 1)[:, None])


CACHE, NEW = zeros(2, 32, 2, 32), zeros(2, 3, 2, 32)
PAGES, TABLE = zeros(6, 16, 2, 32), torch.arange(4, dtype=torch.int32).view(2, 2)
COS = zeros(64, 8)

KVCACHE = {
    "k without v": (ValueError, "v", {"k": NEW, "cache_seqlens": 3}),
    "v without k": (ValueError, "k", {"v": NEW, "cache_seqlens": 3}),
    "appending without lengths": (ValueError, "cache_seqlens", {"k": NEW, "v": NEW}),
    "cache_seqlens int64": (TypeError, "cache_seqlens", {"cache_seqlens": torch.tensor([1, 2])}),
    "cache_seqlens a string": (TypeError, "cache_seqlens", {"cache_seqlens": "3"}),
    "cache_seqlens of another batch": (ValueError, "cache_seqlens", {"cache_seqlens": int32(1)}),
    "cache_seqlens past the cache": (ValueError, "cache_seqlens", {"cache_seqlens": 33}),
    "no room to append": (ValueError, "cache_seqlens", {"cache_seqlens": 30, "k": NEW, "v": NEW}),
    "cache_seqlens negative": (ValueError, "cache_seqlens", {"cache_seqlens": int32(-1, 2)}),
    "strided k_cache": (ValueError, "k_cache", {"k_cache": zeros(2, 32, 2, 64)[..., ::2]}),
    "strided v_cache": (ValueError, "v_cache", {"v_cache": zeros(2, 32, 2, 64)[..., ::2]}),
    "caches differ": (ValueError, "v_cache", {"v_cache": CACHE[:, :16]}),
    "cache dtype": (TypeError, "k_cache", {"k_cache": CACHE.float()}),
    "cache too small": (ValueError, "k_cache", {"k_cache": CACHE[:1], "v_cache": CACHE[:1]}),
    "new dtype": (TypeError, "k", {"k": NEW.float(), "v": NEW, "cache_seqlens": 3}),
    "new heads": (ValueError, "k", {"k": zeros(2, 3, 4, 32), "v": zeros(2, 3, 4, 32), "cache_seqlens": 3}),
    "new batch": (ValueError, "k", {"k": NEW[:1], "v": NEW[:1], "cache_seqlens": 3}),
    "batch_idx past the cache": (ValueError, "cache_batch_idx", {"cache_batch_idx": int32(0, 2)}),
    "batch_idx dtype": (TypeError, "cache_batch_idx", {"cache_batch_idx": torch.tensor([0, 1])}),
    "leftpad past the length": (ValueError, "cache_leftpad", {
        "cache_leftpad": int32(0, 5), "cache_seqlens": 4}),
    "leftpad shape": (ValueError, "cache_leftpad", {"cache_leftpad": int32(0)}),
    "batch_idx with pages": (ValueError, "cache_batch_idx", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE, "cache_batch_idx": int32(0, 1)}),
    "leftpad with pages": (ValueError, "cache_leftpad", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE, "cache_leftpad": int32(0, 1)}),
    "page size": (ValueError, "k_cache", {
        "k_cache": PAGES[:, :8], "v_cache": PAGES[:, :8], "block_table": TABLE}),
    "block_table dtype": (TypeError, "block_table", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE.long()}),
    "block_table past the pages": (ValueError, "block_table", {
        "k_cache": PAGES, "v_cache": PAGES, "block_table": TABLE + 4}),
    "num_splits": (ValueError, "num_splits", {"num_splits": 129}),
    "num_splits a float": (TypeError, "num_splits", {"num_splits": 1.5}),
    "cos without sin": (ValueError, "rotary_sin", {
        "rotary_cos": COS, "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary tables not tensors": (TypeError, "rotary_cos", {
        "rotary_cos": 1, "rotary_sin": 2, "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary without k": (ValueError, "rotary_cos", {"rotary_cos": COS, "rotary_sin": COS}),
    "rotary dtype": (TypeError, "rotary_cos", {
        "rotary_cos": COS.float(), "rotary_sin": COS.float(), "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary_dim 8": (ValueError, "rotary_cos", {
        "rotary_cos": COS[:, :4], "rotary_sin": COS[:, :4], "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary_dim above d": (ValueError, "rotary_cos", {
        "rotary_cos": zeros(64, 24), "rotary_sin": zeros(64, 24), "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary tables differ": (ValueError, "rotary_sin", {
        "rotary_cos": COS, "rotary_sin": COS[:9], "k": NEW, "v": NEW, "cache_seqlens": 3}),
    "rotary too short": (ValueError, "rotary_cos", {
        "rotary_cos": COS[:9], "rotary_sin": COS[:9], "k": NEW, "v": NEW, "cache_seqlens": 9}),
}  # fmt: skip


@pytest.mark.parametrize("case", KVCACHE)
def test_kvcache(case):
    kind, name, changes = KVCACHE[case]
    base = {"q": zeros(2, 3, 4, 32), "k_cache": CACHE, "v_cache": CACHE}
    raises(kind, name, flash_attn.flash_attn_with_kvcache, **(base | changes))


BACKWARD = {
    "dout": (ValueError, {"dout": Q[:, :3]}),
    "out": (TypeError, {"out": Q.float()}),
    "softmax_lse": (ValueError, {"softmax_lse": zeros(2, 4, 9, dtype=FP32)}),
    "dq": (ValueError, {"dq": K}),
    "dk": (TypeError, {"dk": K.float()}),
    "dv": (TypeError, {"dv": 3}),
    "rng_state": (TypeError, {"dropout_p": 0.1}),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    kind, changes = BACKWARD[name]
    base = {
        "dout": Q, "q": Q, "k": K, "v": K, "out": Q, "softmax_lse": zeros(2, 4, 10, dtype=FP32),
        "dq": Q.clone(), "dk": K.clone(), "dv": K.clone(), "dropout_p": 0.0, "softmax_scale": 1.0,
        "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "alibi_slopes": None, "deterministic": False,
    }  # fmt: skip
    raises(kind, name, _flash_attn_backward, **(base | changes))


def test_varlen_backward():
    q, k = zeros(10, 4, 32), zeros(12, 2, 32)
    lse = zeros(4, 10, dtype=FP32)
    tail = 0.0, 1.0, False, -1, -1, 0.0, None, False
    arguments = q, q, k, k, q, lse, q, k, k, int32(0, 10), int32(0, 12), 10, 12, *tail
    _flash_attn_varlen_backward(*arguments)
    raises(ValueError, "softmax_lse", _flash_attn_varlen_backward, *arguments[:5], lse[:, 1:], *arguments[6:])
    raises(
        ValueError, "cu_seqlens_q", _flash_attn_varlen_backward, *arguments[:9], int32(0, 11), *arguments[10:]
    )


@pytest.mark.parametrize("out, kind", [(Q.float(), TypeError), (Q[:1], ValueError), (3, TypeError)])
def test_given_out(out, kind):
    raises(kind, "out", flash_attn_gpu.fwd, Q, K, K, out, None, 0.0, 1.0, False, -1, -1, 0.0, False, None)


def cuda_like(dtype=BF16, requires_grad=False, device="cuda:0", shape=(2, 10, 4, 32)):
    """Return a tensor that says it is on CUDA, as far as the checks look."""
    return SimpleNamespace(
        dtype=dtype, is_cuda=True, device=torch.device(device), shape=torch.Size(shape),
        requires_grad=requires_grad,
    )  # fmt: skip


class TestCudaChecks:
    """Checks of tensors on CUDA, which this machine need not have."""

    @pytest.fixture(autouse=True)
    def accept_fakes(self, monkeypatch):
        monkeypatch.setattr(_validation, "Tensor", (torch.Tensor, SimpleNamespace))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, dtype):
        x = cuda_like(dtype)
        raises(TypeError, "q", _validation.check_qkv, x, x, x, 4, 4)

    @pytest.mark.parametrize("other", [Q, cuda_like(device="cuda:1")], ids=["cpu", "cuda:1"])
    def test_devices_mixed(self, other):
        q = cuda_like()
        raises(ValueError, "k", _validation.check_qkv, q, other, q, 4, 4)
        raises(ValueError, "v", _validation.check_qkv, q, q, other, 4, 4)

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_gradients_are_refused(self, name):
        from flash_attn import _autograd

        tensors = {n: cuda_like(requires_grad=n == name) for n in "qkv"}
        with pytest.raises(NotImplementedError, match=rf"^{name} requires grad.*CPU"):
            _autograd.gradient_needed(**tensors)
        with torch.no_grad():
            assert not _autograd.gradient_needed(**tensors)


@pytest.mark.gpu
class TestOnCuda:
    """What CUDA cannot do yet, and what it never can, on a real GPU."""

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, dtype):
        q, k = Q.to("cuda", dtype), K.to("cuda", dtype)
        raises(TypeError, "q", flash_attn.flash_attn_func, q, k, k)

    def test_gradient(self):
        q, k = Q.cuda().requires_grad_(), K.cuda()
        with pytest.raises(NotImplementedError, match=r"requires grad.*CPU"):
            flash_attn.flash_attn_func(q, k, k)

    def test_kvcache(self):
        with pytest.raises(NotImplementedError, match="CPU"):
            flash_attn.flash_attn_with_kvcache(Q.cuda(), CACHE.cuda(), CACHE.cuda())

    def test_pages(self):
        arguments = varlen_arguments(
            k=zeros(4, 16, 2, 32), v=zeros(4, 16, 2, 32), block_table=int32(0, 1)[:, None]
        )
        arguments = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        with pytest.raises(NotImplementedError, match="block_table"):
            flash_attn.flash_attn_varlen_func(**arguments)
