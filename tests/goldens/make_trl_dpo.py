"""Generate `trl_dpo.json` and `trl_dpo.safetensors`: DPO losses and gradients of TRL's DPOTrainer on a small batch.

    python tests/goldens/make_trl_dpo.py

Run it in a separate environment with trl==1.16.0, transformers==5.23.0 and torch==2.13.0; the tests only read the two
files. Policy and reference are random Llamas. Losses and gradients come from the trainer's `compute_loss` on a batch of
its own collator. The float32 weights are promoted to float64 (transformers and TRL cast some operations to
float32), so that differences are rounding errors of shiq_jax.

TRL 1.16 ignores `label_smoothing` for the loss "sigmoid". Its "aot_unpaired" equals the smoothed DPO loss on a batch of
one pair, where sorting has no effect. The smoothed variant therefore averages loss and gradient over single pairs.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

HERE = Path(__file__).parent
VARIANTS = {
    "beta 0.1": {"beta": 0.1, "label_smoothing": 0.0},
    "beta 0.7": {"beta": 0.7, "label_smoothing": 0.0},
    "smoothed": {"beta": 0.4, "label_smoothing": 0.15},
}
# Lengths of (prompt, chosen, rejected); two pairs share a prompt.
LENGTHS = [(3, 5, 2), (7, 1, 9), (1, 4, 4), (7, 6, 3), (12, 8, 10)]
VOCABULARY = 40


def make_pairs() -> list[dict[str, list[int]]]:
    """Random token ids of every pair."""
    generator = torch.Generator().manual_seed(0)
    random_ids = lambda length: torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()  # noqa: E731
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [dict(zip(names, map(random_ids, lengths), strict=True)) for lengths in LENGTHS]
    pairs[3]["prompt_ids"] = pairs[1]["prompt_ids"]
    return pairs


def make_model(seed: int) -> transformers.LlamaForCausalLM:
    """A random Llama with nonzero biases and non-unit norm scales."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def make_trainer(directory: str, **options) -> trl.DPOTrainer:
    """A DPOTrainer, used only for its loss and collator."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0")),
        pad_token="0",
        eos_token="1",
    )
    config = trl.DPOConfig(
        output_dir=directory, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **options
    )
    placeholder = Dataset.from_list([{"prompt": "2 ", "chosen": "3", "rejected": "4"}])
    return trl.DPOTrainer(
        model=make_model(1).double(),
        ref_model=make_model(2).double(),
        args=config,
        train_dataset=placeholder,
        processing_class=tokenizer,
    )


def measure(beta: float, label_smoothing: float) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's loss on all pairs and its gradient."""
    pairs = make_pairs()
    batches = [[pair] for pair in pairs] if label_smoothing else [pairs]
    loss_type = "aot_unpaired" if label_smoothing else "sigmoid"
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(directory, beta=beta, label_smoothing=label_smoothing, loss_type=[loss_type])
        trainer.model.train()
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch)) / len(batches)
            loss.backward()
            total += loss.item()
        gradient = {name: parameter.grad.float() for name, parameter in trainer.model.named_parameters()}
    return total, gradient


def main() -> None:
    """Write both files."""
    tensors = {
        f"{role}/{name}": tensor.clone()
        for role, seed in (("policy", 1), ("reference", 2))
        for name, tensor in make_model(seed).state_dict().items()
    }
    losses = {}
    for variant, options in VARIANTS.items():
        losses[variant], gradient = measure(**options)
        tensors |= {f"gradient/{variant}/{name}": tensor for name, tensor in gradient.items()}
    content = {
        "made with": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
        "config": make_model(1).config.to_dict(),
        "pairs": make_pairs(),
        "variants": {variant: options | {"loss": losses[variant]} for variant, options in VARIANTS.items()},
    }
    (HERE / "trl_dpo.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, HERE / "trl_dpo.safetensors")
    print(json.dumps(content["variants"], indent=1))


if __name__ == "__main__":
    main()
