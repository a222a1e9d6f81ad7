"""Our update step and sampler against TRL, tunix, transformers and the machine: `python -m benchmarks.throughput`.

Same weights (SmolLM2-135M), same data, float32, one process for each contestant, which take turns step by step; numbers
are ratios of medians. Peers are installed into environments of their own below `--peers`.

    python -m benchmarks.throughput --json FILE              everything, an hour or two on two cores
    python -m benchmarks.throughput --quick --json FILE      a tiny model and our side alone, minutes: tries the script
    python -m benchmarks.throughput --only bfcl_pairs ...    some rows; what FILE holds of the others is kept
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import tyro

from benchmarks import flops, growth, rows, stalls
from benchmarks.contest import OURS, Contest
from benchmarks.peers import TRANSFORMERS, quiet
from benchmarks.rows import Row
from benchmarks.workers import Worker, seconds_per_step, take_turns
from benchmarks.works import WORKS
from shiq_jax.data.chat import encode_prompt, load_tokenizer
from shiq_jax.tasks import bfcl, fetch
from shiq_jax.tasks.tiny import tiny_directory

# By work: the goal against the best setting of any peer, and against the faster peer as it comes.
GOALS = {
    "pairs": (1.5, 2.0),
    "bfcl_pairs": (2.5, None),
    "bfcl_groups_k8": (5.0, None),
    "groups_k16_long": (10.0, None),
}
MACHINE = ("flops", "stalls", "sampling", "growth")
GPU_ROWS = (
    *(f"mfu_1p5b_{objective}_{length}" for objective in ("shiq", "dpo") for length in ("1k", "4k")),
    "mfu_7b_dpo_4k", "mfu_1p5b_groups_k8", "stats_fraction_of_floor", "sampling_tokens_per_second", "vs_torch_flash",
)  # fmt: skip


UNMEASURED = (
    *(Row(f"{name}_vs_best_peer", None, "x", goal) for name, (goal, _) in GOALS.items()),
    *(Row(name, None, "") for name in GPU_ROWS),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path
    """Where the rows go; rows that it holds and that are not measured now stay."""
    quick: bool = False
    """A tiny model, our side only, few steps: the numbers mean nothing."""
    resume: bool = False
    """Keep what FILE holds of a work's contestants, and measure those that it lacks."""
    only: tuple[str, ...] = (*GOALS, *MACHINE)
    """Which parts."""
    repeats: int = 5
    """How often each step is timed; the longer works take two."""
    peers: Path = Path("runs/peers")
    """Where the peers are installed."""
    runs: Path = Path("runs/throughput")
    """Where the work and the logs go."""
    page: Path | None = None
    """A Markdown file whose table is replaced."""


def main(options: Options) -> None:
    """Measure, print, write."""
    rows.prepare(options.quick, options.json, options.page)
    if options.quick:
        print("quick: a tiny model, and no peers, whose rows stay empty", file=sys.stderr)
    measured, found = Measured(options), rows.read(options.json)
    for part in options.only:
        print(f"measuring {part}", file=sys.stderr)
        new = measured.training(part) if part in GOALS else getattr(measured, part)()
        found |= {row.name: row for row in new}
        found |= {row.name: row for row in UNMEASURED if row.name not in found}
        rows.write_json(options.json, list(found.values()), details=measured.details)
    rows.show("throughput", list(found.values()))
    if options.page:
        rows.replace_table(options.page, rows.markdown(list(found.values())))


