"""Options of a loss: its keyword parameters, read from its own signature and docstring."""

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
      default: its value when it is not given.
      text: what it does, from the docstring of the loss; "" when that does not say.
    """

    kind: Any
    default: Any
    text: str = ""


def declared(
    function: Callable, *, without: Collection[str] = (), defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> dict[str, Option]:
    """The keyword-only parameters of a function as options.

    Args:
      function: its annotations give the kinds, the entries under "Args:" in its docstring the texts.
      without: names of parameters that are no options.
      defaults: defaults that replace, or supply, those of the signature.

    Raises:
      ValueError: a parameter has no default in either place.
    """
    texts, found = described(function), {}
    for each in inspect.signature(function, eval_str=True).parameters.values():
        if each.kind is not inspect.Parameter.KEYWORD_ONLY or each.name in without:
            continue
        default = defaults.get(each.name, each.default)
        if default is inspect.Parameter.empty:
            raise ValueError(f"option {each.name!r} of {function.__name__} has no default; give it one.")
        found[each.name] = Option(kind_of(each.annotation), default, texts.get(each.name, ""))
    return found


def kind_of(annotation: Any) -> Any:
    """The kind of an option with this annotation: `Literal`, `bool` or `int` (or None) as such, numbers as `float`."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        alternatives = [each for each in get_args(annotation) if each is not type(None)]
        annotation = alternatives[0] if len(alternatives) == 1 else float
    return annotation if annotation in (bool, int) or get_origin(annotation) is Literal else float


def described(documented: Any) -> dict[str, str]:
    """Texts of the entries `name: text` under "Args:" or "Fields:" in a docstring, by name."""
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
