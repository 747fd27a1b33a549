"""The lm-evaluation-harness on tiny runs: answers against full forward passes, tasks, records, mistakes."""

import json
import sys

import jax
import numpy as np
import pytest

from cla_jax import checkpoint, report, seals
from cla_jax.evaluate import open_session
from cla_jax.evaluation import plain
from cla_jax.formats import FORMATS
from cla_jax.interop.task_data import Tasks
from cla_jax.recall_tasks import write_tasks
from cla_jax.report import tasks as scores
from cla_jax.runs import find_runs
from cla_jax.train import train
from launch import compare
from launch import evaluate as launch
from tests import reference

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("above_all_runs")]

END = 256
CONTEXT = 32
QUIZ = """
task: {name}
tag: exam
dataset_path: school/{name}
output_type: multiple_choice
training_split: train
validation_split: validation
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1.0}}
"""
OTHERS = {
    "essay": """
task: essay
dataset_path: school/essay
dataset_name: long
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte}]
metadata: {version: 2.0}
""",
    "dictation": """
task: dictation
dataset_path: school/dictation
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 0.0}
""",
}


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """(the harness's index of some tasks, the directory of their data)"""
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("school")
    configs = OTHERS | {name: QUIZ.format(name=name) for name in ("quiz", "oral", "lost")}
    (home / "configs").mkdir()
    for name, config in configs.items():
        (home / "configs" / f"{name}.yaml").write_text(config)
    draw = np.random.default_rng(0)
    words = lambda n: " ".join("".join(map(chr, draw.integers(97, 123, 3))) for _ in range(n))
    quiz = [
        {"question": words(3), "choices": [words(1 + i) for i in range(4)], "label": i % 4}
        for i in range(9)
    ]
    rows = {
        "school/quiz/default/validation": quiz,
        "school/oral/default/test": quiz[:5],
        "school/essay/long/test": [{"page": words(20)}, {"page": words(2)}],
        "school/dictation/default/test": [{"question": words(2), "answer": "x"}] * 3,
    }
    for name, lines in rows.items():
        file = home / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = TaskManager(include_path=str(home / "configs"), include_defaults=False)
    return index, str(home / "data")


@pytest.fixture
def run(tiny, devices):
    devices(1)
    config = tiny(steps=2)
    train(config, evaluate=lambda *_: {})
    (found,) = find_runs([config.placement.runs])
    return found


@pytest.fixture
def model(run):
    """What makes a harness's model of the run, its weights made wild."""
    from cla_jax.interop.lm_eval import Model

    session = open_session(run)
    wild = reference.randomised(session.model)
    with jax.set_mesh(session.mesh):
        yield lambda **options: Model(session, wild, **{"context": CONTEXT} | options)


def ask(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]


def log_probabilities(model, tokens):
    logits = reference.logits(model._model, model._model.config, np.array(tokens))
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (logits.max(-1, keepdims=True))
    )


