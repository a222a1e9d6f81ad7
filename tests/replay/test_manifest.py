import json

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, manifest


def edit(buffer, change):
    path = buffer.path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_newer_versions_are_refused_with_the_way_out(make_buffer):
    buffer = make_buffer([])
    edit(buffer, lambda content: content.update(schema_version=manifest.SCHEMA_VERSION + 1))
    with pytest.raises(UserError, match=r"manifest.json has schema version 3, .* up to 2; upgrade shiq_jax"):
        Buffer.open(buffer.path)


def test_older_versions_are_migrated_step_by_step(make_record, make_buffer, monkeypatch):
    record = make_record(np.random.default_rng(0))
    buffer = make_buffer([record])
    current = manifest.SCHEMA_VERSION

    def age(content):
        content["schema_version"] = current - 2
        content["files"] = content.pop("shards")

    edit(buffer, age)
    with pytest.raises(UserError, match=f"version {current - 2}, from which there is no migration"):
        Buffer.open(buffer.path)
    seen = []

    def rename(content):
        seen.append(content["schema_version"])
        return {**{key: value for key, value in content.items() if key != "files"}, "shards": content["files"]}

    def keep(content):
        seen.append(content["schema_version"])
        return content

    monkeypatch.setattr(manifest, "MIGRATIONS", {current - 2: keep, current - 1: rename})
    opened = Buffer.open(buffer.path)
    assert opened.read([0]) == [record] and seen == [current - 2, current - 1]
    opened.append([record])
    assert json.loads((buffer.path / "manifest.json").read_text())["schema_version"] == current


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not readable as JSON"),
        ("[]", "is not the manifest of a replay buffer"),
        ('{"format": "other"}', "is not the manifest of a replay buffer"),
        ('{"format": "shiq_jax.replay", "schema_version": "one"}', "schema version 'one'"),
        ('{"format": "shiq_jax.replay", "schema_version": 1, "statistics": {}}', "'shards'"),
        ('{"format": "shiq_jax.replay", "schema_version": 1, "shards": [{"rows": 1}], "statistics": {}}', "'tokens'"),
        ('{"format": "shiq_jax.replay", "schema_version": 1, "shards": 3, "statistics": {}}', "garbles"),
        ('{"format": "shiq_jax.replay", "schema_version": 2, "shards": [{"rows": 1}], "statistics": {}}', "'tokens'"),
    ],
)
def test_unreadable_manifests_are_refused_by_name(tmp_path, content, words):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json") as caught:
        Buffer.open(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_without_manifest_is_no_buffer(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not a replay buffer, for it has no manifest.json"):
            Buffer.open(path)


def test_row_counts_that_disagree_are_refused_by_name(make_record, make_buffer):
    buffer = make_buffer([make_record(np.random.default_rng(1))])
    edit(buffer, lambda content: content["shards"][0].update(rows=2))
    with pytest.raises(UserError, match="records-00000.arrow holds 1 rows, but the manifest says 2"):
        Buffer.open(buffer.path).read([0])
