"""The serving example: the cache changes no token, pages come back, a wrong cache would be seen."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn
from examples import serve

ROOT = Path(flash_attn.__file__).parents[1]
TINY = ["--requests", "9", "--prompt", "40", "--new", "12", "--pages", "9", "--width", "64"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which wait for one another where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_token_is_that_of_attention_without_a_cache():
    server, finished = serve.serve(serve.parse(TINY))
    assert len(finished) == 9 and all(len(request.generated) == request.wanted for request in finished)
    for request in finished:
        same, total = server.agreement(request)
        assert same == total


def test_requests_share_the_pages_and_give_them_back():
    args = serve.parse(TINY)
    server, waiting = serve.Server(args), serve.make_requests(args)
    most = 0
    while waiting or server.running:
        server.step(waiting)
        held = [page for request in server.running for page in request.pages]
        assert len(set(held)) == len(held) and sorted(held + server.pages.free) == list(range(args.pages))
        most = max(most, len(server.running))
    assert most > 1 and len(server.pages.free) == args.pages


def test_a_wrong_page_would_be_seen(monkeypatch):
    real = serve.flash_attn_with_kvcache

    def wrong(*arguments, block_table, **named):
        return real(*arguments, block_table=block_table.roll(1, 0), **named)

    monkeypatch.setattr(serve, "flash_attn_with_kvcache", wrong)
    server, finished = serve.serve(serve.parse(TINY))
    same, total = (sum(x) for x in zip(*map(server.agreement, finished), strict=True))
    assert same < 0.9 * total


@pytest.mark.parametrize(
    "arguments", [["--pages", "2"], ["--heads", "3"], ["--requests", "0"], ["--seed", "-1"]], ids=str
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.parse(arguments)
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_on_a_terminal_a_bar_counts_the_requests(terminal):
    with terminal as shown:
        serve.serve(serve.parse(TINY))
    assert re.search(r"100%.* 9/9 .* 0 running, 9 pages free\]", shown.getvalue())


def test_without_tqdm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*: pip install '\.\[examples\]'"):
        runpy.run_path(serve.__file__)


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/serve.py", *TINY], capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^9 requests, \d+ tokens, [\d,]+ tokens/s$", done.stdout, re.M)
    assert done.stderr == ""  # no bar without a terminal
    assert "tokens that were checked are those of attention without a cache" in done.stdout
