"""Sampling with a cache draws from the distribution it reports, and that is the one of the uncached forward pass."""

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
from shiq_jax.rollout.sampling import Sampling, behaviour_logits
from shiq_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(11)
NEW = 12
FILTERED = Sampling(temperature=0.8, top_k=7, top_p=0.9, max_tokens=NEW)
FIELDS = ("tokens", "logp", "lse", "behaviour_logp")


@pytest.fixture(scope="module")
def sampler(model):
    """`sampler(sampling, stops, **sizes)`: made once for each choice, for the sake of compilation."""
    made = {}

    def make(sampling, stops=(), **sizes):
        known = (sampling, tuple(stops), *sorted(sizes.items()))
        if known not in made:
            made[known] = Sampler(model, sampling, stops, **sizes)
        return made[known]

    return make


@pytest.fixture(scope="module")
def sampled(sampler, params, prompts):
    """Three filtered samples of every prompt, nothing stopping them."""
    return sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    flat = ([answer for answers in side for answer in answers] for side in (ours, theirs))
    for left, right in zip(*flat, strict=True):
        np.testing.assert_array_equal(left["tokens"], right["tokens"])
        for name in FIELDS[1:]:
            np.testing.assert_allclose(left[name], right[name], atol=3e-5)


def filtered_logp(logits, sampling):
    """Log-probabilities after temperature, top-k and top-p, one entry after the other from the best down."""
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


def test_greedy_is_argmax_after_argmax(sampler, params, prompts, uncached):
    draw = sampler(Sampling(temperature=0, max_tokens=NEW), samples_per_prompt=1, prompts_in_flight=4)
    answers = draw(params, prompts, KEY)
    expected = [uncached.greedy(params, prompt, NEW) for prompt in prompts]
    assert [answer["tokens"].tolist() for (answer,) in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts) and max(map(len, map(set, expected))) > 2
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        logp, lse = uncached.statistics(params, prompt, answer["tokens"])
        np.testing.assert_allclose(answer["logp"], logp, atol=1e-5)
        np.testing.assert_allclose(answer["lse"], lse, atol=1e-5)
        np.testing.assert_array_equal(answer["behaviour_logp"], np.zeros(NEW))


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_greedy_answer_comes_after_the_samples_and_leaves_them_alone(sampler, sampled, params, prompts, lanes):
    sizes = dict(samples_per_prompt=3, prompts_in_flight=4)
    both = sampler(FILTERED, greedy=True, lanes_per_prompt=lanes, **sizes)(params, prompts, KEY)
    assert_same([answers[:3] for answers in both], sampled)
    alone = sampler(Sampling(temperature=0, max_tokens=NEW), prompts_in_flight=4)(params, prompts, KEY)
    assert_same([answers[3:] for answers in both], alone)


def test_greedy_is_that_of_transformers_on_fifty_prompts(tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, max_position_embeddings=96)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, bos_token_id=0, eos_token_id=13
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = load_hf(tmp_path)
    lengths = (1, 2, 3, 5, 8, 13, 21, 31, 40, 50)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 24, (5, length)) for length in lengths]

    def expected(same_length):
        tokens = torch.tensor(same_length)
        settings = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=13)
        out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[:, tokens.shape[1] :].tolist()
        return [row[: row.index(13) + 1] if 13 in row else row for row in out]

    order = random.permutation(50)  # one batch of ours holds many lengths
    ours = [None] * 50
    draw = Sampler(model, Sampling(temperature=0, max_tokens=NEW), (13,), prompts_in_flight=25)
    rows = [row.tolist() for same_length in prompts for row in same_length]
    for place, (answer,) in zip(order, draw(params, [rows[place] for place in order], KEY), strict=True):
        ours[place] = answer["tokens"].tolist()
    assert ours == [answer for same_length in prompts for answer in expected(same_length)]
    # Both ways to end happen here, at many places, and the answers are not all one.
    ends = {len(tokens) for tokens in ours}
    assert NEW in ends and len(ends) > 4 and len(set(map(tuple, ours))) > 25


