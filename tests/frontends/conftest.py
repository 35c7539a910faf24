"""Makes the folder's own builders importable; one small checkpoint for all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    import tiny_checkpoint

    return tiny_checkpoint.write(tmp_path_factory.mktemp("model"))
