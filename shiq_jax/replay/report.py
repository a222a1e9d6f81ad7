"""Summary of a buffer as JSON values and as text, and an estimate of its size on disk."""

from typing import TYPE_CHECKING, Any

import numpy as np

from shiq_jax.replay import storage
from shiq_jax.replay.manifest import SCHEMA_VERSION

if TYPE_CHECKING:
    from shiq_jax.replay.buffer import Buffer

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
_MAX_SAMPLE_TOKENS = 24

# 64-bit offsets of six list and three string columns, two 64-bit numbers, and one byte for two booleans.
_BYTES_PER_SEQUENCE = 9 * 8 + 2 * 8 + 1
# Arrow schema and record batch headers.
_BYTES_PER_RECORD_SHARD, _BYTES_PER_STATISTICS_SHARD = 2700, 800


def describe(buffer: "Buffer") -> dict[str, Any]:
    """Summarize a buffer as JSON values.

    Keys: path, schema_version, sequences, groups, users, tokens, actions, bytes, shards; `group_size`, `length`,
    `actions_per_sequence` and `return` with mean and quantiles; `coverage`, the number of records with each optional
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
        "group_size": _mean_and_quantiles(sizes),
        "length": _mean_and_quantiles(lengths),
        "actions_per_sequence": _mean_and_quantiles(actions),
        "return": _mean_and_quantiles(buffer.returns()),
        "coverage": buffer.coverage(),
        "statistics": [
            {
                "digest": identity.digest,
                "identity": dict(identity),
                "sequences": sum(len(shards[number]) for number in numbers),
            }
            for identity, numbers in buffer.identities()
        ],
        "sample": _sample(buffer) if len(buffer) else None,
    }


def render(summary: dict[str, Any]) -> str:
    """Format the summary from `describe` as text."""
    lines = [
        f"replay buffer {summary['path']} (schema version {summary['schema_version']})",
        f"  sequences   {summary['sequences']:,} in {summary['groups']:,} groups"
        + (f" of {summary['users']:,} users" if summary["users"] else ""),
        f"  tokens      {summary['tokens']:,}, of which {summary['actions']:,} are actions",
        f"  disk        {_format_bytes(summary['bytes'])} in {summary['shards']} shard"
        + ("" if summary["shards"] == 1 else "s"),
    ]
    for label, key in (
        ("group size", "group_size"),
        ("length", "length"),
        ("actions", "actions_per_sequence"),
        ("return", "return"),
    ):
        if summary[key]:
            lines.append(f"  {label:<11} " + ", ".join(f"{name} {value:.4g}" for name, value in summary[key].items()))
    total = summary["sequences"]
    lines.append(
        "  records with "
        + ", ".join(f"{name} {count:,}" for name, count in summary["coverage"].items())
        + f" (of {total:,})"
    )
    lines.append(
        "  statistics"
        + ("" if summary["statistics"] else "  none; annotate the buffer before training with a reference")
    )
    for entry in summary["statistics"]:
        identity = ", ".join(f"{key}={value}" for key, value in sorted(entry["identity"].items()))
        lines.append(f"    {entry['digest'][:12]}  {entry['sequences']:,} of {total:,} sequences: {identity}")
    if sample := summary["sample"]:
        lines.append(
            f"  first record: group {sample['group']}, {sample['length']} tokens, return {sample['return']:.4g}"
        )
        lines.append("    " + " ".join(sample["tokens"]) + "   (* marks actions)")
        if sample["prompt"] is not None:
            lines.append("    prompt " + sample["prompt"])
    return "\n".join(lines)


def _mean_and_quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {"mean": float(np.mean(values)), **dict(zip(QUANTILES, map(float, quantiles), strict=True))}


def _sample(buffer: "Buffer") -> dict[str, Any]:
    record = buffer[0]
    marked = [
        f"{token}*" if action else f"{token}" for token, action in zip(record.tokens, record.action_mask, strict=True)
    ]
    # Show both ends of a long sequence, because the actions are at its end.
    half = _MAX_SAMPLE_TOKENS // 2
    shown = marked if len(marked) <= _MAX_SAMPLE_TOKENS else [*marked[:half], "...", *marked[-half:]]
    prompt = record.prompt if record.prompt is None or len(record.prompt) <= 200 else record.prompt[:200] + "..."
    total = float(record.rewards.astype(np.float64).sum())
    return {"group": record.group, "length": len(marked), "return": total, "tokens": shown, "prompt": prompt}


def _format_bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def estimate_bytes(
    sequences: int, tokens: int, actions: int, statistics: int = 1, *, sampler_statistics: int = 3, text_bytes: int = 0
) -> int:
    """Estimate the size of a buffer on disk, in bytes.

    Args:
        sequences: number of records.
        tokens: total number of tokens.
        actions: total number of actions.
        statistics: number of models whose statistics are written (`write_statistics`); adopted ones take no space.
        sampler_statistics: how many of behaviour_logp, logp and lse the records have.
        text_bytes: UTF-8 bytes of all groups, prompts and users; every record stores its prompt.
    """
    shards = -(-sequences // storage.SHARD_ROWS)
    records = (
        _BYTES_PER_SEQUENCE * sequences + tokens * 4 + tokens // 8 + 4 * actions * (1 + sampler_statistics) + text_bytes
    )
    annotations = statistics * (2 * 8 * sequences + 2 * 4 * actions)
    return records + annotations + shards * (_BYTES_PER_RECORD_SHARD + _BYTES_PER_STATISTICS_SHARD * statistics)