@pytest.mark.parametrize(
    ("way", "matmul"), [("full", "xla"), ("dense", "xla"), ("dense", "native")]
)
def test_log_likelihoods_are_those_of_each_text_alone(model, way, matmul):
    model = model(way=way, chunk=7, matmul=matmul)
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " Rome, I think"),
        ("The capital of France is", " Paris"),
        ("The capital of France is ", "P"),  # the space goes to the continuation
        ("", "An empty context"),
        ("   ", "no"),
        ("The capital of", " Sp"),
        ("Longer than what the model reads, by far: " * 3, "the end of it"),
    ]
    found = model.loglikelihood(ask("loglikelihood", *pairs))
    for (context, rest), (logprob, is_greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        rest = context[len(stripped) :] + rest
        before = list(stripped.encode()) or [END]
        whole = [*before, *rest.encode()][-(CONTEXT + 1) :]
        n = len(rest.encode())
        log_p = log_probabilities(model, whole[:-1])[-n:]
        assert logprob == pytest.approx(log_p[np.arange(n), whole[-n:]].sum(), abs=1e-4)
        assert is_greedy == (log_p.argmax(-1) == whole[-n:]).all()


def test_rolling_predicts_every_token_once_with_as_much_context_as_there_is(model):
    model = model()
    texts = ["short", "x" * CONTEXT, "".join(map(chr, range(32, 127))), ""]
    found = model.loglikelihood_rolling(ask("loglikelihood_rolling", *[(t,) for t in texts]))
    for text, total in zip(texts, found, strict=True):
        tokens, expected = [END, *text.encode()], 0.0
        for begin in range(1, len(tokens), CONTEXT):
            end = min(begin + CONTEXT, len(tokens))
            inputs = tokens[max(end - CONTEXT - 1, 0) : end - 1]
            log_p = log_probabilities(model, inputs)[-(end - begin) :]
            expected += log_p[np.arange(end - begin), tokens[begin:end]].sum()
        assert total == pytest.approx(expected, abs=1e-3)


def test_generation_ends_at_stop_strings(model):
    plain = model()
    prompts = ["Hello", "", "Fellow citizens of the Senate and of the House"]
    asked = lambda **more: ask(
        "generate_until", *[(p, {"max_gen_toks": 20, "do_sample": False} | more) for p in prompts]
    )
    whole = plain.generate_until(asked(until=[]))
    for prompt, words in zip(prompts, whole, strict=True):
        tokens = list(prompt.encode())[-(CONTEXT - 20) :] or [END]
        expected: list[int] = []
        while len(expected) < 20:
            best = log_probabilities(plain, [*tokens, *expected])[-1][:257].argmax()
            if best == END:
                break
            expected.append(int(best))
        assert words == bytes(expected).decode(errors="replace")
    stops = [whole[0][3:5], whole[2][7]]
    cut = lambda words: min((words.split(stop)[0] for stop in stops), key=len)
    assert cut(whole[0]) != whole[0]
    assert plain.generate_until(asked(until=stops)) == [cut(words) for words in whole]
    with pytest.raises(ValueError, match="num_beams = 4, which is not supported"):
        plain.generate_until(asked(until=[], num_beams=4))
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": None, "no_repeat_ngram_size": 0}
    assert plain.generate_until(asked(until=[], length_penalty=1.0, **neutral)) == whole
    with pytest.raises(ValueError, match=r"repetition_penalty = 1.2, which is not supported"):
        plain.generate_until(asked(until=[], **(neutral | {"repetition_penalty": 1.2})))
    with pytest.raises(ValueError, match="a task generates 40 tokens, which leaves no room"):
        plain.generate_until(asked(until=[], max_gen_toks=40))


@pytest.mark.slow
def test_every_cache_answers_every_kind_of_task(run, school):
    from cla_jax.interop.lm_eval import evaluate

    index, data = school
    tasks = Tasks(["quiz", "essay", "dictation"], data=data, index=index)
    everything = "fastgen:T=1"
    ways = ("full", *FORMATS, everything)
    found = {(way, task): score for way, task, score in evaluate(run, tasks, ways=ways)}
    assert len(found) == 3 * len(ways)
    for way in ways:
        record = run.evals()[f"tasks-{way}"]
        assert {task: plain(found[way, task]) for task in record["tasks"]} == record["tasks"]
        close = {"float32": 1e-4, "dense": 1e-4}.get(way, 0.1)
        for task, metric in (("essay", "bits_per_byte"), ("quiz", "acc")):
            exact = found["full", task].metrics[metric]
            assert found[way, task].metrics[metric] == pytest.approx(exact, rel=close, abs=0.25)
    # A policy that evicts nothing has the scores of a dense cache: those of tasks that count are equal.
    for task in ("essay", "quiz", "dictation"):
        kept, dense = (found[way, task].metrics for way in (everything, "dense"))
        assert kept == pytest.approx(dense, rel=1e-5)
    assert found[everything, "quiz"].metrics["acc"] == found["dense", "quiz"].metrics["acc"]


@pytest.mark.slow
def test_what_a_policy_forgets_shows_by_depth(run, tmp_path):
    from cla_jax.interop.lm_eval import Model, _asked, _scored

    write_tasks(tmp_path, count=12, length=150)
    tasks = Tasks(["recall_needle"], data=str(tmp_path))
    session = open_session(run)
    wild = reference.randomised(session.model)
    found = {}
    for way in ("full", "fastgen:T=1", "window:tokens=16,recent=4"):
        answers = Model(session, wild, way=way, context=256)
        ((name, loaded),) = tasks.loaded.items()
        found[way] = _scored(answers, loaded, None, _asked(answers, loaded))[name]
    full, everything, some = found.values()
    assert full.n == sum(part.n for part in full.depths.values()) == 12
    assert len(full.depths) > 3
    assert (full.kept_of_prompt, everything.kept_of_prompt) == (None, 1)
    assert 0.05 < some.kept_of_prompt < 0.3
    for depth, part in full.depths.items():
        same, other = (one.depths[depth].metrics["perplexity"] for one in (everything, some))
        assert same == pytest.approx(part.metrics["perplexity"], rel=1e-4)
        assert other != pytest.approx(part.metrics["perplexity"], rel=1e-2)
    # The metric of a task is that of all its depths.
    means = [np.log(part.metrics["perplexity"]) * part.n for part in some.depths.values()]
    assert np.exp(sum(means) / 12) == pytest.approx(some.metrics["perplexity"], rel=1e-6)


def test_every_way_is_asked_with_the_same_solved_examples(run, school, monkeypatch):
    from cla_jax.interop import lm_eval

    asked = []
    loglikelihood = lm_eval.Model.loglikelihood

    def recorded(self, requests, **options):
        asked.append([request.args for request in requests])
        return loglikelihood(self, requests, **options)

    monkeypatch.setattr(lm_eval.Model, "loglikelihood", recorded)
    index, data = school
    tasks = Tasks(["quiz"], data=data, index=index, shots=2)
    found = [score for *_, score in lm_eval.evaluate(run, tasks, ways=("full", "dense"))]
    assert asked[0] == asked[1]
    assert len({context for context, _ in asked[0]}) == 9  # each question has examples of its own
    assert found[0].metrics == pytest.approx(found[1].metrics)


def test_scores_are_recorded_together_and_compared(run, school, capsys):
    from cla_jax.interop.lm_eval import evaluate

    index, data = school
    few = list(evaluate(run, Tasks(["quiz"], data=data, index=index), limit=3))
    assert few[0][2].n == 3
    assert run.evals() == {}  # a part of a task is no result of the run
    list(evaluate(run, Tasks(["quiz"], data=data, index=index)))
    list(evaluate(run, Tasks(["essay"], data=data, index=index, shots=0), ways=("full", "int8")))
    full, int8 = run.evals()["tasks-full"], run.evals()["tasks-int8"]
    assert (list(full["tasks"]), list(int8["tasks"])) == (["essay", "quiz"], ["essay"])
    assert (full["step"], int8["cache"], int8["tasks"]["essay"]["chunk"]) == (2, "int8", 16)
    quiz = full["tasks"]["quiz"]
    # Its test split is not there: the validation split stands in, and is named.
    assert (quiz["n"], quiz["split"], quiz["shots"], quiz["version"]) == (9, "validation", 0, 1.0)
    assert quiz["data"]["data_files"] == {
        "validation": f"{data}/school/quiz/default/validation.jsonl"
    }
    assert 0 <= quiz["metrics"]["acc"] <= 1
    assert quiz["metrics"]["acc_stderr"] > 0
    rows = report.read([run])
    headings, lines = scores.lines(rows)
    assert headings == ["run", "essay\nbits_per_byte", "quiz\nacc_norm"]
    assert [line[0] for line in lines] == ["tiny", "tiny, int8"]
    assert lines[1][2] == "—"
    assert lines[0][2].startswith(f"{quiz['metrics']['acc_norm']:.4f} ± ")
    compare.main([str(run.path)])
    assert "acc_norm" in capsys.readouterr().out
    assert "Downstream tasks" in (run.path / "report.html").read_text()
    # Of another checkpoint, nothing is kept.
    for other in ({"step": 1}, {"checkpoint": "another"}):
        earlier = seals.seal(full | other | {"run": run.id}, "tasks-full")
        (run.path / "eval" / "tasks-full.json").write_text(json.dumps(earlier))
        list(evaluate(run, Tasks(["essay"], data=data, index=index)))
        assert list(run.evals()["tasks-full"]["tasks"]) == ["essay"]


def test_what_is_recorded_is_not_scored_again(run, school, monkeypatch, caplog):
    from cla_jax.interop import lm_eval

    scored = []
    evaluated = lm_eval.evaluated

    def counted(task_dict, **options):
        scored.append(sorted(task_dict["tasks"]))
        return evaluated(task_dict=task_dict, **options)

    monkeypatch.setattr(lm_eval, "evaluated", counted)
    index, data = school

    def evaluate(*names, shots=0, **options):
        scored.clear()
        tasks = Tasks(names, data=data, index=index, shots=shots)
        return list(lm_eval.evaluate(run, tasks, **options)), list(scored)

    first, _ = evaluate("quiz", "exam")
    assert evaluate("quiz", "exam", "essay")[1] == [["essay"]]  # as after an interruption
    assert "exam, full is already recorded (--again scores it again)" in caplog.text
    metrics = lambda found: [(task, score.metrics) for _, task, score in found]
    recorded, what = evaluate("quiz", "exam")
    assert (metrics(recorded), what) == (metrics(first), [])
    again, what = evaluate("quiz", again=True)
    assert what == [["quiz"]]
    assert metrics(again) == metrics(first)[:1]
    # Asked in another way, it is something else; and a part of a task is never a record.
    for other in ({"shots": 1}, {"context": 20}, {"ways": ("int8",)}, {"limit": 2}):
        assert evaluate("quiz", **other)[1] == [["quiz"]]
    assert evaluate("quiz", ways=("int8",))[1] == []
    assert evaluate("quiz", ways=("int8",), chunk=8)[1] == [["quiz"]]
    for what in ([["quiz"]], []):
        assert evaluate("quiz", ways=("int8",), chunk=8, matmul="native")[1] == what


def test_a_tag_is_its_tasks_as_far_as_there_are_data(school, caplog):

    index, data = school
    tasks = Tasks(["exam"], data=data, index=index)
    assert sorted(tasks.loaded["exam"]["tasks"]) == ["oral", "quiz"]
    assert "exam: skipped, because there is no local data: lost" in caplog.text
    assert len(tasks.loaded["exam"]["tasks"]["oral"].eval_docs) == 5


def test_mistakes_are_named(run, school, monkeypatch):
    from cla_jax.interop.lm_eval import evaluate

    index, data = school
    with pytest.raises(ValueError, match="unknown task 'quizz'; did you mean quiz"):
        Tasks(["quizz"], data=data, index=index)
    with pytest.raises(
        ValueError, match=r"no local data of lost \(.*school/lost/default\); .*fetch"
    ):
        Tasks(["lost"], data=data, index=index)
    tasks = Tasks(["quiz"], data=data, index=index)
    with pytest.raises(ValueError, match="unknown cache format 'int9'; did you mean int8"):
        next(evaluate(run, tasks, ways=("int9",)))
    with pytest.raises(ValueError, match="limit = 0 must be positive"):
        next(evaluate(run, tasks, limit=0))
    monkeypatch.delitem(sys.modules, "cla_jax.interop.lm_eval")
    for module in ("lm_eval.tasks", "lm_eval.models.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    extra = r"pip install -e '.\[interop\]'"
    with pytest.raises(ValueError, match=extra):
        Tasks(["quiz"], data=data)
    with pytest.raises(ValueError, match=extra):
        import cla_jax.interop.lm_eval  # noqa: F401


@pytest.mark.slow
def test_from_the_command_line(run, tmp_path, capsys):
    """With the harness's own tasks; for a wrong name all of them are read, which takes a while."""
    row = {"question": "What rusts?", "support": "Iron rusts.", "correct_answer": "iron"}
    row |= {f"distractor{i}": word for i, word in enumerate(("wood", "gold", "ice"), 1)}
    file = tmp_path / "tasks" / "allenai" / "sciq" / "default" / "validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text((json.dumps(row) + "\n") * 3)
    data = ["--task-data", str(tmp_path / "tasks")]
    data += ["--data-dir", run.config().placement.data_dir]  # not below the current directory
    launch.main([str(run.path), "--tasks", "sciq", "--cache", "int8", *data])
    assert "3 examples of validation" in " ".join(capsys.readouterr().out.split())
    assert run.evals()["tasks-int8"]["tasks"]["sciq"]["n"] == 3
    for tasks, words in (("sciqq", "did you mean sciq"), ("mmlu", "mmlu is a group")):
        with pytest.raises(SystemExit) as exit:
            launch.main([str(run.path), "--tasks", tasks, *data])
        assert exit.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_answers_are_those_of_the_harness_s_own_backend(tiny, devices, tmp_path):
    """A plain Llama, exported, through its Hugging Face backend: all that can be asked, in any order."""
    from lm_eval.models.huggingface import HFLM

    from cla_jax.interop.export import export
    from cla_jax.interop.lm_eval import Model

    devices(1)
    config = tiny(steps=30, **{"model.kv_map": "identity", "model.kv_norm": "block"})
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    theirs = HFLM(
        pretrained=str(export(run, tmp_path / "exported")),
        device="cpu",
        dtype="float32",
        batch_size=4,
        max_length=CONTEXT,
    )
    session = open_session(run)
    with jax.set_mesh(session.mesh):
        _, model = checkpoint.load_model(run, session.rules, session.mesh)
        ours = Model(session, model, context=CONTEXT)
        draw = np.random.default_rng(0)
        speech = "the people of a nation, and in peace we are what others have been before us. " * 2
        words = lambda low, high: speech[draw.integers(40) :][: draw.integers(low, high)]
        pairs = [(words(0, 60), " " + words(1, 12)) for _ in range(30)]
        pairs += [(context, " " + words(1, 12)) for context, _ in pairs]
        asked = ask("loglikelihood", *pairs)
        found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
        texts = ask("loglikelihood_rolling", *[(words(1, 100),) for _ in range(4)])
        rolled = ours.loglikelihood_rolling(texts)
        options = {"max_gen_toks": 12, "until": ["e"], "do_sample": False}
        prompts = ask("generate_until", *[(words(5, 60), options) for _ in range(4)])
        generated = ours.generate_until(prompts)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], atol=1e-3)
    np.testing.assert_allclose(
        rolled, theirs.loglikelihood_rolling(texts, disable_tqdm=True), atol=1e-2
    )
    assert generated == theirs.generate_until(prompts, disable_tqdm=True)


