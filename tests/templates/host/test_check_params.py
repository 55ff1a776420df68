"""What the C ABI says to parameters that no kernel may see: a status and a text, never a signal."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
from checker import CHECKS, Checker, compile_cpp, write_abi

from codegen import TEMPLATES
from flash_attn import _abi

INVALID = 4
SOME = 4096  # an address, which nobody looks at


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    return Checker(tmp_path_factory.mktemp("checks"))


FORWARD = {
    "q": SOME, "k": SOME, "v": SOME, "out": SOME, "softmax_lse": SOME, "total_q": 16, "total_k": 24,
    "batch": 2, "num_heads": 4, "num_heads_k": 2, "seqlen_q": 8, "seqlen_k": 12, "head_dim": 64,
    "head_dim_v": 72, "window_left": -1, "window_right": 0, "dtype": 1, "softmax_scale": 0.125,
    "dropout_rescale": 1.0,
}  # fmt: skip
BACKWARD = {
    "dout": SOME, "dq": SOME, "dk": SOME, "dv": SOME, "softmax_d": SOME, "softmax_lse_log2": SOME,
    "row_sums": SOME,
    "dq_accumulator": SOME, "key_partials": SOME, "rows": 128, "key_rows": 128, "key_parts": 2,
}  # fmt: skip
CACHE = {
    "block_table": SOME, "k_new": SOME, "v_new": SOME, "rotary_cos": SOME, "rotary_sin": SOME,
    "q_rotated": SOME, "out_partial": SOME, "lse_partial": SOME, "cache_entries": 9, "page_size": 16,
    "cache_seqlen": 3, "seqlen_new": 1, "rotary_rows": 5, "rotary_dim": 32, "num_splits": 3,
    "cache_head_dim": 63, "cache_head_dim_v": 72, "design": 1,
}  # fmt: skip
ROTARY = {
    "x": SOME, "out": SOME, "cos": SOME, "sin": SOME, "rows": 6, "batch": 2, "seqlen": 3, "num_heads": 4,
    "head_dim": 64, "rotary_dim": 32, "table_rows": 9,
}  # fmt: skip
DROPOUT = {"dropout_p": 0.5, "rng_state": SOME, "probs": SOME}
INT_MAX, NAN = 2**31 - 1, float("nan")
OF_CHOICE = {
    "dtype": (-1, 2), "head_dim": (-8, 0, 3, 60, 264), "head_dim_v": (0, 65, 512), "window_left": (-2,),
    "window_right": (-INT_MAX,),
}  # fmt: skip
OF_SIZES = OF_CHOICE | {
    "window_left": (-2, INT_MAX, INT_MAX - 8), "window_right": (-INT_MAX, INT_MAX, INT_MAX - 12),
    "batch": (-1,), "seqlen_q": (-1, INT_MAX), "seqlen_k": (-5, INT_MAX - 126), "total_q": (-1,),
    "total_k": (-1,), "num_heads_k": (0, -1), "num_heads": (-2, 3, 1),
}  # fmt: skip
OF_CALL = OF_SIZES | {
    "softmax_scale": (NAN, float("inf")),
    "softcap": (-1.0, NAN), "dropout_p": (-0.1, 1.0, NAN), "dropout_rescale": (0.0, 0.5, NAN, float("inf")),
}  # fmt: skip
NULLS = {
    "forward": ("q", "k", "v", "out"),
    "backward": ("q", "k", "v", "out", "softmax_lse", "dout", "softmax_d", "softmax_lse_log2", "row_sums",
                 "dq_accumulator", "key_partials", "dk", "dv"),
    "cache": ("q", "k", "v", "out", "block_table", "k_new", "v_new", "q_rotated", "out_partial",
              "lse_partial", "rotary_cos", "rotary_sin"),
    "rotary": ("x", "out", "cos", "sin"),
    "dropout_probs": ("q", "k", "softmax_lse", "rng_state", "probs"),
    "choice": (),
    "plan_backward": (),
    "plan_cache": (),
}  # fmt: skip
WRONG = {
    "forward": OF_CALL | {"num_heads": (0, *OF_CALL["num_heads"])},
    "backward": OF_CALL | {"rows": (0, 127, 130), "key_rows": (0, 64), "key_parts": (0, -1, 3)},
    "cache": OF_CALL | {
        "cache_entries": (-1,), "page_size": (-16, 8, 17), "cache_seqlen": (-1,), "seqlen_new": (-1, INT_MAX),
        "num_splits": (0, -1, 129), "rotary_rows": (-1,), "rotary_dim": (-16, 8, 24, 80),
        "cache_head_dim": (-1, 0, 56, 65), "cache_head_dim_v": (0, 64, 73), "design": (-1, 2),
        "dropout_p": (*OF_CALL["dropout_p"], 0.5), "seqlen_q": (*OF_CALL["seqlen_q"], 2**30),
    },
    "rotary": {
        "dtype": (2,), "rows": (-1,), "batch": (-1,), "seqlen": (-1,), "table_rows": (-1,),
        "num_heads": (0, -1), "head_dim": (0, 3, -8), "rotary_dim": (0, -16, 8, 96),
    },
    "dropout_probs": OF_CALL,
    "choice": OF_CHOICE,
    "plan_backward": OF_SIZES | {"num_heads": (0, *OF_SIZES["num_heads"])},
    "plan_cache": OF_SIZES | {"num_splits": (-1, 129)},
}  # fmt: skip


def make(operation, **changes):
    """Return right parameters of an operation, but for `changes`."""
    of_forward = FORWARD | (DROPOUT if operation == "dropout_probs" else {})
    more = {"backward": BACKWARD, "cache": CACHE}.get(operation.removeprefix("plan_"))
    if operation == "rotary":
        return _abi.RotaryParams(**(ROTARY | changes))
    own = set(more or ())
    forward = _abi.ForwardParams(**(of_forward | {k: v for k, v in changes.items() if k not in own}))
    if more is None:
        return forward
    return getattr(_abi, CHECKS[operation])(
        forward, **(more | {k: v for k, v in changes.items() if k in own})
    )


@pytest.mark.parametrize("operation", CHECKS)
def test_right_parameters_pass(checker, operation):
    assert checker.check(operation, make(operation)) == (0, "")


@pytest.mark.parametrize("operation", CHECKS)
def test_a_null_struct(checker, operation):
    text = f"flash_attn_{operation}: params must not be null here"
    assert checker.check(operation, None) == (INVALID, text)


@pytest.mark.parametrize("operation", CHECKS)
def test_a_struct_of_zeros(checker, operation):
    status, text = checker.check(operation, bytes(ctypes.sizeof(getattr(_abi, CHECKS[operation]))))
    assert status == INVALID and text.startswith(f"flash_attn_{operation}: ")


@pytest.mark.parametrize(
    "operation, field, value",
    [
        (o, field, value)
        for o, fields in WRONG.items()
        for field, values in fields.items()
        for value in values
    ],
)
def test_a_wrong_value_is_named(checker, operation, field, value):
    status, text = checker.check(operation, make(operation, **{field: value}))
    assert status == INVALID
    got = f"{value:g}" if isinstance(value, float) else str(value)
    assert text.startswith(f"flash_attn_{operation}: {field} must be ") and text.endswith(f" got {got}"), text


@pytest.mark.parametrize("operation, field", [(o, field) for o, fields in NULLS.items() for field in fields])
def test_a_null_pointer_is_named(checker, operation, field):
    status, text = checker.check(operation, make(operation, **{field: None}))
    assert status == INVALID and field in text and "must" in text, text


@pytest.mark.parametrize("field", ["cu_seqlens_q", "cu_seqlens_k"])
def test_packed_sequences_have_both_bounds(checker, field):
    for operation in ("forward", "backward", "dropout_probs"):
        assert checker.check(operation, make(operation, **{field: SOME}))[0] == INVALID
    both = {"cu_seqlens_q": SOME, "cu_seqlens_k": SOME}
    assert checker.check("backward", make("backward", **both)) == (0, "")
    assert checker.check("backward", make("backward", **both, total_k=129))[0] == INVALID


def test_dropout_needs_its_state(checker):
    for operation in ("forward", "backward"):
        status, text = checker.check(operation, make(operation, dropout_p=0.25))
        assert status == INVALID and "rng_state" in text


NOTHING = {"batch": 0, "total_q": 0, "total_k": 0}


def nulls(fields):
    """Return None for each field that is an address."""
    return {name: None for name, value in fields.items() if value == SOME}


@pytest.mark.parametrize(
    "operation, changes",
    [
        ("forward", {"q": None, "k": None, "v": None, "out": None, **NOTHING}),
        ("forward", {"k": None, "v": None, "seqlen_k": 0, "total_k": 0}),
        ("forward", {"softmax_lse": None}),
        ("backward", {"q": None, "out": None, "dout": None, "seqlen_q": 0, "total_q": 0}),
        ("backward", {"dq": None, "dq_accumulator": None}),
        ("backward", {"dk": None, "dv": None, "key_partials": None}),
        ("backward", {"key_parts": 1, "key_partials": None, "key_rows": 0}),
        ("cache", {"q": None, "out": None, "q_rotated": None, "out_partial": None, "lse_partial": None,
                   "seqlen_q": 0, "total_q": 0}),
        ("cache", {"k": None, "v": None, "cache_entries": 0}),
        ("cache", {"num_splits": 1, "out_partial": None, "lse_partial": None}),
        ("cache", {"page_size": 0, "block_table": None}),
        ("cache", {"block_table": None, "seqlen_k": 0}),
        ("cache", {"seqlen_new": 0, "k_new": None, "v_new": None}),
        ("cache", {"rotary_cos": None, "rotary_sin": None, "q_rotated": None, "rotary_dim": 0}),
        ("cache", {"num_heads": 0, "q": None, "out": None}),
        ("plan_backward", {"key_parts": 0, "rows": 0, **nulls(FORWARD | BACKWARD)}),
        ("plan_cache", {"num_splits": 0, "design": 7, **nulls(FORWARD | CACHE)}),
        ("rotary", {"x": None, "out": None, "rows": 0}),
        ("rotary", {"cos": None, "sin": None, "table_rows": 0}),
        ("rotary", {"rotary_dim": 8, "interleaved": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_read_may_be_null(checker, operation, changes):
    assert checker.check(operation, make(operation, **changes)) == (0, "")


CUDA_STUB = """
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorAssert, cudaErrorHardwareStackError,
  cudaErrorIllegalAddress, cudaErrorIllegalInstruction, cudaErrorInvalidAddressSpace, cudaErrorInvalidPc,
  cudaErrorLaunchFailure, cudaErrorLaunchTimeout, cudaErrorMisalignedAddress };
