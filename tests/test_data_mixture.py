"""Mixtures: the tokens of every batch, by a second implementation that goes row by row."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cla_jax.config import Component, Config, DataConfig, Stage
from cla_jax.config.record import from_record, run_identity, to_record
from cla_jax.data import loader, mixture, prepare, tokenizers
from cla_jax.fields import difference, replaced
from cla_jax.session import batch_stream, prepare_session
from launch import train
from launch.cli import read_config
from launch.sweeps import trials

B = 8


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three sources of very different size, by their names."""
    directory, found = tmp_path_factory.mktemp("texts"), {}
    for name, count in (("web", 60), ("code", 25), ("math", 16)):
        (directory / name).mkdir()
        for i in range(count):
            (directory / name / f"{i:03}.txt").write_text(f"{name} {i}: " + f"{i * 7919} " * 12)
        found[name] = f"text:{directory}/{name}/*.txt"
    return found


@pytest.fixture
def mixed(tiny, texts):
    """`mixed((0.5, 0.3, 0.2), Stage...)`: a config of the three sources with these weights."""

    def make(weights, *stages: Stage, **changes) -> Config:
        parts = tuple(
            Component(name=name, source=texts[name], weight=weight)
            for name, weight in zip(texts, weights, strict=True)
        )
        fields = {"data.mixture": parts, "data.stages": stages, "data.held_out": 0.3, "steps": 60}
        return replaced(tiny(), fields | changes)

    return make


def stage(step: int, **weights: float) -> Stage:
    return Stage(step=step, weights=tuple(weights.items()))


# -------------------------------------------------------------------- the second implementation


class Splitter:
    """Deals rows out to components one after the other, by adding up remainders.

    Each component takes a row whenever the rows that the ones before it left, times the share of the
    ones after it, do not reach the next whole number.
    """

    def __init__(self, weights: list[int]):
        self.weights, self.remainders = weights, [0] * len(weights)

    def next(self) -> int:
        rest = sum(self.weights)
        for i, weight in enumerate(self.weights):
            passed_on, self.remainders[i] = divmod(self.remainders[i] + rest - weight, rest or 1)
            if not passed_on:
                return i
            rest -= weight
        raise AssertionError(self.weights)


def epochs_of(windows: int, seed: int) -> Iterator[int]:
    """The windows of a component, epoch after epoch."""
    order = grain.MapDataset.range(windows).seed(seed).shuffle().repeat()
    return (order[i] for i in itertools.count())  # iter() would read five hundred ahead


def sequential(config: Config, whole_numbers: dict[int, list[int]]) -> Iterator[np.ndarray]:
    """The rows of a run, from its first; the weights in whole numbers by the step they begin at."""
    parts, orders = [], []
    for component in config.data.mixture:
        alone = dataclasses.replace(config.data, source=component.source, mixture=(), stages=())
        parts.append(prepare.prepare(alone, config.placement.data_dir).split("train"))
        digest = hashlib.sha256(f"{config.seed} {component.name}".encode()).hexdigest()
        orders.append(epochs_of(len(parts[-1]), int(digest[:8], 16)))
    for step in itertools.count():
        if step in whole_numbers:
            splitter = Splitter(whole_numbers[step])
        for _ in range(config.batch_size):
            component = splitter.next()
            yield parts[component][next(orders[component])]["tokens"]


def batches_of(config: Config, first: int, steps: int) -> list[np.ndarray]:
    session = prepare_session(config)
    stream = batch_stream(session, first)
    found = [np.asarray(next(stream)).reshape(config.batch_size, -1) for _ in range(steps)]
    stream.close()
    return found


@pytest.mark.parametrize(
    ("weights", "stages", "whole"),
    [
        ((0.7, 0.2, 0.1), (), {0: [7, 2, 1]}),
        ((1, 1, 1), (), {0: [1, 1, 1]}),
        ((0.55, 0.45, 0), (stage(5, web=0.125, math=0.875),), {0: [11, 9, 0], 5: [1, 0, 7]}),
        (
            (3, 0, 0),
            (stage(4, code=1), stage(9, web=0.3, code=0.3, math=0.4)),
            {0: [1, 0, 0], 4: [0, 1, 0], 9: [3, 3, 4]},
        ),
    ],
)
def test_tokens_equal_those_of_a_sequential_implementation(
    mixed, devices, monkeypatch, weights, stages, whole
):
    devices(1)
    steps = 24
    config = mixed(weights, *stages)
    expected = sequential(config, whole)
    expected = [np.stack(list(itertools.islice(expected, B))) for _ in range(steps)]
    for ours, theirs in zip(batches_of(config, 0, steps), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Some component is seen again, or the test says nothing of epochs.
    assert max(prepare_session(config).epochs(steps).values()) > 1
    for start in (1, 4, 5, 13):  # a restart; before, at and after a change of the weights
        for ours, theirs in zip(batches_of(config, start, 3), expected[start:], strict=False):
            np.testing.assert_array_equal(ours, theirs)
    accumulated = replaced(config, {"placement.accumulate": 4})
    np.testing.assert_array_equal(batches_of(accumulated, 7, 1)[0], expected[7])
    # Hosts read their own rows; meshes place them.
    session = prepare_session(config)
    windows = {name: part.split("train") for name, part in session.prepared.parts.items()}
    batches = loader.Batches(windows, batch_size=B, seed=config.seed, schedule=session.schedule)
    for hosts in (2, 4, 8):
        rows = B // hosts
        parts = [batches.rows(11, host * rows, (host + 1) * rows) for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), expected[11])
    monkeypatch.undo()
    for shape in ((8, 1), (2, 4)):
        mesh = jax.make_mesh(shape, ("data", "model"))
        placed = batches.place(11, NamedSharding(mesh, PartitionSpec(None, "data")))
        np.testing.assert_array_equal(np.asarray(placed)[0], expected[11])


