"""What a buffer holds, as plain values and as text, and what it will take on disk."""

from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_jax.replay import storage
from shiq_jax.replay.manifest import SCHEMA_VERSION

if TYPE_CHECKING:
    from shiq_jax.replay.buffer import Buffer

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
_SHOWN = 24

# Six list columns and three text columns with 64-bit offsets, two numbers, and a byte of truth values.
_BYTES_PER_SEQUENCE = 9 * 8 + 2 * 8 + 1
# The Arrow schema and batch headers.
_BYTES_PER_SHARD, _BYTES_PER_SIDECAR = 2700, 800


def describe(buffer: "Buffer") -> dict[str, Any]:
    """Plain JSON values about the buffer.

    Keys: path, schema_version, sequences, groups, users, tokens, actions, bytes, shards; `group_size`, `length`,
    `actions_per_sequence` and `return` with mean and quantiles; `coverage`, the records that carry each optional
    column; `statistics`, one {"digest", "identity", "sequences"} per identity; `sample`, the first record.
    """
    groups, users = buffer.group_ids(), buffer.user_ids()
    lengths, actions = buffer.lengths(), buffer.actions()
    sizes = np.unique(np.array(groups, dtype=object), return_counts=True)[1] if groups else np.zeros(0)
    shards = buffer.shards
    return {
        "path": str(buffer.path),
        "schema_version": SCHEMA_VERSION,
        "sequences": len(buffer),
        "groups": len(sizes),
        "users": len(set(users) - {None}),
        "tokens": int(lengths.sum()),
        "actions": int(actions.sum()),
        "bytes": buffer.bytes,
        "shards": len(shards),
        "group_size": _summary(sizes),
        "length": _summary(lengths),
        "actions_per_sequence": _summary(actions),
        "return": _summary(buffer.returns()),
        "coverage": buffer.coverage(),
        "statistics": [
            {"digest": made.digest, "identity": dict(made), "sequences": sum(len(shards[number]) for number in numbers)}
            for made, numbers in buffer.identities()
        ],
        "sample": _sample(buffer) if len(buffer) else None,
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of `describe`, a line each."""
    lines = [
        f"replay buffer {facts['path']} (schema version {facts['schema_version']})",
        f"  sequences   {facts['sequences']:,} in {facts['groups']:,} groups"
        + (f" of {facts['users']:,} users" if facts["users"] else ""),
        f"  tokens      {facts['tokens']:,}, of which {facts['actions']:,} are actions",
        f"  disk        {_size(facts['bytes'])} in {facts['shards']} shard" + ("" if facts["shards"] == 1 else "s"),
    ]
    for label, key in (
        ("group size", "group_size"),
        ("length", "length"),
        ("actions", "actions_per_sequence"),
        ("return", "return"),
    ):
        if facts[key]:
            lines.append(f"  {label:<11} " + ", ".join(f"{name} {value:.4g}" for name, value in facts[key].items()))
    total = facts["sequences"]
    lines.append(
        "  records with "
        + ", ".join(f"{name} {count:,}" for name, count in facts["coverage"].items())
        + f" (of {total:,})"
    )
    lines.append(
        "  statistics" + ("" if facts["statistics"] else "  none; annotate the buffer before training with a reference")
    )
    for made in facts["statistics"]:
        identity = ", ".join(f"{key}={value}" for key, value in sorted(made["identity"].items()))
        lines.append(f"    {made['digest'][:12]}  {made['sequences']:,} of {total:,} sequences: {identity}")
    if sample := facts["sample"]:
        lines.append(
            f"  first record: group {sample['group']}, {sample['length']} tokens, return {sample['return']:.4g}"
        )
        lines.append("    " + " ".join(sample["tokens"]) + "   (* marks actions)")
        if sample["prompt"] is not None:
            lines.append("    prompt " + sample["prompt"])
    return "\n".join(lines)


def _summary(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {"mean": float(np.mean(values)), **dict(zip(QUANTILES, map(float, quantiles), strict=True))}


def _sample(buffer: "Buffer") -> dict[str, Any]:
    record = buffer[0]
    marked = [
        f"{token}*" if action else f"{token}" for token, action in zip(record.tokens, record.action_mask, strict=True)
    ]
    # The end holds the actions, so a long sequence shows its two ends.
    shown = marked if len(marked) <= _SHOWN else [*marked[: _SHOWN // 2], "...", *marked[-_SHOWN // 2 :]]
    prompt = record.prompt if record.prompt is None or len(record.prompt) <= 200 else record.prompt[:200] + "..."
    total = float(record.rewards.astype(np.float64).sum())
    return {"group": record.group, "length": len(marked), "return": total, "tokens": shown, "prompt": prompt}


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def estimate_bytes(
    sequences: int, tokens: int, actions: int, statistics: int = 1, *, sampler_statistics: int = 3, text_bytes: int = 0
) -> int:
    """Bytes that a buffer will take on disk, before anything is written.

    Args:
        sequences: records, of `tokens` tokens and `actions` actions altogether.
        statistics: how many models will annotate the buffer (`write_statistics`); adopted statistics take no space.
        sampler_statistics: how many of behaviour_logp, logp and lse the records carry.
        text_bytes: UTF-8 bytes of all groups, prompts and users; a prompt is stored with each of its records.
    """
    shards = -(-sequences // storage.SHARD_ROWS)
    records = (
        _BYTES_PER_SEQUENCE * sequences + tokens * 4 + tokens // 8 + 4 * actions * (1 + sampler_statistics) + text_bytes
    )
    annotations = statistics * (2 * 8 * sequences + 2 * 4 * actions)
    return records + annotations + shards * (_BYTES_PER_SHARD + _BYTES_PER_SIDECAR * statistics)
