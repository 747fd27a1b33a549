"""Launch a sweep: on this machine, on SLURM, on Cloud TPU, on GKE, or through SkyPilot.

    python -m launch.sweep smoke.grid --local.workers 2           # six short runs, two at a time
    python -m launch.sweep demo.learning_rate                     # trials that depend on earlier ones
    python -m launch.sweep smoke.grid --evaluate                  # evaluate the finished trials
    python -m launch.sweep cla_1b --engine slurm --slurm.partition gpu --slurm.gpus 8 --slurm.time 12:00:00
    python -m launch.sweep cla_1b --engine jobset --topology v5e:16x16 --jobset.image IMAGE --dry-run \\
        -- --placement.runs gs://BUCKET/runs

You may run the same command again at any time. It skips finished trials, does not touch waiting and running
ones, restarts dead ones from their checkpoints, and starts those that needed earlier results. With --wait,
the command repeats this until the sweep is complete (the engine `local` always does). Failed and cancelled
trials start again only with --again. With --topology, the training step of each distinct shape is compiled
first, and trials that do not fit are not submitted. Config fields for all trials come after a separate --.
Watch with `python -m launch.status SWEEP`; cancel with `python -m launch.cancel SWEEP`. docs/launch.md
describes each engine.
"""

import sys
from collections.abc import Sequence

import experiments
from launch.cli import read, user_errors
from launch.sweeps import engines
from launch.sweeps.launcher import Arguments, Launcher


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    listed = "".join(
        f"\n    {name:30s}{experiments.summary(sweep)}"
        for name, sweep in experiments.sweeps().items()
    )
    arguments = read(
        Arguments,
        fields_follow=True,
        args=argv[:cut],
        prog="python -m launch.sweep",
        description=f"{__doc__}\nSweeps:\n{listed}",
    )
    launcher = Launcher(arguments, argv[cut + 1 :])
    if arguments.dry_run:
        launcher.show()
        return
    if arguments.evaluate:
        launcher.evaluate()
        return
    engines.check_tools(launcher.engine)
    raise SystemExit(launcher.run())


if __name__ == "__main__":
    main()
