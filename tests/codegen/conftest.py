"""What tests of the generator, of compiling and of wheels share."""

import hashlib
import io
import json
import zipfile
from types import SimpleNamespace

import pytest

from codegen import render, version
from codegen.compilation.selection import VARIABLES


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No selection from outside, and one compilation at a time."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")


@pytest.fixture(scope="module")
def mirror():
    """The rendered flash_attn/_abi.py, without importing the package."""
    namespace: dict = {"__name__": "_abi"}
    exec(compile(render.render_abi_module(), "_abi.py", "exec"), namespace)
    return namespace


def wheel_name(cuda, platform="linux_x86_64", release="2.8.3", python="py3-none"):
    """File name of a wheel that a CUDA (130 for 13.0) built."""
    return f"flash_attn-{release}-{cuda}-{python}-{platform}.whl"


def wheel_bytes(name, manifest=(), **files):
    """A wheel with the contents that its name promises; ``files`` overrides members, None leaves one out."""
    python, abi, platforms = name.removesuffix(".whl").split("-")[-3:]
    tags = "".join(f"Tag: {python}-{abi}-{platform}\n" for platform in platforms.split("."))
    build = {
        "project_version": version("PROJECT_VERSION"),
        "targets": ["sm80:80", "sm80:100+ptx", "sm86:86", "sm90:90"],
        "head_dims": [64, 128],
        "dtypes": ["bf16"],
        "directions": ["forward"],
        **dict(manifest),
    }
    members = {
        "flash_attn/__init__.py": "",
        "flash_attn/libflash_attn.so": "library",
        "flash_attn/_build.json": json.dumps(build),
        "flash_attn-2.8.3.dist-info/METADATA": "Metadata-Version: 2.4\nName: flash-attn\nVersion: 2.8.3\n",
        "flash_attn-2.8.3.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n{tags}",
        "flash_attn-2.8.3.dist-info/RECORD": "",
        **files,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for member, text in members.items():
            if text is not None:
                archive.writestr(member, text)
    return content.getvalue()


def html_page(files):
    """The project's page of an index as PEP 503 has it; ``files`` maps names to bytes."""
    links = [
        f'<a href="{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a><br>'
        for name, content in files.items()
    ]
    return "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"


def json_page(files):
    """The same page as PEP 691 has it."""
    listed = [
        {"filename": name, "url": name, "hashes": {"sha256": hashlib.sha256(content).hexdigest()}}
        for name, content in files.items()
    ]
    return json.dumps({"meta": {"api-version": "1.0"}, "name": "flash-attn", "files": listed})


@pytest.fixture
def wheels():
    """The functions above, which make wheels and index pages."""
    return SimpleNamespace(name=wheel_name, content=wheel_bytes, html=html_page, json=json_page)


@pytest.fixture
def wheel_folder(tmp_path, wheels):
    """Writes an index of wheels (names to bytes) into a folder and returns that."""

    def write(files, page="index.html", at="simple/flash-attn"):
        folder = tmp_path / "index"
        (folder / at).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / at / name).write_bytes(content)
        text = wheels.json(files) if page.endswith("json") else wheels.html(files)
        (folder / at / page).write_text(text)
        return folder

    return write
