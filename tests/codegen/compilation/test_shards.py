import json

import pytest

from codegen import CodegenError, units
from codegen.compilation import builder, selection

SMALL = {"FLASH_ATTN_ARCHS": "80;86", "FLASH_ATTN_HEAD_DIMS": "64", "FLASH_ATTN_DTYPES": "bf16"}


@pytest.fixture
def chosen():
    return selection.from_environment(SMALL)


@pytest.fixture
def compiled(fake_toolkit, small_templates, chosen, tmp_path):
    """Objects of both halves of the selection, each compiled in a build folder of its own."""
    for i in (1, 2):
        builder.compile_shard(
            chosen, f"{i}/2", tmp_path / f"build{i}", tmp_path / f"parts/{i}", small_templates
        )
    return tmp_path / "parts"


def calls(fake_toolkit):
    log = fake_toolkit / "calls.log"
    made = log.read_text().split()
    log.unlink()
    return made


def test_shards_are_compiled_once_and_linked(compiled, fake_toolkit, small_templates, chosen, tmp_path):
    made = calls(fake_toolkit)
    assert len(made) == len(set(made)) == len(units.list_units(chosen)) + 3
    assert "libflash_attn.so" not in made
    builder.adopt_objects(chosen, compiled, tmp_path / "build", small_templates)
    builder.build(chosen, tmp_path / "build", tmp_path / "out", small_templates)
    assert calls(fake_toolkit) == ["libflash_attn.so"]
    described = json.loads((tmp_path / "out/_build.json").read_text())
    assert described["kernels"] == [unit.key for unit in units.list_units(chosen)]


def test_an_edit_after_adopting_compiles_again(compiled, fake_toolkit, small_templates, chosen, tmp_path):
    builder.adopt_objects(chosen, compiled, tmp_path / "build", small_templates)
    builder.build(chosen, tmp_path / "build", tmp_path / "out", small_templates)
    calls(fake_toolkit)
    with (small_templates / "problem/scale.cuh").open("a") as file:
        file.write("// edited\n")
    builder.build(chosen, tmp_path / "build", tmp_path / "out", small_templates)
    assert len(calls(fake_toolkit)) == len(units.list_units(chosen)) + 4


def test_objects_that_do_not_fit_are_refused(compiled, small_templates, chosen, tmp_path):
    def refused(words):
        with pytest.raises(CodegenError, match=words):
            builder.adopt_objects(chosen, compiled, tmp_path / "build", small_templates)
        assert not (tmp_path / "build/objects").exists()

    (compiled / "2").rename(tmp_path / "away")
    refused("lacks the objects of ")
    (tmp_path / "away").rename(compiled / "2")
    (compiled / "3").mkdir()
    (compiled / "3/shard.json").write_text((compiled / "2/shard.json").read_text())
    refused("compiled twice")
    (compiled / "3/shard.json").unlink()
    (small_templates / "problem/scale.cuh").write_text("#pragma once\nconstexpr float kScale = 3.0f;\n")
    refused("made of other sources")


def test_objects_from_a_cache_are_not_compiled_again(
    compiled, fake_toolkit, small_templates, chosen, tmp_path
):
    def compile_again():
        out = compiled / "2"
        builder.compile_shard(chosen, "2/2", tmp_path / "fresh", out, small_templates)
        return (fake_toolkit / "calls.log").exists() and calls(fake_toolkit)

    calls(fake_toolkit)
    assert not compile_again()
    next((compiled / "2").glob("*.o")).unlink()
    assert compile_again()
    with (small_templates / "problem/scale.cuh").open("a") as file:
        file.write("// edited\n")
    assert compile_again()
    assert not compile_again()
