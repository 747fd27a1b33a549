import dataclasses
import json
import re

import pytest

import experiments
from cla_jax.config import (
    WSD,
    Component,
    Config,
    Constant,
    Cosine,
    DataConfig,
    FromRun,
    LatentKV,
    LinearScaling,
    Llama3Scaling,
    MeshConfig,
    NoScaling,
    Placement,
    Scratch,
    SquaredReLU,
    YarnScaling,
)
from cla_jax.config.record import from_record, run_identity, to_record
from cla_jax.fields import difference, from_dict, replaced, unions, variants
from launch.cli import read_config
from launch.sweeps import trials
from tests.conftest import MODEL, replace


def test_round_trip_through_json(tiny):
    config = tiny(**{"placement.mesh": MeshConfig(data=2, fsdp=4)})
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(Config, fields) == config


def test_identity_leaves_out_name_and_placement(tiny):
    a, b = tiny(), tiny(name="other", **{"placement.remat": "block"})
    assert run_identity(a) == run_identity(b)
    c = tiny(**{"optimizer.peak_lr": 0.5, "model.d_head": 6})
    assert difference(run_identity(a), run_identity(c)) == {
        "model.d_head": (8, 6),
        "optimizer.peak_lr": (0.01, 0.5),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_kv_heads": 3}, ["model.n_heads = 4", "model.n_kv_heads = 3"]),
        ({"model.d_head": 7}, ["model.d_head = 7", "even"]),
        ({"model.n_layers": 0}, ["model.n_layers = 0"]),
        ({"model.init_std": 0.0}, ["model.init_std"]),
        ({"model.rope_theta": 0.0}, ["model.rope_theta = 0.0"]),
        (
            {"model.rope_scaling": LinearScaling(), "model.rope_scaling.factor": -2.0},
            ["model.rope_scaling.factor = -2.0 must be positive"],
        ),
        (
            {"model.rope_scaling": YarnScaling(), "model.rope_scaling.beta_fast": 1.0},
            ["beta_slow = 1.0 must be below", "beta_fast = 1.0"],
        ),
        (
            {"model.rope_scaling": LinearScaling(), "model.rope_scaling.factor": 0.5},
            ["model.rope_scaling.factor = 0.5 must be at least 1"],
        ),
        ({"model.rope_theta": 1.0}, ["model.rope_theta = 1.0 must be above 1"]),
        (
            {"model.rope_scaling": Llama3Scaling(), "model.rope_scaling.low_freq_factor": 4.0},
            ["low_freq_factor = 4.0 must be below", "high_freq_factor = 4.0"],
        ),
        ({"model.rope_scaling": "linear:2"}, ["model.rope_scaling = 'linear:2'", "LinearScaling"]),
        ({"optimizer.schedule": "wsd"}, ["optimizer.schedule = 'wsd'", "Cosine, WSD, Constant"]),
        ({"start": "runs/a"}, ["start = 'runs/a' must be one of Scratch, FromRun"]),
        ({"model.norm_eps": 0.0}, ["model.norm_eps = 0.0"]),
        ({"model.kv_map": "0,0"}, ["2 entries", "4"]),
        ({"model.windows": "8,0"}, ["layer 1 has window 0", "layer 0", "has window 8"]),
        ({"model.windows": "8,8,8,8,8"}, ["model.windows", "5 entries", "model.n_layers = 4"]),
        ({"model.windows": "8,-1"}, ["model.windows = '8,-1'"]),
        ({"model.kv_norm": "shared"}, ["model.kv_norm", "own, block"]),
        ({"model.compute_dtype": "float16"}, ["model.compute_dtype", "bfloat16"]),
        ({"model.vocab_size": 256}, ["model.vocab_size = 256", "257", "byte"]),
        ({"data.tokenizer": "bpe:100"}, ["data.tokenizer", "257"]),
        ({"data.tokenizer": "bite"}, ["data.tokenizer", "byte"]),
        ({"data.source": "sotou"}, ["data.source", "sotu"]),
        ({"data.source": "jsonl"}, ["data.source", "jsonl:"]),
        ({"data.source": "sotu:0"}, ["sotu:N"]),
        ({"data.held_out": 1.0}, ["data.held_out = 1.0"]),
        ({"data.seq_len": 24}, ["data.seq_len = 24", "placement.loss_chunk = 16"]),
        ({"optimizer.peak_lr": -1.0}, ["optimizer.peak_lr = -1.0"]),
        ({"optimizer.rule.eps": 0.0}, ["optimizer.rule.eps = 0.0"]),
        ({"optimizer.clip_norm": 0.0}, ["optimizer.clip_norm = 0.0"]),
        (
            {"optimizer.schedule.warmup_fraction": 1.5},
            ["optimizer.schedule.warmup_fraction = 1.5", "0 to 1"],
        ),
        (
            {"optimizer.schedule.final_fraction": -0.1},
            ["optimizer.schedule.final_fraction = -0.1", "0 to 1"],
        ),
        ({"optimizer.rule.b1": -0.1}, ["optimizer.rule.b1 = -0.1"]),
        ({"optimizer.rule.b2": 1.0}, ["optimizer.rule.b2 = 1.0"]),
        ({"optimizer.peak_lr": float("nan")}, ["optimizer.peak_lr = nan"]),
        ({"optimizer.rule.weight_decay": -0.1}, ["optimizer.rule.weight_decay"]),
        ({"batch_size": 0}, ["batch_size = 0"]),
        ({"steps": 0}, ["steps = 0"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"seed": 2**32}, ["seed = 4294967296", "2**32 - 1"]),
        ({"name": "../x"}, ["name = '../x'"]),
        ({"placement.accumulate": 3}, ["batch_size = 8", "placement.accumulate = 3"]),
        ({"placement.keep": 1}, ["placement.keep = 1"]),
        ({"placement.log_every": 0}, ["placement.log_every = 0"]),
        ({"placement.save_every": 0}, ["placement.save_every = 0"]),
        ({"placement.loss_chunk": 0}, ["placement.loss_chunk = 0"]),
        ({"placement.eval_batch_size": 0}, ["placement.eval_batch_size = 0"]),
        ({"placement.eval_every": -1}, ["placement.eval_every = -1"]),
        ({"placement.profile": "5"}, ["placement.profile = '5'", "STEP:COUNT"]),
        ({"placement.profile": "0:5"}, ["placement.profile = '0:5'", "positive"]),
        ({"placement.profile": "2:0"}, ["placement.profile = '2:0'", "positive"]),
        ({"placement.profile": "2:-1"}, ["placement.profile = '2:-1'"]),
        ({"placement.profile": "5:1"}, ["placement.profile = '5:1'", "steps = 4"]),
        ({"placement.remat": "all"}, ["placement.remat"]),
        ({"placement.attention": "flash"}, ["placement.attention = 'flash'", "cudnn"]),
        ({"placement.mesh.data": 0}, ["placement.mesh.data = 0"]),
        ({"placement.mesh.data": -1}, ["only one axis"]),
    ],
)
def test_refusals_name_field_and_numbers(tiny, changes, words):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    for word in words:
        assert word in str(error.value)


