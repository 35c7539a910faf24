"""Debian's chromium without a window: a page's DOM after loading, what it said on the console, a picture of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--hide-scrollbars",
)


def open_page(page: Path, profile: Path, *, width: int = 1200, dark: bool = False) -> tuple[str, list[str]]:
    """The DOM as text, and every line that the page wrote to the console."""
    assert PROGRAM is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [
            PROGRAM,
            *FLAGS,
            *scheme,
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)
