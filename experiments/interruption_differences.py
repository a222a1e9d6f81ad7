"""What a run that was killed and resumed left otherwise than an undisturbed one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

# What differs between two runs because clocks do.
_CLOCKS = ("seconds", "waited", "compiled", "tokens_per_second")


def differences(run: Path, whole: Path) -> list[str]:
    """What a run left that an undisturbed one did not leave in the same bytes; times of clocks are not looked at."""
    found = []
    ours, theirs = (_files(directory) for directory in (run, whole))
    found += [f"{name} {'is missing' if name in theirs else 'is left over'}" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        if name.endswith(".png"):
            continue
        read = _without_clocks if name in ("metrics.jsonl", "summary.json") else Path.read_bytes
        if read(run / name) != read(whole / name):
            found.append(f"{name} differs")
    for place in sorted(whole.rglob("checkpoints")):
        found += _compare_checkpoints(run / place.relative_to(whole), place)
    return found


def _files(directory: Path) -> set[str]:
    files = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    # Task and model name the run's own directory; checkpoints are compared by what they hold.
    return {path.as_posix() for path in files if "checkpoints" not in path.parts and path.name != "task.json"}


def _without_clocks(path: Path) -> list[dict]:
    rows = [json.loads(text) for text in ([path.read_text()] if path.suffix == ".json" else path.open())]
    return [{name: value for name, value in row.items() if name not in _CLOCKS} for row in rows]


def _compare_checkpoints(ours: Path, theirs: Path) -> list[str]:
    from orbax.checkpoint import v1 as ocp

    names = [{path.name for path in place.iterdir()} if place.exists() else set() for place in (ours, theirs)]
    if names[0] != names[1]:
        return [f"{ours.name} holds {sorted(names[0])}, not {sorted(names[1])}"]
    found = []
    for name in sorted(names[0]):
        with warnings.catch_warnings():
            # Shardings are read from the checkpoint, of which orbax warns.
            warnings.simplefilter("ignore")
            loaded = [ocp.load_checkpointables(place.absolute() / name) for place in (ours, theirs)]
        for part in ("policy", "memory"):
            one, other = (each[part] for each in loaded)
            same = one.keys() == other.keys() and all(np.array_equal(one[leaf], other[leaf]) for leaf in one)
            found += [] if same else [f"checkpoint {name}: {part} differs"]
    return found
