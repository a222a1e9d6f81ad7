"""Fine-tune a language model: ShiQ, DPO, KTO or supervised.

examples:
  python train.py                                    the embedded toy, minutes
  python train.py shiq --model DIR --data FILE       on scored samples
  python train.py shiq --model DIR --prompts FILE --reward MODULE:FUNCTION
                                                     on answers that it samples
  python train.py dpo --model DIR --data FILE        on preference pairs
  python train.py kto --model DIR --data FILE        on good and bad answers
  python train.py dpo --rounds 3                     sample, score, learn, again
  python train.py shiq --output-dir DIR --resume     continue after a stop
  python train.py inspect DIR                        look at a run or a buffer

Options without a command are those of shiq; --help after a command lists them.

Defaults depend on the data: `train.py shiq --data FILE --help` shows them.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import tyro

from shiq_jax import stopping
from shiq_jax.runs.command_line import one_sentence, program
from shiq_jax.runs.commands import Inspect, command_line, without_effect


def run(command, name: str) -> None:
    """Run a parsed command; `name` is the prefix of its warnings."""
    if isinstance(command, Inspect):
        from shiq_jax.runs.inspection import inspect

        print(inspect(command.path, prompts=command.generations))
        return
    if idle := list(without_effect(command)):
        why = "nothing is sampled or warmed up with data" if command.data else "sft samples nothing to learn from"
        print(f"{name}: {', '.join(idle)} without effect here: {why}", file=sys.stderr)
    with stopping.stop_on_signals():
        from shiq_jax.runs.compilation_cache import enable_compilation_cache
        from shiq_jax.runs.pipeline import train

        enable_compilation_cache()
        train(command)


def parse(arguments: Sequence[str], name: str = "train.py"):
    """The command with its options; SystemExit with code 2 when there is no such command, option or value.

    name: of the program, for the usage text.
    """
    about = __doc__ if name == "train.py" else __doc__.replace("python train.py", name).replace("train.py", name)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command_line(arguments), args=arguments, prog=name, description=about)
    finally:
        # Replace tyro's internal name of option groups by one of the same length, which keeps its frame straight.
        sys.stderr.write(said.getvalue().replace("__tyro-dummy-inner__.", "the group of options "))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command; a refusal is one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shiq", *arguments]
    name = program("train.py", "shiq-train")
    command = parse(arguments, name)
    with one_sentence(name, "the same command with --resume goes on"):
        run(command, name)
