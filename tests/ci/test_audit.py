import shutil
import subprocess
from dataclasses import replace

import pytest

from ci import CiError, audit
from ci.__main__ import main

A, B, C = (f"forward_sm80_bf16_d{head_dim}_full" for head_dim in (64, 96, 128))


@pytest.fixture
def facts(exported):
    return audit.Facts(
        platform="manylinux_2_28_x86_64",
        build="130",
        size=1000,
        nvcc="13.0.88",
        exported=exported,
        needed=frozenset({"libc.so.6", "libstdc++.so.6", "ld-linux-x86-64.so.2"}),
        glibc=(2, 28),
        manifest_kernels=(A, B),
        library_kernels=(B, A),
    )


def test_a_good_wheel(facts):
    assert audit.problems(facts) == []
    assert audit.problems(facts, "manylinux_2_28") == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"build": ""}, "its name has no build tag"),
        ({"nvcc": "12.9.86"}, "its build tag is 130, but nvcc 12.9.86 built it"),
        ({"glibc": (2, 34)}, "its tag promises glibc 2.28, but its library needs 2.34"),
        ({"platform": "linux_x86_64"}, "its platform linux_x86_64 is not within manylinux_2_28"),
        ({"platform": "manylinux_2_34_x86_64"}, "is not within manylinux_2_28"),
        (
            {"exported": frozenset({"flash_attn_forward"})},
            "its library lacks flash_attn_backward, flash_attn_backward_kernel",
        ),
        ({"needed": frozenset({"libcudart.so.13", "libc.so.6"})}, "its library needs libcudart.so.13"),
        ({"size": 100_000_001}, "its size of 100.0 MB is above 100 MB"),
        ({"library_kernels": (A,)}, f"its library lacks kernels of the manifest: {B}"),
        ({"library_kernels": (A, B, C)}, f"its manifest lacks kernels of the library: {C}"),
        ({"library_targets": ("sm80:80",)}, "its manifest lacks targets of the library: sm80:80"),
        (
            {"device_kernels": frozenset({f"{C} sm_80"})},
            f"its manifest lacks device code of the library: {C} sm_80",
        ),
    ],
)
def test_what_is_wrong_is_said(facts, fields, words):
    found = audit.problems(replace(facts, **fields), "manylinux_2_28")
    assert len(found) == 1
    assert words in found[0]


def test_foreign_symbols(facts):
    names = {f"_ZN5other{i}Ev" for i in range(5)}
    found = audit.problems(replace(facts, exported=facts.exported | names))
    assert found == ["its library exports _ZN5other0Ev, _ZN5other1Ev, _ZN5other2Ev and 2 more"]


def test_several_tags_promise_the_oldest(facts):
    tags = "manylinux_2_17_x86_64.manylinux_2_28_x86_64"
    assert "promises glibc 2.17" in audit.problems(replace(facts, platform=tags))[0]


def test_a_policy_that_is_none(facts):
    with pytest.raises(CiError, match="policy 'new'"):
        audit.problems(facts, "new")


SOURCE = """
#include <stdint.h>
int32_t flash_attn_kernel_count(void) { return 2; }
const char* flash_attn_kernel_key(int32_t i) { return i ? "%s" : "forward_sm80_bf16_d128_full"; }
const char* flash_attn_targets(void) { return "sm80:80"; }
"""


@pytest.fixture
def library_with(exported, tmp_path, cuobjdump):
    """Compiles a library that names two kernels, of which the second is given.

    It has no device code; what stands in for cuobjdump finds that of the wheel's manifest.
    """
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    configs = "23ForwardSm80Bf16D128Full", "25ForwardSm80Bf16D128Causal"
    cuobjdump("; ".join(["echo arch = sm_80", *(f"echo x ENTRY {config}" for config in configs)]))

    def make(second):
        others = exported - {"flash_attn_kernel_count", "flash_attn_kernel_key", "flash_attn_targets"}
        text = SOURCE % second + "".join(f"void {name}(void) {{}}\n" for name in others)
        (tmp_path / "library.c").write_text(text)
        library = tmp_path / "library.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "library.c"], check=True)
        return library.read_bytes()

    return make


def test_a_manifest_that_agrees_with_its_library(make_wheel, library_with):
    wheel = make_wheel(library=library_with("forward_sm80_bf16_d128_causal"))
    facts = audit.audit(wheel)
    assert len(facts.library_kernels) == len(facts.device_kernels) == 2


def test_a_manifest_that_disagrees_with_its_library(make_wheel, library_with, capsys):
    wheel = make_wheel(library=library_with("forward_sm80_bf16_d64_full"))
    assert main(["audit", str(wheel.path)]) == 2
    out, err = capsys.readouterr()
    assert "lacks kernels of the manifest: forward_sm80_bf16_d128_causal; " in err
    assert "lacks kernels of the library: forward_sm80_bf16_d64_full" in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_library_that_is_none(make_wheel):
    with pytest.raises(CiError, match="cannot be loaded here"):
        audit.audit(make_wheel(library=b"no library"))
