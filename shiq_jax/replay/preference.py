"""Selection of a preference pair among the answers to a prompt."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def select_pair(
    chosen: Sequence[bool | None],
    ranks: Sequence[float | None],
    scores: Sequence[float | None],
    returns: Float[np.ndarray, " answers"],
) -> tuple[int, int] | None:
    """Indices of the chosen and the rejected answer to a prompt; None if no answer is preferred to another.

    `chosen` flags take precedence, then ranks (if every answer has one and some answer has no score), then returns.
    Ties are broken in favor of the earlier answer.

    Args:
        chosen, ranks, scores: the fields of each answer's `Record`.
        returns: the sum of rewards of each answer.
    """
    if any(flag is not None for flag in chosen):
        flags = list(chosen)
        return (flags.index(True), flags.index(False)) if {True, False} <= set(flags) else None
    if None not in ranks and None in scores:
        best, worst = min(ranks), max(ranks)
        return (list(ranks).index(best), list(ranks).index(worst)) if best < worst else None
    best, worst = int(np.argmax(returns)), int(np.argmin(returns))
    return (best, worst) if returns[best] > returns[worst] else None
