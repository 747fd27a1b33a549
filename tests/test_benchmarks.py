import json
import subprocess
import sys
from pathlib import Path

import pytest

from cla_jax import costs
from experiments import smoke

ROOT = Path(__file__).parents[1]


def test_what_a_decode_step_reads_is_counted(tmp_path):
    """The rest of what decode_bandwidth prints is time."""
    model, context, new_tokens = smoke.tiny().model, 6, 5
    run = ["-m", "benchmarks.decode_bandwidth", "smoke.tiny", "--batch", "1", "3", "--rounds", "1"]
    options = {"context": context, "new-tokens": new_tokens, "probe": "1MiB"}
    options["output"] = tmp_path / "out.json"
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, *run, *arguments], cwd=ROOT, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bandwidth"] > 0
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    # Both layers read the one slot they share: keys and values of one head in float32.
    a_token = model.n_layers * 2 * model.d_head * 4
    for row in result["rows"]:
        assert row["bytes"] == {
            "weights": 4 * costs.parameters(model).total,
            "cache": row["batch"] * a_token * (context + new_tokens // 2),
        }
        [round_] = row["rounds"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / round_["step_seconds"])
        reached = sum(row["bytes"].values()) / round_["step_seconds"]
        assert row["fraction"] == pytest.approx(reached / result["bandwidth"])


@pytest.mark.slow
def test_a_benchmark_that_fails_leaves_no_empty_file(tmp_path):
    run = ["-m", "benchmarks.decode_bandwidth", "smoke.tiny", "--cache", "int9", "--probe", "1MiB"]
    output = tmp_path / "out.json"
    command = [sys.executable, *run, f"--output={output}"]
    for before in (None, "{}"):
        if before:
            output.write_text(before)
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "did you mean int8" in ran.stderr
        assert (output.read_text() if output.exists() else None) == before
