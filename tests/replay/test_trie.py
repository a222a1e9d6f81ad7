import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.replay.trie import build, lexicographic

# Few distinct tokens, so that beginnings are often shared; ids beyond a byte, so that byte order matters.
TOKENS = st.sampled_from([0, 1, 255, 256, 70000])
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=8)


def arrays(lists):
    return [np.array(tokens, np.int32) for tokens in lists]


@given(SEQUENCES)
def test_order_is_that_of_python_lists(lists):
    order, shared = lexicographic(arrays(lists))
    assert [lists[index] for index in order] == sorted(lists)
    for place, common in enumerate(shared):
        here, before = lists[order[place]], lists[order[place - 1]] if place else []
        assert here[:common] == before[:common]
        assert common == min(len(here), len(before)) or here[common] != before[common]


@settings(max_examples=200)
@given(SEQUENCES)
def test_every_distinct_beginning_is_one_token(lists):
    trie = build(arrays(lists))
    beginnings = {tuple(tokens[: end + 1]) for tokens in lists for end in range(len(tokens))}
    assert len(trie.tokens) == len(beginnings)
    reached = {}
    for tokens, path in zip(lists, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == tokens
        assert trie.depth[path].tolist() == list(range(len(tokens)))
        assert trie.parent[path].tolist() == [-1, *path[:-1]]
        reached.update({int(row): tuple(tokens[: end + 1]) for end, row in enumerate(path)})
    assert set(reached.values()) == beginnings and len(reached) == len(beginnings)


@settings(max_examples=200)
@given(SEQUENCES)
def test_intervals_show_each_token_its_own_beginning(lists):
    trie = build(arrays(lists))
    index = np.arange(len(trie.tokens))
    sees = (
        (index[None, :] <= index[:, None])
        & (trie.enter[None, :] <= trie.enter[:, None])
        & (trie.enter[:, None] < trie.exit[None, :])
    )
    for path in trie.paths:
        for end, query in enumerate(path):
            assert np.flatnonzero(sees[query]).tolist() == sorted(path[: end + 1].tolist())


def test_a_forest_worked_by_hand():
    trie = build(arrays([[1, 2, 3], [1, 2], [1, 4], [1, 2, 3], [5]]))
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5]
    assert trie.parent.tolist() == [-1, 0, 1, 0, -1]
    # In order: 1 2, 1 2 3, 1 2 3, 1 4, 5.
    assert trie.enter.tolist() == [0, 0, 1, 3, 4]
    assert trie.exit.tolist() == [4, 3, 3, 4, 5]
    assert [path.tolist() for path in trie.paths] == [[0, 1, 2], [0, 1], [0, 3], [0, 1, 2], [4]]
