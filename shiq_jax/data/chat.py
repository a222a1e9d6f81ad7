"""From prompts and completions, plain or conversational, to tokens and the mask of the tokens a policy chooses.

A prompt is a text or a list of messages `{"role", "content"}`. A completion is a text, or the messages that follow the
prompt: assistant turns, and between them tool or user turns, which are context and not actions. Every assistant turn
ends in the token with which a policy stops, and that token is an action like the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.errors import UserError, check_not_lfs_pointer

Prompt = str | Sequence[Mapping[str, Any]]
_MARK = "0MARK0"


class Encoded(NamedTuple):
    """A tokenised sequence: tokens int32[N], action_mask bool[N], turn_ends int32[turns].

    `turn_ends` holds, for each assistant turn, the index in `tokens` of its last action.
    """

    tokens: np.ndarray
    action_mask: np.ndarray
    turn_ends: np.ndarray


def load_tokenizer(path_or_hub_id: str | Path, vocab_size: int | None = None):
    """The transformers tokenizer of a model directory or of a hub id.

    vocab_size: of the model, when it is known.
    Raises UserError when there is no tokenizer, or it has a token that lies outside the model's vocabulary. (Vocabularies
    that are larger than their tokenizer are common: they are filled up to a round number.)
    """
    from transformers import AutoTokenizer

    name = str(path_or_hub_id)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(
            f"the directory {name} does not exist: expected a model directory with a tokenizer, or a hub id"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        if Path(name).is_dir():
            for file in sorted(Path(name).glob("*token*")):
                check_not_lfs_pointer(file)
            found = ", ".join(sorted(entry.name for entry in Path(name).iterdir())) or "nothing"
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} holds no tokenizer that transformers can load ({reason}; it holds: {found}): expected "
                "tokenizer.json or another tokenizer format beside config.json; save one there with "
                "tokenizer.save_pretrained"
            ) from error
        raise UserError(
            f"{name!r} is neither a directory with a tokenizer nor a hub id that can be reached now: check the "
            "spelling, or download the model and pass its directory"
        ) from error
    if not len(tokenizer):
        raise UserError(
            f"the tokenizer of {name} has no tokens: expected a trained vocabulary; copy the right tokenizer.json"
        )
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size is not None and number >= vocab_size:
        raise UserError(
            f"the tokenizer of {name} gives {token!r} the id {number}, and the model has a vocabulary of {vocab_size}: "
            "expected the tokenizer that the model was trained with; copy its files beside config.json"
        )
    return tokenizer


def encode_prompt(tokenizer, prompt: Prompt, tools: Sequence[Mapping] | None = None) -> list[int]:
    """Token ids from which a policy starts to generate; at least one.

    A text is opened as the tokenizer opens texts (with BOS where it has one); messages go through the chat template,
    with the header of the assistant's turn at the end. `tools` are function descriptions for templates that take them.
    """
    if isinstance(prompt, str):
        tokens = _encode_text(tokenizer, prompt)
    else:
        tokens = tokenizer(_render(tokenizer, prompt, tools, open_turn=True), add_special_tokens=False).input_ids
    if not tokens:
        raise UserError(
            "a prompt is empty and the tokenizer adds no token at its start, so the first action would have no "
            "predictor: give the prompt some text"
        )
    return list(tokens)


def encode_completion(
    tokenizer, prompt: Prompt, completion: str | Sequence[Mapping], tools: Sequence[Mapping] | None = None
) -> Encoded:
    """Tokens of prompt and completion, the mask of the completion's actions, and where its turns end.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt: text or messages; its tokens are those of `encode_prompt`, so completions of one prompt share them.
      completion: text (one assistant turn), or messages of which the assistant's are actions, each with its closing
        token; the rest of the conversation and the template's own text are context.
      tools: passed to the chat template.

    Text is closed by `end_of_turn` after messages and by the tokenizer's EOS after a text, unless it ends so already.
    Raises UserError when the completion has no assistant turn, or when the template renders a turn differently once later
    turns follow, so that no single sequence of tokens is what the policy saw.
    """
    if isinstance(completion, str):
        return _encode_single(tokenizer, prompt, completion, tools)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _encode_turns(tokenizer, list(prompt), list(completion), tools)


def encode_text(tokenizer, text: str) -> Encoded:
    """A whole text as one turn, closed by EOS: every token is an action but the first, which nothing predicts."""
    tokens = _encode_text(tokenizer, text)
    if not tokens or tokens[-1] != _eos(tokenizer):
        tokens.append(_eos(tokenizer))
    return _assemble([(tokens[:1], False), (tokens[1:], True)])


def end_of_turn(tokenizer) -> int:
    """The id of the token that closes an assistant turn: the template's, or EOS for tokenizers without a template."""
    text = ""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        text = _render(tokenizer, turns, None, open_turn=False).rpartition(_MARK)[2]
    special = _special_ids(tokenizer)
    for token in tokenizer(text, add_special_tokens=False).input_ids if text else ():
        if token in special:
            return int(token)
    return _eos(tokenizer)


def stop_tokens(tokenizer, model: str | Path | None = None) -> tuple[int, ...]:
    """All ids after which generation stops, sorted: EOS, the chat template's end of turn, and those the model names.

    `model` is a directory or hub id; its generation_config.json (or, without one, its config.json) may list more EOS
    ids. Raises UserError when that file is not a JSON object.
    """
    named = _named_stops(model) if model is not None else None
    stops = [named] if isinstance(named, int) else named or []
    return tuple(sorted({end_of_turn(tokenizer), _eos(tokenizer), *stops}))


