"""Loading and saving checkpoints: exact round trips, shardings, and rejection of files that contradict config.json."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig, Model, fingerprint, huggingface, load_hf, locate, save_hf
from shiq_jax.sharding import make_mesh


@pytest.fixture
def copy(llama, tmp_path):
    """`copy(variant) -> directory`: a writable copy of that model's checkpoint."""

    def make(variant: str = "untied"):
        return shutil.copytree(llama(variant)[1], tmp_path / "copy")

    return make


def rewrite(directory, change):
    """Apply `change` to the tensors of a checkpoint in a single file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("variant", ["untied", "tied", "biases", "odd heads"])
def test_round_trip_is_exact(variant, llama, tmp_path):
    reference, directory = llama(variant)
    model, params = load_hf(directory)
    save_hf(model, params, tmp_path / "out")
    saved, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(saved[name], expected[name], strict=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )
    reloaded_model, reloaded_params = load_hf(tmp_path / "out")
    assert reloaded_model == model and fingerprint(reloaded_params) == fingerprint(params)
    assert reloaded_model.generation_config == model.generation_config is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = reference.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_transformers_loads_a_new_model(random_params, tmp_path):
    model = Model.from_config(DecoderConfig(32, 16, 24, 2, 4, 2), dtype=jnp.bfloat16)
    params = random_params(model)
    save_hf(model, params, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == torch.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    tokens = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = reference.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(Model.from_config(model.config).logits(wide, jnp.asarray(tokens)), expected, atol=1e-4)
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "replica=2,fsdp=2,tensor=2"])
def test_load_shards_parameters(mesh, llama):
    directory = llama("biases")[1]
    model, params = load_hf(directory, mesh=make_mesh(mesh))

    def check(leaf, abstract):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)

    jax.tree.map(check, params, model.abstract_params())
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(load_hf(directory)[1]))


def test_sharded_checkpoints(llama, tmp_path, monkeypatch):
    reference, directory = llama("untied")
    model, params = load_hf(directory)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    save_hf(model, params, tmp_path / "saved")
    names = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all((tmp_path / "saved" / name).stat().st_size < 25_000 for name in names)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert fingerprint(load_hf(tmp_path / "saved")[1]) == fingerprint(params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))
    reference.save_pretrained(tmp_path / "transformers", max_shard_size="20KB")
    assert len(list((tmp_path / "transformers").glob("*.safetensors"))) > 2
    assert fingerprint(load_hf(tmp_path / "transformers", mesh=make_mesh())[1]) == fingerprint(params)


def test_index_decides_which_shard_holds_a_tensor(llama, tmp_path, monkeypatch):
    """A stale copy of a tensor in another shard is not read."""
    model, params = load_hf(llama("untied")[1])
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    save_hf(model, params, tmp_path)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name, file = next(iter(weight_map.items()))
    last = tmp_path / max(set(weight_map.values()) - {file})
    tensors = load_file(last)
    save_file(tensors | {name: 7 * load_file(tmp_path / file)[name]}, last)
    assert fingerprint(load_hf(tmp_path)[1]) == fingerprint(params)


def test_save_removes_weights_of_an_earlier_save(llama, tmp_path, monkeypatch):
    model, params = load_hf(llama("untied")[1])
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    save_hf(model, params, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.undo()
    zeros = jax.tree.map(jnp.zeros_like, params)
    save_hf(model, zeros, tmp_path)
    tmp_path.chmod(0o755)
    save_hf(model, zeros, tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*.safetensors")} == {0o644}
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert fingerprint(load_hf(tmp_path)[1]) == fingerprint(zeros)


def test_mixed_float_dtypes_are_loaded(copy):
    directory = copy()

    def mix_dtypes(tensors):
        for name in tensors:
            dtype = np.float16 if "mlp" in name else ml_dtypes.bfloat16 if "attn" in name else np.float32
            tensors[name] = np.round(tensors[name] * 8).astype(dtype) / dtype(8)

    rewrite(directory, mix_dtypes)
    expected = {
        name: np.asarray(tensor, np.float32) for name, tensor in load_file(directory / "model.safetensors").items()
    }
    _, params = load_hf(directory, mesh=make_mesh("fsdp=2,tensor=2"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    up, query = params["layers"]["mlp"]["up"]["kernel"], params["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(up[1], expected["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(query[2].reshape(32, 32), expected["model.layers.2.self_attn.q_proj.weight"].T)


def test_load_casts_to_dtype(llama):
    directory = llama("tied")[1]
    model, narrow = load_hf(directory, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), load_hf(directory)[1])
    chex.assert_trees_all_equal(narrow, expected)


def test_generation_config_round_trip(copy, tmp_path):
    directory = copy()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    model, params = load_hf(directory)
    assert model.generation_config == {"eos_token_id": [2, 7], "temperature": 0.6}
    save_hf(model, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == model.generation_config


def test_stored_tied_head_must_equal_the_embedding(copy):
    directory = copy("tied")
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load_hf(directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(directory)


def test_stored_rotary_frequencies_are_ignored(copy):
    directory = copy()
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert load_hf(directory)


EMBED, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
CORRUPTIONS = {
    "missing tensor": (lambda t: t.pop(UP), f"tensor {UP} is missing, and 0 more"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing.*tie_word_embeddings to true"),
    "wrong shape": (
        lambda t: t.update({EMBED: t[EMBED][:-1]}),
        rf"tensor {EMBED} has shape \(63, 32\), but config.json implies \(64, 32\)",
    ),
    "transposed": (
        lambda t: t.update({UP: t[UP].T.copy()}),
        rf"{UP} has shape \(32, 48\), but config.json implies \(48, 32\)",
    ),
    "extra layer": (
        lambda t: t.update({UP.replace("1", "3"): t[UP]}),
        "layers.3.mlp.up_proj.weight is not part of the model",
    ),
    "quantized": (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} has dtype I8; expected one of F64"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_mismatched_weights_raise(corruption, copy):
    directory = copy()
    change, message = CORRUPTIONS[corruption]
    rewrite(directory, change)
    with pytest.raises(UserError, match=message) as error:
        load_hf(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 300, 20_000])
def test_truncated_file_raises(size, copy):
    directory = copy()
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(UserError, match="model.safetensors: damaged or incomplete safetensors"):
        load_hf(directory)


def test_missing_files_raise(copy, tmp_path):
    directory = copy()
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        load_hf(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    with pytest.raises(UserError, match="part-1.safetensors: no such file"):
        load_hf(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: no such file"):
        load_hf(directory)
    with pytest.raises(UserError, match="nowhere: no such directory"):
        load_hf(tmp_path / "nowhere")


def test_failed_download_raises(monkeypatch):
    def unavailable(*_, **__):
        raise OSError("offline mode is enabled\ndetails")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unavailable)
    with pytest.raises(UserError, match=r"owner/model: neither a local directory nor .* \(offline mode is enabled\)"):
        locate("owner/model")


def test_hub_id_is_downloaded(monkeypatch, llama):
    directory = llama("untied")[1]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(directory))
    assert locate("owner/model") == directory


def test_save_rejects_parameters_of_another_model(llama, tmp_path):
    model, params = load_hf(llama("untied")[1])
    shallower = dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=2))
    with pytest.raises(ValueError, match="has shape .*but the model expects"):
        save_hf(shallower, params, tmp_path / "out")
    with pytest.raises(ValueError, match="embed.table is missing"):
        save_hf(model, {name: child for name, child in params.items() if name != "embed"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
