"""DPO loss and gradient of the update step against TRL's trainer.

TRL's values are stored in `tests/goldens/trl_dpo.*`, written by `tests/goldens/make_trl_dpo.py`.
"""

import json
from pathlib import Path

import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from shiq_jax.models import load_hf, save_hf
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, Record
from shiq_jax.training.annotation import annotate, reference_identity
from shiq_jax.training.batches import Batches
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

GOLDENS = Path(__file__).parent.parent / "goldens"
GOLDEN = json.loads((GOLDENS / "trl_dpo.json").read_text(encoding="utf-8"))
LOSS, GRADIENT = 1e-6, 1e-5  # relative tolerances; measured errors are 2.9e-7 and 4.0e-6


@pytest.fixture(scope="module")
def tensors():
    """`tensors(group)`: TRL's tensors of a group, by their checkpoint names."""
    stored = load_file(GOLDENS / "trl_dpo.safetensors")

    def get(group):
        return {name.removeprefix(f"{group}/"): value for name, value in stored.items() if name.startswith(group)}

    return get


@pytest.fixture(scope="module")
def models(tensors, tmp_path_factory):
    """(model, parameters) of the policy and of the reference, loaded from Hugging Face directories."""

    def load(role):
        directory = tmp_path_factory.mktemp(role)
        (directory / "config.json").write_text(json.dumps(GOLDEN["config"]))
        save_file(tensors(role), directory / "model.safetensors")
        return load_hf(directory)

    return {role: load(role) for role in ("policy", "reference")}


@pytest.fixture(scope="module")
def batch(models, tmp_path_factory):
    """All pairs in one packed batch, with reference statistics."""
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    records = []
    for pair_index, pair in enumerate(GOLDEN["pairs"]):
        prompt = pair["prompt_ids"]
        for answer, reward in ((pair["chosen_ids"], 1.0), (pair["rejected_ids"], 0.0)):
            mask = [False] * len(prompt) + [True] * len(answer)
            rewards = [0.0] * (len(answer) - 1) + [reward]
            records.append(Record(tokens=prompt + answer, action_mask=mask, rewards=rewards, group=str(pair_index)))
    buffer.append(records)
    identity = reference_identity(*models["reference"])
    annotate(*models["reference"], buffer, identity)
    references = {"reference": buffer.statistics(identity)}
    batch = Batches(buffer, "pair", len(GOLDEN["pairs"]), seed=0, references=references)(0)
    assert (batch.batch.real.sum(), batch.fill < 1) == (len(GOLDEN["pairs"]), True)
    return batch.batch


@pytest.mark.parametrize("variant", GOLDEN["variants"])
def test_loss_and_gradient_match_trl(variant, models, batch, tensors, tmp_path):
    options = dict(GOLDEN["variants"][variant])
    expected_loss, expected = options.pop("loss"), tensors(f"gradient/{variant}")
    model, params = models["policy"]
    optimizer = optax.sgd(1.0, momentum=0.0)  # with momentum 0 the trace equals the gradient
    update = make_update(model, OBJECTIVES["dpo"].configure(**options), optimizer, donate=False)
    state, metrics = update(init_state(model, params, optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=LOSS, atol=0)
    # Saving the gradient as a checkpoint converts it to TRL's names and layouts.
    save_hf(model, optax.tree.get(state.opt_state, "trace"), tmp_path)
    gradient = load_file(tmp_path / "model.safetensors")
    assert gradient.keys() == expected.keys()
    errors = {
        name: np.linalg.norm(gradient[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected
    }
    assert max(errors.values()) < GRADIENT, errors


def test_variants_differ(tensors):
    """The stored values depend on beta and label smoothing."""
    losses = [options["loss"] for options in GOLDEN["variants"].values()]
    assert min(np.diff(sorted(losses))) > 0.1
    first, *others = (tensors(f"gradient/{variant}")["lm_head.weight"] for variant in GOLDEN["variants"])
    assert all(np.linalg.norm(first - other) > 0.1 * np.linalg.norm(first) for other in others)
