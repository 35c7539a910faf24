"""Makes the folder's own builders importable, and what several files ask for."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def decoder():
    import tiny_decoders

    from qpass.runtime.decoder import Decoder

    return Decoder(tiny_decoders.build("qwen2"))
