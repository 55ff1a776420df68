import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.tags import platform_tags

from codegen import ROOT
from codegen.compilation import backend

FOLDERS = ("codegen", "templates", "generated", "flash_attn", "tests/codegen")
FILES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "flash_attn_2_cuda.py",
)
SMALL = {"FLASH_ATTN_ARCHS": "80", "FLASH_ATTN_HEAD_DIMS": "64", "FLASH_ATTN_DTYPES": "bf16"}


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources to build in, where importing torch fails."""
    folder = tmp_path / "source"
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("raise ImportError('no torch while building')\n")
    return folder


def call_backend(folder, hook, out, **variables):
    """Call a PEP 517 hook as a frontend does: in the source folder, in a process of its own."""
    out.mkdir(exist_ok=True)
    script = (
        "import sys; sys.path.insert(0, '.'); from codegen.compilation import backend;"
        f"print('made', backend.{hook}({str(out)!r}))"
    )
    environment = {**os.environ, **variables, "PYTHONPATH": str(folder.parent / "no_torch")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split("made ")[-1].strip(), done.stdout


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def top_level(names):
    return {name.split("/")[0] for name in names}


def test_wheel_without_kernels(tree, tmp_path):
    (tree / "flash_attn" / "libflash_attn.so").write_bytes(b"left over")
    wheel, out = call_backend(tree, "build_wheel", tmp_path / "dist", FLASH_ATTN_ARCHS="none")
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"
    assert [line for line in out.splitlines() if line.startswith("flash-attn: ")] == [
        "flash-attn: no kernels, CPU backend only"
    ]
    names = contents(wheel)
    assert top_level(names) == {"flash_attn", "flash_attn_2_cuda.py", "flash_attn-2.8.3.dist-info"}
    assert not any(name.endswith(".so") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("flash_attn/_build.json"))
    assert info["kernels"] == info["targets"] == info["dtypes"] == [] and info["nvcc"] is None
    assert "commit" in info and info["project_version"]


def test_wheel_with_kernels(tree, tmp_path, fake_toolkit):
    wheel, out = call_backend(tree, "build_wheel", tmp_path / "dist", **SMALL)
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("flash_attn", "2.8.3", "py3", "none")
    assert platform.startswith("linux_")
    assert "flash-attn: kernels for sm80:80" in out
    names = contents(wheel)
    assert top_level(names) == {"flash_attn", "flash_attn_2_cuda.py", "flash_attn-2.8.3.dist-info"}
    assert {"flash_attn/libflash_attn.so", "flash_attn/_build.json", "flash_attn/_abi.py"} <= names
    with zipfile.ZipFile(wheel) as archive:
        assert len(json.loads(archive.read("flash_attn/_build.json"))["kernels"]) == 7
        assert b"Root-Is-Purelib: false" in archive.read("flash_attn-2.8.3.dist-info/WHEEL")


def test_what_left_the_sources_leaves_the_wheel(tree, tmp_path):
    (tree / "flash_attn" / "gone.py").write_text("")
    call_backend(tree, "build_wheel", tmp_path / "first", FLASH_ATTN_ARCHS="none")
    (tree / "flash_attn" / "gone.py").unlink()
    wheel, _ = call_backend(tree, "build_wheel", tmp_path / "second", FLASH_ATTN_ARCHS="none")
    assert "flash_attn/gone.py" not in contents(wheel)


def test_sdist_holds_all_that_a_build_needs(tree, tmp_path, fake_toolkit):
    (tree / "flash_attn" / "libflash_attn.so").write_bytes(b"left over")
    sdist, _ = call_backend(tree, "build_sdist", tmp_path / "dist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    for folder in ("codegen", "templates", "generated", "flash_attn"):
        kept = {str(path.relative_to(tree)) for path in (tree / folder).rglob("*") if path.is_file()}
        missing = {name for name in kept - names if not name.endswith((".so", ".pyc", "_build.json"))}
        assert not missing
    assert not any(name.endswith(".so") for name in names)
    assert {"setup.py", "pyproject.toml", "tests/codegen/test_abi.py"} <= names
    unpacked = tmp_path / "unpacked" / "flash_attn-2.8.3"
    wheel, _ = call_backend(unpacked, "build_wheel", tmp_path / "from_sdist", **SMALL)
    assert "flash_attn/libflash_attn.so" in contents(wheel)


def test_editable_puts_the_library_into_the_sources(tree, tmp_path, fake_toolkit):
    wheel, _ = call_backend(tree, "build_editable", tmp_path / "dist", **SMALL)
    assert (tree / "flash_attn" / "libflash_attn.so").is_file()
    assert (tree / "flash_attn" / "_build.json").is_file()
    assert not any(name.startswith(("codegen", "tests")) for name in contents(wheel))


def test_editable_without_kernels_leaves_a_library_alone(tree, tmp_path):
    library = tree / "flash_attn" / "libflash_attn.so"
    library.write_bytes(b"built in place")
    call_backend(tree, "build_editable", tmp_path / "dist", FLASH_ATTN_ARCHS="none")
    assert library.read_bytes() == b"built in place"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"FLASH_ATTN_ARCHS": "81"},
            "flash-attn: FLASH_ATTN_ARCHS: unknown value '81'; known: all, native, none",
        ),
        ({**SMALL, "FAKE_NVCC_SAYS": "(C7510) serialized"}, "failed, see above"),
    ],
)
def test_a_failing_build_is_one_clear_message(tree, tmp_path, fake_toolkit, variables, words):
    for hook in ("build_wheel", "build_editable"):
        with pytest.raises(AssertionError) as error:
            call_backend(tree, hook, tmp_path / "dist", **variables)
        assert words in str(error.value)
        assert not list((tmp_path / "dist").glob("*.whl"))


def test_a_prebuilt_wheel_instead_of_a_build(tree, tmp_path, fake_toolkit, wheels, wheel_folder):
    name = wheels.name(120, list(platform_tags())[-1])
    content = wheels.content(name)
    index = {"FLASH_ATTN_WHEEL_INDEX": str(wheel_folder({name: content}))}
    wheel, out = call_backend(tree, "build_wheel", tmp_path / "dist", **index, FLASH_ATTN_ARCHS="80")
    assert wheel.name == name and wheel.read_bytes() == content
    assert "nvcc" not in out
    forced = {**index, "FLASH_ATTN_FORCE_BUILD": "1"}
    wheel, out = call_backend(tree, "build_wheel", tmp_path / "forced", **forced, **SMALL)
    assert wheel.name != name and "nvcc forward_sm80_bf16_d64_full" in out
    trimmed = {**SMALL, "FLASH_ATTN_HEAD_DIMS": "256"}
    wheel, out = call_backend(tree, "build_wheel", tmp_path / "missing", **index, **trimmed)
    assert wheel.name != name and "no kernels for 256" in out


def test_a_damaged_prebuilt_wheel_installs_nothing(tree, tmp_path, fake_toolkit, wheels, wheel_folder):
    name = wheels.name(120, list(platform_tags())[-1])
    folder = wheel_folder({name: wheels.content(name)})
    (folder / "simple" / "flash-attn" / name).write_bytes(b"something else")
    with pytest.raises(AssertionError, match=r"flash-attn: .* has the sha256 .*: nothing was installed"):
        call_backend(tree, "build_wheel", tmp_path / "dist", FLASH_ATTN_WHEEL_INDEX=str(folder), **SMALL)
    assert not list((tmp_path / "dist").iterdir())
    assert not list((tree / "build" / "prebuilt").iterdir())


def test_versions_agree():
    pattern = re.compile(r'^(?:__)?version(?:__)? = "(.+)"$', re.MULTILINE)
    files = (ROOT / "pyproject.toml", ROOT / "flash_attn" / "_version.py")
    assert [pattern.findall(path.read_text()) for path in files] == [["2.8.3"], ["2.8.3"]]


def test_no_compiler_is_required_where_there_is_one(monkeypatch, fake_toolkit):
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80")
    assert backend.compiler_requirements() == []


def test_compiler_wheels_are_required_only_where_kernels_need_them(monkeypatch, no_nvcc):
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80")
    assert backend.compiler_requirements() == ["cuda-toolkit[nvcc,cccl]==13.0.*"]
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "none")
    assert backend.compiler_requirements() == []


def test_native_is_refused_where_the_driver_is_too_old_for_the_wheels(monkeypatch, no_nvcc):
    def required(driver, use_prebuilt=False):
        return len(backend.compiler_requirements(use_prebuilt, detect=lambda: [90], driver=lambda: driver))

    words = r"need driver 580 \(CUDA 13.0\) or newer, but this one supports CUDA 12.4"
    for use_prebuilt in (False, True):
        with pytest.raises(SystemExit, match=words):
            required((12, 4), use_prebuilt)
    for enough in ((13, 0), (13, 2), None):
        assert required(enough) == 1
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "90")
    assert required((12, 4)) == 1


def test_a_prebuilt_wheel_needs_no_compiler(monkeypatch, no_nvcc, wheels, wheel_folder, tmp_path):
    name = wheels.name(120, list(platform_tags())[-1])
    monkeypatch.setenv("FLASH_ATTN_WHEEL_INDEX", str(wheel_folder({name: wheels.content(name)})))
    monkeypatch.setenv("FLASH_ATTN_ARCHS", "80")
    assert len(backend.compiler_requirements()) == 1
    assert backend.compiler_requirements(use_prebuilt=True, downloads=tmp_path / "downloads") == []
    monkeypatch.setenv("FLASH_ATTN_FORCE_BUILD", "1")
    assert len(backend.compiler_requirements(use_prebuilt=True)) == 1


def test_the_backend_imports_what_it_may_alone():
    unwanted = {"torch", "jinja2", "tabulate", "tqdm"}
    script = f"import codegen.compilation.backend, sys; assert not {unwanted} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
