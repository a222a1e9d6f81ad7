"""Export of a policy to a directory that transformers can load."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from shiq_jax.models import ModelWithHeads, save_hf
from shiq_jax.models.heads import HEADS
from shiq_jax.runs.run import Run
from shiq_jax.sharding import hosts


def export(run: Run, model, params, path: Path) -> None:
    """Write weights, configuration and tokenizer in Hugging Face format, atomically; an existing export is kept."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        return
    hosts.on_writer(shutil.rmtree)(partial, ignore_errors=True)
    model = _with_stop_tokens(model, run.stop_tokens)
    if isinstance(model, ModelWithHeads):
        save_hf(model.without_heads(), {name: part for name, part in params.items() if name != HEADS}, partial)
        model.save(params, partial)
    else:
        save_hf(model, params, partial)
    hosts.on_writer(run.tokenizer.save_pretrained)(partial)
    hosts.on_writer(os.rename)(partial, path)


def _with_stop_tokens(model, stop_tokens: tuple[int, ...]):
    """The model with a generation config in which generation stops at every token that ended a turn in training."""
    stops = list(stop_tokens) if len(stop_tokens) > 1 else stop_tokens[0]
    return dataclasses.replace(model, generation_config={**(model.generation_config or {}), "eos_token_id": stops})
