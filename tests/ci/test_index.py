import hashlib
import json
import re

import pytest

from ci import CiError, index
from ci.publish import publish, write_record


@pytest.fixture
def site(make_wheel, make_record, small_matrix, tmp_path):
    """A site with wheels of two builds, of which 130 is proven for torch 2.13 and 129 for torch 2.12."""
    make_wheel("130"), make_wheel("130", "manylinux_2_28_aarch64")
    records = [
        make_record(make_wheel("130")),
        make_record(make_wheel("129", nvcc="12.9.86"), series="2.12", cuda="12.6", torch_cuda="12.6"),
    ]
    for record in records:
        write_record(record, tmp_path / "records")
    publish(small_matrix, tmp_path / "wheels", tmp_path / "records", tmp_path / "site")
    return tmp_path / "site"


def listed(site, folder):
    """File names on a project page, after following each link and checking hash and metadata."""
    page = site / folder / "flash-attn" / "index.html"
    names = []
    for href, digest, metadata, name in re.findall(
        r'<a href="(.+?)#sha256=(\w+)".*? data-core-metadata="sha256=(\w+)".*?>(.+?)</a>', page.read_text()
    ):
        file = (page.parent / href).resolve()
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
        assert hashlib.sha256(file.with_name(f"{name}.metadata").read_bytes()).hexdigest() == metadata
        assert file.name == name
        names.append(name.split("-")[2])
    return names


def test_only_proven_pairs_are_offered(site, small_matrix):
    offered = index.write(site, small_matrix)
    assert [offer.pair.folder for offer in offered] == ["cu126/torch2.12", "cu130/torch2.13"]
    assert listed(site, "cu130/torch2.13") == listed(site, "cu130") == ["130"]
    assert listed(site, "cu126/torch2.12") == listed(site, "") == ["129"]
    assert not (site / "cu132").exists()
    assert not list(site.glob("wheels/*aarch64*"))


def test_json_says_the_same(site, small_matrix):
    index.write(site, small_matrix)
    answer = json.loads((site / "cu130/torch2.13/flash-attn/index.json").read_text())
    (file,) = answer["files"]
    wheel = (site / "cu130/torch2.13/flash-attn" / file["url"]).resolve()
    assert answer["meta"] == {"api-version": "1.1"}
    assert answer["versions"] == ["2.8.3"]
    assert file["hashes"]["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (file["size"], file["requires-python"]) == (wheel.stat().st_size, ">=3.10")


def test_the_page_offers_the_same_choices(site, small_matrix):
    index.write(site, small_matrix)
    choices = json.loads(re.search(r"const choices = (.+);", (site / "index.html").read_text())[1])
    assert [(c["torch"], c["cuda"], c["folder"]) for c in choices] == [
        ("2.13", "13.0", "cu130/torch2.13"),
        ("2.12", "12.6", "cu126/torch2.12"),
    ]
    assert choices[0]["pythons"] == ["3.11", "3.12", "3.13", "3.14"]
    assert choices[0]["archs"] == ["x86_64"]


def test_what_is_no_longer_proven_leaves_the_index(site, small_matrix):
    index.write(site, small_matrix)
    next(site.glob("records/*-cu130-py*")).unlink()
    index.write(site, small_matrix)
    assert not (site / "cu130/torch2.13/flash-attn/index.html").exists()
    assert listed(site, "cu126/torch2.12") == ["129"]


def test_nothing_is_written_without_a_site_or_proofs(site, small_matrix, tmp_path):
    with pytest.raises(CiError, match="no such folder"):
        index.write(tmp_path / "none", small_matrix)
    assert not (tmp_path / "none").exists()
    for record in site.glob("records/*"):
        record.unlink()
    with pytest.raises(CiError, match="no wheel is proven"):
        index.write(site, small_matrix)
    assert not (site / "index.html").exists()
