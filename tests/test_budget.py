"""Memory is checked before a program runs, and data that is seen many times is told."""

import types

import jax
import pytest

from cla_jax import budget, logger, runs
from cla_jax.data.loader import PREFETCH
from cla_jax.session import plan_layout
from cla_jax.step import check_memory
from cla_jax.train import train
from tests.sealed import write_metrics

MiB = 1 << 20


def program(arguments: int, temporaries: int, results: int, reused: int):
    """What a compiled program says of its memory."""
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=arguments,
        temp_size_in_bytes=temporaries,
        output_size_in_bytes=results,
        alias_size_in_bytes=reused,
    )
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


def test_a_program_that_does_not_fit_is_refused_with_the_numbers_and_the_remedy(monkeypatch):
    step = program(300 * MiB, 500 * MiB, 250 * MiB, 200 * MiB)
    assert budget.program_bytes(step) == 850 * MiB
    # Devices of a CPU share the memory of the machine.
    needed = jax.local_device_count() * (850 + 6) * MiB
    monkeypatch.setattr(budget, "available_bytes", lambda: needed)
    budget.check(step, 6 * MiB, "lower batch_size")
    monkeypatch.setattr(budget, "available_bytes", lambda: needed - 1)
    words = r"a step needs 6\.69 GiB of memory, but this machine has 6\.69 GiB: lower batch_size"
    with pytest.raises(ValueError, match=words):
        budget.check(step, 6 * MiB, "lower batch_size")


def test_a_backend_that_says_nothing_is_not_asked_further(monkeypatch):
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    monkeypatch.setattr(budget, "available_bytes", lambda: 1)
    budget.check(silent, 0, "")
    monkeypatch.setattr(budget, "available_bytes", lambda: None)
    budget.check(program(1 << 60, 0, 0, 0), 0, "")


def test_a_container_has_less_memory_than_its_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "_CONTAINER", (tmp_path / "none", tmp_path / "limit"))
    machine = budget.available_bytes()
    assert machine is not None
    assert machine > MiB
    for text, expected in (("max\n", machine), (f"{MiB}\n", MiB), (f"{1 << 60}\n", machine)):
        (tmp_path / "limit").write_text(text)
        assert budget.available_bytes() == expected


def test_the_step_of_a_run_is_checked_with_its_batches_and_names_the_fields(
    tiny, devices, monkeypatch
):
    devices(1)
    config = tiny(batch_size=8)
    layout = plan_layout(config)
    batch = 8 * (config.data.seq_len + 1) * 4
    ahead = PREFETCH * batch
    monkeypatch.setattr(budget, "available_bytes", lambda: jax.local_device_count() * (MiB + ahead))
    check_memory(layout, program(MiB, 0, 0, 0))
    with pytest.raises(ValueError, match=r"raise placement\.accumulate = 1, lower batch_size = 8"):
        check_memory(layout, program(MiB + 1, 0, 0, 0))


def test_a_run_that_is_refused_in_start_up_does_not_keep_its_name(
    tiny, devices, monkeypatch, caplog
):
    devices(1)
    monkeypatch.setattr(budget, "available_bytes", lambda: 1)
    with caplog.at_level("INFO"), pytest.raises(ValueError, match="a step needs"):
        train(tiny(steps=1), evaluate=lambda *_: {})
    assert "training tokens: 256 in total" in caplog.text
    monkeypatch.undo()
    run = runs.open_run(tiny(seed=1), data_fingerprint="", tokenizer_json="{}")
    write_metrics(run, [{"step": 1, "loss": 5.0}])  # a step was made: now the name is taken
    runs.forget_unless_begun(run)
    with pytest.raises(ValueError, match="contains another run"):
        runs.open_run(tiny(seed=2), data_fingerprint="", tokenizer_json="{}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "metrics/mine.jsonl"])
def test_files_that_are_not_of_a_run_are_neither_replaced_nor_removed(tiny, name):
    config = tiny()
    file = runs.run_path(config) / name
    file.parent.mkdir(parents=True)
    file.write_text('{"model_type": "llama"}\n')
    with pytest.raises(ValueError, match=f"{name} belongs to no run that is here"):
        runs.open_run(config, data_fingerprint="", tokenizer_json="{}")
    runs.forget_unless_begun(runs.Run(runs.run_path(config)))
    assert file.read_text() == '{"model_type": "llama"}\n'


@pytest.mark.parametrize(("epochs", "warned"), [(4.0, False), (4.1, True)])
def test_many_epochs_of_a_source_are_a_warning(tiny, caplog, epochs, warned):
    part = types.SimpleNamespace(totals={"train": {"windows": 10}})
    session = types.SimpleNamespace(
        config=tiny(),
        epochs=lambda step: {"web": epochs, "code": 1.0},
        schedule=types.SimpleNamespace(counts=lambda rows: [rows // 2, rows // 2]),
        prepared=types.SimpleNamespace(parts={"web": part, "code": part}),
    )
    with caplog.at_level("INFO"):
        logger.log_data(session)  # type: ignore[arg-type]
    assert f"web: 512 tokens = {epochs:.3g} epochs of its 320" in caplog.text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage()[:16] for record in warnings] == ["web is seen 4.1 "] * warned
    numbers = (0.1678, 4.0, 99.96, 83_818.1)
    assert [*map(logger._three_digits, numbers)] == ["0.168", "4", "100", "83,800"]
