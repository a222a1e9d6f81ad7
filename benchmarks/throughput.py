"""Speed and memory of updates and sampling, compared with TRL, tunix, transformers and the peak rate of the machine.

All workers use the same SmolLM2-135M weights and data in float32. Each runs in a separate process; their steps are
interleaved and the rows are ratios of median times. Peers are installed into virtual environments below `--peers`.

    python -m benchmarks.throughput --json FILE              full benchmark, an hour or two on two cores
    python -m benchmarks.throughput --quick --json FILE      test the script in minutes: tiny model, no peers
    python -m benchmarks.throughput --only bfcl_pairs ...    selected parts; other rows of FILE are kept
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
from benchmarks.comparison import OURS, Comparison
from benchmarks.peers import TRANSFORMERS, worker_environment
from benchmarks.rows import Row
from benchmarks.workers import Worker, run_interleaved, seconds_per_step
from benchmarks.workloads import WORKLOADS
from shiq_jax.data.chat import encode_prompt, load_tokenizer
from shiq_jax.tasks import bfcl, fetch
from shiq_jax.tasks.tiny import tiny_directory

# Speed goals by workload: against the best setting of any peer, and against the faster peer with default settings.
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
    """Options of the throughput benchmark."""

    json: Path
    """Output file; rows that are not measured again are kept."""
    quick: bool = False
    """Test the script with a tiny model and without peers; the numbers are meaningless."""
    resume: bool = False
    """Reuse the timings in the output file and measure only the missing settings."""
    only: tuple[str, ...] = (*GOALS, *MACHINE)
    """Parts to measure."""
    repeats: int = 5
    """Timings per step; at most two for the workloads with long sequences."""
    peers: Path = Path("runs/peers")
    """Directory of the peers' virtual environments."""
    runs: Path = Path("runs/throughput")
    """Directory for workload files and logs."""
    page: Path | None = None
    """Markdown page whose table is replaced."""


def main(options: Options) -> None:
    """Measure, print the rows, and write them."""
    rows.prepare(options.quick, options.json, options.page)
    if options.quick:
        print("quick: tiny model without peers; their rows stay empty", file=sys.stderr)
    benchmark, results = Benchmark(options), rows.read_json(options.json)
    for part in options.only:
        print(f"measuring {part}", file=sys.stderr)
        new = benchmark.training(part) if part in GOALS else getattr(benchmark, part)()
        results |= {row.name: row for row in new}
        results |= {row.name: row for row in UNMEASURED if row.name not in results}
        rows.write_json(options.json, list(results.values()), details=benchmark.details)
    rows.print_table("throughput", list(results.values()))
    if options.page:
        rows.replace_table(options.page, rows.markdown(list(results.values())))


class Benchmark:
    """The parts of the benchmark; raw measurements are collected in `details`."""

    def __init__(self, options: Options):
        self.options, self.quick = options, options.quick
        self.runs = options.runs / "quick" if self.quick else options.runs
        self.model = str(tiny_directory(self.runs / "model", num_layers=2) if self.quick else fetch.smollm2())
        self.repeats = 2 if self.quick else options.repeats
        previous = json.loads(options.json.read_text()) if options.json.exists() else {}
        self.details: dict = previous.get("details", {})

    def training(self, name: str) -> list[Row]:
        """Rows of one training workload.

        Speed is compared with the best setting of any peer and, if there is a goal for it, with the peers' default
        settings. The `pairs` workload adds rows for peak memory.
        """
        comparison, short = self._comparison(name), name == "pairs"
        details = self.details.get(name, {}) if self.options.resume else {}
        self.details[name] = details
        if "tried" not in details:
            details["tried"] = {} if self.quick else comparison.time_peer_settings(3 if short else 1)
        finished = {setting: step for setting, step in details["tried"].items() if "seconds" in step}
        goals = {f"{name}_vs_best_peer": (GOALS[name][0], finished)}
        if GOALS[name][1]:
            defaults = {setting: step for setting, step in finished.items() if setting in comparison.default_settings}
            goals[f"{name}_vs_peer_defaults"] = (GOALS[name][1], defaults)
        timings = details.setdefault("turns", {})
        results = []
        for row, (goal, settings) in goals.items():
            finalists = _finalists(settings) or ["alone"]
            for setting in finalists:
                if setting not in timings:
                    timings[setting] = comparison.compare(setting, self.repeats if short else min(2, self.repeats))
            fastest_peer = min(finalists, key=lambda setting: _speedup(timings[setting], "ours") or 0)
            results += _speed_rows(row, goal, fastest_peer, timings[fastest_peer])
        if short:
            results += _memory_rows(timings[fastest_peer], finished, comparison.default_settings)
        return results

    def flops(self) -> list[Row]:
        """FLOP/s of the `pairs` step as a fraction of the fastest matrix product."""
        comparison, details = self._comparison("pairs"), {}
        for remat in ("none", *OURS.values()):
            with comparison.own_worker("ours", remat) as worker:
                rates, steps = [], []
                for _ in range(self.repeats):
                    rates.append(flops.matmul_peak(3, flops.SHAPES[:1]) if self.quick else flops.matmul_peak())
                    steps.append(worker.step())
            peak, seconds = statistics.median(rates), seconds_per_step(steps)
            details[remat] = worker.info | {"seconds": seconds, "matmul_peak": peak}
        self.details["flops"] = details

        def row(name: str, kind: str, remat: str, goal: float) -> Row:
            measured = details[remat]
            fraction = measured[f"{kind}_flops"] / measured["seconds"] / measured["matmul_peak"]
            peak = f"peak {measured['matmul_peak'] / 1e9:.0f} GFLOP/s"
            return Row(name, fraction, "", goal, note=f"remat {remat}; {peak}")

        return [
            row("executed_flops_fraction", "executed", OURS["ours"], 0.8),
            row("needed_flops_fraction_lean", "needed", OURS["ours"], 0.6),
            row("needed_flops_fraction_fast", "needed", "none", 0.75),
        ]

    def stalls(self) -> list[Row]:
        """Waits of the training loop for batches and checkpoints."""
        results, self.details["stalls"] = stalls.measure(self.quick)
        return results

    def sampling(self) -> list[Row]:
        """Sampled tokens per second: 16 prompts, 8 completions each, at most 64 tokens."""
        tokenizer, path = load_tokenizer(self.model), self.runs / "prompts.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = [list(b"a prompt of 25 text bytes")] * 4
        if not self.quick:
            questions = bfcl.load(fetch.bfcl(), ("simple_python",))[:16]
            prompts = [encode_prompt(tokenizer, row["prompt"]) for row in questions]
        path.write_text(json.dumps(prompts))
        sizes = ("2", "8") if self.quick else ("8", "64")
        arguments = [self.model, str(path.absolute()), *sizes, str(tokenizer.eos_token_id)]
        commands = {"ours": [sys.executable, "-m", "benchmarks.ours_sampling", *arguments]}
        if not self.quick:
            commands["transformers"] = TRANSFORMERS.command(self.options.peers, arguments)
        logs = self.runs / "logs"
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(name, command, logs / f"sampling-{name}.log", worker_environment()))
                for name, command in commands.items()
            ]
            timings = run_interleaved(workers, self.repeats)
        rates = {
            name: statistics.median(step["tokens"] / step["seconds"] for step in steps)
            for name, steps in timings.items()
        }
        self.details["sampling"] = {"tokens_per_second": rates, "turns": timings}
        ratio = None if self.quick else rates["ours"] / rates["transformers"]
        note = ", ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in rates.items())
        return [Row("sampling_vs_transformers", ratio, "x", 5.0, note=note)]

    def growth(self) -> list[Row]:
        """Scaling exponents of memory and compile time."""
        results, details = growth.measure(self.quick)
        self.details |= details
        return results

    def _comparison(self, name: str) -> Comparison:
        return Comparison(WORKLOADS[name], self.model, self.runs, self.options.peers, tiny=self.quick)


