"""Options of a loss, read from the keyword parameters and the docstring of its function."""

import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)")


class Option(NamedTuple):
    """A keyword option of a loss.

    Fields:
      kind: `bool`, `int`, `float` or a `Literal` of strings.
      default: default value.
      text: description from the docstring of the loss, or "".
    """

    kind: Any
    default: Any
    text: str = ""


def options_from_signature(
    function: Callable, *, exclude: Collection[str] = (), defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> dict[str, Option]:
    """Return the keyword-only parameters of a function as options.

    Args:
      function: its annotations give the kinds, the "Args:" entries of its docstring the descriptions.
      exclude: names of parameters that are not options.
      defaults: defaults that override or complete those of the signature.

    Raises:
      ValueError: a parameter has no default in either place.
    """
    texts, options = docstring_entries(function), {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name in exclude:
            continue
        default = defaults.get(parameter.name, parameter.default)
        if default is inspect.Parameter.empty:
            raise ValueError(f"option {parameter.name!r} of {function.__name__} has no default; add one.")
        kind, text = option_kind(parameter.annotation), texts.get(parameter.name, "")
        options[parameter.name] = Option(kind, default, text)
    return options


def option_kind(annotation: Any) -> Any:
    """Kind of an option with this annotation: `Literal`, `bool` or `int`, possibly optional; `float` otherwise."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        alternatives = [kind for kind in get_args(annotation) if kind is not type(None)]
        annotation = alternatives[0] if len(alternatives) == 1 else float
    return annotation if annotation in (bool, int) or get_origin(annotation) is Literal else float


def docstring_entries(documented: Any) -> dict[str, str]:
    """Parse the entries `name: text` under "Args:" or "Fields:" of a docstring."""
    texts, names, depth = {}, [], None
    for line in inspect.getdoc(documented).splitlines() if documented.__doc__ else ():
        indent = len(line) - len(line.lstrip())
        if depth is None:
            depth = indent if line.strip().rstrip(":") in ("Args", "Fields") else None
        elif line.strip() and indent <= depth:
            depth, names = None, []
        elif (entry := ENTRY.fullmatch(line.strip())) and indent == depth + 2:
            names = entry["names"].split(", ")
            texts |= dict.fromkeys(names, entry["text"])
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts
