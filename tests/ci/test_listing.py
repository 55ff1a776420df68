import json

from ci import listing


def test_the_table_has_every_pair(small_matrix):
    lines = listing.table(small_matrix).splitlines()
    assert lines[1].split() == ["2.12", "12.6", "129", "3.10-3.14", "cu126/torch2.12"]
    assert lines[5] == "build 129: CUDA 12.9, 80 90, for PyPI"


def test_json(small_matrix):
    data = json.loads(listing.as_json(small_matrix))
    assert [build["tag"] for build in data["builds"]] == ["129", "130"]
    assert data["builds"][0]["image"].startswith("quay.example/image@sha256:")
    assert data["pairs"][0]["variant"] == "cu126"


def test_github_outputs_are_job_matrices(small_matrix):
    outputs = dict(line.split("=", 1) for line in listing.github(small_matrix, 2).splitlines())
    shards = json.loads(outputs["shards"])["include"]
    assert [(row["cuda"], row["shard"]) for row in shards] == [
        ("12.9", "1/2"), ("12.9", "2/2"), ("13.0", "1/2"), ("13.0", "2/2")
    ]  # fmt: skip
    assert len(json.loads(outputs["pairs"])["include"]) == 3
