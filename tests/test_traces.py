"""Traces: their lines, their makers, and what a replay reports."""

import json

import pytest

from cla_jax import traces
from cla_jax.traces import Line, Replay, Shape, make_trace, read_trace, write_trace
from cla_jax.train import train
from launch import serve_trace

GOOD = {"arrival": 0.5, "prompt": [1, 2], "new_tokens": 3}


def written(tmp_path, *records):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_a_trace_is_read_by_arrival(tmp_path):
    path = written(tmp_path, GOOD, "\n", GOOD | {"arrival": 0, "prompt": "ab", "group": "g"})
    lines = read_trace(path, encode=lambda text: [ord(c) for c in text])
    assert lines == [
        Line(arrival=0, prompt=(97, 98), new_tokens=3, group="g"),
        Line(arrival=0.5, prompt=(1, 2), new_tokens=3),
    ]
    write_trace(path, lines)
    assert read_trace(path) == lines


def test_a_line_may_be_long(tmp_path):
    lines = [Line(arrival=0, prompt=(123,) * 300_000, new_tokens=1)]
    write_trace(tmp_path / "trace.jsonl", lines)
    assert read_trace(tmp_path / "trace.jsonl") == lines


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]\n", "line 2 is not a JSON object, but an array"),
        (GOOD | {"arrival": -1}, "line 2: arrival = -1 must not be negative"),
        (GOOD | {"arrival": "now"}, "line 2: field arrival: expected a number, found 'now'"),
        (GOOD | {"new_tokens": 0}, "line 2: new_tokens = 0 must be positive"),
        (GOOD | {"new_tokens": None}, "line 2: field new_tokens is missing"),
        (GOOD | {"prompt": []}, "line 2: the prompt is empty"),
        (GOOD | {"prompt": [1, "a"]}, "line 2: field prompt: expected token ids"),
        (GOOD | {"prompt": "text"}, "line 2: field prompt is a text, but the model has no"),
        (GOOD | {"new_token": 3}, "line 2: unknown field 'new_token'; did you mean new_tokens"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, bad, words):
    with pytest.raises(ValueError, match=r"trace\.jsonl") as refused:
        read_trace(written(tmp_path, GOOD, bad))
    assert words in str(refused.value)


