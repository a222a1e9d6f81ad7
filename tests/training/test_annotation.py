"""The pass that turns a reference model into two numbers per action, and when the sampler's own may stand in for it."""

import dataclasses

import jax
import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Record, trees
from shiq_jax.replay.schedule import trajectory_groups
from shiq_jax.training import annotation
from shiq_jax.training.annotation import PROBE_TOLERANCE, annotate, probe, reference_identity, statistics_of


@pytest.fixture(scope="module")
def params(on_mesh):
    return on_mesh()[1]


@pytest.fixture(scope="module")
def expected(model, params, records, dense):
    """(logp, lse) of every action of every record, from whole logits of one record at a time."""
    data = dense(records)
    stats = jax.device_get(jax.jit(lambda params: data.statistics(model, params))(params))
    return [(logp[mask], lse[mask]) for logp, lse, mask in zip(stats.logp, stats.lse, data.mask, strict=True)]


@pytest.fixture(scope="module")
def sampled(records, expected):
    """The records with the true statistics of the model as their sampler's."""
    return [
        dataclasses.replace(record, logp=logp, lse=lse) for record, (logp, lse) in zip(records, expected, strict=True)
    ]


@pytest.fixture
def passes_made(monkeypatch):
    """Passes over pack_groups, as numbers of their records; the one at `stop` fails."""

    class Calls(list):
        stop = None

    calls = Calls()

    def counted(model, params, built, pack_groups, *options):
        if len(calls) == calls.stop:
            raise KeyboardInterrupt
        calls.append(sum(map(len, pack_groups)))
        return compute(model, params, built, pack_groups, *options)

    compute = annotation._pack_group_statistics
    monkeypatch.setattr(annotation, "_pack_group_statistics", counted)
    return calls


