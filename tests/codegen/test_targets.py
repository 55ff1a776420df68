import pytest

from codegen.compilation.selection import from_environment
from codegen.targets import Target, full_selection


@pytest.mark.parametrize("target", [Target("sm80", 80), Target("sm86", 90, ptx=True)])
def test_a_target_is_read_from_its_text(target):
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["", "sm80", "80", "sm80:x", "sm80:80:90", "sm80:80+sass"])
def test_a_text_that_is_no_target(text):
    assert Target.parse(text) is None


def test_arch_is_the_item_that_selects_a_target():
    for item in ("80", "90", "100+ptx", "sm86:90", "sm80:86+ptx"):
        (target,) = from_environment({"FLASH_ATTN_ARCHS": item}).targets
        assert target.arch == item


def test_slug_is_stable_and_tells_selections_apart():
    def slug(**variables):
        return from_environment({f"FLASH_ATTN_{name}": value for name, value in variables.items()}).slug

    assert slug(ARCHS="100;80") == slug(ARCHS="80 100") == "sm80.80.100"
    assert slug(ARCHS="80", HEAD_DIMS="128", DTYPES="bf16") == "sm80.80-d128-bf16"
    assert slug(ARCHS="86+ptx;sm80:90") == "sm80.90-sm86.86ptx"
    assert slug(ARCHS="none") == "none"


def test_full_selection_is_all():
    assert from_environment({"FLASH_ATTN_ARCHS": "all"}) == full_selection()
