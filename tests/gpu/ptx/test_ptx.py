"""The Hopper wrappers of templates/ptx by themselves: kernels of one thread block against float64."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

from codegen import GENERATED, TEMPLATES
from codegen.compilation.toolchain import ToolchainError, find_toolchain
from flash_attn import _abi

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="no GPU of compute capability 9.0")]

DTYPES = {torch.float16: _abi.Dtype.FP16, torch.bfloat16: _abi.Dtype.BF16}
NAN = float("nan")

FLAGS = "-std=c++17 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler=-fPIC"

ADDRESS, INT, INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


def fields(**types):
    """Members of a structure of ptx_sm90.cu or templates/host/tensor_map.h."""
    return tuple(types.items())


class TensorBox(ctypes.Structure):
    _fields_ = fields(base=ADDRESS, rank=INT, size=INT64 * 5, stride=INT64 * 4, box=INT * 5)


class Copies(ctypes.Structure):
    _fields_ = fields(out=ADDRESS, start=INT * 5, boxes=INT, slabs=INT, rows=INT, step=INT)


class Products(ctypes.Structure):
    _fields_ = fields(
        base=ADDRESS * 3, row_stride=INT64 * 3, scores=ADDRESS, output=ADDRESS,
        keys=INT, depth=INT, width=INT, specialised=INT, accumulate=INT, used_keys=INT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        toolchain = find_toolchain()
    except ToolchainError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("ptx") / "libptx.so"
    host = (TEMPLATES / "host" / name for name in ("launch.cu", "tensor_map.cu"))
    sources = [Path(__file__).with_name("ptx_sm90.cu"), *host]
    folders = [f"-I{TEMPLATES}", f"-I{GENERATED}", f"-L{toolchain.library_dir or path.parent}"]
    command = [str(toolchain.nvcc), *FLAGS.split(), *folders, "-o", str(path), *map(str, sources)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    assert "C75" not in result.stdout, f"wgmmas wait for each other: {result.stdout}"
    library = ctypes.CDLL(str(path))
    library.copy_boxes.restype = library.multiply.restype = ctypes.c_char_p
    return library


def check_error(error: bytes | None) -> None:
    if error and b"hangs" in error:
        pytest.exit("the GPU is still busy with a kernel that hangs", returncode=1)
    assert error is None, error


def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers with NaN around them; all strides but the last are multiples of 16 bytes."""
    *outer, columns = size
    whole = torch.full([*(n + 2 for n in outer), -(-columns // 8) * 8 + 16], NAN, dtype=dtype, device="cuda")
    return whole[(slice(1, -1),) * len(outer) + (slice(8, 8 + columns),)].normal_()


COPIES = {
    "rows outside": ((2, 50, 3, 128), (1, 2, 0, 0), (1, 1, 16, 64), 4),
    "columns outside, the last box empty": ((2, 50, 3, 40), (0, 1, 8, 0), (1, 1, 24, 64), 3),
    "5-D": ((2, 50, 2, 4, 96), (1, 1, 0, 0, 0), (1, 1, 8, 4, 64), 7),
    "5-D, the fourth of three outside": ((2, 21, 2, 3, 64), (0, 1, 5, 0, 0), (1, 1, 8, 4, 64), 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", COPIES)
def test_copies(library, dtype, case):
    """Boxes one after another along the rows, each in two slabs of columns; zeros outside of the tensor."""
    size, start, box, boxes = COPIES[case]
    source = random(*size, dtype=dtype).transpose(1, 2)  # (batch, head, row, .., column)
    reach = [*box[:2], boxes * box[2], *box[3:-1], 2 * 64]
    padded = pad(source, [n for extent in reversed(reach) for n in (0, extent)])
    region = padded[tuple(slice(at, at + n) for at, n in zip(start, reach, strict=True))]
    expected = region.reshape(boxes, -1, 2, 64).transpose(1, 2)  # (box, slab, row, column)
    out = torch.full_like(expected, NAN, memory_format=torch.contiguous_format)
    at, rank = source.data_ptr(), source.dim()
    tensor = TensorBox(at, rank, source.shape[::-1], source.stride()[-2::-1], box[::-1])
    copies = Copies(out.data_ptr(), start[::-1], boxes, 2, expected.shape[2], box[2])
    check_error(library.copy_boxes(ctypes.byref(tensor), int(DTYPES[dtype]), ctypes.byref(copies)))
    assert torch.equal(out, expected)


# Keys, columns of Q and K, columns of V; as in run_dtype of ptx_sm90.cu.
PRODUCTS = [(32, 64, 256), (64, 128, 192), (80, 96, 128), (96, 64, 96), (128, 128, 80), (192, 32, 64)]
PRODUCTS += [(256, 128, 32)]


def check_products(library, dtype, case, *, specialised=False, accumulate=False, unused=0):
    """S = Q K^T, O = round(S) V. The last ``unused`` rows of V are NaN until the kernel writes zeros."""
    keys, depth, width = case
    q, k, v = (random(*size, dtype=dtype) for size in ((64, depth), (keys, depth), (keys, width)))
    v[keys - unused :] = NAN
    scores, output = (torch.full((64, n), NAN, device="cuda") for n in (keys, width))
    before = [x.normal_().double() if accumulate else 0.0 for x in (scores, output)]
    call = Products(
        tuple(x.data_ptr() for x in (q, k, v)),
        tuple(x.stride(0) for x in (q, k, v)),
        *(scores.data_ptr(), output.data_ptr()),
        *(keys, depth, width, specialised, accumulate, keys - unused),
    )
    check_error(library.multiply(ctypes.byref(call), int(DTYPES[dtype])))
    assert_close(scores, before[0] + q.double() @ k.double().T)
    probs = scores.to(dtype).double()  # as the kernel rounds them
    assert_close(output, before[1] + probs @ v.double().nan_to_num(0))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Products of 16-bit numbers are exact in fp32: what is rounded is sums, of up to 257 terms."""
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= 1e-5, error  # one wrong element makes 1e-2 in the largest of these matrices


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(library, dtype, case, accumulate):
    check_products(library, dtype, case, accumulate=accumulate)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_see_ordinary_writes(library, dtype, case):
    check_products(library, dtype, case, unused=11)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_specialised_warpgroups(library, dtype, accumulate):
    """One warpgroup gives its registers to the other one, which needs them; named barriers between them."""
    check_products(library, dtype, (128, 128, 192), specialised=True, accumulate=accumulate, unused=5)
