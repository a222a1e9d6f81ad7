"""Whether losses give their tracker to all operations that own a parameter, read off the traced program."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from shiq_jax.models.ghost_norms import HEAD, LOOKUP, OPERATION, NormTracker

# What hands a parameter on as it is: changes of type, shape and place.
_PASSING = {
    "convert_element_type", "transpose", "reshape", "squeeze", "copy", "sharding_constraint", "optimization_barrier",
    "device_put", "reduce_precision",
}  # fmt: skip
# Names by which operations own what they read.
_OWNING = (OPERATION, LOOKUP, HEAD)
# Programs inside programs that are run once.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


class Coverage(NamedTuple):
    """What tracked operations see of losses.

    Attributes:
        missed: names of the parameters whose gradients they would not see, or would see in several parts.
        groups: how many gradients they see of the others, one for each layer where a stack of parameters is scanned.
    """

    missed: list[str]
    groups: int


def coverage(losses: Callable, params: Any, batch: Any) -> Coverage:
    """Which parameters are covered: exactly one tracked operation owns each, and nothing else reads it.

    Two own it where it is both the table that tokens are looked up in and the head, which know of each other.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params))
    structure, units = jax.tree.structure(params), len(jax.tree.leaves(batch)[0])

    def program(*leaves):
        tracker = NormTracker(jnp.zeros(units, jnp.float32))
        return losses(jax.tree.unflatten(structure, leaves), batch, tracker)

    jaxpr = jax.make_jaxpr(program)(*leaves).jaxpr
    seen = _Uses()
    seen.walk(jaxpr, dict(zip(jaxpr.invars, range(len(leaves)))))
    missed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for number, path in enumerate(paths)
        if seen.others[number]
        or sorted(seen.owners[number]) not in ([OPERATION], [LOOKUP], [HEAD], sorted([LOOKUP, HEAD]))
    ]
    return Coverage(missed, sum(seen.times[number] for number in seen.owners))


class _Uses:
    """By number of the parameter: the tracked operations that own it, how often one runs, and what else reads it."""

    def __init__(self):
        self.owners: defaultdict[int, list[str]] = defaultdict(list)
        self.times: Counter[int] = Counter()
        self.others: Counter[int] = Counter()

    def walk(self, jaxpr, found: dict) -> None:
        """Follow the parameters `found`, numbers by variable, through a program; what hands them on is added."""
        for eqn in jaxpr.eqns:
            read = {place: found[var] for place, var in enumerate(eqn.invars) if isinstance(var, Var) and var in found}
            if not read:
                continue
            name = eqn.primitive.name
            if name in _PASSING:
                found.update((eqn.outvars[place], number) for place, number in read.items())
            elif name == "name" and eqn.params["name"] in _OWNING:
                (number,) = read.values()
                self.owners[number].append(eqn.params["name"])
                self.times[number] = max(self.times[number], 1)
            elif name == "scan":
                self._scan(eqn, read)
            elif name in _CALLS and (inner := _inner(eqn)) is not None:
                # What a tracked operation does with what it owns is its own affair.
                owned = name == "custom_vjp_call" and any(
                    each.primitive.name == "name" and each.params["name"] in _OWNING for each in inner.eqns
                )
                returned = self._call(inner, read, owned=owned)
                found.update((eqn.outvars[place], number) for place, number in returned.items())
            else:
                self.others.update(read.values())

    def _call(self, inner, read: dict[int, int], owned: bool = False, times: int = 1) -> dict[int, int]:
        """Walk an inner program that runs so many times; which of its results are parameters, by place."""
        uses, within = _Uses(), {inner.invars[place]: number for place, number in read.items()}
        uses.walk(inner, within)
        for number in set(read.values()):
            self.owners[number] += uses.owners[number]
            self.times[number] = max(self.times[number], times * uses.times[number])
            if not (owned and uses.owners[number]):
                self.others[number] += uses.others[number]
        return {place: within[var] for place, var in enumerate(inner.outvars) if isinstance(var, Var) and var in within}

    def _scan(self, eqn, read: dict[int, int]) -> None:
        """A stack of parameters that is cut along the scan is used once; what every iteration sees, in each."""
        inner, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
        whole = eqn.params["num_consts"] + eqn.params["num_carry"]
        once = {place: number for place, number in read.items() if place >= whole or length == 1}
        self.others.update(number for place, number in read.items() if place not in once)
        # A parameter that comes out of a scan again is one that is carried or stacked: not followed any further.
        self.others.update(self._call(inner, once, times=length).values())


def _inner(eqn):
    """The program that an equation runs, when it has one with the same inputs."""
    found = [value for value in eqn.params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
    if len(found) != 1:
        return None
    inner = found[0].jaxpr if isinstance(found[0], ClosedJaxpr) else found[0]
    return inner if len(inner.invars) == len(eqn.invars) else None
