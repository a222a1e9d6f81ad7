"""Cost of private update steps relative to non-private ones: `python -m benchmarks.privacy --json FILE`.

Full AdamW steps of the same model on the same examples and device run interleaved; the rows are ratios of median times.
Each row uses the fastest of its methods. Speed goals apply to a 1.5B Llama on an accelerator; with SmolLM2-135M on a
CPU only the goals for memory and for the comparison with Opacus apply.

    python -m benchmarks.privacy --json FILE               full benchmark, nearly an hour on two cores
    python -m benchmarks.privacy --quick --json FILE       test the script: tiny model, no peers
    python -m benchmarks.privacy --only T512 --json FILE   selected parts; other rows of FILE are kept
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
from benchmarks.peers import OPACUS, worker_environment
from benchmarks.private_steps import SHAPES, Steps, Workload, settings
from benchmarks.rows import Row
from benchmarks.workers import Worker, run_interleaved, seconds_per_step
from shiq_jax.tasks import fetch

# Row -> part, candidate methods, goal on an accelerator.
FLAT = ("vmap", "ghost", "bk", "scan")
RATIOS = {
    "full_T2048": ("T2048", (*FLAT, "group"), 0.85),
    "full_T1024": ("T1024", (*FLAT, "group"), 0.80),
    "lora_T1024": ("lora", (*FLAT, "group"), 0.90),
    "flat_ghost_T512": ("T512", ("ghost",), 0.55),
    "groupwise_T512": ("T512", ("group",), 0.85),
}
PARTS = ("T512", "memory", "lora", "T1024", "opacus", "T2048")
MEMORY_GOAL, JAX_PRIVACY_GOAL, OPACUS_GOAL = 1.2, 1.2, 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the privacy benchmark."""

    json: Path
    """Output file; rows that are not measured again are kept."""
    quick: bool = False
    """Test the script with a tiny model and without peers."""
    shape: Literal[tuple(SHAPES)] = "smollm2-135m"
    """Model; computes in float32 on a CPU and in bfloat16 elsewhere."""
    only: tuple[Literal[PARTS], ...] = PARTS
    """Parts to measure."""
    repeats: int = 3
    """Timings per step."""
    peers: Path = Path("runs/peers")
    """Directory of the Opacus virtual environment."""
    runs: Path = Path("runs/privacy")
    """Directory for logs."""
    page: Path | None = None
    """Markdown page whose tables are replaced."""

    def workload(self, length: int, units: int, **kwargs: Any) -> Workload:
        """A workload of `units` sequences of `length` tokens; `quick` shortens it and uses the tiny model."""
        shape = "tiny" if self.quick else self.shape
        return Workload(length // 16 if self.quick else length, units, shape, **kwargs)


def main(options: Options) -> None:
    """Measure, print the rows, and write them."""
    rows.prepare(options.quick, options.json, options.page)
    if options.page and not options.page.is_file():
        sys.exit(f"{options.page} does not exist: name a page with the lines <!-- table --> and <!-- end of table -->")
    if options.quick:
        print("quick: tiny model without peers; their rows stay empty", file=sys.stderr)
    previous = json.loads(options.json.read_text()) if options.json.exists() else {}
    details = previous.get("details", {})
    for part in options.only:
        print(f"measuring {part}", file=sys.stderr)
        details[part] = globals()[f"measure_{part.lower()}"](options)
        rows.write_json(options.json, table(details), details=details)
    rows.print_table("privacy", table(details))
    if options.page:
        rows.replace_table(options.page, rows.markdown(table(details)) + "\n\n" + settings_table(details))


def measure_t2048(options: Options) -> dict:
    """Two long units; methods that process both units at once run in two parts to limit memory."""
    methods = ("vmap, 2 parts", "ghost, 2 parts", "bk, 2 parts", "group, 2 parts", "scan")
    return time_settings(options, options.workload(2048, 2), ("plain", "plain, 2 parts", *methods))


def measure_t1024(options: Options) -> dict:
    """Two units with every method; a subset with `quick`."""
    return time_settings(options, options.workload(1024, 2), ("plain", "bk", "group") if options.quick else ())


def measure_t512(options: Options) -> dict:
    """Four units with every method, and jax_privacy with microbatches of one, two and four units."""
    return time_settings(options, options.workload(512, 4), jax_privacy=() if options.quick else (1, 2, 4))


def measure_lora(options: Options) -> dict:
    """Two units; only rank-16 adapters on all linear maps are trained."""
    names = ("plain", "vmap", "group") if options.quick else ()
    return time_settings(options, options.workload(1024, 2, rank=16), names)


def measure_memory(options: Options) -> dict:
    """Peak resident memory of each setting, in a separate process."""
    workload, results = options.workload(512, 4), {}
    candidates = settings(workload.units)
    if options.quick:
        candidates = {name: candidates[name] for name in ("plain", "scan")}
    for name, (method, parts) in candidates.items():
        arguments = [json.dumps(workload._asdict()), method, str(parts)]
        command = [sys.executable, "-m", "benchmarks.private_steps", *arguments]
        stdout = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[name] = json.loads(stdout.strip().splitlines()[-1])
        print(f"  {name}: {results[name]['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr)
    return {"work": workload._asdict(), "settings": results}


def measure_opacus(options: Options) -> dict:
    """Ghost clipping of this library and of Opacus, each with its own non-private step; the head is untied."""
    workload = options.workload(512, 2, tied=False)
    if options.quick:
        return time_settings(options, workload, ("plain", "ghost"))
    model, logs = str(fetch.smollm2()), options.runs / "logs"
    peers = [
        Worker(
            f"opacus {mode}",
            OPACUS.command(options.peers, [model, "512", "2", mode]),
            logs / f"{mode}.log",
            worker_environment(),
        )
        for mode in ("plain", "ghost")
    ]
    return time_settings(options, workload, ("plain", "plain, 2 parts", "ghost", "scan"), peers=peers)


def time_settings(
    options: Options,
    workload: Workload,
    names: Iterable[str] = (),
    jax_privacy: Iterable[int] = (),
    peers: Iterable[Worker] = (),
) -> dict:
    """Time steps of a workload, interleaved across settings.

    Args:
        options: benchmark options.
        workload: model and units of the steps.
        names: settings of this library; empty for all.
        jax_privacy: microbatch sizes of the jax_privacy settings.
        peers: workers of other libraries.
    """
    steps, available = Steps(workload), settings(workload.units)
    available |= {f"jax_privacy, {size} at once": ("jax_privacy", size) for size in jax_privacy}
    names = list(names) or list(available)
    if options.quick:
        names = [name for name in names if available[name][1] == 1]
    with contextlib.ExitStack() as stack:
        timed_workers = [InProcessWorker(name, steps, *available[name]) for name in names]
        timed_workers += [stack.enter_context(worker) for worker in peers]
        if peers:
            timed_workers = [SecondStep(worker) for worker in timed_workers]
        timings = run_interleaved(timed_workers, 2 if options.quick else options.repeats)
    results = {
        name: {"seconds": seconds_per_step(steps_taken), "turns": [step["seconds"] for step in steps_taken]}
        for name, steps_taken in timings.items()
    }
    for name, result in results.items():
        print(f"  {name}: {result['seconds']:.2f} s", file=sys.stderr)
    trainable = steps.trainable_size
    del steps, timed_workers
    gc.collect()
    jax.clear_caches()
    return {"work": workload._asdict(), "trainable": trainable, "settings": results}


class SecondStep:
    """Times the second of two consecutive steps, because the first one runs with cold caches after an idle period."""

    def __init__(self, worker):
        self.name, self._worker = worker.name, worker

    def step(self) -> dict[str, float]:
        """Run two steps and return the timing of the second."""
        self._worker.step()
        return self._worker.step()


class InProcessWorker:
    """A setting of `Steps` with the interface of `Worker`, compiled on construction."""

    def __init__(self, name: str, steps: Steps, method: str, parts: int):
        self.name, self._steps, self._setting = name, steps, (method, parts)
        steps(*self._setting)

    def step(self) -> dict[str, float]:
        """Run and time one step."""
        start = time.perf_counter()
        self._steps(*self._setting)
        return {"seconds": time.perf_counter() - start}


def table(details: Mapping[str, dict]) -> list[Row]:
    """Rows computed from the measurements."""
    goals = jax.default_backend() != "cpu"
    # Goals do not apply to the tiny model.
    full_size = all(part["work"]["shape"] != "tiny" for part in details.values())
    result = []
    for name, (part, methods, goal) in RATIOS.items():
        value, note = None, ""
        if part in details:
            plain, best = fastest(details[part], ("plain",)), fastest(details[part], methods)
            value = plain[1] / best[1]
            note = f"{best[0]}: {best[1]:.2f} s; {plain[0]}: {plain[1]:.2f} s"
        result.append(Row(name, value, "x", goal if goals else None, note=note))
    return result + [_memory_row(details, full_size), _jax_privacy_row(details, goals), _opacus_row(details)]


def _memory_row(details: Mapping[str, dict], goals: bool) -> Row:
    """Peak memory of the leanest flat-clipping method; the note adds the peak of the fastest one."""
    value, note = None, ""
    if "memory" in details:
        peaks = {name: result["peak_bytes"] for name, result in details["memory"]["settings"].items()}
        best, plain = (min(_with_method(peaks, methods), key=peaks.get) for methods in (FLAT, ("plain",)))
        value = peaks[best] / peaks[plain]
        names = [best, plain, *([fastest(details["T512"], FLAT)[0]] if "T512" in details else [])]
        note = "; ".join(f"{name}: {peaks[name] / 1e9:.2f} GB" for name in dict.fromkeys(names) if name in peaks)
    return Row("memory_best", value, "x", MEMORY_GOAL if goals else None, True, note)


def _jax_privacy_row(details: Mapping[str, dict], goals: bool) -> Row:
    """Time of jax_privacy's fastest setting over this library's, with the same clip rule."""
    value, note = None, ""
    if any(name.startswith("jax_privacy") for name in details.get("T512", {}).get("settings", ())):
        own, peer = (fastest(details["T512"], methods) for methods in (FLAT, ("jax_privacy",)))
        value, note = peer[1] / own[1], f"{own[0]}: {own[1]:.2f} s; {peer[0]}: {peer[1]:.2f} s"
    return Row("vs_jax_privacy_T512", value, "x", JAX_PRIVACY_GOAL if goals else None, note=note)


def _opacus_row(details: Mapping[str, dict]) -> Row:
    """Slowdown of ghost clipping in this library over its slowdown in Opacus."""
    value, note = None, ""
    results = details.get("opacus", {}).get("settings", {})
    if "opacus ghost" in results:
        own = results["ghost"]["seconds"] / fastest(details["opacus"], ("plain",))[1]
        peer = results["opacus ghost"]["seconds"] / results["opacus plain"]["seconds"]
        value, note = own / peer, f"shiq_jax: {own:.2f} of its plain step; Opacus: {peer:.2f} of its plain step"
    return Row("vs_opacus_ghost_T512", value, "x", OPACUS_GOAL, True, note)


def fastest(part: Mapping[str, Any], methods: Iterable[str]) -> tuple[str, float]:
    """The fastest setting of the given methods, and its seconds."""
    seconds = {name: result["seconds"] for name, result in part["settings"].items()}
    name = min(_with_method(seconds, methods), key=seconds.get)
    return name, seconds[name]


def _with_method(results: Mapping[str, Any], methods: Iterable[str]) -> list[str]:
    return [name for name in results if name.partition(",")[0] in set(methods)]


def settings_table(details: Mapping[str, dict]) -> str:
    """Markdown tables of all settings: seconds, ratio to the plain step, and peak memory."""
    lines = ["| workload | setting | median s | all s | plain / setting |", "|---|---|---|---|---|"]
    for part, measured in details.items():
        if part == "memory":
            continue
        workload = Workload(**measured["work"])
        label = f"{part}: {workload.units} x {workload.length}"
        plain = fastest(measured, ("plain",))[1]
        for name, result in measured["settings"].items():
            base = measured["settings"]["opacus plain"]["seconds"] if name.startswith("opacus") else plain
            seconds = ", ".join(f"{turn:.2f}" for turn in result["turns"])
            lines.append(f"| {label} | {name} | {result['seconds']:.2f} | {seconds} | {base / result['seconds']:.2f} |")
    lines += ["", "| setting | peak memory, GB | ratio to the leanest plain step |", "|---|---|---|"]
    peaks = {name: result["peak_bytes"] for name, result in details.get("memory", {}).get("settings", {}).items()}
    for name, peak in peaks.items():
        least = min(peaks[plain] for plain in _with_method(peaks, ("plain",)))
        lines.append(f"| {name} | {peak / 1e9:.2f} | {peak / least:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
