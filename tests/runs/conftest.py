"""The tiny decoder and the random records of the tests of training."""

from tests.training.conftest import (
    unpacked_records,
    host_params,
    make_buffer,
    make_records,
    model,
    model_on_mesh,
    use_quick_compilation,
    records,
    relative_error,
    get_mesh,
)

__all__ = [
    "unpacked_records",
    "host_params",
    "make_buffer",
    "make_records",
    "model",
    "model_on_mesh",
    "use_quick_compilation",
    "records",
    "relative_error",
    "get_mesh",
]  # fmt: skip
