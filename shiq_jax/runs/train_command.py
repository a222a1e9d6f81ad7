"""Fine-tune a language model with ShiQ, DPO, KTO or supervised learning.

examples:
  python train.py                                    toy task, a few minutes
  python train.py shiq --model DIR --data FILE       scored answers
  python train.py shiq --model DIR --prompts FILE --reward MODULE:FUNCTION
                                                     answers of the policy
  python train.py dpo --model DIR --data FILE        preference pairs
  python train.py kto --model DIR --data FILE        labeled answers
  python train.py dpo --rounds 3                     iterative DPO, three rounds
  python train.py shiq --output-dir DIR --resume     resume a stopped run
  python train.py inspect DIR                        show a run or a buffer

The default command is shiq; `train.py COMMAND --help` lists the options.

Defaults depend on the data: `train.py shiq --data FILE --help` shows them.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import tyro

from shiq_jax import stopping
from shiq_jax.runs.command_line import program_name, report_errors
from shiq_jax.runs.commands import Inspect, ignored_options, subcommands


def run(command, name: str) -> None:
    """Run a parsed command; `name` prefixes its warnings."""
    if isinstance(command, Inspect):
        from shiq_jax.runs.inspection import inspect

        print(inspect(command.path, prompts=command.generations))
        return
    if flags := list(ignored_options(command)):
        reason = "sft does not sample training data"
        if command.data or command.prompts:
            reason = (
                "--data skips sampling and warm start" if command.data else "--prompts replaces task and warm start"
            )
        print(f"{name}: warning: ignored {', '.join(flags)}: {reason}", file=sys.stderr)
    with stopping.stop_on_signals():
        from shiq_jax.runs.compilation_cache import enable_compilation_cache
        from shiq_jax.runs.pipeline import train

        enable_compilation_cache()
        train(command)


def parse(arguments: Sequence[str], name: str = "train.py"):
    """Parse the command line; raises SystemExit with code 2 for an unknown command, option or value.

    name: program name in the usage text.
    """
    description = __doc__ if name == "train.py" else __doc__.replace("python train.py", name).replace("train.py", name)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(subcommands(arguments), args=arguments, prog=name, description=description)
    finally:
        # The replacement has the length of tyro's internal name, so its box stays aligned.
        sys.stderr.write(errors.getvalue().replace("__tyro-dummy-inner__.", "the group of options "))


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command; an error is printed as one sentence, with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shiq", *arguments]
    name = program_name("train.py", "shiq-train")
    command = parse(arguments, name)
    with report_errors(name, "repeat the command with --resume to continue"):
        run(command, name)
