"""Statistics of a model on stored sequences: the streaming pass that makes a reference model data."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from shiq_jax import stopping
from shiq_jax.models import fingerprint
from shiq_jax.progress import track
from shiq_jax.replay import BatchShape, Buffer, Identity, Record, Trees, pack, plan
from shiq_jax.replay.schedule import PackGroup, group_members, trajectory_groups
from shiq_jax.sharding import hosts
from shiq_jax.training.examples import policy_statistics
from shiq_jax.training.placement import data_devices, place

# Largest difference, per token and in nats, at which the sampler's statistics may stand in for the update step's own.
PROBE_TOLERANCE = 1e-3


def reference_identity(model, params) -> Identity:
    """What makes the statistics of a reference: weights, arithmetic and attention engine."""
    return Identity(weights=fingerprint(params), dtype=str(model.compute_dtype), attention=model.engine)


@functools.cache
def _forward(model):
    return jax.jit(functools.partial(policy_statistics, model))


def statistics_of(
    model,
    params,
    records: Sequence[Record],
    *,
    prompts_per_batch: int = 32,
    row_length: int = 4096,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(logp, lse) of every action of every record, in nats, by the forward pass of the update step.

    Records of one group share their prompt's computation; groups are taken in order of appearance.

    Args:
        model: the decoder.
        params: its parameters.
        records: sequences; their own statistics are not looked at.
        prompts_per_batch: groups in one compiled call.
        row_length: groups of more tokens are split.
    """
    trees, groups = Trees(records), group_members([record.group for record in records])
    pack_groups = list(trajectory_groups(groups, records, [len(record.tokens) for record in records], row_length))
    found = _pack_group_statistics(
        model, params, trees, pack_groups, _coarse(plan(trees, pack_groups)), prompts_per_batch
    )
    return [found[number] for number in range(len(records))]


def _pack_group_statistics(
    model, params, trees: Trees, pack_groups: Sequence[PackGroup], shape: BatchShape, prompts_per_batch: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(logp, lse) of the records of some pack_groups by record number; `shape` is that of each compiled call."""
    forward, out = _forward(model), {}
    starts = range(0, len(pack_groups), prompts_per_batch)
    batches = (
        pack(pack_groups[start : start + prompts_per_batch], trees, shape, rows_multiple=data_devices(model.mesh))
        for start in starts
    )
    amount = ("tokens", lambda packed: packed.fill * packed.batch.tokens.size)
    for packed in track(batches, "token statistics", len(starts), "batches", amount=amount):
        stopping.check("while computing token statistics")
        stats = hosts.gather(forward(params, place(packed.batch, model.mesh)))
        for spot, number in np.ndenumerate(packed.members):
            if number >= 0:
                actions = np.count_nonzero(packed.batch.example.action_mask[spot])
                out[int(number)] = (stats.logp[spot][:actions], stats.lse[spot][:actions])
    return out


def _coarse(shape: BatchShape) -> BatchShape:
    """Every size rounded up to a power of two or one and a half times one."""

    def up(size: int) -> int:
        power = 1 << max(size - 1, 1).bit_length()
        return power * 3 // 4 if size <= power * 3 // 4 else power

    return shape._replace(actions=up(shape.actions), slots=up(shape.slots), steps=up(shape.steps))


def probe(model, params, buffer: Buffer, *, sequences: int = 32) -> dict[str, float | bool] | None:
    """Whether the sampler's own statistics are those of the update step's forward pass, on sequences spread over the
    buffer.

    Returns:
        largest |logratio| and |difference of lse| over their actions, and `passed`; None when some record lacks the
        sampler's statistics.
    """
    if buffer.coverage()["lse"] < len(buffer):
        return None
    chosen = np.unique(np.linspace(0, len(buffer) - 1, sequences).astype(int))
    records = buffer.read(chosen)
    found = statistics_of(model, params, records)
    difference = {
        "max_logratio": _largest(logp - record.logp for record, (logp, _) in zip(records, found)),
        "max_lse_difference": _largest(lse - record.lse for record, (_, lse) in zip(records, found)),
    }
    return difference | {"passed": all(value <= PROBE_TOLERANCE for value in difference.values())}


def _largest(differences: Iterable[np.ndarray]) -> float:
    """Largest magnitude; NaN when there is one, which Python's own max may lose."""
    return float(np.max(np.abs(np.concatenate(list(differences)))))


def annotate(
    model, params, buffer: Buffer, identity: Identity, *, prompts_per_batch: int = 32, row_length: int = 4096
) -> dict | None:
    """Fill the buffer with the statistics of a reference model, and say what the probe of the sampler's own found.

    Where the probe passes, the sampler's statistics are adopted as they are; otherwise, shard by shard, a forward pass
    makes them. Shards that have them are left alone, so an annotation that was stopped goes on.

    Args:
        model, params: the reference.
        buffer: is extended on disk.
        identity: of the reference, see `reference_identity`.
        prompts_per_batch: groups in one compiled call.
        row_length: groups of more tokens are split.
    """
    found = probe(model, params, buffer)
    missing = buffer.missing_statistics(identity)
    if not missing:
        return found
    if found and found["passed"]:
        buffer.adopt_sampler_statistics(identity)
        return found
    # Of all shards, not of those that are missing: padding moves the last bits, and an annotation that goes on must
    # find those of one that was never stopped.
    trees, pack_groups = Trees(buffer), _bundles_of_shards(buffer, row_length)
    shapes = [plan(trees, part) for part in pack_groups]
    shape = BatchShape(*map(max, zip(*shapes, strict=True)))
    done, total = len(shapes) - len(missing), len(shapes)
    for shard in track(missing, "reference statistics", total, "shards", first=done):
        values = _pack_group_statistics(model, params, trees, pack_groups[shard], shape, prompts_per_batch)
        buffer.write_statistics(identity, shard, [values[number] for number in buffer.shards[shard]])
    return found


def _bundles_of_shards(buffer: Buffer, row_length: int) -> list[list[PackGroup]]:
    """For each shard the pack_groups of its records; a group that lies in several shards is divided."""
    names, lengths = buffer.group_ids(), buffer.lengths()
    members = (
        [tuple(numbers[place] for place in group) for group in group_members(names[numbers.start : numbers.stop])]
        for numbers in buffer.shards
    )
    return [list(trajectory_groups(groups, buffer, lengths, row_length)) for groups in members]
