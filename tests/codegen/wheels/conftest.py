"""What tests of wheels share: a server, an index of one wheel, and the search with its surroundings given."""

import http.server
import threading
import urllib.request

import pytest
from packaging.tags import platform_tags

from codegen.compilation import selection
from codegen.wheels import prebuilt


class Server(http.server.ThreadingHTTPServer):
    """Answers from ``pages`` (path to bytes, or to a status), notes each path in ``asked``."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.types, self.asked, self.cut = {}, {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        page = self.server.pages.get(self.path, 404)
        if isinstance(page, int):
            self.send_error(page)
            return
        self.send_response(200)
        self.send_header("Content-Type", self.server.types.get(self.path, "text/html"))
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page[: len(page) - self.server.cut] if self.path.endswith(".whl") else page)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A Server on loopback, reached without a proxy."""
    urllib.request.install_opener(None)  # it remembers the proxy of its first use
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()
    urllib.request.install_opener(None)


@pytest.fixture
def find(tmp_path):
    """prebuilt.find for an index, variables, GPUs present and the CUDA of the driver."""

    def call(index, present=None, gpus=(), **variables):
        names = {f"FLASH_ATTN_{name}": value for name, value in variables.items()}
        environ = {"FLASH_ATTN_WHEEL_INDEX": str(index), **names}
        chosen = selection.from_environment(environ, lambda: list(gpus))
        return prebuilt.find(chosen, environ, tmp_path / "downloads", lambda: present)

    return call


@pytest.fixture
def one_wheel(wheels):
    """Makes a wheel for this machine; returns its name, and an index's files: its name and content."""

    def make(cuda=130, **contents):
        name = wheels.name(cuda, list(platform_tags())[-1])
        return name, {name: wheels.content(name, **contents)}

    return make
