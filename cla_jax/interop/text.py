"""What an imported model is evaluated on; here by itself, for command lines that start quickly."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text that an imported model will be evaluated on, and how it is computed."""

    # Text to evaluate on, as data.source: sotu, text:GLOB, jsonl:GLOB, tfds:NAME.
    source: str = "sotu"
    # Tokens of a window of it; by default 1024, or the model's longest context if that is shorter.
    seq_len: int | None = None
    # The token between documents; by default what the model calls end of text.
    end_token: str | None = None
    # The token that every text begins behind; by default the one that the model's own tokenizer puts
    # there. An empty one: the end token.
    begin_token: str | None = None
    # Directory of prepared (tokenised) text, and of what is downloaded.
    data_dir: str = "data"
    # Dtype of matrix products and activations.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
