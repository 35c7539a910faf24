"""Fuzz one format's reader, guided by the branches that it takes: ``python -m tests.checkpoints.fuzz_reader FORMAT [OPTION...]``

Options are libFuzzer's (``-max_total_time=60``). A file that finds a bug is written into the working directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["qpass.checkpoints"]):
    from tests.checkpoints.readings import read, seed


def main() -> None:
    format, *options = sys.argv[1:]
    with TemporaryDirectory() as folder:
        path = Path(folder) / ("m.gguf" if format == "gguf" else "m.safetensors")
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        sound, _ = seed(format)
        (corpus / "sound").write_bytes(sound)

        def one(data: bytes) -> None:
            path.unlink(missing_ok=True)  # the last one may still be mapped
            path.write_bytes(data)
            read(format, path)

        atheris.Setup([sys.argv[0], f"-max_len={len(sound) + 64}", "-rss_limit_mb=4096", *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
