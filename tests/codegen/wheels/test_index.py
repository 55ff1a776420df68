import json
import sys
import urllib.request

import pytest

from codegen.wheels.index import WheelError


@pytest.mark.parametrize("kind", ["html", "json"])
@pytest.mark.parametrize("base", ["/flash-attn/", "/simple/flash-attn/"])
def test_a_wheel_of_a_server_is_taken(find, wheels, one_wheel, server, kind, base, capsys):
    name, files = one_wheel()
    server.pages = {base: getattr(wheels, kind)(files).encode(), base + name: files[name]}
    server.types = {base: f"application/vnd.pypi.simple.v1+{kind}"}
    assert find(server.url).read_bytes() == files[name]
    out, err = capsys.readouterr()
    assert f"downloading {name}, 0.0 MB" in out and err == ""
    assert find(server.url + "/") is not None
    assert server.asked.count(base + name) == 1


def test_on_a_terminal_a_bar_shows_the_download(find, one_wheel, wheel_folder, terminal):
    _, files = one_wheel()
    with terminal as shown:
        find(wheel_folder(files))
    assert "100%" in shown.getvalue()


def test_a_build_needs_no_tqdm(find, one_wheel, wheel_folder, terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    name, files = one_wheel()
    with terminal as shown:
        assert find(wheel_folder(files)).read_bytes() == files[name]
    assert shown.getvalue() == ""


def test_a_kept_download_is_checked_again(find, one_wheel, wheel_folder):
    name, files = one_wheel()
    folder = wheel_folder(files)
    find(folder).write_bytes(b"changed meanwhile")
    assert find(folder).read_bytes() == files[name]


@pytest.mark.parametrize("index", ["wheels", "ftp://wheels.example/simple", "file:relative", "http://["])
def test_an_index_is_a_url_or_an_absolute_folder(find, index):
    with pytest.raises(WheelError, match=r"http\(s\) URL or an absolute path|is no URL"):
        find(index)


def test_a_password_is_refused_and_not_repeated(find):
    with pytest.raises(WheelError, match="must not hold a user name") as error:
        find("https://someone:secret@wheels.example/simple")
    assert "secret" not in str(error.value)


def test_absence_is_no_error(find, server, tmp_path, monkeypatch, capsys):
    assert find(tmp_path) is None
    assert f"no simple/flash-attn/index.json or index.html in {tmp_path}" in capsys.readouterr().out
    assert find(server.url) is None
    assert "HTTP Error 404" in capsys.readouterr().out
    server.pages = {"/flash-attn/": 503}
    assert find(server.url) is None
    assert "HTTP Error 503" in capsys.readouterr().out
    server.pages = {"/flash-attn/": b"<html><a href='/login'>Log in</a></html>"}
    assert find(server.url) is None
    assert "no prebuilt wheel: looked in" in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    assert find(server.url) is None
    assert "Connection refused" in capsys.readouterr().out


def test_a_proxy_that_refuses(find, server, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", server.url)
    urllib.request.install_opener(None)
    server.pages = {"http://wheels.example/simple/flash-attn/": 407}
    assert find("http://wheels.example/simple") is None
    assert "HTTP Error 407" in capsys.readouterr().out


@pytest.fixture
def broken(find, server, tmp_path):
    """Expects an error for an index on the server, and nothing kept or half-written."""

    def check(words, pages):
        server.pages = pages
        with pytest.raises(WheelError, match=words):
            find(server.url)
        assert not list((tmp_path / "downloads").glob("*"))

    return check


def test_what_is_damaged_is_an_error(broken, server, wheels, one_wheel):
    name, files = one_wheel()
    page, link = wheels.html(files).encode(), f"/flash-attn/{name}"
    broken("listed but cannot be fetched: HTTP Error 404", {"/flash-attn/": page})
    broken("has the sha256 .*, the index says .*: nothing was installed", {"/flash-attn/": page, link: b"x"})
    no_hash = f'<a href="{name}">wheel</a>'.encode()
    broken("the index gives no sha256 for", {"/flash-attn/": no_hash, link: files[name]})
    broken("holds a link that is no URL", {"/flash-attn/": b"<a href='http://['>wheel</a>"})
    broken("is not an index page: ", {"/flash-attn/": b"\xff\xfe"})
    server.cut = 10
    broken("(ended after|cannot be fetched)", {"/flash-attn/": page, link: files[name]})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"meta": {"api-version": "1.0"}, "files": [1]}'])
def test_a_page_that_is_not_pep_691(broken, server, text):
    server.types = {"/flash-attn/": "application/json"}
    broken("is not an index page of PEP 691", {"/flash-attn/": text.encode()})


def test_a_page_of_the_future(broken, server):
    server.types = {"/flash-attn/": "application/json"}
    broken("of version 2.0", {"/flash-attn/": b'{"meta": {"api-version": "2.0"}, "files": []}'})


def test_yanked_files_and_foreign_links_are_not_offered(find, wheels, one_wheel, server, wheel_folder):
    name, files = one_wheel()
    folder = wheel_folder(files)
    page = wheels.html(files)
    wheel = (folder / "simple/flash-attn" / name).as_uri()
    for text in (page.replace("<a ", "<a data-yanked "), page.replace(f'"{name}', f'"{wheel}')):
        server.pages = {"/flash-attn/": text.encode()}
        assert find(server.url) is None
    listing = json.loads(wheels.json(files))
    for change in ({"yanked": "why"}, {"filename": f"../{name}"}):
        listing["files"] = [{**json.loads(wheels.json(files))["files"][0], **change}]
        (folder / "simple/flash-attn/index.json").write_text(json.dumps(listing))
        assert find(folder) is None
