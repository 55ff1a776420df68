"""Stands in for nvcc in tests: knows --version, compiling with a depfile, and linking; counts its calls.

Environment: FAKE_NVCC_LOG, a file that gets one line per call; FAKE_NVCC_SAYS, text printed when compiling.
"""

import os
import re
import sys
from pathlib import Path

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
ptxas info    : Function properties for _Z6kernelv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 4096 bytes smem, 636 bytes cmem[0]
"""


def headers(source, folders):
    """Every file that the source includes, directly or not."""
    found = []
    for name in re.findall(r'#include "(.+)"', source.read_text()):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None:
            found += [path, *headers(path, folders)]
    return found


def main(arguments):
    if arguments == ["--version"]:
        print("nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88")
        return 0
    output = Path(arguments[arguments.index("-o") + 1])
    with open(os.environ.get("FAKE_NVCC_LOG", os.devnull), "a") as log:
        log.write(output.name + "\n")
    if "-shared" in arguments:
        output.write_bytes(b"library")
        return 0
    source = Path(arguments[arguments.index("-c") + 1])
    includes = headers(source, [Path(a[2:]) for a in arguments if a.startswith("-I")])
    output.write_text("object")
    Path(arguments[arguments.index("-MF") + 1]).write_text(
        f"{output} : {source} {' '.join(map(str, includes))}\n"
    )
    print(PTXAS, end="")
    print(os.environ.get("FAKE_NVCC_SAYS", ""))
    return 1 if "#error" in source.read_text() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
