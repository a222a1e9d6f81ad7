"""What passes between a model, an objective and an update step: plain tuples of arrays, and what an objective is."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from shiq_jax.objectives.options import Option, declared


class TokenStats(NamedTuple):
    """What a loss knows about the token taken at each position: two floats, whatever the size of the vocabulary.

    Fields, all of one shape [...], in nats:
      logp: log-probability of the token under softmax(logits).
      lse: log-sum-exp of the *raw* logits. Log-softmax output, max-subtracted logits or the log-probabilities of a
        serving engine have lost it, and with it the value function that ShiQ reads from it.
      lse2: log-sum-exp of twice the raw logits, or None when it was not asked for; `lse2 - 2 * lse` is the log of
        the collision probability, the sum of squared probabilities.
    """

    logp: Float[Array, "..."]
    lse: Float[Array, "..."]
    lse2: Float[Array, "..."] | None = None


class Example(NamedTuple):
    """One example as objectives see it: K sequences of T positions. What an objective does not need is None.

    K is 1 for a trajectory, 2 for a pair (sequence 0 chosen, sequence 1 rejected) and the group's size for a group.

    Fields:
      policy: statistics [K, T] of the model that is trained.
      references: statistics [K, T] of fixed models by name, such as "reference" or "previous".
      action_mask: bool[K, T], True where the model chose the token; prompt, user, tool and padding tokens are False.
      rewards: float[K, T], the reward for emitting each token; read at actions only.
      values: float[K, T] of value heads or TokenStats of Q heads, by name.
      bootstrap: float[K], the value of the state in which a truncated sequence was cut; None when all are complete.
      labels: bool[K], whether each sequence is desirable, to objectives that take no pairs.
      prompt_policy: statistics of the trained model on the prompt's own tokens.
      coupled: what `Couple.combine` computed for this example from the whole batch.
    """

    policy: TokenStats | None = None
    references: Mapping[str, TokenStats] | None = None
    action_mask: Bool[Array, "K T"] | None = None
    rewards: Float[Array, "K T"] | None = None
    values: Mapping[str, Any] | None = None
    bootstrap: Float[Array, " K"] | None = None
    labels: Array | None = None
    prompt_policy: TokenStats | None = None
    coupled: Any = None


class Sequence(NamedTuple):
    """One sequence with rewards, as losses read it: fields of [T] as in `Example`, `reference` among its references."""

    policy: TokenStats
    reference: TokenStats | None
    rewards: Float[Array, " T"]
    action_mask: Bool[Array, " T"]
    bootstrap: Float[Array, ""] | None = None


class LossOut(NamedTuple):
    """The loss of one example, as sums: over a batch the loss is sum(value) / sum(weight).

    Fields, all scalars:
      value: the example's contribution to the loss; 0 for an empty example.
      weight: how many of what the mean runs over (sequences, pairs or action tokens) the example holds.
      metrics: name -> sum over what `weight` counts, so that sum(metric) / sum(weight) is the mean to report.
    """

    value: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Mapping[str, Float[Array, ""]]


class Couple(NamedTuple):
    """How an objective lets the examples of a batch know of each other, once per global batch.

    Fields:
      summary: Example -> pytree, computed per example.
      combine: (summaries with leading [B], weights [B]) -> pytree with leading [B]; slice b reaches example b as
        `Example.coupled`, without gradient.
    """

    summary: Callable[[Example], Any]
    combine: Callable[[Any, Float[Array, " B"]], Any]


class Objective(NamedTuple):
    """A loss on one example, with what an update step has to know to feed it.

    Fields:
      loss: (example, **options) -> LossOut; every option is a keyword with a default.
      needs: the Example fields it reads beside `policy`, `action_mask` and `values`.
      unit: what an example is: "trajectory", "pair" or "group".
      couple: None when examples are independent of each other, as private training requires.
      heads: what it reads of `Example.values`, by name: "value" for a number per state, "q" for the TokenStats of a row
        of Q-values. They learn on hidden states that are constants to them.
      target_heads: heads of which it also reads a Polyak-averaged copy, named "target_" and the name of the head.
      polyak: step size of these averages, in (0, 1].
      policy: whether it reads `Example.policy`. Otherwise the model's own weights do not change, and the policy is that
        of the model with Q / beta added to its logits, Q the smaller of its Q heads.
      extra: what it reads of the policy's statistics beside `logp` and `lse`, with the name of the option that asks for
        it, or None when it is always read.
      beta: the temperature of the policy of an objective that does not read `Example.policy`.
      declared: the options of the loss; None where its own signature declares them.
    """

    loss: Callable[..., LossOut]
    needs: frozenset[str]
    unit: str
    couple: Couple | None = None
    heads: Mapping[str, str] = MappingProxyType({})
    target_heads: tuple[str, ...] = ()
    polyak: float = 0.005
    policy: bool = True
    extra: Mapping[str, str | None] = MappingProxyType({})
    beta: float = 0.1
    declared: Mapping[str, Option] | None = None

    @property
    def name(self) -> str:
        """Name of its loss."""
        return getattr(getattr(self.loss, "func", self.loss), "__name__", "?")

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the policy beside `logp` and `lse` that it reads with the options that are bound."""
        bound = getattr(self.loss, "keywords", {})
        return tuple(name for name, option in self.extra.items() if option is None or bound.get(option))

    @property
    def q_guidance(self) -> float:
        """What its Q heads are multiplied with before they are added to the logits; 0 where the policy learns."""
        return 0.0 if self.policy else 1 / self.beta

    @property
    def options(self) -> dict[str, Option]:
        """Options by name: the keyword options of its loss, and those of its own fields that matter to it."""
        found = dict(declared(getattr(self.loss, "func", self.loss)) if self.declared is None else self.declared)
        if not self.policy:
            found["beta"] = Option(float, self.beta, "Q / beta is added to the logits, Q the smaller of the Q heads.")
        if self.target_heads:
            found["polyak"] = Option(float, self.polyak, "step size of the Polyak averages of the Q heads, in (0, 1].")
        return found

    def configure(self, **options: Any) -> "Objective":
        """The same objective with options bound to these values.

        Raises ValueError for a name that is no option; `check_options` also checks the values.
        """
        known = self.options
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(
                f"option {unknown[0]!r} is none of the objective {self.name!r}, which takes "
                f"{', '.join(known) or 'none'}."
            )
        own = {"beta": not self.policy, "polyak": bool(self.target_heads)}
        fields = {name: options.pop(name) for name in own if own[name] and name in options}
        return self._replace(loss=partial(self.loss, **options), **fields)
