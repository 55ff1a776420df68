"""Finding and loading the kernel library, and refusing one that does not fit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
from checker import compile_cpp

from codegen.compilation.selection import from_environment
from flash_attn import _abi
from flash_attn._backends.cuda import library as _library


def fake_library(**changes):
    """Return an object with the library's functions, as ctypes would give them."""
    results = {
        "flash_attn_layout_hash": _abi.LAYOUT_HASH,
        **{f"flash_attn_{name}_params_size": packer.size for name, packer in _library.PARAMS.items()},
        "flash_attn_kernel_count": 2, "flash_attn_targets": b"sm80:80,sm80:90+ptx",
    }  # fmt: skip

    def function(name):
        def call(*arguments):
            return (
                b"kernel_%d" % arguments if name == "flash_attn_kernel_key" else (results | changes).get(name)
            )

        return call

    return SimpleNamespace(_name="libflash_attn.so", **{name: function(name) for name in _abi.FUNCTIONS})


PATH = Path("libflash_attn.so")


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv(_library.FORCE_FAMILY, raising=False)


def test_contents():
    library = _library.bind(fake_library(), PATH)
    assert library.kernels == ("kernel_0", "kernel_1")
    assert library.targets == ("sm80:80", "sm80:90+ptx")
    assert library.family == 0


def test_no_kernels():
    library = _library.bind(fake_library(flash_attn_kernel_count=0, flash_attn_targets=b""), PATH)
    assert library.kernels == () and library.targets == ()


def test_signatures_are_declared():
    fake = fake_library()
    _library.bind(fake, PATH)
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        assert getattr(fake, name).restype is result and getattr(fake, name).argtypes == list(arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"flash_attn_layout_hash": 1},
        *({f"flash_attn_{name}_params_size": 8} for name in _library.PARAMS),
    ],
    ids=str,
)
def test_another_layout_is_refused(changes):
    with pytest.raises(RuntimeError, match=r"another version of flash-attn.*rebuild it with `pip install"):
        _library.bind(fake_library(**changes), PATH)


def test_missing_function_is_refused():
    fake = fake_library()
    del fake.flash_attn_dropout_probs
    with pytest.raises(RuntimeError, match="lacks flash_attn_dropout_probs: rebuild"):
        _library.bind(fake, PATH)


def test_missing_file(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"no CUDA kernels.*FLASH_ATTN_ARCHS=native pip install.*CPU tensors work"
    ):
        _library.open_library(tmp_path / "libflash_attn.so")


def test_broken_file(tmp_path):
    path = tmp_path / "libflash_attn.so"
    path.write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"cannot load.*rebuild"):
        _library.open_library(path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """The bytes of a real library, without any of ours in it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "a.cpp").write_text('char data[70000] = {1};\nextern "C" int answer() { return 42; }\n')
    compile_cpp(folder / "a.cpp", folder / "a.so", "-shared", "-fPIC")
    return (folder / "a.so").read_bytes()


def test_a_whole_file_is_opened(tmp_path, whole_file):
    path = tmp_path / "libflash_attn.so"
    path.write_bytes(whole_file)
    assert _library._open(path).answer() == 42


@pytest.mark.parametrize("left", [64, 65, 500, 4096, 0.3, 0.5, 0.9, -4096, -64, -1])
def test_a_file_cut_short_is_refused(tmp_path, whole_file, left):
    path = tmp_path / "libflash_attn.so"
    path.write_bytes(whole_file[: int(left * len(whole_file)) if isinstance(left, float) else left])
    size = path.stat().st_size
    with pytest.raises(
        RuntimeError, match=rf"cannot load {path}: it has {size} bytes .* rebuild it with `pip"
    ):
        _library._open(path)


@pytest.mark.parametrize("value, family", [("sm80", 80), (" SM86 ", 86), ("", 0), ("auto", 0)])
def test_forced_family(monkeypatch, value, family):
    monkeypatch.setenv(_library.FORCE_FAMILY, value)
    assert _library.forced_family() == family


def test_unknown_family(monkeypatch):
    monkeypatch.setenv(_library.FORCE_FAMILY, "sm70")
    with pytest.raises(ValueError, match=r"FLASH_ATTN_FORCE_FAMILY must be one of .*sm80.*, got 'sm70'"):
        _library.forced_family()


def test_build_command():
    assert _library.build_command() == "FLASH_ATTN_ARCHS=native pip install ."
    command = _library.build_command("90", 65, "fp16")
    assert command.startswith(
        "FLASH_ATTN_ARCHS=90 FLASH_ATTN_HEAD_DIMS=96 FLASH_ATTN_DTYPES=fp16 pip install"
    )


def test_the_build_reads_the_variables_of_the_command():
    command = _library.build_command("90", 65, "fp16", _abi.Direction.BACKWARD)
    chosen = from_environment(dict(word.split("=") for word in command.split() if "=" in word))
    assert (chosen.head_dims, chosen.dtypes, chosen.directions) == ((96,), ("fp16",), ("forward", "backward"))


@pytest.mark.parametrize("capability", [70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
@pytest.mark.parametrize("family", [_abi.Family.AUTO, _abi.Family.SM80, _abi.Family.SM86])
def test_the_build_knows_what_the_command_asks_for(capability, family):
    arch = _library.arch_of(capability, family)
    chosen = from_environment({"FLASH_ATTN_ARCHS": arch}, detect=lambda: [capability])
    if arch != "native":
        forced = f"{family.name.lower()}:" if family else ""
        assert arch == f"{forced}{capability}"
        assert [target.capability for target in chosen.targets] == [capability]


@pytest.mark.skipif(not _library.library_path().exists(), reason="no library is built")
def test_built_library_loads_without_a_gpu():
    library = _library.load()
    assert len(set(library.kernels)) == len(library.kernels)
    params = _abi.ForwardParams()
    assert library.forward_kernel(ctypes.string_at(ctypes.addressof(params), ctypes.sizeof(params))) is None
    assert library.last_error()
