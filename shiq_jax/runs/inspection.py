"""Text description of a run: its stage, latest metrics and generations."""

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
    """Describe a run or a replay buffer as text; the run may be active, since nothing is written.

    Args:
        path: directory of the run or buffer.
        prompts: number of prompts whose latest generations are shown.

    Raises:
        UserError: the directory is neither a run nor a buffer, or a file is damaged.
    """
    path = Path(path)
    run = RunDirectory(path)
    if is_buffer(path):
        return Buffer.open(path).report()
    if not run.config.exists():
        raise UserError(
            f"{path} is neither a run (no config.json) nor a replay buffer (no manifest.json): pass the directory of a "
            "run or buffer"
        )
    return "\n".join([*_overview(run), *_evaluation_table(run), *_generations(run, prompts)])


def _overview(run: RunDirectory) -> Iterator[str]:
    settings = json.loads(run.config.read_text())
    options = {name: settings.get(name) for name in ("model", "data", "task", "seed")}
    yield f"run {run.path}: {settings.get('command')}"
    yield "  options     " + ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    yield f"  stage       {_stage(run)}"
    round_directory = run.latest_round()
    if round_directory is not run:
        yield f"  round       {int(round_directory.path.name) + 1} of {settings['rounds']}"
    if is_buffer(round_directory.buffer):
        buffer = Buffer.open(round_directory.buffer)
        yield f"  buffer      {len(buffer):,} sequences, mean return {_number(_mean_return(buffer))}"
    log = MetricsLog(run.metrics)
    updates = log.rows("update") or log.rows("public")
    if updates:
        row = updates[-1]
        # Private updates log no loss, and epsilon only for some updates.
        metrics = [f"{name} {_number(row[name])}" for name in ("loss", "epsilon") if name in row]
        metrics.append(f"{_number(tokens_per_second(updates))} tokens/s")
        yield f"  update      {row['step']:,}: {', '.join(metrics)}"
    checkpoints = round_directory.checkpoints
    steps = sorted(int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit())
    if steps:
        yield "  checkpoints " + ", ".join(map(str, steps))


def _stage(run: RunDirectory) -> str:
    """The latest stage with an output."""
    log = MetricsLog(run.metrics)
    for reached, text in (
        (run.summary.exists(), "complete"),
        (run.export.exists(), "policy exported, summary missing"),
        (log.rows("update"), "training"),
        (log.rows("public"), "training on public data"),
        (log.rows("evaluation"), "initial evaluation complete"),
        (is_buffer(run.latest_round().buffer), "filling and annotating the buffer"),
        (run.reference.exists(), "warm start complete"),
        (log.rows("warm start"), "warm start"),
    ):
        if reached:
            return text
    return "preparing"


def _evaluation_table(run: RunDirectory) -> Iterator[str]:
    """A table of all evaluations, the latest last."""
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
    yield f"generations of {files[-1]} (same directory: earlier ones)"
    shown: list[str] = []
    for row in map(json.loads, files[-1].read_text().splitlines()):
        if row["prompt"] not in shown:
            if len(shown) == prompts:
                return
            shown.append(row["prompt"])
            yield f"  {_truncate(row['prompt'], keep_end=True)}"
        metrics = [f"{name} {_number(row[name])}" for name in ("reward", "logratio") if row.get(name) is not None]
        yield f"    {row['decoding']:<8} {', '.join(metrics)}"
        yield f"      {_truncate(row['completion'])}"


def _mean_return(buffer: Buffer) -> float | None:
    return float(buffer.returns().mean()) if len(buffer) else None


def _truncate(text: str, *, keep_end: bool = False) -> str:
    """The text as one line of limited width, truncated at its end or, with `keep_end`, at its start."""
    line = json.dumps(text, ensure_ascii=False)
    if len(line) <= _WIDTH:
        return line
    return "..." + line[-_WIDTH:] if keep_end else line[:_WIDTH] + "..."


def _number(value: Mapping | float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
