"""No function of this repository is too large, and the tool that says so counts right."""

import subprocess
import sys

from tests.tools import shape

SOURCE = '''
class A:
    @property
    def b(self):
        """Says."""
        return 1

    async def c(self, a, /, b, *args, d, **kwargs):
        def e(): pass
        return lambda x, y: x


def f_kernel(a, b, c, d, e, f, g, h, i, j, k): pass
'''


def test_no_function_is_too_large():
    assert [str(each) for each in shape.all_functions() if each.too_large] == []


def test_every_parameter_and_line_counts():
    found = {each.name: each for each in shape.functions(SOURCE, "file.py")}
    assert {name: (each.lines, each.parameters) for name, each in found.items()} == {
        "A.b": (3, 1), "A.c": (3, 6), "A.c.e": (1, 0), "f_kernel": (1, 11),
    }  # fmt: skip
    assert found["A.b"].place == "file.py:4"


def test_limits_hold_for_everything_but_kernels():
    (long,) = shape.functions("def f():\n" + "    0\n" * shape.LINES, "")
    (short,) = shape.functions("def f():\n" + "    0\n" * (shape.LINES - 1), "")
    assert long.too_large and not short.too_large
    plain = list(shape.functions(SOURCE, ""))[-1]
    kernel = list(shape.functions("from jax.experimental import pallas as pl\n" + SOURCE, ""))[-1]
    assert plain.too_large and kernel.kernel and not kernel.too_large


def test_the_command_prints_the_ten_largest_of_both_kinds():
    command = [sys.executable, "-m", "tests.tools.shape"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=shape.ROOT).stdout.splitlines()
    assert len(said) == 22 and said[0] == "longest functions" and said[11] == "most parameters"
