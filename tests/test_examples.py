"""The scripts in docs/examples run and improve their metric."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example_improves_its_metric(name):
    before, after = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert after > before + 0.05
    # Far above chance; the preference examples score held-out pairs.
    assert after > (-0.75 if name == "plain_jax" else 0.8)


@pytest.mark.parametrize(("page", "name"), [("privacy.md", "private_loop"), ("own-loop.md", "own_loop")])
def test_documented_code_matches_the_example(page, name):
    text = (EXAMPLES.parent / page).read_text()
    shown = re.search(rf"examples/{name}\.py.*?```python\n(.*?)```", text, re.DOTALL)[1]
    # `in` consumes the iterator, so the lines must also be in the same order.
    script_lines = iter([line.strip() for line in (EXAMPLES / f"{name}.py").read_text().splitlines()])
    missing = [line for line in shown.splitlines() if line and line.strip() not in script_lines]
    assert not missing
