"""Build entry: compiles the selection of FLASH_ATTN_* into the package and tags the wheel; see codegen/."""

import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).resolve().parent))

from codegen import PACKAGE, CodegenError
from codegen.compilation import builder, selection
from codegen.targets import Selection


def selected() -> Selection:
    """The selection of the environment; a wrong value ends the build with the message alone."""
    try:
        return selection.from_environment()
    except CodegenError as error:
        raise SystemExit(f"flash-attn: {error}") from None


class LibraryDistribution(Distribution):
    """A distribution that is platform-specific iff it holds kernels."""

    def has_ext_modules(self) -> bool:
        return bool(selected().targets)


class BuildKernels(Command):
    """Puts the library and _build.json beside the package's modules, in place for an editable install."""

    description = "compile the CUDA kernels"
    user_options = ()

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        chosen = selected()
        print(f"flash-attn: {chosen.summary}")
        out = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
        if not self.editable_mode:
            builder.remove_library(out)
        if not chosen.targets:
            if not (out / builder.LIBRARY).exists():
                builder.write_build_info(out, chosen)
            return
        try:
            builder.build(chosen, builder.default_build_dir(chosen), out)
        except CodegenError as error:
            raise SystemExit(f"flash-attn: {error}") from None

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        names = (builder.LIBRARY, builder.BUILD_INFO) if selected().targets else (builder.BUILD_INFO,)
        return [str(Path(self.build_lib) / PACKAGE.name / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """setuptools' build without an earlier one's modules, which may be gone, then the kernels."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]

    def run(self) -> None:
        earlier = Path(self.build_lib) / PACKAGE.name
        if earlier.resolve() != PACKAGE.resolve():
            shutil.rmtree(earlier, ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """Tags a wheel with kernels py3-none-<platform>: the library knows neither Python's nor torch's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    distclass=LibraryDistribution,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": BdistWheel},
)
