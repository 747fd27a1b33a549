"""Optional packages: whether they are there, and how to get them."""

import importlib.util
import sys

# By the name of the extra in pyproject.toml: what is imported.
_MODULES = {
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "gcs": ("gcsfs",),
    "zstd": ("compression.zstd", "backports.zstd"),
    "search": ("optuna",),
}


def there(extra: str) -> bool:
    """Whether the package of an extra is installed; it is not imported."""
    return any(map(_found, _MODULES[extra]))


def how(extra: str) -> str:
    """How to get it: this package is on no index, so an extra is installed from a clone of it."""
    return f"`pip install -e '.[{extra}]'` in your clone of cla_jax"


def require(extra: str, what: str) -> None:
    """Raises ValueError, which begins with what needs it, if the package of an extra is missing."""
    if not there(extra):
        raise ValueError(f"{what} needs the extra `{extra}`: {how(extra)}")


def _found(module: str) -> bool:
    if module in sys.modules:  # None there says that it cannot be imported
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
