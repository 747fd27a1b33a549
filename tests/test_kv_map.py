import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cla_jax import kv_map as m
from tests.conftest import MODEL


@st.composite
def maps(draw, most=12):
    """Any valid map: every layer is a producer or reads one below it."""
    kv_map = [0]
    for layer in range(1, draw(st.integers(1, most))):
        producers = [p for p, source in enumerate(kv_map) if p == source]
        kv_map.append(draw(st.sampled_from([layer, layer, *producers])))
    return tuple(kv_map)


@st.composite
def map_pairs(draw, most=12):
    """Any valid K map and V map, half of the time one for both, and their text."""
    k_map = draw(maps(most))
    if draw(st.booleans()):
        return k_map, k_map, ",".join(map(str, k_map))
    v_map = [0]
    for layer in range(1, len(k_map)):
        producers = [p for p, source in enumerate(v_map) if p == source]
        v_map.append(draw(st.sampled_from([layer, layer, *producers])))
    if k_map == tuple(v_map):
        return k_map, k_map, ",".join(map(str, k_map))
    text = "k=" + ",".join(map(str, k_map)) + ";v=" + ",".join(map(str, v_map))
    return k_map, tuple(v_map), text


def together(k_map, v_map):
    """For each layer the first one that it shares keys or values with, over any number of steps."""
    first = list(range(len(k_map)))
    for _ in first:
        for layer, sources in enumerate(zip(k_map, v_map, strict=True)):
            for source in sources:
                first[layer] = first[source] = min(first[layer], first[source])
    return first


def of_one(kv_map):
    return m.Sharing(kv_map, kv_map, (0,) * len(kv_map))


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
    assert m.resolve(text, layers) == (expected, expected)


@pytest.mark.parametrize(
    ("text", "layers", "k_map", "v_map"),
    [
        ("k=cla:2;v=identity", 4, (0, 0, 2, 2), (0, 1, 2, 3)),
        (" v=0,0,0 ; k=0,1,0 ", 3, (0, 1, 0), (0, 0, 0)),
        ("fused-lite", 6, (0, 1, 2, 2, 2, 2), (0, 1, 2, 0, 0, 0)),
        ("fused-lite", 5, (0, 1, 2, 2, 2), (0, 1, 2, 0, 0)),
        ("fused-lite:2", 4, (0, 1, 1, 1), (0, 1, 0, 0)),
        ("fused-lite:1", 3, (0, 0, 0), (0, 0, 0)),
    ],
)
def test_keys_and_values_have_maps_of_their_own(text, layers, k_map, v_map):
    assert m.resolve(text, layers) == (k_map, v_map)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("cla:2", range(0, 20, 2)),
        ("cla:3", [0, 2, 5, 8, 11, 14, 17]),  # table 1: 7 KV layers
        ("cla:4", [0, 4, 8, 12, 16]),
        ("keep-ends", [0, *range(1, 19, 2), 19]),
        ("dense-front", [*range(10), 19]),
        ("dense-back", [0, 1, *range(11, 20)]),
    ],
)
def test_the_papers_twenty_layers(text, layers):
    sharing = of_one(m.resolve(text, 20)[0])
    assert [kv.layer for kv in sharing.kv_layers] == list(layers)
    assert all(kv.holds == "kv" for kv in sharing.kv_layers)


@given(map_pairs())
def test_groups_stacks_and_kv_layers_of_any_maps(pair):
    k_map, v_map, text = pair
    assert m.resolve(text, len(k_map)) == (k_map, v_map)
    sharing = m.Sharing(k_map, v_map, tuple(range(len(k_map))))
    groups, stacks, kv_layers = sharing.groups, sharing.stacks, sharing.kv_layers
    layers = [(g.k_source, g.v_source) for g in groups for _ in range(g.size)]
    assert layers == list(zip(k_map, v_map, strict=True))
    assert [g for stack in stacks for g in stack.groups] == list(groups)
    for group in groups:
        here, end = group.first, group.first + group.size
        projects = "k" * (k_map[here] == here) + "v" * (v_map[here] == here)
        reused = "k" * (here in k_map[end:]) + "v" * (here in v_map[end:])
        assert (group.projects, group.reused) == (projects, reused)
        k, v = sharing.read_by(group)
        assert (kv_layers[k].layer, kv_layers[v].layer) == (group.k_source, group.v_source)
    made = {i for i in range(len(k_map)) if i in (k_map[i], v_map[i])}
    assert [kv.layer for kv in kv_layers] == sorted(made)
    for kv in kv_layers:
        assert ("k" in kv.holds, "v" in kv.holds) == (kv.layer in k_map, kv.layer in v_map)
        assert (kv.k_readers, kv.v_readers) == (k_map.count(kv.layer), v_map.count(kv.layer))
        assert kv.readers == sum(kv.layer in sources for sources in layers)
        assert kv.window == kv.layer
    assert sharing.count("k") == len(set(k_map))
    assert sharing.count("v") == len(set(v_map))
    elsewhere = lambda g: {s for s in (g.k_source, g.v_source) if s != g.first}
    shape = lambda g: (g.size, g.projects, g.reused, *elsewhere(g))
    for stack in stacks:
        assert len(set(map(shape, stack.groups))) == 1
        assert stack.projects or len(stack.groups) == 1
    for a, b in itertools.pairwise(stacks):
        assert not (a.projects and b.projects) or shape(a.groups[0]) != shape(b.groups[0])