def test_from_dict_names_unknown_missing_and_mistyped_fields(tiny):
    fields = dataclasses.asdict(tiny())
    with pytest.raises(ValueError, match=r"'stepz'.*steps"):
        from_dict(Config, fields | {"stepz": 3})
    with pytest.raises(ValueError, match=r"field of model 'd_hed'.*d_head"):
        from_dict(Config, fields | {"model": fields["model"] | {"d_hed": 3}})
    with pytest.raises(ValueError, match="batch_size is missing"):
        from_dict(Config, {key: fields[key] for key in fields if key != "batch_size"})
    for value in ("8", 8.0, True, None):
        with pytest.raises(ValueError, match="batch_size"):
            from_dict(Config, fields | {"batch_size": value})


def test_a_union_is_read_by_its_kind(tiny):
    config = tiny(**{"optimizer.schedule": WSD(decay_fraction=0.3)})
    record = dataclasses.asdict(config)
    assert record["optimizer"]["schedule"]["kind"] == "wsd"
    assert from_dict(Config, record) == config
    schedule = record["optimizer"]["schedule"]
    for changed, words in [
        (schedule | {"kind": "wsb"}, "optimizer.schedule.kind = 'wsb' must be one of cosine, wsd"),
        (
            {"warmup_fraction": 0.1},
            r"optimizer\.schedule\.kind is missing: give one of cosine, wsd",
        ),
        ("wsd", "optimizer.schedule = 'wsd' must be a dict of fields"),
        (
            schedule | {"kind": "constant"},
            r"unknown field of optimizer\.schedule \(constant\) 'decay_fraction'",
        ),
        (schedule | {"decay_fraction": 0.99}, "must add up to at most 1"),
    ]:
        optimizer = record["optimizer"] | {"schedule": changed}
        with pytest.raises(ValueError, match=words):
            from_dict(Config, record | {"optimizer": optimizer})


