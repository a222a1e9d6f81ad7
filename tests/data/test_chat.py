"""Tokens and actions of prompts and completions, against the chat template's rendering of the whole conversation."""

import json

import numpy as np
import pytest

from shiq_jax.data.chat import encode_completion, encode_prompt, encode_text, end_of_turn, load_tokenizer, stop_tokens
from shiq_jax.errors import UserError
from shiq_jax.tasks.tiny import tiny_directory, tiny_tokenizer

USER = {"role": "user", "content": "What is 2+2?"}
CALL = {"role": "assistant", "content": "add(2, 2)"}
TOOL = {"role": "tool", "content": "4"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def _spaced_tokenizer(template: str | None = None):
    """A tokenizer that opens every text with a space, as those of the Llama 2 family do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<s>",
        "</s>",
        "<unk>",
        "▁the",
        "▁sky",
        "▁is",
        "▁blue",
        "blue",
        "▁",
        ":",
        "▁a:",
        "<|user|>",
        "<|assistant|>",
    ]
    words += list("abcdefghijklmnopqrstuvwxyz\n")
    unigram = models.Unigram([(word, -float(len(word) == 1) - 1.0) for word in words], unk_id=2)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def _actions(tokenizer, encoded):
    return tokenizer.decode(encoded.tokens[encoded.action_mask].tolist())


def test_text_follows_the_prompt_and_ends_in_eos():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, "sort 21:", "12")
    assert tokenizer.decode(encoded.tokens.tolist()) == "<bos>sort 21:12<eos>"
    assert _actions(tokenizer, encoded) == "12<eos>"
    prompt = encode_prompt(tokenizer, "sort 21:")
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.turn_ends.tolist() == [len(encoded.tokens) - 1]


def test_the_end_is_not_written_twice():
    tokenizer = tiny_tokenizer()
    once, twice = (encode_completion(tokenizer, "a", text) for text in ("b", "b<eos>"))
    assert once.tokens.tolist() == twice.tokens.tolist()


def test_a_text_and_a_message_give_the_same_tokens():
    tokenizer = tiny_tokenizer()
    text, message = (encode_completion(tokenizer, [USER], answer) for answer in (CALL["content"], [CALL]))
    for one, other in zip(text, message, strict=True):
        np.testing.assert_array_equal(one, other)


def test_turns_of_the_assistant_are_actions_and_the_rest_is_context():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, [USER], [CALL, TOOL, ANSWER])
    whole = tokenizer.apply_chat_template([USER, CALL, TOOL, ANSWER], tokenize=True, return_dict=False)
    # The newline that the template writes after the last turn is never predicted.
    assert encoded.tokens.tolist() == whole[:-1]
    assert _actions(tokenizer, encoded) == "add(2, 2)<|im_end|>It is 4.<|im_end|>"
    ends = [tokenizer.decode([encoded.tokens[end]]) for end in encoded.turn_ends]
    assert ends == ["<|im_end|>"] * 2
    assert encoded.action_mask[encoded.turn_ends].all()
    prompt = encode_prompt(tokenizer, [USER])
    assert encoded.tokens[: len(prompt)].tolist() == prompt and not encoded.action_mask[: len(prompt)].any()


def test_history_before_the_completion_is_context():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, [USER, CALL, TOOL], [ANSWER])
    assert _actions(tokenizer, encoded) == "It is 4.<|im_end|>"
    assert len(encoded.turn_ends) == 1


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = tiny_tokenizer()
    short, long = (encode_completion(tokenizer, [USER], turns) for turns in ([CALL], [CALL, TOOL]))
    assert short.tokens.tolist() == long.tokens.tolist()


def test_tools_reach_the_template():
    tokenizer = tiny_tokenizer()
    tools = [{"name": "add"}]
    plain, equipped = encode_prompt(tokenizer, [USER]), encode_prompt(tokenizer, [USER], tools)
    assert '"add"' in tokenizer.decode(equipped) and '"add"' not in tokenizer.decode(plain)
    assert encode_completion(tokenizer, [USER], "4", tools).tokens[: len(equipped)].tolist() == equipped


def test_a_whole_text_is_all_actions_but_its_first_token():
    tokenizer = tiny_tokenizer()
    encoded = encode_text(tokenizer, "abc")
    assert encoded.action_mask.tolist() == [False] + [True] * 4
    assert _actions(tokenizer, encoded) == "abc<eos>"


def test_no_space_is_put_before_a_completion_that_has_none():
    tokenizer = _spaced_tokenizer()
    encoded = encode_completion(tokenizer, "the sky is", " blue")
    assert encoded.tokens.tolist() == [*tokenizer("the sky is blue").input_ids, tokenizer.eos_token_id]
    joined = encode_completion(tokenizer, "a:", "blue")
    assert tokenizer.convert_ids_to_tokens(joined.tokens[joined.action_mask].tolist())[0] == "blue"


def test_a_boundary_inside_a_token_leaves_the_prompt_as_it_is():
    tokenizer = _spaced_tokenizer()
    prompt = encode_prompt(tokenizer, "the sky is bl")
    encoded = encode_completion(tokenizer, "the sky is bl", "ue")
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.action_mask.tolist() == [index >= len(prompt) for index in range(len(encoded.tokens))]


def test_a_tokenizer_that_closes_texts_does_not_close_prompts():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "a") == tiny_tokenizer()("a").input_ids
    assert (
        encode_completion(tokenizer, "a", "b").tokens.tolist()
        == encode_completion(tiny_tokenizer(), "a", "b").tokens.tolist()
    )


def test_templates_that_rewrite_history_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    thought = {"role": "assistant", "content": "hm</think>four"}
    assert _actions(tokenizer, encode_completion(tokenizer, [USER], [thought])) == "hm</think>four<|im_end|>"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_completion(tokenizer, [USER], [thought, USER, ANSWER])


def test_templates_without_an_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert _actions(tokenizer, encode_completion(tokenizer, [USER], [ANSWER])).endswith("<eos>")
    with pytest.raises(UserError, match="closes an assistant turn with no token"):
        encode_completion(tokenizer, [USER], [CALL, TOOL, ANSWER])


def test_stop_tokens_are_all_that_end_a_turn(tmp_path):
    directory = tiny_directory(tmp_path, hidden_size=16, num_layers=1, intermediate_size=16)
    tokenizer = load_tokenizer(directory)
    assert stop_tokens(tokenizer) == (2, 4)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert stop_tokens(tokenizer, directory) == (2, 4, 7)
    (directory / "generation_config.json").unlink()
    assert stop_tokens(tokenizer, directory) == (2, 4)
    (directory / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config.json is not a JSON object"):
        stop_tokens(tokenizer, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, "7"]}))
    with pytest.raises(UserError, match="generation_config.json has the eos_token_id"):
        stop_tokens(tokenizer, directory)


def test_a_tokenizer_must_fit_into_the_vocabulary_but_need_not_fill_it(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    for size in (None, 264, 320):
        assert len(load_tokenizer(tmp_path, size)) == 264
    with pytest.raises(UserError, match="the id 263, and the model has a vocabulary of 263: expected the tokenizer"):
        load_tokenizer(tmp_path, 263)


@pytest.mark.parametrize(
    ("prompt", "completion", "said"),
    [
        ([USER], [USER], "at least one assistant message"),
        ([USER], [], "at least one assistant message"),
        ([], "x", "non-empty list of messages"),
        ([{"content": "x"}], "x", "non-empty list of messages"),
    ],
)
def test_unusable_conversations_are_refused(prompt, completion, said):
    with pytest.raises(UserError, match=said):
        encode_completion(tiny_tokenizer(), prompt, completion)


def test_messages_need_a_template_and_prompts_a_token():
    tokenizer = _spaced_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [USER])
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompt(tokenizer, "")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_prompt(tokenizer, [USER])


def test_a_missing_tokenizer_is_told_in_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
