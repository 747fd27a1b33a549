"""The planner, and what it sees of the sharded step; for TPUs with libtpu at hand (`make test-pods`)."""

import importlib.metadata
import json
import math
import multiprocessing
import os
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import experiments
from cla_jax import chips, hlo, plan
from cla_jax.config import MeshConfig
from cla_jax.plan import compiler, estimates, search, topologies
from cla_jax.session import plan_layout
from cla_jax.state import named
from cla_jax.step import compile_step, make_step
from launch import plan as launch_plan
from launch import train as launch_train
from tests.conftest import MODEL, equations, replace


def test_a_topology_that_does_not_exist_is_refused_with_those_near_it():
    with pytest.raises(ValueError, match=r"kind of accelerator .v5f.; did you mean .*v5e"):
        topologies.topology("v5f:4x4")
    with pytest.raises(ValueError, match=r"unknown topology 'v5e:16x17'; similar ones: v5e:16x16"):
        topologies.topology("v5e:16x17")
    with pytest.raises(ValueError, match=r"unknown topology 'v5p:16x16'.*in chips"):
        topologies.topology("v5p:16x16")
    with pytest.raises(ValueError, match=r"kind of accelerator .h10.; did you mean .*h100"):
        topologies.topology("h10:8")
    with pytest.raises(
        ValueError, match=r"unknown topology 'h100:16x7'; similar ones: h100:16x8.* x GPUs"
    ):
        topologies.topology("h100:16x7")


def test_gpus_are_in_one_table_with_tpus():
    assert {"v5e:16x16", "h100:8", "h100:16x8", "h200:8", "a100-80:8", "b200:8"} <= set(
        chips.topology_names()
    )
    assert chips.gpu_shape("h100:8") == (1, 8)
    assert chips.gpu_shape("h100:12x8") == (12, 8)  # not in the table
    for kind, gpu in chips.GPUS.items():
        chip = chips.find(gpu.description)
        assert chip is not None
        assert chip.links == "NVLink"
        # What a program may use of what CUDA reports.
        assert chip.memory == pytest.approx(0.94 * gpu.memory)
        assert f"memory_bandwidth: {chip.bandwidth}" in chips.gpu_target(kind)
        assert gpu.description in chips.gpu_target(kind)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("v4:2x4x4", (False, False, False)),  # less than a cube
        ("v4:4x4x4", (True, True, True)),
        ("v5p:2x2x1", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("v7x:4x8x8", (True, True, True)),
        ("v5e:8x8", (False, False, False)),
        ("v5e:8x16", (False, True, False)),
        ("v5e:16x16", (True, True, False)),
        ("v6e:16x16", (True, True, False)),
    ],
)
def test_links_close_to_rings_where_those_of_a_pod_do(name, closed):
    assert chips.wrap(name) == closed


def test_the_least_time_of_a_step_is_that_of_the_slowest_resource(tiny):
    layout, chip = plan_layout(tiny()), chips.CHIPS["TPU v6e"]

    def slowest(flops, traffic, told):
        compiled = {
            "traffic": {"total": traffic},
            "collective_bytes": {"all-gather": told},
            "network_bytes": {},
        }
        seconds = estimates.roofline(layout, chip, flops * layout.mesh.size, compiled)
        assert set(seconds) == {"compute", "HBM", "interconnect"}
        return max(seconds, key=seconds.__getitem__)

    # Of v6e: 918 TFLOP/s, 1,640 GB/s, 360 GB/s.
    assert slowest(1.1 * 918e12, 1640e9, 360e9) == "compute"
    assert slowest(918e12, 1.1 * 1640e9, 360e9) == "HBM"
    assert slowest(918e12, 1640e9, 1.1 * 360e9) == "interconnect"


def test_without_libtpu_the_planner_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[plan\]'"):
        topologies.topology("v5e:4x4")


def test_without_the_compiler_for_gpus_the_planner_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies, "_installed", lambda package: "cudnn" not in package)
    with pytest.raises(
        ValueError, match=r"needs nvidia-cudnn-cu12: pip install -e '\.\[plan-gpu\]'"
    ):
        topologies.topology("h100:8")


