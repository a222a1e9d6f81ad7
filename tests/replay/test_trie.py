"""Tries: lexicographic order, one node per distinct prefix, and intervals."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.replay.trie import build_trie, lexicographic_order

# Few distinct tokens give many shared prefixes; ids above 255 exercise the byte order.
TOKENS = st.sampled_from([0, 1, 255, 256, 70000])
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=1, max_size=8)


def arrays(lists):
    return [np.array(tokens, np.int32) for tokens in lists]


@given(SEQUENCES)
def test_order_matches_python_lists(lists):
    order, shared = lexicographic_order(arrays(lists))
    assert [lists[index] for index in order] == sorted(lists)
    for rank, common in enumerate(shared):
        current, previous = lists[order[rank]], lists[order[rank - 1]] if rank else []
        assert current[:common] == previous[:common]
        assert common == min(len(current), len(previous)) or current[common] != previous[common]


@settings(max_examples=200)
@given(SEQUENCES)
def test_every_distinct_prefix_is_one_node(lists):
    trie = build_trie(arrays(lists))
    prefixes = {tuple(tokens[: end + 1]) for tokens in lists for end in range(len(tokens))}
    assert len(trie.tokens) == len(prefixes)
    prefix_of_node = {}
    for tokens, path in zip(lists, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == tokens
        assert trie.depth[path].tolist() == list(range(len(tokens)))
        assert trie.parent[path].tolist() == [-1, *path[:-1]]
        prefix_of_node.update({int(node): tuple(tokens[: end + 1]) for end, node in enumerate(path)})
    assert set(prefix_of_node.values()) == prefixes and len(prefix_of_node) == len(prefixes)


@settings(max_examples=200)
@given(SEQUENCES)
def test_intervals_show_each_token_its_prefix(lists):
    trie = build_trie(arrays(lists))
    index = np.arange(len(trie.tokens))
    visible = (
        (index[None, :] <= index[:, None])
        & (trie.enter[None, :] <= trie.enter[:, None])
        & (trie.enter[:, None] < trie.exit[None, :])
    )
    for path in trie.paths:
        for end, query in enumerate(path):
            assert np.flatnonzero(visible[query]).tolist() == sorted(path[: end + 1].tolist())


def test_forest_by_hand():
    trie = build_trie(arrays([[1, 2, 3], [1, 2], [1, 4], [1, 2, 3], [5]]))
    assert trie.tokens.tolist() == [1, 2, 3, 4, 5]
    assert trie.parent.tolist() == [-1, 0, 1, 0, -1]
    # Sequences in lexicographic order: 1 2, 1 2 3, 1 2 3, 1 4, 5.
    assert trie.enter.tolist() == [0, 0, 1, 3, 4]
    assert trie.exit.tolist() == [4, 3, 3, 4, 5]
    assert [path.tolist() for path in trie.paths] == [[0, 1, 2], [0, 1], [0, 3], [0, 1, 2], [4]]
