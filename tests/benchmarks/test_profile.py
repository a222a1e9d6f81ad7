"""Classification of HLO instructions, and the time of concurrent events."""

from benchmarks.profile import Event, classify_instructions, time_by_kind

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


def test_classifies_instructions():
    kinds = classify_instructions(PROGRAM)
    assert kinds["fused.1"] == "matmul: weights" and kinds["fused.2"] == "matmul: attention"
    assert kinds["add.3"] == "other" and kinds["mul.4"] == "norms and optimizer"


def test_concurrent_events_count_once():
    totals = time_by_kind([
        Event(0, 10, "other"), Event(4, 6, "matmul: weights"), Event(5, 8, "matmul: attention"),
        Event(9, 12, "other"), Event(20, 30, "norms and optimizer"), Event(25, 26, "other"),
    ])  # fmt: skip
    assert totals == {
        "matmul: weights": 2, "matmul: attention": 2, "other, on one core": 7, "other, on both cores": 1, "idle": 8,
        "norms and optimizer": 10,
    }  # fmt: skip
