"""How several heads of keys and values become one, or a latent: the arithmetic of converting a trained model.

Heads that become one are its *members*: heads of one layer (fewer KV heads), heads of several layers (layers
that share), or both. A way to join them (`JOINS`) gives the weights of the shared head, and for each member
how its readers make up for the change. A factor for each pair of dimensions that RoPE rotates goes into the
queries, and a matrix for the values goes into the outputs.

    k_member ~ s * turn     pair by pair, a pair being a complex number: this commutes with RoPE
    v_member ~ v_shared @ map

Values allow any orthogonal map. But keys are rotated by position after their projection. So only a rotation
and a factor of each pair of dimensions can be moved to the queries.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

_RIDGE = 1e-4  # of the mean square of an input, added in the regression on another layer's stream
_ROUNDS = 10  # of moving members and their mean towards each other


@dataclasses.dataclass(frozen=True)
class Members:
    """The heads that become one, in float64. With biases, the last row of each weight is the bias.

    Weights are relative to the norm of the producer: they apply to its normed stream.
    """

    keys: np.ndarray  # [M, D, H]
    values: np.ndarray  # [M, D, H]
    # Activations that each member reads, normed, [M, N, D]; the first is the producer's own stream. Only
    # where a join asks for them.
    inputs: Sequence[np.ndarray] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclasses.dataclass(frozen=True)
class Shared:
    """One head for all members, and what their readers do about it."""

    key: np.ndarray  # [D, H]
    value: np.ndarray  # [D, H]
    turns: np.ndarray  # [M, H / 2], complex
    maps: np.ndarray  # [M, H, H]


def pairs(x: np.ndarray) -> np.ndarray:
    """[..., H] as the H / 2 pairs that RoPE rotates, complex: dimensions i and i + H / 2 are a pair."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def unpaired(z: np.ndarray) -> np.ndarray:
    """The inverse of `pairs`."""
    return np.concatenate([np.real(z), np.imag(z)], axis=-1)


