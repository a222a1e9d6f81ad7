"""Benchmark workloads: sizes, peer settings, and conversion to records."""

import json

import pytest

from benchmarks import workloads
from benchmarks.ours import group_records
from benchmarks.peers import TRL, TUNIX


@pytest.mark.parametrize(("name", "prompt", "answer"), [("pairs", 64, 192), ("groups_k16_long", 1600, 50)])
def test_fixed_length_workload(tmp_path, name, prompt, answer):
    workload = workloads.WORKLOADS[name]._replace(steps=2)
    workloads.write(workload, path := tmp_path / "deep" / "workload.json")
    steps = json.loads(path.read_text())
    assert len(steps) == 2 and all(len(step) == workload.groups for step in steps)
    for group in sum(steps, []):
        assert len(group["prompt"]) == prompt
        assert [len(each) for each in group["answers"]] == [answer] * workload.answers
    workloads.write(workload, again := tmp_path / "again.json")
    assert again.read_text() == path.read_text()


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_tiny_workload_has_short_byte_sequences(tmp_path, name):
    workload = workloads.WORKLOADS[name]
    workloads.write(workload, path := tmp_path / "workload.json", tiny=True)
    steps = json.loads(path.read_text())
    assert len(steps) == workload.steps and all(len(step) == workload.groups for step in steps)
    for group in sum(steps, []):
        assert len(group["answers"]) == workload.answers and all(len(answer) <= 8 for answer in group["answers"])
        assert len(group["prompt"]) <= 64 and max(map(max, (group["prompt"], *group["answers"]))) < 256


def test_pairs_per_step():
    pairs = {name: workload.pairs for name, workload in workloads.WORKLOADS.items()}
    assert pairs == {"pairs": 2, "bfcl_pairs": 8, "bfcl_groups_k8": 16, "groups_k16_long": 8}
    for workload in workloads.WORKLOADS.values():
        assert workload.trial.pairs <= workload.pairs and workload.pairs % max(workload.microbatch_sizes) == 0


@pytest.mark.parametrize("peer", [TRL, TUNIX])
def test_peer_settings_cover_modes_and_microbatch_sizes_once(peer):
    settings = list(peer.settings((2, 1), 2))
    expected = {(mode, size) for mode in peer.modes for size in (1, 2)}
    assert {(setting.mode, setting.microbatch_size) for setting in settings} == expected
    assert peer.defaults in peer.modes
    assert len(set(settings)) == len(settings)
    # Microbatches of two are clipped to the single pair of the step.
    assert len(list(peer.settings((2, 1), 1))) == len(peer.modes)
    assert settings[0].arguments[-1] == "2" and str(settings[0]).startswith(peer.name)


def test_group_records_have_decreasing_rewards():
    records = group_records(3, {"prompt": [1, 2], "answers": [[5, 6, 7], [8]]})
    assert [record.tokens.tolist() for record in records] == [[1, 2, 5, 6, 7], [1, 2, 8]]
    assert [record.action_mask.sum() for record in records] == [3, 1]
    assert records[0].rewards.sum() > records[1].rewards.sum() and {record.group for record in records} == {"3"}
