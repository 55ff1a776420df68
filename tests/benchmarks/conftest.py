"""A cuobjdump that only pretends, for tests of what reads machine code."""

import pytest


@pytest.fixture
def cuobjdump(tmp_path, monkeypatch):
    """Puts a shell script that stands in for cuobjdump into CUDA_HOME."""

    def make(script="exit 1"):
        program = tmp_path / "toolkit" / "bin" / "cuobjdump"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))

    return make
