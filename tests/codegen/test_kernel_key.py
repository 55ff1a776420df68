import pytest

from codegen.kernel_key import KernelKey
from codegen.targets import full_selection
from codegen.units import list_units


def test_a_key_names_a_place_on_every_axis():
    key = KernelKey.parse("forward_sm80_bf16_d128_causal")
    assert key == KernelKey("forward", "sm80", "bf16", 128, "causal")


def test_the_key_of_every_unit_is_read_back():
    for unit in list_units(full_selection()):
        key = KernelKey.parse(unit.key)
        assert str(key) == unit.key
        assert key == KernelKey(unit.direction, unit.family, unit.dtype, unit.head_dim, unit.mask)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dispatch",
        "library",
        "forward_sm80_bf16_d128",
        "a_sm80_bf16_dx_full",
        "forward_sm80_bf16_d0128_full",
        "forward_sm80_bf16_d0_full",
    ],
)
def test_names_of_other_files(text):
    assert KernelKey.parse(text) is None
