"""Annotation: compute a model's token statistics on stored records and write them to the buffer."""

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
from shiq_jax.training.placement import data_parallel_size, shard_batch

# Largest difference per token, in nats, at which the sampler's statistics replace a forward pass.
PROBE_TOLERANCE = 1e-3


def reference_identity(model, params) -> Identity:
    """Key under which a reference's statistics are stored: fingerprint of the weights, dtype and attention engine."""
    return Identity(weights=fingerprint(params), dtype=str(model.compute_dtype), attention=model.engine)


@functools.cache
def _forward(model):
    return jax.jit(functools.partial(policy_statistics, model))


def record_statistics(
    model,
    params,
    records: Sequence[Record],
    *,
    prompts_per_batch: int = 32,
    row_length: int = 4096,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute (logp, lse) in nats for every action of every record, with the forward pass of the update step.

    Records of one group share the computation of their prompt.

    Args:
        model: the decoder.
        params: its parameters.
        records: sequences; statistics that they already have are ignored.
        prompts_per_batch: pack groups per compiled call.
        row_length: groups with more tokens are split.
    """
    trees, groups = Trees(records), group_members([record.group for record in records])
    pack_groups = list(trajectory_groups(groups, records, [len(record.tokens) for record in records], row_length))
    shape = _round_up(plan(trees, pack_groups))
    statistics = _pack_group_statistics(model, params, trees, pack_groups, shape, prompts_per_batch)
    return [statistics[index] for index in range(len(records))]


def _pack_group_statistics(
    model, params, trees: Trees, pack_groups: Sequence[PackGroup], shape: BatchShape, prompts_per_batch: int
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Map record index -> (logp, lse) for the records of `pack_groups`, packed into batches of one `shape`."""
    forward, statistics = _forward(model), {}
    starts = range(0, len(pack_groups), prompts_per_batch)
    batches = (
        pack(pack_groups[start : start + prompts_per_batch], trees, shape, rows_multiple=data_parallel_size(model.mesh))
        for start in starts
    )
    amount = ("tokens", lambda packed: packed.fill * packed.batch.tokens.size)
    for packed in track(batches, "token statistics", len(starts), "batches", amount=amount):
        stopping.check("while computing token statistics")
        stats = hosts.gather(forward(params, shard_batch(packed.batch, model.mesh)))
        for position, record_index in np.ndenumerate(packed.members):
            if record_index >= 0:
                actions = np.count_nonzero(packed.batch.example.action_mask[position])
                statistics[int(record_index)] = (stats.logp[position][:actions], stats.lse[position][:actions])
    return statistics


def _round_up(shape: BatchShape) -> BatchShape:
    """Round every size up to 2^n or 1.5 * 2^n, so that similar inputs share a compiled program."""

    def round_size(size: int) -> int:
        power = 1 << max(size - 1, 1).bit_length()
        return power * 3 // 4 if size <= power * 3 // 4 else power

    return shape._replace(
        actions=round_size(shape.actions), slots=round_size(shape.slots), steps=round_size(shape.steps)
    )


def probe_sampler_statistics(model, params, buffer: Buffer, *, sequences: int = 32) -> dict[str, float | bool] | None:
    """Compare the sampler's statistics with the update step's forward pass on records spread over the buffer.

    Returns:
        `max_logratio` and `max_lse_difference`, the largest absolute differences over all actions, and `passed`; None
        if some record lacks the sampler's statistics.
    """
    if buffer.coverage()["lse"] < len(buffer):
        return None
    probed = np.unique(np.linspace(0, len(buffer) - 1, sequences).astype(int))
    records = buffer.read(probed)
    statistics = record_statistics(model, params, records)
    differences = {
        "max_logratio": _max_abs(logp - record.logp for record, (logp, _) in zip(records, statistics)),
        "max_lse_difference": _max_abs(lse - record.lse for record, (_, lse) in zip(records, statistics)),
    }
    return differences | {"passed": all(value <= PROBE_TOLERANCE for value in differences.values())}


def _max_abs(arrays: Iterable[np.ndarray]) -> float:
    """Largest absolute value; NaN propagates, which Python's `max` does not guarantee."""
    return float(np.max(np.abs(np.concatenate(list(arrays)))))


def annotate(
    model, params, buffer: Buffer, identity: Identity, *, prompts_per_batch: int = 32, row_length: int = 4096
) -> dict | None:
    """Fill the buffer with the statistics of a reference model.

    If the probe passes, the sampler's statistics are adopted; otherwise a forward pass computes them shard by shard.
    Shards that already have statistics are skipped, so an interrupted annotation resumes.

    Args:
        model, params: the reference.
        buffer: extended on disk.
        identity: of the reference, see `reference_identity`.
        prompts_per_batch: pack groups per compiled call.
        row_length: groups with more tokens are split.

    Returns:
        the result of `probe_sampler_statistics`.
    """
    probe = probe_sampler_statistics(model, params, buffer)
    missing = buffer.missing_statistics(identity)
    if not missing:
        return probe
    if probe and probe["passed"]:
        buffer.adopt_sampler_statistics(identity)
        return probe
    # The shape covers all shards, not only the missing ones: padding changes the last bits, and a resumed annotation
    # must equal an uninterrupted one.
    trees, pack_groups = Trees(buffer), _pack_groups_by_shard(buffer, row_length)
    shapes = [plan(trees, shard_groups) for shard_groups in pack_groups]
    shape = BatchShape(*map(max, zip(*shapes, strict=True)))
    done, total = len(shapes) - len(missing), len(shapes)
    for shard in track(missing, "reference statistics", total, "shards", initial=done):
        statistics = _pack_group_statistics(model, params, trees, pack_groups[shard], shape, prompts_per_batch)
        buffer.write_statistics(identity, shard, [statistics[index] for index in buffer.shards[shard]])
    return probe


def _pack_groups_by_shard(buffer: Buffer, row_length: int) -> list[list[PackGroup]]:
    """Pack groups of the records of each shard; a group that spans several shards is split."""
    group_ids, lengths = buffer.group_ids(), buffer.lengths()
    groups_by_shard = (
        [
            tuple(record_indices[position] for position in group)
            for group in group_members(group_ids[record_indices.start : record_indices.stop])
        ]
        for record_indices in buffer.shards
    )
    return [list(trajectory_groups(groups, buffer, lengths, row_length)) for groups in groups_by_shard]
