"""Where a step's time and a process's memory go: `python -m benchmarks.profile [--quick] [--json FILE]`.

The time is that of one step of `pairs` on a CPU, by what ran at each moment; the memory is what was resident after each
stage of a process that does such steps.
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

from benchmarks import ours, rows, serving, works
from benchmarks.rows import Row
from shiq_jax.models import load_hf
from shiq_jax.tasks import fetch
from shiq_jax.tasks.tiny import tiny_directory


class Ran(NamedTuple):
    """A piece of program: when, in nanoseconds, and what kind it was."""

    begin: int
    end: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path | None = None
    """Where the rows go."""
    quick: bool = False
    """A tiny model: the numbers mean nothing."""
    remat: str = "full"
    """What the backward pass computes again: `none`, `dots` or `full`."""


def main(options: Options) -> None:
    """Train three steps and print time and memory."""
    rows.prepare(options.quick, options.json)
    with tempfile.TemporaryDirectory() as directory:
        stages, shares = measure(Path(directory), options.remat, options.quick)
    found = table(stages, shares)
    rows.show("profile", found)
    if options.json:
        rows.write_json(options.json, found)


def measure(place: Path, remat: str, quick: bool) -> tuple[dict[str, int], collections.Counter]:
    """Bytes that were resident after each stage, and nanoseconds of the third step by what ran.

    place: an empty directory.
    """
    stages = {"python, jax and this library": serving.resident_bytes()}
    works.write(works.WORKS["pairs"], place / "work.json", tiny=quick)
    steps = json.loads((place / "work.json").read_text())
    model = str(tiny_directory(place / "model", num_layers=2) if quick else fetch.smollm2())
    decoder, params = load_hf(model, remat=remat)
    buffer = ours.filled(place / "buffer", model, decoder, params, steps)
    batches, state, update = ours.training(decoder, params, buffer, "dpo", len(steps[0]))
    del params
    batch = batches(0).batch
    stages["with parameters and moments"] = serving.resident_bytes()
    compiled = update.lower(state, batch).compile()
    stages["with the compiled step"] = serving.resident_bytes()
    for number in range(3):
        if number == 2:
            jax.profiler.start_trace(place / "trace")
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
    jax.profiler.stop_trace()
    stages["at most, in a step"] = serving.peak_bytes()
    (trace,) = (place / "trace").rglob("*.xplane.pb")
    return stages, by_moment(list(ran(trace, kinds_of(compiled.as_text()))))


def table(stages: Mapping[str, int], shares: collections.Counter) -> list[Row]:
    """Memory by stage, and time by what ran."""
    total = sum(shares.values())
    return [Row(f"memory: {name}", size / 1e9, "GB") for name, size in stages.items()] + [
        Row(f"time: {kind}", time / 1e9, "s", note=f"{time / total:.0%} of the step")
        for kind, time in shares.most_common()
    ]


def kinds_of(program: str) -> dict[str, str]:
    """What each instruction of a compiled program is: a product, a product of attention, the optimiser or other."""
    bodies = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\) -> .*?\{\n(.*?)^\}", program, re.S | re.M)
    products = {name for name, body in bodies if " dot(" in body}
    found = {}
    for name, operation, rest in re.findall(r"%?([\w.\-]+) = \S+ (fusion|dot|copy|custom-call|scatter)\((.*)", program):
        called, source = re.search(r"calls=%?([\w.\-]+)", rest), re.search(r'op_name="([^"]*)"', rest)
        source = source[1] if source else ""
        if operation == "dot" or (called and called[1] in products):
            # Attention's products are the only ones written as einsums.
            found[name] = "product within attention" if "->" in source else "product with a weight matrix"
        else:
            found[name] = "other" if "jvp(" in source else "norms and optimiser"
    return found


def ran(trace: Path, kinds: dict[str, str]) -> Iterator[Ran]:
    """What the threads of the CPU did."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in kinds and "Eigen" in line.name:
                    yield Ran(event.start_ns, event.start_ns + event.duration_ns, kinds[event.name])


def by_moment(pieces: list[Ran]) -> collections.Counter:
    """Nanoseconds by the first of the kinds that ran: products, then the others, then nothing."""
    changes = sorted({moment for piece in pieces for moment in piece[:2]})
    waiting, under_way, found = sorted(pieces, reverse=True), [], collections.Counter()
    for moment, after in itertools.pairwise(changes):
        while waiting and waiting[-1].begin <= moment:
            under_way.append(waiting.pop())
        under_way = [piece for piece in under_way if piece.end > moment]
        kinds = {piece.kind for piece in under_way}
        first = next((kind for kind in sorted(kinds) if kind.startswith("product")), None)
        if first is None and "norms and optimiser" in kinds:
            first = "norms and optimiser"
        if first is None:
            first = f"other, on {'one core' if len(under_way) == 1 else 'both cores'}" if kinds else "nothing"
        found[first] += after - moment
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
