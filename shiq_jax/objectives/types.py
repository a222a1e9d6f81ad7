"""What passes between a model, an objective and an update step: plain tuples of arrays, and what an objective is."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float


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
      slow: the heads of which it also reads, as "target_" and their name, copies that follow slowly.
      polyak: how much of the way to what they follow these go in one update.
      policy: whether it reads `Example.policy`. What does not leaves the model's own weights as they are, and its heads
        steer what is sampled.
      extra: what it reads of the policy's statistics beside `logp` and `lse`, with the name of the option that asks for
        it, or None when it is always read.
    """

    loss: Callable[..., LossOut]
    needs: frozenset[str]
    unit: str
    couple: Couple | None = None
    heads: Mapping[str, str] = MappingProxyType({})
    slow: tuple[str, ...] = ()
    polyak: float = 0.005
    policy: bool = True
    extra: Mapping[str, str | None] = MappingProxyType({})

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the policy beside `logp` and `lse` that it reads with the options that are bound."""
        bound = getattr(self.loss, "keywords", {})
        return tuple(name for name, option in self.extra.items() if option is None or bound.get(option))

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options of its loss."""
        parameters = inspect.signature(self.loss).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    def configure(self, **options: Any) -> "Objective":
        """The same objective with keyword options of its loss bound to these values.

        Raises ValueError for a name that the loss does not take.
        """
        known = self.options
        unknown = sorted(set(options) - set(known))
        if unknown:
            name = getattr(getattr(self.loss, "func", self.loss), "__name__", "?")
            raise ValueError(
                f"option {unknown[0]!r} is none of the objective {name!r}, which takes {', '.join(known) or 'none'}."
            )
        return self._replace(loss=partial(self.loss, **options))
