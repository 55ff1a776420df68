import ctypes
import random
import subprocess
from dataclasses import replace

import pytest
from checker import compile_cpp

from codegen import PACKAGE, abi, axes, render, targets
from codegen.abi.description import Field, Struct


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.h").write_text(render.render_sources(targets.full_selection())["abi.h"])
    return folder / "abi.h"


def run_cpp(header, body):
    source, program = header.with_name("program.cpp"), header.with_name("program")
    includes = '#include "abi.h"\n#include <cstdio>\n'
    source.write_text(f"{includes}using namespace flash_attn;\nint main() {{\n{body}\n}}\n")
    compile_cpp(source, program)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("struct", abi.STRUCTS, ids=lambda struct: struct.name)
def test_header_and_mirror_have_one_layout(struct, header, mirror):
    name = struct.name
    lines = [f'std::printf("{name} %zu\\n", sizeof({name}));'] + [
        f'std::printf("{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));'
        for field in (field.name for field in struct.fields)
    ]
    ctypes_struct = mirror[name]
    expected = [f"{name} {ctypes.sizeof(ctypes_struct)}"]
    for field in struct.fields:
        descriptor = getattr(ctypes_struct, field.name)
        expected.append(f"{field.name} {descriptor.offset} {descriptor.size}")
    assert run_cpp(header, "\n".join(lines)).splitlines() == expected


def test_header_and_mirror_have_one_hash_and_the_same_enums(header, mirror):
    lines = ['std::printf("%llu\\n", static_cast<unsigned long long>(kLayoutHash));']
    expected = [str(mirror["LAYOUT_HASH"])]
    for enum in abi.enums():
        for member, _ in enum.members:
            lines.append(f'std::printf("%d\\n", static_cast<int>({enum.name}::{abi.cpp_constant(member)}));')
            expected.append(str(int(mirror[enum.name][member.upper()])))
    assert run_cpp(header, "\n".join(lines)).splitlines() == expected


def test_header_and_mirror_have_the_same_limits(header, mirror):
    body = "\n".join(f'std::printf("%d\\n", {abi.cpp_constant(limit.name)});' for limit in abi.LIMITS)
    values = [mirror[limit.name.upper()] for limit in abi.LIMITS]
    assert [int(line) for line in run_cpp(header, body).splitlines()] == values
    assert mirror["MAX_SPLITS"] == 128 and mirror["MAX_SEQLEN"] == 2**31 - 128


@pytest.mark.parametrize("struct", abi.PARAMS, ids=lambda struct: struct.name)
def test_packer_fills_the_struct(struct, mirror):
    packer, ctypes_struct = mirror[struct.constant], mirror[struct.name]
    assert packer.size == ctypes.sizeof(ctypes_struct) == struct.size
    draw = random.Random(0)
    values = [value_of(field, draw) for field in struct.fields]
    filled = ctypes_struct.from_buffer_copy(packer.pack(*values))
    unpacked = [getattr(filled, field.name) for field in struct.fields]
    assert [bytes(x) if isinstance(x, ctypes.Structure) else x for x in unpacked] == values


def value_of(field, draw):
    if field.type == "float32":
        return draw.randrange(1, 100) / 2
    if isinstance(field.type, Struct):
        return draw.randbytes(field.size)
    return draw.randrange(1, 2 ** (8 * min(field.size, 4) - 1))


def test_a_null_pointer_packs_as_zero(mirror):
    packer = mirror["FORWARD_PARAMS"]
    assert mirror["ForwardParams"].from_buffer_copy(bytes(packer.size)).seqused_k is None


def test_only_what_a_caller_packs_has_a_packer(mirror):
    assert {struct for struct in abi.STRUCTS if struct.constant in mirror} == set(abi.PARAMS)


def test_padding_is_part_of_the_layout():
    struct = Struct("Odd", "", (Field("a", "int32"), Field("b", "int64"), Field("c", "float32")))
    assert struct.offsets() == [0, 8, 16]
    assert struct.size == 24
    assert struct.packing == "<1i4x1q1f4x"


def test_a_struct_may_hold_structs():
    inner = Struct("Inner", "", (Field("a", "int64"), Field("b", "int32")))
    fields = (
        Field("x", "int32"),
        Field("first", inner),
        Field("second", inner),
        Field("y", "int32"),
    )
    outer = Struct("Outer", "", fields)
    assert outer.offsets() == [0, 8, 24, 40]
    assert outer.size == 48
    assert outer.packing == "<1i4x16s16s1i4x"


def test_hash_follows_names_types_enums_and_limits(monkeypatch):
    hashes = {abi.layout_hash()}
    first, *rest = abi.forward.PARAMS.fields
    for fields in ([Field("query", first.type), *rest], [Field("q", "int64"), *rest], [*rest, first]):
        monkeypatch.setattr(abi, "STRUCTS", (Struct("ForwardParams", "", tuple(fields)),))
        hashes.add(abi.layout_hash())
    monkeypatch.undo()
    monkeypatch.setattr(axes, "MASKS", ("causal", "full", "windowed"))
    hashes.add(abi.layout_hash())
    monkeypatch.undo()
    first, *rest = abi.LIMITS
    for limit in (replace(first, value=first.value + 1), replace(first, name="other")):
        monkeypatch.setattr(abi, "LIMITS", (limit, *rest))
        hashes.add(abi.layout_hash())
    assert len(hashes) == 7


def reworded(struct):
    fields = tuple(
        Field(
            field.name,
            reworded(field.type) if isinstance(field.type, Struct) else field.type,
            "other words",
        )
        for field in struct.fields
    )
    return Struct(struct.name, "other words", fields)


def test_hash_ignores_documentation(monkeypatch):
    before = abi.layout_hash()
    monkeypatch.setattr(abi, "STRUCTS", tuple(reworded(struct) for struct in abi.STRUCTS))
    monkeypatch.setattr(abi, "LIMITS", tuple(replace(limit, doc="other words") for limit in abi.LIMITS))
    assert abi.layout_hash() == before


def test_functions_have_ctypes_signatures(mirror):
    assert mirror["FUNCTIONS"]["flash_attn_forward"] == (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_void_p))
    assert mirror["FUNCTIONS"]["flash_attn_kernel_key"] == (ctypes.c_char_p, (ctypes.c_int32,))
    assert set(mirror["FUNCTIONS"]) == {function.name for function in abi.FUNCTIONS}


def test_the_committed_mirror_is_current():
    assert (PACKAGE / "_abi.py").read_text() == render.render_abi_module()
