"""Evaluate a run, a checkpoint or a model; `python eval.py --help` lists the options (installed as `shiq-eval`)."""

from shiq_jax.runs.eval_command import main

if __name__ == "__main__":
    main()
