"""The C ABI of the library, described once; the C header and the ctypes mirror are rendered from here."""

import hashlib

from codegen import axes
from codegen.abi import backward, cache, dropout_probs, forward, library, rotary
from codegen.abi.description import Enum
from codegen.abi.description import cpp_constant as cpp_constant
from codegen.abi.limits import LIMITS as LIMITS

PARAMS = (forward.PARAMS, backward.PARAMS, cache.PARAMS, rotary.PARAMS)
"""Structs that the caller packs; the library writes the others."""

STRUCTS = (forward.PARAMS, backward.PARAMS, backward.PLAN, cache.PARAMS, cache.PLAN, rotary.PARAMS)

FUNCTIONS = (
    forward.LAUNCHER,
    backward.LAUNCHER,
    cache.LAUNCHER,
    rotary.LAUNCHER,
    dropout_probs.LAUNCHER,
    forward.KERNEL_QUERY,
    backward.KERNEL_QUERY,
    cache.KERNEL_QUERY,
    backward.PLANNER,
    cache.PLANNER,
    *library.functions(PARAMS),
)


def enums() -> tuple[Enum, ...]:
    """Every enum of the ABI; dtypes, masks and families follow the axes."""
    families = (("auto", 0), *((name, int(name.removeprefix("sm"))) for name in axes.FAMILIES))
    status = ("ok", "not_built", "unsupported_device", "cuda_error", "invalid_argument")
    return (
        Enum("Dtype", "Element type of q, k, v and out.", _numbered(axes.DTYPES)),
        Enum("Mask", "Mask class: what a kernel is compiled to mask.", _numbered(axes.MASKS)),
        Enum("Family", "Kernel family; auto = the best one for the device.", families),
        Enum("Direction", "Pass that a kernel computes.", _numbered(axes.DIRECTIONS)),
        Enum("Design", "Design of a kernel over a KV cache.", _numbered(("mma", "wgmma"))),
        Enum("Status", "Result of a call; flash_attn_last_error() has the text.", _numbered(status)),
    )


def _numbered(names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, number) for number, name in enumerate(names))


def layout_text() -> str:
    """Canonical text of everything that both sides of the ABI must agree on."""
    lines = [f"limit {limit.name}={limit.value}" for limit in LIMITS]
    for struct in STRUCTS:
        lines.append(f"struct {struct.name} {struct.size}")
        for field, offset in zip(struct.fields, struct.offsets(), strict=True):
            lines.append(f"{offset} {field.c_type} {field.name}")
    for enum in enums():
        lines.append(f"enum {enum.name} " + " ".join(f"{name}={value}" for name, value in enum.members))
    for function in FUNCTIONS:
        arguments = " ".join(f"{argument.c_type} {argument.name}" for argument in function.arguments)
        lines.append(f"function {function.name} {function.result} {arguments}".rstrip())
    return "\n".join(lines) + "\n"


def layout_hash() -> int:
    """64-bit hash of the layout text: the library refuses to run under a mirror with another one."""
    return int.from_bytes(hashlib.sha256(layout_text().encode()).digest()[:8], "big")
