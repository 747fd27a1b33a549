"""Programs for GPUs, compiled by jax's CUDA plugin; none is needed, and nothing runs (`make test-gpu`)."""

import json

import pytest

from cla_jax import plan
from launch import plan as launch_plan

pytestmark = pytest.mark.gpu

SMALL = ["--model.n-layers", "4", "--model.d-model", "256", "--model.d-ff", "512"]


@pytest.fixture(autouse=True, scope="module")
def elsewhere():
    with launch_plan.compiling_elsewhere():
        yield


@pytest.mark.parametrize(
    ("topology", "spans_hosts"),
    [("h100:8", False), ("h100:2x8", True), ("a100-80:8", False), ("b200:8", False)],
)
def test_one_step_is_planned_for_gpus(capsys, topology, spans_hosts):
    """The real step, with cuDNN's attention; the JSON of the plan."""
    arguments = ["cla_1b.h128_mqa_cla2", "--topology", topology, "--json", "--"]
    launch_plan.main([*arguments, *SMALL, "--batch-size", "32"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["attention"] == "cudnn"
    assert 0 < found["mfu"] < 1
    # Gradients of weights are reduce-scattered.
    assert found["collective_bytes"]["all-gather"] > 0
    assert found["collective_bytes"]["reduce-scatter"] > 0
    assert bool(found["network_bytes"]) is spans_hosts
    assert ("network" in found["roofline"]) is spans_hosts
    assert len(found["buffers"]) == 5


def test_slices_are_hosts_with_a_copy_each(capsys):
    arguments = ["cla_1b.h128_mqa", "--topology", "h100:8", "--slices", "2", "--"]
    launch_plan.main([*arguments, *SMALL, "--batch-size", "32"])
    shown = capsys.readouterr().out
    assert "2 x h100:8: 16 devices" in shown
    assert "over NVLink and through its network port" in shown
    assert launch_plan.UNTRIED in " ".join(shown.split())


def test_devices_are_as_on_the_real_machine():
    found = plan.topology("h200:4x8")
    assert len(found.devices) == 32
    assert found.devices[0].device_kind == "NVIDIA H200"
    assert found.devices[0].compute_capability == "9.0"
