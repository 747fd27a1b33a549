import json
import re
import shlex
from pathlib import Path

import pytest

import experiments
from cla_jax import memory, runs
from cla_jax.cache import cache_spec, ledger
from cla_jax.config import LatentKV
from cla_jax.decode import decoding_weights
from launch import memory as launch_memory
from tests import reference
from tests.conftest import MODEL, replace

# 2405.12981, tables 1, 3, 5 and 7, column "KV bytes per token (16-bit)".
PAPER = {
    "cla_1b.h128_mha": 163840,
    "cla_1b.h128_gqa4": 40960,
    "cla_1b.h128_gqa2": 20480,
    "cla_1b.h128_mqa": 10240,
    "cla_1b.h64_mqa": 5120,
    "cla_1b.h46_mqa": 3680,
    "cla_1b.h32_mqa": 2560,
    "cla_1b.h512_mqa_cla2": 20480,
    "cla_1b.h256_mqa_cla2": 10240,
    "cla_1b.h128_mqa_cla2": 5120,
    "cla_1b.h90_mqa_cla2": 3600,
    "cla_1b.h64_mqa_cla2": 2560,
    "cla_1b.h256_gqa4_cla2": 40960,
    "cla_1b.h128_gqa4_cla2": 20480,
    "cla_1b.h128_gqa2_cla2": 10240,
    "cla_1b.h128_mqa_cla3": 3584,
    "cla_1b.h128_mqa_cla4": 2560,
    "cla_1b.h128_mqa_keep_ends": 5632,
    "cla_1b.h128_mqa_dense_front": 5632,
    "cla_1b.h128_mqa_dense_back": 5632,
    "cla_1b_tuned.h128_mqa": 10240,
    "cla_1b_tuned.h128_mqa_cla2": 5120,
    "cla_1b_tuned.h64_mqa": 5120,
    "cla_3b.h128_mqa": 16384,
    "cla_3b.h128_mqa_cla2": 8192,
    "cla_3b.h64_mqa": 8192,
    "cla_3b.second_h64_mqa": 8192,
    "cla_3b.second_h64_mqa_cla2": 4096,
    "cla_3b.second_h32_mqa": 4096,
}


def test_the_papers_byte_column():
    """All 29 model rows of its tables, through the ledger and said in each row's help."""
    rows = experiments.rows()
    assert {name for name in rows if name.startswith("cla_")} == PAPER.keys()
    for name, expected in PAPER.items():
        spec = cache_spec(rows[name]().model, batch=1, capacity=2048)
        assert ledger.predicted(spec, 2048).resident == 2048 * expected, name
        assert rows[name].__doc__.strip().endswith(f"{expected:,} B."), name


def test_weights_are_those_of_the_decoder():
    for tied in (True, False):
        config = replace(MODEL, tied_embeddings=tied, n_layers=6, kv_map="cla:2")
        weights = decoding_weights(reference.randomised(config))
        assert memory.weights_bytes(config) == ledger.nbytes(weights)


def test_what_fits_is_the_last_sequence_that_does():
    found = memory.fit(MODEL, "int8", context=100, budget=2_000_000, chunk=8)
    held = lambda n: found.weights + n * (found.kv + found.workspace)
    assert held(found.sequences) <= 2_000_000 < held(found.sequences + 1)
    spec = cache_spec(MODEL, "int8", batch=3, capacity=100, chunk=8)
    assert 3 * found.kv == ledger.nbytes(spec.allocate().kv_layers)
    longer = memory.fit(MODEL, "dense", context=4096, budget=20_000_000, chunk=1)
    assert (found.binds, longer.binds) == ("workspace", "KV cache")


