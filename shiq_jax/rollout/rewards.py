"""Reward functions by name: `reward(row, completion) -> float`, pure functions of a prompt row and a text."""

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
    """1.0 if the stripped completion equals `row["answer"]`, else 0.0."""
    if "answer" not in row:
        raise UserError(f"{describe(row)} has no 'answer', which the reward 'exact' needs: add the field")
    return float(str(row["answer"]) == completion.strip())


def resolve(name: str, registry: Mapping[str, Reward]) -> Reward:
    """Look up or import a reward function, and wrap it so that it must return a finite number.

    Args:
        name: a key of `registry`, or "module:function"; modules of the working directory can be imported too.
        registry: rewards by name.

    Raises:
        UserError: the reward does not exist. The returned function raises UserError with the row if the reward raises
            or returns anything other than a finite number.
    """
    return _checked(name, registry[name] if name in registry else _import(name, registry))


def describe(row: Mapping[str, Any]) -> str:
    """Describe a row in a message: by its id, or by the beginning of its prompt if it has none."""
    if row.get("id") is not None:
        return f"the row {row['id']!r}"
    return f"the row with the prompt {json.dumps(row.get('prompt'), default=str, ensure_ascii=False)[:80]}"


def _import(name: str, registry: Iterable[str]) -> Reward:
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"the reward {name!r} is unknown: expected {', '.join(registry)}, or module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"the module of the reward {name!r} cannot be imported ({type(error).__name__}: {error}): check its name, "
            "and that it is installed or in the working directory"
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
                f"completion {completion[:80]!r}: add the fields that the reward reads to the row, or fix the reward"
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"the reward {name!r} returned {value!r} for {describe(row)} and the completion {completion[:80]!r}: "
                "expected a finite number"
            )
        return number

    return checked
