"""The tiny decoder and the random records of the tests of training."""

from tests.training.conftest import (  # noqa: F401
    dense, host_params, make_buffer, make_records, mesh_of, model, on_mesh, quickly, records, relative,
)  # fmt: skip
