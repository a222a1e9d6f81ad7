"""Toy task with a verifiable reward: sort the digits of a number.

    {"prompt": "sort 52941:", "answer": "12459"}

A checksum of the sorted digits assigns each number to a split, so the splits share neither a prompt nor an answer for
any seeds and counts.
"""

from __future__ import annotations

import zlib

import numpy as np

SPLITS = ("train", "held_out")
_HELD_OUT_MODULUS = 8


def sorting_rows(
    count: int, *, split: str = "train", seed: int = 0, min_length: int = 4, max_length: int = 7
) -> list[dict[str, str]]:
    """Generate `count` distinct rows `{"prompt", "answer"}` of one split.

    Args:
        count: number of rows.
        split: "train" or "held_out"; disjoint in prompts and in answers for all seeds.
        seed: random seed; fewer rows of the same seed are a prefix of more.
        min_length, max_length: range of the number of digits, inclusive; sampled uniformly.

    Raises:
        ValueError: the split is unknown, the range of lengths is empty, or it has fewer than `count` numbers.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: expected one of {', '.join(SPLITS)}")
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"min_length={min_length} and max_length={max_length} must satisfy 1 <= min_length <= max_length"
        )
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, str]] = {}
    # Bounded, because a range with fewer than `count` numbers would loop forever.
    attempts_left = 1000 + 200 * count
    while len(rows) < count:
        attempts_left -= 1
        if attempts_left < 0:
            raise ValueError(
                f"count={count} rows of split {split!r} were not found among numbers of {min_length} to {max_length} "
                "digits: lower count or raise max_length"
            )
        length = int(rng.integers(min_length, max_length + 1))
        digits = "".join(str(digit) for digit in rng.integers(0, 10, length))
        answer = "".join(sorted(digits))
        if is_held_out(answer) == (split == "held_out"):
            rows.setdefault(digits, {"prompt": f"sort {digits}:", "answer": answer})
    return list(rows.values())


def is_held_out(answer: str) -> bool:
    """Whether numbers with these sorted digits belong to the held-out split (one in eight)."""
    return zlib.crc32(answer.encode()) % _HELD_OUT_MODULUS == 0


def sorting_reward(row: dict, completion: str) -> float:
    """Fraction of correct positions, in [0, 1]; 1 only if the stripped completion equals the answer.

    The denominator is the longer of the two lengths, so that extra digits are penalized like missing ones.
    """
    answer, text = row["answer"], completion.strip()
    matches = sum(expected == actual for expected, actual in zip(answer, text, strict=False))
    return matches / max(len(answer), len(text))
