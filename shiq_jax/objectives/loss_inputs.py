"""Named inputs of plain losses, computed from an example."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array

from shiq_jax.objectives.types import Example, TokenStats
from shiq_jax.objectives.validation import as_mask


class LossInput(NamedTuple):
    """An input of losses.

    Fields:
      compute: LossInputs -> the value of the input.
      needs: Example fields that it requires, in addition to `action_mask`; fields that may be None are not listed.
      heads: heads that it requires, name -> kind as in `Objective`.
      target_heads: heads whose Polyak-averaged copy it reads.
    """

    compute: Callable[["LossInputs"], Any]
    needs: tuple[str, ...] = ()
    heads: Mapping[str, str] = MappingProxyType({})
    target_heads: tuple[str, ...] = ()


class LossInputs:
    """Inputs of one example by name; each is computed on first access.

    Attributes:
      example, name, options: the example, the name of the objective and the values of its options.
      needs: Example fields that the objective needs.
      mask: bool[K, T], the action mask.
    """

    def __init__(
        self, example: Example, definitions: Mapping[str, LossInput], *, name: str, needs: frozenset[str] = frozenset(),
        options: Mapping[str, Any] = MappingProxyType({}),
    ):  # fmt: skip
        required_fields(example, name, "action_mask", *sorted(needs))
        self.example, self.name, self.needs, self.options = example, name, needs, options
        self.mask = as_mask(example.action_mask)
        self._definitions, self._cache = definitions, {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._cache:
            self._cache[name] = self._definitions[name].compute(self)
        return self._cache[name]

    def field(self, name: str) -> Any:
        """Field of the example; raises ValueError if it is None."""
        return required_fields(self.example, self.name, name)[0]

    def head(self, name: str) -> Array | TokenStats:
        """Output of a head; raises ValueError if the example has no values."""
        return self.field("values")[name]

    def reference(self) -> TokenStats:
        """Statistics of the model named "reference"; raises ValueError if they are missing."""
        return reference_stats(self.example, self.name)


def required_fields(example: Example, objective: str, *names: str) -> list:
    """Fields of an example; raises ValueError for the first that is None."""
    for name in names:
        if getattr(example, name) is None:
            raise ValueError(f"Example.{name} is None but objective {objective!r} requires it.")
    return [getattr(example, name) for name in names]


def reference_stats(example: Example, objective: str) -> TokenStats:
    """Statistics of the model named "reference"; raises ValueError if they are missing."""
    (references,) = required_fields(example, objective, "references")
    if "reference" not in references:
        raise ValueError(
            f"objective {objective!r} needs statistics of the model named 'reference', but Example.references has "
            f"{', '.join(map(repr, references)) or 'none'}; annotate the data with it."
        )
    return references["reference"]
