import pytest

from ci import CiError, proof
from ci.proof import Outcome


@pytest.fixture
def pair(small_matrix):
    return small_matrix.pair("2.13", "13.0")


def test_a_record_survives_being_written(make_wheel, make_record, tmp_path):
    record = make_record(make_wheel(), torch_cuda=None)
    (tmp_path / record.file_name).write_text(record.to_json())
    assert proof.read_records(tmp_path) == [record]


def test_what_proves_a_pair(make_wheel, make_record, pair):
    wheel = make_wheel()
    record = make_record(wheel)
    assert proof.proofs([record], pair, wheel) == [record]


@pytest.mark.parametrize(
    "fields",
    [
        {"tests": ()},
        {"tests": (Outcome("import", True), Outcome("causal", False, "too large"))},
        {"sha256": "0" * 64},
        {"series": "2.12"},
        {"cuda": "13.2"},
        {"torch_cuda": "12.6"},
        {"torch_cuda": None},
    ],
)
def test_what_proves_nothing(make_wheel, make_record, pair, fields):
    wheel = make_wheel()
    assert proof.proofs([make_record(wheel, **fields)], pair, wheel) == []


def test_a_cpu_build_of_torch_counts_if_asked(make_wheel, make_record, pair):
    wheel = make_wheel()
    record = make_record(wheel, torch="2.13.0+cpu", torch_cuda=None)
    assert proof.proofs([record], pair, wheel, accept_cpu_torch=True) == [record]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tests": [{"passed": true}]}', '{"tests": []}'])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(CiError, match=r"record.json: not a test record"):
        proof.read_records(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(CiError, match="no such folder"):
        proof.read_records(tmp_path / "none")
