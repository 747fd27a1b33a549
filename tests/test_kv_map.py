import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cla_jax import kv_map as m


@st.composite
def maps(draw, most=12):
    """Any valid map: every layer is a producer or reads one below it."""
    kv_map = [0]
    for layer in range(1, draw(st.integers(1, most))):
        producers = [p for p, source in enumerate(kv_map) if p == source]
        kv_map.append(draw(st.sampled_from([layer, layer, *producers])))
    return tuple(kv_map)


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("identity", 3, (0, 1, 2)),
        ("cla:1", 3, (0, 1, 2)),
        ("cla:2", 10, (0, 0, 2, 2, 4, 4, 6, 6, 8, 8)),
        # Figure 2 of the paper: producers 0, 1, 4, 7.
        ("cla:3", 10, (0, 1, 1, 1, 4, 4, 4, 7, 7, 7)),
        ("cla:3:last", 10, (0, 0, 0, 3, 3, 3, 6, 6, 6, 9)),
        ("keep-ends", 6, (0, 1, 1, 3, 3, 5)),
        ("keep-ends", 3, (0, 1, 2)),
        ("dense-front", 6, (0, 1, 2, 2, 2, 5)),
        ("dense-back", 6, (0, 1, 1, 1, 4, 5)),
        ("pizza:3", 6, (0, 1, 2, 2, 2, 2)),
        ("sandwich:4", 7, (0, 1, 2, 2, 2, 2, 6)),
        ("sandwich:1", 3, (0, 0, 0)),
        ("lasagna:3", 6, (0, 0, 2, 2, 4, 4)),
        ("lasagna:4", 10, (0, 0, 2, 2, 2, 5, 5, 7, 7, 7)),
        ("trailing:2", 5, (0, 1, 2, 2, 2)),
        ("trailing:0", 3, (0, 1, 2)),
        ("0, 0,2,0", 4, (0, 0, 2, 0)),
    ],
)
def test_builders(text, layers, expected):
    assert m.resolve(text, layers) == expected


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("cla:2", range(0, 20, 2)),
        ("cla:3", [0, 2, 5, 8, 11, 14, 17]),  # table 1: 7 KV layers
        ("cla:4", [0, 4, 8, 12, 16]),
        ("keep-ends", [0, *range(1, 19, 2), 19]),
        ("dense-front", [*range(10), 19]),
        ("dense-back", [0, 1, *range(11, 20)]),
    ],
)
def test_the_papers_twenty_layers(text, slots):
    assert m.slots(m.resolve(text, 20)) == tuple(slots)


@given(maps())
def test_groups_stacks_and_slots_of_any_map(kv_map):
    m.validate(kv_map, len(kv_map))
    groups, stacks = m.groups(kv_map), m.stacks(kv_map)
    layers = [(g.first + i, g.source) for g in groups for i in range(g.size)]
    assert layers == list(enumerate(kv_map))
    assert tuple(g.first for g in groups if g.produces) == m.slots(kv_map)
    assert [g for stack in stacks for g in stack.groups] == list(groups)
    for group in groups:
        later = kv_map[group.first + group.size :]
        assert group.reused == (group.produces and group.first in later)
    for stack in stacks:
        assert len({(g.size, g.produces, g.reused) for g in stack.groups}) == 1
        assert stack.produces or len(stack.groups) == 1
    for a, b in itertools.pairwise(stacks):
        assert not (a.produces and b.produces) or (a.size, a.reused) != (b.size, b.reused)


def test_cla_is_one_stack_and_identity_has_groups_of_one():
    (stack,) = m.stacks(m.cla(32, 2))
    assert (len(stack.groups), stack.size) == (16, 2)
    (stack,) = m.stacks(m.identity(32))
    assert (len(stack.groups), stack.size) == (32, 1)


@pytest.mark.parametrize(
    ("text", "layers", "words"),
    [
        ("0,0,1,1", 4, ["kv_map[2] is 1", "layer 1 is a consumer"]),
        ("0,2,2", 3, ["kv_map[1] is 2", "later layer"]),
        ("0,0", 3, ["2 entries", "3"]),
        ("0,7", 2, ["kv_map[1] is 7", "0 to 1"]),
        ("0,x", 2, ["integers"]),
        ("cal:2", 4, ["'cal:2'", "'cla'"]),
        ("cla", 4, ["cla:FACTOR"]),
        ("cla:two", 4, ["cla:FACTOR"]),
        ("cla:2:middle", 4, ["middle", "'first' or 'last'"]),
        ("cla:5", 4, ["factor is 5", "4"]),
        ("cla:0", 4, ["factor is 0"]),
        ("keep-ends:3", 4, ["keep-ends"]),
        ("keep-ends", 2, ["n_layers >= 3"]),
        ("pizza:9", 4, ["n_kv_layers is 9"]),
        ("trailing:4", 4, ["n_shared is 4", "0 to 3"]),
        ("", 4, ["unknown kv_map"]),
    ],
)
def test_refusals_name_the_layer_or_the_form(text, layers, words):
    with pytest.raises(ValueError) as error:
        m.resolve(text, layers)
    for word in words:
        assert word in str(error.value)
