"""Schema versions, migrations and validation of `manifest.json`."""

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


def test_newer_versions_are_rejected(make_buffer):
    buffer = make_buffer([])
    edit(buffer, lambda content: content.update(schema_version=manifest.SCHEMA_VERSION + 1))
    with pytest.raises(UserError, match=r"manifest.json has schema version 3, .* up to 2; upgrade shiq_jax"):
        Buffer.open(buffer.path)


def test_older_versions_are_migrated_one_version_at_a_time(make_record, make_buffer, monkeypatch):
    record = make_record(np.random.default_rng(0))
    buffer = make_buffer([record])
    current = manifest.SCHEMA_VERSION

    def downgrade(content):
        content["schema_version"] = current - 2
        content["files"] = content.pop("shards")

    edit(buffer, downgrade)
    with pytest.raises(UserError, match=f"version {current - 2}, which cannot be migrated"):
        Buffer.open(buffer.path)
    migrated = []

    def rename(content):
        migrated.append(content["schema_version"])
        return {**{key: value for key, value in content.items() if key != "files"}, "shards": content["files"]}

    def keep(content):
        migrated.append(content["schema_version"])
        return content

    monkeypatch.setattr(manifest, "MIGRATIONS", {current - 2: keep, current - 1: rename})
    opened = Buffer.open(buffer.path)
    assert opened.read([0]) == [record] and migrated == [current - 2, current - 1]
    opened.append([record])
    assert json.loads((buffer.path / "manifest.json").read_text())["schema_version"] == current


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "is not the manifest of a replay buffer"),
        ('{"format": "other"}', "is not the manifest of a replay buffer"),
        ('{"format": "shiq_jax.replay", "schema_version": "one"}', "schema version 'one'"),
        ('{"format": "shiq_jax.replay", "schema_version": 1, "statistics": {}}', "'shards'"),
        ('{"format": "shiq_jax.replay", "schema_version": 1, "shards": [{"rows": 1}], "statistics": {}}', "'tokens'"),
        (
            '{"format": "shiq_jax.replay", "schema_version": 1, "shards": 3, "statistics": {}}',
            "missing or invalid field",
        ),
        ('{"format": "shiq_jax.replay", "schema_version": 2, "shards": [{"rows": 1}], "statistics": {}}', "'tokens'"),
    ],
)
def test_invalid_manifests_are_rejected(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json") as error:
        Buffer.open(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_directory_without_manifest_is_rejected(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not a replay buffer: it has no manifest.json"):
            Buffer.open(path)


def test_wrong_row_counts_are_rejected(make_record, make_buffer):
    buffer = make_buffer([make_record(np.random.default_rng(1))])
    edit(buffer, lambda content: content["shards"][0].update(rows=2))
    with pytest.raises(UserError, match="records-00000.arrow has 1 rows, but the manifest expects 2"):
        Buffer.open(buffer.path).read([0])
