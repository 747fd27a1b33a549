"""Everything that speaks a foreign format: models of other libraries in, ours out."""

from pathlib import Path

from cla_jax.interop.foreign import Foreign


def read(path: Path, tokenizer: Path | None = None) -> Foreign:
    """The model at a path: a directory of Hugging Face's, or a GGUF file.

    `tokenizer` is a tokenizer.json that stands for the model's own. Raises ValueError for what is missing,
    damaged or cannot be expressed.
    """
    from cla_jax.interop import gguf, hf

    if tokenizer is not None and not tokenizer.is_file():
        raise ValueError(f"{tokenizer} does not exist")
    json_text = tokenizer.read_text(encoding="utf-8") if tokenizer else None
    if path.is_dir():
        return hf.read(path, json_text)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return gguf.read(path, json_text)