class Measured:
    """The measurements; what lies behind the rows is gathered in `details`."""

    def __init__(self, options: Options):
        self.options, self.quick = options, options.quick
        self.runs = options.runs / "quick" if self.quick else options.runs
        self.model = str(tiny_directory(self.runs / "model", num_layers=2) if self.quick else fetch.smollm2())
        self.repeats = 2 if self.quick else options.repeats
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        self.details: dict = earlier.get("details", {})

    def training(self, name: str) -> list[Row]:
        """A work's rows: speed against the best setting of any peer and, where there is such a goal, against the
        peers as they come; peak memory there, too."""
        contest, short = self._contest(name), name == "pairs"
        note = self.details.get(name, {}) if self.options.resume else {}
        self.details[name] = note
        if "tried" not in note:
            note["tried"] = {} if self.quick else contest.tried(3 if short else 1)
        finished = {setting: step for setting, step in note["tried"].items() if "seconds" in step}
        goals = {f"{name}_vs_best_peer": (GOALS[name][0], finished)}
        if GOALS[name][1]:
            as_they_come = {setting: step for setting, step in finished.items() if setting in contest.as_they_come}
            goals[f"{name}_vs_peer_defaults"] = (GOALS[name][1], as_they_come)
        turns = note.setdefault("turns", {})
        found = []
        for row, (goal, settings) in goals.items():
            finalists = _finalists(settings) or ["alone"]
            for setting in finalists:
                if setting not in turns:
                    turns[setting] = contest.measured(setting, self.repeats if short else min(2, self.repeats))
            opponent = min(finalists, key=lambda setting: _ratio(turns[setting], "ours") or 0)
            found += _speed_rows(row, goal, opponent, turns[opponent])
        if short:
            found += _memory_rows(turns[opponent], finished, contest.as_they_come)
        return found

    def flops(self) -> list[Row]:
        """Floating-point operations per second in the first work, as parts of the best matrix product here."""
        contest, note = self._contest("pairs"), {}
        for remat in ("none", *OURS.values()):
            with contest.ours("ours", remat) as ours:
                rates, steps = [], []
                for _ in range(self.repeats):
                    rates.append(flops.matmul_peak(3, flops.SHAPES[:1]) if self.quick else flops.matmul_peak())
                    steps.append(ours.step())
            peak, seconds = statistics.median(rates), seconds_per_step(steps)
            note[remat] = ours.about | {"seconds": seconds, "matmul_peak": peak}
        self.details["flops"] = note

        def row(name: str, kind: str, remat: str, goal: float) -> Row:
            about = note[remat]
            fraction = about[f"{kind}_flops"] / about["seconds"] / about["matmul_peak"]
            return Row(name, fraction, "", goal, note=f"remat {remat}; peak {about['matmul_peak'] / 1e9:.0f} GFLOP/s")

        return [
            row("executed_flops_fraction", "executed", OURS["ours"], 0.8),
            row("needed_flops_fraction_lean", "needed", OURS["ours"], 0.6),
            row("needed_flops_fraction_fast", "needed", "none", 0.75),
        ]

    def stalls(self) -> list[Row]:
        """What the loop of a run adds to its updates."""
        found, self.details["stalls"] = stalls.measure(self.quick)
        return found

    def sampling(self) -> list[Row]:
        """Tokens per second: 16 prompts, 8 answers each, at most 64 tokens."""
        tokenizer, path = load_tokenizer(self.model), self.runs / "prompts.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = [list(b"a prompt of so many bytes")] * 4
        if not self.quick:
            questions = bfcl.load(fetch.bfcl(), ("simple_python",))[:16]
            asked = [encode_prompt(tokenizer, row["prompt"]) for row in questions]
        path.write_text(json.dumps(asked))
        sizes = ("2", "8") if self.quick else ("8", "64")
        arguments = [self.model, str(path.absolute()), *sizes, str(tokenizer.eos_token_id)]
        commands = {"ours": [sys.executable, "-m", "benchmarks.ours_sampling", *arguments]}
        if not self.quick:
            commands["transformers"] = TRANSFORMERS.command(self.options.peers, arguments)
        log = self.runs / "logs"
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(name, command, log / f"sampling-{name}.log", quiet()))
                for name, command in commands.items()
            ]
            turns = take_turns(workers, self.repeats)
        rates = {
            name: statistics.median(step["tokens"] / step["seconds"] for step in taken) for name, taken in turns.items()
        }
        self.details["sampling"] = {"tokens_per_second": rates, "turns": turns}
        ratio = None if self.quick else rates["ours"] / rates["transformers"]
        note = ", ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in rates.items())
        return [Row("sampling_vs_transformers", ratio, "x", 5.0, note=note)]

    def growth(self) -> list[Row]:
        """Exponents of memory and compile time."""
        found, details = growth.measure(self.quick)
        self.details |= details
        return found

    def _contest(self, name: str) -> Contest:
        return Contest(WORKS[name], self.model, self.runs, self.options.peers, tiny=self.quick)


def _finalists(tried: dict[str, dict]) -> list[str]:
    """The fastest setting of each library that is not a quarter slower than the fastest: so much a trial may err,
    whose small work has less padding than the whole."""
    fastest = {}
    for setting in sorted(tried, key=lambda setting: tried[setting]["seconds"]):
        fastest.setdefault(setting.partition(",")[0], setting)
    least = min((tried[setting]["seconds"] for setting in fastest.values()), default=0)
    return [setting for setting in fastest.values() if tried[setting]["seconds"] <= 1.25 * least]


def _ratio(measured: dict, setting: str) -> float | None:
    """The peer's seconds over ours, which are charged with the reference's statistics; None without a peer."""
    return measured["peer"]["seconds"] / _cost(measured, setting) if "peer" in measured else None


def _cost(measured: dict, setting: str) -> float:
    return measured[setting]["seconds"] + measured[setting]["about"]["annotation_seconds"]


def _speed_rows(name: str, goal: float | None, opponent: str, measured: dict) -> list[Row]:
    """One row per setting of ours; without a peer it has no value."""
    found = []
    for setting in OURS:
        note = f"remat {OURS[setting]}: {_cost(measured, setting):.2f} s"
        if "peer" in measured:
            note += f"; {opponent}: {measured['peer']['seconds']:.1f} s"
        ratio = _ratio(measured, setting)
        found.append(Row(_row(name, setting), ratio, "x", goal if setting == "ours" else None, note=note))
    return found


def _memory_rows(measured: dict, tried: dict[str, dict], as_they_come: tuple[str, ...]) -> list[Row]:
    """The most resident memory of our process over that of a peer's; one row per setting of ours."""
    theirs = {setting: step["peak_bytes"] for setting, step in tried.items()}
    others = {
        "memory_vs_leanest_peer": (theirs, 0.65),
        "memory_vs_peer_defaults": ({key: theirs[key] for key in as_they_come if key in theirs}, 0.5),
    }
    found = []
    for name, (some, goal) in others.items():
        other = min(some, key=some.get, default=None)
        for setting in OURS:
            mine = measured[setting]["peak_bytes"]
            ratio = None if other is None else mine / some[other]
            note = f"remat {OURS[setting]}: {mine / 1e9:.2f} GB"
            if other is not None:
                note += f"; {other}: {some[other] / 1e9:.2f} GB"
            target = goal if setting == "ours" else None
            found.append(Row(_row(name, setting), ratio, "x", target, at_most=True, note=note))
    return found


def _row(name: str, setting: str) -> str:
    return name if setting == "ours" else f"{name}_{setting}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
