"""Which two answers to a prompt make a pair."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def chosen_and_rejected(
    chosen: Sequence[bool | None],
    ranks: Sequence[float | None],
    scores: Sequence[float | None],
    returns: Float[np.ndarray, " answers"],
) -> tuple[int, int] | None:
    """Places of the chosen and the rejected answer among those to one prompt; None when none is better than another.

    What the data say decides: `chosen`, then ranks where answers have ranks and no scores, then returns, which are the
    scores where there are any. Among equals the earlier answer counts.

    Args:
        chosen, ranks, scores: of the records, see `Record`.
        returns: the sum of rewards of each record.
    """
    if any(side is not None for side in chosen):
        sides = list(chosen)
        return (sides.index(True), sides.index(False)) if {True, False} <= set(sides) else None
    if None not in ranks and None in scores:
        best, worst = min(ranks), max(ranks)
        return (list(ranks).index(best), list(ranks).index(worst)) if best < worst else None
    best, worst = int(np.argmax(returns)), int(np.argmin(returns))
    return (best, worst) if returns[best] > returns[worst] else None
