"""Size limits of functions, and the tool that measures them."""

import subprocess
import sys

from tests.tools import shape

SOURCE = '''
class A:
    @property
    def b(self):
        """Docstring."""
        return 1

    async def c(self, a, /, b, *args, d, **kwargs):
        def e(): pass
        return lambda x, y: x


def f_kernel(a, b, c, d, e, f, g, h, i, j, k): pass
'''


def test_no_function_exceeds_the_limits():
    assert [str(function) for function in shape.all_functions() if function.too_large] == []


def test_lines_and_parameters_are_counted():
    functions = {function.name: function for function in shape.functions(SOURCE, "file.py")}
    assert {name: (function.lines, function.parameters) for name, function in functions.items()} == {
        "A.b": (3, 1), "A.c": (3, 6), "A.c.e": (1, 0), "f_kernel": (1, 11),
    }  # fmt: skip
    assert functions["A.b"].location == "file.py:4"


def test_limits_apply_to_all_functions_but_pallas_kernels():
    (long,) = shape.functions("def f():\n" + "    0\n" * shape.MAX_LINES, "")
    (short,) = shape.functions("def f():\n" + "    0\n" * (shape.MAX_LINES - 1), "")
    assert long.too_large and not short.too_large
    function = list(shape.functions(SOURCE, ""))[-1]
    kernel = list(shape.functions("from jax.experimental import pallas as pl\n" + SOURCE, ""))[-1]
    assert function.too_large and kernel.kernel and not kernel.too_large


def test_command_prints_ten_functions_per_list():
    command = [sys.executable, "-m", "tests.tools.shape"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=shape.ROOT).stdout.splitlines()
    assert len(lines) == 22 and lines[0] == "longest functions" and lines[11] == "most parameters"
