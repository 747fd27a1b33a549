"""Reading optimised HLO: texts shaped as TPU programs are, with what has been met in them."""

import pytest

from cla_jax import hlo

TEXT = """\
HloModule jit_train_step

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(20), metadata={op_name="jit(train_step)/while/cond/lt"}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%fused_gather (a: bf16[1,4]) -> bf16[8,4] {
  ROOT %g = bf16[8,4]{1,0:T(8,128)} all-gather(%a), channel_id=3, replica_groups=[1,8]<=[8]
}

%fused_gather_rest (a: bf16[1,4]) -> bf16[8,4] {
  ROOT %g = bf16[8,4]{1,0:T(8,128)} all-gather(%a), channel_id=3, replica_groups=[1,8]<=[8]
}

%all-reduce-scatter.3 (a: bf16[8,4]) -> bf16[2,4] {
  %r.1 = bf16[8,4] all-reduce(%a), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = bf16[2,4] dynamic-slice(%r.1, %i, %zero), dynamic_slice_sizes={2,4}
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %f = bf16[8,4] fusion(%x), kind=kCustom, calls=%fused_gather
  %h = bf16[8,4] fusion(%f), kind=kCustom, calls=%fused_gather_rest
  %s = f32[2,4] reduce-scatter(%y), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %c = bf16[2,4] fusion(%h), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[], bf16[8,4]) tuple(%i, %h)
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %w = (s32[], bf16[8,4]) while(%init), condition=%cond, body=%body
  %r = (f32[16], f32[2]) all-reduce(%a, %b), channel_id=9, replica_groups=mesh['x'=4,'y'=2] {'y'}
  %m = bf16[20,8,2048]{2,1,0} fusion(%w), metadata={op_name="jit(train_step)/transpose(jvp(mlp))/dot_general"}
  ROOT %o = f32[16] copy(%r)
}
"""


def test_collectives_count_as_often_as_their_loop_turns_and_once_a_channel():
    assert hlo.collective_bytes(TEXT) == {
        "all-gather": 20 * 8 * 4 * 2,
        # Operands: the result of each of a group of four; what a fusion for a TPU adds up and cuts.
        "reduce-scatter": 20 * (4 * (2 * 4 * 4) + 8 * 4 * 2),
        "all-reduce": 2 * (16 + 2) * 4,
    }


def test_started_collectives_count_what_arrives():
    text = """\
ENTRY %main (a: f32[16]) -> f32[16] {
  %g = (bf16[1,4], bf16[8,4]) all-gather-start(%a), channel_id=1
  %d = bf16[8,4] all-gather-done(%g)
  %p = (f32[16], f32[16]) collective-permute-start(%a), channel_id=2
  %c = ((f32[2], f32[4]), (f32[16], f32[32])) all-gather-start(%a, %b), channel_id=3
}
"""
    assert hlo.collective_bytes(text) == {"all-gather": 64 + 192, "collective-permute": 64}


def test_a_turn_beside_its_loop_does_not_hide_the_loop():
    peeled = TEXT.replace(
        "  %r = ", "  %x = bf16[8,4] fusion(%w), kind=kCustom, calls=%fused_gather\n  %r = "
    )
    assert hlo.collective_bytes(peeled) == hlo.collective_bytes(TEXT)


def test_a_loop_of_unknown_length_is_not_guessed():
    with pytest.raises(ValueError, match="compares with no constant"):
        hlo.trip_count(["  ROOT %lt = pred[] compare(%i, %n), direction=LT"])


def test_groups_are_read_in_every_notation():
    for groups, first in (
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("dimensions={0}", ()),
    ):
        assert hlo._group(f"%s = f32[2] reduce-scatter(%y), {groups}, to_apply=%add") == first


def test_what_spans_hosts_takes_the_network_ports_of_their_devices_together():
    found = [
        hlo.Collective(kind="all-gather", bytes=800, group=tuple(range(16))),
        hlo.Collective(kind="all-gather", bytes=80, group=tuple(range(8))),  # within a host
        hlo.Collective(kind="all-reduce", bytes=50, group=(0, 8)),  # one device of each host
    ]
    assert hlo.network_bytes(found, per_host=8) == {"all-gather": 100, "all-reduce": 50}
    assert hlo.network_bytes(found, per_host=16) == {}


def test_a_loop_that_says_how_often_it_turns_is_believed():
    """Programs for GPUs do; the constant of their condition may stand elsewhere."""
    known = TEXT.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    ).replace("constant(20)", "parameter(1)")
    assert hlo.collective_bytes(known)["all-gather"] == 5 * 8 * 4 * 2


def test_the_largest_buffers_are_named_by_parameter_or_by_what_computes_them():
    report = """\
Memory Space: default (color=0)
Total bytes: 4096 (4.0KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    640.0KiB( 18%);  640.0KiB;            0;                2; u32[], 5\u00d7bf16[20,8,2048]
     64.0KiB( 20%);   64.0KiB;            0;                1; f32[16384]
     32.0KiB( 20%);   32.0KiB;            0;                1; f32[8192]


Memory Space: vmem (color=1)
Total bytes: 8192 (4.0KiB)
  900.00MiB( 18%);  900.00MiB;            0;                1; f32[235929600]
"""
    first, second = hlo.largest_buffers(report, TEXT, {"f32[16384]": "model.embedding"}, count=2)
    assert (first.bytes, first.shape) == (20 * 8 * 2048 * 2, "bf16[20,8,2048]")
    assert first.where == "mlp/dot_general (backward)"
    assert (second.bytes, second.where) == (16384 * 4, "model.embedding")