def test_records_from_before_there_were_schedules_are_read(tiny):
    config = tiny(**{"optimizer.schedule.warmup_fraction": 0.2})
    record = to_record(config)
    schedule = record["identity"]["optimizer"].pop("schedule")
    del schedule["kind"]
    record["identity"]["optimizer"] |= schedule
    assert from_record(record) == config


def test_a_field_that_runs_are_older_than_is_left_out_at_its_default(tiny):
    identity = run_identity(tiny())
    assert not identity["model"].keys() & {"kv", "mlp", "qk_norm"}
    changed = tiny(**{"model.mlp": SquaredReLU()})
    assert run_identity(changed)["model"].pop("mlp") == {"kind": "relu2"}
    assert from_record(to_record(changed)) == changed


@pytest.mark.parametrize(
    ("text", "scaling"),
    [
        ("none", NoScaling()),
        ("linear:2.5", LinearScaling(factor=2.5)),
        (
            "llama3:8:1:4:64.0",
            Llama3Scaling(factor=8.0, original_max_position_embeddings=64),
        ),
        (
            "yarn:4:16:2:64:1.1",
            YarnScaling(
                factor=4.0,
                beta_fast=16.0,
                beta_slow=2.0,
                original_max_position_embeddings=64,
                attention_factor=1.1,
            ),
        ),
    ],
)
def test_records_from_when_rope_scaling_was_a_text_are_read(tiny, text, scaling):
    record = to_record(tiny(**{"model.rope_scaling": scaling}))
    record["identity"]["model"]["rope_scaling"] = text
    read = from_record(record)
    assert read == tiny(**{"model.rope_scaling": scaling})
    assert run_identity(read) == run_identity(from_record(json.loads(json.dumps(to_record(read)))))


@pytest.mark.parametrize("text", ["lama3:8", "linear", "linear:x", "yarn:4", "llama3:8:1:4:64.5"])
def test_another_text_of_rope_scaling_is_refused(tiny, text):
    record = to_record(tiny())
    record["identity"]["model"]["rope_scaling"] = text
    with pytest.raises(ValueError, match=r"model\.rope_scaling"):
        from_record(record)


def test_a_change_of_kind_keeps_what_both_have(tiny):
    config = tiny(**{"optimizer.schedule.warmup_fraction": 0.2})
    changes = {"optimizer.schedule.kind": "wsd", "optimizer.schedule.decay_fraction": 0.3}
    expected = WSD(warmup_fraction=0.2, decay_fraction=0.3)
    assert replaced(config, changes).optimizer.schedule == expected
    with pytest.raises(ValueError, match=r"optimizer\.schedule\.kind = 'wsb'"):
        replaced(config, {"optimizer.schedule.kind": "wsb"})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.kv_map", (0, 0), r"model\.kv_map = \(0, 0\) is not of type str"),
        ("optimizer.schedule", "wsd", "with a kind of cosine, wsd"),
        ("model.rope_scaling", "linear:2", "with a kind of none, linear, llama3, yarn"),
        ("optimizer.schedule.decay_fraction", 0.2, "unknown field of optimizer.schedule"),
        ("optimizer.schedule.warmup_fraction", "0.2", "is not of type float"),
        ("optimizer.schedule.kind.x", 1, r"optimizer\.schedule\.kind = 'cosine' has no fields"),
        ("optimizer.peak_lr", None, r"optimizer\.peak_lr = None is not of type float"),
        ("seed", "1", "seed = '1' is not of type int"),
    ],
)
def test_a_change_of_another_type_is_refused_with_the_field(tiny, field, value, words):
    with pytest.raises(ValueError, match=words):
        replaced(tiny(), {field: value})


def test_an_identity_that_is_no_record_is_refused(tiny):
    with pytest.raises(ValueError, match=r"identity = \[1\] is not a record"):
        from_record(to_record(tiny()) | {"identity": [1]})


