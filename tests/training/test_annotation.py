"""Annotation of a buffer with reference statistics, and the probe that decides whether the sampler's are adopted."""

import dataclasses

import jax
import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Record, trees
from shiq_jax.replay.schedule import trajectory_groups
from shiq_jax.training import annotation
from shiq_jax.training.annotation import (
    PROBE_TOLERANCE,
    annotate,
    probe_sampler_statistics,
    record_statistics,
    reference_identity,
)


@pytest.fixture(scope="module")
def params(model_on_mesh):
    return model_on_mesh()[1]


@pytest.fixture(scope="module")
def expected(model, params, records, unpacked_records):
    """(logp, lse) of every action of every record, from the full logits of one record at a time."""
    data = unpacked_records(records)
    stats = jax.device_get(jax.jit(lambda params: data.statistics(model, params))(params))
    return [(logp[mask], lse[mask]) for logp, lse, mask in zip(stats.logp, stats.lse, data.mask, strict=True)]


@pytest.fixture(scope="module")
def sampled(records, expected):
    """The records with the model's exact statistics as sampler statistics."""
    return [
        dataclasses.replace(record, logp=logp, lse=lse) for record, (logp, lse) in zip(records, expected, strict=True)
    ]


@pytest.fixture
def forward_passes(monkeypatch):
    """List with the number of records of each forward pass; the pass with index `stop` raises."""

    class ForwardPasses(list):
        stop = None

    passes = ForwardPasses()

    def counting(model, params, trees, pack_groups, *args):
        if len(passes) == passes.stop:
            raise KeyboardInterrupt
        passes.append(sum(map(len, pack_groups)))
        return original(model, params, trees, pack_groups, *args)

    original = annotation._pack_group_statistics
    monkeypatch.setattr(annotation, "_pack_group_statistics", counting)
    return passes