def _finalists(trials: dict[str, dict]) -> list[str]:
    """The fastest setting of each library, if it is within 25% of the fastest overall.

    The margin covers the error of a trial, whose smaller workload has less padding.
    """
    fastest = {}
    for setting in sorted(trials, key=lambda setting: trials[setting]["seconds"]):
        fastest.setdefault(setting.partition(",")[0], setting)
    best = min((trials[setting]["seconds"] for setting in fastest.values()), default=0)
    return [setting for setting in fastest.values() if trials[setting]["seconds"] <= 1.25 * best]


def _speedup(measured: dict, setting: str) -> float | None:
    """The peer's seconds over this library's, including its annotation; None without a peer."""
    return measured["peer"]["seconds"] / _seconds_with_annotation(measured, setting) if "peer" in measured else None


def _seconds_with_annotation(measured: dict, setting: str) -> float:
    return measured[setting]["seconds"] + measured[setting]["about"]["annotation_seconds"]


def _speed_rows(name: str, goal: float | None, fastest_peer: str, measured: dict) -> list[Row]:
    """Speedup over a peer, one row per setting of this library; without a peer the rows have no value."""
    results = []
    for setting in OURS:
        note = f"remat {OURS[setting]}: {_seconds_with_annotation(measured, setting):.2f} s"
        if "peer" in measured:
            note += f"; {fastest_peer}: {measured['peer']['seconds']:.1f} s"
        ratio = _speedup(measured, setting)
        results.append(Row(_row_name(name, setting), ratio, "x", goal if setting == "ours" else None, note=note))
    return results


def _memory_rows(measured: dict, trials: dict[str, dict], default_settings: tuple[str, ...]) -> list[Row]:
    """Peak resident memory of this library's process over a peer's, one row per setting of this library."""
    peaks = {setting: step["peak_bytes"] for setting, step in trials.items()}
    peers_and_goals = {
        "memory_vs_leanest_peer": (peaks, 0.65),
        "memory_vs_peer_defaults": ({key: peaks[key] for key in default_settings if key in peaks}, 0.5),
    }
    results = []
    for name, (peer_peaks, goal) in peers_and_goals.items():
        peer = min(peer_peaks, key=peer_peaks.get, default=None)
        for setting in OURS:
            own_peak = measured[setting]["peak_bytes"]
            ratio = None if peer is None else own_peak / peer_peaks[peer]
            note = f"remat {OURS[setting]}: {own_peak / 1e9:.2f} GB"
            if peer is not None:
                note += f"; {peer}: {peer_peaks[peer] / 1e9:.2f} GB"
            target = goal if setting == "ours" else None
            results.append(Row(_row_name(name, setting), ratio, "x", target, at_most=True, note=note))
    return results


def _row_name(name: str, setting: str) -> str:
    return name if setting == "ours" else f"{name}_{setting}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
