"""The benchmark beside MaxText, without MaxText and without a compiler for TPUs."""

import dataclasses
import io
import json
import sys

import pytest
from rich.console import Console

from benchmarks import maxtext
from cla_jax.plan import compiler
from experiments import cla_1b

PROGRAM = """\
HloModule jit_train_step

ENTRY %main (a: bf16[8,128]) -> bf16[16,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %copy.1 = bf16[8,128]{0,1} copy(%a)
  ROOT %g = bf16[16,128]{1,0} all-gather(%copy.1), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
}
"""


def dumped(folder):
    """A directory as the compiler leaves it: the step, and a smaller program without a report."""
    program = "m.after_optimizations.txt"
    (folder / f"1.jit_train_step.{program}").write_text(PROGRAM)
    (folder / f"0.jit_other.{program}").write_text("ENTRY %main () -> f32[] {\n}\n")
    (folder / f"1.jit_train_step.m.{compiler.REPORT}").write_text("Total bytes: 4096 (4.0KiB)\n")
    (folder / f"1.jit_train_step.m.{compiler.LAST_OF_TPU}").write_text(PROGRAM)
    return folder


ROW = {
    "fits": True,
    "peak": 4096,
    # The copy reads and writes 2 KiB; the all-gather reads 2 KiB and writes 4 KiB.
    "traffic": 10 * 1024,
    "copies": 4 * 1024,
    "collectives": {"all-gather": 4 * 1024},
}


def test_a_dump_becomes_a_row(tmp_path):
    assert maxtext.read_dump(dumped(tmp_path)) == ROW


def test_a_dump_without_a_program_is_refused(tmp_path):
    (tmp_path / f"1.m.{compiler.REPORT}").write_text("Total bytes: 4096\n")
    with pytest.raises(ValueError, match="has no optimised program of a TPU"):
        maxtext.read_dump(tmp_path)


def stand_in(tmp_path, body):
    """An environment whose interpreter, asked of MaxText, says that it is there, and else does `body`."""
    about = json.dumps({"folder": "/peer/maxtext", "versions": {"maxtext": "1"}})
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{about}'; exit; fi\n{body}\n")
    python.chmod(0o755)
    return maxtext.installed(str(python))


def test_the_peer_is_asked_for_the_same_model(tmp_path):
    peer = stand_in(tmp_path, "exit 1")
    assert peer.versions == {"maxtext": "1"}
    command = maxtext.peer_command(peer, cla_1b.h128_mqa(), "v5p:4x4x8", 16, "minimal")
    assert command[:4] == [
        *(peer.python, "-m", "maxtext.trainers.pre_train.train_compile"),
        "/peer/maxtext/configs/base.yml",
    ]
    settings = dict(word.split("=") for word in command[4:])
    expected = {
        "compile_topology": "v5p-256",  # it counts cores
        "decoder_block": "llama2",
        "base_num_decoder_layers": "20",
        "base_emb_dim": "2048",
        "base_mlp_dim": "5472",
        "base_num_query_heads": "16",
        "base_num_kv_heads": "1",
        "head_dim": "128",
        "vocab_size": "50304",
        "logits_via_embedding": "true",
        "max_target_length": "2048",
        "per_device_batch_size": "16",
        "remat_policy": "minimal",
        "weight_dtype": "float32",
        "dtype": "bfloat16",
    }
    assert expected.items() <= settings.items()
    assert maxtext.accelerator("v5e:16x16") == "v5e-256"
    assert maxtext.accelerator("v6e:16x16") == "v6e-256"
    shared = dataclasses.replace(
        cla_1b.h128_mqa(), model=dataclasses.replace(cla_1b.h128_mqa().model, kv_map="cla:2")
    )
    with pytest.raises(ValueError, match="no shared keys and values"):
        maxtext.peer_command(peer, shared, "v5e:16x16", 8, "full")


def test_what_the_peer_ends_with_becomes_a_row_or_an_error(tmp_path, monkeypatch):
    """It is ended when the memory is laid out; one that does not fit says what it needs."""
    files = tmp_path / "files"
    files.mkdir()
    dumped(files)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    # XLA_FLAGS begins with --xla_dump_to=FOLDER.
    folder = 'folder=${XLA_FLAGS%% *}; folder=${folder#*=}; [ -z "$PYTHONPATH" ] || exit 3'
    case = (cla_1b.h128_mqa(), "v5e:16x16", 8, "full")
    writes = f'{folder}\ncp -r {files} "$folder"\nexec sleep 600'
    assert maxtext.compile_peer(stand_in(tmp_path, writes), *case) == ROW
    too_much = "echo 'RESOURCE_EXHAUSTED: Used 17.50G of 15.75G hbm.'; exit 1"
    assert maxtext.compile_peer(stand_in(tmp_path, too_much), *case) == {
        "fits": False,
        "peak": 17.5 * 2**30,
    }
    with pytest.raises(ValueError, match="ended with 1 for v5e:16x16: no such policy"):
        maxtext.compile_peer(stand_in(tmp_path, "echo 'no such policy'; exit 1"), *case)


def test_it_says_how_to_install_maxtext(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"has no MaxText: .*pip install 'maxtext\[tpu\]==0.2.4'"):
        maxtext.installed(sys.executable)
    with pytest.raises(ValueError, match="cannot be started: No such file"):
        maxtext.installed(str(tmp_path / "absent"))
    with pytest.raises(SystemExit):
        maxtext.main(maxtext.Options(python=sys.executable, output=tmp_path / "out.json"))
    assert "has no MaxText" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_the_table_has_ratios_and_leaves_empty_what_is_not_known():
    case = {"topology": "v5e:16x16", "sequences": 8, "remat": "block:full"}
    double = {name: 2 * value for name, value in ROW.items() if name in ("peak", "traffic")}
    rows = [
        case | ROW | {"peer": "ours"},
        case | ROW | double | {"peer": "MaxText"},
        case | {"sequences": 56, "peer": "ours", "fits": False, "peak": 2**31},
    ]
    out = io.StringIO()
    Console(file=out, width=300).print(maxtext.table(rows))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[4][3:] == ["ours / MaxText", "0.50", "0.50", "1.00", "1.00", "", "1.00"]
    assert cells[5] == ["v5e:16x16", "56", "block / full", "ours, does not fit", "2.00", *[""] * 5]
