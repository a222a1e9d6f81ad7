"""Weights in and out: bit for bit, to the right devices, and never something else than what config.json describes."""

import dataclasses
import json
import shutil

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
    """`copy(variant)`: a directory of our own with that model."""

    def make(variant: str = "untied"):
        return shutil.copytree(llama(variant)[1], tmp_path / "copy")

    return make


def rewrite(directory, change):
    """Applies `change` to the tensors of a directory with a single file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("variant", ["untied", "tied", "biases", "odd heads"])
def test_round_trip_is_exact(variant, llama, tmp_path):
    theirs, directory = llama(variant)
    model, params = load_hf(directory)
    save_hf(model, params, tmp_path / "out")
    ours, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], strict=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )
    again, same = load_hf(tmp_path / "out")
    assert again == model and fingerprint(same) == fingerprint(params)
    assert again.generation_config == model.generation_config is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = theirs.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_of_our_own_is_loaded_by_transformers(draw, tmp_path):
    model = Model.from_config(DecoderConfig(32, 16, 24, 2, 4, 2), dtype=jnp.bfloat16)
    params = draw(model)
    save_hf(model, params, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    tokens = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(Model.from_config(model.config).logits(wide, jnp.asarray(tokens)), expected, atol=1e-4)
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "replica=2,fsdp=2,tensor=2"])
def test_parameters_arrive_in_their_shardings(mesh, llama):
    directory = llama("biases")[1]
    model, params = load_hf(directory, mesh=make_mesh(mesh))

    def check(leaf, abstract):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)

    jax.tree.map(check, params, model.abstract_params())
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(directory)[1])


def test_numbered_shards_with_an_index(llama, tmp_path, monkeypatch):
    theirs, directory = llama("untied")
    model, params = load_hf(directory)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    save_hf(model, params, tmp_path / "ours")
    names = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all((tmp_path / "ours" / name).stat().st_size < 25_000 for name in names)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert fingerprint(load_hf(tmp_path / "ours")[1]) == fingerprint(params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert fingerprint(load_hf(tmp_path / "theirs", mesh=make_mesh())[1]) == fingerprint(params)


def test_a_second_export_leaves_nothing_of_the_first(llama, tmp_path, monkeypatch):
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
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert fingerprint(load_hf(tmp_path)[1]) == fingerprint(zeros)


def test_each_tensor_may_have_its_own_float_type(copy):
    directory = copy()

    def halve(tensors):
        for name in tensors:
            kind = np.float16 if "mlp" in name else ml_dtypes.bfloat16 if "attn" in name else np.float32
            tensors[name] = np.round(tensors[name] * 8).astype(kind) / kind(8)

    rewrite(directory, halve)
    expected = {
        name: np.asarray(tensor, np.float32) for name, tensor in load_file(directory / "model.safetensors").items()
    }
    _, params = load_hf(directory, mesh=make_mesh("fsdp=2,tensor=2"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    up, query = params["layers"]["mlp"]["up"]["kernel"], params["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(up[1], expected["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(query[2].reshape(32, 32), expected["model.layers.2.self_attn.q_proj.weight"].T)


def test_a_cast_while_loading_is_the_cast_afterwards(llama):
    directory = llama("tied")[1]
    model, narrow = load_hf(directory, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    wide = load_hf(directory)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), narrow, wide)


def test_the_generation_config_travels(copy, tmp_path):
    directory = copy()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}))
    model, params = load_hf(directory)
    assert model.generation_config == {"eos_token_id": [2, 7], "temperature": 0.6}
    save_hf(model, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == model.generation_config


def test_a_stored_copy_of_a_tied_head_is_checked(copy):
    directory = copy("tied")
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load_hf(directory)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(directory)


def test_rotary_constants_of_old_exports_are_ignored(copy):
    directory = copy()
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert load_hf(directory)


EMBED, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing": (lambda t: t.pop(UP), f"tensor {UP} is missing, and 0 more"),
    "untied": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing.*tie_word_embeddings true"),
    "shape": (
        lambda t: t.update({EMBED: t[EMBED][:-1]}),
        rf"tensor {EMBED} has shape \(63, 32\), config.json says \(64, 32\)",
    ),
    "transposed": (
        lambda t: t.update({UP: t[UP].T.copy()}),
        rf"{UP} has shape \(32, 48\), config.json says \(48, 32\)",
    ),
    "deeper": (
        lambda t: t.update({UP.replace("1", "3"): t[UP]}),
        "layers.3.mlp.up_proj.weight is not part of the model",
    ),
    "quantised": (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} holds I8; expected one of F64"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(damage, copy):
    directory = copy()
    change, words = DAMAGES[damage]
    rewrite(directory, change)
    with pytest.raises(UserError, match=words) as caught:
        load_hf(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 300, 20_000])
def test_a_truncated_file_is_refused(size, copy):
    directory = copy()
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(UserError, match="model.safetensors: damaged or incomplete safetensors"):
        load_hf(directory)


def test_missing_files_are_refused(copy, tmp_path):
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


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch):
    def unavailable(*_, **__):
        raise OSError("offline mode is enabled\nlong story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unavailable)
    with pytest.raises(UserError, match=r"owner/model: neither a local directory nor .* \(offline mode is enabled\)"):
        locate("owner/model")


def test_a_hub_id_is_downloaded(monkeypatch, llama):
    directory = llama("untied")[1]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(directory))
    assert locate("owner/model") == directory


def test_parameters_of_another_model_are_not_saved(llama, tmp_path):
    model, params = load_hf(llama("untied")[1])
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, num_layers=2))
    with pytest.raises(ValueError, match="has shape .*the model's is"):
        save_hf(other, params, tmp_path / "out")
    with pytest.raises(ValueError, match="embed.table has shape none: it is missing"):
        save_hf(model, {name: child for name, child in params.items() if name != "embed"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