@pytest.mark.parametrize(
    ("sampling", "samples"),
    [(Sampling(temperature=0, max_tokens=NEW), 1), pytest.param(FILTERED, 3, marks=pytest.mark.slow)],
    ids=["greedy", "sampled"],
)
def test_tokens_are_the_same_on_a_mesh(sampling, samples, sampler, config, params, prompts):
    sharded = Model.from_config(config, mesh=make_mesh("fsdp=2,tensor=2"))
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params()))
    assert any(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(placed))
    sizes = dict(samples_per_prompt=samples, prompts_in_flight=4)
    there = Sampler(sharded, sampling, (), **sizes)(placed, prompts, KEY)
    assert_same(there, sampler(sampling, **sizes)(params, prompts, KEY))


# --- the statistics that come with a sample


def test_raw_statistics_are_those_of_the_uncached_pass(sampled, params, prompts, uncached):
    for prompt, answers in zip(prompts, sampled, strict=True):
        for answer in answers:
            logp, lse = uncached.statistics(params, prompt, answer["tokens"])
            np.testing.assert_allclose(answer["logp"], logp, atol=1e-5)
            np.testing.assert_allclose(answer["lse"], lse, atol=1e-5)
            assert all(answer[name].shape == (NEW,) for name in FIELDS)


@pytest.mark.parametrize("sampling", [FILTERED, Sampling(max_tokens=NEW)], ids=["filtered", "raw"])
def test_behaviour_is_the_filtered_distribution(sampling, sampler, params, prompts, uncached):
    drawn = sampler(sampling, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)
    raw = 0
    for prompt, answers in zip(prompts, drawn, strict=True):
        for answer in answers:
            tokens = answer["tokens"]
            logits = uncached.next_logits(params, [*prompt, *tokens])[len(prompt) - 1 : -1]
            expected = [filtered_logp(row, sampling)[token] for row, token in zip(logits, tokens, strict=True)]
            np.testing.assert_allclose(answer["behaviour_logp"], expected, atol=3e-5)
            raw += np.allclose(answer["behaviour_logp"], answer["logp"], atol=1e-5)
    # Only the unfiltered distribution of temperature 1 is the raw one.
    assert raw == (18 if sampling == Sampling(max_tokens=NEW) else 0)


# --- the distribution itself

distinct = st.lists(st.integers(-60, 60), min_size=8, max_size=8, unique=True).map(lambda xs: np.array(xs) / 10)
tempers = st.floats(0.25, 4.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(distinct, tempers, st.integers(1, 10))
def test_top_k_keeps_the_k_best(logits, temperature, k):
    out = np.asarray(behaviour_logits(jnp.float32(logits)[None], Sampling(temperature, top_k=k)))[0]
    best = np.argsort(-logits)[:k]
    assert set(np.flatnonzero(np.isfinite(out))) == set(best)
    np.testing.assert_allclose(out[best], logits[best] / temperature, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(out)).sum(), 1, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(distinct, tempers, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_with_that_mass(logits, temperature, p):
    out = np.asarray(behaviour_logits(jnp.float32(logits)[None], Sampling(temperature, top_p=p)))[0]
    kept = np.isfinite(out)
    mass = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    assert mass[kept].sum() >= p - 1e-6
    # The best tokens, none of which could be spared.
    assert kept.any() and mass[kept].min() > max(mass[~kept], default=0)
    assert mass[kept].sum() - mass[kept].min() < p + 1e-6
    np.testing.assert_allclose(out[kept], logits[kept] / temperature, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(out)).sum(), 1, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(distinct, tempers, st.integers(0, 10), st.floats(0.05, 1.0))
def test_filters_follow_one_another(logits, temperature, k, p):
    sampling = Sampling(temperature, k, p)
    out = jax.nn.log_softmax(behaviour_logits(jnp.float32(logits)[None], sampling))[0]
    expected = filtered_logp(logits, sampling)
    # Where the mass of a set is p to the last bit, float32 may cut one token earlier or later.
    masses = np.cumsum(np.sort(np.exp(filtered_logp(logits, Sampling(temperature, k))))[::-1])
    if np.abs(masses - p).min() > 1e-5 or p == 1:
        np.testing.assert_allclose(out, expected, atol=1e-4)
    assert np.asarray(out).argmax() == logits.argmax()


def test_temperature_zero_is_certain_of_the_best():
    out = behaviour_logits(jnp.array([[0.1, 3.0, 2.9], [5.0, -1.0, 0.0]]), Sampling(temperature=0, top_k=2, top_p=0.5))
    np.testing.assert_array_equal(jax.nn.softmax(out), [[0, 1, 0], [1, 0, 0]])


def chi_square(counts, probabilities):
    """p-value of counts under probabilities, cells of fewer than 5 expected draws taken together."""
    expected = counts.sum() * probabilities
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5
    if expected[rare].sum() > 0:
        counts, expected = (np.append(each[~rare], each[rare].sum()) for each in (counts, expected))
    else:
        counts, expected = counts[~rare], expected[~rare]
    return scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(expected) - 1)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=1), Sampling(0.7, 8, 0.9, 1)], ids=["raw", "filtered"])
