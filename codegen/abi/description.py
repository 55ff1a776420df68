"""What an ABI is described with: structs, enums, limits and functions, as C and as ctypes see them."""

from dataclasses import dataclass

# type -> (C++, ctypes, struct code, bytes)
SCALARS = {
    "int16": ("int16_t", "ctypes.c_int16", "h", 2),
    "int32": ("int32_t", "ctypes.c_int32", "i", 4),
    "int64": ("int64_t", "ctypes.c_int64", "q", 8),
    "uint64": ("uint64_t", "ctypes.c_uint64", "Q", 8),
    "float32": ("float", "ctypes.c_float", "f", 4),
    "string": ("const char*", "ctypes.c_char_p", "Q", 8),
}


@dataclass(frozen=True)
class Field:
    """A struct member or argument.

    ``type`` is a key of SCALARS, a C++ pointer such as ``float*``, or a Struct, which is packed already where
    it is packed into another one.
    """

    name: str
    type: "str | Struct"
    doc: str = ""

    @property
    def _description(self) -> tuple[str, str, str, int]:
        if isinstance(self.type, Struct):
            return self.type.name, self.type.name, f"{self.type.size}s", self.type.size
        return (self.type, "ctypes.c_void_p", "Q", 8) if self.type.endswith("*") else SCALARS[self.type]

    @property
    def c_type(self) -> str:
        return self._description[0]

    @property
    def ctypes_type(self) -> str:
        return self._description[1]

    @property
    def code(self) -> str:
        return self._description[2]

    @property
    def size(self) -> int:
        return self._description[3]

    @property
    def alignment(self) -> int:
        return min(self.size, 8)


@dataclass(frozen=True)
class Struct:
    """A struct, laid out as in C: fields at multiples of their alignment, the whole at multiples of 8."""

    name: str
    doc: str
    fields: tuple[Field, ...]

    def offsets(self) -> list[int]:
        """Offset of each field in bytes."""
        offsets, end = [], 0
        for field in self.fields:
            offsets.append(_round_up(end, field.alignment))
            end = offsets[-1] + field.size
        return offsets

    @property
    def size(self) -> int:
        return _round_up(self.offsets()[-1] + self.fields[-1].size, 8)

    @property
    def constant(self) -> str:
        """Name of the packer in Python: ForwardParams -> FORWARD_PARAMS."""
        return "".join("_" + c if c.isupper() else c for c in self.name).lstrip("_").upper()

    @property
    def packing(self) -> str:
        """Format for ``struct.Struct``: little endian, explicit padding, runs of one type counted."""
        codes, end = [], 0
        for field, offset in zip(self.fields, self.offsets(), strict=True):
            codes += ["x"] * (offset - end) + [field.code]
            end = offset + field.size
        codes += ["x"] * (self.size - end)
        return "<" + "".join(f"{count}{code}" if len(code) == 1 else code for code, count in _runs(codes))


@dataclass(frozen=True)
class Enum:
    """An ``enum class : int32_t`` and its IntEnum; members are in snake_case here."""

    name: str
    doc: str
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Limit:
    """A number that both sides count with: ``constexpr int kName`` and NAME; the name is in snake_case here.

    As text it is its value, for documentation.
    """

    name: str
    value: int
    doc: str

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Function:
    """An exported ``extern "C"`` function; ``result`` is a key of SCALARS."""

    name: str
    result: str
    arguments: tuple[Field, ...]
    doc: str

    @property
    def result_field(self) -> Field:
        return Field("result", self.result)

    @property
    def argument_tuple(self) -> str:
        """The arguments' ctypes types as Python source."""
        types = ", ".join(argument.ctypes_type for argument in self.arguments)
        return f"({types},)" if len(self.arguments) == 1 else f"({types})"


def cpp_constant(name: str) -> str:
    """``not_built`` -> ``kNotBuilt``."""
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _runs(codes: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for code in codes:
        if runs and runs[-1][0] == code and len(code) == 1:
            runs[-1] = (code, runs[-1][1] + 1)
        else:
            runs.append((code, 1))
    return runs
