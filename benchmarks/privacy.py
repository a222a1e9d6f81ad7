"""What privacy costs: private update steps over plain ones, `python -m benchmarks.privacy --json FILE`.

Same model, examples and device; whole steps with AdamW, which take turns; numbers are ratios of medians. Every method
is timed and the best one is the row. The goals are set for an accelerator and a Llama of 1.5B; on a CPU, with
SmolLM2-135M, only those of memory and of the comparison with Opacus count.

    python -m benchmarks.privacy --json FILE               everything, nearly an hour on two cores
    python -m benchmarks.privacy --quick --json FILE       a tiny model and our side alone: tries the script
    python -m benchmarks.privacy --only T512 --json FILE   some parts; what FILE holds of the others is kept
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from benchmarks import rows
from benchmarks.peers import OPACUS, quiet
from benchmarks.private_steps import SHAPES, Steps, Work, settings
from benchmarks.rows import Row
from benchmarks.workers import Worker, seconds_per_step, take_turns
from shiq_jax.tasks import fetch

# Row -> part, methods that it is the best of, goal on an accelerator.
FLAT = ("vmap", "ghost", "bk", "scan")
RATIOS = {
    "full_T2048": ("T2048", (*FLAT, "group"), 0.85),
    "full_T1024": ("T1024", (*FLAT, "group"), 0.80),
    "lora_T1024": ("lora", (*FLAT, "group"), 0.90),
    "flat_ghost_T512": ("T512", ("ghost",), 0.55),
    "groupwise_T512": ("T512", ("group",), 0.85),
}
PARTS = ("T512", "memory", "lora", "T1024", "opacus", "T2048")
GOAL_OF_MEMORY, GOAL_OVER_JAX_PRIVACY, GOAL_OVER_OPACUS = 1.2, 1.2, 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path
    """Where the rows go; rows that it holds and that are not measured now stay."""
    quick: bool = False
    """A tiny model and our side only."""
    shape: Literal[tuple(SHAPES)] = "smollm2-135m"
    """The model, in float32 on a CPU, with bfloat16 arithmetic elsewhere."""
    only: tuple[Literal[PARTS], ...] = PARTS
    """Which parts."""
    repeats: int = 3
    """How often each step is timed."""
    peers: Path = Path("runs/peers")
    """Where Opacus is installed."""
    runs: Path = Path("runs/privacy")
    """Where logs go."""
    page: Path | None = None
    """A Markdown file whose tables are replaced."""

    def work(self, length: int, units: int, **more: Any) -> Work:
        """So many units of so many tokens; of small ones with `quick`."""
        shape = "tiny" if self.quick else self.shape
        return Work(length // 16 if self.quick else length, units, shape, **more)


def main(options: Options) -> None:
    """Measure, print, write."""
    rows.prepare(options.quick, options.json, options.page)
    if options.quick:
        print("quick: a tiny model, and no peers, whose rows stay empty", file=sys.stderr)
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    details = known.get("details", {})
    for part in options.only:
        print(f"measuring {part}", file=sys.stderr)
        details[part] = globals()[f"measure_{part.lower()}"](options)
        rows.write_json(options.json, table(details), details=details)
    rows.show("privacy", table(details))
    if options.page:
        rows.replace_table(options.page, rows.markdown(table(details)) + "\n\n" + every_setting(details))


def measure_t2048(options: Options) -> dict:
    """Two long units; what holds both at once has no advantage here and takes twice the memory."""
    methods = ("vmap, 2 parts", "ghost, 2 parts", "bk, 2 parts", "group, 2 parts", "scan")
    return timed(options, options.work(2048, 2), ("plain", "plain, 2 parts", *methods))


def measure_t1024(options: Options) -> dict:
    """Two units, every method; some with `quick`."""
    return timed(options, options.work(1024, 2), ("plain", "bk", "group") if options.quick else ())


def measure_t512(options: Options) -> dict:
    """Four units, every method, and those of jax_privacy with one, two and four of them at once."""
    return timed(options, options.work(512, 4), theirs=() if options.quick else (1, 2, 4))


def measure_lora(options: Options) -> dict:
    """Two units; adapters of rank 16 on all linear maps learn."""
    return timed(options, options.work(1024, 2, rank=16), ("plain", "vmap", "group") if options.quick else ())


def measure_memory(options: Options) -> dict:
    """The most memory that a process of its own had resident which takes steps in one setting."""
    work, found = options.work(512, 4), {}
    known = settings(work.units)
    if options.quick:
        known = {name: known[name] for name in ("plain", "scan")}
    for name, (method, parts) in known.items():
        arguments = [json.dumps(work._asdict()), method, str(parts)]
        command = [sys.executable, "-m", "benchmarks.private_steps", *arguments]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = json.loads(said.strip().splitlines()[-1])
        print(f"  {name}: {found[name]['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr)
    return {"work": work._asdict(), "settings": found}


def measure_opacus(options: Options) -> dict:
    """Our ghost clipping and Opacus', each beside its own plain step, with a head of its own."""
    work = options.work(512, 2, tied=False)
    if options.quick:
        return timed(options, work, ("plain", "ghost"))
    model, log = str(fetch.smollm2()), options.runs / "logs"
    others = [
        Worker(f"opacus {mode}", OPACUS.command(options.peers, [model, "512", "2", mode]), log / f"{mode}.log", quiet())
        for mode in ("plain", "ghost")
    ]
    return timed(options, work, ("plain", "plain, 2 parts", "ghost", "scan"), others=others)


