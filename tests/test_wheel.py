"""A wheel, installed beside its dependencies alone, trains and evaluates from any directory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "--warm-start.steps", "2", "--warm-start.batch-size", "4", "--warm-start.demonstrations", "8",
    "--collection.prompts", "4", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "2", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "4", "--evaluation.times", "1", "--batch-size", "4", "--epochs", "1",
]  # fmt: skip


def said(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """What a program prints; nothing of this repository is on its path."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Directory of the programs of an environment that holds the wheel and sees the dependencies of this one."""
    place = tmp_path_factory.mktemp("wheel")
    # setuptools leaves files beside what it builds.
    source = place / "source"
    shutil.copytree(ROOT / "shiq_jax", source / "shiq_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    said(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source, cwd=place)
    (wheel,) = place.glob("*.whl")
    said(sys.executable, "-m", "venv", "--without-pip", place / "env", cwd=place)
    python = place / "env" / "bin" / "python"
    said(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    # A directory that a .pth file names is searched, but its own .pth files are not read: the editable installation of
    # this repository, which is one of them, stays out of sight.
    (packages,) = (place / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
def test_an_installed_wheel_trains_and_evaluates(installed, tmp_path):
    where = said(installed / "python", "-c", "import shiq_jax; print(shiq_jax.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    said(installed / "shiq-train", *SMALL, cwd=tmp_path)
    run = tmp_path / "runs" / "shiq"
    assert (run / "export" / "model.safetensors").exists() and (run / "summary.json").exists()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "sort: ba", "answer": "ab"}\n')
    options = ["--reward", "exact", "--max-tokens", "4", "--output-dir", "eval"]
    said(installed / "shiq-eval", "--model", run, "--data", "rows.jsonl", *options, cwd=tmp_path)
    assert "reward" in json.loads((tmp_path / "eval" / "evaluation.json").read_text())


def test_messages_begin_with_the_name_that_was_called(installed, tmp_path):
    refused = said(installed / "shiq-train", "dpo", "--data", "none.jsonl", "--model", ".", cwd=tmp_path, status=2)
    assert refused.startswith("shiq-train: ")
    refused = said(installed / "shiq-eval", "--model", ".", "--data", "none.jsonl", cwd=tmp_path, status=2)
    assert refused.startswith("shiq-eval: ")
