"""What a model costs, in closed form: parameters, FLOPs, KV bytes, training bytes.

Nothing is allocated and jax is not imported; tests hold every number equal to the live arrays.
"""

import dataclasses

from cla_jax.config import LatentKV, ModelConfig, Muon, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    embedding: int  # the input table, V * D
    head: int  # the output head: V * D if untied, else 0; it has no bias
    blocks: int  # projections, MLPs, their norms
    final_norm: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.blocks + self.final_norm

    @property
    def non_embedding(self) -> int:
        """Everything but the embedding table and the output head, as the literature counts."""
        return self.blocks + self.final_norm


def parameters(model: ModelConfig) -> Parameters:
    d, f, bias = model.d_model, model.d_ff, int(model.bias)
    q_width, o_width = model.n_heads * model.query_width, model.n_heads * model.d_head
    query = d * q_width + bias * q_width
    output = o_width * d + bias * d
    n_inner = model.mlp.n_matrices - 1
    mlp = (n_inner + 1) * d * f + bias * (n_inner * f + d)
    block = query + output + mlp + 2 * d
    kv_projections = (d + bias) * model.kv_elements
    kv_projections += model.n_kv_layers * (d if model.kv_norm == "own" else 0)
    if model.qk_norm:
        block += model.d_head
        kv_projections += model.sharing.count("k") * model.d_head
    if isinstance(model.kv, LatentKV):
        block += 2 * model.kv.rank * o_width
        kv_projections += _latent_norms(model)
    return Parameters(
        embedding=model.vocab_size * d,
        head=0 if model.tied_embeddings else model.vocab_size * d,
        blocks=model.n_layers * block + kv_projections,
        final_norm=d,
    )


def _latent_norms(model: ModelConfig) -> int:
    """Parameters of the norms of latents."""
    latent = model.kv
    return model.n_kv_layers * latent.rank if isinstance(latent, LatentKV) and latent.norm else 0


def train_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`.

    They are 6 * parameters + 6 * n_layers * n_heads * d_head * seq_len. The parameters include the output
    head, but not the embedding table. Attention is halved for causality. A layer with a sliding window counts
    window * (2 - window / seq_len) instead of seq_len. With a latent, a query head is wider than its values:
    d_head stands for the mean of both. Rematerialisation is left out.
    """
    count = parameters(model)
    head = model.vocab_size * model.d_model if model.tied_embeddings else count.head
    windows = (min(window or seq_len, seq_len) for window in model.resolved_windows)
    seen = sum(window * (2 - window / seq_len) for window in windows)
    attention = 3 * model.n_heads * (model.query_width + model.d_head) * seen
    return 6.0 * (count.non_embedding + head) + attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class KvBytes:
    """Bytes of keys and values of one sequence. CLA divides the first two, not the third."""

    resident: float  # held in the cache, per token of context
    written: float  # written to it, per new token
    read: float  # streamed by a decode step, per token of context: every layer reads, consumers too


def kv_bytes(model: ModelConfig, context: int, bytes_per_element: int = 2) -> KvBytes:
    """KV bytes of a dense cache at a context (2405.12981, section 2; the paper counts 16-bit elements).

    Without windows they do not depend on the context.
    """
    width = dict(zip("kv", model.kept_widths, strict=True))
    element = model.n_kv_heads * bytes_per_element
    tokens = lambda window: min(window or context, context)
    held = (
        tokens(kv.window) * sum(width[half] for half in kv.holds) for kv in model.sharing.kv_layers
    )
    read = (tokens(window) * sum(model.kept_widths) for window in model.resolved_windows)
    return KvBytes(
        resident=element * sum(held) / context,
        written=bytes_per_element * model.kv_elements,
        read=element * sum(read) / context,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """Bytes of the float32 training state over all devices, without activations."""

    parameters: int
    optimizer: int  # two moments for AdamW; one for the matrices of Muon
    gradients: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients


def training_bytes(
    model: ModelConfig, optimizer: OptimizerConfig = OptimizerConfig()
) -> TrainingBytes:
    size, one_moment = 4 * parameters(model).total, 0
    if isinstance(optimizer.rule, Muon):
        one_moment = 4 * _matrices(model)
    return TrainingBytes(parameters=size, optimizer=2 * size - one_moment, gradients=size)


def _matrices(model: ModelConfig) -> int:
    """Elements of the matrices of blocks that read or write the residual stream."""
    without = dataclasses.replace(model, bias=False)
    norms = 2 * model.n_layers + (model.n_kv_layers if model.kv_norm == "own" else 0)
    others = norms * model.d_model
    if isinstance(model.kv, LatentKV):
        made = 2 * model.n_heads * model.d_head  # of a latent, for each of its elements
        others += model.kv.rank * model.n_layers * made + _latent_norms(model)
    return parameters(without).blocks - others
