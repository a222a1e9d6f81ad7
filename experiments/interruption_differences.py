"""Comparison of an interrupted and resumed run with an uninterrupted one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

# Logged times differ between identical runs.
_TIMES = ("seconds", "waited", "compiled", "tokens_per_second")


def differences(run: Path, whole: Path) -> list[str]:
    """Files and checkpoints of a resumed run that differ from those of an uninterrupted one; empty if none do.

    Logged times and figures are not compared.

    Args:
        run: directory of the resumed run.
        whole: directory of the uninterrupted run.
    """
    result = []
    files, expected = _files(run), _files(whole)
    result += [f"{name} is {'missing' if name in expected else 'unexpected'}" for name in sorted(files ^ expected)]
    for name in sorted(files & expected):
        if name.endswith(".png"):
            continue
        read = _rows_without_times if name in ("metrics.jsonl", "summary.json") else Path.read_bytes
        if read(run / name) != read(whole / name):
            result.append(f"{name} differs")
    for directory in sorted(whole.rglob("checkpoints")):
        result += _compare_checkpoints(run / directory.relative_to(whole), directory)
    return result


def _files(directory: Path) -> set[str]:
    files = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    # task.json contains the path of the run; checkpoints are compared by their arrays.
    return {path.as_posix() for path in files if "checkpoints" not in path.parts and path.name != "task.json"}


def _rows_without_times(path: Path) -> list[dict]:
    rows = [json.loads(text) for text in ([path.read_text()] if path.suffix == ".json" else path.open())]
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]


def _compare_checkpoints(run: Path, whole: Path) -> list[str]:
    from orbax.checkpoint import v1 as ocp

    names, expected_names = (
        {path.name for path in directory.iterdir()} if directory.exists() else set() for directory in (run, whole)
    )
    if names != expected_names:
        return [f"{run.name} has checkpoints {sorted(names)}, expected {sorted(expected_names)}"]
    result = []
    for name in sorted(names):
        with warnings.catch_warnings():
            # Orbax warns because shardings are read from the checkpoint.
            warnings.simplefilter("ignore")
            checkpoint, expected = (ocp.load_checkpointables(directory.absolute() / name) for directory in (run, whole))
        for part in ("policy", "memory"):
            arrays, expected_arrays = checkpoint[part], expected[part]
            same = arrays.keys() == expected_arrays.keys() and all(
                np.array_equal(array, expected_arrays[leaf]) for leaf, array in arrays.items()
            )
            result += [] if same else [f"checkpoint {name}: {part} differs"]
    return result