def test_first_tokens_come_as_often_as_they_should(sampling, sampler, params, prompts, uncached):
    draw = sampler(sampling, samples_per_prompt=4000, prompts_in_flight=2)
    for prompt, answers in zip(prompts[:2], draw(params, prompts[:2], KEY), strict=True):
        logits = uncached.next_logits(params, prompt)[-1]
        counts = np.bincount([int(answer["tokens"][0]) for answer in answers], minlength=len(logits))
        assert chi_square(counts, np.exp(filtered_logp(logits, sampling))) > 1e-3
        # The test would notice a slightly warmer distribution.
        warmer = Sampling(1.15 * sampling.temperature, sampling.top_k)
        assert chi_square(counts, np.exp(filtered_logp(logits, warmer))) < 1e-3


def test_pairs_of_tokens_come_as_often_as_they_should(sampler, params, prompts, config, uncached):
    (answers,) = sampler(Sampling(max_tokens=2), samples_per_prompt=6000, prompts_in_flight=1)(params, prompts[:1], KEY)
    pairs = np.stack([answer["tokens"] for answer in answers])
    first = np.exp(filtered_logp(uncached.next_logits(params, prompts[0])[-1], Sampling()))
    after = [uncached.next_logits(params, [*prompts[0], token])[-1] for token in range(config.vocab_size)]
    joint = first[:, None] * np.exp([filtered_logp(row, Sampling()) for row in after])
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(pairs.T), 1)
    assert chi_square(counts.ravel(), joint.ravel()) > 1e-3
    assert chi_square(counts.ravel(), np.outer(first, joint.sum(0)).ravel()) < 1e-3


@pytest.mark.parametrize("sampling", [FILTERED, Sampling(max_tokens=NEW)], ids=["filtered", "raw"])
def test_token_t_is_drawn_with_the_t_th_fold_of_its_key(sampling, sampler, params, prompts, uncached):
    drawn = sampler(sampling, samples_per_prompt=2, prompts_in_flight=4)(params, prompts[:3], KEY, first=5)
    for number, (prompt, answers) in enumerate(zip(prompts, drawn)):
        keys = jax.random.split(jax.random.fold_in(KEY, 5 + number), 2)
        for key, answer in zip(keys, answers, strict=True):
            logits = uncached.next_logits(params, [*prompt, *answer["tokens"]])[len(prompt) - 1 : -1]
            for t, token in enumerate(answer["tokens"]):
                behaviour = jnp.asarray(filtered_logp(logits[t], sampling), jnp.float32)
                assert categorical(jax.random.fold_in(key, t), behaviour) == token


# --- where a sequence ends


