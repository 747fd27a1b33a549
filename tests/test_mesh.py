from types import SimpleNamespace

import jax
import pytest
from jax.sharding import PartitionSpec as P

import experiments
from cla_jax import mesh as meshes
from cla_jax.config import MeshConfig
from cla_jax.mesh import AxisRules, axis_rules, check_batch, make_mesh
from cla_jax.session import EvaluationSession, plan_layout
from tests.conftest import MODEL, replace


def mesh(**axes):
    return make_mesh(MeshConfig(**axes))


def test_one_axis_takes_what_is_left():
    sizes = lambda **axes: tuple(mesh(**axes).shape.items())
    assert sizes(data=2) == (("slice", 1), ("data", 2), ("fsdp", 4), ("model", 1))
    assert dict(sizes(data=-1, fsdp=2, model=2))["data"] == 2
    assert dict(sizes(slice=2))["fsdp"] == 4


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "fsdp": 2, "model": 1}, {"model": 16}])
def test_a_mesh_must_use_the_devices_there_are(axes):
    with pytest.raises(ValueError, match=r"placement.mesh.* 8 devices"):
        mesh(**axes)


def test_heads_move_from_k_to_g():
    tensor = mesh(fsdp=4, model=2)
    assert axis_rules(replace(MODEL, n_kv_heads=2), tensor).kv_heads == "model"
    mqa = axis_rules(MODEL, tensor)
    assert (mqa.kv_heads, mqa.q_groups) == (None, "model")


def test_an_fsdp_axis_must_divide_what_every_weight_has():
    with pytest.raises(ValueError, match=r"model.d_model = 36.*fsdp = 8"):
        axis_rules(replace(MODEL, d_model=36), mesh(fsdp=8))


@pytest.mark.parametrize(
    ("changes", "axis", "words"),
    [
        ({"d_ff": 49}, "ff", "model.d_ff = 49"),
        ({"vocab_size": 261}, "vocab", "model.vocab_size = 261"),
        ({"n_heads": 3}, "q_groups", "model.n_kv_heads = 1, query heads of a KV head = 3"),
    ],
)
def test_what_the_model_axis_does_not_divide_stays_whole(changes, axis, words, caplog):
    rules = axis_rules(replace(MODEL, **changes), mesh(fsdp=4, model=2))
    others = {"ff", "vocab", "q_groups"} - {axis}
    assert getattr(rules, axis) is None
    assert all(getattr(rules, other) == "model" for other in others)
    assert f"SLOW: placement.mesh.model = 2 does not divide {words}" in caplog.text


def choose_mesh(config, devices):
    rows = config.batch_size // config.placement.accumulate
    asked = config.placement.mesh
    return meshes.choose_mesh(asked, config.model, rows, config.data.seq_len, devices)


def chips(n: int, kind: str, slices: int = 1):
    return [
        SimpleNamespace(device_kind=kind, slice_index=i * slices // n, platform="tpu")
        for i in range(n)
    ]


def test_auto_splits_weights_over_all_chips_where_that_hides_behind_computing():
    """The paper's batch on 256 chips of v5e is far above the critical 1,094 tokens per chip."""
    (config,) = experiments.find("cla_1b.h128_mqa")
    config = replace(config, **{"placement.mesh": MeshConfig(auto=True)})
    mesh, why = choose_mesh(config, chips(256, "TPU v5 lite"))
    assert mesh == MeshConfig(data=1, fsdp=256, model=1)
    assert why.startswith("16,384 tokens per device and microbatch, above the 1,094")
    two = replace(config, **{"placement.mesh.slice": 2})
    assert choose_mesh(two, chips(512, "TPU v5 lite", 2))[0] == MeshConfig(slice=2, fsdp=256)


@pytest.mark.parametrize(
    ("rows", "seq_len", "expected"),
    [
        (
            256,
            1024,
            MeshConfig(fsdp=128, model=2),
        ),  # 1,024 tokens per chip are too few; two chips' are not
        (64, 2048, MeshConfig(fsdp=64, model=4)),  # fewer rows than chips
        (
            16,
            2048,
            MeshConfig(fsdp=16, model=16),
        ),  # beyond what tensor parallelism hides, but possible
    ],
)
def test_auto_splits_heads_and_widths_where_tokens_are_few(rows, seq_len, expected):
    (config,) = experiments.find("cla_1b.h128_mqa")
    changes = {"batch_size": rows, "data.seq_len": seq_len, "placement.mesh.auto": True}
    mesh, _ = choose_mesh(replace(config, **changes), chips(256, "TPU v5 lite"))
    expected_tokens = rows // expected.fsdp * seq_len
    assert mesh == expected, expected_tokens


def test_auto_copies_parameters_where_fsdp_cannot_divide_the_model():
    (config,) = experiments.find("cla_1b.h128_mqa")
    config = replace(config, **{"batch_size": 96 * 8, "placement.mesh.auto": True})
    mesh, _ = choose_mesh(config, chips(96, "TPU v5"))
    assert (mesh.data, mesh.fsdp, mesh.model) == (3, 32, 1)
    mesh, _ = choose_mesh(replace(config, batch_size=6), chips(4, "TPU v5"))
    assert (mesh.data, mesh.fsdp, mesh.model) == (1, 2, 2)
    mesh, why = choose_mesh(config, jax.devices())
    assert mesh.fsdp == 8
    assert "no bandwidths are known for cpu" in why


def test_slices_of_the_devices_must_be_said():
    with pytest.raises(ValueError, match=r"mesh.slice = 1, but the devices form 2 slices"):
        make_mesh(MeshConfig(), chips(4, "TPU v5", 2))


def test_batch_must_divide(tiny):
    check_batch(tiny(), mesh())
    with pytest.raises(ValueError, match=r"accumulate = 2 gives 4 rows.* 1 x 1 x 8"):
        check_batch(tiny(**{"placement.accumulate": 2}), mesh())


@pytest.mark.parametrize(("asked", "rows"), [(12, 16), (8, 8)])
def test_an_evaluation_takes_as_many_rows_as_the_devices_can_share(tiny, asked, rows):
    layout = plan_layout(tiny())
    session = EvaluationSession(
        model=layout.config.model,
        data=layout.config.data,
        prepared=None,
        mesh=layout.mesh,
        options=layout.options,
        batch_size=asked,
        loss_chunk=64,
    )
    assert session.rows == rows


def test_specs():
    rules = AxisRules(kv_heads="model")
    assert rules.spec("batch") is None  # no mesh is set
    with jax.set_mesh(mesh()):
        assert rules.spec("batch", None) == P(("slice", "data", "fsdp"), None)
        assert rules.spec("embed", "kv_heads", "q_groups", "head") == P("fsdp", "model", None, None)
        assert rules.gathered().spec("embed", "ff") == P(None, "model")
    with pytest.raises(ValueError, match=r"batch and embed.*'fsdp'"):
        rules.partition("batch", "embed")
