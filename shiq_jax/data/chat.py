"""Tokenization of prompts and completions, plain or conversational, with their action masks.

A prompt is text or a list of messages `{"role", "content"}`. A completion is text, or the messages that follow the
prompt: assistant turns, which are actions, and tool or user turns between them, which are context. Every assistant turn
ends with a stop token, which is an action too.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.data.messages import argument_objects, with_arguments
from shiq_jax.errors import UserError, check_not_lfs_pointer

Prompt = str | Sequence[Mapping[str, Any]]
# Text with letters, digits, punctuation, white space and other scripts.
_PROBE = "Hello, world!  It's 2023: 144272509 + 3.14 = x_1\n\tdéjà 北京"
_SENTINEL = "0MARK0"


class Encoded(NamedTuple):
    """A tokenized sequence.

    Attributes:
        tokens: int32[N].
        action_mask: bool[N].
        turn_ends: int32[turns], index in `tokens` of the last action of each assistant turn.
    """

    tokens: np.ndarray
    action_mask: np.ndarray
    turn_ends: np.ndarray


def load_tokenizer(path_or_hub_id: str | Path, vocab_size: int | None = None):
    """Load a transformers tokenizer.

    Args:
        path_or_hub_id: a model directory or a hub id.
        vocab_size: vocabulary size of the model, or None. It may exceed the tokenizer's, because models pad it.

    Raises:
        UserError: there is no tokenizer, or it has token ids outside the model's vocabulary.
    """
    from transformers import AutoTokenizer

    name = str(path_or_hub_id)
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(
            f"the directory {name} does not exist: expected a model directory with a tokenizer, or a hub id"
        )
    try:
        tokenizer = _as_in_file(name, AutoTokenizer.from_pretrained(name))
    except Exception as error:
        if Path(name).is_dir():
            for file in sorted(Path(name).glob("*token*")):
                check_not_lfs_pointer(file)
            files = ", ".join(sorted(entry.name for entry in Path(name).iterdir())) or "nothing"
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} has no tokenizer that transformers can load ({reason}; it contains: {files}): expected "
                "tokenizer.json or another tokenizer format; save one there with tokenizer.save_pretrained"
            ) from error
        raise UserError(
            f"{name!r} is neither a directory with a tokenizer nor a reachable hub id: check the spelling, or download "
            "the model and pass its directory"
        ) from error
    if not len(tokenizer):
        raise UserError(
            f"the tokenizer of {name} has an empty vocabulary: copy the tokenizer.json that the model was trained with"
        )
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size is not None and token_id >= vocab_size:
        raise UserError(
            f"the tokenizer of {name} maps {token!r} to id {token_id}, but the model has a vocabulary of {vocab_size}: "
            "expected the tokenizer that the model was trained with; copy its files into the model directory"
        )
    return tokenizer


def _as_in_file(name: str, tokenizer):
    """The tokenizer of tokenizer.json, where the class in tokenizer_config.json splits text differently."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = Path(name) / "tokenizer.json" if Path(name).is_dir() else _hub_file(name, "tokenizer.json")
    if file is None or not Path(file).is_file():
        return tokenizer
    expected = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
    if tokenizer(_PROBE, add_special_tokens=False).input_ids == expected:
        return tokenizer
    print(f"{file}: {type(tokenizer).__name__} tokenizes differently from this file; the file is used", file=sys.stderr)
    return PreTrainedTokenizerFast.from_pretrained(name)


def encode_prompt(tokenizer, prompt: Prompt, tools: Sequence[Mapping] | None = None) -> list[int]:
    """Tokenize a prompt for generation.

    Text gets the tokenizer's BOS token, if it adds one. Messages are rendered by the chat template with the generation
    prompt at the end.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: text or messages.
        tools: function descriptions for the chat template.

    Raises:
        UserError: the prompt has no tokens.
    """
    if isinstance(prompt, str):
        tokens = _encode_text(tokenizer, prompt)
    else:
        tokens = tokenizer(
            _render(tokenizer, prompt, tools, add_generation_prompt=True), add_special_tokens=False
        ).input_ids
    if not tokens:
        raise UserError(
            "a prompt is empty and the tokenizer adds no BOS token, so no logits predict the first action: add text to "
            "the prompt"
        )
    return list(tokens)


