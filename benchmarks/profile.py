"""Time and memory profile of one `pairs` step on a CPU: `python -m benchmarks.profile [--quick] [--json FILE]`.

Time is broken down by the kind of instruction running at each moment; memory is the resident size after each stage.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import tyro

from benchmarks import ours, rows, serving, workloads
from benchmarks.rows import Row
from shiq_jax.models import load_hf
from shiq_jax.tasks import fetch
from shiq_jax.tasks.tiny import tiny_directory

PRIORITY = ("matmul: weights", "matmul: attention", "norms and optimizer")


class Event(NamedTuple):
    """One execution of an instruction; times in nanoseconds."""

    begin: int
    end: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the profile."""

    json: Path | None = None
    """Output file for the rows."""
    quick: bool = False
    """Test the script with a tiny model; the numbers are meaningless."""
    remat: str = "full"
    """Rematerialization policy: `none`, `dots` or `full`."""


def main(options: Options) -> None:
    """Train three steps and print the time and memory rows."""
    rows.prepare(options.quick, options.json)
    with tempfile.TemporaryDirectory() as directory:
        stages, times = measure(Path(directory), options.remat, options.quick)
    result = table(stages, times)
    rows.print_table("profile", result)
    if options.json:
        rows.write_json(options.json, result)


def measure(root: Path, remat: str, quick: bool) -> tuple[dict[str, int], collections.Counter]:
    """Resident bytes after each stage, and nanoseconds of the third step by kind of instruction.

    Args:
        root: an empty directory.
        remat: rematerialization policy.
        quick: use a tiny model.
    """
    stages = {"python, jax and this library": serving.resident_bytes()}
    workloads.write(workloads.WORKLOADS["pairs"], root / "workload.json", tiny=quick)
    steps = json.loads((root / "workload.json").read_text())
    model = str(tiny_directory(root / "model", num_layers=2) if quick else fetch.smollm2())
    decoder, params = load_hf(model, remat=remat)
    buffer = ours.annotated_buffer(root / "buffer", model, decoder, params, steps)
    batches, state, update = ours.training_setup(decoder, params, buffer, "dpo", len(steps[0]))
    del params
    batch = batches(0).batch
    stages["with parameters and moments"] = serving.resident_bytes()
    compiled = update.lower(state, batch).compile()
    stages["with the compiled step"] = serving.resident_bytes()
    for number in range(3):
        if number == 2:
            jax.profiler.start_trace(root / "trace")
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
    jax.profiler.stop_trace()
    stages["peak of a step"] = serving.peak_bytes()
    (trace,) = (root / "trace").rglob("*.xplane.pb")
    return stages, time_by_kind(list(trace_events(trace, classify_instructions(compiled.as_text()))))


def table(stages: Mapping[str, int], times: collections.Counter) -> list[Row]:
    """Rows of memory by stage and time by kind of instruction."""
    total = sum(times.values())
    return [Row(f"memory: {name}", size / 1e9, "GB") for name, size in stages.items()] + [
        Row(f"time: {kind}", time / 1e9, "s", note=f"{time / total:.0%} of the step")
        for kind, time in times.most_common()
    ]


def classify_instructions(program: str) -> dict[str, str]:
    """Classify the instructions of a compiled HLO program: weight matmuls, attention matmuls, optimizer, or other."""
    bodies = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*?\{\n(.*?)^\}", program, re.S | re.M)
    matmul_bodies = {name for name, body in bodies if " dot(" in body}
    kinds = {}
    for name, operation, rest in re.findall(r"%?([\w.\-]+) = \S+ (fusion|dot|copy|custom-call|scatter)\((.*)", program):
        called, op_name = re.search(r"calls=%?([\w.\-]+)", rest), re.search(r'op_name="([^"]*)"', rest)
        op_name = op_name[1] if op_name else ""
        if operation == "dot" or (called and called[1] in matmul_bodies):
            # Only the attention matmuls are written as einsums.
            kinds[name] = "matmul: attention" if "->" in op_name else "matmul: weights"
        else:
            kinds[name] = "other" if "jvp(" in op_name else "norms and optimizer"
    return kinds


def trace_events(trace: Path, kinds: dict[str, str]) -> Iterator[Event]:
    """Events of the CPU worker threads in a profiler trace."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds and "Eigen" in line.name:
                    yield Event(event.start_ns, event.start_ns + event.duration_ns, kinds[event.name])


def time_by_kind(events: list[Event]) -> collections.Counter:
    """Nanoseconds by kind of instruction; concurrent events count once, as the first of their kinds in `PRIORITY`."""
    boundaries = sorted({time for event in events for time in (event.begin, event.end)})
    pending, running, totals = sorted(events, reverse=True), [], collections.Counter()
    for time, next_time in itertools.pairwise(boundaries):
        while pending and pending[-1].begin <= time:
            running.append(pending.pop())
        running = [event for event in running if event.end > time]
        kinds = {event.kind for event in running}
        top = next((kind for kind in PRIORITY if kind in kinds), None)
        if top is None:
            top = f"other, on {'one core' if len(running) == 1 else 'both cores'}" if kinds else "idle"
        totals[top] += next_time - time
    return totals


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
