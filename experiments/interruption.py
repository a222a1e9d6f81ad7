"""Killing runs: `python -m experiments.interruption` regenerates docs/results/interruption.md.

Three small jobs of `train.py` are run once to the end: one samples its buffer, one annotates given rows, and one
samples and learns in three rounds. Then each is started again and again, killed with SIGKILL, resumed (and sometimes
killed once more), and what it leaves is compared with the undisturbed run. Half of the kills come at random times, the
other half from inside, before a random one of the operations by which the process changes its directory, so that they
fall into the short moments in which files are written. `--quick` tries the script itself.
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
_CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
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
# Moments at which each job is killed.
KILLS = {"sampled": 20, "data": 10, "rounds": 30}


@dataclasses.dataclass(frozen=True)
class Options:
    """How many kills, and where everything goes."""

    kills: int | None = None
    """Moments at which each job is killed; by default 20, 10 and 30."""
    seed: int = 0
    """Of the moments."""
    jobs: tuple[str, ...] = tuple(KILLS)
    """Which jobs."""
    runs: Path = Path("runs/interruption")
    """Where the runs are kept; must be empty or missing."""
    out: Path | None = None
    """Directory of the page; default: docs/results, or beside the runs where `kills` is given or with `quick`."""
    quick: bool = False
    """Two kills of the first job."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A moment: so many seconds of processor time after config.json was made, or before the n-th change in a place."""

    seconds: float = 0.0
    place: str | None = None
    change: int = 0


@dataclasses.dataclass
class Outcome:
    """One kill: of which job, where it fell, how often the run was started in all, and what then differed."""

    job: str
    kill: Kill
    stages: list[str]
    starts: int
    differences: list[str]


# ---- watching and killing ----

_watchers: list[tuple[str, Callable[[str], None]]] = []


@contextlib.contextmanager
def watching(directory: Path, change: Callable[[str], None]) -> Iterator[None]:
    """Call `change` with the relative path of whatever Python is about to change in a directory.

    It sees files opened for writing, names made, changed and removed; not what native code writes by itself.
    """
    if not hasattr(watching, "installed"):
        watching.installed = True
        sys.addaudithook(_audit)
    watcher = (os.path.realpath(directory), change)
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _audit(event: str, arguments: tuple) -> None:
    if not _watchers:
        return
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in _CHANGES:
        path = arguments[0]
    else:
        return
    if isinstance(path, int):
        return
    path = os.path.realpath(os.fsdecode(path))
    for directory, change in list(_watchers):
        if path == directory or path.startswith(directory + os.sep):
            change(os.path.relpath(path, directory))


def _within(path: str, place: str) -> bool:
    """Whether a changed path lies in a directory of this name, or anywhere for an empty one."""
    return not place or place in Path(path).parts


def child(directory: str, place: str, number: str, log: str, *arguments: str) -> None:
    """Run `train.py` with arguments; SIGKILL comes before the n-th change in a place, and `log` gets all changes."""
    seen = 0

    def change(path: str) -> None:
        nonlocal seen
        if log:
            with open(log, "a") as file:
                file.write(path + "\n")
        if number and _within(path, place):
            seen += 1
            if seen == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    import train
    from shiq_jax.replay import storage

    # Small shards, so that the annotation of few records takes several.
    storage.SHARD_ROWS = 8
    with watching(Path(directory), change):
        train.main(list(arguments))


# ---- jobs ----


def prepare(root: Path) -> dict[str, list[str]]:
    """The arguments of the jobs by name; what they read is made in `root`."""
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
    # The first shard is the widest, so that the padding of the others is not what they need themselves.
    rows[0] |= {"prompt": rows[0]["prompt"] * 8}
    write_jsonl(root / "scored.jsonl", rows)
    write_jsonl(root / "held_out.jsonl", sorting_rows(4, split="held_out"))
    given = ["--data", str(root / "scored.jsonl"), "--evaluation.data", str(root / "held_out.jsonl")]
    rate = ["--optimizer.learning-rate", "1e-3", "--epochs", "2", "--reward", "sorting"]
    return {
        "sampled": ["shiq", "--model", model, *_COMMON, *_SAMPLED],
        "rounds": ["shiq", "--model", model, *_COMMON, *_ROUNDS],
        "data": ["shiq", "--model", model, *_COMMON, *given, *rate],
    }


def start(
    arguments: Sequence[str], run: Path, cache: Path, *, kill: Kill | None = None, log: Path | None = None
) -> tuple[int, float]:
    """Run a job in its directory, or go on with it, and kill it at a moment.

    Returns:
        its exit status, and the seconds of processor time that it took after its run had a config.json.
    """
    inside = kill is not None and kill.place is not None
    resume = ["--resume"] if (run / "config.json").exists() else []
    code = "import sys; from experiments.interruption import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(run), kill.place if inside else "", str(kill.change) if inside else ""]
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
        began, spent = None, 0.0
        while process.poll() is None:
            used = _processor_seconds(process.pid)
            if began is None and (run / "config.json").exists():
                began = used
            spent = used - began if began is not None else 0.0
            if kill is not None and not inside and began is not None and spent >= kill.seconds:
                process.kill()
            time.sleep(0.005)
    return process.returncode, spent