def test_variables_of_the_user_do_not_keep_compilers_from_compiling_for_others(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
    before = dict(os.environ)
    with launch_plan.compiling_elsewhere():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert dict(os.environ) == before


def test_what_spans_hosts_takes_the_network_and_the_rest_nvlink(tiny):
    layout, chip = plan_layout(tiny()), chips.CHIPS["NVIDIA H100 80GB HBM3"]
    told = {"collective_bytes": {"all-gather": 90e9}, "network_bytes": {"all-gather": 15e9}}
    seconds = estimates.roofline(layout, chip, 0.0, {"traffic": {"total": 0}, **told})
    assert seconds == pytest.approx(
        {"compute": 0.0, "HBM": 0.0, "NVLink": 75 / 450, "network": 15 / 50}
    )


@pytest.mark.parametrize(
    ("message", "remedy"),
    [("\nUNIMPLEMENTED: cuDNN graph\nat x", "attention xla"), ("INTERNAL: y", "another version")],
)
def test_a_refusal_of_the_compiler_is_one_line_with_what_may_help(message, remedy):
    said = compiler.refusal("h100:8", message)
    assert "\n" not in said
    assert message.split("\n")[-2 if "cuDNN" in message else -1] in said
    assert remedy in said


def test_what_does_not_divide_is_refused_before_compiling(monkeypatch):
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled"))
    (config,) = experiments.find("cla_1b.h128_mqa")
    for changes, words in (
        ({"placement.mesh": MeshConfig(data=3)}, "3 x -1 x 1 does not match the 8"),
        ({"batch_size": 2044}, "gives 2044 rows.* 1 x 1 x 8 does not divide"),
        ({"model.d_model": 2044}, "d_model = 2044 is not divisible by placement.mesh.fsdp = 8"),
    ):
        with pytest.raises(ValueError, match=words):
            plan.plan(replace(config, **changes), topologies.topology("here"))


@pytest.mark.slow
def test_the_plan_of_a_mesh_at_hand_adds_up(tiny, monkeypatch):
    config = tiny(**{"placement.remat": "block"})
    found = plan.plan(config, topologies.topology("here"))
    state = named(plan_layout(tiny()).state)
    local = {k: math.prod(v.sharding.shard_shape(v.shape)) * 4 for k, v in state.items()}
    assert found.parts["parameters"] == sum(v for k, v in local.items() if k.startswith("model."))
    assert found.parts["optimizer"] + found.parts["parameters"] == sum(local.values())
    assert sum(found.parts.values()) == found.peak > sum(local.values())
    assert found.collective_bytes["all-gather"] > 0
    assert found.mfu() is None  # nobody knows what a CPU could do
    # The compiler of a CPU does not mind; the chip does.
    for memory, fits in ((found.peak, True), (found.peak - 1, False)):
        with monkeypatch.context() as patched:
            chip = replace(chips.CHIPS["NVIDIA H200"], memory=memory)
            patched.setattr(chips, "find", lambda _, chip=chip: chip)
            assert plan.plan(config, topologies.topology("here")).fits is fits


@pytest.mark.slow
def test_a_program_is_compiled_once(tiny, tmp_path, monkeypatch):
    first = plan.plan(tiny(), topologies.topology("here"), tmp_path / "plans")
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
        assert plan.plan(tiny(), topologies.topology("here"), tmp_path / "plans") == first
        # Neither names nor where the logs go are in the program; the depth is.
        renamed = plan.plan(tiny(name="other"), topologies.topology("here"), tmp_path / "plans")
        assert (renamed.name, renamed.peak) == ("other", first.peak)
    deeper = plan.plan(
        tiny(**{"model.n_layers": 6}), topologies.topology("here"), tmp_path / "plans"
    )
    assert deeper.peak > first.peak


def test_answers_of_a_compiler_are_kept_apart_by_the_code_that_reads_them(tmp_path, monkeypatch):
    """A mend there must not leave the figures of before."""
    keys = {compiler._key("a program", "v5e:2x2"), compiler._key("another", "v5e:2x2")}
    for module in (chips, hlo, topologies, compiler):
        mended = tmp_path / "mended.py"
        mended.write_text(Path(module.__file__).read_text() + "# mended\n")
        with monkeypatch.context() as patched:
            patched.setattr(module, "__file__", str(mended))
            keys.add(compiler._key("a program", "v5e:2x2"))
    assert len(keys) == 6
    assert compiler._key("a program", "v5e:2x2") in keys


def test_the_compiler_has_the_last_word_on_what_does_not_fit(monkeypatch):
    """The estimate may be too high for all there is."""
    Chip(monkeypatch, 0.5)
    (config,) = experiments.find("cla_3b.h128_mqa_cla2")
    estimate = estimates.estimate
    monkeypatch.setattr(
        search, "estimate", lambda layout: {k: 100 * v for k, v in estimate(layout).items()}
    )
    found, _ = search.search(config, topologies.Topology("v5e:2x4", 1, jax.devices()))
    assert found.fits


def bought(**changes):
    """A plan as launch.plan prints it: 256 chips of v5e, half of which the roofline leaves."""
    chip = chips.CHIPS["TPU v5 lite"]
    fields = {
        "name": "cla_1b/h128_mqa",
        "topology": "v5e:16x16",
        "devices": 256,
        "device_kind": "TPU v5 lite",
        "mesh": {"slice": 1, "data": 1, "fsdp": 256, "model": 1},
        "attention": "splash",
        "remat": "dots",
        "accumulate": 4,
        "rows": 8,
        "fits": True,
        "memory": chip.memory,
        "peak": 1,
        "parts": {},
        "estimate": 1,
        "flops": 0.5 * 2.0 * 256 * chip.flops,
        "recomputed_flops": 0.0,
        "collective_bytes": {},
        "network_bytes": {},
        "traffic": 1,
        "copied": 0,
        "roofline": {"compute": 1.0, "HBM": 1.5, "interconnect": 2.0},
        "buffers": (),
        "advice": "",
        "compile_seconds": 1.0,
    }
    return plan.Plan(**fields | changes)


def test_a_plan_prints_names_and_not_the_markup_in_them(capsys):
    (config,) = experiments.find("cla_1b.h128_mqa")
    where = "layers[bold]0[/bold]/transpose[axes]"
    buffer = SimpleNamespace(bytes=2**30, shape="bf16[8,2048]", where=where)
    found = bought(name="mine[/red]", fits=False, buffers=(buffer,), advice="set x[0]")
    launch_plan._print(found, config, 0.4)
    out = capsys.readouterr().out
    for words in ("mine[/red] on v5e:16x16", "bf16[8,2048]", where, "To make it fit: set x[0]"):
        assert words in out


def test_a_plan_says_what_a_run_costs():
    (config,) = experiments.find("cla_1b.h128_mqa")
    config = replace(config, steps=7200)
    training, assumed, least = launch_plan.cost(bought(), config, 0.4)
    assert training == "Training: 30.2 B tokens, in 7,200 steps."
    # Half of the peak is 2 s a step and 4 h in all; 40 % of it a quarter more.
    assert assumed == "At an MFU of 40%, on 256 chips: 5.0 hours, 1,280 chip-hours."
    assert least.startswith("At the roofline: 4.0 hours, 1,024 chip-hours.")
    assert "at least 2 s (" in least
    assert least.endswith(", an MFU of 50%.")
    assert "cannot be reached" in launch_plan.cost(bought(), config, 0.6)[1]
    days = launch_plan.cost(bought(), replace(config, steps=72_000), 0.25)[1]
    assert "3.3 days, 20,480 chip-hours" in days
    # jax sees two devices of a v7x chip.
    assert bought(device_kind="TPU7x").chips == 128
    (unknown,) = launch_plan.cost(bought(device_kind="cpu", roofline={}), config, 0.4)
    assert "30.2 B tokens" in unknown
    record = launch_plan._as_dict(bought(), config, 0.4)
    assert (record["chips"], record["tokens"]) == (256, 7200 * config.tokens_per_step)
    assert record["chip_hours"] == pytest.approx(1280)


@pytest.mark.parametrize(
    ("number", "text"), [(3e10, "30 B"), (245_760, "246 K"), (1.5e12, "1.5 T"), (12, "12")]
)
def test_counts_are_written_as_people_say_them(number, text):
    assert launch_plan.count(number) == text


def test_a_search_prints_the_command_that_trains_so():
    (config,) = launch_train.parse(["cla_1b.h128_mqa", "--steps", "9"])
    two = bought(mesh={"slice": 2, "data": 1, "fsdp": 256, "model": 1})
    command = launch_plan._command(two, config, ["--steps", "9"])
    assert command.startswith("python -m launch.train cla_1b.h128_mqa --steps 9 ")
    (trained,) = launch_train.parse(shlex.split(command)[3:])
    placement = trained.placement
    assert (placement.accumulate, placement.remat, placement.mesh.slice) == (4, "dots", 2)
    assert trained.steps == 9
    # A plan counts on more of a GPU's memory than jax takes by itself.
    gpus = bought(device_kind="NVIDIA H100 80GB HBM3", topology="h100:16x8")
    assert launch_plan._command(gpus, config, []).startswith(
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.94 python -m launch.train cla_1b.h128_mqa "
    )


@pytest.mark.parametrize(
    ("kind", "topology", "untried"),
    [
        ("NVIDIA H200", "h200:8", True),
        ("NVIDIA H200", "here", False),
        ("TPU v5 lite", "v5e:16x16", False),
    ],
)
def test_only_figures_of_gpus_that_are_not_here_are_called_unconfirmed(
    kind, topology, untried, capsys
):
    (config,) = experiments.find("cla_1b.h128_mqa")
    launch_plan._print(bought(device_kind=kind, topology=topology), config, 0.4)
    assert (launch_plan.UNTRIED in " ".join(capsys.readouterr().out.split())) is untried


class Chip:
    """A chip that needs what our estimate says, times a factor that only the compiler knows."""

    def __init__(self, monkeypatch, factor):
        self.factor, self.compiled = factor, 0
        chip = replace(chips.CHIPS["TPU v5 lite"], memory=64 * 2**30)
        monkeypatch.setattr(chips, "find", lambda _: chip)
        monkeypatch.setattr(plan, "compiled_step", self.compile)

    def peak(self, layout):
        return round(self.factor * sum(estimates.estimate(layout).values()))

    def compile(self, layout, _topology, _cache):
        self.compiled += 1
        peak = self.peak(layout)
        found = {"peak": peak, "fits": peak <= 64 * 2**30, "seconds": 1.0}
        traffic = {"total": 10**9, "copies": 0}
        told = {"collective_bytes": {}, "network_bytes": {}}
        return found | told | {"traffic": traffic, "buffers": []}


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_the_search_ends_at_the_fastest_that_fits_though_the_estimate_is_off(monkeypatch, factor):
    chip = Chip(monkeypatch, factor)
    (config,) = experiments.find("cla_1b.h128_mqa_cla2")
    found, compilations = search.search(config, topologies.Topology("v5e:2x4", 1, jax.devices()))
    assert compilations == chip.compiled <= search.MAX_COMPILATIONS
    # All there are, one by one: on eight chips 256 rows each.
    fitting = [
        (search.RECOMPUTES.index(remat), accumulate)
        for remat in search.RECOMPUTES
        for accumulate in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        for changes in [{"placement.remat": remat, "placement.accumulate": accumulate}]
        if chip.peak(plan_layout(replace(config, **changes))) <= 64 * 2**30
    ]
    assert (search.RECOMPUTES.index(found.remat), found.accumulate) == min(fitting)


def test_the_search_says_what_to_do_where_nothing_fits(monkeypatch):
    Chip(monkeypatch, 60.0)
    (config,) = experiments.find("cla_3b.h128_mqa_cla2")
    with pytest.raises(search.DoesNotFit, match=r"needs .* of 64.0 GiB. Use more chips"):
        search.search(config, topologies.Topology("v5e:2x4", 1, jax.devices()))


def test_a_program_that_does_not_fit_is_a_plan_too(monkeypatch, tiny):
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 8.75G."
    )
    assert compiler.needed_bytes(message) == 24.5 * 2**30
    other = "the total memory required for HLO temporaries (27.96G) exceeds available HBM (15.75G)"
    assert compiler.needed_bytes(other) == round(27.96 * 2**30)
    assert compiler.needed_bytes("INTERNAL: something else") is None
    assert compiler.needed_bytes("in memory space vmem. Used 129.00M of 128.00M vmem.") is None
    monkeypatch.setattr(compiler, "_compile", lambda *_: (compiler.needed_bytes(message), False))
    found = plan.plan(tiny(), topologies.topology("here"))
    assert not found.fits
    assert "placement.remat = block" in found.advice
    # Halving one row a device would be refused.
    one = tiny(**{"placement.remat": "block"})
    assert "more chips" in plan.plan(one, topologies.topology("here")).advice
    two = tiny(**{"placement.remat": "block", "batch_size": 16})
    assert "accumulate = 2" in plan.plan(two, topologies.topology("here")).advice