def own(members: Members) -> Shared:
    """The producer's own first head; what the others had is dropped."""
    M, _, H = members.keys.shape
    maps = np.broadcast_to(np.eye(H), (M, H, H))
    return Shared(members.keys[0], members.values[0], np.ones((M, H // 2), complex), maps)


def mean(members: Members) -> Shared:
    """The mean of the weights, as the GQA paper converts (2305.13245, section 2.1)."""
    simple = own(members)
    return dataclasses.replace(
        simple, key=members.keys.mean(axis=0), value=members.values.mean(axis=0)
    )


def renormalized(members: Members) -> Shared:
    """The mean, as long as its members are in the mean: unlike heads cancel each other out."""
    return _as_long(mean(members), members)


def _as_long(shared: Shared, members: Members) -> Shared:
    def scaled(joined: np.ndarray, each: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(joined)
        return joined * (np.linalg.norm(each, axis=(1, 2)).mean() / length if length else 1.0)

    return dataclasses.replace(
        shared, key=scaled(shared.key, members.keys), value=scaled(shared.value, members.values)
    )


def aligned(members: Members) -> Shared:
    """The mean after each member is rotated towards the others (2412.20677), then made as long as they are.

    A key's pairs are rotated one by one, a value by any orthogonal matrix. Heads of a model have no common
    basis: whatever rotates a head and its readers changes nothing. What is aligned are activations.
    """
    of = lambda weights: [u @ w for u, w in zip(members.inputs, weights, strict=True)]
    keys, values = [pairs(k) for k in of(members.keys)], of(members.values)
    turns = np.ones((len(members), keys[0].shape[-1]), complex)
    maps = np.stack([np.eye(values[0].shape[-1])] * len(members))
    shared_key, shared_value = keys[0], values[0]
    for _ in range(_ROUNDS):
        turns = np.stack([_unit((shared_key.conj() * key).sum(axis=0)) for key in keys])
        maps = np.stack([_orthogonal(shared_value.T @ value) for value in values])
        shared_key = np.mean([k * t.conj() for k, t in zip(keys, turns, strict=True)], axis=0)
        shared_value = np.mean([v @ m.T for v, m in zip(values, maps, strict=True)], axis=0)
    key = unpaired(np.mean(pairs(members.keys) * turns[:, None].conj(), axis=0))
    value = np.mean(members.values @ maps.transpose(0, 2, 1), axis=0)
    return _as_long(Shared(key, value, turns, maps), members)


def fitted(members: Members) -> Shared:
    """The producer's own first head; each other is read off from it with the least error over the text."""
    simple = own(members)
    read_K, read_V = (members.inputs[0] @ weight for weight in (simple.key, simple.value))
    shared_key, size = pairs(read_K), (np.abs(pairs(read_K)) ** 2).sum(axis=0)
    turns, maps = simple.turns.copy(), simple.maps.copy()
    for m in range(1, len(members)):
        key = pairs(members.inputs[m] @ members.keys[m])
        turns[m] = (shared_key.conj() * key).sum(axis=0) / np.where(size > 0, size, 1)
        value = members.inputs[m] @ members.values[m]
        maps[m] = np.linalg.lstsq(read_V, value, rcond=None)[0]
    return dataclasses.replace(simple, turns=turns, maps=maps)


def least_squares(members: Members) -> Shared:
    """The head from which all members are read off with the least error, summed over the text.

    Members of other layers are first expressed by the producer's stream (a regression). For the values, the
    best H directions of all members together are then a singular value decomposition. For keys it is one
    direction a pair, of complex numbers.
    """
    square = _square(members)
    key_weights, values = _on_one_stream(members, square)
    keys = pairs(key_weights)
    M, D, H = values.shape
    weight = M**-0.5  # equal members stay what they are

    gram_PMM = np.einsum("mdp,de,nep->pmn", keys.conj(), square, keys, optimize=True)
    best_PM = np.linalg.eigh(gram_PMM)[1][..., -1]
    best_PM = best_PM * _unit(best_PM[:, :1].conj())
    key = unpaired(np.einsum("mdp,pm->dp", keys, best_PM)) * weight
    turns = best_PM.T.conj() / weight

    side = values.transpose(1, 0, 2).reshape(D, M * H)
    best = np.linalg.eigh(side.T @ square @ side)[1][:, -H:]
    best = best @ _orthogonal(best[:H].T)  # in the basis of the first member
    maps = best.T.reshape(H, M, H).transpose(1, 0, 2) / weight
    return Shared(key, side @ best * weight, turns, maps)


def _square(members: Members) -> np.ndarray:
    """The second moments of the producer's stream, summed over the text, [D, D]."""
    return members.inputs[0].T @ members.inputs[0]


def _on_one_stream(members: Members, square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights that predict the keys and values of all members from the producer's stream, [M, D, H] each.

    Those that read it already are unchanged; for the others it is a regression.
    """
    stream = members.inputs[0]
    ridge = _RIDGE * np.trace(square) / len(square) * np.eye(len(square))

    def expressed(weights: np.ndarray) -> np.ndarray:
        pairs_of = zip(members.inputs, weights, strict=True)
        return np.stack(
            [
                w if u is stream else np.linalg.solve(square + ridge, stream.T @ (u @ w))
                for u, w in pairs_of
            ]
        )

    return expressed(members.keys), expressed(members.values)


def _unit(z: np.ndarray) -> np.ndarray:
    size = np.abs(z)
    return np.where(size > 0, z / np.where(size > 0, size, 1), 1)


def _orthogonal(a: np.ndarray) -> np.ndarray:
    """The orthogonal matrix nearest to `a`."""
    left, _, right = np.linalg.svd(a)
    return left @ right


JOINS: dict[str, Callable[[Members], Shared]] = {
    "own": own,
    "mean": mean,
    "renormalized": renormalized,
    "aligned": aligned,
    "fitted": fitted,
    "least_squares": least_squares,
}


def join(members: Members, how: str) -> Shared:
    """One head for all members. One member alone stays what it is, to the bit."""
    return own(members) if len(members) == 1 else JOINS[how](members)


# --------------------------------------------------------------------------------- heads to a latent


@dataclasses.dataclass(frozen=True)
class Readers:
    """What reads the members: the error of a conversion is measured where it has its effect."""

    queries: np.ndarray  # [M, H, H], second moments of the queries before RoPE, summed over heads
    outputs: np.ndarray  # [M, H, H], second moments of the rows of the output matrices


@dataclasses.dataclass(frozen=True)
class Latent:
    """A latent and a rotated key for all members, and what their readers compute of them."""

    latent: np.ndarray  # [D, R]
    key: np.ndarray  # [D, rope_dims]
    keys: np.ndarray  # [M, R, H], without rotation
    values: np.ndarray  # [M, R, H]
    # [M, rope_dims / 2], complex: a pair of a member's key is the pair of the rotated key times this.
    turns: np.ndarray
    root_mean_square: float  # of the elements of the latent over the text


def latent(
    members: Members, readers: Readers, rank: int, rope_dims: int, rotations: np.ndarray
) -> Latent:
    """The latent from which keys and values are predicted with the least error, summed over the text.

    All members share one rotated key. A pair of it has the frequency of one pair of theirs: the direction
    that is best for the queries of all members. What is left of their keys is read from the latent without
    rotation, after its product with `rotations` [H / 2]: the mean rotation of each pair over the distances.
    Then one singular value decomposition covers keys without rotation and values. It is scaled as if keys and
    values were equally large, as in 2502.07864.
    """
    square = _square(members)
    key_weights, values = _on_one_stream(members, square)
    square = square / len(members.inputs[0])
    return _latent(key_weights, values, square, readers, rank, rope_dims, rotations)


def latent_of_weights(members: Members, rank: int, rope_dims: int) -> Latent:
    """The same of the weights alone: what is left of the keys loses its rotation (2502.14837)."""
    M, D, H = members.keys.shape
    alike = np.broadcast_to(np.eye(H), (M, H, H))
    none = np.ones(H // 2, complex)
    readers = Readers(alike, alike)
    return _latent(members.keys, members.values, np.eye(D), readers, rank, rope_dims, none)


def _latent(
    key_weights: np.ndarray,
    values: np.ndarray,
    square: np.ndarray,
    readers: Readers,
    rank: int,
    rope_dims: int,
    rotations: np.ndarray,
) -> Latent:
    M, D, H = values.shape
    keys = pairs(key_weights)
    # Evenly spaced pairs: RoPE over `rope_dims` dimensions has exactly their frequencies.
    turned = np.arange(0, H // 2, H // rope_dims)
    sizes = np.diagonal(readers.queries, axis1=1, axis2=2)
    weight_MP = np.sqrt(sizes[:, : H // 2] + sizes[:, H // 2 :])[:, turned]
    seen = keys[..., turned] * weight_MP[:, None]  # [M, D, P]
    gram_PMM = np.einsum("mdp,de,nep->pmn", seen.conj(), square, seen, optimize=True)
    best_PM = np.linalg.eigh(gram_PMM)[1][..., -1]
    key = np.einsum("mdp,pm->dp", seen, best_PM)
    turns = np.divide(
        best_PM.T.conj(), weight_MP, out=np.zeros_like(best_PM.T), where=weight_MP > 0
    )
    keys[..., turned] -= key * turns[:, None]
    left = unpaired(keys * rotations.conj())

    roots = [_root(readers.queries), _root(readers.outputs)]
    whole, *sides = (
        (weights @ root).transpose(1, 0, 2).reshape(D, M * H)
        for weights, (root, _) in (
            (key_weights, roots[0]),
            (left, roots[0]),
            (values, roots[1]),
        )
    )
    energy = lambda side: float(np.sum(side * (square @ side)))
    key_energy, value_energy = energy(whole), energy(sides[1])
    # One of them may be zero: a layer whose queries or outputs are all zero.
    scale = np.sqrt(value_energy / key_energy) if min(key_energy, value_energy) > 0 else 1.0
    side = np.concatenate([sides[0] * scale, sides[1]], axis=1)
    best = np.linalg.eigh(side.T @ square @ side)[1][:, ::-1][:, :rank]
    best = np.pad(best, ((0, 0), (0, rank - best.shape[1])))
    latent = side @ best
    read = best.T.reshape(rank, 2, M, H).transpose(1, 2, 0, 3)
    mean_square = np.sum(latent * (square @ latent)) / rank
    return Latent(
        latent=latent,
        key=unpaired(key),
        keys=read[0] @ roots[0][1] / scale,
        values=read[1] @ roots[1][1],
        turns=turns,
        root_mean_square=float(np.sqrt(mean_square)),
    )


def _root(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square roots of symmetric matrices [M, H, H], and their pseudo-inverses."""
    values, vectors = np.linalg.eigh(moments)
    size = np.sqrt(np.maximum(values, 0))
    size = np.where(size > 1e-6 * size.max(axis=-1, keepdims=True), size, 0)
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    product = lambda d: (vectors * d[:, None]) @ vectors.transpose(0, 2, 1)
    return product(size), product(inverse)
