"""Generate `trl_preferences.json`: preference losses of TRL's trainers and their gradients to token log-probabilities.

    python tests/goldens/make_trl_preferences.py

Run it in a separate environment with trl==1.16.0, transformers==5.23.0 and torch==2.13.0; the tests only read the file.
The trainers' own methods compute the losses in float64 on a stub model that returns fixed log-probabilities. "sigmoid"
with label smoothing is missing because TRL 1.16 ignores the option; see `make_trl_dpo.py`.
"""

import collections
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl

warnings.filterwarnings("ignore")
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

HERE = Path(__file__).parent
CHOSEN, REJECTED = (5, 1, 4, 6, 3), (2, 6, 4, 3, 5)
# Row length; each row is one prompt token, the actions and padding.
LENGTH = 7

DPO = {
    "sigmoid": {},
    "sigmoid, forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid, js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid, alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
    "sigmoid, ld_alpha": {"ld_alpha": 0.4},
    "sigmoid, use_weighting": {"use_weighting": True},
    "sigmoid_norm": {},
    "robust": {"label_smoothing": 0.15},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.15},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.15},
    "aot_unpaired": {"label_smoothing": 0.15},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
}


def random_logps(*shape: int) -> torch.Tensor:
    """Random numbers in the range of token log-probabilities."""
    return -torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * 2 - 0.05


GENERATOR = torch.Generator().manual_seed(0)
PAIRS = len(CHOSEN)
MASK = torch.tensor([[0] + [1] * length + [0] * (LENGTH - 1 - length) for length in (*CHOSEN, *REJECTED)])
ACTIONS = MASK[:, 1:]
POLICY, REFERENCE = random_logps(2 * PAIRS, LENGTH - 1), random_logps(2 * PAIRS, LENGTH - 1)
# Logarithms of sums of squared probabilities.
COLLISION = random_logps(2 * PAIRS, LENGTH - 1) / 4


class StubModel(torch.nn.Module):
    """Model that returns fixed log-probabilities."""

    def __init__(self, logps: torch.Tensor):
        super().__init__()
        self.logps = torch.nn.Parameter(logps.clone())

    def forward(self, **_):
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps * ACTIONS, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
            log_sum_sq_probs=COLLISION,
        )  # fmt: skip


def stub_trainer(model: torch.nn.Module, **attributes) -> SimpleNamespace:
    """Stand-in for `self` with the attributes that the trainers' methods read."""
    identity = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=identity, gather_for_metrics=identity)
    return SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=True, beta=0.5,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        **attributes,
    )  # fmt: skip


def dpo(name: str, options: dict) -> tuple[torch.Tensor, torch.nn.Module]:
    """DPOTrainer's loss on all pairs."""
    settings = {
        "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None,
        "use_weighting": False, "discopop_tau": 0.05,
    } | options  # fmt: skip
    # TRL defines no bound on exponents for float64.
    precision = torch.float32 if settings["f_divergence_type"] == "alpha_divergence" else torch.float64
    model = StubModel(POLICY.to(precision))
    reference = REFERENCE.to(precision) * ACTIONS
    if settings["ld_alpha"] is not None:
        shared = torch.minimum(*ACTIONS.sum(1).chunk(2)).repeat(2)[:, None]
        reference = reference * torch.where(ACTIONS.cumsum(1) <= shared, 1, settings["ld_alpha"])
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(MASK), "attention_mask": torch.ones_like(MASK), "completion_mask": MASK,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    self = stub_trainer(
        model, loss_types=[name.split(",")[0]], loss_weights=[1.0], args=SimpleNamespace(**settings), **settings
    )
    return trl.DPOTrainer._compute_loss(self, model, inputs, False), model


def kto(loss_type: str) -> tuple[torch.Tensor, torch.nn.Module, dict]:
    """KTOTrainer's loss and metrics on all completions, with the chosen ones labeled desirable and fixed KL terms."""
    model = StubModel(POLICY)
    batch = {
        "input_ids": torch.zeros_like(MASK), "attention_mask": torch.ones_like(MASK), "completion_mask": MASK,
        "label": torch.tensor([True] * PAIRS + [False] * PAIRS), "ref_logps": (REFERENCE * ACTIONS).sum(1),
        "ref_KL_logps": torch.zeros(PAIRS, dtype=torch.float64),
    }  # fmt: skip
    self = stub_trainer(
        model, loss_type=loss_type, calculate_KL=loss_type == "kto", desirable_weight=1.3, undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: KL,
    )  # fmt: skip
    loss = trl.KTOTrainer._compute_loss(self, model, batch, False)
    (metrics,) = self._metrics.values()
    return loss, model, {name: metrics[name] for name in KTO_METRICS}


KTO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
KL = torch.linspace(-0.2, 0.8, PAIRS, dtype=torch.float64)


def reference_free(kind: str) -> tuple[torch.Tensor, torch.nn.Module]:
    """CPOTrainer's or ORPOTrainer's preference loss without the supervised term."""
    model = StubModel(POLICY)
    sums = (model.logps * ACTIONS).sum(1)
    averages = sums / ACTIONS.sum(1)
    if kind == "orpo":
        # The method casts to float32.
        losses, *_ = ORPOTrainer.odds_ratio_loss(stub_trainer(model), *averages.chunk(2))
        return -losses.mean(), model
    self = stub_trainer(
        model, loss_type=kind, alpha=0.0, simpo_gamma=0.3, label_smoothing=0.0 if kind == "simpo" else 0.15
    )
    losses, *_ = CPOTrainer.cpo_loss(self, *(averages if kind == "simpo" else sums).chunk(2))
    return losses.mean(), model


def to_json(options: dict, loss: torch.Tensor, model: torch.nn.Module, metrics: dict | None = None) -> dict:
    """Options, loss, gradient and, if there are any, metrics as JSON values."""
    loss.backward()
    variant = {"options": options, "loss": loss.item(), "gradient": model.logps.grad.tolist()}
    if metrics is not None:
        variant["metrics"] = {name: values[-1] for name, values in metrics.items()}
    return variant


def main() -> None:
    """Write the file."""
    variants = {name: to_json(options, *dpo(name, options)) for name, options in DPO.items()}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    variants |= {name: to_json(weights, *kto(name)) for name in ("kto", "apo_zero_unpaired")}
    variants["cpo"] = to_json({"label_smoothing": 0.15}, *reference_free("sigmoid"))
    variants["simpo"] = to_json({"simpo_gamma": 0.3}, *reference_free("simpo"))
    variants["orpo"] = to_json({}, *reference_free("orpo"))
    content = {
        "made with": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "beta": 0.5, "mask": ACTIONS.tolist(), "policy": POLICY.tolist(), "reference": REFERENCE.tolist(),
        "collision": COLLISION.tolist(), "kl": KL.tolist(), "variants": variants,
    }  # fmt: skip
    (HERE / "trl_preferences.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(json.dumps({name: variant["loss"] for name, variant in variants.items()}, indent=1))


if __name__ == "__main__":
    main()