def test_a_group_has_one_prompt_and_a_trace_has_requests(tmp_path):
    first = GOOD | {"group": "g"}
    with pytest.raises(
        ValueError, match="line 2: the prompt differs from the first one of group 'g'"
    ):
        read_trace(written(tmp_path, first, first | {"prompt": [9]}))
    with pytest.raises(ValueError, match="has no requests"):
        read_trace(written(tmp_path, "\n"))


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def test_makers_share_what_they_say():
    shape = Shape(requests=8, shared=40, mixes=2, own=10, new_tokens=5, vocabulary=1000, rate=2.0)
    # Of the first request and each of the next ones: tokens in common.
    expected = {
        "shared-prompt": [0, 40, 0, 40],
        "few-shot": [45, 45, 45, 0],
        "parallel-sampling": [50, 50, 50, 0],
        "no-sharing": [0, 0, 0, 0],
    }
    assert traces.MAKERS.keys() == expected.keys()
    for kind, numbers in expected.items():
        lines = make_trace(kind, shape)
        prompts = [line.prompt for line in lines]
        assert len(lines) == 8
        assert {len(prompt) for prompt in prompts} == {50}
        assert [common(prompts[0], other) for other in prompts[1:5]] == numbers, kind
        assert 0 < lines[0].arrival < lines[-1].arrival
        assert [line.group for line in lines[3:5]] == (
            ["group-0", "group-1"] if kind == "parallel-sampling" else [None, None]
        )


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("shared", {}, "unknown kind of trace 'shared'; did you mean shared-prompt"),
        ("few-shot", {"requests": 0}, "requests = 0 must be positive"),
        ("few-shot", {"rate": -1.0}, "rate = -1.0 must not be negative"),
        ("few-shot", {"own": 0, "shared": 0}, "a prompt needs at least one token"),
    ],
)
def test_traces_that_cannot_be_made_are_refused(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        make_trace(kind, Shape(**changes))


def test_percentiles_are_of_requests():
    moments = [traces.Moment(at=i, resident=r, unshared=3 * r) for i, r in enumerate((0, 7, 5))]
    found = Replay(
        seconds=2.0,
        tokens=10,
        first_token=[float(i) for i in range(100, 0, -1)],
        latency_per_token=[0.5],
        moments=moments,
    ).summary()
    assert found["tokens_per_second"] == 5
    assert [found[f"first_token_p{p}"] for p in (50, 90, 99)] == [50, 90, 99]
    assert found["latency_per_token_p99"] == 0.5
    assert (found["resident_peak_bytes"], found["saved_at_peak_bytes"]) == (7, 14)


MODEL = ("--model", "smoke.tiny", "--rows", "4", "--page", "4", "--chunk", "16")


def test_a_made_trace_is_served(tmp_path, capsys):
    """Two waves of four requests with twelve tokens in common: three pages, which are held once."""
    path = tmp_path / "trace.jsonl"
    sizes = {"requests": 8, "shared": 12, "own": 3, "new-tokens": 4}
    made = [word for k, v in sizes.items() for word in (f"--made.{k}", str(v))]
    argv = [str(path), *MODEL, "--make", "shared-prompt", *made, "--json", "--retain", "1MB"]
    serve_trace.main([*argv, "--plot", str(tmp_path / "plot.png")])
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 8
    assert found["tokens"] == 8 * 4
    assert found["hit_rate"] == pytest.approx(7 * 12 / (8 * 15))
    assert 0 < found["resident_peak_bytes"] < found["allocated_bytes"]
    assert (
        found["saved_at_peak_bytes"]
        == found["unshared_at_peak_bytes"] - found["resident_peak_bytes"]
    )
    assert found["saved_at_peak_bytes"] > 0
    assert found["uploads"] > 0
    assert found["moments"][-1]["resident"] == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("more", [["--page", "1", "--rows", "1"], ["--unshared"]])
def test_a_request_of_two_tokens_is_served(tmp_path, capsys, more):
    path = written(tmp_path, GOOD | {"arrival": 0.0, "prompt": [1], "new_tokens": 1})
    serve_trace.main([str(path), "--model", "smoke.tiny", *more, "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["bad.jsonl"], "bad.jsonl, line 1: new_tokens = 0 must be positive"),
        (["new.jsonl", "--make", "shared-prompt", "--made.requests", "0"], "requests = 0"),
    ],
)
def test_a_mistake_in_a_trace_does_not_wait_for_the_model(
    tmp_path, capsys, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD | {"new_tokens": 0}))
    monkeypatch.setattr(serve_trace, "open_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit):
        serve_trace.main([*argv, *MODEL])
    assert words in capsys.readouterr().err


def test_a_file_that_is_not_a_trace_is_not_overwritten(tmp_path, capsys):
    (notes := tmp_path / "notes.md").write_text("mine")
    with pytest.raises(SystemExit):
        serve_trace.main([str(notes), *MODEL, "--make", "shared-prompt"])
    assert "does not overwrite" in capsys.readouterr().err
    assert notes.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--unshared"], ["--cache", "int8"]])
def test_a_run_serves_texts(tmp_path, tiny, capsys, more):
    config = tiny(steps=2)
    train(config, evaluate=lambda *_: {})
    texts = [f"The union is strong, and {word}" for word in ("so", "we")]
    path = written(tmp_path, *(GOOD | {"prompt": text, "arrival": 0.0} for text in texts))
    sizes = ["--rows", "2", "--chunk", "16", *([] if "--unshared" in more else ["--page", "4"])]
    run = f"{config.placement.runs}/{config.name}"
    serve_trace.main([str(path), "--model", run, *sizes, *more, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * GOOD["new_tokens"]
    assert (found["hit_rate"] > 0) == (more != ["--unshared"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pages", "1"], "trace.jsonl, request 1 by arrival"),
        (["--page", "0"], "page = 0 must be positive"),
        (["--pages", "-3"], "pages = -3 must be positive"),
        (["--made.shared", "8"], "add --make, or remove --made"),
        (["--unshared"], "--page applies only to a prefix-shared cache"),
        (["--attention", "mosaic"], "Mosaic GPU is not available on cpu"),
        (["--cache", "kivi4"], "page = 4 must be a multiple of 32"),
        (
            ["--cache", "h2o:keep=0.5"],
            "h2o:keep=0.5' is a policy that evicts tokens",
        ),
        (["--cache", "int9"], "unknown cache format 'int9'; did you mean int8"),
        (["--model", "smoke.tine"], "unknown experiment"),
        # Before the model is opened:
        (["--model", "smoke.tine", "--make", "shared-promt"], "did you mean shared-prompt"),
        (["--model", "smoke.tine", "--retain", "1XB"], "retain = '1XB'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path, capsys, more, words):
    path = written(tmp_path, GOOD | {"prompt": [1] * 9})
    with pytest.raises(SystemExit) as stop:
        serve_trace.main([str(path), *MODEL, *more])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