def lays_out_the_memory(_config, _name, _slices, dump, _outcome):
    """A compiler that has written what a plan needs, and would go on for an hour."""
    (dump / f"m.{compiler.REPORT}").write_text(
        "Memory Space: default\nTotal bytes: 12345 (12KiB)\n"
    )
    (dump / f"m.{compiler.LAST_OF_TPU}").write_text("ENTRY")
    time.sleep(3600)


def refuses(_config, _name, _slices, _dump, outcome):
    outcome.send(ValueError("placement.compiler_options = 'a=b': no such option"))


def dies(*_):
    os.write(2, b"a complaint\nout of luck\n")
    os._exit(11)


@pytest.mark.slow
def test_the_compiler_is_a_process_that_is_ended_when_it_has_said_enough(
    tiny, tmp_path, monkeypatch
):
    topology = topologies.Topology("v5e:2x4", 1, jax.devices())
    monkeypatch.setattr(compiler, "_compile_for", lays_out_the_memory)
    assert compiler._compile_apart(tiny(), topology, tmp_path) == (12345, True)
    assert not multiprocessing.active_children()
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.setattr(compiler, "_compile_for", refuses)
    with pytest.raises(ValueError, match="no such option"):
        compiler._compile_apart(tiny(), topology, empty)
    monkeypatch.setattr(compiler, "_compile_for", dies)
    with pytest.raises(
        ChildProcessError, match=r"died with exit code 11.*Its last output: out of luck"
    ):
        compiler._compile_apart(tiny(), topology, empty)


