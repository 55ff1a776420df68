import itertools

import pytest
from packaging.tags import platform_tags

from codegen import CodegenError
from codegen.wheels import prebuilt
from codegen.wheels.index import Listed, WheelError

PLATFORM = list(platform_tags())[-1]


@pytest.mark.parametrize("page", ["index.html", "index.json"])
@pytest.mark.parametrize("at", ["simple/flash-attn", "flash-attn"])
def test_a_wheel_of_a_folder_is_taken(find, one_wheel, wheel_folder, tmp_path, page, at, capsys):
    name, files = one_wheel()
    wheel = find(wheel_folder(files, page, at))
    assert prebuilt.place(wheel, tmp_path / "out") == name
    assert (tmp_path / "out" / name).read_bytes() == files[name]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert f"taking the prebuilt wheel {name} of {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("present", "expected"),
    [(None, 120), ((12, 0), 120), ((12, 4), 129), ((12, 9), 129), ((13, 0), 132), ((14, 1), 132)],
)
def test_the_newest_cuda_of_the_driver_or_else_the_oldest(find, wheels, wheel_folder, present, expected):
    names = [wheels.name(cuda, PLATFORM) for cuda in (130, 120, 132, 129)]
    wheel = find(wheel_folder({name: wheels.content(name) for name in names}), present)
    assert wheel.name == wheels.name(expected, PLATFORM)


def test_a_driver_that_is_too_old(find, one_wheel, wheel_folder, capsys):
    _, files = one_wheel()
    assert find(wheel_folder(files), (12, 9)) is None
    out = capsys.readouterr().out
    assert "CUDA 12.9 of the driver" in out and "needs driver 580 (CUDA 13.0) or newer" in out


def listed(name, sha256="0" * 64, folder="one"):
    return Listed(name, f"https://wheels.example/{folder}/{name}", sha256)


def test_the_platform_that_fits_best(wheels):
    names = [wheels.name(130, platform) for platform in ("p3", "p1.p9", "p2")]
    for order in itertools.permutations(names):
        chosen, refused = prebuilt.choose(map(listed, order), ["p1", "p2", "p3"], None)
        assert [c.file.name for c in chosen] == [names[1], names[2], names[0]] and not refused


def test_two_wheels_for_one_key(wheels):
    name = wheels.name(130, "p1")
    assert len(prebuilt.choose([listed(name), listed(name, folder="two")], ["p1"], None)[0]) == 1
    for other in (listed(name, "1" * 64), listed(wheels.name(130, "p1.p2"))):
        with pytest.raises(WheelError, match="two wheels for one CUDA and platform"):
            prebuilt.choose([listed(name), other], ["p1", "p2"], None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash_attn-2.8.2-130-py3-none-p1.whl", "version 2.8.2"),
        ("flash_attn_3-2.8.3-130-py3-none-p1.whl", "another project"),
        ("flash_attn-2.8.3-130-py3-none-p2.whl", "another platform"),
        ("flash_attn-2.8.3-130-cp311-cp311-p1.whl", "for cp311-cp311, not py3-none"),
        ("flash_attn-2.8.3-py3-none-p1.whl", "no build tag"),
        ("flash_attn-2.8.3-130a-py3-none-p1.whl", "no build tag"),
        ("flash_attn-2.8.3-1-py3-none-p1.whl", "no build tag"),
        ("flash_attn-2.8.3.whl", "not the name of a wheel"),
    ],
)
def test_what_is_not_for_this_machine(name, words):
    chosen, refused = prebuilt.choose([listed(name), listed("flash_attn-2.8.3.tar.gz")], ["p1"], None)
    assert not chosen
    assert len(refused) == 1 and words in refused[0]


def test_no_match_says_what_was_looked_for_and_where(find, wheels, wheel_folder, capsys):
    names = [wheels.name(100 + i, "solaris_2_11_sparc") for i in range(12)]
    folder = wheel_folder({name: wheels.content(name) for name in names})
    assert find(folder, (13, 0), ARCHS="90") is None
    out = capsys.readouterr().out
    for words in (str(folder), "flash-attn 2.8.3", "CUDA 13.0", "sm90:90", names[0], "and 4 more"):
        assert words in out


