import hashlib

import pytest

from ci import CiError, wheel


def test_a_wheel_is_what_its_name_says(make_wheel):
    made = make_wheel(platform="manylinux_2_17_aarch64.manylinux2014_aarch64")
    assert (made.version, made.build, made.arch) == ("2.8.3", "130", "aarch64")
    assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
    assert made.requires_python == ">=3.10"
    assert made.manifest["nvcc"] == "13.0.88"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch-2.13.0-cp311-cp311-linux_x86_64.whl", "not a wheel of flash-attn"),
        ("flash_attn-2.8.3-cp311-cp311-linux_x86_64.whl", "not a wheel of flash-attn"),
        ("flash_attn-2.8.3-130-py3-none-win_amd64.whl", "platform 'win_amd64' is not one of linux"),
        ("flash_attn-2.8.3-130-py3-none-linux_x86_64.linux_aarch64.whl", "is not one of linux"),
        ("flash_attn-2.8.3-130-py3-none-linux_x86_64.whl", "cannot be read"),
    ],
)
def test_other_wheels_are_refused(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"not a zip file")
    with pytest.raises(CiError, match=words):
        wheel.open_wheel(tmp_path / name)


def test_a_name_that_lies_is_refused(make_wheel):
    with pytest.raises(CiError, match="disagrees with its name"):
        wheel.open_wheel(make_wheel(build="130", written_build="129"))


def test_a_truncated_wheel_is_refused(make_wheel):
    made = make_wheel(library=b"x" * 10000)
    made.path.write_bytes(made.path.read_bytes()[:-200])
    with pytest.raises(CiError, match="cannot be read"):
        wheel.open_wheel(made.path)


def test_folders(make_wheel, tmp_path):
    with pytest.raises(CiError, match="no such folder"):
        wheel.open_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CiError, match="holds no wheel"):
        wheel.open_folder(tmp_path / "empty")
    make_wheel("129"), make_wheel("130"), make_wheel("130", "manylinux_2_28_aarch64")
    assert len(wheel.open_folder(tmp_path / "wheels")) == 3
    make_wheel("130", "linux_x86_64")
    with pytest.raises(CiError, match="two wheels for build 130 on x86_64"):
        wheel.open_folder(tmp_path / "wheels")
