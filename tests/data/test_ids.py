"""Ids that occur twice, against a plain count."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diffretriever.data.ids import find_repeated, repeated_hashes
from diffretriever.files.hashes import hash64


@given(st.lists(st.sampled_from([f"id-{number}" for number in range(40)]), max_size=60))
def test_repeated_ids_are_found_and_named(ids: list[str]) -> None:
    found = repeated_hashes(array("q", map(hash64, ids)))
    expected = {text_id for text_id, count in Counter(ids).items() if count > 1}
    assert found.tolist() == sorted(map(hash64, expected))
    named = find_repeated(ids, found)
    assert {text_id for text_id, _, _ in named} <= expected
    assert bool(named) == bool(expected)
    for text_id, first, second in named:
        assert ids[first - 1] == ids[second - 1] == text_id
        assert first == ids.index(text_id) + 1
        assert first < second


def test_different_ids_of_one_hash_are_not_taken_for_one() -> None:
    suspects = np.array([hash64("aa"), hash64("bb")])  # as if each shared its hash with another id
    assert find_repeated(["aa", "bb", "c"], suspects) == []
    assert find_repeated(["aa", "bb", "c", "bb"], suspects) == [("bb", 2, 4)]