def test_a_common_prefix_is_held_once():
    options = {"context": 100, "budget": 2_000_000, "chunk": 8}
    alone = memory.fit(MODEL, "dense", **options)
    shared = memory.fit(MODEL, "dense", **options, shared=70, page=16)
    token = ledger.predicted(cache_spec(MODEL, "dense", batch=1, capacity=128), 100).written
    # Four full pages are shared; a request has the rest, and its last page is never full.
    assert shared.prefix == 4 * 16 * token
    assert shared.kv == (100 // 16 + 1 - 4) * 16 * token
    left = options["budget"] - shared.weights - shared.prefix
    assert shared.sequences == left // (shared.kv + shared.workspace) > alone.sequences
    with pytest.raises(ValueError, match="shared = 100 must lie in 0 to context - 1 = 99"):
        memory.fit(MODEL, "dense", **options, shared=100)


def test_the_table_says_what_fits_with_a_common_prefix(capsys):
    argv = ["demo.h16_mqa", "--budget", "20MB", "--context", "256", "--shared", "128"]
    argv += ["--chunk", "16"]
    launch_memory.main([*argv, "--cache", "dense", "--cache", "kivi4", "--page", "16"])
    table = capsys.readouterr().out
    assert "fit, sharing" in table
    assert "cannot share" in table  # pages of half a group, in kivi4
    launch_memory.main([*argv, "--cache", "dense", "--json"])
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert line["sharing"]["sequences"] > line["sequences"]


def test_sharing_doubles_what_fits_when_the_cache_binds():
    fits = {}
    for name in ("h128_mqa", "h128_mqa_cla2"):
        (row,) = experiments.find(f"cla_1b.{name}")
        fits[name] = memory.fit(row.model, "dense", context=131_072, budget=80 * 10**9)
    assert fits["h128_mqa_cla2"].kv * 2 == fits["h128_mqa"].kv
    assert 1.9 < fits["h128_mqa_cla2"].sequences / fits["h128_mqa"].sequences < 2.01


@pytest.mark.parametrize(("format", "capacity", "chunk"), [("kivi2", 1024, 128), ("kivi4", 128, 1)])
def test_what_fits_by_the_closed_forms_fits_by_the_compiler(format, capacity, chunk):
    """Where the newest tokens, which kivi reads at once, are more than a block of the others."""
    config = replace(MODEL, d_model=128, d_ff=256, n_heads=8, d_head=32)
    spec = cache_spec(config, format, batch=32, capacity=capacity, chunk=chunk)
    held = memory.weights_bytes(config) + ledger.nbytes(spec.allocate().kv_layers)
    for phase in memory.compiled(spec).values():
        assert phase.total < held + 32 * memory.workspace_bytes(spec, chunk)


def temporaries_of(spec, phase):
    """Compiles one phase only."""
    return memory.lowered(spec)[phase].compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("more", [[], ["--ledger"]])
def test_a_model_with_latents_has_the_formats_that_support_them(tiny, capsys, more):
    latents = {"model.n_kv_heads": 1, "model.kv": LatentKV(rank=8, rope_dims=4)}
    run = runs.open_run(tiny(**latents), data_fingerprint="", tokenizer_json="{}")
    launch_memory.main([str(run.path), "--context", "256", "--json", *more])
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["cache"] for line in lines] == ["dense", "int8", "fp8"]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "share"), [("dense", 0.02), ("int8", 0.07), ("kivi4", 0.09)])
def test_a_decode_step_of_the_papers_model_needs_little_beside_its_cache(format, share):
    """One sequence of 8,192 tokens; the figures of docs/memory.md. More context needs no more."""
    (row,) = experiments.find("cla_1b.h128_mqa_cla2")
    spec = cache_spec(replace(row.model, compute_dtype="float32"), format, batch=1, capacity=8192)
    temporaries = temporaries_of(spec, "decode")
    assert temporaries < share * ledger.predicted(spec, 8192).allocated
    assert temporaries < 1.2 * memory.workspace_bytes(spec, 1)


def test_a_prefill_needs_no_more_for_more_layers():
    """Of 12 layers, each making its sums before its turn, it would be nearly a third more."""
    temporaries = {}
    for n_layers in (2, 12):
        config = replace(MODEL, d_model=128, d_ff=128, n_heads=8, d_head=32, n_layers=n_layers)
        spec = cache_spec(config, batch=4, capacity=1024, chunk=128)
        temporaries[n_layers] = temporaries_of(spec, "prefill")
    assert temporaries[12] < 1.1 * temporaries[2]


def test_the_compiler_agrees_with_the_closed_forms():
    """In float32, where the CPU's compiler widens nothing."""
    config = replace(MODEL, d_model=128, d_ff=256, n_heads=8, d_head=32)
    spec = cache_spec(config, batch=16, capacity=1024, chunk=128)
    peaks = memory.compiled(spec)
    held = memory.weights_bytes(config) + ledger.nbytes(spec.allocate().kv_layers)
    for phase in peaks.values():
        assert phase.arguments == pytest.approx(held, rel=0.01)
        assert phase.total >= phase.arguments + phase.temporaries
    # The cache is written in place: neither phase returns a second one.
    assert peaks["decode"].total < 1.3 * held
    workspace = 16 * memory.workspace_bytes(spec, 128)
    assert 0.5 < peaks["prefill"].temporaries / workspace < 1.5


