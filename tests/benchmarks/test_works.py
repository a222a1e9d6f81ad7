"""The work of a row: so many groups a step, of the lengths that the row names."""

import json

import pytest

from benchmarks import works
from benchmarks.ours import records_of
from benchmarks.peers import TRL, TUNIX, micro


@pytest.mark.parametrize(("name", "prompt", "answer"), [("pairs", 64, 192), ("groups_k16_long", 1600, 50)])
def test_fixed_work_has_its_lengths(tmp_path, name, prompt, answer):
    work = works.WORKS[name]
    works.write(work, path := tmp_path / "deep" / "work.json", steps=2)
    steps = json.loads(path.read_text())
    assert len(steps) == 2 and all(len(step) == work.groups for step in steps)
    for group in sum(steps, []):
        assert len(group["prompt"]) == prompt and [len(each) for each in group["answers"]] == [answer] * work.answers
    works.write(work, again := tmp_path / "again.json", steps=2)
    assert again.read_text() == path.read_text()


def test_peers_get_the_pairs_that_the_groups_hold():
    pairs = {name: work.pairs for name, work in works.WORKS.items()}
    assert pairs == {"pairs": 2, "bfcl_pairs": 8, "bfcl_groups_k8": 16, "groups_k16_long": 8}
    assert micro(TRL.settings["precomputed"], 16) == ["yes", "no", "16"]
    assert micro(TUNIX.settings["remat decoder, one pair at a time"], 16) == ["decoder", "1"]
    assert all(peer.defaults in peer.settings for peer in (TRL, TUNIX))


def test_a_group_becomes_records_with_the_better_answers_first():
    found = records_of(3, {"prompt": [1, 2], "answers": [[5, 6, 7], [8]]})
    assert [record.tokens.tolist() for record in found] == [[1, 2, 5, 6, 7], [1, 2, 8]]
    assert [record.action_mask.sum() for record in found] == [3, 1]
    assert found[0].rewards.sum() > found[1].rewards.sum() and {record.group for record in found} == {"3"}