# ------------------------------------------------------------------------------- the sharded step


def compiled_on(config, tmp_path):
    layout = plan_layout(config)
    with jax.set_mesh(layout.mesh):
        compiler._compile(make_step(layout).lower(layout.state, layout.batch), tmp_path)
    return layout, hlo.find(tmp_path, "after_optimizations.txt")


def sharded(tiny, **changes):
    """Weights outweigh activations: eight layers, eight rows of 32 tokens."""
    model = {
        "model.n_layers": 8,
        "model.d_model": 64,
        "model.d_ff": 256,
        "placement.loss_chunk": 16,
    }
    return tiny(**model, **{"placement.remat": "block"}, **changes)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_bytes_of_the_state_fall_as_one_over_n(tiny, devices, n):
    """All but the norms, which every device keeps."""
    devices(n)
    layout = plan_layout(sharded(tiny))
    compiled = compile_step(layout)
    state = named(layout.state)
    norms = {k: v for k, v in state.items() if "norm" in k or v.ndim == 0}
    whole = sum(v.size * 4 for v in norms.values())
    split = sum(v.size * 4 for k, v in state.items() if k not in norms)
    tokens = math.prod(layout.batch.sharding.shard_shape(layout.batch.shape)) * 4
    assert compiled.memory_analysis().argument_size_in_bytes == split // n + whole + tokens


