"""Data types of objectives: token statistics, examples, loss outputs and the objective itself."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from shiq_jax.objectives.options import Option, options_from_signature


class TokenStats(NamedTuple):
    """Statistics of the logits at the token taken at each position: two floats per token for any vocabulary size.

    Fields, all of one shape [...], in nats:
      logp: log-probability of the token under softmax(logits).
      lse: log-sum-exp of the *raw* logits, from which ShiQ reads the value function. It cannot be recovered from
        log-softmax outputs, max-subtracted logits or the log-probabilities of an inference server.
      lse2: log-sum-exp of twice the raw logits, or None unless requested; `lse2 - 2 * lse` is the log of the collision
        probability, the sum of squared probabilities.
    """

    logp: Float[Array, "..."]
    lse: Float[Array, "..."]
    lse2: Float[Array, "..."] | None = None


class Example(NamedTuple):
    """One example: K sequences of T positions. Fields that the objective does not need may be None.

    K is 1 for a trajectory, 2 for a pair (sequence 0 chosen, sequence 1 rejected) and the group size for a group.

    Fields:
      policy: statistics [K, T] of the trained model.
      references: statistics [K, T] of frozen models by name, such as "reference" or "previous".
      action_mask: bool[K, T], True where the model chose the token; prompt, user, tool and padding tokens are False.
      rewards: float[K, T], the reward for emitting each token; read at actions only.
      values: float[K, T] of value heads or TokenStats of Q heads, by name.
      bootstrap: float[K], the value of the state at which a sequence was truncated; None if all are complete.
      labels: bool[K], True for a desirable sequence, for objectives on unpaired data.
      coupled: the slice of `Couple.combine` that belongs to this example.
    """

    policy: TokenStats | None = None
    references: Mapping[str, TokenStats] | None = None
    action_mask: Bool[Array, "K T"] | None = None
    rewards: Float[Array, "K T"] | None = None
    values: Mapping[str, Any] | None = None
    bootstrap: Float[Array, " K"] | None = None
    labels: Array | None = None
    coupled: Any = None


class Sequence(NamedTuple):
    """One sequence with rewards: fields of shape [T] as in `Example`; `reference` is the entry of its references."""

    policy: TokenStats
    reference: TokenStats | None
    rewards: Float[Array, " T"]
    action_mask: Bool[Array, " T"]
    bootstrap: Float[Array, ""] | None = None


class LossOut(NamedTuple):
    """The loss of one example, as sums: the loss of a batch is sum(value) / sum(weight).

    Fields, all scalars:
      value: contribution of the example to the loss; 0 for an empty example.
      weight: number of terms of the mean (sequences, pairs or action tokens) in the example.
      metrics: name -> sum over the terms that `weight` counts; sum(metric) / sum(weight) is the reported mean.
    """

    value: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Mapping[str, Float[Array, ""]]


class Couple(NamedTuple):
    """Coupling of the examples of a batch, computed once per global batch.

    Fields:
      summary: Example -> pytree, computed per example.
      combine: (summaries with leading [B], weights [B]) -> pytree with leading [B]; example b receives slice b as
        `Example.coupled`, without gradient.
    """

    summary: Callable[[Example], Any]
    combine: Callable[[Any, Float[Array, " B"]], Any]


class Objective(NamedTuple):
    """A loss on one example and its data requirements.

    Fields:
      loss: (example, **options) -> LossOut; every option is a keyword with a default.
      needs: Example fields that it reads, in addition to `policy`, `action_mask` and `values`.
      unit: kind of example: "trajectory", "pair" or "group".
      couple: coupling of the examples of a batch; None if they are independent, as private training requires.
      heads: heads read from `Example.values`, name -> kind: "value" for a scalar per state, "q" for the TokenStats of a
        row of Q-values. Their inputs, the hidden states, are constants.
      target_heads: heads with a Polyak-averaged copy, which is named "target_" plus the name of the head.
      polyak: step size of the Polyak averages, in (0, 1].
      trains_policy: whether it reads `Example.policy`. If False, the weights of the model do not change, and the policy
        is the model with Q / beta added to its logits, where Q is the smaller of the Q heads.
      optional_stats: statistics of the policy beyond `logp` and `lse`, name -> option that enables it, or None if it is
        always needed.
      beta: temperature of the policy if `trains_policy` is False.
      declared_options: options of the loss; None to read them from its signature.
    """

    loss: Callable[..., LossOut]
    needs: frozenset[str]
    unit: str
    couple: Couple | None = None
    heads: Mapping[str, str] = MappingProxyType({})
    target_heads: tuple[str, ...] = ()
    polyak: float = 0.005
    trains_policy: bool = True
    optional_stats: Mapping[str, str | None] = MappingProxyType({})
    beta: float = 0.1
    declared_options: Mapping[str, Option] | None = None

    @property
    def name(self) -> str:
        """Name of the loss."""
        return getattr(getattr(self.loss, "func", self.loss), "__name__", "?")

    @property
    def extra_stats(self) -> tuple[str, ...]:
        """Statistics of the policy beyond `logp` and `lse` that the bound options require."""
        bound = getattr(self.loss, "keywords", {})
        return tuple(name for name, option in self.optional_stats.items() if option is None or bound.get(option))

    @property
    def q_guidance(self) -> float:
        """Factor on the Q heads when they are added to the logits; 0 if the policy itself is trained."""
        return 0.0 if self.trains_policy else 1 / self.beta

    @property
    def options(self) -> dict[str, Option]:
        """Options by name: those of the loss, and `beta` and `polyak` if these fields apply."""
        declared = self.declared_options
        if declared is None:
            declared = options_from_signature(getattr(self.loss, "func", self.loss))
        options = dict(declared)
        if not self.trains_policy:
            options["beta"] = Option(float, self.beta, "Q / beta is added to the logits, Q the smaller of the Q heads.")
        if self.target_heads:
            options["polyak"] = Option(
                float, self.polyak, "step size of the Polyak averages of the Q heads, in (0, 1]."
            )
        return options

    def configure(self, **options: Any) -> "Objective":
        """Return a copy of the objective with these options bound.

        Raises ValueError for an unknown option; `check_options` validates the values.
        """
        known = self.options
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"objective {self.name!r} has no option {unknown[0]!r}; its options are {', '.join(known) or 'none'}."
            )
        is_field = {"beta": not self.trains_policy, "polyak": bool(self.target_heads)}
        fields = {name: options.pop(name) for name in is_field if is_field[name] and name in options}
        return self._replace(loss=partial(self.loss, **options), **fields)
