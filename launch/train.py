"""Train an experiment, or every row of a study.

    python -m launch.train NAME [--FIELD VALUE ...]

    python -m launch.train smoke                                  # seconds; see that it works
    python -m launch.train demo                                   # all rows of a study, one by one
    python -m launch.train demo.h32_mqa --model.kv-map cla:3 --name demo/h32_mqa_cla3
    python -m launch.train NAME --help                            # every field and its default

A run lives in runs/<its name>. Starting it again continues from its newest checkpoint, on whatever
devices are there; a run with another identity needs another --name. SIGTERM, or Ctrl-C, finishes the step,
saves, and exits with code 42: start it again to go on.
"""

import logging
import sys
from collections.abc import Sequence

import tyro

import experiments
from cla_jax import goodput
from cla_jax.config import Config
from launch import allocator
from launch.cli import user_errors


def parse(argv: Sequence[str]) -> list[Config]:
    """The configs of an experiment or study, with the command line's fields put in."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nExperiments:")
        for name, row in experiments.rows().items():
            print(f"  {name:28s}{(row.__doc__ or '').strip().splitlines()[0]}")
        raise SystemExit(0 if argv else 2)
    name, *overrides = argv
    configs = [
        tyro.cli(
            Config,
            default=config,
            args=overrides,
            prog=f"python -m launch.train {name}",
            description=f"{config.name}: every field of the run, with its default.",
        )
        for config in experiments.find(name)
    ]
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"--name gives every row of the study {name!r} the same directory")
    return configs


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    configs = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("cla_jax").setLevel(logging.INFO)

    allocator.keep_freed_memory()
    # After the command line: --help and mistakes in it should not wait for jax.
    from cla_jax.evaluate import during_training
    from cla_jax.runs import run_path
    from cla_jax.train import Diverged, train
    from launch import distributed, programs

    distributed.initialize()
    programs.remember(run_path(configs[0]).parent)
    should_stop = distributed.stop_on_signal()
    clock = goodput.Clock(goodput.process_start())
    for config in configs:
        try:
            complete = train(config, evaluate=during_training, should_stop=should_stop, clock=clock)
        except Diverged as error:
            raise SystemExit(f"diverged: {error}") from None
        clock = goodput.Clock()  # the next row pays for no other's time
        more = config is not configs[-1]
        if not complete or (more and should_stop(config.steps)):
            raise SystemExit(distributed.STOPPED)


if __name__ == "__main__":
    main()