def test_a_command_line_chooses_a_kind_and_keeps_what_both_have(tiny, capsys):
    config = tiny(**{"optimizer.schedule": Cosine(warmup_fraction=0.2, final_fraction=0.3)})
    words = ["--optimizer.schedule.decay-fraction", "0.5", "--optimizer.schedule.kind", "wsd"]
    expected = WSD(warmup_fraction=0.2, decay_fraction=0.5, final_fraction=0.3)
    assert read_config(config, words).optimizer.schedule == expected
    assert read_config(
        config, ["--optimizer.schedule.kind=constant"]
    ).optimizer.schedule == Constant(warmup_fraction=0.2)
    for words, said in [
        (["--optimizer.schedule.kind", "wsb"], "'wsb' must be one of cosine, wsd, constant"),
        (["--optimizer.schedule.kind"], "--optimizer.schedule.kind needs a value"),
        (["--optimizer.schedule.kind", "--steps", "4"], "--optimizer.schedule.kind needs a value"),
        (["--optimizer.schedule.kin", "wsd"], "did you mean --optimizer.schedule.kind"),
        (["--optimizer.warmup-fraction", "0.1"], "--optimizer.schedule.warmup-fraction"),
        (["--optimizer.schedule.decay-fraction", "0.1"], "--optimizer.schedule.kind wsd"),
        (
            ["--optimizer.schedule.kind=constant", "--optimizer.schedule.final-fraction", "0.1"],
            "--optimizer.schedule.kind cosine or wsd",
        ),
        (
            ["--model.rope-scaling", "linear:4"],
            "'--model.rope-scaling' takes no value: use --model.rope-scaling.kind linear and its "
            "flags --model.rope-scaling.factor",
        ),
        (["--model.mlp=relu"], "takes no value: use --model.mlp.kind swiglu, relu2"),
    ]:
        with pytest.raises(ValueError, match=said):
            read_config(config, words)
    with pytest.raises(SystemExit):
        read_config(config, ["--help"])
    told = capsys.readouterr().out
    assert not re.search(r"\(default:\s*(None|'')?\)", told)
    for union, hint in unions(Config):
        kinds = variants(hint)
        assert f"--{union.replace('_', '-')}.kind {{{','.join(kinds)}}}" in told
        part = told.partition(f"--{union.replace('_', '-')}.kind ")[2]
        assert all(f"{kind}: {variant.__doc__[:20]}" in part for kind, variant in kinds.items())


MIXED = {"data.mixture": (Component(name="a", source="sotu", weight=1.0),)}
STARTED = {"start": FromRun(run="other", init="mean")}
NO_DECAY = {"optimizer.schedule": WSD(decay_fraction=0.0)}


@pytest.mark.parametrize(
    ("changes", "field", "value", "other", "repair"),
    [
        (MIXED, "data.source", "sotu:7", "data.mixture", ()),
        (STARTED, "start.calibration_windows", 3, "start.init", "fitted"),
        (STARTED, "start.distill_temperature", 2.0, "start.distill_weight", 0.5),
        (STARTED, "model.init_std", 0.2, "start", Scratch()),
        (
            NO_DECAY,
            "optimizer.schedule.final_fraction",
            0.5,
            "optimizer.schedule.decay_fraction",
            0.2,
        ),
    ],
)
def test_a_flag_without_effect_is_refused(tiny, changes, field, value, other, repair):
    config = tiny(**changes)
    used = replaced(config, {other: repair, "data.source": "sotu"})
    flag, named = f"--{field.replace('_', '-')}", f"--{other.replace('_', '-')}"
    for words in ([flag, str(value)], [f"--{field}={value}"]):
        with pytest.raises(ValueError, match=f"^{flag} would have no effect: .*{named}"):
            read_config(config, words)
        assert read_config(used, words) == replaced(used, {field: value})
        # A value that is there already is no change. (A config with a mixture keeps no source.)
        if field != "data.source":
            having = replaced(config, {field: value})
            assert read_config(having, words) == having


def test_a_sweep_refuses_a_flag_that_has_an_effect_on_no_trial():
    """Some rows of recovery read text for their start, some have a teacher; none has a WSD schedule."""
    for words in (["--start.calibration-windows", "32"], ["--start.distill-temperature", "2"]):
        made = trials.make("recovery.main", overrides=words)
        assert len(made.trials) == 30
    with pytest.raises(ValueError, match=r"^--model.init-std would have no effect"):
        trials.make("recovery.main", overrides=["--model.init-std", "0.1"])


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_may_have_an_effect_on_one_trial_alone(order, monkeypatch):
    rows = ["recovery.mla", "recovery.mla_taught"][::order]

    def pair() -> trials.Generator:
        for name in rows:
            yield name.partition(".")[2], experiments.rows()[name]()

    monkeypatch.setattr(experiments, "find_sweep", lambda _: pair)
    made = trials.make("pair", overrides=["--start.distill-temperature", "2"])
    assert len(made.trials) == 2


def test_a_map_follows_the_depth():
    assert replace(MODEL, n_layers=7).resolved_kv_map == (0, 1, 1, 3, 3, 5, 5)
    assert MODEL.n_kv_layers == 2


