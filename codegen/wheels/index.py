"""A package index (PEP 503 or 691; a URL, or a folder that holds one): what it lists, and the files."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import Request, url2pathname, urlopen

from codegen import PROJECT, CodegenError

PAGES = (f"{PROJECT}/", f"simple/{PROJECT}/")
"""Where an index has the project's page: it may be named by its root or by its ``simple`` folder."""

JSON = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
TIMEOUT_S = 30
CHUNK = 1 << 20


class NoIndex(CodegenError):
    """There is no index there, or it cannot be reached."""


class WheelError(CodegenError):
    """An index or a wheel is there but wrong: damaged, ambiguous, or not what it says it is."""


@dataclass(frozen=True)
class Listed:
    """A file of an index: its name, its URL, and its sha256 in hexadecimal ("" if the index gives none)."""

    name: str
    url: str
    sha256: str


def list_files(index: str) -> list[Listed]:
    """The project's files in an index, without yanked ones; raises NoIndex, WheelError."""
    url, content_type, text = _read_page(index)
    parse = _parse_json if "json" in content_type else _parse_html
    try:
        files = [Listed(name, _join(url, link), sha256.lower()) for name, link, sha256 in parse(text, url)]
        return [file for file in files if _is_sane(file, url)]
    except ValueError as error:
        raise WheelError(f"{url} holds a link that is no URL: {error}") from None


def _join(page: str, link: str) -> str:
    return urldefrag(urljoin(page, link)).url


def _is_sane(file: Listed, page: str) -> bool:
    """Whether the name is no path, and the link does not lead from a server to the files of this machine."""
    schemes = {"http", "https", urlsplit(page).scheme}
    return urlsplit(file.url).scheme in schemes and Path(file.name).name == file.name


def location(index: str) -> str:
    """The index as a URL that ends in a slash; raises WheelError for what is neither a URL nor a folder."""
    try:
        parts = urlsplit(index)
    except ValueError as error:
        raise WheelError(f"FLASH_ATTN_WHEEL_INDEX is no URL: {error}") from None
    if parts.scheme in ("http", "https"):
        if "@" in parts.netloc:
            raise WheelError("FLASH_ATTN_WHEEL_INDEX must not hold a user name or a password")
        return index.rstrip("/") + "/"
    folder = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(index).expanduser()
    if not folder.is_absolute():
        raise WheelError(f"FLASH_ATTN_WHEEL_INDEX must be an http(s) URL or an absolute path, not {index!r}")
    return folder.as_uri() + "/"


def _read_page(index: str) -> tuple[str, str, str]:
    """URL, content type and text of the project's page."""
    root = location(index)
    reasons = []
    for page in _pages(root):
        try:
            with _open(page) as answer:
                return answer.geturl(), answer.headers.get_content_type(), answer.read().decode()
        except UnicodeDecodeError as error:
            raise WheelError(f"{page} is not an index page: {error}") from None
        except (OSError, HTTPException, ValueError) as error:
            reasons.append(f"{page}: {error}")
            if not (isinstance(error, HTTPError) and error.code in (404, 410)):
                break
    raise NoIndex("; ".join(reasons) or f"no {PAGES[1]}index.json or index.html in {index}")


def _pages(root: str) -> list[str]:
    """URLs at which the project's page may be; of a folder, those that are there."""
    if not root.startswith("file:"):
        return [root + page for page in PAGES]
    names = [root + page + name for page in PAGES for name in ("index.json", "index.html")]
    return [name for name in names if Path(url2pathname(urlsplit(name).path)).is_file()]


def _open(url: str) -> Any:
    return urlopen(Request(url, headers={"Accept": ACCEPT, "User-Agent": PROJECT}), timeout=TIMEOUT_S)


def _parse_json(text: str, url: str) -> list[tuple[str, str, str]]:
    """Name, link and sha256 of each file of a PEP 691 page."""
    try:
        page = json.loads(text)
        api = str(page["meta"]["api-version"])
        files = [
            (str(file["filename"]), str(file["url"]), str(file["hashes"].get("sha256", "")))
            for file in page["files"]
            if not file.get("yanked")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WheelError(f"{url} is not an index page of PEP 691: {error!r}") from None
    if not api.startswith("1."):
        raise WheelError(f"{url} is an index page of version {api}; known: 1.x")
    return files


def _parse_html(text: str, url: str) -> list[tuple[str, str, str]]:
    """Name, link and sha256 of each file of a PEP 503 page."""
    parser = _Links()
    parser.feed(text)
    files = []
    for link in parser.links:
        parts = urlsplit(link)
        sha256 = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
        name = unquote(parts.path).rpartition("/")[2]
        files.append((name, link, sha256[1] if sha256 else ""))
    return files


class _Links(HTMLParser):
    """Collects the targets of a page's anchors, without yanked files."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "a" and attributes.get("href") and "data-yanked" not in attributes:
            self.links.append(str(attributes["href"]))


def download(file: Listed, folder: Path) -> Path:
    """The file in ``folder``, its sha256 checked; fetched unless it is there already. Raises WheelError."""
    if not file.sha256:
        raise WheelError(f"the index gives no sha256 for {file.name}, so it is not taken")
    path = folder / file.name
    if path.is_file() and sha256_of(path) == file.sha256:
        return path
    try:
        with replacing(path) as partial:
            _fetch(file, partial)
            found = sha256_of(partial)
            if found != file.sha256:
                raise WheelError(
                    f"{file.url} has the sha256 {found}, the index says {file.sha256}: nothing was installed"
                )
    except (OSError, HTTPException) as error:
        raise WheelError(f"{file.url} is listed but cannot be fetched: {error}") from None
    return path


def _fetch(file: Listed, partial: Path) -> None:
    with _open(file.url) as answer, partial.open("wb") as output:
        total = int(answer.headers.get("Content-Length") or 0)
        size = f", {total / 1e6:.1f} MB" if total else ""
        print(f"flash-attn: downloading {file.name}{size}", flush=True)
        with _shown(answer, total) as source:
            shutil.copyfileobj(source, output, CHUNK)
        written = output.tell()
    if total and written != total:
        raise WheelError(f"{file.url} ended after {written} of {total} bytes: nothing was installed")


def _shown(answer: Any, total: int) -> AbstractContextManager[Any]:
    """The answer, whose reading is shown by a bar on a terminal where tqdm is installed.

    A bar is no reason to require tqdm of a build: pip shows a build's output to no terminal.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext(answer)
    bar: AbstractContextManager[Any] = tqdm.wrapattr(
        answer, "read", total=total or None, unit="B", unit_scale=True, disable=None
    )
    return bar


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which becomes ``path`` at the end, or goes if something is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
