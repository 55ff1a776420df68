"""``python -m codegen``: regenerate the committed sources, or check, list, build and report."""

import argparse
import sys
from pathlib import Path

from codegen import GENERATED, PACKAGE, CodegenError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.check:
            return check()
        if options.list:
            return list_selected(options.shard)
        if options.build:
            return build(options.build_dir)
        if options.report:
            return report(options.build_dir)
        return regenerate()
    except CodegenError as error:
        print(f"codegen: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m codegen", description=__doc__)
    command = parser.add_mutually_exclusive_group()
    command.add_argument(
        "--check", action="store_true", help="print a diff and exit with 1 if a generated file is stale"
    )
    command.add_argument(
        "--list", action="store_true", help="one translation unit per line, for FLASH_ATTN_*"
    )
    command.add_argument(
        "--build", action="store_true", help="compile the selection of FLASH_ATTN_* into flash_attn/"
    )
    command.add_argument("--report", action="store_true", help="the build log of that selection as tables")
    parser.add_argument("--shard", metavar="I/N", help="with --list: part I of N, of nearly equal cost")
    parser.add_argument("--build-dir", type=Path, help="with --build, --report: default build/<selection>")
    return parser


def regenerate() -> int:
    """Bring generated/ and the modules in flash_attn/ up to date, touching only what changed."""
    from codegen import render, targets

    changed = render.write_tree(render.render_sources(targets.full_selection()), GENERATED)
    changed = [f"{GENERATED.name}/{path}" for path in changed]
    modules = render.render_modules().items()
    changed += [f"{PACKAGE.name}/{name}" for name, text in modules if render.write_file(PACKAGE / name, text)]
    for path in changed:
        print(path)
    print(f"{len(changed)} files changed")
    return 0


def check() -> int:
    """Print how the generated files differ from what the templates give."""
    from codegen import render, targets

    diff = render.diff_tree(render.render_sources(targets.full_selection()), GENERATED)
    for name, text in render.render_modules().items():
        diff += render.diff_file(PACKAGE / name, text, f"{PACKAGE.name}/{name}")
    if diff:
        print(diff, end="")
        print("generated files are stale: run python -m codegen", file=sys.stderr)
    return 1 if diff else 0


def list_selected(part: str | None) -> int:
    """Print the key and the source of each unit of the selection."""
    from codegen import units
    from codegen.compilation import selection

    chosen = selection.from_environment()
    print(f"flash-attn: {chosen.summary}", file=sys.stderr)
    listed = units.list_units(chosen)
    for unit in units.shard(listed, part) if part else listed:
        print(f"{unit.key}\t{GENERATED.name}/{unit.path}")
    return 0


def build(build_dir: Path | None) -> int:
    """Compile the selection and put the library into the source tree's package."""
    from codegen.compilation import builder, selection

    chosen = selection.from_environment()
    print(f"flash-attn: {chosen.summary}", file=sys.stderr)
    builder.build(chosen, build_dir or builder.default_build_dir(chosen), PACKAGE)
    return 0


def report(build_dir: Path | None) -> int:
    """Print the build log of the selection as tables, and the size of the library."""
    from codegen.compilation import builder, ninja, report, selection

    folder = build_dir or builder.default_build_dir(selection.from_environment())
    records = report.read_records(folder)
    print(report.table(records), report.size_table(records), sep="\n", end="")
    library = folder / ninja.LIBRARY
    if library.is_file():
        print(f"{library.name}: {library.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
