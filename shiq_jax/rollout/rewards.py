"""Rewards by name: `reward(row, completion) -> float`, a pure function of the row of a prompt and a completion's
text."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shiq_jax.errors import UserError

Reward = Callable[[Mapping[str, Any], str], float]


def exact(row: Mapping[str, Any], completion: str) -> float:
    """1.0 when the completion, without white space around it, is `row["answer"]`, else 0.0."""
    if "answer" not in row:
        raise UserError(f"{describe(row)} has no 'answer', which the reward 'exact' compares with: add the field")
    return float(str(row["answer"]) == completion.strip())


def resolve(name: str, named: Mapping[str, Reward]) -> Reward:
    """The reward that a name stands for, checked on every call to return a finite number.

    Args:
      name: a key of `named`, or "module:function" of anything that can be imported, the working directory included.
      named: rewards by name.

    Raises UserError when there is no such reward; the returned function raises UserError, naming the row, when the reward
    fails or is not a finite number.
    """
    return _checked(name, named[name] if name in named else _imported(name, named))


def describe(row: Mapping[str, Any]) -> str:
    """How a message names a row: by its id where it has one, else by the beginning of its prompt."""
    if row.get("id") is not None:
        return f"the row {row['id']!r}"
    return f"the row with the prompt {json.dumps(row.get('prompt'), default=str, ensure_ascii=False)[:80]}"


def _imported(name: str, named: Iterable[str]) -> Reward:
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"the reward {name!r} is unknown: expected {', '.join(named)}, or module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"the module of the reward {name!r} cannot be imported ({type(error).__name__}: {error}): expected a "
            "module that Python finds from here"
        ) from error
    reward = getattr(module, function_name, None)
    if not callable(reward):
        raise UserError(
            f"the module {module_name} has no function {function_name!r}: expected one that takes (row, completion) "
            "and returns a number"
        )
    return reward


def _checked(name: str, reward: Reward) -> Reward:
    @functools.wraps(reward)
    def checked(row: Mapping[str, Any], completion: str) -> float:
        try:
            value = reward(row, completion)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the reward {name!r} failed with {type(error).__name__}: {error} for {describe(row)} and the "
                f"completion {completion[:80]!r}: expected a finite number; give the row what the reward reads, or "
                "mend the reward"
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"the reward {name!r} gave {value!r} for {describe(row)} and the completion {completion[:80]!r}: "
                "expected a finite number"
            )
        return number

    return checked