def test_texts_behind_a_begin_token_are_answered_as_by_the_harness_s_own_backend(tmp_path, devices):
    """An imported Llama whose tokenizer puts a token before every text, and which has two end tokens."""
    import tokenizers as hf_tokenizers
    from lm_eval.models.huggingface import HFLM

    from cla_jax import interop as read_from
    from cla_jax.interop.foreign import import_run
    from cla_jax.interop.lm_eval import Model
    from cla_jax.interop.text import Text
    from tests import interop

    devices(1)
    directory = interop.write_hf(tmp_path / "hf", bos_token_id=257, eos_token_id=[256, 258])
    inner = hf_tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.add_special_tokens(["<s>", "<eot>"])
    inner.post_processor = hf_tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    inner.save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": interop.END}))
    text = Text(seq_len=CONTEXT, source="sotu:40", data_dir=str(tmp_path / "data"))
    run = import_run(read_from.read(directory), tmp_path / "run", text)
    options = {"device": "cpu", "dtype": "float32", "batch_size": 1, "max_length": CONTEXT}
    theirs = HFLM(pretrained=str(directory), **options)
    session = open_session(run)
    with jax.set_mesh(session.mesh):
        _, model = checkpoint.load_model(run, session.rules, session.mesh)
        ours = Model(session, model, context=CONTEXT, ends=run.end_ids(256, 264))
        assert ours.prefix_token_id == theirs.prefix_token_id == 257
        pairs = ask(
            "loglikelihood", ("", "abc"), ("The", "abc"), ("The ", "state"), ("<s>The", "abc")
        )
        found, rolls = (
            ours.loglikelihood(pairs),
            ask("loglikelihood_rolling", ("The union",), ("x" * 50,)),
        )
        rolled = ours.loglikelihood_rolling(rolls)
        more = {"max_gen_toks": 12, "until": ["\n"], "do_sample": False}
        prompts = ask("generate_until", *[(words, more) for words in ("The", "state of", "x")])
        generated = ours.generate_until(prompts)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in expected], atol=1e-3)
    expected = theirs.loglikelihood_rolling(rolls, disable_tqdm=True)
    np.testing.assert_allclose(rolled, expected, atol=1e-2)
    assert generated == theirs.generate_until(prompts, disable_tqdm=True)
