"""The embedded task: sort the digits of a word. Unlimited, verifiable, and learned in a minute.

    {"prompt": "sort 52941:", "answer": "12459"}

A word belongs to the held-out split by a checksum of its sorted digits, so the two splits share neither a prompt nor an
answer, whatever the seeds and counts.
"""

from __future__ import annotations

import zlib

import numpy as np

SPLITS = ("train", "held_out")
_HELD_OUT_ONE_IN = 8


def sorting_rows(
    count: int, *, split: str = "train", seed: int = 0, min_length: int = 4, max_length: int = 7
) -> list[dict[str, str]]:
    """Draw `count` different rows `{"prompt", "answer"}` of one split.

    Args:
      count: number of rows.
      split: "train" or "held_out"; disjoint in prompts and in answers for all seeds.
      seed: random seed; the first rows of a longer draw with the same seed are the same rows.
      min_length, max_length: number of digits per word, both included, drawn uniformly.

    Raises ValueError for an unknown split, an empty range of lengths, or more rows than the range can give.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown: expected one of {', '.join(SPLITS)}")
    if not 1 <= min_length <= max_length:
        raise ValueError(
            f"min_length={min_length} and max_length={max_length} must satisfy 1 <= min_length <= max_length"
        )
    random = np.random.default_rng(seed)
    rows: dict[str, dict[str, str]] = {}
    # Rare words are found late; a range too small for the count would otherwise search forever.
    attempts_left = 1000 + 200 * count
    while len(rows) < count:
        attempts_left -= 1
        if attempts_left < 0:
            raise ValueError(
                f"count={count} rows of split {split!r} were not found among words of {min_length} to {max_length} "
                "digits: ask for fewer rows or raise max_length"
            )
        length = int(random.integers(min_length, max_length + 1))
        word = "".join(str(digit) for digit in random.integers(0, 10, length))
        answer = "".join(sorted(word))
        if is_held_out(answer) == (split == "held_out"):
            rows.setdefault(word, {"prompt": f"sort {word}:", "answer": answer})
    return list(rows.values())


def is_held_out(answer: str) -> bool:
    """Whether the word with these sorted digits belongs to the held-out split (one in eight)."""
    return zlib.crc32(answer.encode()) % _HELD_OUT_ONE_IN == 0


def sorting_reward(row: dict, completion: str) -> float:
    """Fraction of correct positions, in [0, 1]; 1 exactly when the completion is the answer.

    It is relative to the longer of the two texts, so extra digits cost as much as missing ones. White space around the
    completion is ignored.
    """
    answer, given = row["answer"], completion.strip()
    matches = sum(expected == found for expected, found in zip(answer, given, strict=False))
    return matches / max(len(answer), len(given))
