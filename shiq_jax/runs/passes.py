"""Passes over a buffer: the loop around the update step."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from shiq_jax.errors import Refusal
from shiq_jax.progress import track
from shiq_jax import stopping
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training.state import State

# Mean |lse| in nats below which logits are taken for normalised ones.
NORMALISED = 1e-4


class Marks(NamedTuple):
    """When to evaluate and when to save, in steps; the last step always does both. `show`: steps to sample at."""

    evaluate: int | None = None
    save: int | None = None
    show: Collection[int] = ()


def run_passes(
    update: Callable,
    state: State,
    batches: Batches,
    steps: int,
    *,
    stage: str,
    log: MetricsLog,
    checkpoints: Checkpoints,
    metadata: Callable[[int], dict[str, Any]],
    learning_rate: Callable,
    marks: Marks = Marks(),
    evaluate: Callable[[State, int], dict[str, float]] | None = None,
    show: Callable[[State, int], None] | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> State:
    """Update from `state.step` to `steps`, logging every step, evaluating, saving and showing samples at the marks.

    When the process is asked to stop, the step under way is finished and saved; what its marks ask for besides is done
    when the passes go on. Where there have been `enough` steps the passes end as they would at the last one.

    Returns:
        the last state, which is also on disk.

    Raises:
        Refusal: the loss or the gradient is not finite; the message names the step and its records, and the
            checkpoints on disk are those of before.
        Stopped: the process was asked to stop, see `shiq_jax.stopping`.
    """
    start, shapes, latest = int(state.step), set(), {}

    def settle(done: int) -> bool:
        """What the marks ask for after so many updates, and whether these are the last."""
        values, last = {}, done == steps or enough(done)
        if not stopping.requested():
            with contextlib.suppress(stopping.Stopped):
                if _evaluates(evaluate, marks, done, last):
                    values = evaluate(state, done)
                    latest.update({name: values[name] for name in ("reward", "kl") if name in values})
                elif show and done in marks.show:
                    show(state, done)
        # What was evaluated is saved, so that the best policy of the evaluations is one that can be had.
        if last or values or stopping.requested() or (marks.save and done % marks.save == 0):
            checkpoints.save(state, metadata(done), values)
        if stopping.requested():
            checkpoints.wait()
            raise stopping.Stopped(f"at {stage} {done} of {steps}")
        return last

    # Passes that were asked to stop left the last step's marks to those that go on.
    ended = start == steps or enough(start)
    if start and ((show and start in marks.show) or _evaluates(evaluate, marks, start, ended)):
        if checkpoints.metrics(start) is None:
            settle(start)
    tracked = track(
        batches.ahead(start, start if ended else steps), stage, steps, "updates", first=start,
        amount=("tokens", lambda item: item.tokens or 0),
        note=lambda: ", ".join(f"{name} {value:.4g}" for name, value in latest.items()),
    )  # fmt: skip
    for number, item in enumerate(tracked, start):
        began = time.perf_counter()
        state, metrics = update(state, item.batch)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        _check(metrics, stage, number, item.members, batches.records)
        if number == start:
            _warn_of_normalised_logits(metrics)
        done = number + 1
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(item.batch))
        about = {"seconds": round(seconds, 4), "compiled": shape not in shapes}
        if item.tokens is not None:
            about |= {"tokens": item.tokens, "waited": round(item.waited, 4), "fill": round(item.fill, 4)}
        shapes.add(shape)
        log.write(stage, done, **metrics, learning_rate=float(learning_rate(number)), **about)
        latest.update({name: float(metrics[name]) for name in ("loss", "epsilon") if name in metrics})
        if settle(done):
            break
    checkpoints.wait()
    return state


def tokens_per_second(rows: Sequence[Mapping]) -> float | None:
    """Real tokens through the update step per second, over the updates that did not compile and say how many."""
    counted = [row for row in rows if not row["compiled"] and "tokens" in row]
    seconds = sum(row["seconds"] for row in counted)
    return sum(row["tokens"] for row in counted) / seconds if seconds else None


def _evaluates(evaluate: Callable | None, marks: Marks, done: int, last: bool) -> bool:
    return evaluate is not None and (last or bool(marks.evaluate and done % marks.evaluate == 0))


def _check(metrics: dict, stage: str, number: int, members, records) -> None:
    """Refusal when an update's numbers are not finite; `param_norm` tells before the parameters are saved."""
    bad = [name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(metrics.get(name, 0))]
    if bad:
        numbers = sorted({int(index) for index in members.ravel() if index >= 0})
        groups = sorted({records[index].group for index in numbers})
        # A private batch says nothing of its records.
        of, mend = "", ""
        if numbers:
            of = f" (records {_some(numbers)} of groups {_some(groups)})"
            mend = ", or without those records"
        raise Refusal(
            f"{' and '.join(bad)} of {stage} step {number + 1}{of} {'is' if len(bad) == 1 else 'are'} not finite; "
            "every checkpoint is from before it, and --resume would come here again: begin another run with a lower "
            f"learning rate{mend}"
        )


def _some(things: Sequence, shown: int = 16) -> str:
    more = f" and {len(things) - shown} more" if len(things) > shown else ""
    return ", ".join(map(str, things[:shown])) + more


def _warn_of_normalised_logits(metrics: Mapping) -> None:
    """Log-probabilities in the place of logits are the same policy, but their log-sum-exp is 0 and says nothing."""
    if metrics.get("lse_abs", 1) < NORMALISED:
        print(
            f"warning: the log-sum-exp of the logits is {metrics['lse_abs']:.1e} on average, as if they were "
            "normalised already: ShiQ learns from its size, so give the model's raw logits",
            file=sys.stderr,
        )