def timed(
    options: Options, work: Work, names: Iterable[str] = (), theirs: Iterable[int] = (), others: Iterable[Worker] = ()
) -> dict:
    """Seconds of the steps of a work in some settings, by default in all, which take turns with other programs'."""
    steps, known = Steps(work), settings(work.units)
    known |= {f"jax_privacy, {count} at once": ("jax_privacy", count) for count in theirs}
    chosen = list(names) or list(known)
    if options.quick:
        chosen = [name for name in chosen if known[name][1] == 1]
    with contextlib.ExitStack() as stack:
        contestants = [Ours(name, steps, *known[name]) for name in chosen]
        contestants += [stack.enter_context(worker) for worker in others]
        if others:
            contestants = [Warmed(each) for each in contestants]
        turns = take_turns(contestants, 2 if options.quick else options.repeats)
    found = {
        name: {"seconds": seconds_per_step(taken), "turns": [turn["seconds"] for turn in taken]}
        for name, taken in turns.items()
    }
    for name, each in found.items():
        print(f"  {name}: {each['seconds']:.2f} s", file=sys.stderr)
    numbers = steps.numbers
    del steps, contestants
    gc.collect()
    jax.clear_caches()
    return {"work": work._asdict(), "trainable": numbers, "settings": found}


class Warmed:
    """A contestant among processes: who has waited finds its memory cold, so that its first step is not counted."""

    def __init__(self, contestant):
        self.name, self._contestant = contestant.name, contestant

    def step(self) -> dict[str, float]:
        """The second of two steps."""
        self._contestant.step()
        return self._contestant.step()


class Ours:
    """A setting as a contestant; a step that has compiled is behind it."""

    def __init__(self, name: str, steps: Steps, method: str, parts: int):
        self.name, self._steps, self._setting = name, steps, (method, parts)
        steps(*self._setting)

    def step(self) -> dict[str, float]:
        """Seconds of one step."""
        began = time.perf_counter()
        self._steps(*self._setting)
        return {"seconds": time.perf_counter() - began}


def table(details: Mapping[str, dict]) -> list[Row]:
    """The rows that what was measured gives."""
    goals = jax.default_backend() != "cpu"
    # Of a tiny model nothing is asked.
    real = all(each["work"]["shape"] != "tiny" for each in details.values())
    found = []
    for name, (part, methods, goal) in RATIOS.items():
        value, note = None, ""
        if part in details:
            plain, best = fastest(details[part], ("plain",)), fastest(details[part], methods)
            value = plain[1] / best[1]
            note = f"{best[0]}: {best[1]:.2f} s; {plain[0]}: {plain[1]:.2f} s"
        found.append(Row(name, value, "x", goal if goals else None, note=note))
    return found + [_memory(details, real), _jax_privacy(details, goals), _opacus(details)]


