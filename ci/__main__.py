"""``python -m ci``: list the release matrix; build, audit, test and publish its wheels; write their index."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from ci import CiError, matrix
from codegen import CodegenError


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0; 1 if tests failed; 2 for a request or input that is refused."""
    options = parser().parse_args(arguments)
    try:
        result: int = options.run(options)
        return result
    except (CiError, CodegenError) as error:
        print(f"ci: {' '.join(str(error).split())}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"ci: {error}: pip install --group release", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """The commands, each with its arguments and the function that runs it."""
    top = argparse.ArgumentParser(prog="python -m ci", description=__doc__)
    top.add_argument("--matrix", type=Path, default=matrix.FILE, help="another matrix.toml")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, summary, add_arguments, run in (
        ("matrix", "check the matrix and list its pairs", _matrix_arguments, list_matrix),
        ("build", "compile the library of a CUDA and make its wheel", _build_arguments, build_wheel),
        ("audit", "check tag, symbols, needs, size and manifest of wheels", _audit_arguments, audit_wheels),
        ("test", "test a wheel in a fresh environment and write the record", _test_arguments, test_wheel),
        ("publish", "admit the wheels that records prove to a site", _publish_arguments, publish_wheels),
        ("index", "write the index of a site", _index_arguments, write_index),
        ("report", "the proofs as a table", _report_arguments, write_report),
    ):
        command = commands.add_parser(name, help=summary)
        add_arguments(command)
        command.set_defaults(run=run)
    return top


def _matrix_arguments(command: argparse.ArgumentParser) -> None:
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="builds and pairs as JSON")
    form.add_argument("--github", action="store_true", help="lines for GITHUB_OUTPUT")
    command.add_argument("--shards", type=int, default=4, help="with --github: shards per build")


def _build_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cuda", required=True, help="a build of the matrix, such as 13.0")
    command.add_argument(
        "--out", type=Path, required=True, help="folder for the wheel, or the shard's objects"
    )
    part = command.add_mutually_exclusive_group()
    part.add_argument("--shard", metavar="I/N", help="compile a part of the library only")
    part.add_argument("--objects", type=Path, help="folder with the objects of all shards: link them")
    part.add_argument("--container", action="store_true", help="in cibuildwheel's manylinux container")
    command.add_argument(
        "--repair", action="store_true", help="give the wheel its manylinux tag, by auditwheel"
    )
    command.add_argument(
        "--fetch-compiler",
        action="store_true",
        help="get that CUDA's nvcc, from PyPI or by the matrix's `prepare` (as root, in its container)",
    )
    command.add_argument("--no-isolation", action="store_true", help="use this environment's build tools")


def _audit_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("wheels", type=Path, nargs="+")
    command.add_argument("--policy", help="the newest platform allowed, such as manylinux_2_28")


def _test_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--wheel", type=Path, help="default: the wheel that pip finds released")
    command.add_argument("--torch", required=True, help="2.13.0, 2.13 for its newest patch, or newest")
    command.add_argument("--cuda", help="the pair's CUDA, such as 13.0; newest goes without")
    command.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    command.add_argument(
        "--extra-index-url", action="append", default=[], help="where else pip looks for torch"
    )
    command.add_argument("--records", type=Path, required=True, help="folder for the record")


def _publish_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--wheels", type=Path, required=True)
    command.add_argument("--records", type=Path, required=True)
    _index_arguments(command)


def _index_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--site", type=Path, required=True, help="folder of the static site")
    command.add_argument(
        "--accept-cpu-torch", action="store_true", help="let tests beside a CPU build of torch count"
    )


def _report_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--records", type=Path, required=True)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--html", action="store_true", help="HTML instead of Markdown")
    form.add_argument("--compatibility", action="store_true", help="docs/compatibility.md instead")


def list_matrix(options: argparse.Namespace) -> int:
    """Print the matrix."""
    from ci import listing

    read = matrix.read(options.matrix)
    if options.github:
        if options.shards < 1:
            raise CiError(f"--shards must be at least 1, not {options.shards}")
        print(listing.github(read, options.shards), end="")
    else:
        print(listing.as_json(read) if options.json else listing.table(read), end="")
    return 0


def build_wheel(options: argparse.Namespace) -> int:
    """Compile a shard, or make a wheel."""
    from ci import build, compiler

    read = matrix.read(options.matrix)
    chosen = read.build(options.cuda)
    if options.shard:
        build.check_shard(options.shard)
    if options.objects and not options.objects.is_dir():
        raise CiError(f"{options.objects}: no such folder")
    if options.container and options.fetch_compiler:
        raise CiError("--fetch-compiler cannot be given: --container brings its own compiler")
    if options.fetch_compiler:
        os.environ["CUDA_HOME"] = str(compiler.fetch(chosen))
    if options.shard:
        build.compile_shard(chosen, options.shard, options.out)
        return 0
    if options.container:
        made = build.build_in_container(chosen, read.platforms, options.out)
    else:
        made = build.build_wheel(
            chosen, options.objects, options.out, options.repair, not options.no_isolation
        )
    print(f"{made.path}\t{made.size / 1e6:.2f} MB\tsha256 {made.sha256}")
    return 0


def audit_wheels(options: argparse.Namespace) -> int:
    """Audit wheels; the first that fails ends it."""
    from ci import audit, wheel

    for path in options.wheels:
        facts = audit.audit(wheel.open_wheel(path), options.policy)
        print(f"{path.name}: {facts.summary}")
    return 0


def test_wheel(options: argparse.Namespace) -> int:
    """Test a wheel; returns 1 if a test failed, after the record is written."""
    from ci import publish, report, trial, wheel

    read = matrix.read(options.matrix)
    newest = options.torch == trial.NEWEST
    if newest == bool(options.cuda):
        raise CiError(f"--torch {options.torch} {'finds its CUDA itself' if newest else 'needs --cuda'}")
    pair = None if newest else read.pair(options.torch, options.cuda)
    indexes = tuple(options.extra_index_url)
    with tempfile.TemporaryDirectory() as folder:
        path = options.wheel or trial.download(Path(folder), indexes)
        request = trial.Request(wheel.open_wheel(path), options.torch, pair, options.python, indexes)
        record = trial.run(request, read)
    print(report.outcomes(record))
    print(f"{publish.write_record(record, options.records)}\t{record.seconds:.0f} s")
    return 0 if record.passed else 1


def publish_wheels(options: argparse.Namespace) -> int:
    """Admit wheels to a site."""
    from ci import publish

    read = matrix.read(options.matrix)
    args = (options.wheels, options.records, options.site, options.accept_cpu_torch)
    for offer in publish.publish(read, *args):
        print(f"{offer.pair.folder}\t{' '.join(wheel.name for wheel in offer.wheels)}")
    return 0


def write_index(options: argparse.Namespace) -> int:
    """Write a site's index."""
    from ci import index

    offered = index.write(options.site, matrix.read(options.matrix), options.accept_cpu_torch)
    print(f"{options.site}: {len(offered)} pairs offered")
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Print the proofs."""
    from ci import proof, report

    read, records = matrix.read(options.matrix), proof.read_records(options.records)
    if options.compatibility:
        print(report.compatibility(read, records), end="")
    else:
        rows = report.rows(read, records)
        print(report.html(rows) if options.html else report.markdown(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
