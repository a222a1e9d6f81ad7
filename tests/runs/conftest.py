"""The tiny decoder and the random records of the tests of training."""

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
