import pytest

from ci import CiError, matrix
from ci.matrix import Version


def test_the_project_has_a_matrix():
    read = matrix.read()
    pairs = {pair.folder: str(pair.build) for pair in read.pairs}
    assert pairs["cu130/torch2.13"] == "13.0"
    assert pairs["cu126/torch2.13"] == "12.9"
    assert len(pairs) == len(read.pairs)


def test_pairs_are_served_by_the_build_of_their_major_version(small_matrix):
    assert [(str(p.torch), str(p.cuda), str(p.build)) for p in small_matrix.pairs] == [
        ("2.12", "12.6", "12.9"),
        ("2.12", "13.2", "13.0"),
        ("2.13", "13.0", "13.0"),
    ]
    assert small_matrix.pair("2.13.0", "13.0").pythons == tuple(Version(3, minor) for minor in range(11, 15))
    assert small_matrix.build("13.0").cuda.digits == "130"


def test_adding_a_torch_is_one_line(matrix_file):
    with matrix_file.open("a") as file:
        file.write('"2.14" = { cuda = ["13.0"], python = ["3.10", "3.14"] }\n')
    assert matrix.read(matrix_file).pair("2.14.1", "13.0").folder == "cu130/torch2.14"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '["13.0"], py',
            '["14.0"], py',
            "torch 2.13: unknown CUDA 14.0: no build among 12.9, 13.0 serves it",
        ),
        ('["13.0"], py', '["cu130"], py', "torch 2.13: cuda must look like \"13.0\", not 'cu130'"),
        ('["13.0"], py', "[], py", "torch 2.13: cuda, its variants must be a list of at least one string"),
        ('["13.0"], py', '["13.0", "13.0"], py', "duplicate pair of torch 2.13 and CUDA 13.0"),
        ('"2.13" =', '"2.12" =', "Cannot overwrite"),
        ('{ cuda = ["13.0"], python', "{ python", "torch 2.13 lacks cuda"),
        ('"3.11", "3.14"', '"3.14", "3.11"', "torch 2.13: python must be [oldest, newest]"),
        ('"12.9"\narchs', '"13.0"\narchs', "duplicate build of CUDA 13.0"),
        ("pypi = true", "", "exactly one build must have pypi"),
        ("pypi = true", 'pypi = true\nprepare = "x"', "prepare and cuda_home are two strings"),
        ("pypi = true", "pip = true", "build has an unknown entry pip"),
        ('"75", ', '"81", ', "build 13.0: unknown arch '81'"),
        ('"80", "90"', '"80", "110"', "build 12.9: arch 110 needs CUDA 13.0 or newer"),
        ("linux_x86_64", "win_amd64", "unknown platform 'win_amd64'"),
        ("runner =", "run =", "platform linux_x86_64 lacks runner"),
        ('"runner"', "1", "platform linux_x86_64: runner and image are two strings"),
        ("@sha256:", ":latest", "platform linux_x86_64: image must end in its digest"),
        ("[platforms]", "platforms", "matrix.toml: "),
        ("[torch]", "[torches]", "the file lacks torch"),
    ],
)
def test_a_wrong_matrix_is_one_line(matrix_file, old, new, words):
    text = matrix_file.read_text()
    assert old in text
    matrix_file.write_text(text.replace(old, new, 1))
    with pytest.raises(CiError) as error:
        matrix.read(matrix_file)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(CiError, match="No such file"):
        matrix.read(tmp_path / "none.toml")


def test_what_is_not_in_the_matrix(small_matrix):
    with pytest.raises(CiError, match=r"unknown CUDA '11.8': the matrix has builds for 12.9, 13.0"):
        small_matrix.build("11.8")
    with pytest.raises(CiError, match=r"it has no torch 2\.3"):
        small_matrix.pair("2.3.0", "13.0")
    with pytest.raises(CiError, match=r"torch 2.12 has CUDA 12.6, 13.2"):
        small_matrix.pair("2.12.1", "13.0")
