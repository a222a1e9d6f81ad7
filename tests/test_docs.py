"""The documentation builds without warnings, and the code that it names exists."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["ARCHITECTURE.md", "README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


def test_mkdocs_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "api" / "objectives" / "index.html").read_text()
    assert "shiq_loss" in page and "Soft Bellman residuals" in page


@pytest.mark.parametrize("page", PAGES)
def test_names_of_modules_functions_and_classes_exist(page):
    names = re.findall(r"`(shiq_jax(?:\.\w+)+)`", (ROOT / page).read_text())
    missing = [name for name in names if not _exists(name)]
    assert not missing


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "README.md"])
def test_paths_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text) + re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert not [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "shiq_jax"))]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            obj = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            if not hasattr(obj, part):
                return False
            obj = getattr(obj, part)
        return True
    return False