def encode_completion(
    tokenizer, prompt: Prompt, completion: str | Sequence[Mapping], tools: Sequence[Mapping] | None = None
) -> Encoded:
    """Tokenize a prompt with its completion.

    A text completion ends with EOS if the prompt is text, and with `end_of_turn` if it is messages; the token is
    appended if it is missing.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: text or messages; its tokens equal `encode_prompt`, so all completions of a prompt share them.
        completion: text (one assistant turn) or messages. Assistant turns with their closing tokens are actions; other
            turns and the template's text are context.
        tools: function descriptions for the chat template.

    Raises:
        UserError: the completion has no assistant turn, or the template renders earlier turns differently once later
            turns follow, so that no single token sequence matches the context of every turn.
    """
    if isinstance(completion, str):
        return _encode_single(tokenizer, prompt, completion, tools)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _encode_turns(tokenizer, list(prompt), list(completion), tools)


def encode_text(tokenizer, text: str) -> Encoded:
    """Tokenize text as a single turn that ends with EOS; every token except the first is an action.

    A text that ends with the chat template's end of turn gets no EOS.
    """
    tokens = _encode_text(tokenizer, text)
    last = next((token for token in reversed(tokens) if not tokenizer.decode([token]).isspace()), None)
    if last not in (_eos(tokenizer), end_of_turn(tokenizer)):
        tokens.append(_eos(tokenizer))
    return _assemble([(tokens[:1], False), (tokens[1:], True)])


def end_of_turn(tokenizer) -> int:
    """Id of the token that closes an assistant turn in the chat template; EOS if there is none."""
    text = ""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        text = _render(tokenizer, turns, None, add_generation_prompt=False).rpartition(_SENTINEL)[2]
    special_ids = _special_ids(tokenizer)
    for token in tokenizer(text, add_special_tokens=False).input_ids if text else ():
        if token in special_ids:
            return int(token)
    return _eos(tokenizer)


def stop_tokens(tokenizer, model: str | Path | None = None) -> tuple[int, ...]:
    """Sorted ids of all stop tokens: EOS, the chat template's end of turn, and the model's `eos_token_id`.

    Args:
        tokenizer: from `load_tokenizer`.
        model: a directory or hub id, whose generation_config.json (or else config.json) is read; or None.

    Raises:
        UserError: the configuration file is not a JSON object or its `eos_token_id` is invalid.
    """
    eos = _config_eos(model) if model is not None else None
    stops = [eos] if isinstance(eos, int) else eos or []
    return tuple(sorted({end_of_turn(tokenizer), _eos(tokenizer), *stops}))


def _config_eos(model: str | Path) -> int | list[int] | None:
    """The `eos_token_id` in the model's configuration, or None."""
    for name in ("generation_config.json", "config.json"):
        file = Path(model) / name if Path(model).is_dir() else _hub_file(str(model), name)
        if file is not None and Path(file).is_file():
            try:
                stops = json.loads(Path(file).read_text()).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{file} is not a JSON object: expected the model's configuration; download it again"
                ) from error
            if not all(isinstance(stop, int) for stop in (stops if isinstance(stops, list) else [stops or 0])):
                raise UserError(f"{file} has the eos_token_id {stops!r}: expected a token id or a list of token ids")
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
            "the tokenizer has no EOS token, so completions cannot end: set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _special_ids(tokenizer) -> set[int]:
    # End-of-turn tokens are often marked special only among the added tokens.
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode_text(tokenizer, text: str) -> list[int]:
    tokens = list(tokenizer(text).input_ids)
    without_special = tokenizer(text, add_special_tokens=False).input_ids
    # Some tokenizers append EOS to every text, which would end a prompt before its completion.
    if tokens and tokens[-1] == tokenizer.eos_token_id and (not without_special or without_special[-1] != tokens[-1]):
        tokens = tokens[:-1]
    # A text that already begins with BOS gets no second one.
    if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id == without_special[0]:
        tokens = tokens[1:]
    return tokens


