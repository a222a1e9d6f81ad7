"""Kill and resume runs: `python -m experiments.interruption` regenerates docs/results/interruption.md.

Three small jobs of `train.py` first run to the end: one samples its buffer, one annotates existing rows, and one
samples and trains in three rounds. Each job is then started many times, killed with SIGKILL, resumed (and sometimes
killed again), and compared with the uninterrupted run. Half of the kills come at random times; the other half come
before a random file operation in the run directory, to hit the short moments in which files are written. `--quick`
tests the script.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro

from experiments.interruption_differences import differences

ROOT = Path(__file__).resolve().parent.parent
_AUDIT_EVENTS = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
_COMMON = [
    "--mesh", "fsdp=1", "--evaluation.samples-per-prompt", "2", "--evaluation.max-tokens", "8",
    "--evaluation.times", "3", "--evaluation.no-greedy", "--batch-size", "4", "--save-every", "3",
]  # fmt: skip
_SAMPLED = [
    "--warm-start.steps", "6", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "48",
    "--collection.prompts", "48", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "8", "--evaluation.prompts", "4", "--epochs", "2",
]  # fmt: skip
_ROUNDS = [
    "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16", "--rounds", "3",
    "--round.reference", "previous", "--collection.prompts", "12", "--collection.prompts-per-batch", "4",
    "--collection.samples-per-prompt", "4", "--collection.sampling.max-tokens", "8", "--evaluation.prompts", "4",
    "--optimizer.learning-rate", "1e-3", "--epochs", "2",
]  # fmt: skip
# Number of kills by job.
KILLS = {"sampled": 20, "data": 10, "rounds": 30}


@dataclasses.dataclass(frozen=True)
class Options:
    """Number of kills, and directories."""

    kills: int | None = None
    """Kills per job; default: 20 (sampled), 10 (data) and 30 (rounds)."""
    seed: int = 0
    """Random seed of the kills."""
    jobs: tuple[str, ...] = tuple(KILLS)
    """Jobs to run."""
    runs: Path = Path("runs/interruption")
    """Directory of the runs; must be empty or missing."""
    out: Path | None = None
    """Directory of the page; default: docs/results, or RUNS/page with `kills` or `quick`."""
    quick: bool = False
    """Test the script with two kills of the first job."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """When to kill: after CPU time, or before a file operation.

    Attributes:
        seconds: CPU time after config.json was written, if `folder` is None.
        folder: folder name below which file operations count; "" for the whole run directory.
        change: index of the operation, counted from 1.
    """

    seconds: float = 0.0
    folder: str | None = None
    change: int = 0


@dataclasses.dataclass
class Outcome:
    """Result of one kill.

    Attributes:
        job: name of the job.
        kill: the first kill.
        stages: stage of the run at each kill.
        starts: number of times the run was started.
        differences: differences from the uninterrupted run; empty if there are none.
    """

    job: str
    kill: Kill
    stages: list[str]
    starts: int
    differences: list[str]


# ---- file operations and kills ----

_watchers: list[tuple[str, Callable[[str], None]]] = []


@contextlib.contextmanager
def watching(directory: Path, change: Callable[[str], None]) -> Iterator[None]:
    """Call `change` with the relative path before each file operation of Python below a directory.

    Covers opening for writing, creating, renaming and removing; writes by native code are not seen.
    """
    if not hasattr(watching, "installed"):
        watching.installed = True
        sys.addaudithook(_audit_hook)
    watcher = (os.path.realpath(directory), change)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _audit_hook(event: str, arguments: tuple) -> None:
    if not _watchers:
        return
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in _AUDIT_EVENTS:
        path = arguments[0]
    else:
        return
    if isinstance(path, int):
        return
    path = os.path.realpath(os.fsdecode(path))
    for directory, change in list(_watchers):
        if path == directory or path.startswith(directory + os.sep):
            change(os.path.relpath(path, directory))


def _is_below(path: str, folder: str) -> bool:
    """Whether a path has a parent folder of this name; always true for an empty name."""
    return not folder or folder in Path(path).parts


def child(directory: str, folder: str, number: str, log: str, *arguments: str) -> None:
    """Run `train.py` and kill it before a file operation.

    Args:
        directory: the run directory.
        folder: folder name below which operations count.
        number: index of the operation; "" to run to the end.
        log: file that lists the paths of all operations; "" for none.
        *arguments: arguments of `train.py`.
    """
    count = 0

    def change(path: str) -> None:
        nonlocal count
        if log:
            with open(log, "a") as file:
                file.write(path + "\n")
        if number and _is_below(path, folder):
            count += 1
            if count == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    import train
    from shiq_jax.replay import storage

    # Small shards, so that a small buffer has several.
    storage.SHARD_ROWS = 8
    with watching(Path(directory), change):
        train.main(list(arguments))


# ---- jobs ----


def prepare(root: Path) -> dict[str, list[str]]:
    """Create the inputs of the jobs in `root` and return the jobs' arguments by name."""
    from shiq_jax.runs.run_directory import write_jsonl
    from shiq_jax.tasks.sorting import sorting_rows
    from shiq_jax.tasks.tiny import tiny_directory

    root.mkdir(parents=True, exist_ok=True)
    model = str(tiny_directory(root / "model", **_SIZES))
    rows = [
        row | {"completion": answer, "reward": float(answer == row["answer"])}
        for row in sorting_rows(32)
        for answer in (row["answer"], row["answer"][::-1])
    ]
    # The first shard has the longest prompt, so that the padding of the others depends on it.
    rows[0] |= {"prompt": rows[0]["prompt"] * 8}
    write_jsonl(root / "scored.jsonl", rows)
    write_jsonl(root / "held_out.jsonl", sorting_rows(4, split="held_out"))
    data = ["--data", str(root / "scored.jsonl"), "--evaluation.data", str(root / "held_out.jsonl")]
    training = ["--optimizer.learning-rate", "1e-3", "--epochs", "2", "--reward", "sorting"]
    return {
        "sampled": ["shiq", "--model", model, *_COMMON, *_SAMPLED],
        "rounds": ["shiq", "--model", model, *_COMMON, *_ROUNDS],
        "data": ["shiq", "--model", model, *_COMMON, *data, *training],
    }


