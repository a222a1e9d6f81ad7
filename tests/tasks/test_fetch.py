"""Fetching packages: atomicity, locking, progress and errors."""

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
    """A fake pip process that writes a wheel, or fails with `stderr`."""

    class FakePip:
        calls = 0
        stderr = ""

        def run(self, command, **_):
            self.calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
            if self.stderr:
                return subprocess.CompletedProcess(command, 1, "", self.stderr)
            directory = fetch.Path(command[command.index("--dest") + 1])
            directory.mkdir(parents=True)
            with zipfile.ZipFile(directory / "bfcl_eval-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("bfcl_eval/data/questions.json", "{}")
            return subprocess.CompletedProcess(command, 0, "", "")

    fake_pip = FakePip()
    monkeypatch.setattr(fetch.subprocess, "run", fake_pip.run)
    return fake_pip


def test_package_is_downloaded_once(pip, tmp_path):
    first = fetch.bfcl(tmp_path)
    assert (first / "bfcl_eval" / "data" / "questions.json").read_text() == "{}"
    assert fetch.bfcl(tmp_path) == first and pip.calls == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [first.name]


def test_download_shows_progress(tmp_path, monkeypatch, capsys):
    """The fake process writes three megabytes to pip's temporary directory, one per second."""
    program = (
        "import os, pathlib, time\n"
        "file = (pathlib.Path(os.environ['TMPDIR']) / 'part').open('wb', buffering=0)\n"
        "for _ in range(3): file.write(bytes(10**6)); time.sleep(1)\n"
    )
    run = subprocess.run
    monkeypatch.setattr(fetch.subprocess, "run", lambda _, **options: run([sys.executable, "-c", program], **options))
    with progress.display(), pytest.raises(UserError, match="could not download package==1"):
        fetch._fetch("name", "package==1", "4 MB", lambda *_: None, tmp_path)
    match = re.search(r"downloading package==1: 3/4 MB \(75%\), ([\d.]+) MB/s", capsys.readouterr().err)
    assert 0.4 < float(match[1]) < 1.5


def test_failed_download_leaves_no_files(pip, tmp_path):
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for bfcl-eval\n"
    with pytest.raises(UserError, match="No matching distribution found for bfcl-eval.*check the network"):
        fetch.bfcl(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_conversion_leaves_no_files(pip, tmp_path):
    def fail(unpacked, directory):
        (directory / "partial").write_text("")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fetch._fetch("name", "package==1", "1 MB", fail, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_of_a_faster_process_is_kept(pip, tmp_path):
    def build(unpacked, directory):
        (directory / "second").write_text("")
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "first").write_text("")

    assert [entry.name for entry in fetch._fetch("name", "package==1", "1 MB", build, tmp_path).iterdir()] == ["first"]


def test_files_of_a_killed_fetch_are_removed(pip, tmp_path):
    name = fetch.BFCL_PACKAGE.replace("==", "-")
    for leftover in (f".{name}-k1ll3d/unpacked", ".another-w0rking"):
        (tmp_path / leftover).mkdir(parents=True)
    (tmp_path / f".{name}-k1ll3d" / "wheel").write_text("partial")
    (tmp_path / f".{name}.lock").touch()
    fetch.bfcl(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".another-w0rking", name]


def test_concurrent_fetch_waits_and_uses_the_result(pip, tmp_path):
    """The waiting process must not remove the temporary directory of the running one."""
    started, waiting, results = threading.Event(), threading.Event(), []

    def slow_build(unpacked, directory):
        (directory / "first").write_text("")
        started.set()
        assert waiting.wait(30)
        assert unpacked.is_dir()

    def fetch_concurrently():
        results.append(fetch._fetch("name", "package==1", "1 MB", lambda *_: None, tmp_path))

    def log(message):
        if "waiting for another process" in message:
            waiting.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_log", log)
        first = threading.Thread(target=fetch._fetch, args=("name", "package==1", "1 MB", slow_build, tmp_path))
        first.start()
        assert started.wait(30)
        second = threading.Thread(target=fetch_concurrently)
        second.start()
        first.join()
        second.join()
    assert [entry.name for entry in results[0].iterdir()] == ["first"] and pip.calls == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["name"]


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("SHIQ_JAX_CACHE", str(tmp_path))
    assert fetch.cache_directory() == tmp_path
    assert fetch.cache_directory(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("SHIQ_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetch.cache_directory() == tmp_path / "home" / ".cache" / "shiq_jax"


def test_unwritable_cache_is_rejected(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="SHIQ_JAX_CACHE"):
        fetch.bfcl(tmp_path / "file")


@pytest.mark.slow
def test_smollm2_answers_a_question():
    """The fetched model answers a question in its chat template and ends with its stop token."""
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
    # Each digit is a token, and consecutive spaces form one token.
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
