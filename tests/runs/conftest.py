"""Fixtures shared with the training tests: a tiny decoder and random records."""

from tests.training.conftest import (
    get_mesh,
    host_params,
    make_buffer,
    make_records,
    model,
    model_on_mesh,
    records,
    relative_error,
    unpacked_records,
    use_quick_compilation,
)

__all__ = [
    "get_mesh",
    "host_params",
    "make_buffer",
    "make_records",
    "model",
    "model_on_mesh",
    "records",
    "relative_error",
    "unpacked_records",
    "use_quick_compilation",
]  # fmt: skip
