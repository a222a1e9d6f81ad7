"""Fetching: complete or absent, once, and one sentence when the package index is out of reach."""

import re
import subprocess
import sys
import threading
import zipfile

import pytest

from shiq_jax import progress
from shiq_jax.errors import UserError
from shiq_jax.tasks import fetch


@pytest.fixture
def pip(monkeypatch):
    """A stand-in for the pip process: it writes a wheel, or fails with the given complaint."""

    class Pip:
        calls = 0
        complaint = ""

        def run(self, command, **_):
            self.calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
            if self.complaint:
                return subprocess.CompletedProcess(command, 1, "", self.complaint)
            directory = fetch.Path(command[command.index("--dest") + 1])
            directory.mkdir(parents=True)
            with zipfile.ZipFile(directory / "bfcl_eval-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("bfcl_eval/data/questions.json", "{}")
            return subprocess.CompletedProcess(command, 0, "", "")

    stand_in = Pip()
    monkeypatch.setattr(fetch.subprocess, "run", stand_in.run)
    return stand_in


def test_a_package_is_unpacked_once(pip, tmp_path):
    first = fetch.bfcl(tmp_path)
    assert (first / "bfcl_eval" / "data" / "questions.json").read_text() == "{}"
    assert fetch.bfcl(tmp_path) == first and pip.calls == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]


def test_a_download_says_how_fast_it_is(tmp_path, monkeypatch, capsys):
    """A process that writes three megabytes where pip would, in a second each."""
    program = (
        "import os, pathlib, time\n"
        "file = (pathlib.Path(os.environ['TMPDIR']) / 'part').open('wb', buffering=0)\n"
        "for _ in range(3): file.write(bytes(10**6)); time.sleep(1)\n"
    )
    run = subprocess.run
    monkeypatch.setattr(fetch.subprocess, "run", lambda _, **options: run([sys.executable, "-c", program], **options))
    with progress.display(), pytest.raises(UserError, match="could not download package==1"):
        fetch._fetch("name", "package==1", "4 MB", lambda *_: None, tmp_path)
    said = re.search(r"downloading package==1: 3/4 MB \(75%\), ([\d.]+) MB/s", capsys.readouterr().err)
    assert 0.4 < float(said[1]) < 1.5


def test_a_failed_download_leaves_nothing_and_says_why(pip, tmp_path):
    pip.complaint = "WARNING: retrying\nERROR: No matching distribution found for bfcl-eval\n"
    with pytest.raises(UserError, match="No matching distribution found for bfcl-eval.*check the network"):
        fetch.bfcl(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(pip, tmp_path):
    def fail(unpacked, directory):
        (directory / "half").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fetch._fetch("name", "package==1", "1 MB", fail, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whoever_finishes_first_wins(pip, tmp_path):
    def slow(unpacked, directory):
        (directory / "mine").write_text("")
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "theirs").write_text("")

    assert [entry.name for entry in fetch._fetch("name", "package==1", "1 MB", slow, tmp_path).iterdir()] == ["theirs"]


def test_what_a_killed_fetch_left_is_cleared_away(pip, tmp_path):
    name = fetch.BFCL_PACKAGE.replace("==", "-")
    for left in (f".{name}-k1ll3d/unpacked", ".another-w0rking"):
        (tmp_path / left).mkdir(parents=True)
    (tmp_path / f".{name}-k1ll3d" / "wheel").write_text("half")
    (tmp_path / f".{name}.lock").touch()
    fetch.bfcl(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".another-w0rking", name]


def test_a_second_fetch_waits_for_the_first_and_takes_what_it_made(pip, tmp_path):
    """Its workspace is not what a killed process left."""
    started, waiting, found = threading.Event(), threading.Event(), []

    def slow(unpacked, directory):
        (directory / "mine").write_text("")
        started.set()
        assert waiting.wait(30)
        assert unpacked.is_dir()

    def second():
        found.append(fetch._fetch("name", "package==1", "1 MB", lambda *_: None, tmp_path))

    def say(line):
        if "waiting for another process" in line:
            waiting.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_say", say)
        first = threading.Thread(target=fetch._fetch, args=("name", "package==1", "1 MB", slow, tmp_path))
        first.start()
        assert started.wait(30)
        other = threading.Thread(target=second)
        other.start()
        first.join()
        other.join()
    assert [entry.name for entry in found[0].iterdir()] == ["mine"] and pip.calls == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["name"]


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SHIQ_JAX_CACHE", str(tmp_path))
    assert fetch.cache_directory() == tmp_path
    assert fetch.cache_directory(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("SHIQ_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch.cache_directory() == tmp_path / "home" / ".cache" / "shiq_jax"


def test_a_cache_that_cannot_be_written_is_refused(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="SHIQ_JAX_CACHE"):
        fetch.bfcl(tmp_path / "file")


@pytest.mark.slow
def test_smollm2_speaks_and_stops():
    """The fetched weights answer a question, in the real tokenizer's chat form, and end with the named stop token."""
    import torch
    from transformers import AutoModelForCausalLM

    from shiq_jax.data.chat import encode_completion, encode_prompt, load_tokenizer, stop_tokens

    directory = fetch.smollm2()
    tokenizer = load_tokenizer(directory)
    assert stop_tokens(tokenizer, directory) == (2,)
    assert tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = encode_prompt(tokenizer, question)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
    answer = tokenizer.decode(output[len(prompt) : -1])
    assert answer == "The capital of France is Paris." and output[-1] == 2
    assert encode_completion(tokenizer, question, answer).tokens.tolist() == output
    # Digits are single tokens, and the spaces before them belong together.
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
