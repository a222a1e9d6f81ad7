"""Fine-tune a language model; `python train.py --help` lists the commands (installed as `shiq-train`)."""

from shiq_jax.runs.train_command import main

if __name__ == "__main__":
    main()