def test_a_stop_token_only_cuts(sampler, params, prompts, sampled):
    stops = (2, 9, 17)
    stopped = sampler(FILTERED, stops, samples_per_prompt=3, prompts_in_flight=4)(params, prompts, KEY)
    cut = []
    for answers in sampled:
        ends = [next((t + 1 for t, token in enumerate(a["tokens"]) if token in stops), NEW) for a in answers]
        cut.append([{name: a[name][:end] for name in FIELDS} for a, end in zip(answers, ends, strict=True)])
    assert_same(stopped, cut)
    lengths = [len(answer["tokens"]) for answers in stopped for answer in answers]
    # The stop token is counted, also when it comes first or last; sequences without one go on to the end.
    assert NEW in lengths and min(lengths) < NEW // 2


class Counting:
    """A model that notes the shape of the tokens of each forward pass."""

    def __init__(self, model):
        self.config, self.seen = model.config, []
        self.init_cache, self.init_branches, self.project = model.init_cache, model.init_branches, model.project
        self.extend, self.extend_branches = self._noted(model.extend), self._noted(model.extend_branches)

    def _noted(self, forward):
        def noted(params, *args):
            tokens = next(arg for arg in args if isinstance(arg, jax.Array))
            jax.debug.callback(lambda: self.seen.append(tokens.shape))
            return forward(params, *args)

        return noted


@pytest.mark.parametrize(
    ("stops", "new"),
    [((), NEW), ((), 1), ((2, 9, 17), NEW), (range(24), NEW)],
    ids=["to the end", "one token", "stopped", "stopped at once"],
)
@pytest.mark.parametrize("lanes", [1, 2, 6])
def test_the_cost_follows_the_tokens(lanes, stops, new, model, params, prompts):
    counting = Counting(model)
    sampling = Sampling(0.8, 7, 0.9, new)
    draw = Sampler(counting, sampling, stops, samples_per_prompt=6, prompts_in_flight=1, lanes_per_prompt=lanes)
    (answers,) = draw(params, prompts[1:2], KEY)
    jax.effects_barrier()
    lengths = [len(answer["tokens"]) for answer in answers]
    # Whoever is free takes the next, and the loop ends with the last.
    until = [0] * lanes
    for length in lengths:
        until[int(np.argmin(until))] += length
    assert sorted(counting.seen) == [(1, lanes)] * max(until) + [(1, 32)]
    assert lanes > 1 or max(until) == sum(lengths)


def test_a_row_that_is_done_takes_the_next_prompt(model, params, prompts):
    counting = Counting(model)
    stops, many = (2, 9, 17), [prompts[number % 6] for number in range(40)]
    sizes = dict(samples_per_prompt=3, prompts_in_flight=4, lanes_per_prompt=1)
    draw = Sampler(counting, Sampling(max_tokens=NEW), stops, **sizes)
    answers = draw(params, many, KEY)
    jax.effects_barrier()
    steps = [shape for shape in counting.seen if shape == (4, 1)]
    drawn = sum(len(answer["tokens"]) for each in answers for answer in each)
    # Four lanes: a little is lost at the end, where no prompt is left to take.
    assert drawn / 4 <= len(steps) <= 1.2 * drawn / 4 + 3 * NEW
    assert len(counting.seen) - len(steps) == 40
    # Each prompt is computed at its own width, so far as widths are few.
    assert {shape for shape in counting.seen if shape != (4, 1)} == {(1, 32)}


# --- what a sequence depends on


def test_a_sequence_does_not_know_its_batch(sampler, params, prompts, sampled):
    assert_same(sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=1)(params, prompts, KEY), sampled)


def test_a_sequence_does_not_know_its_neighbours(sampler, params, prompts, sampled):
    draw = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    # Number 1 of another list, whose longest prompt makes all of them wider.
    assert_same(draw(params, [[5, 8], prompts[1], list(range(20)) * 2, [7]], KEY)[1:2], sampled[1:2])


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("flight", [1, 2])
def test_a_sequence_does_not_know_its_lane(lanes, flight, model, params, prompts, sampled):
    draw = Sampler(model, FILTERED, (), samples_per_prompt=3, prompts_in_flight=flight, lanes_per_prompt=lanes)
    assert_same(draw(params, prompts, KEY), sampled)


