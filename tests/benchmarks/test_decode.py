"""The decoding benchmark: the problems of its table, their bytes, and the table for the README."""

from benchmarks import decode
from benchmarks.providers import CUDNN, OURS, TORCH_FA2


def test_problems_are_heads_by_sizes():
    problems = list(decode.problems())
    assert len(problems) == len(set(problems)) == len(decode.HEADS) * len(decode.SIZES)
    assert all(problem.num_heads % problem.num_heads_k == 0 for problem in problems)


def test_bytes_are_those_of_keys_and_values_in_16_bits():
    problem = decode.Problem(32, 8, 64, 4096)
    assert problem.kv_bytes == 2 * 64 * 4096 * 8 * 128 * 2


def test_the_table_has_ratios_to_ours_and_dashes_for_what_does_not_run():
    facts = {
        "device": "GPU",
        "driver": "1",
        "torch": "2",
        "dtype": "bf16",
        "date": "today",
        "commit": "c0ffee",
    }
    sizes = {"num_heads": 32, "num_heads_k": 8, "batch": 64, "seqlen": 4096}
    records = [
        {**sizes, "us": {OURS: 250.0, TORCH_FA2: 400.0, CUDNN: 245.0, "page 16": 255.0}},
        {**sizes, "us": {OURS: 100.0, TORCH_FA2: 150.0}},
    ]
    *_, header, rule, first, second = decode.markdown(records, facts).splitlines()
    header, first, second = ([cell.strip() for cell in line.split("|")] for line in (header, first, second))
    assert header[4:-1] == [f"{OURS}, us", "TB/s", TORCH_FA2, CUDNN, "page 16"]
    assert set(rule) == {"|", "-"} and rule.count("|") == 9
    assert first[1:-1] == ["32/8", "64", "4096", "250.0", "4.29", "1.60", "0.98", "1.02"]
    assert second[-4:-1] == ["1.50", "-", "-"]