def test_no_step_gathers_the_whole_model_at_once(tiny, tmp_path):
    """What is gathered is one layer's: no array of the program is a whole stack of weights."""
    layout, text = compiled_on(sharded(tiny), tmp_path)
    weights = {k: v for k, v in named(layout.state.model).items() if v.ndim > 1}
    stacked = {v.shape for k, v in weights.items() if "blocks" in k and "norm" not in k}
    seen = {dims for _, dims, _ in hlo.shapes(text)}
    assert stacked
    assert not stacked & seen
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    largest = max(
        nbytes for line in gathered for _, _, nbytes in hlo.shapes(line.split(" all-gather(")[0])
    )
    one_layer = max(math.prod(v.shape[2:]) * 4 for k, v in weights.items() if "blocks" in k)
    table = MODEL.vocab_size * 64 * 4
    assert 0 < largest <= max(one_layer, table)


def test_keys_and_values_are_computed_once_a_group(tiny):
    """8 layers in 4 groups of two project 4 times."""
    config = sharded(tiny, **{"placement.mesh": MeshConfig(data=2, fsdp=2, model=2)})
    layout = plan_layout(
        replace(config, **{"placement.scan_layers": False, "placement.remat": "none"})
    )
    with jax.set_mesh(layout.mesh):
        jaxpr = jax.make_jaxpr(make_step(layout))(layout.state, layout.batch)
    names = [
        str(e.source_info.name_stack)
        for e in equations(jaxpr.jaxpr)
        if "dot_general" in str(e.primitive)
    ]
    forward = [name for name in names if "kv_projection" in name and "transpose" not in name]
    assert len(forward) == 2 * 4  # the first microbatch, and the loop over those after it


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_no_device_asks_another_for_keys_or_values(tiny, tmp_path, remat):
    """Nor for queries: of what ends in a head's width only weights, which have no positions, are moved."""
    config = sharded(tiny, **{"placement.mesh": MeshConfig(data=2, fsdp=2, model=2)})
    config = replace(config, **{"data.seq_len": 48, "placement.remat": remat})
    layout, text = compiled_on(config, tmp_path)
    T, H = config.data.seq_len, config.model.d_head
    tokens = config.batch_size * T
    of_positions = {T, tokens, tokens // 2, tokens // 4}
    assert not of_positions & {d for leaf in named(layout.state).values() for d in leaf.shape}
    moved = (" all-gather(", " all-to-all(", " collective-permute(")
    lines = [line for line in text.splitlines() if any(kind in line for kind in moved)]
    assert lines
    for line in lines:
        for _, dims, _ in hlo.shapes(line.split("(")[0]):
            assert H not in dims[-1:] or not of_positions & set(dims), line


@pytest.mark.slow
def test_what_enters_a_block_is_kept_in_parts(tiny, tmp_path, monkeypatch):
    """By tensor parallelism too: its devices would all keep the same."""
    config = sharded(tiny, **{"placement.mesh": MeshConfig(data=2, fsdp=2, model=2)})
    config = replace(config, **{"model.d_ff": 96, "batch_size": 32})
    odd = replace(config, **{"placement.loss_chunk": 64, "data.seq_len": 33})
    assert plan_layout(odd).training_options.rules.sequence is None
    groups, rows, T, D = 4, config.batch_size // 4, config.data.seq_len, config.model.d_model

    def kept(part, name):
        (dump := tmp_path / name).mkdir()
        layout, text = compiled_on(config, dump)
        seen = {dims for _, dims, _ in hlo.shapes(text)}
        assert {(groups, rows, T // n, D) for n in (1, 2)} & seen == {(groups, rows, part, D)}
        return estimates.estimate(layout)["activations"]

    split = kept(T // 2, "split")
    monkeypatch.setattr("cla_jax.mesh.sequence_parallel", lambda rules, mesh, seq_len: rules)
    assert kept(T, "whole") - split == config.model.n_layers * rows * T // 2 * D * 4


# ----------------------------------------------------------------------------------- on TPUs


@pytest.fixture(autouse=True, scope="module")
def elsewhere():
    with launch_plan.compiling_elsewhere():
        yield


@pytest.mark.pods
def test_one_step_is_planned_for_a_slice(capsys):
    """The real step, with the splash kernel, forward and backward; the table and the JSON."""
    arguments = ["cla_1b.h128_mqa_cla2", "--topology", "v5e:2x4", "--json", "--"]
    small = ["--model.n-layers", "4", "--batch-size", "16", "--model.d-model", "256"]
    launch_plan.main([*arguments, *small, "--model.d-ff", "512"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["attention"] == "splash"
    assert found["devices"] == 8
    assert 0 < found["mfu"] < 1
    assert found["collective_bytes"]["all-gather"] > 0
    assert len(found["buffers"]) == 5


@pytest.mark.pods
@pytest.mark.parametrize(
    ("study", "name", "remat", "limit"),
    [
        ("cla_1b", "v5e:16x16", "block", 2.85),
        ("cla_1b", "v5p:4x4x8", "block", 5.6),
        ("cla_1b", "v5e:16x16", "dots", 12),
        ("cla_3b", "v6e:16x16", "dots", 27.5),
    ],
)
def test_the_step_changes_hardly_a_layout_and_sharing_lowers_its_peak(study, name, remat, limit):
    """docs/pods.md has the figures, of other topologies and maps too."""
    topology = topologies.topology(name)
    plans = []
    for sharing in ("", "_cla2"):
        (config,) = experiments.find(f"{study}.h128_mqa{sharing}")
        plans.append(plan.plan(replace(config, **{"placement.remat": remat}), topology))
    for found in plans:
        assert found.copied < 0.01 * found.traffic
        assert found.estimate == pytest.approx(found.peak, rel=0.05)
    mqa, cla2 = plans
    assert cla2.peak <= mqa.peak <= limit * 2**30


@pytest.mark.pods
@pytest.mark.parametrize(
    ("d_head", "n_heads", "n_kv_heads"),
    [(32, 4, 4), (46, 3, 1), (90, 2, 1), (256, 2, 1), (512, 2, 2)],
)
def test_splash_compiles_for_every_head_size_of_the_paper(tiny, d_head, n_heads, n_kv_heads):
    """With documents kept apart too. Compiled, not run."""
    heads = {"d_head": d_head, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    config = tiny(
        **{f"model.{name}": value for name, value in heads.items()},
        **{"data.seq_len": 256, "model.compute_dtype": "bfloat16", "batch_size": 4},
        **{"data.attend_across_documents": False, "placement.loss_chunk": 128},
        **{"placement.eval_batch_size": 4},
    )
    layout = plan_layout(config, topologies.topology("v5e:2x2").devices)
    assert layout.options.attention == "splash"
    assert compile_step(layout).memory_analysis().temp_size_in_bytes > 0


@pytest.mark.pods
@pytest.mark.parametrize(("topology", "slices"), [("v5p:2x2x2", 1), ("v6e:4x4", 1), ("v5e:2x4", 2)])
def test_heads_and_widths_can_be_split_on_every_torus(tiny, topology, slices):
    """An axis of the mesh need not be one of the torus."""
    mesh = MeshConfig(slice=slices, data=2, fsdp=-1, model=2)
    config = tiny(**{"placement.mesh": mesh, "batch_size": 32, "model.compute_dtype": "bfloat16"})
    layout = plan_layout(config, topologies.topology(topology, slices).devices)
    assert layout.mesh.shape["model"] == 2
    assert compile_step(layout).memory_analysis().generated_code_size_in_bytes > 0


@pytest.mark.pods
def test_a_step_that_does_not_fit_names_its_largest_buffers():
    (config,) = experiments.find("cla_3b.h128_mqa_cla2")
    config = replace(
        config, **{"batch_size": 64, "placement.remat": "none", "placement.eval_batch_size": 64}
    )
    found = plan.plan(config, topologies.topology("v5e:2x2"))
    assert not found.fits
    assert found.peak > found.memory
    assert len(found.buffers) == 5
    assert any(buffer.where for buffer in found.buffers)
