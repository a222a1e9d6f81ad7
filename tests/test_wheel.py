"""The built wheel, installed outside the repository, trains and evaluates."""

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


def output_of(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Standard output and error of a command that runs without this repository on its path."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def bin_directory(tmp_path_factory) -> Path:
    """`bin` directory of a virtual environment with the wheel and the dependencies of the current environment."""
    directory = tmp_path_factory.mktemp("wheel")
    # Build from a copy, because setuptools writes into the source tree.
    source = directory / "source"
    shutil.copytree(ROOT / "shiq_jax", source / "shiq_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    output_of(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    output_of(sys.executable, "-m", "venv", "--without-pip", directory / "env", cwd=directory)
    python = directory / "env" / "bin" / "python"
    output_of(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=directory)
    # Python does not read .pth files in a directory added by a .pth file, so the editable install of this repository
    # stays hidden.
    (packages,) = (directory / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
def test_installed_commands_train_and_evaluate(bin_directory, tmp_path):
    location = output_of(bin_directory / "python", "-c", "import shiq_jax; print(shiq_jax.__file__)", cwd=tmp_path)
    assert Path(location.strip()).is_relative_to(bin_directory.parent)
    output_of(bin_directory / "shiq-train", *SMALL, cwd=tmp_path)
    run = tmp_path / "runs" / "shiq"
    assert (run / "export" / "model.safetensors").exists() and (run / "summary.json").exists()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "sort: ba", "answer": "ab"}\n')
    options = ["--reward", "exact", "--max-tokens", "4", "--output-dir", "eval"]
    output_of(bin_directory / "shiq-eval", "--model", run, "--data", "rows.jsonl", *options, cwd=tmp_path)
    assert "reward" in json.loads((tmp_path / "eval" / "evaluation.json").read_text())


def test_error_messages_start_with_the_program_name(bin_directory, tmp_path):
    message = output_of(
        bin_directory / "shiq-train", "dpo", "--data", "none.jsonl", "--model", ".", cwd=tmp_path, status=2
    )
    assert message.startswith("shiq-train: ")
    message = output_of(bin_directory / "shiq-eval", "--model", ".", "--data", "none.jsonl", cwd=tmp_path, status=2)
    assert message.startswith("shiq-eval: ")