def test_weights_are_exact_shares_and_never_far_off():
    for weights in ((0.7, 0.2, 0.1), (0.3, 0.3, 0.4), (1 / 3, 2 / 3), (0.1,) * 10, (5, 0, 0.5)):
        whole = mixture.shares(weights)
        schedule, total = mixture.Schedule([(0, weights)]), sum(whole)
        assert [n / total for n in whole] == pytest.approx([w / sum(weights) for w in weights])
        for rows in (total, 3 * total, 10**12 * total):
            assert schedule.counts(rows) == [n * rows // total for n in whole]
        for rows in range(min(total, 200)):
            for count, n in zip(schedule.counts(rows), whole, strict=True):
                assert abs(count - n * rows / total) < len(weights)
    assert mixture.shares((0.7, 0.3)) == (7, 3)


def test_a_far_row_is_reached_at_once():
    schedule = mixture.Schedule([(0, (0.7, 0.3)), (10**15, (0.5, 0.5))])
    counts = schedule.counts(10**18 + 1)
    assert sum(counts) == 10**18 + 1
    component, before = schedule.place(10**18)
    assert counts[component] == before + 1


# ------------------------------------------------------------------------------------------ data


def test_a_component_is_the_data_of_its_source_and_the_order_follows_its_name(
    mixed, texts, devices
):
    devices(1)
    config = mixed((1, 1, 1))
    corpus = prepare_session(config).prepared
    assert list(corpus.parts) == ["web", "code", "math"]
    alone = replaced(config, {"data.mixture": (), "data.source": texts["code"]})
    assert prepare_session(alone).prepared.fingerprint == corpus.parts["code"].path.name
    assert corpus.totals["train"]["windows"] == sum(
        len(part.split("train")) for part in corpus.parts.values()
    )
    # Another weight is the same data; another set of sources is not.
    other = prepare_session(mixed((0, 1, 3))).prepared
    assert other.fingerprint == corpus.fingerprint
    fewer = replaced(config, {"data.mixture": config.data.mixture[1:]})
    assert prepare_session(fewer).prepared.fingerprint != corpus.fingerprint
    assert prepare.fingerprint(config.data, config.placement.data_dir) == corpus.fingerprint
    assert mixture.seed_of(7, "") == 7
    assert len({mixture.seed_of(seed, name) for seed in (0, 1) for name in texts}) == 6


def test_a_learned_tokenizer_reads_the_training_documents_of_all_components(mixed, texts, tmp_path):
    config = mixed((1, 0, 2), **{"data.tokenizer": "bpe:300", "model.vocab_size": 300}).data
    corpus = prepare.corpus(config, tmp_path)
    learned = tokenizers.make_tokenizer(config)
    assert all(part.tokenizer == learned for part in corpus.parts.values())
    alone = dataclasses.replace(config, mixture=(), source=texts["web"])
    assert tokenizers.make_tokenizer(alone) != learned
    # Weights, names and order do not matter to it, so mixtures of the same sources can be compared.
    turned = tuple(
        dataclasses.replace(part, name=f"x{i}", weight=i + 1)
        for i, part in enumerate(reversed(config.mixture))
    )
    again = prepare.corpus(dataclasses.replace(config, mixture=turned), tmp_path)
    assert {part.path for part in again.parts.values()} == {
        part.path for part in corpus.parts.values()
    }
    # A run's own copy stands for it: nothing is learned where there is one.
    (kept,) = (path for path in tmp_path.iterdir() if path.name.startswith("tokenizer-"))
    found = prepare.fingerprint(config, tmp_path / "elsewhere", learned.to_json())
    assert found == corpus.fingerprint
    assert not (tmp_path / "elsewhere").exists()
    (kept / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json has 2 bytes instead of"):
        prepare.corpus(config, tmp_path)


def test_runs_without_a_mixture_are_what_they_were(tiny):
    config = tiny()
    assert "mixture" not in run_identity(config)["data"]
    assert "stages" not in run_identity(config)["data"]
    assert from_record(to_record(config)) == config


def test_what_two_mixtures_differ_in_is_named(mixed):
    ours = run_identity(mixed((0.5, 0.5, 0), stage(5, web=1)))
    theirs = run_identity(mixed((0.5, 0.25, 0), stage(5, code=1)))
    assert difference(ours, theirs) == {
        "data.mixture.code.weight": (0.5, 0.25),
        "data.stages.0.weights": ((("web", 1),), (("code", 1),)),
    }


# ---------------------------------------------------------------------------------- command line


def test_a_mixture_as_text_and_as_json(mixed, tiny):
    config = mixed((0.7, 0, 3e-05), stage(20, code=0.25, web=1))
    words = ["--data.mixture", *map(str, config.data.mixture)]
    words += ["--data.stages", *map(str, config.data.stages)]
    read = read_config(tiny(steps=60, **{"data.held_out": 0.3}), words)
    assert read == config
    assert read.data.source == ""
    record = to_record(config)
    assert from_record(record) == config
    assert hash(config) == hash(read)
    # As a sweep puts it into every trial.
    change = trials._changes(words)
    for other in (tiny(steps=60), tiny(steps=60, seed=1)):
        assert change(other).data.mixture == config.data.mixture
        assert change(other).seed == other.seed


@pytest.mark.parametrize("components", [2, 3])
def test_a_command_line_replaces_or_removes_a_mixture(mixed, components):
    config = mixed((1, 1, 1))
    config = replaced(config, {"data.mixture": config.data.mixture[:components]})
    other = read_config(config, ["--data.mixture", "a=1:sotu", "b=2:sotu:3"])
    assert other.data.named_sources == (("data.mixture: a", "sotu"), ("data.mixture: b", "sotu:3"))
    alone = read_config(config, ["--data.mixture", "--data.source", "sotu:3"])
    assert alone.data.named_sources == (("data.source", "sotu:3"),)


@pytest.mark.parametrize(
    ("mixture_words", "stages", "message"),
    [
        (["web"], [], "NAME=WEIGHT:SOURCE"),
        (["web=0.7"], [], "NAME=WEIGHT:SOURCE"),
        (["web=much:sotu"], [], "'much' is not a number"),
        (["web=-1:sotu"], [], r"weight of web is -1\.0"),
        (["web=nan:sotu"], [], "weight of web is nan"),
        (["web=0:sotu"], [], "all weights are 0"),
        (["a/b=1:sotu"], [], "the name 'a/b'"),
        (["a=1:sotou"], [], "component a: unknown source type 'sotou'; did you mean sotu"),
        (["code=0.3:txt:*.py"], [], "component code: unknown source type 'txt'; did you mean text"),
        (["a=1:sotu", "a=1:sotu:3"], [], "two components called 'a'"),
        ([], ["3:a=1"], "give data.mixture"),
        (["web=1:sotu"], ["3:wep=1"], "'wep'; did you mean web"),
        (["web=1:sotu"], ["web=1"], "STEP:NAME=WEIGHT"),
        (["web=1:sotu"], ["3:web=0"], "from step 3 on, all weights are 0"),
        (["web=1:sotu"], ["3:web=1,web=2"], "step 3 gives 'web' two weights"),
        (["web=1:sotu"], ["3:web=1", "3:web=2"], "3 comes after 3"),
        (["web=1:sotu"], ["0:web=1"], "step = 0 must be positive"),
    ],
)
def test_refusals_say_what_is_wrong(mixture_words, stages, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(
            seq_len=8,
            mixture=tuple(map(Component.parse, mixture_words)),
            stages=tuple(map(Stage.parse, stages)),
        )


def test_a_stage_after_the_last_step_is_refused(mixed):
    with pytest.raises(ValueError, match=r"data\.stages: 60:web=1.* steps = 60"):
        mixed((1, 1, 1), stage(60, web=1))


def test_a_tokenizer_beside_a_config_file_is_found(tiny, tmp_path):
    config = replaced(tiny(), {"data.tokenizer": "tokenizer.json"})
    (tmp_path / "config.json").write_text(json.dumps(to_record(config)))
    (read,) = train.parse([str(tmp_path / "config.json")])
    assert read.data.tokenizer == "tokenizer.json"  # there is none
    (tmp_path / "tokenizer.json").write_text("{}")
    (read,) = train.parse([str(tmp_path / "config.json")])
    assert read.data.tokenizer == str(tmp_path / "tokenizer.json")
