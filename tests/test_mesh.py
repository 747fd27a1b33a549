import jax
import pytest
from jax.sharding import PartitionSpec as P

from cla_jax.config import MeshConfig
from cla_jax.mesh import AxisRules, axis_rules, check_batch, make_mesh
from tests.conftest import MODEL, replace


def mesh(**axes):
    return make_mesh(MeshConfig(**axes))


def test_one_axis_takes_what_is_left():
    assert dict(mesh(data=2).shape) == {"data": 2, "fsdp": 4, "model": 1}
    assert dict(mesh(data=-1, fsdp=2, model=2).shape) == {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "fsdp": 2, "model": 1}, {"model": 16}])
def test_a_mesh_must_use_the_devices_there_are(axes):
    with pytest.raises(ValueError, match=r"placement.mesh.* 8 devices"):
        mesh(**axes)


def test_heads_move_from_k_to_g():
    tensor = mesh(fsdp=4, model=2)
    assert axis_rules(replace(MODEL, n_kv_heads=2), tensor).kv_heads == "model"
    mqa = axis_rules(MODEL, tensor)
    assert (mqa.kv_heads, mqa.q_groups) == (None, "model")
    with pytest.raises(ValueError, match=r"n_kv_heads = 1 nor the 4"):
        axis_rules(replace(MODEL, vocab_size=264), mesh(fsdp=1, model=8))


@pytest.mark.parametrize(
    ("changes", "axes", "words"),
    [
        ({"d_model": 36}, {"fsdp": 8}, "model.d_model = 36.*fsdp = 8"),
        ({"d_ff": 49}, {"fsdp": 4, "model": 2}, "model.d_ff = 49.*model = 2"),
        ({"vocab_size": 261}, {"fsdp": 4, "model": 2}, "model.vocab_size = 261.*model = 2"),
    ],
)
def test_what_does_not_divide_is_refused(changes, axes, words):
    with pytest.raises(ValueError, match=words):
        axis_rules(replace(MODEL, **changes), mesh(**axes))


def test_batch_must_divide(tiny):
    check_batch(tiny(), mesh())
    with pytest.raises(ValueError, match=r"accumulate = 2 microbatches gives 4 rows.* 1 x 8"):
        check_batch(tiny(**{"placement.accumulate": 2}), mesh())
    with pytest.raises(ValueError, match="eval_batch_size = 12"):
        check_batch(tiny(**{"placement.eval_batch_size": 12}), mesh())


def test_specs():
    rules = AxisRules(kv_heads="model")
    assert rules.spec("batch") is None  # no mesh is set
    with jax.set_mesh(mesh()):
        assert rules.spec("batch", None) == P(("data", "fsdp"), None)
        assert rules.spec("embed", "kv_heads", "q_groups", "head") == P("fsdp", "model", None, None)
        assert rules.gathered().spec("embed", "ff") == P(None, "model")
    with pytest.raises(ValueError, match=r"batch and embed.*'fsdp'"):
        rules.partition("batch", "embed")
