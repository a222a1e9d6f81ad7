"""Held-out metrics of the policies of `experiments.dp_alignment`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.dp_alignment_data import Sizes, read_rows
from shiq_jax.data import formats
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.models import load_hf
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.ingest import READERS, import_records
from shiq_jax.tasks import rewards
from shiq_jax.training.annotation import record_statistics
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.objective_metrics import objective_metrics
from shiq_jax.training.reference import Reference

# Sampled answers per question, in addition to the greedy one.
SAMPLES = 2


def measure(policy: Path, reference: Path | None, root: Path, sizes: Sizes) -> dict[str, Any]:
    """Evaluate a policy on the held-out questions.

    Returns:
        `greedy` and `sampled` rewards, summed `logratio` of the sampled answers in nats, and the summed
        log-probabilities `chosen` and `rejected` of the held-out pairs.
    """
    start = time.monotonic()
    model, params = load_hf(str(policy))
    tokenizer = load_tokenizer(str(policy))
    rows = read_rows(root / "held_out.jsonl")
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, policy), rows, rewards.resolve("bfcl"), sizes.max_tokens, SAMPLES,
        prompts_in_flight=32, greedy=True,
    )  # fmt: skip
    # Common random numbers reduce the variance of differences between policies.
    result = evaluator(params, Reference(str(reference), load_hf) if reference else None, jax.random.key(1))
    shape = (len(rows), SAMPLES)
    logratios = np.zeros(len(result.records)) if result.logratios is None else result.logratios
    file = root / "held_out.pairs.jsonl"
    pairs = _import_buffer(
        root / "held_out_pairs", lambda context: formats.preferences(file, tokenizer, context), model
    )
    sums = [float(np.sum(logp)) for logp, _ in record_statistics(model, params, [pairs[n] for n in range(len(pairs))])]
    return {
        "greedy": [float(record.rewards.sum()) for record in result.greedy],
        "sampled": np.reshape([float(record.rewards.sum()) for record in result.records], shape).tolist(),
        "logratio": np.reshape(logratios, shape).astype(float).round(4).tolist(),
        "length": float(np.mean([len(record.rewards) for record in result.records])),
        "chosen": np.round(sums[::2], 4).tolist(),
        "rejected": np.round(sums[1::2], 4).tolist(),
        "measuring_seconds": round(time.monotonic() - start),
    }


def mean_loss(objective: Objective, method: str, policy: Path, reference: Path, rows: Path, path: Path) -> float:
    """Mean loss of a policy on a data file.

    Args:
        objective: the loss.
        method: "dpo" or "shiq", which determines the format of the file.
        policy: directory of the policy.
        reference: directory of the reference.
        rows: the data file.
        path: directory of the buffer to create.
    """
    model, params = load_hf(str(policy))
    tokenizer = load_tokenizer(str(policy))
    buffer = _import_buffer(path, lambda context: READERS[method](rows, tokenizer, context), model)
    identity, _ = Reference(str(reference), load_hf).annotate(buffer)
    return objective_metrics(model, params, objective, buffer, {"reference": buffer.statistics(identity)})["loss"]


def _import_buffer(path: Path, read_rows, model) -> Buffer:
    path.parent.mkdir(parents=True, exist_ok=True)
    return import_records(path, read_rows, model)
