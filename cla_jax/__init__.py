"""Cross-layer attention in JAX: training, cached decoding, accuracy against KV-cache memory."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cla_jax.api import compare_runs, evaluate_run, plot_runs, train_run
    from cla_jax.config import Config
    from cla_jax.decoder import Decoder
    from cla_jax.fields import replaced
    from cla_jax.runs import Run, find_run, find_runs

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Decoder",
    "Run",
    "compare_runs",
    "evaluate_run",
    "find_run",
    "find_runs",
    "plot_runs",
    "replaced",
    "train_run",
]

_MODULES = {
    "api": ("compare_runs", "evaluate_run", "plot_runs", "train_run"),
    "config": ("Config",),
    "decoder": ("Decoder",),
    "fields": ("replaced",),
    "runs": ("Run", "find_run", "find_runs"),
}


def __getattr__(name: str) -> Any:
    """Public names, imported when they are first used: `import cla_jax` does not wait for jax."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cla_jax.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