@pytest.mark.parametrize(
    ("variables", "gpus", "missing"),
    [
        ({}, (), ""),
        ({}, (80,), ""),
        ({}, (89, 86), ""),
        ({}, (120,), "sm86:120"),
        ({"ARCHS": "80;90"}, (), ""),
        ({"ARCHS": "100+ptx"}, (), ""),
        ({"ARCHS": "80+ptx"}, (), r"sm80:80\+ptx"),
        ({"ARCHS": "sm86:90"}, (), "sm86:90"),
        ({"ARCHS": "80", "HEAD_DIMS": "64", "DTYPES": "bf16", "DIRECTIONS": "forward"}, (), ""),
        ({"ARCHS": "80", "HEAD_DIMS": "64;256"}, (), "256"),
        ({"DTYPES": "fp16;bf16"}, (), "fp16"),
    ],
)
def test_kernels_that_were_asked_for_must_be_there(
    find, one_wheel, wheel_folder, capsys, variables, gpus, missing
):
    _, files = one_wheel()
    found = find(wheel_folder(files), gpus=gpus, **variables)
    assert (found is None) == bool(missing)
    if missing:
        assert f"no kernels for {missing}".replace("\\", "") in capsys.readouterr().out


def test_an_older_cuda_is_taken_if_only_that_has_the_kernels(find, wheels, wheel_folder):
    names = [wheels.name(cuda, PLATFORM) for cuda in (129, 130)]
    trimmed = wheels.content(names[1], {"head_dims": [64]})
    folder = wheel_folder({names[0]: wheels.content(names[0]), names[1]: trimmed})
    assert find(folder, (13, 0)).name == names[1]
    assert find(folder, (13, 0), HEAD_DIMS="128").name == names[0]


def test_another_version_of_the_project(find, one_wheel, wheel_folder, capsys):
    _, files = one_wheel(manifest={"project_version": "0.0.9"})
    assert find(wheel_folder(files)) is None
    assert "project version 0.0.9, this is " in capsys.readouterr().out


@pytest.mark.parametrize("variables", [{"FORCE_BUILD": "1"}, {"FORCE_BUILD": "TRUE"}, {"ARCHS": "none"}])
def test_nothing_is_looked_for(find, tmp_path, capsys, variables):
    assert find(tmp_path / "no such folder", **variables) is None
    assert find("", ARCHS="80") is None
    assert capsys.readouterr().out == ""


def test_force_build_is_on_or_off(find, one_wheel, wheel_folder):
    _, files = one_wheel()
    assert find(wheel_folder(files), FORCE_BUILD="0") is not None
    with pytest.raises(CodegenError, match="FLASH_ATTN_FORCE_BUILD must be 1 or 0, not 'maybe'"):
        find(wheel_folder(files), FORCE_BUILD="maybe")


INFO = "flash_attn-2.8.3.dist-info"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({f"{INFO}/METADATA": "Name: torch\nVersion: 2.8.3\n"}, "holds torch 2.8.3"),
        ({f"{INFO}/METADATA": "Name: flash-attn\nVersion: 2.8.2\n"}, "holds flash-attn 2.8.2"),
        ({f"{INFO}/METADATA": None}, "no wheel of this project"),
        ({"flash_attn/libflash_attn.so": None}, "no wheel of this project"),
        ({"flash_attn/_build.json": None}, "no wheel of this project"),
        ({"flash_attn/_build.json": "{"}, "is damaged"),
        ({"flash_attn/_build.json": "[]"}, "is no manifest"),
        ({"flash_attn/_build.json": '{"targets": null}'}, "is no manifest"),
        ({f"{INFO}/WHEEL": "Tag: py3-none-win_amd64\n"}, "for py3-none-win_amd64"),
    ],
)
def test_a_wheel_that_is_not_what_its_name_says(find, wheels, one_wheel, wheel_folder, members, words):
    name, _ = one_wheel()
    with pytest.raises(WheelError, match=words):
        find(wheel_folder({name: wheels.content(name, **members)}))


def test_a_wheel_that_was_published_damaged(find, one_wheel, wheel_folder):
    name, files = one_wheel()
    whole = files[name]
    for damaged in (b"", b"not a zip", whole[: len(whole) // 2], whole.replace(b"library", b"vandals")):
        with pytest.raises(WheelError, match="is damaged"):
            find(wheel_folder({name: damaged}))


def test_a_copy_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CodegenError, match=r"cannot copy gone\.whl"):
        prebuilt.place(tmp_path / "gone.whl", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
