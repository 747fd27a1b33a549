"""Everything that speaks a foreign format: models of other libraries in, ours out."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cla_jax.interop.foreign import Foreign


def read(path: Path, tokenizer: Path | None = None) -> "Foreign":
    """The model at a path: a directory of Hugging Face's, or a GGUF file.

    `tokenizer` is a tokenizer.json that stands for the model's own. Raises ValueError for what is missing,
    damaged or cannot be expressed.
    """
    for given in (path, *([tokenizer] if tokenizer else [])):
        if not given.exists():
            raise ValueError(f"{given} does not exist")
    from cla_jax.interop import gguf, hf

    json_text = hf.text(tokenizer) if tokenizer else None
    return (hf if path.is_dir() else gguf).read(path, json_text)
