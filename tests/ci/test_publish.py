import pytest

from ci import CiError
from ci.publish import publish, write_record


@pytest.fixture
def admit(small_matrix, tmp_path):
    """Publishes the wheels of a folder to the site; returns the names of what the site holds."""

    def run(folder="wheels", **options):
        publish(small_matrix, tmp_path / folder, tmp_path / "records", tmp_path / "site", **options)
        return sorted(path.name for path in (tmp_path / "site" / "wheels").iterdir())

    return run


def test_only_proven_wheels_enter(admit, make_wheel, make_record, tmp_path):
    make_wheel("129", nvcc="12.9.86")
    wheel = make_wheel("130")
    write_record(make_record(wheel), tmp_path / "records")
    write_record(make_record(wheel, series="2.12", cuda="13.2", tests=()), tmp_path / "records")
    assert admit() == [wheel.name]
    assert len(list((tmp_path / "site/records").iterdir())) == 1
    assert admit() == [wheel.name]


def test_without_a_proof_nothing_is_written(admit, make_wheel, make_record, tmp_path):
    write_record(make_record(make_wheel(), torch_cuda=None), tmp_path / "records")
    with pytest.raises(CiError, match=r"no wheel in .* is proven"):
        admit()
    assert not (tmp_path / "site").exists()
    assert admit(accept_cpu_torch=True)


def test_a_published_wheel_never_changes(admit, make_wheel, make_record, tmp_path):
    wheel = make_wheel()
    write_record(make_record(wheel), tmp_path / "records")
    admit()
    before = (tmp_path / "site/wheels" / wheel.name).read_bytes()
    other = make_wheel(folder="rebuilt", library=b"another")
    write_record(make_record(other), tmp_path / "records")
    with pytest.raises(CiError, match="published already with another content"):
        admit("rebuilt")
    assert (tmp_path / "site/wheels" / wheel.name).read_bytes() == before
    retagged = make_wheel(platform="manylinux_2_34_x86_64", folder="retagged")
    write_record(make_record(retagged), tmp_path / "records")
    with pytest.raises(CiError, match="two wheels for build 130 on x86_64"):
        admit("retagged")
