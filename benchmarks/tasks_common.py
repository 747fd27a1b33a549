"""What both contestants of `benchmarks.tasks` are asked: the harness's own requests."""

from typing import Any

from cla_jax.interop.task_data import Tasks


def requests(spec: dict[str, Any]) -> dict[str, list[Any]]:
    """The log-likelihood requests of the first examples of each task."""
    tasks = Tasks(spec["tasks"], data=spec["task_data"])
    tasks.draw_alike()
    asked = {}
    for name, loaded in tasks.loaded.items():
        (task,) = loaded["tasks"].values()
        task.build_all_requests(limit=spec["examples"], rank=0, world_size=1)
        asked[name] = task.instances
    return asked