def start(
    arguments: Sequence[str], run: Path, cache: Path, *, kill: Kill | None = None, log: Path | None = None
) -> tuple[int, float]:
    """Start or resume a job in its directory and kill it.

    Args:
        arguments: arguments of `train.py`.
        run: the run directory.
        cache: directory of the compilation cache.
        kill: when to kill the process; None to run to the end.
        log: file that lists the paths of all file operations.

    Returns:
        The exit status, and the CPU seconds after config.json was written.
    """
    inside = kill is not None and kill.folder is not None
    resume = ["--resume"] if (run / "config.json").exists() else []
    code = "import sys; from experiments.interruption import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(run), kill.folder if inside else "", str(kill.change) if inside else ""]
    command += [str(log or ""), *arguments, "--output-dir", str(run), *resume]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with open(run.with_name(run.name + ".log"), "ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        start_seconds, elapsed = None, 0.0
        while process.poll() is None:
            seconds = _cpu_seconds(process.pid)
            if start_seconds is None and (run / "config.json").exists():
                start_seconds = seconds
            elapsed = seconds - start_seconds if start_seconds is not None else 0.0
            if kill is not None and not inside and start_seconds is not None and elapsed >= kill.seconds:
                process.kill()
            time.sleep(0.005)
    return process.returncode, elapsed


def _cpu_seconds(process: int) -> float:
    """CPU time of a process, which does not depend on the load of the machine."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def stage(run: Path, shards: int) -> str:
    """Infer the stage of a killed run from its directory; `shards` is the number of shards of the finished buffer."""
    from shiq_jax.runs.run_directory import RunDirectory

    directory = RunDirectory(run)
    if directory.summary.exists():
        return "finished"
    latest = directory.latest_round()
    if latest.policy.exists() or latest.policy.with_name(f"{latest.policy.name}.partial").exists():
        return "exporting"
    if latest.checkpoints.exists():
        saving = any(not path.name.isdigit() for path in latest.checkpoints.iterdir())
        return "checkpointing" if saving else "updating"
    if (latest.buffer / "manifest.json").exists():
        manifest = json.loads((latest.buffer / "manifest.json").read_text())
        record_files = {shard["file"] for shard in manifest["shards"]}
        annotated = [entry for stats in manifest["statistics"].values() for entry in stats["shards"].values()]
        files = {path.relative_to(latest.buffer).as_posix() for path in latest.buffer.rglob("*.arrow*")}
        listed = record_files | {entry.get("file") for entry in annotated}
        if files - listed or (latest.buffer / "manifest.json.tmp").exists():
            return "writing the buffer"
        if len(record_files) < shards:
            return "reading data" if json.loads(directory.config.read_text())["data"] else "sampling"
        return "evaluating" if len(annotated) == shards else "annotating"
    if latest.buffer.exists():
        return "writing the buffer"
    if directory.warm_start.exists() and not directory.reference.exists():
        return "warm start"
    return "setting up"


# ---- the experiment ----


def main(options: Options) -> None:
    """Kill and resume the jobs, compare them with uninterrupted runs, and write the page."""
    if options.quick:
        options = dataclasses.replace(options, kills=2, jobs=options.jobs[:1])
    rng, root = np.random.default_rng(options.seed), options.runs.absolute()
    jobs = {name: arguments for name, arguments in prepare(root).items() if name in options.jobs}
    kills_by_job, durations, outcomes = {}, {}, []
    for name, arguments in jobs.items():
        whole, log = root / name, root / f"{name}.changes"
        # The first run fills the compilation cache; the second measures the duration of later runs.
        first, _ = start(arguments, root / f"{name}-first", root / "cache")
        second, durations[name] = start(arguments, whole, root / "cache", log=log)
        if first or second:
            raise SystemExit(f"an uninterrupted run failed: see {whole}*.log")
        count, changes = KILLS[name] if options.kills is None else options.kills, log.read_text().split()
        kills_by_job[name] = [_random_kill(rng, index, durations[name], changes) for index in range(count)]
    for name, kills in kills_by_job.items():
        for index, kill in enumerate(kills):
            outcomes.append(_kill_and_resume(jobs[name], name, kill, root, index, durations[name], rng))
            print(_row(outcomes[-1]), flush=True)
    out = options.out or (ROOT / "docs" / "results" if options.kills is None else root / "page")
    out.mkdir(parents=True, exist_ok=True)
    (out / "interruption.md").write_text(render(outcomes, durations, options))
    if any(outcome.differences for outcome in outcomes):
        raise SystemExit(f"some resumed runs differ from the uninterrupted run: see {out / 'interruption.md'}")


def _random_kill(rng, index: int, duration: float, changes: list[str]) -> Kill:
    if index % 2 == 0:
        return Kill(seconds=float(rng.uniform(0, duration)))
    folder = ("buffer", "checkpoints", "")[index // 2 % 3]
    candidates = [path for path in changes if _is_below(path, folder) and path != "config.json"]
    return Kill(folder=folder, change=int(rng.integers(1, len(candidates) + 1)))


def _kill_and_resume(arguments, name: str, kill: Kill, root: Path, index: int, duration: float, rng) -> Outcome:
    from shiq_jax.runs.run_directory import RunDirectory

    run, whole = root / f"{name}-{index:02d}", root / name
    buffer = RunDirectory(whole).latest_round().buffer
    shards = len(json.loads((buffer / "manifest.json").read_text())["shards"])
    second_kill = [Kill(seconds=float(rng.uniform(0, duration)))] if rng.random() < 0.3 else []
    stages = []
    for starts, next_kill in enumerate([kill, *second_kill, None], 1):
        status, _ = start(arguments, run, root / "cache", kill=next_kill)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            return Outcome(name, kill, stages, starts, [f"exit status {status}: see {run}.log"])
        stages.append(stage(run, shards))
    return Outcome(name, kill, stages, starts, differences(run, whole))


def _row(outcome: Outcome) -> str:
    kill = outcome.kill
    when = f"{kill.seconds:.2f} s" if kill.folder is None else f"before change {kill.change} in {kill.folder or 'all'}"
    equal = "yes" if not outcome.differences else "**no**: " + "; ".join(outcome.differences)
    return f"| {outcome.job} | {when} | {', then '.join(outcome.stages) or 'finished'} | {outcome.starts} | {equal} |"


def render(outcomes: Sequence[Outcome], durations: dict[str, float], options: Options) -> str:
    """Render the Markdown page."""
    import jax

    equal = sum(not outcome.differences for outcome in outcomes)
    stages = sorted({stage for outcome in outcomes for stage in outcome.stages} - {"finished"})
    seconds = ", ".join(f"`{name}` {duration:.1f} s" for name, duration in durations.items())
    rows = "\n".join(map(_row, outcomes))
    machine = f"{os.cpu_count()} CPU cores, jax {jax.__version__}, Python {platform.python_version()}"
    return f"""# Killed and resumed runs

Of {len(outcomes)} runs killed with SIGKILL and resumed with `--resume`, {equal} ended in the same state as the
uninterrupted run. Exported weights, reference, buffer, statistics and samples are identical byte for byte, checkpoints
have the same arrays, and the log differs only in times.

| job | killed | stage | starts | equal |
|---|---|---|---|---|
{rows}

    python -m experiments.interruption

- `sampled` runs a warm start, samples, scores, trains, evaluates and exports; `data` annotates existing rows instead of
  sampling; `rounds` samples, scores and trains three times, each time from the previous policy.
- Half of the kills come at a random CPU time after `config.json` was written; the uninterrupted runs take {seconds}.
- The other half come just before a file operation of Python in the buffer, in the checkpoints, or anywhere in the run
  directory.
- Some resumed runs were killed again; their stages are listed in order.
- "Finished" means that the kill came after the summary was written.
- The kills hit these stages: {", ".join(stages)}.
- Seed {options.seed}; {machine}; {datetime.date.today()}.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