def test_prompts_are_given_as_they_are_finished(sampler, params, prompts, sampled):
    draw = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    found = list(draw.stream(params, prompts, KEY))
    assert sorted(number for number, _ in found) == list(range(6))
    for number, answers in found:
        assert_same([answers], sampled[number : number + 1])


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_a_list_may_be_drawn_in_parts(cut, sampler, params, prompts, sampled):
    draw = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    assert_same(draw(params, prompts[:cut], KEY) + draw(params, prompts[cut:], KEY, cut), sampled)


def test_samples_differ_but_can_be_drawn_again(sampler, params, prompts, sampled):
    draw = sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)
    assert_same(draw(params, prompts, KEY), sampled)
    texts = [tuple(answer["tokens"]) for answers in sampled for answer in answers]
    assert len(set(texts)) == len(texts) == 18
    twice = draw(params, [prompts[0]] * 2, KEY)
    assert len({tuple(answer["tokens"]) for answers in twice for answer in answers}) == 6
    other = draw(params, prompts[:1], jax.random.key(12))
    assert {tuple(answer["tokens"]) for answer in other[0]}.isdisjoint(texts[:3])


# --- edges


def test_no_prompts_give_no_answers(sampler, params):
    assert sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, [], KEY) == []


def test_the_context_is_used_to_its_end_and_not_beyond(sampler, params, config):
    draw = sampler(Sampling(temperature=0, max_tokens=NEW), samples_per_prompt=1, prompts_in_flight=4)
    fits = [[3] * (config.max_positions - NEW)]
    assert len(draw(params, fits, KEY)[0][0]["tokens"]) == NEW
    said = (
        "prompt 8 has 85 tokens, which with max_tokens=12 exceed .* context of 96: .* to 84 or lower max_tokens to 11$"
    )
    with pytest.raises(UserError, match=said):
        draw(params, [[1], fits[0] + [3]], KEY, 7)


@pytest.mark.parametrize(
    ("new", "length", "said"),
    [
        (NEW, 96, "prompt 0 has 96 tokens.*: shorten the prompt to 84$"),
        (96, 5, "prompt 0 has 5 tokens.*: lower max_tokens to 91$"),
        (100, 200, "prompt 0 has 200 tokens.*: shorten the prompt and lower max_tokens$"),
    ],
)
def test_a_prompt_too_long_is_told_only_what_helps(new, length, said, sampler, params):
    draw = sampler(Sampling(max_tokens=new), samples_per_prompt=1, prompts_in_flight=4)
    with pytest.raises(UserError, match=said):
        draw(params, [[3] * length], KEY)


def test_an_empty_prompt_is_refused_by_its_number(sampler, params):
    with pytest.raises(UserError, match="prompt 6 has no tokens"):
        sampler(FILTERED, samples_per_prompt=3, prompts_in_flight=4)(params, [[1], []], KEY, 5)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p must lie in \(0, 1\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings_, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**settings_)


def test_prompts_are_padded_on_the_left():
    tokens, valid = pad_prompts([[1, 2, 3], [4], [5] * 5], smallest=4)
    assert tokens.tolist() == [[0] * 5 + [1, 2, 3], [0] * 7 + [4], [0] * 3 + [5] * 5]
    assert valid.tolist() == [[False] * (8 - n) + [True] * n for n in (3, 1, 5)]
    assert pad_prompts([[1] * 4], smallest=4)[0].shape == (1, 4)


def test_widths_are_few():
    widths = [pad_prompts([[1] * length, [2]])[0].shape[1] for length in range(1, 1400)]
    assert sorted(set(widths)) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    # The first that holds the prompt, and from 64 on never half as wide again.
    assert all(width >= length for length, width in enumerate(widths, 1))
    assert all(pad_prompts([[1] * width])[0].shape[1] == width for width in set(widths))
    assert max(width / length for length, width in enumerate(widths, 1) if length > 64) < 1.5


def test_prompts_are_never_wider_than_allowed():
    tokens, valid = pad_prompts([[1] * 150, [2]], widest=160)
    assert tokens.shape == (2, 160) and valid.sum(axis=1).tolist() == [150, 1]
    assert pad_prompts([[1] * 150], widest=200)[0].shape[1] == 192
