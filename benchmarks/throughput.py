"""Our update step and sampler against TRL, tunix, transformers and the machine: `python -m benchmarks.throughput`.

Same weights (SmolLM2-135M), same data, float32, one process for each contestant, which take turns step by step; numbers
are ratios of medians. Peers are installed into environments of their own below `--peers`.

    python -m benchmarks.throughput --json FILE              everything, an hour or two on two cores
    python -m benchmarks.throughput --quick --json FILE      our side alone, minutes; peers' rows stay empty
    python -m benchmarks.throughput --only bfcl_pairs ...    some rows; what FILE holds of the others is kept
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import jax
import tyro

from benchmarks import flops, growth, rows, works
from benchmarks.peers import TRANSFORMERS, TRL, TUNIX, Peer, micro, quiet
from benchmarks.rows import Row
from benchmarks.workers import Worker, WorkerError, median, take_turns
from shiq_jax.data import bfcl, fetch
from shiq_jax.data.chat import encode_prompt, load_tokenizer

# Rematerialisation and microbatches. The goals count for `ours`; the others show what can be had at either end.
SETTINGS = {"ours": ("dots", "1"), "fastest": ("none", "1"), "leanest": ("full", "2")}

TRAINING = {
    "pairs": ("pairs", 1.5, 2.0),
    "bfcl_pairs": ("bfcl_pairs", 2.5, None),
    "bfcl_groups_k8": ("bfcl_groups_k8", 5.0, None),
    "groups_k16_long": ("groups_k16_long", 10.0, None),
}
MACHINE = ("flops", "sampling", "growth")
GPU_ROWS = (
    *(f"mfu_1p5b_{objective}_{length}" for objective in ("shiq", "dpo") for length in ("1k", "4k")),
    "mfu_7b_dpo_4k", "mfu_1p5b_groups_k8", "stats_fraction_of_floor", "sampling_tokens_per_second", "vs_torch_flash",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    json: Path
    """Where the rows go; rows that it holds and that are not measured now stay."""
    quick: bool = False
    """Our side only, few steps."""
    only: tuple[str, ...] = (*TRAINING, *MACHINE)
    """Which parts."""
    steps: int = 5
    """Steps of each contestant that are timed."""
    peers: Path = Path("runs/peers")
    """Where the peers are installed."""
    runs: Path = Path("runs/throughput")
    """Where the work and the logs go."""
    page: Path | None = None
    """A Markdown file whose table is replaced."""


def main(options: Options) -> None:
    """Measure, print, write."""
    measured = Measured(options)
    parts = {name: (lambda name=name: measured.training(name)) for name in TRAINING}
    parts |= {"flops": measured.flops, "sampling": measured.sampling, "growth": measured.growth}
    found: dict[str, Row] = read(options.json)
    for part in options.only:
        print(f"measuring {part}", file=sys.stderr)
        found |= {row.name: row for row in parts[part]()}
        found |= {name: Row(name, None, "") for name in GPU_ROWS if name not in found}
        rows.write_json(options.json, list(found.values()), details=measured.details)
    rows.show("throughput", list(found.values()))
    if options.page:
        replace_table(options.page, rows.markdown(list(found.values())))


class Measured:
    """The measurements; what lies behind the rows is gathered in `details`."""

    def __init__(self, options: Options):
        self.options, self.model = options, str(fetch.smollm2())
        self.steps = 2 if options.quick else options.steps
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        self.details: dict = earlier.get("details", {})

    def training(self, name: str) -> list[Row]:
        """One row of the table: ours against the best and, in the first row, against the defaults of the peers."""
        _, goal, goal_defaults = TRAINING[name]
        work = works.WORKS[name]
        path = self.options.runs / f"{name}.json"
        works.write(work, path)
        note = self.details[name] = {}
        if self.options.quick:
            with self._ours(name, path, "ours") as ours:
                note["ours"] = ours.ready() | {"seconds": median([ours.step() for _ in range(self.steps)])}
            return self._training_rows(name, goal, goal_defaults, {})
        trials = {}
        for peer in (TRL, TUNIX):
            for setting, arguments in peer.settings.items():
                try:
                    with self._peer(name, path, peer, setting, micro(arguments, work.pairs)) as worker:
                        worker.ready()
                        trials[peer.name, setting] = worker.step()
                except WorkerError as error:
                    note[f"{peer.name}, {setting}"] = {"failed": str(error)}
                    continue
                note[f"{peer.name}, {setting}"] = {"trial": trials[peer.name, setting]}
        against = {"best": min(trials, key=lambda key: trials[key]["seconds"])}
        if goal_defaults:
            # The fastest of the peers, each as it comes.
            as_they_come = [key for key in trials if key[1] == {"trl": TRL, "tunix": TUNIX}[key[0]].defaults]
            against["defaults"] = min(as_they_come, key=lambda key: trials[key]["seconds"])
        ratios = {}
        for role, (peer_name, setting) in against.items():
            peer = {"trl": TRL, "tunix": TUNIX}[peer_name]
            chosen = SETTINGS if goal_defaults or role == "best" else {"ours": SETTINGS["ours"]}
            for ours_name in chosen:
                with (
                    self._ours(name, path, ours_name) as ours,
                    self._peer(name, path, peer, setting, micro(peer.settings[setting], work.pairs)) as worker,
                ):
                    about = ours.ready()
                    worker.ready()
                    turns = take_turns([ours, worker], self.steps)
                mine, theirs = turns[ours.name], turns[worker.name]
                cost = median(mine) + about["annotation_seconds"]
                ratios[role, ours_name] = median(theirs) / cost
                note[f"{ours_name} against {peer_name}, {setting}"] = {
                    **about, "seconds": median(mine), "with_annotation": cost, "peer_seconds": median(theirs),
                    "peak_bytes": mine[-1]["peak_bytes"], "peer_peak_bytes": theirs[-1]["peak_bytes"],
                    "all": turns,
                }  # fmt: skip
        note["ratios"] = {f"{role}, {ours}": value for (role, ours), value in ratios.items()}
        note["against"] = {role: ", ".join(key) for role, key in against.items()}
        return self._training_rows(name, goal, goal_defaults, ratios)

    def _training_rows(self, name: str, goal: float, goal_defaults: float | None, ratios: dict) -> list[Row]:
        against, found = self.details[name].get("against", {}), []
        roles = {"best": (f"{name}_vs_best_peer", goal)}
        if goal_defaults:
            roles["defaults"] = (f"{name}_vs_peer_defaults", goal_defaults)
        for role, (row, target) in roles.items():
            found.append(Row(row, ratios.get((role, "ours")), "x", target, note=against.get(role, "")))
            for setting in ("fastest", "leanest"):
                if (role, setting) in ratios:
                    note = f"{_setting(setting)}; {against[role]}"
                    found.append(Row(f"{row}_{setting}", ratios[role, setting], "x", note=note))
        return found + (self._memory_rows(name) if goal_defaults else [])

    def _memory_rows(self, name: str) -> list[Row]:
        """Peak resident memory of the whole process, from the same runs."""
        note = self.details[name]
        trials = {key: value["trial"]["peak_bytes"] for key, value in note.items() if "trial" in value}
        if not trials:
            return [Row(f"memory_vs_{peer}", None, "x") for peer in ("leanest_peer", "peer_defaults")]
        mine = {key.split(" against ")[0]: value["peak_bytes"] for key, value in note.items() if " against " in key}
        leanest = min(trials, key=trials.get)
        defaults = min((key for key in trials if key.endswith("defaults")), key=trials.get)
        found = []
        for row, other, goal in (("leanest_peer", leanest, 0.65), ("peer_defaults", defaults, 0.5)):
            text = lambda size: f"{size / 1e9:.1f} GB"  # noqa: E731
            note_of = lambda setting: f"{text(mine[setting])}; {other}: {text(trials[other])}"  # noqa: B023,E731
            found.append(Row(f"memory_vs_{row}", mine["ours"] / trials[other], "x", goal, True, note_of("ours")))
            found += [
                Row(f"memory_vs_{row}_{setting}", mine[setting] / trials[other], "x", None, True, note_of(setting))
                for setting in ("fastest", "leanest")
            ]
        return found

    def flops(self) -> list[Row]:
        """Floating-point operations per second in the first row's work, as parts of the best matrix product here."""
        path = self.options.runs / "pairs.json"
        works.write(works.WORKS["pairs"], path)
        note = self.details["flops"] = {}
        found = {}
        for setting in SETTINGS:
            with self._ours("pairs", path, setting) as ours:
                about, rates, steps = ours.ready(), [], []
                for _ in range(self.steps):
                    rates.append(flops.matmul_peak())
                    steps.append(ours.step())
            peak, seconds = statistics.median(rates), median(steps)
            found[setting] = {kind: about[f"{kind}_flops"] / seconds / peak for kind in ("executed", "needed")}
            note[setting] = about | {"seconds": seconds, "matmul_peak": peak} | found[setting]
        at = lambda setting: f"{_setting(setting)}, {note[setting]['matmul_peak'] / 1e9:.0f} GFLOP/s at most"  # noqa: E731
        return [
            Row("executed_flops_fraction", found["ours"]["executed"], "", 0.8, note=at("ours")),
            Row("needed_flops_fraction_lean", found["leanest"]["needed"], "", 0.6, note=at("leanest")),
            Row("needed_flops_fraction_fast", found["fastest"]["needed"], "", 0.75, note=at("fastest")),
        ]

    def sampling(self) -> list[Row]:
        """Tokens per second: 16 prompts, 8 answers each, at most 64 tokens."""
        tokenizer = load_tokenizer(self.model)
        asked = [encode_prompt(tokenizer, row["prompt"]) for row in bfcl.load(fetch.bfcl(), ("simple_python",))[:16]]
        path = self.options.runs / "prompts.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked))
        arguments = [self.model, str(path), "8", "64", str(tokenizer.eos_token_id)]
        log = self.options.runs / "logs"
        with contextlib.ExitStack() as stack:
            command = [sys.executable, "-m", "benchmarks.ours_sampling", *arguments]
            workers = [stack.enter_context(Worker("ours", command, log / "sampling-ours.log", quiet()))]
            if not self.options.quick:
                command = TRANSFORMERS.command(self.options.peers, arguments)
                workers.append(stack.enter_context(Worker("peer", command, log / "sampling-peer.log", quiet())))
            for worker in workers:
                worker.ready()
            turns = take_turns(workers, self.steps)
        rates = {
            name: statistics.median(step["tokens"] / step["seconds"] for step in taken) for name, taken in turns.items()
        }
        self.details["sampling"] = {"tokens_per_second": rates, "all": turns}
        ratio = rates["ours"] / rates["peer"] if "peer" in rates else None
        note = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
        return [Row("sampling_vs_transformers", ratio, "x", 5.0, note=note)]

    def growth(self) -> list[Row]:
        """Exponents of memory and compile time."""
        kinds = {
            "growth_memory_T": (growth.memory_in_tokens, 1.05),
            "growth_memory_V": (growth.memory_in_vocabulary, 0.05),
            "growth_compile_depth": (growth.compile_time_in_depth, 0.1),
        }
        found = []
        for name, (measure, goal) in kinds.items():
            slope, self.details[name] = measure()
            found.append(Row(name, slope, "", goal, at_most=True, note="exponent"))
        return found

    def _ours(self, name: str, work: Path, setting: str) -> Worker:
        objective = "dpo" if works.WORKS[name].answers == 2 else "shiq"
        arguments = [self.model, str(work), *SETTINGS[setting], objective]
        command = [sys.executable, "-m", "benchmarks.ours", *arguments]
        return Worker("ours", command, self.options.runs / "logs" / f"{name}-{setting}.log", quiet())

    def _peer(self, name: str, work: Path, peer: Peer, setting: str, arguments: list[str]) -> Worker:
        command = peer.command(self.options.peers, [self.model, str(work.absolute()), *arguments])
        log = self.options.runs / "logs" / f"{name}-{peer.name}-{setting.replace(' ', '_')}.log"
        return Worker(peer.name, command, log, quiet())


def _setting(name: str) -> str:
    remat, microbatches = SETTINGS[name]
    return f"remat {remat}, {microbatches} microbatch{'es' if microbatches != '1' else ''}"


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by name; none when it is not there."""
    if not path.exists():
        return {}
    directions = {"growth_", "memory_"}
    return {
        row["name"]: Row(
            row["name"], row["value"], row["unit"], row["goal"], any(map(row["name"].startswith, directions)),
            row["note"],
        )
        for row in json.loads(path.read_text())["rows"]
    }  # fmt: skip


def replace_table(page: Path, table: str) -> None:
    """Puts a table between the page's two marks."""
    begin, end = "<!-- table -->", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", None)
    main(tyro.cli(Options, description=__doc__))