def check(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for (logp, lse), (true_logp, true_lse) in zip(found, expected, strict=True):
        assert logp.shape == true_logp.shape
        np.testing.assert_allclose(logp, true_logp, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, true_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prompts_per_batch", [3, 32])
def test_statistics_are_those_of_each_record_alone(model, params, records, expected, prompts_per_batch):
    check(statistics_of(model, params, records, prompts_per_batch=prompts_per_batch), expected)


def test_statistics_do_not_depend_on_the_order_of_the_records(model, params, records, expected):
    order = np.random.default_rng(0).permutation(len(records))
    found = statistics_of(model, params, [records[place] for place in order])
    check(found, [expected[place] for place in order])


def test_statistics_on_a_mesh_are_the_same(on_mesh, records, expected):
    check(statistics_of(*on_mesh("fsdp=2,tensor=2"), records), expected)


def test_the_samplers_own_statistics_pass_where_they_are_those_of_the_model(model, params, sampled, make_buffer):
    found = probe(model, params, make_buffer(sampled))
    assert found["passed"] and max(found["max_logratio"], found["max_lse_difference"]) < 1e-5


@pytest.mark.parametrize(("column", "number"), [("logp", "max_logratio"), ("lse", "max_lse_difference")])
@pytest.mark.parametrize(("error", "passed"), [(2e-3, False), (-2e-3, False), (5e-4, True)])
def test_the_probe_sees_one_number_that_is_off(model, params, sampled, make_buffer, column, number, error, passed):
    values = getattr(sampled[4], column).copy()
    values[-1] += error
    off = [*sampled[:4], dataclasses.replace(sampled[4], **{column: values}), *sampled[5:]]
    found = probe(model, params, make_buffer(off))
    assert found["passed"] is passed
    np.testing.assert_allclose(found[number], abs(error), atol=2e-5)
    assert abs(error) > PROBE_TOLERANCE or passed


def test_a_model_that_answers_nan_does_not_pass(model, params, sampled, make_buffer):
    broken = {**params, "norm": {"scale": params["norm"]["scale"] * np.nan}}
    assert not probe(model, broken, make_buffer(sampled))["passed"]


def test_there_is_no_probe_without_the_samplers_statistics(model, params, sampled, records, make_buffer):
    assert probe(model, params, make_buffer([records[0], *sampled[1:]])) is None


def test_statistics_that_pass_are_adopted_without_a_pass(model, params, sampled, make_buffer, passes_made):
    buffer, identity = make_buffer(sampled, shards=2), reference_identity(model, params)
    assert annotate(model, params, buffer, identity)["passed"]
    assert passes_made == [len(sampled)], "the probe's own pass and no other"
    assert not buffer.missing_statistics(identity) and not list(buffer.path.rglob("statistics/*/*.arrow"))
    for (logp, lse), record in zip(buffer.statistics(identity).read(range(len(sampled))), sampled, strict=True):
        np.testing.assert_array_equal(logp, record.logp)
        np.testing.assert_array_equal(lse, record.lse)


@pytest.mark.parametrize("sampler", ["none", "another model's"])
def test_statistics_are_computed_where_there_are_none_to_adopt(
    model, params, records, sampled, expected, make_buffer, sampler
):
    if sampler == "none":
        given = records
    else:
        given = [dataclasses.replace(record, lse=record.lse + 0.1) for record in sampled]
    buffer, identity = make_buffer(given, shards=2), reference_identity(model, params)
    found = annotate(model, params, buffer, identity)
    assert found is None if sampler == "none" else not found["passed"]
    check(buffer.statistics(identity).read(range(len(given))), expected)


def test_an_annotation_that_was_stopped_goes_on_where_it_was(
    model, params, records, expected, make_buffer, passes_made
):
    buffer, identity = make_buffer(records, shards=3), reference_identity(model, params)
    sizes = [len(shard) for shard in buffer.shards]
    passes_made.stop = 2
    with pytest.raises(KeyboardInterrupt):
        annotate(model, params, buffer, identity)
    assert buffer.missing_statistics(identity) == [2]
    with pytest.raises(UserError, match="2 of 3 shards; finish the annotation"):
        buffer.statistics(identity)
    passes_made.stop = None
    again = type(buffer).open(buffer.path)
    annotate(model, params, again, identity)
    assert passes_made == sizes, "a shard was computed twice, or never"
    check(again.statistics(identity).read(range(len(records))), expected)
    annotate(model, params, again, identity)
    assert passes_made == sizes


def test_a_tree_is_built_once_for_planning_and_for_the_pass(model, params, records, make_buffer, monkeypatch):
    built, build = [], trees.build_trie
    monkeypatch.setattr(trees, "build_trie", lambda sequences: built.append(sequences) or build(sequences))
    buffer = make_buffer(records, shards=2)
    annotate(model, params, buffer, reference_identity(model, params))
    groups = buffer.group_ids()
    assert len(built) == sum(len(set(groups[shard.start : shard.stop])) for shard in buffer.shards)


def test_statistics_of_another_model_are_refused_by_name(model, params, records, make_buffer):
    buffer, identity = make_buffer(records), reference_identity(model, params)
    annotate(model, params, buffer, identity)
    other = {**params, "norm": {"scale": params["norm"]["scale"] * 1.001}}
    wanted = reference_identity(model, other)
    assert wanted["weights"] != identity["weights"]
    with pytest.raises(UserError) as refused:
        buffer.statistics(wanted)
    assert identity["weights"] in str(refused.value) and wanted["weights"] in str(refused.value)


def test_the_identity_knows_weights_and_arithmetic_but_not_the_mesh(model, params, on_mesh):
    identity = reference_identity(model, params)
    assert reference_identity(*on_mesh("fsdp=2,tensor=2")) == identity
    assert reference_identity(dataclasses.replace(model, compute_dtype="bfloat16"), params) != identity


def test_a_prompt_is_run_once_for_all_answers_that_fit_beside_it():
    """Sixteen answers of a long prompt are longer than a row when each brings its own, and fit where they share it."""
    prompt, rng = np.arange(40) % 50, np.random.default_rng(0)
    group = [
        Record(
            tokens=np.concatenate([prompt, rng.integers(50, size=3)]), action_mask=np.arange(43) >= 40,
            rewards=np.ones(3, np.float32), group="long",
        )
        for _ in range(16)
    ]  # fmt: skip

    def pack_groups(row_length):
        return list(trajectory_groups([tuple(range(16))], group, [43] * 16, row_length))

    assert pack_groups(128) == [tuple((number,) for number in range(16))]
    parts = pack_groups(64)
    assert len(parts) == 2 and sorted(number for part in parts for (number,) in part) == list(range(16))
    # A group with a sequence that is too long by itself is not lost, but left to be refused by name.
    assert len(pack_groups(20)) == 16
