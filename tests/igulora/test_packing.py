"""Nested values as JSON and tensors and back: nothing is lost on the way, and nothing foreign is taken."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igulora.packing import pack, unpack

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
keys = st.one_of(
    st.text(), st.sampled_from(["$tuple", "$tensor", "$"]), st.integers(), st.tuples(st.integers(), st.text())
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_values_come_back_through_json(value: Any) -> None:
    text = json.dumps(pack(value, "it"), allow_nan=False)
    back = unpack(json.loads(text), "it", {})
    assert repr(back) == repr(value)


def test_tensors_and_numbers_without_a_word_in_json() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {1: torch.ones(2), "1": [torch.zeros(()), math.nan, (math.inf, -math.inf)]}
    packed = json.loads(json.dumps(pack(value, "state", tensors), allow_nan=False))
    assert len(tensors) == 2
    back = unpack(packed, "state", tensors)
    assert tensors == {}
    assert torch.equal(back[1], value[1])
    assert repr(back) == repr(value)


def test_two_keys_that_read_alike_keep_their_tensors() -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = pack({1: torch.ones(1), "1": torch.zeros(1)}, "state", tensors)
    assert len(tensors) == 2
    back = unpack(packed, "state", tensors)
    assert [float(back[1]), float(back["1"])] == [1.0, 0.0]


@pytest.mark.parametrize(
    "value",
    [{"$tuple": 1}, {"$float": "1"}, {"$tensor": "x"}, {"$tensor": []}, {"$dict": [[1]]}, {"$dict": [[[], 1]]}, {"$odd": 1},
     {"$tuple": [], "more": 1}],
)  # fmt: skip
def test_what_pack_does_not_write_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected .* in the file"):
        unpack([value], "the file", {})


def test_without_room_for_tensors_they_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a\.b to hold None, numbers, .*, got Tensor"):
        pack({"b": torch.ones(1)}, "a")
