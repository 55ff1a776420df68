import pytest

from codegen import CodegenError
from codegen.wheels.name import WheelName


def test_a_name_is_taken_apart():
    parsed = WheelName.parse("flash_attn-2.8.3-130-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl")
    assert (parsed.version, parsed.build, parsed.cuda) == ("2.8.3", "130", (13, 0))
    assert parsed.platforms == ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
    assert parsed.tags == {"py3-none-manylinux_2_27_x86_64", "py3-none-manylinux_2_28_x86_64"}
    assert parsed.dist_info == "flash_attn-2.8.3.dist-info"


def test_a_version_stays_as_it_is_written():
    parsed = WheelName.parse("flash_attn-02.8.3-130-py3-none-linux_x86_64.whl")
    assert (parsed.version, parsed.dist_info) == ("02.8.3", "flash_attn-02.8.3.dist-info")


@pytest.mark.parametrize("build", ["", "-1", "-13", "-130a", "-1300", "-013"])
def test_a_build_tag_that_names_no_cuda(build):
    parsed = WheelName.parse(f"flash_attn-2.8.3{build}-py3-none-linux_x86_64.whl")
    assert (parsed.build, parsed.cuda) == (build.removeprefix("-"), None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash_attn-2.8.3.tar.gz", "not the name of a wheel"),
        ("flash_attn-2.8.3.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-b1-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("../flash_attn-2.8.3-130-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("flash_attn-2.8.x-130-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-130-a-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-1.0-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-1٣-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-py3-none-linux x86.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-py3-none-linux_x86_64@evil.whl", "not the name of a wheel"),
        ("flash_attn-2.8.3-py3-none-linux_x86_64..whl", "not the name of a wheel"),
        ("flash_attn- 2.8.3-py3-none-linux_x86_64.whl", "not the name of a wheel"),
        ("Flash.Attn-2.8.3-py3-none-linux_x86_64.whl", "another project"),
        ("torch-2.8.3-130-py3-none-linux_x86_64.whl", "another project"),
        ("flash_attn-2.8.3-130-cp311-cp311-linux_x86_64.whl", "for cp311-cp311, not py3-none"),
    ],
)
def test_names_that_are_none_of_ours(name, words):
    with pytest.raises(CodegenError, match=words):
        WheelName.parse(name)