def assert_statistics_close(actual, expected, tolerance=1e-5):
    assert len(actual) == len(expected)
    for (logp, lse), (expected_logp, expected_lse) in zip(actual, expected, strict=True):
        assert logp.shape == expected_logp.shape
        np.testing.assert_allclose(logp, expected_logp, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, expected_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prompts_per_batch", [3, 32])
def test_statistics_match_unpacked_forward(model, params, records, expected, prompts_per_batch):
    statistics = record_statistics(model, params, records, prompts_per_batch=prompts_per_batch)
    assert_statistics_close(statistics, expected)


def test_statistics_do_not_depend_on_record_order(model, params, records, expected):
    order = np.random.default_rng(0).permutation(len(records))
    statistics = record_statistics(model, params, [records[index] for index in order])
    assert_statistics_close(statistics, [expected[index] for index in order])


def test_statistics_on_a_mesh(model_on_mesh, records, expected):
    assert_statistics_close(record_statistics(*model_on_mesh("fsdp=2,tensor=2"), records), expected)


def test_probe_passes_with_exact_sampler_statistics(model, params, sampled, make_buffer):
    probe = probe_sampler_statistics(model, params, make_buffer(sampled))
    assert probe["passed"] and max(probe["max_logratio"], probe["max_lse_difference"]) < 1e-5


@pytest.mark.parametrize(("column", "metric"), [("logp", "max_logratio"), ("lse", "max_lse_difference")])
@pytest.mark.parametrize(("error", "passed"), [(2e-3, False), (-2e-3, False), (5e-4, True)])
def test_probe_detects_a_single_wrong_value(model, params, sampled, make_buffer, column, metric, error, passed):
    values = getattr(sampled[4], column).copy()
    values[-1] += error
    perturbed = [*sampled[:4], dataclasses.replace(sampled[4], **{column: values}), *sampled[5:]]
    probe = probe_sampler_statistics(model, params, make_buffer(perturbed))
    assert probe["passed"] is passed
    np.testing.assert_allclose(probe[metric], abs(error), atol=2e-5)
    assert abs(error) > PROBE_TOLERANCE or passed


def test_probe_fails_on_nan(model, params, sampled, make_buffer):
    broken = {**params, "norm": {"scale": params["norm"]["scale"] * np.nan}}
    assert not probe_sampler_statistics(model, broken, make_buffer(sampled))["passed"]


def test_probe_needs_sampler_statistics(model, params, sampled, records, make_buffer):
    assert probe_sampler_statistics(model, params, make_buffer([records[0], *sampled[1:]])) is None


def test_passing_sampler_statistics_are_adopted(model, params, sampled, make_buffer, forward_passes):
    buffer, identity = make_buffer(sampled, shards=2), reference_identity(model, params)
    assert annotate(model, params, buffer, identity)["passed"]
    assert forward_passes == [len(sampled)], "only the probe runs a forward pass"
    assert not buffer.missing_statistics(identity) and not list(buffer.path.rglob("statistics/*/*.arrow"))
    for (logp, lse), record in zip(buffer.statistics(identity).read(range(len(sampled))), sampled, strict=True):
        np.testing.assert_array_equal(logp, record.logp)
        np.testing.assert_array_equal(lse, record.lse)


@pytest.mark.parametrize("sampler_statistics", ["missing", "wrong"])
def test_statistics_are_computed_if_not_adopted(
    model, params, records, sampled, expected, make_buffer, sampler_statistics
):
    if sampler_statistics == "wrong":
        records = [dataclasses.replace(record, lse=record.lse + 0.1) for record in sampled]
    buffer, identity = make_buffer(records, shards=2), reference_identity(model, params)
    probe = annotate(model, params, buffer, identity)
    assert probe is None if sampler_statistics == "missing" else not probe["passed"]
    assert_statistics_close(buffer.statistics(identity).read(range(len(records))), expected)


def test_interrupted_annotation_resumes(model, params, records, expected, make_buffer, forward_passes):
    buffer, identity = make_buffer(records, shards=3), reference_identity(model, params)
    sizes = [len(shard) for shard in buffer.shards]
    forward_passes.stop = 2
    with pytest.raises(KeyboardInterrupt):
        annotate(model, params, buffer, identity)
    assert buffer.missing_statistics(identity) == [2]
    with pytest.raises(UserError, match="2 of 3 shards; finish the annotation"):
        buffer.statistics(identity)
    forward_passes.stop = None
    reopened = type(buffer).open(buffer.path)
    annotate(model, params, reopened, identity)
    assert forward_passes == sizes, "every shard must be computed once"
    assert_statistics_close(reopened.statistics(identity).read(range(len(records))), expected)
    annotate(model, params, reopened, identity)
    assert forward_passes == sizes


def test_each_tree_is_built_once(model, params, records, make_buffer, monkeypatch):
    calls, build = [], trees.build_trie
    monkeypatch.setattr(trees, "build_trie", lambda sequences: calls.append(sequences) or build(sequences))
    buffer = make_buffer(records, shards=2)
    annotate(model, params, buffer, reference_identity(model, params))
    groups = buffer.group_ids()
    assert len(calls) == sum(len(set(groups[shard.start : shard.stop])) for shard in buffer.shards)


def test_statistics_of_another_model_are_rejected(model, params, records, make_buffer):
    buffer, identity = make_buffer(records), reference_identity(model, params)
    annotate(model, params, buffer, identity)
    other_params = {**params, "norm": {"scale": params["norm"]["scale"] * 1.001}}
    other_identity = reference_identity(model, other_params)
    assert other_identity["weights"] != identity["weights"]
    with pytest.raises(UserError) as error:
        buffer.statistics(other_identity)
    assert identity["weights"] in str(error.value) and other_identity["weights"] in str(error.value)


def test_identity_depends_on_weights_and_dtype_but_not_on_mesh(model, params, model_on_mesh):
    identity = reference_identity(model, params)
    assert reference_identity(*model_on_mesh("fsdp=2,tensor=2")) == identity
    assert reference_identity(dataclasses.replace(model, compute_dtype="bfloat16"), params) != identity


def test_row_length_counts_a_shared_prompt_once():
    """Sixteen answers to a long prompt fit into one row only because they share the prompt."""
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

    assert pack_groups(128) == [tuple((index,) for index in range(16))]
    parts = pack_groups(64)
    assert len(parts) == 2 and sorted(index for part in parts for (index,) in part) == list(range(16))
    # Sequences longer than a row are kept, so that packing can report them.
    assert len(pack_groups(20)) == 16
