"""All commands by one name: `cla-jax train smoke` is `python -m launch.train smoke`."""

import importlib
import sys
from collections.abc import Sequence

import cla_jax
from cla_jax.messages import near_choice
from launch.cli import user_errors

COMMANDS = {
    "train": "train an experiment, or every row of a study",
    "evaluate": "evaluate runs on held-out text, through a KV cache too",
    "generate": "continue a prompt with a run",
    "compare": "draw runs on one page, or decide a study",
    "publish": "copy what reports read of finished runs, without checkpoints",
    "sweep": "start the runs of a sweep, here or on a cluster",
    "status": "say how the runs of a sweep are doing",
    "cancel": "end a sweep, or some of its runs",
    "trial": "train one run of a sweep, as launchers do",
    "plan": "compile a run for an accelerator that is not there",
    "memory": "say how many sequences fit, for each cache format",
    "serve_trace": "replay a trace of requests",
    "convert": "import, export or fetch a model, or start a run from another",
    "data": "fetch text to train on",
    "tasks": "fetch the data of downstream tasks",
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
            "cla-jax COMMAND --help has the arguments.",
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
