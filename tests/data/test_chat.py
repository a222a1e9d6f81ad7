"""Tokens and action masks of prompts and completions, compared with the chat template of the full conversation."""

import json

import chex
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shiq_jax.data.chat import encode_completion, encode_prompt, encode_text, end_of_turn, load_tokenizer, stop_tokens
from shiq_jax.errors import UserError
from shiq_jax.tasks.tiny import tiny_directory, tiny_tokenizer

USER = {"role": "user", "content": "What is 2+2?"}
CALL = {"role": "assistant", "content": "add(2, 2)"}
TOOL = {"role": "tool", "content": "4"}
ANSWER = {"role": "assistant", "content": "It is 4."}


def _spaced_tokenizer(template: str | None = None):
    """A tokenizer that adds a space at the start of every text, like Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [
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
    vocabulary += list("abcdefghijklmnopqrstuvwxyz\n")
    unigram = models.Unigram([(token, -float(len(token) == 1) - 1.0) for token in vocabulary], unk_id=2)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def _decode_actions(tokenizer, encoded):
    return tokenizer.decode(encoded.tokens[encoded.action_mask].tolist())


def test_text_completion_ends_with_eos():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, "sort 21:", "12")
    assert tokenizer.decode(encoded.tokens.tolist()) == "<bos>sort 21:12<eos>"
    assert _decode_actions(tokenizer, encoded) == "12<eos>"
    prompt = encode_prompt(tokenizer, "sort 21:")
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.turn_ends.tolist() == [len(encoded.tokens) - 1]


def test_eos_is_not_duplicated():
    tokenizer = tiny_tokenizer()
    once, twice = (encode_completion(tokenizer, "a", text) for text in ("b", "b<eos>"))
    assert once.tokens.tolist() == twice.tokens.tolist()


def test_text_and_message_completions_are_equal():
    tokenizer = tiny_tokenizer()
    text, message = (encode_completion(tokenizer, [USER], answer) for answer in (CALL["content"], [CALL]))
    chex.assert_trees_all_equal(text, message)


def test_assistant_turns_are_actions():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, [USER], [CALL, TOOL, ANSWER])
    conversation = tokenizer.apply_chat_template([USER, CALL, TOOL, ANSWER], tokenize=True, return_dict=False)
    # The template's newline after the last turn is dropped.
    assert encoded.tokens.tolist() == conversation[:-1]
    assert _decode_actions(tokenizer, encoded) == "add(2, 2)<|im_end|>It is 4.<|im_end|>"
    ends = [tokenizer.decode([encoded.tokens[end]]) for end in encoded.turn_ends]
    assert ends == ["<|im_end|>"] * 2
    assert encoded.action_mask[encoded.turn_ends].all()
    prompt = encode_prompt(tokenizer, [USER])
    assert encoded.tokens[: len(prompt)].tolist() == prompt and not encoded.action_mask[: len(prompt)].any()


def test_history_before_the_completion_is_context():
    tokenizer = tiny_tokenizer()
    encoded = encode_completion(tokenizer, [USER, CALL, TOOL], [ANSWER])
    assert _decode_actions(tokenizer, encoded) == "It is 4.<|im_end|>"
    assert len(encoded.turn_ends) == 1


def test_turns_after_the_last_assistant_turn_are_dropped():
    tokenizer = tiny_tokenizer()
    short, long = (encode_completion(tokenizer, [USER], turns) for turns in ([CALL], [CALL, TOOL]))
    assert short.tokens.tolist() == long.tokens.tolist()


def test_tools_are_passed_to_the_template():
    tokenizer = tiny_tokenizer()
    tools = [{"name": "add"}]
    without, with_tools = encode_prompt(tokenizer, [USER]), encode_prompt(tokenizer, [USER], tools)
    assert '"add"' in tokenizer.decode(with_tools) and '"add"' not in tokenizer.decode(without)
    assert encode_completion(tokenizer, [USER], "4", tools).tokens[: len(with_tools)].tolist() == with_tools


def test_text_is_all_actions_except_the_first_token():
    tokenizer = tiny_tokenizer()
    encoded = encode_text(tokenizer, "abc")
    assert encoded.action_mask.tolist() == [False] + [True] * 4
    assert _decode_actions(tokenizer, encoded) == "abc<eos>"


def test_no_space_is_added_before_a_completion():
    tokenizer = _spaced_tokenizer()
    encoded = encode_completion(tokenizer, "the sky is", " blue")
    assert encoded.tokens.tolist() == [*tokenizer("the sky is blue").input_ids, tokenizer.eos_token_id]
    joined = encode_completion(tokenizer, "a:", "blue")
    assert tokenizer.convert_ids_to_tokens(joined.tokens[joined.action_mask].tolist())[0] == "blue"


def test_boundary_inside_a_token_keeps_the_prompt_tokens():
    tokenizer = _spaced_tokenizer()
    prompt = encode_prompt(tokenizer, "the sky is bl")
    encoded = encode_completion(tokenizer, "the sky is bl", "ue")
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.action_mask.tolist() == [index >= len(prompt) for index in range(len(encoded.tokens))]


def test_appended_eos_is_removed_from_prompts():
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


def test_templates_that_rewrite_history_are_rejected():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}"
        "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|im_end|>{% "
        "endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    reasoning = {"role": "assistant", "content": "hm</think>four"}
    assert _decode_actions(tokenizer, encode_completion(tokenizer, [USER], [reasoning])) == "hm</think>four<|im_end|>"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_completion(tokenizer, [USER], [reasoning, USER, ANSWER])


def test_templates_without_an_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert _decode_actions(tokenizer, encode_completion(tokenizer, [USER], [ANSWER])).endswith("<eos>")
    with pytest.raises(UserError, match="closes an assistant turn without a special token"):
        encode_completion(tokenizer, [USER], [CALL, TOOL, ANSWER])


def test_stop_tokens_of_tokenizer_and_model(tmp_path):
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


def test_tokenizer_must_fit_into_the_vocabulary(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    for size in (None, 264, 320):
        assert len(load_tokenizer(tmp_path, size)) == 264
    with pytest.raises(UserError, match="id 263, but the model has a vocabulary of 263: expected the tokenizer"):
        load_tokenizer(tmp_path, 263)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ([USER], [USER], "at least one assistant message"),
        ([USER], [], "at least one assistant message"),
        ([], "x", "non-empty list of messages"),
        ([{"content": "x"}], "x", "non-empty list of messages"),
    ],
)
def test_invalid_conversations_are_rejected(prompt, completion, message):
    with pytest.raises(UserError, match=message):
        encode_completion(tiny_tokenizer(), prompt, completion)


def test_unusable_templates_and_empty_prompts_are_rejected():
    tokenizer = _spaced_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [USER])
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompt(tokenizer, "")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        encode_prompt(tokenizer, [USER])


def test_missing_tokenizer_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")


def test_tokenizer_of_the_file_is_used(tmp_path, capsys):
    """A tokenizer_class that rebuilds the pre-tokenizer must not change how text is split."""
    digits = Tokenizer(models.BPE())
    digits.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    digits.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    digits.train_from_iterator([" ".join(f"{number:03d}" for number in range(1000))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=digits, eos_token="<eos>").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    config.pop("backend", None)
    file.write_text(json.dumps(config))
    expected = digits.encode("144272509", add_special_tokens=False).ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("144272509", add_special_tokens=False).input_ids == expected
    assert tokenizer.eos_token == "<eos>" and "the file is used" in capsys.readouterr().err
