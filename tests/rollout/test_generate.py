"""Sampling with a KV cache against the uncached forward pass: tokens, statistics, distributions and scheduling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.models import Model, load_hf
from shiq_jax.rollout.categorical import categorical
from shiq_jax.rollout.generate import Sampler, pad_prompts
from shiq_jax.rollout.sampling import Sampling, filter_logits
from shiq_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(11)
MAX_TOKENS = 12
FILTERED = Sampling(temperature=0.8, top_k=7, top_p=0.9, max_tokens=MAX_TOKENS)
FIELDS = ("tokens", "logp", "lse", "behaviour_logp")


@pytest.fixture(scope="module")
def sampler(model):
    """`sampler(sampling, stops, **sizes)`, cached to avoid recompilation."""
    samplers = {}

    def make(sampling, stops=(), **sizes):
        cache_key = (sampling, tuple(stops), *sorted(sizes.items()))
        if cache_key not in samplers:
            samplers[cache_key] = Sampler(model, sampling, stops, **sizes)
        return samplers[cache_key]

    return make


@pytest.fixture(scope="module")
def sampled(sampler, params, prompts):
    """Three filtered samples of every prompt, without stop tokens."""
    return sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    flat = ([answer for answers in side for answer in answers] for side in (actual, expected))
    for answer, expected_answer in zip(*flat, strict=True):
        np.testing.assert_array_equal(answer["tokens"], expected_answer["tokens"])
        for name in FIELDS[1:]:
            np.testing.assert_allclose(answer[name], expected_answer[name], atol=3e-5)


def filtered_logp(logits, sampling):
    """Log-probabilities after temperature, top-k and top-p, by a plain loop over the sorted tokens."""
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled)[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled.max())
    weights /= weights.sum()
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weight
    logp = np.full(len(logits), -np.inf)
    logp[kept] = scaled[kept] - np.log(np.exp(scaled[kept]).sum())
    return logp


# --- greedy decoding


def test_greedy_matches_argmax_decoding(sampler, params, prompts, uncached):
    sample = sampler(Sampling(temperature=0, max_tokens=MAX_TOKENS), samples_per_prompt=1, prompts_in_flight=4)
    answers = sample(params, prompts, KEY)
    expected = [uncached.greedy(params, prompt, MAX_TOKENS) for prompt in prompts]
    assert [answer["tokens"].tolist() for (answer,) in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts) and max(map(len, map(set, expected))) > 2
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        logp, lse = uncached.statistics(params, prompt, answer["tokens"])
        np.testing.assert_allclose(answer["logp"], logp, atol=1e-5)
        np.testing.assert_allclose(answer["lse"], lse, atol=1e-5)
        np.testing.assert_array_equal(answer["behaviour_logp"], np.zeros(MAX_TOKENS))


@pytest.mark.parametrize("lanes", [1, 3])
def test_greedy_completion_does_not_change_the_samples(sampler, sampled, params, prompts, lanes):
    sizes = dict(samples_per_prompt=3, prompts_in_flight=4)
    both = sampler(FILTERED, greedy=True, lanes_per_prompt=lanes, **sizes)(params, prompts, KEY)
    assert_same([answers[:3] for answers in both], sampled)
    alone = sampler(Sampling(temperature=0, max_tokens=MAX_TOKENS), prompts_in_flight=4)(params, prompts, KEY)
    assert_same([answers[3:] for answers in both], alone)


def test_greedy_matches_transformers(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, max_position_embeddings=96)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, bos_token_id=0, eos_token_id=13
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    model, params = load_hf(tmp_path)
    lengths = (1, 2, 3, 5, 8, 13, 21, 31, 40, 50)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 24, (5, length)) for length in lengths]

    def generate(same_length):
        tokens = torch.tensor(same_length)
        kwargs = dict(max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=13)
        out = reference.generate(tokens, attention_mask=torch.ones_like(tokens), **kwargs)[:, tokens.shape[1] :]
        return [row[: row.index(13) + 1] if 13 in row else row for row in out.tolist()]

    order = rng.permutation(50)  # mixes prompts of different lengths
    answers = [None] * 50
    sample = Sampler(model, Sampling(temperature=0, max_tokens=MAX_TOKENS), (13,), prompts_in_flight=25)
    rows = [row.tolist() for same_length in prompts for row in same_length]
    for index, (answer,) in zip(order, sample(params, [rows[index] for index in order], KEY), strict=True):
        answers[index] = answer["tokens"].tolist()
    assert answers == [answer for same_length in prompts for answer in generate(same_length)]
    # The answers are diverse, and some end at a stop token and some at the maximum length.
    ends = {len(tokens) for tokens in answers}
    assert MAX_TOKENS in ends and len(ends) > 4 and len(set(map(tuple, answers))) > 25


@pytest.mark.parametrize(
    ("sampling", "samples"),
    [(Sampling(temperature=0, max_tokens=MAX_TOKENS), 1), pytest.param(FILTERED, 3, marks=pytest.mark.slow)],
    ids=["greedy", "sampled"],
)
def test_samples_on_a_mesh(sampling, samples, sampler, config, params, prompts):
    sharded = Model.from_config(config, mesh=make_mesh("fsdp=2,tensor=2"))
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params()))
    assert any(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(placed))
    sizes = dict(samples_per_prompt=samples, prompts_in_flight=4)
    answers = Sampler(sharded, sampling, (), **sizes)(placed, prompts, KEY)
    assert_same(answers, sampler(sampling, **sizes)(params, prompts, KEY))


# --- statistics


def test_statistics_match_uncached_forward(sampled, params, prompts, uncached):
    for prompt, answers in zip(prompts, sampled, strict=True):
        for answer in answers:
            logp, lse = uncached.statistics(params, prompt, answer["tokens"])
            np.testing.assert_allclose(answer["logp"], logp, atol=1e-5)
            np.testing.assert_allclose(answer["lse"], lse, atol=1e-5)
            assert all(answer[name].shape == (MAX_TOKENS,) for name in FIELDS)


@pytest.mark.parametrize("sampling", [FILTERED, Sampling(max_tokens=MAX_TOKENS)], ids=["filtered", "raw"])
def test_behaviour_logp_is_of_the_filtered_distribution(sampling, sampler, params, prompts, uncached):
    answers_by_prompt = sampler(sampling, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)
    raw_matches = 0
    for prompt, answers in zip(prompts, answers_by_prompt, strict=True):
        for answer in answers:
            tokens = answer["tokens"]
            logits = uncached.next_logits(params, [*prompt, *tokens])[len(prompt) - 1 : -1]
            expected = [filtered_logp(row, sampling)[token] for row, token in zip(logits, tokens, strict=True)]
            np.testing.assert_allclose(answer["behaviour_logp"], expected, atol=3e-5)
            raw_matches += np.allclose(answer["behaviour_logp"], answer["logp"], atol=1e-5)
    # The two agree only without filters at temperature 1.
    assert raw_matches == (18 if sampling == Sampling(max_tokens=MAX_TOKENS) else 0)


# --- distributions

distinct_logits = st.lists(st.integers(-60, 60), min_size=8, max_size=8, unique=True).map(lambda xs: np.array(xs) / 10)
temperatures = st.floats(0.25, 4.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(distinct_logits, temperatures, st.integers(1, 10))
def test_top_k_keeps_the_k_most_likely(logits, temperature, k):
    out = np.asarray(filter_logits(jnp.float32(logits)[None], Sampling(temperature, top_k=k)))[0]
    best = np.argsort(-logits)[:k]
    assert set(np.flatnonzero(np.isfinite(out))) == set(best)
    np.testing.assert_allclose(out[best], logits[best] / temperature, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(out)).sum(), 1, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(distinct_logits, temperatures, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(logits, temperature, p):
    out = np.asarray(filter_logits(jnp.float32(logits)[None], Sampling(temperature, top_p=p)))[0]
    kept = np.isfinite(out)
    mass = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert mass[kept].sum() >= p - 1e-6
    # The most likely tokens, and no smaller set has enough mass.
    assert kept.any() and mass[kept].min() > max(mass[~kept], default=0)
    assert mass[kept].sum() - mass[kept].min() < p + 1e-6
    np.testing.assert_allclose(out[kept], logits[kept] / temperature, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(out)).sum(), 1, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(distinct_logits, temperatures, st.integers(0, 10), st.floats(0.05, 1.0))
def test_top_k_is_applied_before_top_p(logits, temperature, k, p):
    sampling = Sampling(temperature, k, p)
    out = jax.nn.log_softmax(filter_logits(jnp.float32(logits)[None], sampling))[0]
    expected = filtered_logp(logits, sampling)
    # If the mass of a set equals p up to rounding, float32 may keep one token more or fewer.
    masses = np.cumsum(np.sort(np.exp(filtered_logp(logits, Sampling(temperature, k))))[::-1])
    if np.abs(masses - p).min() > 1e-5 or p == 1:
        np.testing.assert_allclose(out, expected, atol=1e-4)
    assert np.asarray(out).argmax() == logits.argmax()


def test_temperature_zero_is_argmax():
    out = filter_logits(jnp.array([[0.1, 3.0, 2.9], [5.0, -1.0, 0.0]]), Sampling(temperature=0, top_k=2, top_p=0.5))
    np.testing.assert_array_equal(jax.nn.softmax(out), [[0, 1, 0], [1, 0, 0]])


def chi_square(counts, probabilities):
    """p-value of a chi-squared test; cells with an expected count below 5 are pooled."""
    expected = counts.sum() * probabilities
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5
    if expected[rare].sum() > 0:
        counts, expected = (np.append(cells[~rare], cells[rare].sum()) for cells in (counts, expected))
    else:
        counts, expected = counts[~rare], expected[~rare]
    return scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(expected) - 1)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=1), Sampling(0.7, 8, 0.9, 1)], ids=["raw", "filtered"])
def test_first_token_frequencies(sampling, sampler, params, prompts, uncached):
    sample = sampler(sampling, samples_per_prompt=4000, prompts_in_flight=2)
    for prompt, answers in zip(prompts[:2], sample(params, prompts[:2], KEY), strict=True):
        logits = uncached.next_logits(params, prompt)[-1]
        counts = np.bincount([int(answer["tokens"][0]) for answer in answers], minlength=len(logits))
        assert chi_square(counts, np.exp(filtered_logp(logits, sampling))) > 1e-3
        # The test has the power to reject a slightly higher temperature.
        warmer = Sampling(1.15 * sampling.temperature, sampling.top_k)
        assert chi_square(counts, np.exp(filtered_logp(logits, warmer))) < 1e-3


def test_token_pair_frequencies(sampler, params, prompts, config, uncached):
    (answers,) = sampler(Sampling(max_tokens=2), samples_per_prompt=6000, prompts_in_flight=1)(params, prompts[:1], KEY)
    pairs = np.stack([answer["tokens"] for answer in answers])
    first = np.exp(filtered_logp(uncached.next_logits(params, prompts[0])[-1], Sampling()))
    second_logits = [uncached.next_logits(params, [*prompts[0], token])[-1] for token in range(config.vocab_size)]
    joint = first[:, None] * np.exp([filtered_logp(row, Sampling()) for row in second_logits])
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(pairs.T), 1)
    assert chi_square(counts.ravel(), joint.ravel()) > 1e-3
    assert chi_square(counts.ravel(), np.outer(first, joint.sum(0)).ravel()) < 1e-3


@pytest.mark.parametrize("sampling", [FILTERED, Sampling(max_tokens=MAX_TOKENS)], ids=["filtered", "raw"])
def test_token_t_uses_fold_in_of_its_key(sampling, sampler, params, prompts, uncached):
    answers_by_prompt = sampler(sampling, samples_per_prompt=2, prompts_in_flight=4)(params, prompts[:3], KEY, first=5)
    for index, (prompt, answers) in enumerate(zip(prompts, answers_by_prompt)):
        keys = jax.random.split(jax.random.fold_in(KEY, 5 + index), 2)
        for key, answer in zip(keys, answers, strict=True):
            logits = uncached.next_logits(params, [*prompt, *answer["tokens"]])[len(prompt) - 1 : -1]
            for t, token in enumerate(answer["tokens"]):
                behavior = jnp.asarray(filtered_logp(logits[t], sampling), jnp.float32)
                assert categorical(jax.random.fold_in(key, t), behavior) == token


# --- stop tokens and scheduling


def test_stop_tokens_truncate(sampler, params, prompts, sampled):
    stops = (2, 9, 17)
    stopped = sampler(FILTERED, stops, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)
    truncated = []
    for answers in sampled:
        ends = [next((t + 1 for t, token in enumerate(a["tokens"]) if token in stops), MAX_TOKENS) for a in answers]
        truncated.append([{name: a[name][:end] for name in FIELDS} for a, end in zip(answers, ends, strict=True)])
    assert_same(stopped, truncated)
    lengths = [len(answer["tokens"]) for answers in stopped for answer in answers]
    assert MAX_TOKENS in lengths and min(lengths) < MAX_TOKENS // 2


class ForwardRecorder:
    """A model that records the token shape of each forward pass."""

    def __init__(self, model):
        self.config, self.shapes = model.config, []
        self.init_cache, self.init_branches, self.project = model.init_cache, model.init_branches, model.project
        self.extend = self._recorded(model.extend)
        self.extend_branches = self._recorded(model.extend_branches)

    def _recorded(self, forward):
        def recorded(params, *args):
            tokens = next(arg for arg in args if isinstance(arg, jax.Array))
            jax.debug.callback(lambda: self.shapes.append(tokens.shape))
            return forward(params, *args)

        return recorded


@pytest.mark.parametrize(
    ("stops", "max_tokens"),
    [((), MAX_TOKENS), ((), 1), ((2, 9, 17), MAX_TOKENS), (range(24), MAX_TOKENS)],
    ids=["no stop", "one token", "stop", "stop at first token"],
)
@pytest.mark.parametrize("lanes", [1, 2, 6])
def test_number_of_decode_steps_is_minimal(lanes, stops, max_tokens, model, params, prompts):
    recorder = ForwardRecorder(model)
    sampling = Sampling(0.8, 7, 0.9, max_tokens)
    sample = Sampler(recorder, sampling, stops, samples_per_prompt=6, prompts_in_flight=1, lanes_per_prompt=lanes)
    (answers,) = sample(params, prompts[1:2], KEY)
    jax.effects_barrier()
    lengths = [len(answer["tokens"]) for answer in answers]
    # Each lane takes the next completion when it becomes free.
    lane_steps = [0] * lanes
    for length in lengths:
        lane_steps[int(np.argmin(lane_steps))] += length
    assert sorted(recorder.shapes) == [(1, lanes)] * max(lane_steps) + [(1, 32)]
    assert lanes > 1 or max(lane_steps) == sum(lengths)


def test_free_rows_take_the_next_prompt(model, params, prompts):
    recorder = ForwardRecorder(model)
    stops, many_prompts = (2, 9, 17), [prompts[index % 6] for index in range(40)]
    sizes = dict(samples_per_prompt=3, prompts_in_flight=4, lanes_per_prompt=1)
    sample = Sampler(recorder, Sampling(max_tokens=MAX_TOKENS), stops, **sizes)
    answers = sample(params, many_prompts, KEY)
    jax.effects_barrier()
    steps = [shape for shape in recorder.shapes if shape == (4, 1)]
    tokens = sum(len(answer["tokens"]) for prompt_answers in answers for answer in prompt_answers)
    # Four lanes; some are idle at the end, when no prompt is left.
    assert tokens / 4 <= len(steps) <= 1.2 * tokens / 4 + 3 * MAX_TOKENS
    assert len(recorder.shapes) - len(steps) == 40
    # Every prefill has the smallest width that holds its prompts.
    assert {shape for shape in recorder.shapes if shape != (4, 1)} == {(1, 32)}


# --- independence of the batch


def test_samples_do_not_depend_on_prompts_in_flight(sampler, params, prompts, sampled):
    assert_same(sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=1)(params, prompts, KEY), sampled)


def test_samples_do_not_depend_on_other_prompts(sampler, params, prompts, sampled):
    sample = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    # The longest prompt of this list increases the padding.
    assert_same(sample(params, [[5, 8], prompts[1], list(range(20)) * 2, [7]], KEY)[1:2], sampled[1:2])


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("prompts_in_flight", [1, 2])
def test_samples_do_not_depend_on_lanes(lanes, prompts_in_flight, model, params, prompts, sampled):
    sizes = dict(samples_per_prompt=3, prompts_in_flight=prompts_in_flight, lanes_per_prompt=lanes)
    sample = Sampler(model, FILTERED, (), **sizes)
    assert_same(sample(params, prompts, KEY), sampled)


def test_stream_yields_every_prompt_once(sampler, params, prompts, sampled):
    sample = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    indexed_answers = list(sample.stream(params, prompts, KEY))
    assert sorted(index for index, _ in indexed_answers) == list(range(6))
    for index, answers in indexed_answers:
        assert_same([answers], sampled[index : index + 1])


@pytest.mark.parametrize("split", [1, 4, 5])
def test_prompts_can_be_sampled_in_parts(split, sampler, params, prompts, sampled):
    sample = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    assert_same(sample(params, prompts[:split], KEY) + sample(params, prompts[split:], KEY, split), sampled)


def test_samples_differ_and_are_reproducible(sampler, params, prompts, sampled):
    sample = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    assert_same(sample(params, prompts, KEY), sampled)
    texts = [tuple(answer["tokens"]) for answers in sampled for answer in answers]
    assert len(set(texts)) == len(texts) == 18
    repeated_prompt = sample(params, [prompts[0]] * 2, KEY)
    assert len({tuple(answer["tokens"]) for answers in repeated_prompt for answer in answers}) == 6
    other_key = sample(params, prompts[:1], jax.random.key(12))
    assert {tuple(answer["tokens"]) for answer in other_key[0]}.isdisjoint(texts[:3])


# --- edge cases


def test_empty_list_of_prompts(sampler, params):
    assert sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, [], KEY) == []


def test_context_limit_is_enforced(sampler, params, config):
    sample = sampler(Sampling(temperature=0, max_tokens=MAX_TOKENS), samples_per_prompt=1, prompts_in_flight=4)
    fits = [[3] * (config.max_positions - MAX_TOKENS)]
    assert len(sample(params, fits, KEY)[0][0]["tokens"]) == MAX_TOKENS
    message = (
        "prompt 8 has 85 tokens, which with max_tokens=12 exceed .* context of 96: .* to 84 or lower max_tokens to 11$"
    )
    with pytest.raises(UserError, match=message):
        sample(params, [[1], fits[0] + [3]], KEY, 7)


@pytest.mark.parametrize(
    ("max_tokens", "length", "message"),
    [
        (MAX_TOKENS, 96, "prompt 0 has 96 tokens.*: shorten the prompt to 84$"),
        (96, 5, "prompt 0 has 5 tokens.*: lower max_tokens to 91$"),
        (100, 200, "prompt 0 has 200 tokens.*: shorten the prompt and lower max_tokens$"),
    ],
)
def test_context_error_lists_possible_remedies(max_tokens, length, message, sampler, params):
    sample = sampler(Sampling(max_tokens=max_tokens), samples_per_prompt=1, prompts_in_flight=4)
    with pytest.raises(UserError, match=message):
        sample(params, [[3] * length], KEY)


def test_empty_prompt_is_rejected(sampler, params):
    with pytest.raises(UserError, match="prompt 6 has no tokens"):
        sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, [[1], []], KEY, 5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, not nan"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p must lie in \(0, 1\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_invalid_sampling_parameters_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**kwargs)


def test_prompts_are_left_padded():
    tokens, valid = pad_prompts([[1, 2, 3], [4], [5] * 5], smallest=4)
    assert tokens.tolist() == [[0] * 5 + [1, 2, 3], [0] * 7 + [4], [0] * 3 + [5] * 5]
    assert valid.tolist() == [[False] * (8 - n) + [True] * n for n in (3, 1, 5)]
    assert pad_prompts([[1] * 4], smallest=4)[0].shape == (1, 4)


def test_padded_widths():
    widths = [pad_prompts([[1] * length, [2]])[0].shape[1] for length in range(1, 1400)]
    assert sorted(set(widths)) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    # Each is the first width that holds the prompt; above 64 tokens it is less than 1.5 times the prompt.
    assert all(width >= length for length, width in enumerate(widths, 1))
    assert all(pad_prompts([[1] * width])[0].shape[1] == width for width in set(widths))
    assert max(width / length for length, width in enumerate(widths, 1) if length > 64) < 1.5


def test_padded_width_is_limited():
    tokens, valid = pad_prompts([[1] * 150, [2]], widest=160)
    assert tokens.shape == (2, 160) and valid.sum(axis=1).tolist() == [150, 1]
    assert pad_prompts([[1] * 150], widest=200)[0].shape[1] == 192
