"""Train an experiment, or every row of a study.

    python -m launch.train NAME [--FIELD VALUE ...]

    python -m launch.train smoke                                  # a test of the installation, in seconds
    python -m launch.train demo                                   # all rows of a study, one after another
    python -m launch.train demo.h16_mqa --model.kv-map cla:3 --name demo/h16_mqa_cla3
    python -m launch.train NAME --help                            # every field and its default
    python -m launch.train path/to/mine.py:row                    # a function in a file of your own
    python -m launch.train runs/demo/seeds/h16_mqa.seed-0/config.json --name demo/again  # repeat a run

A run is stored in runs/NAME. Start it again, on any devices, and it continues from its newest checkpoint.
If you change its model, data, optimizer, batch size, steps, seed or start, give it another --name. On SIGTERM
or Ctrl-C it finishes the current step, saves, and exits with code 42; start it again to continue.

On several hosts, start the same command on each. Only --placement.data-dir may differ between them.
launch/hosts/distributed.py explains what happens when a host fails.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

import experiments
from cla_jax import goodput, preflight, runs
from cla_jax.config import Config
from cla_jax.fields import replaced
from launch import allocator, hosts
from launch.cli import log_to_stderr, read_config, user_errors


def parse(argv: Sequence[str]) -> list[Config]:
    """The configs of an experiment or study, with the command line's fields put in."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n{hosts.usage()}\nExperiments:")
        for name, row in experiments.rows().items():
            print(f"  {name:30s}{experiments.summary(row)}")
        raise SystemExit(0 if argv else 2)
    name, *overrides = argv
    configs = [
        _with_tokenizer(
            name,
            read_config(
                config,
                overrides,
                also=hosts.flags(),
                prog=f"python -m launch.train {name}",
                description=f"{config.name}: every field of the run, with its default. For the flags of "
                "several processes, see `python -m launch.train --help`.",
            ),
        )
        for config in _found(name)
    ]
    if name.endswith(".json") and not any(word.partition("=")[0] == "--name" for word in overrides):
        _check_place(Path(name), configs[0])
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--name would give all rows of the study {name!r} the same directory: name one row instead"
        )
    return configs


def _found(name: str) -> list[Config]:
    """The configs of an experiment or study, or the one in a file like a run's config.json."""
    if not name.endswith(".json"):
        if (Path(name) / "config.json").is_file():
            raise ValueError(f"{name} is a run directory: give {Path(name) / 'config.json'}")
        return experiments.find(name)
    return [runs.read_config(epath.Path(name))]


def _check_place(file: Path, config: Config) -> None:
    """Raises ValueError if a config.json lies in a copied or renamed run: another would be trained."""
    place = Path(runs.run_path(config))
    here = file.parent
    if not (here / "checkpoints").is_dir() or here.resolve() == place.resolve():
        return
    all_runs = Path(config.placement.runs).resolve()
    is_below = here.resolve().is_relative_to(all_runs)
    own = here.resolve().relative_to(all_runs) if is_below else here.resolve().name
    flags = ["--name", str(own)] + ([] if is_below else ["--placement.runs", str(here.parent)])
    raise ValueError(
        f"{file} lies in {here}, but it is the config of the run {config.name!r} in {place}: the directory "
        f"was copied or renamed. To train on in {here}, add {shlex.join(flags)}; to train on in {place}, add "
        f"{shlex.join(['--name', config.name])}"
    )


def _with_tokenizer(name: str, config: Config) -> Config:
    """A config from a file, with the tokenizer that lies beside it, for a run of another directory.

    An imported run refers to that copy. The run of the file's own directory finds it without help.
    """
    tokenizer, beside = config.data.tokenizer, Path(name).parent / config.data.tokenizer
    is_own = Path(runs.run_path(config)).absolute() == Path(name).parent.absolute()
    is_copy = name.endswith(".json") and tokenizer.endswith(".json") and not is_own
    if is_copy and not Path(tokenizer).is_file() and beside.is_file():
        return replaced(config, {"data.tokenizer": str(beside)})
    return config


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    processes, argv = hosts.parse(sys.argv[1:] if argv is None else argv)
    configs = parse(argv)
    log_to_stderr(informed=True)
    if hosts.alone(processes):  # with several, one that ends here would leave the others waiting
        for config in configs:
            preflight.check(config)

    allocator.set_up()
    # After the command line: --help and mistakes in it should not wait for jax.
    from launch.hosts import distributed

    with distributed.joined(processes):
        train(configs, processes)


@user_errors  # here too: a process that leaves the others needs its exit code
def train(configs: Sequence[Config], processes: hosts.Hosts) -> None:
    import jax

    from cla_jax import train as training
    from cla_jax.evaluate import during_training
    from launch import compilation_cache
    from launch.hosts import distributed

    distributed.agree({"runs": [config.name for config in configs], "versions": runs.versions()})
    for config in configs:
        preflight.check(config, leads=distributed.leads())
    compilation_cache.enable()
    should_stop = distributed.stop_on_signal()
    clock = goodput.Clock(goodput.process_start())
    for config in configs:
        try:
            with distributed.watched(should_stop, processes.step_timeout) as watched_stop:
                complete = training.train(
                    config,
                    evaluate=during_training,
                    should_stop=watched_stop,
                    # Several processes must ask equally often, so they ask after a step only.
                    stop_waiting=lambda: jax.process_count() == 1 and should_stop(0),
                    agree=distributed.agree,
                    clock=clock,
                )
        except training.Diverged as error:
            raise SystemExit(f"diverged: {error}") from None
        clock = goodput.Clock()  # each row counts only its own time
        more = config is not configs[-1]
        if not complete or (more and should_stop(config.steps)):
            raise SystemExit(distributed.STOPPED)


if __name__ == "__main__":
    main()
