"""What tests of the generator share."""

import pytest

from codegen import render


@pytest.fixture(scope="module")
def mirror():
    """The rendered flash_attn/_abi.py, without importing the package."""
    namespace: dict = {"__name__": "_abi"}
    exec(compile(render.render_abi_module(), "_abi.py", "exec"), namespace)
    return namespace
