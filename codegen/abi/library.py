"""What the library tells of itself."""

from codegen.abi.description import Field, Function, Struct


def functions(params: tuple[Struct, ...]) -> tuple[Function, ...]:
    """The functions that launch nothing, among them one for the size of each parameter struct."""
    return (
        Function("flash_attn_last_error", "string", (), "Text of this thread's last error."),
        Function("flash_attn_layout_hash", "uint64", (), "kLayoutHash of the library's abi.h."),
        *(_size(struct) for struct in params),
        Function("flash_attn_kernel_count", "int32", (), "Number of kernels in the library."),
        Function("flash_attn_kernel_key", "string", (Field("index", "int32"),), "Key of one kernel."),
        Function(
            "flash_attn_draws_tiles",
            "int32",
            (Field("device", "int32"), Field("family", "int32")),
            "1 if the library holds kernels for the device, of that Family unless it is 0, that draw their"
            " tiles from a counter, else 0; -1 if CUDA does not tell what the device is.",
        ),
        Function("flash_attn_targets", "string", (), 'Compiled targets, such as "sm80:80,sm80:90+ptx".'),
    )


def _size(struct: Struct) -> Function:
    name = f"flash_attn_{struct.constant.lower()}_size"
    return Function(name, "int64", (), f"sizeof({struct.name}) in bytes.")