MOVED = """\
HloModule jit_step

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(20)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%sliced (param_0: f32[20,16], param_1: s32[]) -> f32[1,16] {
  %param_0 = f32[20,16]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %one = f32[1,16]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,16}
  ROOT %twice = f32[1,16]{1,0} add(%one, %one)
}

%updated (param_0.1: f32[20,16], param_1.1: f32[1,16]) -> f32[20,16] {
  %param_0.1 = f32[20,16]{1,0} parameter(0)
  %param_1.1 = f32[1,16]{1,0} parameter(1)
  ROOT %all = f32[20,16]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %i, %zero)
}

%turned (param_0.2: f32[4,16]) -> f32[16,4] {
  %param_0.2 = f32[4,16]{1,0} parameter(0)
  ROOT %t.1 = f32[16,4]{1,0} transpose(%param_0.2), dimensions={1,0}
}

%prefetch (param_0.3: f32[20,16]) -> f32[2,16] {
  %param_0.3 = f32[20,16]{1,0} parameter(0)
  ROOT %s.1 = f32[2,16]{1,0:T(8,128)S(1)} slice(%param_0.3), slice={[0:2], [0:16]}
}

%body (p: (s32[], f32[20,16])) -> (s32[], f32[20,16]) {
  %p = (s32[], f32[20,16]) parameter(0)
  %stack = f32[20,16]{1,0} get-tuple-element(%p), index=1
  %part = f32[1,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %new = f32[20,16]{1,0} fusion(%stack, %part), kind=kLoop, calls=%updated
  ROOT %t = (s32[], f32[20,16]) tuple(%i, %new)
}

ENTRY %main (a: f32[4,16], stack.1: f32[20,16]) -> f32[16,4] {
  %a = f32[4,16]{1,0} parameter(0), metadata={op_name="q"}
  %stack.1 = f32[20,16]{1,0} parameter(1), metadata={op_name="cache.kv_layers[0].k_BSKH"}
  %init = (s32[], f32[20,16]) tuple(%zero.1, %stack.1)
  %w = (s32[], f32[20,16]) while(%init), condition=%cond, body=%body
  %stack.2 = f32[20,16]{1,0} get-tuple-element(%w), index=1
  %near = f32[4,16]{1,0:T(8,128)S(1)} negate(%a)
  %c = f32[4,16]{0,1} copy(%near)
  %f = f32[16,4]{1,0} fusion(%a), kind=kLoop, calls=%turned
  %start = ((f32[20,16]{1,0}), f32[2,16]{1,0:S(1)}, s32[]{:S(2)}) async-start(%stack.2), calls=%prefetch
  %done = f32[2,16]{1,0:S(1)} async-done(%start)
  ROOT %o = f32[16,4]{1,0} add(%f, %f)
}
"""


def test_traffic_counts_what_is_read_and_written_in_the_main_memory():
    row, array = 16 * 4, 4 * 16 * 4
    turn = (
        2 * row + 2 * row
    )  # reads a slice and writes a row; reads a row and writes it into the stack
    copies = array + 2 * array  # from near memory; read and written
    prefetched = 2 * row
    negated, added = array, 3 * array
    found = hlo.memory_traffic(MOVED)
    assert found.copies == copies
    assert found.total == 20 * turn + copies + prefetched + negated + added


def test_a_program_that_was_not_written_moves_nothing():
    assert hlo.memory_traffic("") == hlo.Traffic(total=0, copies=0)


def test_reads_are_what_each_instruction_takes_of_an_argument():
    """Slices in the loop, the whole array beside it; how often the loop turns does not matter."""
    text = MOVED.replace("constant(20)", "parameter(1)")
    row, array = 16 * 4, 4 * 16 * 4
    assert hlo.reads(text, "cache.kv_layers[0]") == {"part": row, "start": 2 * row}
    assert hlo.reads(text, "q") == {"near": array, "f": array, "o": 2 * array}
    assert hlo.reads(text, "cache.kv_layers[1]") == {}


CALLED = """\
HloModule jit_step

%turn (p: (f32[4], f32[4])) -> (f32[4], f32[4]) {
  %p = (f32[4], f32[4]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %y = f32[4]{0} get-tuple-element(%p), index=1
  %sum = f32[4]{0} add(%x, %y)
  ROOT %next = (f32[4], f32[4]) tuple(%y, %x)
}

%cond (p.1: (f32[4], f32[4])) -> pred[] {
  ROOT %always = pred[] parameter(1)
}

%branch (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%b, %b)
}

%same (s: f32[4]) -> f32[4] {
  ROOT %s = f32[4]{0} parameter(0)
}

%part (v: f32[4], h: f32[4]) -> f32[4] {
  %v = f32[4]{0} parameter(0)
  %h = f32[4]{0} parameter(1)
  ROOT %chosen = f32[4]{0} conditional(%flag, %v, %h), true_computation=%branch, false_computation=%same
}

ENTRY %main (k: f32[4], v.1: f32[4]) -> f32[4] {
  %k = f32[4]{0} parameter(0), metadata={op_name="cache.k"}
  %v.1 = f32[4]{0} parameter(1), metadata={op_name="cache.v"}
  %init = (f32[4], f32[4]) tuple(%k, %other)
  %w = (f32[4], f32[4]) while(%init), condition=%cond, body=%turn
  %first = f32[4]{0} get-tuple-element(%w), index=0
  %c = f32[4]{0} call(%v.1, %first), to_apply=%part
  ROOT %last = f32[4]{0} negate(%c)
}
"""


def test_an_argument_is_followed_through_loops_calls_and_branches():
    """The two arrays of the loop change places in each turn; only the second branch returns its operand."""
    assert hlo.reads(CALLED, "cache.k") == {"sum": 32, "last": 16}
    assert hlo.reads(CALLED, "cache.v") == {"twice": 32}
