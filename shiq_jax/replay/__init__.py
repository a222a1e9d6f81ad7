"""Records, the on-disk replay buffer, batch schedules, and packing into fixed-shape batches."""

from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.concatenation import concatenate
from shiq_jax.replay.export import from_dataset, record_from_json, record_to_json, to_dataset, to_jsonl
from shiq_jax.replay.manifest import is_buffer
from shiq_jax.replay.packing import NO_REFERENCES, Batch, BatchShape, Packed, References, full_rows, pack, row_count
from shiq_jax.replay.planning import plan
from shiq_jax.replay.records import Record, validate
from shiq_jax.replay.report import estimate_bytes
from shiq_jax.replay.schedule import PackGroup, PackGroups, Schedule, pack_groups
from shiq_jax.replay.stored_statistics import Identity, StoredStatistics
from shiq_jax.replay.trees import Trees

__all__ = [
    "NO_REFERENCES",
    "Batch",
    "BatchShape",
    "Buffer",
    "Identity",
    "PackGroup",
    "PackGroups",
    "Packed",
    "Record",
    "References",
    "Schedule",
    "StoredStatistics",
    "Trees",
    "concatenate",
    "estimate_bytes",
    "from_dataset",
    "full_rows",
    "is_buffer",
    "pack",
    "pack_groups",
    "plan",
    "record_from_json",
    "record_to_json",
    "row_count",
    "to_dataset",
    "to_jsonl",
    "validate",
]
