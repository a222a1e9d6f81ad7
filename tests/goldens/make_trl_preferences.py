"""Writes what TRL's trainers say of log-probabilities that they are given: `trl_preferences.json` beside this script.

    python tests/goldens/make_trl_preferences.py

wants trl==1.16.0, transformers==5.23.0 and torch==2.13.0, in an environment of its own; the tests read the file and
need none of them. The trainers' own methods compute losses and gradients, in float64; a stand-in for a model hands them
log-probabilities per token, and the gradient is taken to these. Not asked for: "sigmoid" with label smoothing, which
TRL of today ignores (`make_trl_dpo.py` has it another way).
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
LENGTH = 7  # of a row; a token before the actions and, in most rows, padding after them

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


def random(*shape: int) -> torch.Tensor:
    """Numbers like the log-probabilities of tokens."""
    return -torch.rand(shape, generator=GENERATOR, dtype=torch.float64) * 2 - 0.05


GENERATOR = torch.Generator().manual_seed(0)
PAIRS = len(CHOSEN)
MASK = torch.tensor([[0] + [1] * length + [0] * (LENGTH - 1 - length) for length in (*CHOSEN, *REJECTED)])
ACTIONS = MASK[:, 1:]
POLICY, REFERENCE = random(2 * PAIRS, LENGTH - 1), random(2 * PAIRS, LENGTH - 1)
# log of a sum of squared probabilities: above twice the largest, below 0.
COLLISION = random(2 * PAIRS, LENGTH - 1) / 4


class Given(torch.nn.Module):
    """Stands in for a model: its output is what it was given."""

    def __init__(self, logps: torch.Tensor):
        super().__init__()
        self.logps = torch.nn.Parameter(logps.clone())

    def forward(self, **_):
        nothing = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps * ACTIONS, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(),
            log_sum_sq_probs=COLLISION,
        )  # fmt: skip


def trainer(model: torch.nn.Module, **more) -> SimpleNamespace:
    """What a trainer's methods read of `self`."""
    alone = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)
    return SimpleNamespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=True, beta=0.5,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        **more,
    )  # fmt: skip


def dpo(name: str, options: dict) -> tuple[torch.Tensor, torch.nn.Module]:
    """DPOTrainer's loss of the pairs."""
    settings = {
        "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "ld_alpha": None,
        "use_weighting": False, "discopop_tau": 0.05,
    } | options  # fmt: skip
    # TRL has no bound for exponents of float64.
    precision = torch.float32 if settings["f_divergence_type"] == "alpha_divergence" else torch.float64
    model = Given(POLICY.to(precision))
    reference = REFERENCE.to(precision) * ACTIONS
    if settings["ld_alpha"] is not None:
        shared = torch.minimum(*ACTIONS.sum(1).chunk(2)).repeat(2)[:, None]
        reference = reference * torch.where(ACTIONS.cumsum(1) <= shared, 1, settings["ld_alpha"])
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(MASK), "attention_mask": torch.ones_like(MASK), "completion_mask": MASK,
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    self = trainer(
        model, loss_types=[name.split(",")[0]], loss_weights=[1.0], args=SimpleNamespace(**settings), **settings
    )
    return trl.DPOTrainer._compute_loss(self, model, inputs, False), model


def kto(loss_type: str) -> tuple[torch.Tensor, torch.nn.Module, dict]:
    """KTOTrainer's loss of all completions, the chosen ones desirable; the other half's log-ratios make the KL."""
    model = Given(POLICY)
    batch = {
        "input_ids": torch.zeros_like(MASK), "attention_mask": torch.ones_like(MASK), "completion_mask": MASK,
        "label": torch.tensor([True] * PAIRS + [False] * PAIRS), "ref_logps": (REFERENCE * ACTIONS).sum(1),
        "ref_KL_logps": torch.zeros(PAIRS, dtype=torch.float64),
    }  # fmt: skip
    self = trainer(
        model, loss_type=loss_type, calculate_KL=loss_type == "kto", desirable_weight=1.3, undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: KL,
    )  # fmt: skip
    loss = trl.KTOTrainer._compute_loss(self, model, batch, False)
    (metrics,) = self._metrics.values()
    return loss, model, {name: metrics[name] for name in KTO_METRICS}


KTO_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
KL = torch.linspace(-0.2, 0.8, PAIRS, dtype=torch.float64)


def reference_free(kind: str) -> tuple[torch.Tensor, torch.nn.Module]:
    """CPOTrainer's and ORPOTrainer's contrast, without their supervised term."""
    model = Given(POLICY)
    sums = (model.logps * ACTIONS).sum(1)
    averages = sums / ACTIONS.sum(1)
    if kind == "orpo":
        # In float32, which the method insists on.
        losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(model), *averages.chunk(2))
        return -losses.mean(), model
    self = trainer(model, loss_type=kind, alpha=0.0, simpo_gamma=0.3, label_smoothing=0.0 if kind == "simpo" else 0.15)
    losses, *_ = CPOTrainer.cpo_loss(self, *(averages if kind == "simpo" else sums).chunk(2))
    return losses.mean(), model


def entry(options: dict, found: tuple[torch.Tensor, torch.nn.Module, dict]) -> dict:
    """Loss, gradient and metrics, if they were asked for, as JSON values."""
    loss, model, *metrics = found
    loss.backward()
    more = {"metrics": {name: values[-1] for name, values in metrics[0].items()}} if metrics else {}
    return {"options": options, "loss": loss.item(), "gradient": model.logps.grad.tolist()} | more


def main() -> None:
    """Writes the file."""
    variants = {name: entry(options, dpo(name, options)) for name, options in DPO.items()}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    variants |= {name: entry(weights, kto(name)) for name in ("kto", "apo_zero_unpaired")}
    variants["cpo"] = entry({"label_smoothing": 0.15}, reference_free("sigmoid"))
    variants["simpo"] = entry({"simpo_gamma": 0.3}, reference_free("simpo"))
    variants["orpo"] = entry({}, reference_free("orpo"))
    content = {
        "made with": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "beta": 0.5, "mask": ACTIONS.tolist(), "policy": POLICY.tolist(), "reference": REFERENCE.tolist(),
        "collision": COLLISION.tolist(), "kl": KL.tolist(), "variants": variants,
    }  # fmt: skip
    (HERE / "trl_preferences.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(json.dumps({name: each["loss"] for name, each in variants.items()}, indent=1))


if __name__ == "__main__":
    main()