def _processor_seconds(process: int) -> float:
    """What Linux has counted for a process; unlike the clock's, its seconds do not grow with the load."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def stage(run: Path, shards: int) -> str:
    """What a killed run was at, as its directory tells; `shards` are those of its whole buffer."""
    from shiq_jax.runs.run_directory import RunDirectory

    whole = RunDirectory(run)
    if whole.summary.exists():
        return "over"
    here = whole.latest_round()
    if here.policy.exists() or here.policy.with_name(f"{here.policy.name}.partial").exists():
        return "exporting"
    if here.checkpoints.exists():
        saving = any(not path.name.isdigit() for path in here.checkpoints.iterdir())
        return "checkpointing" if saving else "updating"
    if (here.buffer / "manifest.json").exists():
        manifest = json.loads((here.buffer / "manifest.json").read_text())
        listed = {shard["file"] for shard in manifest["shards"]}
        covered = [entry for made in manifest["statistics"].values() for entry in made["shards"].values()]
        found = {path.relative_to(here.buffer).as_posix() for path in here.buffer.rglob("*.arrow*")}
        named = listed | {entry.get("file") for entry in covered}
        if found - named or (here.buffer / "manifest.json.tmp").exists():
            return "writing the buffer"
        if len(listed) < shards:
            return "reading data" if json.loads(whole.config.read_text())["data"] else "sampling"
        return "evaluating" if len(covered) == shards else "annotating"
    if here.buffer.exists():
        return "writing the buffer"
    if whole.warm_start.exists() and not whole.reference.exists():
        return "warm start"
    return "setting up"


# ---- the experiment ----


def main(options: Options) -> None:
    """Kill, resume, compare, and write the page."""
    if options.quick:
        options = dataclasses.replace(options, kills=2, jobs=options.jobs[:1])
    random, root = np.random.default_rng(options.seed), options.runs.absolute()
    jobs = {name: arguments for name, arguments in prepare(root).items() if name in options.jobs}
    moments, lengths, outcomes = {}, {}, []
    for name, arguments in jobs.items():
        whole, log = root / name, root / f"{name}.changes"
        # Twice, because the first time compiles what later ones find in the cache.
        first, _ = start(arguments, root / f"{name}-first", root / "cache")
        second, lengths[name] = start(arguments, whole, root / "cache", log=log)
        if first or second:
            raise SystemExit(f"an undisturbed run failed: see {whole}*.log")
        count = KILLS[name] if options.kills is None else options.kills
        moments[name] = [_moment(random, index, lengths[name], log.read_text().split()) for index in range(count)]
    for name, kills in moments.items():
        for index, kill in enumerate(kills):
            outcomes.append(_try(jobs[name], name, kill, root, index, lengths[name], random))
            print(_row(outcomes[-1]), flush=True)
    out = options.out or (ROOT / "docs" / "results" if options.kills is None else root / "page")
    out.mkdir(parents=True, exist_ok=True)
    (out / "interruption.md").write_text(render(outcomes, lengths, options))
    if any(outcome.differences for outcome in outcomes):
        raise SystemExit("some runs differ: see the page")


def _moment(random, index: int, length: float, changes: list[str]) -> Kill:
    if index % 2 == 0:
        return Kill(seconds=float(random.uniform(0, length)))
    place = ("buffer", "checkpoints", "")[index // 2 % 3]
    behind = [path for path in changes if _within(path, place) and path != "config.json"]
    return Kill(place=place, change=int(random.integers(1, len(behind) + 1)))


def _try(arguments, name: str, kill: Kill, root: Path, index: int, length: float, random) -> Outcome:
    from shiq_jax.runs.run_directory import RunDirectory

    run, whole = root / f"{name}-{index:02d}", root / name
    buffer = RunDirectory(whole).latest_round().buffer
    shards = len(json.loads((buffer / "manifest.json").read_text())["shards"])
    again = [Kill(seconds=float(random.uniform(0, length)))] if random.random() < 0.3 else []
    stages = []
    for starts, each in enumerate([kill, *again, None], 1):
        status, _ = start(arguments, run, root / "cache", kill=each)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            return Outcome(name, kill, stages, starts, [f"exit status {status}: see {run}.log"])
        stages.append(stage(run, shards))
    return Outcome(name, kill, stages, starts, differences(run, whole))


def _row(outcome: Outcome) -> str:
    kill = outcome.kill
    when = f"{kill.seconds:.2f} s" if kill.place is None else f"before change {kill.change} in {kill.place or 'all'}"
    equal = "yes" if not outcome.differences else "**no**: " + "; ".join(outcome.differences)
    return f"| {outcome.job} | {when} | {', then '.join(outcome.stages) or 'over'} | {outcome.starts} | {equal} |"


def render(outcomes: Sequence[Outcome], lengths: dict[str, float], options: Options) -> str:
    """The page."""
    import jax

    equal = sum(not outcome.differences for outcome in outcomes)
    fell = sorted({stage for outcome in outcomes for stage in outcome.stages} - {"over"})
    seconds = ", ".join(f"`{name}` {length:.1f} s" for name, length in lengths.items())
    rows = "\n".join(map(_row, outcomes))
    return f"""# Killed runs

Of {len(outcomes)} runs that were killed with SIGKILL and resumed with `--resume`, {equal} ended as the undisturbed run
did: the same files, with the same bytes in the exported weights, the reference, the buffer and its statistics and the
samples, the same arrays in the same checkpoints, and the same log but for its clocks.

`sampled` makes a warm start, samples, scores, updates, evaluates and exports; `data` annotates given rows instead of
sampling; `rounds` samples, scores and learns three times, each time from the policy before. From its `config.json` on
each takes {seconds} of processor time, of which the moments given in seconds are random parts. Every other kill comes from inside, just before an operation by which Python
changes the run's directory: in the buffer, among the checkpoints, or anywhere. Some resumed runs were killed again.
"Over" is a run that was killed after its summary was written. The kills fell into: {", ".join(fell)}.

| job | killed | while | starts | equal |
|---|---|---|---|---|
{rows}

Seed {options.seed}, {os.cpu_count()} CPU cores, jax {jax.__version__}, Python {platform.python_version()},
{datetime.date.today()}. This page is written by `python -m experiments.interruption`.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