def _memory(details: Mapping[str, dict], goals: bool) -> Row:
    """Of the leanest method of the same rule; beside it the fastest's, where that was timed on the same work."""
    value, note = None, ""
    if "memory" in details:
        peaks = {name: each["peak_bytes"] for name, each in details["memory"]["settings"].items()}
        best, plain = (min(_of(peaks, methods), key=peaks.get) for methods in (FLAT, ("plain",)))
        value = peaks[best] / peaks[plain]
        told = [best, plain, *([fastest(details["T512"], FLAT)[0]] if "T512" in details else [])]
        note = "; ".join(f"{name}: {peaks[name] / 1e9:.2f} GB" for name in dict.fromkeys(told) if name in peaks)
    return Row("memory_best", value, "x", GOAL_OF_MEMORY if goals else None, True, note)


def _jax_privacy(details: Mapping[str, dict], goals: bool) -> Row:
    """Its seconds over ours, each at its best, with the same rule."""
    value, note = None, ""
    if any(name.startswith("jax_privacy") for name in details.get("T512", {}).get("settings", ())):
        ours, other = (fastest(details["T512"], methods) for methods in (FLAT, ("jax_privacy",)))
        value, note = other[1] / ours[1], f"{ours[0]}: {ours[1]:.2f} s; {other[0]}: {other[1]:.2f} s"
    return Row("vs_jax_privacy_T512", value, "x", GOAL_OVER_JAX_PRIVACY if goals else None, note=note)


def _opacus(details: Mapping[str, dict]) -> Row:
    """How many plain steps our ghost clipping takes over how many of its own Opacus' takes."""
    value, note = None, ""
    found = details.get("opacus", {}).get("settings", {})
    if "opacus ghost" in found:
        ours = found["ghost"]["seconds"] / fastest(details["opacus"], ("plain",))[1]
        other = found["opacus ghost"]["seconds"] / found["opacus plain"]["seconds"]
        value, note = ours / other, f"ours {ours:.2f} of our plain steps; Opacus' {other:.2f} of its own"
    return Row("vs_opacus_ghost_T512", value, "x", GOAL_OVER_OPACUS, True, note)


def fastest(part: Mapping[str, Any], methods: Iterable[str]) -> tuple[str, float]:
    """The fastest setting of some methods and its seconds."""
    seconds = {name: each["seconds"] for name, each in part["settings"].items()}
    name = min(_of(seconds, methods), key=seconds.get)
    return name, seconds[name]


def _of(found: Mapping[str, Any], methods: Iterable[str]) -> list[str]:
    return [name for name in found if name.partition(",")[0] in set(methods)]


def every_setting(details: Mapping[str, dict]) -> str:
    """All settings as a Markdown table: seconds, their spread, and the plain step's share."""
    lines = ["| work | setting | median s | all s | plain / this |", "|---|---|---|---|---|"]
    for part, found in details.items():
        if part == "memory":
            continue
        work = Work(**found["work"])
        about = f"{part}: {work.units} x {work.length}"
        plain = fastest(found, ("plain",))[1]
        for name, each in found["settings"].items():
            base = found["settings"]["opacus plain"]["seconds"] if name.startswith("opacus") else plain
            turns = ", ".join(f"{seconds:.2f}" for seconds in each["turns"])
            lines.append(f"| {about} | {name} | {each['seconds']:.2f} | {turns} | {base / each['seconds']:.2f} |")
    lines += ["", "| peak memory | GB | over the leanest plain step |", "|---|---|---|"]
    peaks = {name: each["peak_bytes"] for name, each in details.get("memory", {}).get("settings", {}).items()}
    for name, peak in peaks.items():
        least = min(peaks[other] for other in _of(peaks, ("plain",)))
        lines.append(f"| {name} | {peak / 1e9:.2f} | {peak / least:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