def _render(
    tokenizer, messages: Sequence[Mapping], tools: Sequence[Mapping] | None, *, add_generation_prompt: bool
) -> str:
    """Render messages with the chat template; `add_generation_prompt` opens an assistant turn.

    If the last message is the assistant's, its turn is continued instead. Templates print the arguments of tool calls
    as an object or as JSON text: the text is used where the template prints an object as Python code.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "a prompt or completion is a list of messages, but the tokenizer has no chat template: use plain text, or "
            "a model whose tokenizer has one"
        )
    if not messages or not all(isinstance(message, Mapping) and "role" in message for message in messages):
        raise UserError(
            f"a conversation is {json.dumps(messages, default=str)[:120]}: expected a non-empty list of messages "
            '{"role": ..., "content": ...}'
        )
    continues = add_generation_prompt and messages[-1]["role"] == "assistant"
    render = functools.partial(
        tokenizer.apply_chat_template,
        tools=[dict(tool) for tool in tools] if tools else None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt and not continues,
        continue_final_message=continues,
    )
    try:
        text = render([with_arguments(message, json.loads) for message in messages])
        if any(repr(arguments) in text for message in messages for arguments in argument_objects(message)):
            text = render([with_arguments(message, json.dumps) for message in messages])
        return text
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(
            f"the tokenizer's chat template rejects a conversation with the roles {roles} ({error}): expected roles "
            "and contents that the template supports"
        ) from error


def _encode_continuation(tokenizer, text: str, tokens: list[int], addition: str, *, plain: bool) -> list[int]:
    """Tokens of `addition` after `text`, whose tokens are `tokens`.

    Tokenizes both together, because some tokenizers add a space at the start of every text. If the boundary falls
    inside a token, tokenizes `addition` alone, so that the tokens of `text` do not change.
    """
    full = text + addition
    joint = _encode_text(tokenizer, full) if plain else tokenizer(full, add_special_tokens=False).input_ids
    if joint[: len(tokens)] == tokens and len(joint) > len(tokens):
        return list(joint[len(tokens) :])
    return list(tokenizer(addition, add_special_tokens=False).input_ids)


def _encode_single(tokenizer, prompt: Prompt, completion: str, tools: Sequence[Mapping] | None) -> Encoded:
    plain = isinstance(prompt, str)
    tokens = encode_prompt(tokenizer, prompt, tools)
    text = prompt if plain else _render(tokenizer, prompt, tools, add_generation_prompt=True)
    answer = _encode_continuation(tokenizer, text, tokens, completion, plain=plain) if completion else []
    stop = _eos(tokenizer) if plain else end_of_turn(tokenizer)
    if not answer or answer[-1] != stop:
        answer.append(stop)
    return _assemble([(tokens, False), (answer, True)])


def _encode_turns(tokenizer, prompt: list, completion: list, tools: Sequence[Mapping] | None) -> Encoded:
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in completion]
    if "assistant" not in roles:
        raise UserError(
            f"a completion has the roles {roles}: expected at least one assistant message, because only those are "
            "actions"
        )
    last = max(index for index, role in enumerate(roles) if role == "assistant")
    stop = end_of_turn(tokenizer)
    text, tokens, pieces = "", [], []

    def advance(rendered: str, reason: str) -> list[int]:
        nonlocal text, tokens
        if not rendered.startswith(text):
            raise UserError(
                f"the tokenizer's chat template rewrites earlier turns when {reason}, so no single token sequence "
                "matches the context of every turn: use one row per turn, or a template that only appends"
            )
        new = (
            _encode_continuation(tokenizer, text, tokens, rendered[len(text) :], plain=False)
            if rendered != text
            else []
        )
        text, tokens = rendered, tokens + new
        return new

    for index in range(last + 1):
        if roles[index] != "assistant":
            continue
        history = prompt + completion[:index]
        pieces.append(
            (advance(_render(tokenizer, history, tools, add_generation_prompt=True), "a turn is opened"), False)
        )
        turn = advance(
            _render(tokenizer, history + [completion[index]], tools, add_generation_prompt=False), "a turn is added"
        )
        if stop in turn:
            end = len(turn) - turn[::-1].index(stop)
            pieces += [(turn[:end], True), (turn[end:], False)]
        elif index == last:
            pieces.append((turn + [stop], True))
        else:
            raise UserError(
                "the tokenizer's chat template closes an assistant turn without a special token, so a policy cannot "
                "end it: use a template that closes turns, or one row per turn"
            )
    while not pieces[-1][1]:
        pieces.pop()
    return _assemble(pieces)


def _assemble(pieces: list[tuple[list[int], bool]]) -> Encoded:
    """Concatenate pieces of tokens, each either all actions or all context."""
    tokens = [token for piece, _ in pieces for token in piece]
    mask = [is_action for piece, is_action in pieces for _ in piece]
    ends, position = [], 0
    for piece, is_action in pieces:
        position += len(piece)
        if is_action:
            ends.append(position - 1)
    return Encoded(np.asarray(tokens, np.int32), np.asarray(mask, bool), np.asarray(ends, np.int32))
