"""What the operations' descriptions share."""

from codegen.abi.description import Field, Function, Struct


def strides(tensor: str, *dimensions: str) -> tuple[Field, ...]:
    """A field for the stride of each of the tensor's dimensions."""
    return tuple(Field(f"{tensor}_{d}_stride", "int64", f"from one {d} to the next") for d in dimensions)


def launcher(operation: str, params: Struct, doc: str, details: str = "") -> Function:
    """The function that launches the operation's kernels on a stream."""
    return Function(
        f"flash_attn_{operation}",
        "int32",
        (_argument(params), Field("stream", "void*")),
        f"{doc}; returns a Status. {details}".rstrip(),
    )


def kernel_query(operation: str, params: Struct) -> Function:
    """The function that names the operation's kernel for a call."""
    return Function(
        f"flash_attn_{operation}_kernel",
        "string",
        (_argument(params),),
        f"Key of the kernel that flash_attn_{operation} would run, or null (see flash_attn_last_error).",
    )


def planner(operation: str, params: Struct, plan: Struct, reads: str) -> Function:
    """The function that plans the operation's call; ``reads`` says what it looks at."""
    return Function(
        f"flash_attn_plan_{operation}",
        "int32",
        (_argument(params), Field("plan", f"flash_attn::{plan.name}*")),
        f"Writes the plan of a call of flash_attn_{operation}; returns a Status. It reads sizes, head dims,"
        f" dtype, device and family, and {reads}. Nothing is read where pointers lead, and workspaces, whose"
        " sizes follow from the plan, may be null.",
    )


def _argument(params: Struct) -> Field:
    return Field("params", f"const flash_attn::{params.name}*")
