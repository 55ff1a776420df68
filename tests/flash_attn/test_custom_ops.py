"""The custom ops and torch.compile: schemas, fake outputs, whole graphs with gradients."""

from __future__ import annotations

import pytest
import torch
from problems import BF16, cu_seqlens, qkv

import flash_attn
from flash_attn import flash_attn_interface as interface

pytestmark = pytest.mark.not_simulated
SCORES = (0.1, True, -1, -1, 0.0, None)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Functions of one name in several tests count as one that is compiled again and again."""
    torch._dynamo.reset()


def dtype_of(device):
    """What the compiler sees is the same in fp32, which the CPU is faster in."""
    return BF16 if device == "cuda" else torch.float32


def make(device, seqlen_q, seqlen_k, head_dims=32):
    return list(qkv(2, seqlen_q, seqlen_k, (4, 2), head_dims, dtype_of(device), device))


def op_cases(device, head_dims):
    q, k, v = make(device, 10, 12, head_dims)
    fixed = (q, k, v, 0.0, *SCORES)
    out, lse, _, rng_state = interface._flash_attn_forward(*fixed, False)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    yield "_flash_attn_forward", (*fixed, False)
    yield "_flash_attn_forward", (q, k, v, 0.3, *SCORES, True)
    tail = 0.0, *SCORES, True, rng_state
    yield "_flash_attn_backward", (out, q, k, v, out, lse, *grads, *tail)
    yield "_flash_attn_backward", (out, q, k, v, out, lse, None, *grads[1:], *tail)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = (cu_seqlens([10, 10], device), cu_seqlens([12, 12], device), 10, 12)
    out, lse, _, rng_state = interface._flash_attn_varlen_forward(*packed, *lengths, 0.0, *SCORES)
    grads = [torch.zeros_like(x) for x in packed]
    yield "_flash_attn_varlen_forward", (*packed, *lengths, 0.0, *SCORES)
    yield "_flash_attn_varlen_forward", (*packed, *lengths, 0.3, *SCORES, True)
    tail = *lengths, 0.0, *SCORES, True, rng_state
    yield "_flash_attn_varlen_backward", (out, *packed, out, lse, *grads, *tail)
    yield "_flash_attn_varlen_backward", (out, *packed, out, lse, grads[0], None, None, *tail)


CASES = pytest.mark.parametrize("case", range(8))
HEAD_DIMS = pytest.mark.parametrize("head_dims", [(32, 32), (32, 24)], ids=str)


@pytest.fixture
def op_case(device, require_backward, case, head_dims):
    """Name and arguments of a call."""
    require_backward(device, BF16, *head_dims)
    return list(op_cases(device, head_dims))[case]


@CASES
@HEAD_DIMS
def test_opcheck(op_case):
    name, arguments = op_case
    wrapped = getattr(interface, f"_wrapped{name}")
    drops = any(type(x) is float and x == 0.3 for x in arguments)
    checks = ["test_schema", *([] if drops else ["test_faketensor"])]
    if "backward" in name:  # the forward's rng_state is unset without dropout: no two calls are equal
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(wrapped.default, arguments, test_utils=checks)


@CASES
@HEAD_DIMS
def test_fake_outputs_match(op_case):
    name, arguments = op_case
    wrapped = getattr(interface, f"_wrapped{name}")
    real = wrapped(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = wrapped(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for r, f in pairs:
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def check_compiled(function, compiled, inputs, **tolerance):
    """Compare outputs and gradients of the inputs that need some, bit for bit if no tolerance is given."""
    leaves = [x for x in inputs if x.requires_grad]
    results = []
    for run in (compiled, function):
        out = run(*inputs)
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        results.append([out, *(torch.autograd.grad(out, leaves, dout) if leaves else ())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"atol": 0.0, "rtol": 0.0}))
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), results[1][0])


@pytest.mark.parametrize(
    "head_dims, needs, dynamic",
    [
        ((32, 32), (True, True, True), False),
        ((40, 24), (True, True, True), True),
        ((32, 32), (True, False, False), True),
        ((32, 32), (False, True, False), False),
    ],
    ids=str,
)
def test_compile(device, require_backward, head_dims, needs, dynamic):
    require_backward(device, BF16, *head_dims)

    def function(q, k, v):
        return flash_attn.flash_attn_func(q * 2, k, v, causal=True, deterministic=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for lengths in ((10, 12), (17, 30)) if dynamic else ((10, 12),):
        inputs = make(device, *lengths, head_dims)
        check_compiled(
            function, compiled, [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_varlen(device, require_backward, dynamic):
    require_backward(device, BF16, 32)

    def function(q, k, v, cu_q, cu_k):
        return flash_attn.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 40, 50, window_size=(3, 0), deterministic=True
        )

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen_q, seqlen_k in ((10, 12), (17, 30)) if dynamic else ((10, 12),):
        tensors = [x.flatten(0, 1).requires_grad_() for x in make(device, seqlen_q, seqlen_k)]
        ends = [cu_seqlens([n, n], device) for n in (seqlen_q, seqlen_k)]
        check_compiled(function, compiled, [*tensors, *ends])


def test_a_tensor_may_be_given_twice(device, require_backward):
    require_backward(device, BF16, 32)

    def function(x, cu):
        flat = x.flatten(0, 1)
        varlen = flash_attn.flash_attn_varlen_func(flat, flat, flat, cu, cu, 9, 9, deterministic=True)
        return varlen + flash_attn.flash_attn_func(x, x, x, deterministic=True).flatten(0, 1)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = make(device, 9, 9)[0].requires_grad_()
    tolerance = 0.05 if device == "cuda" else 1e-5  # autograd adds six gradients of x up in some order
    check_compiled(function, compiled, [x, cu_seqlens([9, 9], device)], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim, dynamic", [(32, False), (17, True)])
def test_compile_packed(device, require_backward, head_dim, dynamic):
    require_backward(device, BF16, head_dim)

    def function(qkv, q, kv, cu):
        fixed = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True)
        varlen = flash_attn.flash_attn_varlen_qkvpacked_func(qkv[0], cu, 40, deterministic=True)
        cross = flash_attn.flash_attn_kvpacked_func(q, kv, deterministic=True)
        return torch.cat((fixed.flatten(0, 1), varlen, cross.flatten(0, 1)))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen in (8, 13) if dynamic else (8,):
        qkv = torch.randn(2, seqlen, 3, 2, head_dim, device=device).to(dtype_of(device)).requires_grad_()
        q, kv = (x.detach().requires_grad_() for x in (qkv[:, :5, 0], qkv[:, :, 1:]))
        check_compiled(function, compiled, [qkv, q, kv, cu_seqlens([3, seqlen - 3], device)])


def test_compiled_dropout_draws_a_mask_and_uses_it_again(device, require_backward):
    """Where the gradient of the output is that of v's sum, dv is the sum of what was kept."""
    require_backward(device, BF16, 32)
    q, k, v = (x.requires_grad_() for x in make(device, 64, 64))
    compiled = torch.compile(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, dropout_p=0.5),
        backend="aot_eager",
        fullgraph=True,
    )
    outs = [compiled(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs)
    for out in outs:
        (dv,) = torch.autograd.grad(out.float().square().sum() / 2, v)
        kept = (out.double().square()).sum()  # <out, out> = <P v, out> = <v, P^T out>
        torch.testing.assert_close((dv.double() * v.double()).sum(), kept, atol=0.0, rtol=0.02)


@pytest.mark.parametrize("shape, dtype", [((2, 10, 4, 24), torch.float32), ((2, 10, 4, 32), torch.float64)])
def test_out_is_checked_where_a_mode_sees_the_op(shape, dtype):
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Seen(), pytest.raises((TypeError, ValueError), match=r"^out must be"):
        flash_attn.flash_attn_func(*make("cpu", 10, 12), out=torch.empty(shape, dtype=dtype))
