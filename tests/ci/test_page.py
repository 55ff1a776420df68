"""The page of the index in a headless browser, where one is installed."""

import functools
import html
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from ci import index
from ci.publish import publish, write_record

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
CHOOSE = """
<script>
for (const [id, value] of %s) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("change", { bubbles: true }));
}
</script>
"""


@pytest.fixture
def browser(tmp_path):
    """Loads a URL and returns the text of the page's elements by id, after its scripts ran."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")

    def load(url):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        done = subprocess.run(
            [program, *flags, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=120
        )
        elements = re.findall(r'<(\w+) id="(\w+)"[^>]*>(.*?)</\1>', done.stdout, re.DOTALL)
        return {name: html.unescape(re.sub(r"<.+?>", " ", text)).split() for _, name, text in elements}

    return load


@pytest.fixture
def site(small_matrix, make_wheel, make_record, tmp_path):
    """URL and folder of a served site that offers two pairs."""
    folder = tmp_path / "site"
    for record in (
        make_record(make_wheel("130")),
        make_record(make_wheel("129", nvcc="12.9.86"), series="2.12", cuda="12.6", torch_cuda="12.6"),
    ):
        write_record(record, tmp_path / "records")
    publish(small_matrix, tmp_path / "wheels", tmp_path / "records", folder)
    index.write(folder, small_matrix)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def choosing(folder, *choices):
    """Write a copy of the page that makes these choices as a person would; returns its name."""
    script = CHOOSE % [list(choice) for choice in choices]
    (folder / "chosen.html").write_text((folder / "index.html").read_text() + script)
    return "chosen.html"


def test_the_page_before_anything_is_chosen(browser, site):
    url, _ = site
    shown = browser(f"{url}/index.html")
    assert (shown["torch"], shown["cuda"]) == (["2.13", "2.12"], ["13.0"])
    assert shown["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert shown["command"][-1] == f"{url}/cu130/torch2.13/"


def test_the_command_shown_takes_the_wheel(browser, site, tmp_path):
    url, folder = site
    python = f"3.{min(sys.version_info.minor, 14)}"
    page = choosing(folder, ("torch", "2.12"), ("cuda", "12.6"), ("python", python))
    shown = browser(f"{url}/{page}")
    command = shown["command"]
    assert command[:5] == [f"python{python}", "-m", "pip", "install", "flash-attn==2.8.3"]
    assert command[-1] == f"{url}/cu126/torch2.12/"
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-d",
        str(tmp_path / "got"),
        *command[4:],
    ]
    environment = {**os.environ, "PIP_INDEX_URL": f"{url}/nothing-else/", "PIP_NO_CACHE_DIR": "1"}
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        environment[name] = ""
    subprocess.run(download, check=True, env=environment, capture_output=True)
    (wheel,) = (tmp_path / "got").iterdir()
    assert wheel.read_bytes() == (folder / "wheels" / wheel.name).read_bytes()
    assert "-129-" in wheel.name
