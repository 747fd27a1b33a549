"""Records of evaluations: read as they were written, in whatever version."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cla_jax.documents import Documents
from cla_jax.evaluation import (
    Agreement,
    ByteCount,
    CachedScores,
    DepthScore,
    Evaluation,
    EvictingScores,
    HeadPolicy,
    LayerProfile,
    Scores,
    TaskEvaluation,
    TaskScore,
    plain,
    read,
    read_tasks,
)

PUBLISHED = sorted((Path(__file__).parents[1] / "docs/results").rglob("eval/*.json"))
NUMBERS = {"perplexity": 2.0, "bits_per_byte": 0.5, "tokens": 7}
PROFILE = LayerProfile(
    kv_layer=0,
    kept=(0.5, 0.25),
    policies={"full": HeadPolicy(share=(1.0, 0.0), kept=(0.5, None))},
    recovery={"min": (0.9, 0.8)},
)


def test_published_records_are_read_as_they_were_written():
    assert len(PUBLISHED) > 100
    for file in PUBLISHED:
        record = json.loads(file.read_text())
        for key in ("run", "checksum"):  # of the file, see cla_jax.seals
            del record[key]
        assert read(file.stem, record, file).record() == record


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        (
            "full",
            Scores(
                **NUMBERS,
                documents=Documents(
                    nll=np.array([1.25]), tokens=np.array([7]), bytes=np.array([9])
                ),
                components={"web": Scores(**NUMBERS | {"tokens": 3})},
            ),
        ),
        (
            "cached-int8",
            CachedScores(
                **NUMBERS,
                kv_bytes={"resident": ByteCount(predicted=8, counted=8.5)},
                readers_per_kv_layer=(2, 1),
                agreement=Agreement(max_logit_difference=0.1, top1_agreement=1.0, kl=0.0, tokens=7),
            ),
        ),
        ("cached-h2o:keep=0.5", EvictingScores(**NUMBERS, resident_share=0.5, profile=(PROFILE,))),
    ],
)
def test_what_is_written_is_read(name, scores):
    made = Evaluation(method="m", step=3, checkpoint="c", data_fingerprint="d", scores=scores)
    assert read(name, json.loads(json.dumps(made.record())), "file") == made


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("full", {"step": None}, "x.json: field step is missing"),
        ("full", {"step": True}, "x.json: field step: expected an integer, found True"),
        ("full", {"perplexity": "2"}, "x.json: field perplexity: expected a number, found '2'"),
        ("full", {"tokens": None}, "x.json: field tokens is missing"),
        ("full", {"components": []}, "x.json: field components: expected an object"),
        ("full", {"components": {"web": {}}}, "x.json: web: field perplexity is missing"),
        ("cached-int8", {"agreement": {"kl": 1}}, "x.json: agreement: field max_logit_difference"),
        ("cached-int8", {"readers_per_kv_layer": [1, 1.5]}, "expected an integer, found 1.5"),
        ("cached-h2o:keep=0.5", {}, "x.json: field resident_share is missing"),
    ],
)
def test_what_is_wrong_is_named(name, change, words):
    record = {"step": 1, **NUMBERS, **change}
    with pytest.raises(ValueError, match=words):
        read(name, record, "x.json")


def test_what_is_not_known_is_ignored():
    record = {"step": 1, **NUMBERS, "of_a_newer_version": {"a": 1}, "bytes": None}
    assert read("full", record, "x.json") == Evaluation(step=1, scores=Scores(**NUMBERS))


HOW = {"context": 64, "split": "validation", "version": 1.0, "data": {"path": "p", "name": None}}


def test_scores_of_tasks_are_read_as_they_were_written():
    depths = {"0.1": DepthScore(n=2, metrics={"acc": 1.0})}
    score = TaskScore(metrics={"acc": 0.5}, **HOW, shots=0, seconds=1.5, n=3, depths=depths)
    whole = TaskEvaluation(
        method="m", cache="int8", step=2, checkpoint="c", versions={"a": "1"}, tasks={"sciq": score}
    )
    assert read_tasks(json.loads(json.dumps(plain(whole))), "x.json") == whole
    assert score.is_asked_like(TaskScore(metrics={}, **HOW, shots=0))
    for change in ({"chunk": 4}, {"shots": 1}, {"data": {"path": "q", "name": None}}):
        assert not score.is_asked_like(dataclasses.replace(score, **change))


def test_scores_of_tasks_that_were_dicts_are_read():
    """As they were recorded before they had a type: with null, and an empty name of the cache."""
    known = {"metrics": {"acc": 0.5}, **HOW, "shots": None, "seconds": 1.5, "n": 3}
    record = {"method": "m", "cache": "", "step": 2, "checkpoint": "c", "versions": {"a": "1"}}
    found = read_tasks(record | {"tasks": {"sciq": known}}, "x.json")
    assert found.tasks["sciq"].is_asked_like(TaskScore(metrics={}, **HOW))
    assert (found.step, found.checkpoint, found.cache) == (2, "c", "")


def test_a_task_needs_metrics():
    scores = {"sciq": {"metrics": {"acc": 0.5, "acc_stderr": None}, "n": 3, "version": "1.0"}}
    found = read_tasks({"step": 1, "tasks": scores}, "x.json").tasks["sciq"]
    assert (found.metrics, found.n, found.version) == ({"acc": 0.5}, 3, "1.0")
    for wrong in ({}, {"metrics": 1}, 1):
        with pytest.raises(ValueError, match=r"x\.json: task 'sciq' has no metrics"):
            read_tasks({"step": 1, "tasks": {"sciq": wrong}}, "x.json")
    with pytest.raises(ValueError, match="field acc: expected a number, found 'high'"):
        read_tasks({"step": 1, "tasks": {"sciq": {"metrics": {"acc": "high"}}}}, "x.json")