static int forgotten = 0;
static cudaError_t cudaGetLastError() { ++forgotten; return cudaSuccess; }
static const char* cudaGetErrorString(cudaError_t) { return "device-side assert triggered"; }
static const char* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
"""
CUDA_ERRORS = """
#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include "host/check_cuda.h"
flash_attn::Status flash_attn::fail(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::puts("");
  return status;
}
int main() {
  for (cudaError_t code : {cudaSuccess, cudaErrorInvalidValue, cudaErrorAssert}) {
    flash_attn::check_cuda(code, "cudaLaunchKernel", "forward_kernel");
  }
  std::printf("%d\\n", forgotten);
}
"""


def test_an_error_of_an_earlier_kernel_is_told_as_such(tmp_path):
    """The assertion of another kernel comes back from our launch; an invalid value is ours. Neither stays."""
    write_abi(tmp_path)
    (tmp_path / "cuda_runtime.h").write_text(CUDA_STUB)
    (tmp_path / "program.cpp").write_text(CUDA_ERRORS)
    compile_cpp(tmp_path / "program.cpp", tmp_path / "program", f"-I{TEMPLATES}", f"-I{tmp_path}")
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True)
    ours, late, forgotten = done.stdout.splitlines()
    told = "cudaLaunchKernel failed for forward_kernel: device-side assert triggered (cudaErrorName)"
    assert ours == told
    assert late.startswith(told) and "an earlier one may have failed" in late
    assert "CUDA_LAUNCH_BLOCKING=1" in late
    assert forgotten == "2"