def test_the_table_and_its_json(capsys):
    argv = ["demo", "--budget", "20MB", "--context", "256", "--cache", "dense", "--cache", "kivi4"]
    launch_memory.main(argv)
    table = capsys.readouterr().out
    assert "demo/h16_mqa_cla2" in table
    assert "kivi4" in table
    launch_memory.main([*argv, "--json"])
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [(line["name"], line["cache"]) for line in lines[:2]] == [
        ("demo/h16_mqa", "dense"),
        ("demo/h16_mqa", "kivi4"),
    ]
    assert all(line["sequences"] >= 1 for line in lines)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["demo", "--budget", "1MB"],
            "demo/h16_mqa: budget = 1,000,000 B is smaller than the weights",
        ),
        (["demo", "--budget", "80"], " B). A number alone is bytes: add a unit, such as 80GB"),
        (
            ["demo", "--cache", "fastgen:T=0.9"],
            "--cache 'fastgen:T=0.9': launch.memory does not support eviction policies",
        ),
        (["demo", "--budget", "much"], "budget = 'much': write it as 80GB"),
        (["demo", "--cache", "int9"], "unknown cache format 'int9'; did you mean int8"),
        (["demo", "--ledger", "--compile"], "remove --ledger or --compile"),
        (["runs/nowhere"], "runs/nowhere does not exist"),
        (["dem"], "unknown experiment 'dem'; did you mean demo"),
        (["demo", "--context", "0"], "context = 0"),
        (
            ["demo", "--context", "9", "--shared", "9"],
            "shared = 9 must lie in 0 to context - 1 = 8",
        ),
        (["demo", "--ledger", "--shared", "9"], "remove --shared"),
    ],
)
def test_what_cannot_be_answered_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        launch_memory.main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_tables_of_the_docs_are_what_the_commands_print(capsys):
    """docs/memory.md: below a command of launch.memory, a table of some of its lines and columns."""
    text = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    blocks = re.findall(
        r"```bash\npython -m launch.memory (.*?)```\n\n(\|.*?)\n\n", text, re.DOTALL
    )
    assert len(blocks) == 2
    for command, table in blocks:
        launch_memory.main(shlex.split(command.replace("\\\n", " ")))
        shown = [line.replace("/", " ").split() for line in capsys.readouterr().out.splitlines()]
        _, _, *rows = [
            [cell.strip(" *").replace(" ", "") for cell in row.strip("|").split("|")]
            for row in table.splitlines()
        ]
        assert len(rows) > 5
        for row in rows:  # its cells stand in one line, in this order
            assert any(all(cell in rest for cell in row) for rest in map(iter, shown)), row


def test_the_ledger_of_a_token(capsys):
    names = ["cla_1b.h128_mqa", "cla_1b.h128_mqa_cla2"]
    launch_memory.main([*names, "--ledger", "--context", "2048", "--cache", "dense", "--json"])
    mqa, cla2 = json.loads(capsys.readouterr().out)["lines"]
    assert (mqa["resident"], mqa["written"], mqa["read"]) == (10240, 10240, 10240)
    assert (cla2["resident"], cla2["written"], cla2["read"]) == (5120, 5120, 10240)
    launch_memory.main([*names, "--ledger", "--context", "2048"])
    assert "cla_1b/h128_mqa_cla2" in capsys.readouterr().out


def test_budgets_are_read_as_written():
    assert launch_memory.parse_bytes("80GB") == 80 * 10**9
    assert launch_memory.parse_bytes("1.5GiB") == 3 * 2**29
    assert launch_memory.parse_bytes("1000") == launch_memory.parse_bytes("1kB".upper()) == 1000
    assert launch_memory.parse_bytes("2 TiB") == 2**41
    assert launch_memory.parse_bytes("400kB") == 400_000


def test_names_are_shown_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = "runs/" + "a_long_study_of_many_things/" * 5
    table = launch_memory._table("title", "caption", ["weights"])
    table.add_row(name, "dense", "1.00GB")
    launch_memory._show(table)
    assert f"{name}   dense" in capsys.readouterr().out
