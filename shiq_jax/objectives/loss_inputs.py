"""What plain losses read of an example, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array

from shiq_jax.objectives.types import Example, TokenStats
from shiq_jax.objectives.validation import as_mask


class LossInput(NamedTuple):
    """An input of losses.

    Fields:
      read: Reading -> its value.
      needs: the Example fields that it is made of, beside `action_mask`; not those that may be None.
      heads: the heads that it needs, name -> kind as in `Objective`.
      target_heads: the heads of which it reads a Polyak-averaged copy.
    """

    read: Callable[["LossInputs"], Any]
    needs: tuple[str, ...] = ()
    heads: Mapping[str, str] = MappingProxyType({})
    target_heads: tuple[str, ...] = ()


class LossInputs:
    """The inputs of one example; each is computed when it is first read.

    Attributes:
      example, name, options: the example, the objective that reads it, the options of that objective.
      needs: the Example fields that the objective needs.
      mask: bool[K, T].
    """

    def __init__(
        self, example: Example, inputs: Mapping[str, LossInput], *, name: str, needs: frozenset[str] = frozenset(),
        options: Mapping[str, Any] = MappingProxyType({}),
    ):  # fmt: skip
        fields(example, name, "action_mask", *sorted(needs))
        self.example, self.name, self.needs, self.options = example, name, needs, options
        self.mask = as_mask(example.action_mask)
        self._inputs, self._known = inputs, {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = self._inputs[name].read(self)
        return self._known[name]

    def field(self, name: str) -> Any:
        """A field of the example; raises ValueError when it is None."""
        return fields(self.example, self.name, name)[0]

    def head(self, name: str) -> Array | TokenStats:
        """What a head says; raises ValueError when the example has no values."""
        return self.field("values")[name]

    def reference(self) -> TokenStats:
        """Statistics of the model called "reference"; raises ValueError when there is none."""
        return reference_of(self.example, self.name)


def fields(example: Example, objective: str, *names: str) -> list:
    """Fields of an example; raises ValueError naming the first that is None."""
    for name in names:
        if getattr(example, name) is None:
            raise ValueError(f"Example.{name} is None but objective {objective!r} needs it; give it.")
    return [getattr(example, name) for name in names]


def reference_of(example: Example, objective: str) -> TokenStats:
    """Statistics of the model that is called "reference"; raises ValueError when there is none."""
    (references,) = fields(example, objective, "references")
    if "reference" not in references:
        raise ValueError(
            f"objective {objective!r} needs statistics of the model named 'reference', but Example.references has "
            f"{', '.join(map(repr, references)) or 'none'}; annotate the data with it."
        )
    return references["reference"]
