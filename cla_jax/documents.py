"""The scores of held-out documents: what an evaluation keeps of each of them.

The documents of an evaluation are those of the held-out split, in its order, which the data alone decide. So
the n-th document is the same one in every evaluation of the same data.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cla_jax import files
from cla_jax.files import PathLike

_MOST = 1 << 24  # documents of one evaluation


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Each held-out document's summed negative log-likelihood, tokens and bytes; arrays of one length D."""

    nll: np.ndarray  # nats, float64
    tokens: np.ndarray  # targets: those of the text and the end token behind it; int64
    bytes: np.ndarray  # UTF-8, of the text; int64

    def __len__(self) -> int:
        return len(self.nll)

    def __eq__(self, other: object) -> bool:
        """Whether their records are equal."""
        return isinstance(other, Documents) and self.record() == other.record()

    def record(self) -> dict[str, Any]:
        """As a part of an evaluation's record: a line of numbers each, nats to four decimals."""
        return {
            "count": len(self),
            "nll": " ".join(f"{value:.4f}" for value in self.nll),
            "tokens": " ".join(map(str, self.tokens)),
            "bytes": " ".join(map(str, self.bytes)),
        }


def joined(parts: Sequence[Documents]) -> Documents:
    """The documents of several texts, one text after another."""
    columns = [field.name for field in dataclasses.fields(Documents)]
    together = {key: np.concatenate([getattr(part, key) for part in parts]) for key in columns}
    return Documents(**together)


def read(record: dict[str, Any], file: PathLike) -> Documents:
    """The inverse of `Documents.record`. Raises ValueError naming `file` for what is damaged."""
    count = files.field(record, "count", int, file)
    kinds = {"nll": np.float64, "tokens": np.int64, "bytes": np.int64}
    columns = {}
    for key, kind in kinds.items():
        text = files.field(record, key, str, file)
        words = text.split(" ", _MOST) if text else []
        try:
            columns[key] = np.array([kind(word) for word in words], kind)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{files.name(file)}: documents.{key} is not a list of numbers"
            ) from None
        if len(columns[key]) != count:
            raise ValueError(
                f"{files.name(file)}: documents.{key} has {len(columns[key])} numbers for {count} documents"
            )
    return Documents(**columns)
