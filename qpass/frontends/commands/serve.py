"""``qpass serve``: transformers' own server (OpenAI's protocol), in a process that knows qpass' artefacts."""

from __future__ import annotations

from qpass.errors import OptionError


def serve(model: str, options: list[str]) -> None:
    """Serve ``model`` until interrupted; ``options`` are those of ``transformers serve``.

    Raises OptionError where the server's packages are missing.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise OptionError("transformers' server is not installed: pip install 'qpass[serve]'")
    from transformers.cli.transformers import app

    import qpass.frontends.huggingface  # noqa: F401  registers the artefact

    app(args=["serve", model, *options], prog_name="qpass")
