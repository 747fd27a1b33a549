"""The harness's own Hugging Face backend under torch, as one contestant of `benchmarks.tasks`."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.child import Contestant, serve, versions
from benchmarks.tasks_common import requests
from benchmarks.torch_peer import PACKAGES, torch


def contestant(spec: dict[str, Any]) -> Contestant:
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision("highest")
    model = HFLM(
        pretrained=spec["exported"],
        device="cpu",
        dtype="float32",
        batch_size=spec["batch"],
        max_length=spec["context"],
    )
    asked = requests(spec)

    def burst(task: int) -> dict[str, Any]:
        chosen = list(asked.values())[task]
        return {"answers": model.loglikelihood(chosen, disable_tqdm=True)}

    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    about = {"parameters": parameters, "versions": versions(*PACKAGES, "lm_eval")}
    return Contestant(burst, about)


if __name__ == "__main__":
    serve(contestant)
