"""The examples of docs/examples run as they are, and what they train gets better."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_learns(name):
    before, after = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert after > before + 0.05
    # What is learnt is far from what chance gives, and the examples of pairs are scored on pairs that were not seen.
    assert after > (-0.75 if name == "plain_jax" else 0.8)


@pytest.mark.parametrize(("page", "name"), [("privacy.md", "private_loop"), ("training.md", "own_loop")])
def test_the_documentation_shows_what_runs(page, name):
    text = (EXAMPLES.parent / page).read_text()
    shown = re.search(rf"examples/{name}\.py.*?```python\n(.*?)```", text, re.DOTALL)[1]
    runs = iter([line.strip() for line in (EXAMPLES / f"{name}.py").read_text().splitlines()])
    missing = [line for line in shown.splitlines() if line and line.strip() not in runs]
    assert not missing
