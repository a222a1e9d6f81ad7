"""Whether losses hand their accumulator to all operations that own a parameter: read off the traced program."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from shiq_jax.models.tracked import HEAD, LOOKUP, OPERATION, Accumulator

# What hands a parameter on as it is: changes of type, shape and place.
_PASSING = {
    "convert_element_type", "transpose", "reshape", "squeeze", "copy", "sharding_constraint", "optimization_barrier",
    "device_put", "reduce_precision",
}  # fmt: skip
# Programs inside programs that are run once.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


def uncovered(losses: Callable, params: Any, batch: Any) -> list[str]:
    """Names of the parameters whose gradients the tracked operations would not see, or would see in several parts.

    A parameter is covered when exactly one tracked operation owns it and nothing else reads it; two own it where it is
    both the table that tokens are looked up in and the head, which know of each other.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params))
    structure, units = jax.tree.structure(params), len(jax.tree.leaves(batch)[0])

    def program(*leaves):
        acc = Accumulator(jnp.zeros(units, jnp.float32))
        return losses(jax.tree.unflatten(structure, leaves), batch, acc)

    jaxpr = jax.make_jaxpr(program)(*leaves).jaxpr
    seen = _Uses()
    seen.walk(jaxpr, dict(zip(jaxpr.invars, range(len(leaves)))))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for number, path in enumerate(paths)
        if seen.others[number]
        or sorted(seen.owners[number]) not in ([OPERATION], [LOOKUP], [HEAD], sorted([LOOKUP, HEAD]))
    ]


class _Uses:
    """By number of the parameter: the tracked operations that own it, and how often something else reads it."""

    def __init__(self):
        self.owners: defaultdict[int, list[str]] = defaultdict(list)
        self.others: Counter[int] = Counter()

    def walk(self, jaxpr, found: dict) -> None:
        """Follow the parameters `found`, numbers by variable, through a program."""
        for eqn in jaxpr.eqns:
            read = {place: found[var] for place, var in enumerate(eqn.invars) if isinstance(var, Var) and var in found}
            if not read:
                continue
            name = eqn.primitive.name
            if name in _PASSING:
                found[eqn.outvars[0]] = read[0]
            elif name == "name" and eqn.params["name"] in (OPERATION, LOOKUP, HEAD):
                self.owners[read[0]].append(eqn.params["name"])
            elif name == "scan":
                self._scan(eqn, read)
            elif name in _CALLS and (inner := _inner(eqn)) is not None:
                self._call(inner, read, owned=name == "custom_vjp_call")
            else:
                self.others.update(read.values())

    def _call(self, inner, read: dict[int, int], owned: bool) -> None:
        uses = _Uses()
        uses.walk(inner, {inner.invars[place]: number for place, number in read.items()})
        for number in read.values():
            self.owners[number] += uses.owners[number]
            # What a tracked operation does with what it owns is its own affair.
            if not (owned and uses.owners[number]):
                self.others[number] += uses.others[number]

    def _scan(self, eqn, read: dict[int, int]) -> None:
        """A stack of parameters that is cut along the scan is used once; what every iteration sees, in each."""
        inner = eqn.params["jaxpr"].jaxpr
        whole = eqn.params["num_consts"] + eqn.params["num_carry"]
        once = {place: number for place, number in read.items() if place >= whole or eqn.params["length"] == 1}
        self.others.update(number for place, number in read.items() if place not in once)
        self._call(inner, once, owned=False)


def _inner(eqn):
    """The program that an equation runs, when it has one with the same inputs."""
    found = [value for value in eqn.params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
    if len(found) != 1:
        return None
    inner = found[0].jaxpr if isinstance(found[0], ClosedJaxpr) else found[0]
    return inner if len(inner.invars) == len(eqn.invars) else None
