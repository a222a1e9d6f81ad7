"""Check, on the traced program, that losses pass their tracker to every operation that owns a parameter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from shiq_jax.models.ghost_norms import HEAD, LOOKUP, OPERATION, NormTracker

# Primitives whose output is still the parameter, up to dtype, shape or placement.
_PASS_THROUGH = {
    "convert_element_type", "transpose", "reshape", "squeeze", "copy", "sharding_constraint", "optimization_barrier",
    "device_put", "reduce_precision",
}  # fmt: skip
# Names (`checkpoint_name`) with which tracked operations mark their parameter.
_OWNER_NAMES = (OPERATION, LOOKUP, HEAD)
# Primitives that run an inner program exactly once.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


class Coverage(NamedTuple):
    """Coverage of the parameters of losses by tracked operations.

    Attributes:
        uncovered: names of parameters whose gradient norm would be missed or split over several operations.
        groups: number of gradients that tracked operations clip; a scanned stack of parameters counts once per layer.
    """

    uncovered: list[str]
    groups: int


def coverage(losses: Callable, params: Any, batch: Any) -> Coverage:
    """Find the parameters that are not owned by exactly one tracked operation or are also read elsewhere.

    A tied table may have two owners, the lookup and the head, because these share their norms through the tracker.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params))
    structure, units = jax.tree.structure(params), len(jax.tree.leaves(batch)[0])

    def program(*leaves):
        tracker = NormTracker(jnp.zeros(units, jnp.float32))
        return losses(jax.tree.unflatten(structure, leaves), batch, tracker)

    jaxpr = jax.make_jaxpr(program)(*leaves).jaxpr
    uses = _ParameterUses()
    uses.walk(jaxpr, dict(zip(jaxpr.invars, range(len(leaves)))))
    uncovered = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for index, path in enumerate(paths)
        if uses.untracked[index]
        or sorted(uses.owners[index]) not in ([OPERATION], [LOOKUP], [HEAD], sorted([LOOKUP, HEAD]))
    ]
    return Coverage(uncovered, sum(uses.repeats[index] for index in uses.owners))


class _ParameterUses:
    """Uses of each parameter, by its index: owners, how often the owner runs, and the number of untracked reads."""

    def __init__(self):
        self.owners: defaultdict[int, list[str]] = defaultdict(list)
        self.repeats: Counter[int] = Counter()
        self.untracked: Counter[int] = Counter()

    def walk(self, jaxpr, params: dict) -> None:
        """Record the uses of `params` (variable -> parameter index) in a program; adds variables that alias them."""
        for eqn in jaxpr.eqns:
            reads = {pos: params[var] for pos, var in enumerate(eqn.invars) if isinstance(var, Var) and var in params}
            if not reads:
                continue
            name = eqn.primitive.name
            if name in _PASS_THROUGH:
                params.update((eqn.outvars[pos], index) for pos, index in reads.items())
            elif name == "name" and eqn.params["name"] in _OWNER_NAMES:
                (index,) = reads.values()
                self.owners[index].append(eqn.params["name"])
                self.repeats[index] = max(self.repeats[index], 1)
            elif name == "scan":
                self._scan(eqn, reads)
            elif name in _CALLS and (inner := _inner_jaxpr(eqn)) is not None:
                # A tracked operation accounts for every read of the parameter that it owns.
                tracked = name == "custom_vjp_call" and any(
                    inner_eqn.primitive.name == "name" and inner_eqn.params["name"] in _OWNER_NAMES
                    for inner_eqn in inner.eqns
                )
                aliases = self._call(inner, reads, tracked=tracked)
                params.update((eqn.outvars[pos], index) for pos, index in aliases.items())
            else:
                self.untracked.update(reads.values())

    def _call(self, inner, reads: dict[int, int], tracked: bool = False, repeats: int = 1) -> dict[int, int]:
        """Record the uses in an inner program that runs `repeats` times; return its outputs that are parameters."""
        uses, params = _ParameterUses(), {inner.invars[pos]: index for pos, index in reads.items()}
        uses.walk(inner, params)
        for index in set(reads.values()):
            self.owners[index] += uses.owners[index]
            self.repeats[index] = max(self.repeats[index], repeats * uses.repeats[index])
            if not (tracked and uses.owners[index]):
                self.untracked[index] += uses.untracked[index]
        return {pos: params[var] for pos, var in enumerate(inner.outvars) if isinstance(var, Var) and var in params}

    def _scan(self, eqn, reads: dict[int, int]) -> None:
        """Record the uses in a scan: a scanned-over stack is used once per layer, a constant or carry repeatedly."""
        inner, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
        num_unsliced = eqn.params["num_consts"] + eqn.params["num_carry"]
        used_once = {pos: index for pos, index in reads.items() if pos >= num_unsliced or length == 1}
        self.untracked.update(index for pos, index in reads.items() if pos not in used_once)
        # Parameters that a scan returns are not followed, so they count as untracked.
        self.untracked.update(self._call(inner, used_once, repeats=length).values())


def _inner_jaxpr(eqn):
    """The inner program of an equation, if there is exactly one and it has the same inputs."""
    jaxprs = [value for value in eqn.params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
    if len(jaxprs) != 1:
        return None
    inner = jaxprs[0].jaxpr if isinstance(jaxprs[0], ClosedJaxpr) else jaxprs[0]
    return inner if len(inner.invars) == len(eqn.invars) else None
