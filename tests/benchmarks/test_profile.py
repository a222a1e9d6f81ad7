"""Time is counted once, for the most important thing that ran."""

from benchmarks.profile import Ran, by_moment, kinds_of

PROGRAM = """
%body.1 (x: f32[2]) -> f32[2] {
  %dot.9 = f32[2]{0} dot(%x, %x)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %fused.1 = f32[2]{0} fusion(%x), kind=kLoop, calls=%body.1, metadata={op_name="jit(f)/jvp()/dot_general"}
  %fused.2 = f32[2]{0} fusion(%x), kind=kLoop, calls=%body.1, metadata={op_name="jit(f)/jvp()/ab,bc->ac/dot_general"}
  %add.3 = f32[2]{0} fusion(%x), kind=kLoop, calls=%body.2, metadata={op_name="jit(f)/jvp()/add"}
  ROOT %mul.4 = f32[2]{0} fusion(%x), kind=kLoop, calls=%body.2, metadata={op_name="jit(f)/mul"}
}
"""


def test_instructions_are_told_apart():
    kinds = kinds_of(PROGRAM)
    assert kinds["fused.1"] == "product with a weight matrix" and kinds["fused.2"] == "product within attention"
    assert kinds["add.3"] == "other" and kinds["mul.4"] == "norms and optimiser"


def test_every_moment_counts_once():
    found = by_moment([
        Ran(0, 10, "other"), Ran(4, 6, "product with a weight matrix"), Ran(5, 8, "product within attention"),
        Ran(9, 12, "other"), Ran(20, 30, "norms and optimiser"), Ran(25, 26, "other"),
    ])  # fmt: skip
    assert found == {
        "product with a weight matrix": 2, "product within attention": 2, "other, on one core": 7,
        "other, on both cores": 1, "nothing": 8, "norms and optimiser": 10,
    }  # fmt: skip
