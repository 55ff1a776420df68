import json
import subprocess
import sys

import pytest

from ci import ROOT
from ci.__main__ import main


@pytest.fixture
def files(tmp_path, make_wheel, make_record):
    """Inputs, good and bad; returns their folder."""
    from ci.publish import write_record

    write_record(make_record(make_wheel()), tmp_path / "records")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "numpy-2.0-cp311-cp311-linux_x86_64.whl").write_bytes(b"")
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "flash_attn-2.8.3-130-py3-none-win_amd64.whl").write_bytes(b"")
    make_wheel(folder="twice"), make_wheel(platform="linux_x86_64", folder="twice")
    return tmp_path


def wheel_of(files):
    return str(next((files / "wheels").iterdir()))


BAD = [
    ("matrix --github --shards 0", "--shards must be at least 1"),
    ("build --cuda 11.8 --out {new}", "unknown CUDA '11.8'"),
    ("build --cuda 13.0 --shard 3/2 --out {new}", "--shard 3/2: must be i/n"),
    ("build --cuda 13.0 --container --fetch-compiler --out {new}", "--container brings its own compiler"),
    ("build --cuda 13.0 --objects {new} --out {new}", "no such folder"),
    ("build --cuda 12.9 --fetch-compiler --out {new}", "PyPI has complete compilers from 13.0 on"),
    ("audit {files}/none.whl", "no such file"),
    ("audit {files}/foreign/numpy-2.0-cp311-cp311-linux_x86_64.whl", "not a wheel of flash-attn"),
    (
        "audit {files}/platform/flash_attn-2.8.3-130-py3-none-win_amd64.whl",
        "platform 'win_amd64' is not one of linux",
    ),
    ("audit {wheel}", "cannot be loaded here"),
    ("test --wheel {wheel} --torch 2.9.0 --cuda 13.0 --records {new}", "is not a pair of the matrix"),
    ("test --wheel {wheel} --torch 2.12.0 --cuda 12.6 --records {new}", "served by build 129, not 130"),
    ("test --wheel {wheel} --torch 2.12.0 --records {new}", "--torch 2.12.0 needs --cuda"),
    ("test --wheel {wheel} --torch newest --cuda 13.0 --records {new}", "newest finds its CUDA itself"),
    ("publish --wheels {files}/empty --records {files}/records --site {new}", "holds no wheel"),
    ("publish --wheels {files}/foreign --records {files}/records --site {new}", "not a wheel of"),
    ("publish --wheels {files}/platform --records {files}/records --site {new}", "platform 'win_amd64'"),
    ("publish --wheels {files}/twice --records {files}/records --site {new}", "two wheels for build 130"),
    ("publish --wheels {files}/wheels --records {files}/empty --site {new}", "is proven"),
    ("publish --wheels {files}/wheels --records {new} --site {new}", "no such folder"),
    ("index --site {new}", "no such folder"),
    ("index --site {files}/empty", "no such folder"),
    ("report --records {new}", "no such folder"),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(files, matrix_file, capsys, command, words):
    before = sorted(files.rglob("*"))
    new = files / "new"
    arguments = command.format(files=files, wheel=wheel_of(files), new=new).split()
    assert main(["--matrix", str(matrix_file), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"13.2"', '"15.0"', "torch 2.12: unknown CUDA 15.0: no build among 12.9, 13.0 serves it"),
        ('["13.0"], py', "[], py", "torch 2.13: cuda, its variants must be a list of at least one string"),
        ('["13.0"], py', '["13.0", "13.0"], py', "duplicate pair of torch 2.13 and CUDA 13.0"),
    ],
)
@pytest.mark.parametrize(
    "command",
    ["matrix --github", "build --cuda 13.0 --out {new}", "publish --wheels {w} --records {r} --site {new}"],
)
def test_a_wrong_matrix_stops_every_command(files, matrix_file, capsys, old, new, words, command):
    matrix_file.write_text(matrix_file.read_text().replace(old, new))
    before = sorted(files.rglob("*"))
    arguments = command.format(new=files / "new", w=files / "wheels", r=files / "records").split()
    assert main(["--matrix", str(matrix_file), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(files.rglob("*")) == before


def test_from_wheel_to_index(files, matrix_file, capsys):
    site = files / "site"
    given = ["--matrix", str(matrix_file)]
    folders = ["--wheels", str(files / "wheels"), "--records", str(files / "records")]
    assert main([*given, "publish", *folders, "--site", str(site)]) == 0
    assert capsys.readouterr().out.startswith("cu130/torch2.13\tflash_attn-2.8.3-130-")
    assert main([*given, "index", "--site", str(site)]) == 0
    assert "1 pairs offered" in capsys.readouterr().out
    assert main([*given, "report", "--records", str(site / "records")]) == 0
    assert "1 of 1 passed" in capsys.readouterr().out
    assert main([*given, "report", "--html", "--records", str(site / "records")]) == 0
    assert "<table>" in capsys.readouterr().out


def test_matrix(matrix_file, capsys):
    assert main(["--matrix", str(matrix_file), "matrix"]) == 0
    assert "cu130/torch2.13" in capsys.readouterr().out
    assert main(["--matrix", str(matrix_file), "matrix", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 3
    assert main(["--matrix", str(matrix_file), "matrix", "--github"]) == 0
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomli before Python 3.11")
def test_the_matrix_is_listed_without_any_package():
    command = [sys.executable, "-S", "-m", "ci", "matrix", "--github"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "pairs=" in done.stdout, done.stderr