def test_keys_and_values_are_shared_as_their_maps_say():
    split = replace(MODEL, kv_map="k=cla:2;v=identity", windows="16,16,0,0")
    assert (split.sharing.k_map, split.sharing.v_map) == ((0, 0, 2, 2), (0, 1, 2, 3))
    assert (split.n_kv_layers, [kv.holds for kv in split.sharing.kv_layers]) == (4, ["kv", "v"] * 2)
    assert [kv.window for kv in split.sharing.kv_layers] == [16, 16, 0, 0]
    assert split.kv_elements == 6 * MODEL.n_kv_heads * MODEL.d_head
    with pytest.raises(ValueError, match="different maps for keys and values"):
        split.resolved_kv_map  # noqa: B018
    with pytest.raises(
        ValueError, match=r"layer 3 has window 0, but it reads the values of layer 1, which"
    ):
        replace(MODEL, kv_map="k=identity;v=0,1,2,1", windows="0,16,0,0")
    with pytest.raises(ValueError, match=r"kv\.kind = latent, keys and values come from the same"):
        replace(MODEL, kv_map="fused-lite", kv=LatentKV(rank=8, rope_dims=4))


def test_profiled_steps_count_from_one(tiny):
    assert list(tiny(**{"placement.profile": "4:2"}).placement.profiled_steps) == [4, 5]
    assert not tiny().placement.profiled_steps
    with pytest.raises(ValueError, match=r"placement\.profile = 'two'"):
        Placement(profile="two")


def test_defaults_are_valid():
    Placement()
    DataConfig(seq_len=8)


@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("model.n_layers", 10**18, "10,000"),
        ("model.d_ff", 2**31, "16,777,216"),
        ("model.vocab_size", 2**31, "2,147,483,647"),
        ("data.seq_len", 10**400, "2,147,483,647"),
        ("batch_size", 2**40, "2,147,483,647"),
        ("placement.save_every", 10**18, "1,099,511,627,776"),
        ("steps", 10**5000, "1,099,511,627,776"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_numbers_have_a_limit(tiny, field, value, most):
    with pytest.raises(ValueError) as caught:
        replaced(tiny(), {field: value})
    assert field in str(caught.value)
    assert f"must be at most {most}" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "field",
    ["model.norm_eps", "model.rope_theta", "optimizer.peak_lr", "optimizer.rule.weight_decay"],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(tiny, field, value):
    with pytest.raises(ValueError, match=rf"{field} = (inf|nan) must be .*finite"):
        replaced(tiny(), {field: value})


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("model.windows", "9" * 5000),
        ("model.windows", "1," * 10**6),
        ("model.kv_map", "0," * 10**6),
        ("model.kv_map", "cla:" + "9" * 5000),
        ("model.kv_map", "x" * 10**6),
        ("model.rope_scaling", "x" * 10**6),
        ("model.rope_scaling.kind", "x" * 10**6),
        ("data.tokenizer", "bpe:" + "9" * 5000),
        ("data.source", "sotu:²"),
        ("placement.profile", "9" * 5000 + ":1"),
    ],
    ids=lambda text: text[:12],
)
def test_odd_texts_cost_a_short_message(tiny, field, text):
    with pytest.raises(ValueError) as caught:
        replaced(tiny(), {field: text})
    assert field.rpartition(".")[2] in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 2.0, "steps = 2.0 is not of type int"),
        ("seed", 0.5, "seed = 0.5 is not of type int"),
        ("batch_size", True, "batch_size = True is not of type int"),
        ("name", 3, "name = 3 is not of type str"),
        ("start", None, "start = None must be one of Scratch, FromRun"),
        ("model.n_layers", 4.0, "model.n_layers = 4.0 is not of type int"),
        ("model.windows", 16, "model.windows = 16 is not of type str"),
        ("model.kv_map", (0, 0), r"model.kv_map = \(0, 0\) is not of type str"),
        ("model.tied_embeddings", "no", "model.tied_embeddings = 'no' is not of type bool"),
        ("data.seq_len", "64", "data.seq_len = '64' is not of type int"),
        ("data.mixture", ("a",), "data.mixture = 'a' is not of type Component"),
        ("optimizer.peak_lr", "1", "optimizer.peak_lr = '1' is not of type float"),
        ("optimizer.rule.b1", None, "optimizer.rule.b1 = None is not of type float"),
        ("placement.eval_every", 0.5, "placement.eval_every = 0.5 is not of type int"),
        ("placement.mesh.data", 1.5, "placement.mesh.data = 1.5 is not of type int"),
    ],
)
def test_a_dataclass_refuses_values_of_another_type(tiny, field, value, words):
    """Also one that Python code makes, without the text of a command line or a file."""
    *path, name = field.split(".")
    config = tiny()
    for part in path:
        config = getattr(config, part)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **{name: value})
