"""Fixtures shared with the training tests: a tiny decoder and random records."""

from tests.training.conftest import (
    dense,
    host_params,
    make_buffer,
    make_records,
    model,
    on_mesh,
    quickly,
    records,
    relative,
    requested_mesh,
)

__all__ = [
    "dense",
    "host_params",
    "make_buffer",
    "make_records",
    "model",
    "on_mesh",
    "quickly",
    "records",
    "relative",
    "requested_mesh",
]  # fmt: skip
