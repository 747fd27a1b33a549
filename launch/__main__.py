"""All commands by one name: `cla-jax train smoke` is `python -m launch.train smoke`."""

import importlib
import sys
from collections.abc import Sequence

import cla_jax
from cla_jax.messages import near_choice
from launch.cli import user_errors

COMMANDS = {
    "train": "train an experiment, or every row of a study",
    "evaluate": "evaluate runs on held-out text, with and without a KV cache",
    "generate": "continue a prompt with a run",
    "compare": "compare runs in tables and plots, or test the claims of a study",
    "publish": "copy finished runs without their checkpoints, for reports",
    "sweep": "start the runs of a sweep, here or on a cluster",
    "status": "show the state of each run of a sweep",
    "cancel": "cancel a sweep, or some of its runs",
    "trial": "train one run of a sweep (launchers call this)",
    "plan": "compile a run for an accelerator that you need not have",
    "memory": "show how many sequences fit in memory, for each cache format",
    "serve_trace": "replay a trace of requests and measure the serving",
    "convert": "import, export or download a model, or start a run from another run",
    "data": "download text to train on",
    "tasks": "download or generate the data of downstream tasks",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cla-jax COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "cla-jax COMMAND --help lists the arguments of a command.",
        ]
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command == "--version":
        print(cla_jax.__version__)
        return
    near_choice("command", command.replace("-", "_"), COMMANDS)
    importlib.import_module(f"launch.{command.replace('-', '_')}").main(rest)


if __name__ == "__main__":
    main()
