"""The work of a row: so many groups a step, of the lengths that the row names."""

import json

import pytest

from benchmarks import works
from benchmarks.ours import records_of
from benchmarks.peers import TRL, TUNIX


@pytest.mark.parametrize(("name", "prompt", "answer"), [("pairs", 64, 192), ("groups_k16_long", 1600, 50)])
def test_fixed_work_has_its_lengths(tmp_path, name, prompt, answer):
    work = works.WORKS[name]._replace(steps=2)
    works.write(work, path := tmp_path / "deep" / "work.json")
    steps = json.loads(path.read_text())
    assert len(steps) == 2 and all(len(step) == work.groups for step in steps)
    for group in sum(steps, []):
        assert len(group["prompt"]) == prompt and [len(each) for each in group["answers"]] == [answer] * work.answers
    works.write(work, again := tmp_path / "again.json")
    assert again.read_text() == path.read_text()


@pytest.mark.parametrize("name", works.WORKS)
def test_tiny_work_has_as_many_short_sequences_of_bytes(tmp_path, name):
    work = works.WORKS[name]
    works.write(work, path := tmp_path / "work.json", tiny=True)
    steps = json.loads(path.read_text())
    assert len(steps) == work.steps and all(len(step) == work.groups for step in steps)
    for group in sum(steps, []):
        assert len(group["answers"]) == work.answers and all(len(each) <= 8 for each in group["answers"])
        assert len(group["prompt"]) <= 64 and max(map(max, (group["prompt"], *group["answers"]))) < 256


def test_peers_get_the_pairs_that_the_groups_hold():
    pairs = {name: work.pairs for name, work in works.WORKS.items()}
    assert pairs == {"pairs": 2, "bfcl_pairs": 8, "bfcl_groups_k8": 16, "groups_k16_long": 8}
    for work in works.WORKS.values():
        assert work.trial.pairs <= work.pairs and work.pairs % max(work.at_once) == 0


@pytest.mark.parametrize("peer", [TRL, TUNIX])
def test_a_peer_competes_in_every_mode_and_no_setting_twice(peer):
    found = list(peer.settings((2, 1), 2))
    assert {(setting.mode, setting.at_once) for setting in found} == {(m, n) for m in peer.modes for n in (1, 2)}
    assert peer.defaults in peer.modes
    assert len({setting: None for setting in found}) == len(found)
    # Two at once of a single pair is one.
    assert len(list(peer.settings((2, 1), 1))) == len(peer.modes)
    assert found[0].arguments[-1] == "2" and str(found[0]).startswith(peer.name)


def test_a_group_becomes_records_with_the_better_answers_first():
    found = records_of(3, {"prompt": [1, 2], "answers": [[5, 6, 7], [8]]})
    assert [record.tokens.tolist() for record in found] == [[1, 2, 5, 6, 7], [1, 2, 8]]
    assert [record.action_mask.sum() for record in found] == [3, 1]
    assert found[0].rewards.sum() > found[1].rewards.sum() and {record.group for record in found} == {"3"}
