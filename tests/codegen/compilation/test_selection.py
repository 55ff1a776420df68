import ctypes

import pytest

from codegen import axes
from codegen.compilation import selection
from codegen.compilation.selection import SelectionError, from_environment
from codegen.targets import Target


def targets(value, gpus=()):
    return [str(t) for t in from_environment({"FLASH_ATTN_ARCHS": value}, lambda: list(gpus)).targets]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("80", ["sm80:80"]),
        ("80;90", ["sm80:80", "sm90:90"]),
        ("90, 80 86", ["sm80:80", "sm86:86", "sm90:90"]),
        ("89", ["sm86:89"]),
        ("100 110 120+ptx", ["sm80:100", "sm80:110", "sm86:120+ptx"]),
        ("sm86:90", ["sm86:90"]),
        ("sm86:90+ptx;sm80:90", ["sm80:90", "sm86:90+ptx"]),
        ("80;80+ptx;80", ["sm80:80+ptx"]),
        ("SM80:80+PTX", ["sm80:80+ptx"]),
        ("none", []),
        ("all", ["sm80:80", "sm80:100", "sm80:110", "sm86:86", "sm86:89", "sm86:120", "sm90:90"]),
    ],
)
def test_archs(value, expected):
    assert targets(value) == expected


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([90, 90], ["sm90:90"]),
        ([80, 89], ["sm80:80", "sm86:89"]),
        ([87], []),
        ([103], ["sm80:100"]),
        ([121], ["sm86:120"]),
        ([], []),
        ([70, 75], []),
    ],
)
def test_native(gpus, expected):
    assert targets("native", gpus) == targets("", gpus) == expected


def test_native_says_why_there_are_no_kernels():
    assert from_environment({}, list).summary.startswith("no GPU found (FLASH_ATTN_ARCHS=80;90")
    skipped = from_environment({}, lambda: [75]).summary
    assert (
        skipped == "the GPU of compute capability 7.5 has no kernels: skipped; no kernels, CPU backend only"
    )
    assert from_environment({}, lambda: [90]).summary == "kernels for sm90:90"


def test_native_is_detected_only_when_asked_for():
    def detect():
        raise AssertionError("detected")

    assert from_environment({"FLASH_ATTN_ARCHS": "80"}, detect).families == ("sm80",)


@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    """A machine without libcuda, and with no program on PATH but what the test puts into its folder."""

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    selection.detect_gpus.cache_clear()
    yield
    selection.detect_gpus.cache_clear()


def test_detection_without_a_gpu_finds_none(no_driver):
    assert selection.detect_gpus() == []


def test_detection_falls_back_to_nvidia_smi(no_driver, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n12.0\\n[N/A]\\n'\n")
    smi.chmod(0o755)
    assert selection.detect_gpus() == [90, 120]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("81", "unknown value '81'; known: all, native, none (each alone), or a list of 75, 80, 86, 89"),
        ("8.0", "unknown value '8.0'"),
        ("80+sass", "unknown value '80+sass'"),
        ("all;80", "unknown value 'all'"),
        ("sm70:80", "unknown family in 'sm70:80'; known: sm75, sm80, sm86, sm90"),
        (
            "75",
            "75 belongs to family sm75, which has no kernels yet (families with kernels: sm80, sm86, sm90)",
        ),
        ("90+ptx", "90+ptx: kernels of family sm90 run on no other GPU than their own: allowed is sm90:90"),
        ("sm90:80", "sm90:80: kernels of family sm90 run on no other GPU than their own"),
    ],
)
def test_wrong_archs(value, words):
    with pytest.raises(SelectionError) as error:
        targets(value)
    assert words in str(error.value)
    assert str(error.value).startswith("FLASH_ATTN_ARCHS: ")


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("FLASH_ATTN_HEAD_DIMS", "64;80", "unknown value '80'; known: 32, 64, 96, 128, 192, 256"),
        ("FLASH_ATTN_DTYPES", "fp8", "unknown value 'fp8'; known: fp16, bf16"),
        ("FLASH_ATTN_DIRECTIONS", "sideways", "unknown value 'sideways'; known: forward, backward, split"),
    ],
)
def test_wrong_axis_values(name, value, known):
    with pytest.raises(SelectionError) as error:
        from_environment({"FLASH_ATTN_ARCHS": "80", name: value})
    assert str(error.value) == f"{name}: {known}"


def test_unknown_variable_names_are_errors_that_list_the_known_ones():
    with pytest.raises(SelectionError) as error:
        from_environment({"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEADDIMS": "64"})
    text = str(error.value)
    assert "FLASH_ATTN_HEADDIMS" in text
    assert all(name in text for name in selection.VARIABLES)


def test_known_variables_that_do_not_select_are_accepted():
    names = ("FLASH_ATTN_FORCE_BUILD", "FLASH_ATTN_WHEEL_INDEX", "FLASH_ATTN_FORCE_FAMILY")
    assert from_environment({"FLASH_ATTN_ARCHS": "none", **dict.fromkeys(names, "1")}).targets == ()


def test_both_names_of_the_archs_variable():
    assert from_environment({"FLASH_ATTN_CUDA_ARCHS": "90"}).targets == (Target("sm90", 90),)
    both = {"FLASH_ATTN_ARCHS": "80;90", "FLASH_ATTN_CUDA_ARCHS": "80, 90"}
    assert len(from_environment(both).targets) == 2
    with pytest.raises(SelectionError, match="disagree"):
        from_environment({"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_CUDA_ARCHS": "90"})


def test_axis_lists_keep_the_axis_order_and_default_to_all():
    chosen = from_environment(
        {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEAD_DIMS": "128 64;128", "FLASH_ATTN_DTYPES": " "}
    )
    assert chosen.head_dims == (64, 128)
    assert chosen.dtypes == axes.DTYPES
    assert chosen.directions == axes.DIRECTIONS
