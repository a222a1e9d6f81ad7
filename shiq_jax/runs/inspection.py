"""Inspection of a run from outside: its stage, its latest numbers and its generations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, is_buffer
from shiq_jax.runs.metrics import MetricsLog, tokens_per_second
from shiq_jax.runs.run_directory import RunDirectory

_WIDTH = 76


def inspect(path: Path, *, prompts: int = 3) -> str:
    """Describe a run or a replay buffer as text.

    Nothing is written, so the run may be active.

    Args:
        path: the directory.
        prompts: number of prompts whose latest generations are shown.

    Raises:
        UserError: it is neither, or a file of it is damaged.
    """
    path = Path(path)
    run = RunDirectory(path)
    if is_buffer(path):
        return Buffer.open(path).report()
    if not run.config.exists():
        raise UserError(
            f"{path} is neither a run (it has no config.json) nor a replay buffer (no manifest.json): name the "
            "directory of one"
        )
    return "\n".join([*_facts(run), *_table(run), *_generations(run, prompts)])


def _facts(run: RunDirectory) -> Iterator[str]:
    settings = json.loads(run.config.read_text())
    about = {name: settings.get(name) for name in ("model", "data", "task", "seed")}
    yield f"run {run.path}: {settings.get('command')}"
    yield "  options     " + ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    yield f"  stage       {_stage(run)}"
    here = run.latest_round()
    if here is not run:
        yield f"  round       {int(here.path.name) + 1} of {settings['rounds']}"
    if is_buffer(here.buffer):
        buffer = Buffer.open(here.buffer)
        yield f"  buffer      {len(buffer):,} sequences, mean return {_number(_mean_return(buffer))}"
    log = MetricsLog(run.metrics)
    updates = log.rows("update") or log.rows("public")
    if updates:
        row = updates[-1]
        # A private update logs no loss, and epsilon only now and then.
        said = [f"{name} {_number(row[name])}" for name in ("loss", "epsilon") if name in row]
        said.append(f"{_number(tokens_per_second(updates))} tokens/s")
        yield f"  update      {row['step']:,}: {', '.join(said)}"
    saved = sorted(int(step.name) for step in here.checkpoints.glob("[0-9]*") if step.name.isdigit())
    if saved:
        yield "  checkpoints " + ", ".join(map(str, saved))


def _stage(run: RunDirectory) -> str:
    """The latest stage that has left something."""
    log = MetricsLog(run.metrics)
    for reached, text in (
        (run.summary.exists(), "complete"),
        (run.export.exists(), "exported; the summary is missing"),
        (log.rows("update"), "passes over the buffer"),
        (log.rows("public"), "updates on public data"),
        (log.rows("evaluation"), "evaluated before the passes"),
        (is_buffer(run.latest_round().buffer), "filling and annotating the buffer"),
        (run.reference.exists(), "the reference is ready"),
        (log.rows("warm start"), "warm start"),
    ):
        if reached:
            return text
    return "preparing"


def _table(run: RunDirectory) -> Iterator[str]:
    """Every evaluation, the latest last."""
    rows = MetricsLog(run.metrics).rows("evaluation")
    names = [name for name in ("reward", "accuracy", "greedy_reward", "kl", "length") if rows and name in rows[-1]]
    if rows:
        yield ""
        yield "  " + "".join(f"{name:>16}" for name in ["evaluated after", *names])
    for row in rows:
        cells = [f"{row['step']} updates"]
        for name in names:
            error = row.get(f"{name}_stderr")
            cells.append(_number(row.get(name)) + ("" if error is None else f" ± {error:.2g}"))
        yield "  " + "".join(f"{cell:>16}" for cell in cells)


def _generations(run: RunDirectory, prompts: int) -> Iterator[str]:
    files = sorted(run.samples.glob("*.jsonl")) if run.samples.is_dir() else []
    if not files or prompts < 1:
        return
    yield ""
    yield f"generations of {files[-1]} (earlier ones beside it)"
    shown: list[str] = []
    for row in map(json.loads, files[-1].read_text().splitlines()):
        if row["prompt"] not in shown:
            if len(shown) == prompts:
                return
            shown.append(row["prompt"])
            yield f"  {_short(row['prompt'], ending=True)}"
        facts = [f"{name} {_number(row[name])}" for name in ("reward", "logratio") if row.get(name) is not None]
        yield f"    {row['decoding']:<8} {', '.join(facts)}"
        yield f"      {_short(row['completion'])}"


def _mean_return(buffer: Buffer) -> float | None:
    return float(buffer.returns().mean()) if len(buffer) else None


def _short(text: str, *, ending: bool = False) -> str:
    """One line; a long prompt keeps its end, which says more."""
    line = json.dumps(text, ensure_ascii=False)
    if len(line) <= _WIDTH:
        return line
    return "..." + line[-_WIDTH:] if ending else line[:_WIDTH] + "..."


def _number(value: Mapping | float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
