"""Device mesh, sharding rules and multi-process start-up."""

from shiq_jax.sharding.mesh import AXES, describe, make_mesh
from shiq_jax.sharding.processes import start_processes
from shiq_jax.sharding.rules import RULES, constrain, named_sharding, partition_spec

__all__ = ["AXES", "RULES", "constrain", "describe", "make_mesh", "named_sharding", "partition_spec", "start_processes"]
