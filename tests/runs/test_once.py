"""A run hashes each data file once and loads the weights once."""

import json
from collections import Counter

import pytest

import train as train_command
from shiq_jax.runs import options, run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("flags", [(), ("--lora.rank", "2")], ids=["full", "lora"])
def test_files_are_hashed_and_weights_loaded_once(flags, tiny, tmp_path, monkeypatch):
    rows = [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": "or so"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "say 9"}\n')
    hashed, loaded = Counter(), Counter()
    digest, load = options._sha256, run.load_hf
    monkeypatch.setattr(options, "_sha256", lambda path: hashed.update([path.name]) or digest(path))
    monkeypatch.setattr(run, "load_hf", lambda source, **kwargs: loaded.update([str(source)]) or load(source, **kwargs))
    train_command.main([
        "dpo", "--model", tiny, "--data", str(tmp_path / "pairs.jsonl"), "--output-dir", str(tmp_path / "run"),
        "--evaluation.data", str(tmp_path / "held_out.jsonl"), "--evaluation.times", "2",
        "--evaluation.max-tokens", "2", "--mesh", "fsdp=1", "--batch-size", "4", "--epochs", "1", *flags,
    ])  # fmt: skip
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert stages.count("evaluation") == 3
    assert hashed == {"pairs.jsonl": 1, "held_out.jsonl": 1}
    assert loaded == {tiny: 1}
