"""Make each peer's virtual environment from PyPI alone, at low priority; what fails is kept as the reason why a row is missing.

    python benchmarks/peers/install.py [--into FOLDER] [torch ctranslate2 openvino llama ipex]

The folder is $QPASS_PEERS, else ~/.cache/qpass-peers. Never while a benchmark runs: llama.cpp is built from source.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """``variants`` are what a run measures by default, ``environment`` is for the installation."""

    packages: tuple[str, ...]
    script: str
    variants: tuple[str, ...]
    title: str
    environment: dict[str, str] = field(default_factory=dict)


PEERS = {
    "torch": Peer(
        ("torch==2.13.*", "torchao>=0.18", "transformers>=5.20,<6", "accelerate"),
        "torch_peer.py",
        ("eager", "inductor", "torchao-int8", "torchao-w8a8", "torchao-int4", "torchao-w4a8"),
        "PyTorch",
    ),
    "ctranslate2": Peer(
        ("ctranslate2>=4.8", "transformers<5", "torch==2.13.*"), "ctranslate2_peer.py", ("int8",), "CTranslate2"
    ),
    "openvino": Peer(
        ("openvino-genai", "openvino-tokenizers", "optimum-intel[openvino]", "nncf", "torch==2.13.*"),
        "openvino_peer.py",
        ("int4", "int8"),
        "OpenVINO GenAI",
    ),
    "llama": Peer(
        ("llama-cpp-python>=0.3.30", "gguf", "numpy"),
        "llama_peer.py",
        ("Q4_0", "Q8_0"),
        "llama.cpp",
        {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON"},  # GCC: its AMX path is off (see README.md)
    ),
    "ipex": Peer(
        ("torch==2.8.*", "intel-extension-for-pytorch==2.8.0", "transformers==4.48.*", "accelerate"),
        "ipex_peer.py",
        ("bf16", "int8", "int4", "smoothquant"),
        "IPEX",
    ),
}


def folder() -> Path:
    return Path(os.environ.get("QPASS_PEERS") or Path.home() / ".cache" / "qpass-peers")


def why_not(into: Path, name: str) -> str | None:
    """None for a peer that is ready, else a sentence."""
    if (into / name / "installed").exists():
        return None
    failed = into / f"{name}.failed"
    return failed.read_text().strip() if failed.exists() else f"not installed; run python {HERE.name}/install.py {name}"


def install(into: Path, name: str) -> bool:
    peer, venv, log = PEERS[name], into / name, into / f"{name}.log"
    into.mkdir(parents=True, exist_ok=True)
    (into / f"{name}.failed").unlink(missing_ok=True)
    with log.open("w") as out:
        made = subprocess.run([sys.executable, "-m", "venv", str(venv)], stdout=out, stderr=out)
        pip = ["nice", "-n", "10", str(venv / "bin" / "pip"), "install", *peer.packages]
        done = (
            made.returncode or subprocess.run(pip, stdout=out, stderr=out, env=os.environ | peer.environment).returncode
        )
    if done:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        (into / f"{name}.failed").write_text(
            f"pip could not install it: {errors[-1].strip() if errors else 'see ' + str(log)}"
        )
        return False
    (venv / "installed").touch()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--into", type=Path, default=folder())
    args = parser.parse_args()
    if strange := set(args.peers) - set(PEERS):
        parser.error(f"{min(strange)}: accepted are {', '.join(PEERS)}")
    for name in args.peers or PEERS:
        good = why_not(args.into, name) is None or install(args.into, name)
        print(f"{name}: {'ready' if good else why_not(args.into, name)}", flush=True)


if __name__ == "__main__":
    main()