def test_cla_is_one_stack_and_identity_has_groups_of_one():
    (stack,) = of_one(m.cla(32, 2)).stacks
    assert (len(stack.groups), stack.size) == (16, 2)
    (stack,) = of_one(m.no_sharing(32)).stacks
    assert (len(stack.groups), stack.size) == (32, 1)


def test_layers_that_read_values_of_one_layer_and_make_keys_are_one_stack():
    k_map, v_map = m.resolve("k=identity;v=pizza:1", 32)
    first, others = m.Sharing(k_map, v_map, (0,) * 32).stacks
    assert (first.projects, others.projects, len(others.groups)) == ("kv", "k", 31)


@pytest.mark.parametrize(
    ("text", "layers", "words"),
    [
        ("0,0,1,1", 4, ["kv_map[2] is 1", "layer 1 is a consumer", ": use 0 or 2"]),
        ("0,0,0,1", 4, ["kv_map[3] is 1", ": use 0 or 3"]),
        ("0,2,2", 3, ["kv_map[1] is 2", "later layer"]),
        ("0,0", 3, ["2 entries", "3"]),
        ("0,7", 2, ["kv_map[1] is 7", "0 to 1"]),
        ("0,x", 2, ["integers"]),
        ("cal:2", 4, ["no such map", "'cla:2'"]),
        ("cla2", 4, ["no such map; did you mean 'cla:2'?"]),
        ("pizza-3", 4, ["no such map; did you mean 'pizza:3'?"]),
        ("keepends2", 4, ["no such map; did you mean 'keep-ends'?"]),
        ("cla", 4, ["cla:FACTOR"]),
        ("cla:two", 4, ["cla:FACTOR"]),
        ("cla:2:middle", 4, ["middle", "'first' or 'last'"]),
        ("cla:5", 4, ["FACTOR (layers per group) is 5", "4"]),
        ("cla:0", 4, ["is 0"]),
        ("keep-ends:3", 4, ["keep-ends"]),
        ("keep-ends", 2, ["n_layers >= 3"]),
        ("pizza:9", 4, ["KV_LAYERS (how many layers make keys and values) is 9"]),
        ("sandwich", 4, ["sandwich:KV_LAYERS; KV_LAYERS (how many layers make"]),
        ("fused-lite:x", 4, ["fused-lite[:KV_LAYERS]; KV_LAYERS (how many layers make"]),
        ("trailing:x", 4, ["trailing:SHARED_LAYERS; SHARED_LAYERS (how many"]),
        ("trailing:4", 4, ["SHARED_LAYERS", "is 4", "0 to 3"]),
        ("", 4, ["no such map"]),
        ("k=cla:2", 4, ["k=MAP;v=MAP; the map of v is missing"]),
        ("v=cla:2", 4, ["k=MAP;v=MAP; the map of k is missing"]),
        ("k=cla:2;k=identity", 4, ["k=MAP;v=MAP"]),
        ("k=cla:2;v=identity;v=identity", 4, ["k=MAP;v=MAP"]),
        ("k=cla:2;v=", 4, ["no such map"]),
        ("k=cla:2;v=fused-lite", 4, ["'fused-lite' already defines both maps"]),
        ("k=cla:2;v=cla:9", 4, ["is 9"]),
        ("k=cla:2;v=0,0,2,2", 4, ["both maps are equal"]),
        ("k=0,0,2;v=identity", 4, ["k: it has 3 entries"]),
        ("fused-lite:5", 4, ["is 5"]),
        ("fused-lit", 4, ["'fused-lite'"]),
    ],
)
def test_refusals_name_the_layer_or_the_form(text, layers, words):
    with pytest.raises(ValueError) as error:
        m.resolve(text, layers)
    for word in words:
        assert word in str(error.value)
    with pytest.raises(ValueError) as of_model:
        dataclasses.replace(MODEL, kv_map=text, n_layers=layers)
    assert str(of_model.value) == f"model.kv_map = {text!r}: {error.value}"