def _named_stops(model: str | Path) -> int | list[int] | None:
    """The `eos_token_id` of a model's settings, None when it has none."""
    for name in ("generation_config.json", "config.json"):
        file = Path(model) / name if Path(model).is_dir() else _hub_file(str(model), name)
        if file is not None and Path(file).is_file():
            try:
                stops = json.loads(Path(file).read_text()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{file} is not a JSON object: expected the model's settings; download it again"
                ) from error
            if not all(isinstance(stop, int) for stop in (stops if isinstance(stops, list) else [stops or 0])):
                raise UserError(f"{file} has the eos_token_id {stops!r}: expected a token id, or a list of them")
            return stops
    return None


def _hub_file(name: str, file: str) -> str | None:
    from transformers.utils import cached_file

    try:
        return cached_file(name, file)
    except OSError:
        return None


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer names no EOS token, so no completion could end: set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _special_ids(tokenizer) -> set[int]:
    # Closing tokens are often only marked special in the list of added tokens, not named as a role.
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode_text(tokenizer, text: str) -> list[int]:
    tokens = list(tokenizer(text).input_ids)
    bare = tokenizer(text, add_special_tokens=False).input_ids
    # Some tokenizers close every text with EOS, which would end a prompt before its completion.
    if tokens and tokens[-1] == tokenizer.eos_token_id and (not bare or bare[-1] != tokens[-1]):
        tokens = tokens[:-1]
    return tokens


def _render(tokenizer, messages: Sequence[Mapping], tools: Sequence[Mapping] | None, *, open_turn: bool) -> str:
    """The chat template's text of these messages, with the assistant's header at the end when `open_turn`."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "a prompt or completion is a list of messages, but the tokenizer has no chat template: give plain text, "
            "or a model directory whose tokenizer has one"
        )
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise UserError(
            f"a conversation is {json.dumps(messages, default=str)[:120]}: expected a non-empty list of messages "
            '{"role": ..., "content": ...}'
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=open_turn,
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(
            f"the tokenizer's chat template refuses a conversation with the roles {roles} ({error}): expected roles "
            "and contents that the template supports"
        ) from error


def _continue(tokenizer, text: str, tokens: list[int], addition: str, *, plain: bool) -> list[int]:
    """Tokens of `addition` after `text`, whose tokens are `tokens`.

    Tokenising both at once gives what the policy would have been trained on, and spares tokenizers that open every text
    with a space; where the boundary falls inside a token, the addition is tokenised alone and the prompt stays as it
    is.
    """
    whole = text + addition
    joint = _encode_text(tokenizer, whole) if plain else tokenizer(whole, add_special_tokens=False).input_ids
    if joint[: len(tokens)] == tokens and len(joint) > len(tokens):
        return list(joint[len(tokens) :])
    return list(tokenizer(addition, add_special_tokens=False).input_ids)


def _encode_single(tokenizer, prompt: Prompt, completion: str, tools: Sequence[Mapping] | None) -> Encoded:
    plain = isinstance(prompt, str)
    tokens = encode_prompt(tokenizer, prompt, tools)
    text = prompt if plain else _render(tokenizer, prompt, tools, open_turn=True)
    answer = _continue(tokenizer, text, tokens, completion, plain=plain) if completion else []
    stop = _eos(tokenizer) if plain else end_of_turn(tokenizer)
    if not answer or answer[-1] != stop:
        answer.append(stop)
    return _assemble([(tokens, False), (answer, True)])


def _encode_turns(tokenizer, prompt: list, completion: list, tools: Sequence[Mapping] | None) -> Encoded:
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in completion]
    if "assistant" not in roles:
        raise UserError(
            f"a completion has the roles {roles}: expected at least one assistant message, for only those are actions"
        )
    last = max(index for index, role in enumerate(roles) if role == "assistant")
    stop = end_of_turn(tokenizer)
    text, tokens, pieces = "", [], []

    def advance(rendered: str, reason: str) -> list[int]:
        nonlocal text, tokens
        if not rendered.startswith(text):
            raise UserError(
                f"the tokenizer's chat template rewrites earlier turns when {reason}, so one sequence of tokens "
                "cannot be what the policy saw at every turn: give one record per turn, or a template that only appends"
            )
        new = _continue(tokenizer, text, tokens, rendered[len(text) :], plain=False) if rendered != text else []
        text, tokens = rendered, tokens + new
        return new

    for index in range(last + 1):
        if roles[index] != "assistant":
            continue
        history = prompt + completion[:index]
        pieces.append((advance(_render(tokenizer, history, tools, open_turn=True), "a turn is opened"), False))
        turn = advance(_render(tokenizer, history + [completion[index]], tools, open_turn=False), "a turn is added")
        if stop in turn:
            end = len(turn) - turn[::-1].index(stop)
            pieces += [(turn[:end], True), (turn[end:], False)]
        elif index == last:
            pieces.append((turn + [stop], True))
        else:
            raise UserError(
                "the tokenizer's chat template closes an assistant turn with no token of its own, so a policy could "
                "not end it: use a template that closes turns, or one record per turn"
            )
    while not pieces[-1][1]:
        pieces.pop()
    return _assemble(pieces)


def _assemble(pieces: list[tuple[list[int], bool]]) -> Encoded:
    """Concatenate pieces of tokens, each wholly actions or wholly context."""
    tokens = [token for piece, _ in pieces for token in piece]
    mask = [is_action for piece, is_action in pieces for _ in piece]
    ends, position = [], 0
    for piece, is_action in pieces:
        position += len(piece)
        if is_action:
            ends.append(position - 1)
    return Encoded(np.asarray(tokens, np.int32), np.asarray(mask, bool), np.asarray(ends, np.int32))
