"""Sampling of a round: answers of its policy to the run's prompts, scored and stored in the round's buffer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shiq_jax import stopping
from shiq_jax.progress import track
from shiq_jax.replay import Buffer, Record, estimate_bytes
from shiq_jax.rollout.collect import collect_records, records_in_order, sampled_tokens
from shiq_jax.rollout.generate import Sampler
from shiq_jax.runs.ingest import open_or_create
from shiq_jax.runs.round import Round
from shiq_jax.runs.run import RngStream


def sample_answers(round: Round) -> Buffer:
    """Sample the answers that the round's buffer does not have yet, and return the buffer."""
    run, options, rows = round.run, round.run.job.collection, round.run.task.train
    buffer = open_or_create(round.directory.buffer)
    done = len(buffer) // options.samples_per_prompt
    starts = range(done, len(rows), options.prompts_per_batch)
    if not starts:
        return buffer
    model, params = round.policy.open()
    sampler = Sampler(
        model, options.sampling, run.stop_tokens,
        samples_per_prompt=options.samples_per_prompt, prompts_in_flight=options.prompts_in_flight,
    )  # fmt: skip
    key = run.key(RngStream.SAMPLING, round.number)
    sampled = (
        records_in_order(
            collect_records(
                sampler, params, run.tokenizer, rows[start : start + options.prompts_per_batch], run.task.reward,
                key=key, stop_tokens=run.stop_tokens, first=start,
            )
        )
        for start in starts
    )  # fmt: skip
    total = -(-len(rows) // options.prompts_per_batch)
    amount = ("tokens", sampled_tokens)
    for records in track(sampled, "sampling", total, "batches", initial=total - len(starts), amount=amount):
        if not len(buffer):
            _print_estimated_size(records, len(rows) * options.samples_per_prompt / len(records))
        buffer.append(records, vocab_size=model.config.vocab_size)
        stopping.check(f"after {len(buffer)} of {len(rows) * options.samples_per_prompt} samples")
    return buffer


def _print_estimated_size(records: Sequence[Record], factor: float) -> None:
    """Print the estimated size of a buffer with `factor` times as many records."""
    counts = (len(records), sum(len(r.tokens) for r in records), sum(len(r.rewards) for r in records))
    text_bytes = sum(len((r.group + (r.prompt or "")).encode()) for r in records)
    size = estimate_bytes(*(round(count * factor) for count in counts), text_bytes=round(text_bytes * factor))
    count = round(len(records) * factor)
    print(f"the buffer will hold {count} sequences in about {size / 1e6:.1f} MB", file=sys.stderr)
