"""A transformer whose layers share keys and values, as the kv_map says.

The group is the unit of structure. A producing group projects its keys and values once from the residual
stream that enters it. Every block of the group attends to the same value:

    kv = projection(x)
    for block in blocks:
        x = block(x, kv)

A consuming group has no projection and is handed the `kv` of an earlier group. That is all there is to
cross-layer attention (CLA, 2405.12981 section 3.1). Where keys and values are shared differently, a group may
make one of them and read the other. Shared keys and values are an ordinary value, so gradients and
rematerialisation need no special code. A block does not know whether `kv` is arrays or a part of a cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cla_jax import kv_map as kv_maps
from cla_jax.config import LatentKV, ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model import cpu_matmul
from cla_jax.model.attention import (
    ATTENTION_OUTPUT,
    KV,
    Attend,
    PrefixMask,
    causal_attention,
    window_starts,
)
from cla_jax.model.latent import LatentHeads, LatentProjection
from cla_jax.model.layers import (
    Linear,
    LinearMap,
    Mlp,
    RMSNorm,
    Rope,
    axes,
    gather,
    gather_sequence,
    normal_param,
    shard_sequence,
)
from cla_jax.model.native.matmul import Packed
from cla_jax.model.platform import on_cpu, token_major

# Rematerialised groups of up to this many blocks are unrolled, even under a scan of groups.
UNROLLED = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass runs. Nothing here changes what it computes."""

    rules: AxisRules = AxisRules()
    remat: str = "none"  # none, block, attention, dots: what the backward pass recomputes
    scan_layers: bool = True
    attention: str = "xla"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the blocks of a group share, besides their keys and values."""

    rope: Rope  # at the positions of the queries
    attend: Attend
    rules: AxisRules


class KVProjection(nnx.Module):
    """Keys and values for a group, from the residual stream that enters it.

    The keys are rotated here, once, before anyone shares them.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, projects: kv_maps.KVHalves):
        self.projects = projects
        self.norm = RMSNorm(config) if config.kv_norm == "own" else None
        self.k_norm = RMSNorm(config, "H") if config.qk_norm and "k" in projects else None
        kv = Linear(key, "BTD,DCKH->BTCKH", config)
        # Half of a projection is cut from the whole: a tensor has the same initial values under every map.
        if projects != "kv":
            i = "kv".index(projects)
            cut = lambda whole: nnx.Param(
                jax.lax.slice_in_dim(whole[...], i, i + 1, axis=whole.axes.index("kv_heads") - 1),
                axes=whole.axes,
            )
            kv.weight = cut(kv.weight)
            kv.bias = None if kv.bias is None else cut(kv.bias)
        self.kv: LinearMap = kv

    def __call__(self, x_BTD: jax.Array, block_norm: RMSNorm, rope: Rope, rules: AxisRules) -> KV:
        norm = block_norm if self.norm is None else self.norm
        with jax.named_scope("kv_projection"):
            kv_BTCKH = self.kv(gather_sequence(norm(x_BTD), rules), rules)
            made = {half: kv_BTCKH[:, :, i] for i, half in enumerate(self.projects)}
            if self.k_norm is not None:
                made["k"] = self.k_norm(made["k"])
            return KV(rope(made["k"]) if "k" in made else None, made.get("v"))


class Block(nnx.Module):
    """Attention to given keys and values, then the MLP; both pre-norm and residual."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        query, output, mlp = jax.random.split(key, 3)
        self.attention_norm = RMSNorm(config)
        self.query: LinearMap = Linear(query, "BTD,DKGW->BTKGW", config)
        self.q_norm = RMSNorm(config, "H") if config.qk_norm else None
        latent = isinstance(config.kv, LatentKV)
        self.heads = LatentHeads(jax.random.fold_in(key, 3), config) if latent else None
        self.output: LinearMap = Linear(output, "BTKGH,KGHD->BTD", config)
        self.mlp_norm = RMSNorm(config)
        self.mlp = Mlp(mlp, config)

    def __call__(self, x_BTD: jax.Array, kv: Any, context: Context) -> jax.Array:
        x_BTD = self.attention(x_BTD, kv, context)
        return feed_forward(x_BTD, self.mlp_norm, self.mlp, context.rules)

    # In training, `Group` calls the two parts: it keeps their backward passes apart.

    def attention(self, x_BTD: jax.Array, kv: Any, context: Context) -> jax.Array:
        rules = context.rules
        with jax.named_scope("attention"):
            q_BTKGW = self.query(gather_sequence(self.attention_norm(x_BTD), rules), rules)
            if self.q_norm is not None:
                q_BTKGW = self.q_norm(q_BTKGW)
            if self.heads is None:
                o_BTKGH = context.attend(context.rope(q_BTKGW), kv)
            else:
                o_BTKGH = self.heads(q_BTKGW, kv, context.rope, context.attend, rules)
            return x_BTD + self.output(o_BTKGH, rules)


def feed_forward(
    x_BTD: jax.Array,
    norm: RMSNorm,
    mlp: Mlp,
    rules: AxisRules,
    lay_out: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """The MLP and its residual connection; `lay_out` sees what the backward pass may keep."""
    with jax.named_scope("mlp"):
        return x_BTD + mlp(gather_sequence(norm(x_BTD), rules), rules, lay_out)


class Group(nnx.Module):
    """Consecutive blocks that attend to the same keys and values, as one stack of parameters."""

    def __init__(
        self,
        key: jax.Array,
        first: jax.Array | int,
        size: int,
        config: ModelConfig,
        projects: kv_maps.KVHalves,
    ):
        # Keys by layer number: a layer starts from the same weights under every kv_map.
        layers = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(size))
        projections, blocks = jax.vmap(jax.random.split, out_axes=1)(layers)
        make = LatentProjection if isinstance(config.kv, LatentKV) else KVProjection
        self.projection = make(projections[0], config, projects) if projects else None
        self.blocks = jax.vmap(lambda block: Block(block, config))(blocks)

    def keys_and_values(self, x_BTD: jax.Array, rope: Rope, rules: AxisRules) -> KV:
        """What the group makes; None for keys or values that it does not make."""
        assert self.projection is not None  # only a producing group is asked
        projection = gather(self.projection, rules, x_BTD.dtype)
        return projection(x_BTD, element(self.blocks, 0).attention_norm, rope, rules)

    def __call__(
        self,
        x_BTD: jax.Array,
        kv: KV,
        context: Context,
        options: ForwardOptions,
        in_loop: bool = False,
    ) -> jax.Array:
        """Runs the blocks; `in_loop` is true inside a loop over several groups."""

        # Where blocks are rematerialised, what is saved is what enters them. One by one, the first of
        # them shares it with the projection; a scan would save it twice.
        size = jax.tree.leaves(self.blocks)[0].shape[0]
        plain = options.remat == "none" and on_cpu()
        scan = options.scan_layers and (plain or size > UNROLLED)
        several = options.remat != "none" and not scan and size > 1
        looped = in_loop or (scan and size > 1)
        # Recomputed blocks save no products. The same layout of theirs would add 6 % of HBM traffic on v6e.
        saves_products = looped and options.remat in ("none", "dots")
        lay_out = token_major if saves_products else lambda x: x

        def body(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, None]:
            use = lambda module: gather(module, context.rules, x_BTD.dtype)
            read = kv
            x_BTD = lay_out(x_BTD)
            if several:
                x_BTD, block, read = gradients_together((x_BTD, block, kv))
            x_BTD = use(block).attention(x_BTD, read, context)
            norm, mlp = block.mlp_norm, block.mlp
            if options.remat != "none":
                x_BTD, norm, mlp = gradients_together((x_BTD, norm, mlp))
            return feed_forward(x_BTD, use(norm), use(mlp), context.rules, lay_out), None

        if in_loop and not scan and not fsdp():
            return fold_again(body, x_BTD, self.blocks, lambda body: remat(body, options, looped))
        return fold(remat(body, options, looped), x_BTD, self.blocks, scan=scan)[0]


class Transformer(nnx.Module):
    """Embedding, stacks of groups, final norm, output head.

    Parameters are float32. The groups of a stack are one `Group` whose parameters have a leading
    axis [groups]; inside it the blocks have another, [groups, size].
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        embedding, layers, head = jax.random.split(key, 3)
        self.config = config
        self.embedding = normal_param(embedding, "VD", config)
        self.stacks = nnx.List(
            jax.vmap(lambda first, s=stack: Group(layers, first, s.size, config, s.projects))(
                jnp.array([group.first for group in stack.groups])
            )
            for stack in config.sharing.stacks
        )
        self.norm = RMSNorm(config)
        self.head = None if config.tied_embeddings else normal_param(head, "VD", config)

    @property
    def head_VD(self) -> jax.Array:
        """The output head, float32; the embedding table if they are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def embed(self, tokens_BT: jax.Array, rules: AxisRules) -> jax.Array:
        with jax.named_scope("embedding"):
            table = gather(self.embedding, rules, jnp.dtype(self.config.compute_dtype))[...]
            return table.at[tokens_BT].get(out_sharding=rules.gathered().spec(*axes("BTD")))

    def __call__(
        self,
        tokens_BT: jax.Array,
        options: ForwardOptions,
        starts_BT: jax.Array | None = None,
        mask: PrefixMask | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D]; `logits` or the loss turns them into scores.

        `starts_BT`, if given, is the first position that each query may see. A `mask` replaces it.
        """
        config, rules = self.config, options.rules
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] if mask is None else mask.positions_BT
        rope = Rope.at(positions_BT, config)

        x_BTD = shard_sequence(self.embed(tokens_BT, rules), rules)
        reused: dict[int, KV] = {}
        for stack, groups in zip(config.sharing.stacks, self.stacks, strict=True):
            first = stack.groups[0]  # all groups of a stack read the same earlier layers
            earlier = KV(
                None if "k" in stack.projects else reused[first.k_source].k_BSKH,
                None if "v" in stack.projects else reused[first.v_source].v_BSKH,
            )
            windows = [config.resolved_windows[group.first] for group in stack.groups]

            def body(x_BTD: jax.Array, item: dict[str, Any], stack=stack, kv=earlier):
                group: Group = item["group"]
                looped = options.scan_layers and len(stack.groups) > 1
                if stack.projects:
                    produce = lambda x_BTD: group.keys_and_values(x_BTD, rope, rules)
                    kv = remat(produce, options, looped)(x_BTD).or_else(kv)
                attend = self._attend(options, positions_BT, item["window"], starts_BT, mask)
                context = Context(rope=rope, attend=attend, rules=rules)
                x_BTD = group(x_BTD, kv, context, options, looped)
                return x_BTD, kv.only(stack.reused)

            # A window is data of the scan: a pattern of them does not break a stack.
            window = jnp.array(windows) if any(config.resolved_windows) else None
            items = {"group": groups, "window": window}
            x_BTD, kvs = fold(body, x_BTD, items, scan=options.scan_layers)
            if stack.reused:
                reused |= {group.first: element(kvs, i) for i, group in enumerate(stack.groups)}
        return gather_sequence(self.norm(x_BTD), rules)

    def _attend(
        self,
        options: ForwardOptions,
        positions_BT: jax.Array,
        window: jax.Array | None,
        starts_BT: jax.Array | None,
        mask: PrefixMask | None,
    ) -> Attend:
        """Attention to the keys and values of a whole text, within a window if there is one."""
        if mask is not None:
            seen_BTS = mask.visible(window)
            return lambda q_BTKGH, kv: causal_attention(q_BTKGH, kv, seen_BTS=seen_BTS)
        if window is not None:
            starts_BT = jnp.zeros_like(positions_BT) if starts_BT is None else starts_BT
            starts_BT = window_starts(positions_BT, window, starts_BT)
        return lambda q_BTKGH, kv: causal_attention(
            q_BTKGH,
            kv,
            starts_BT=starts_BT,
            backend=options.attention,
            rules=options.rules,
        )

    def logits(self, tokens_BT: jax.Array, options: ForwardOptions, starts_BT=None) -> jax.Array:
        """Scores of the next token in float32, [B, T, V]. For short inputs: training never holds them."""
        return project(self(tokens_BT, options, starts_BT), self.head_VD, options.rules)


def project(x_BTD: jax.Array, head_VD: jax.Array | Packed, rules: AxisRules) -> jax.Array:
    """Logits in float32, [B, T, V], accumulated in float32 from operands in x's dtype."""
    if isinstance(head_VD, Packed):
        return cpu_matmul.logits(x_BTD, head_VD, rules)
    spec = rules.gathered().spec(*axes("VD"))
    head_VD = head_VD.astype(x_BTD.dtype)
    head_VD = head_VD if spec is None else jax.reshard(head_VD, spec)
    return jnp.einsum(
        "BTD,VD->BTV",
        x_BTD,
        head_VD,
        preferred_element_type=jnp.float32,
        out_sharding=rules.gathered().spec(*axes("BTV")),
    )


def document_starts(tokens_BT: jax.Array, end: int) -> jax.Array:
    """The first position each query may see if attention stays within a document, [B, T].

    An end token opens the document that follows it.
    """
    positions = jnp.arange(tokens_BT.shape[1])
    return jax.lax.cummax(jnp.where(tokens_BT == end, positions, 0), axis=1)


def inputs_of(tokens_BT: jax.Array, begins: tuple[int, int] | None) -> jax.Array:
    """The tokens as the model reads them: with `begins`, (end, begin), a begin token for each end token.

    Targets keep the end token: it ends a text, and the begin token opens the next one.
    """
    if begins is None:
        return tokens_BT
    end, begin = begins
    return jnp.where(tokens_BT == end, begin, tokens_BT)


# ---------------------------------------------------------------------------------------- folds


def element(tree: Any, i: int) -> Any:
    """Element i of every leaf of a stacked pytree."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def fold(body: Callable, x: Any, stacked: Any, *, scan: bool) -> tuple[Any, Any]:
    """Applies `body(x, item) -> (x, y)` over the items of a stack; returns the last x and stacked ys.

    Scanned, compile time does not grow with the number of items.
    """
    if scan:
        return jax.lax.scan(body, x, stacked)
    ys = []
    for item in unstacked(stacked):
        x, y = body(x, item)
        ys.append(y)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def unstacked(stacked: Any) -> list[Any]:
    """The items of a stacked pytree."""
    leaves, treedef = jax.tree.flatten(stacked)
    # Not indexing: the gradient of this is one stack instead of a padded sum per item.
    return [treedef.unflatten(item) for item in zip(*map(jnp.unstack, leaves), strict=True)]


def fsdp() -> bool:
    """Whether the mesh splits weights over devices that gather them."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def fold_again(
    body: Callable, x: Any, stacked: Any, rematerialised: Callable[[Callable], Callable]
) -> Any:
    """`fold` without a scan, for a turn of an outer loop; returns the last x.

    A rematerialised body saves what it is given. An item is a part of what the loop is given, so its loop
    would save all items once more: a copy of all weights. Here the backward pass takes it from the stack.
    Not with FSDP: a device's part of the copy is small, and XLA would gather the weights in an order that
    needs up to 4 % more memory.
    """
    turn = lambda i: lambda x, item: body(x, _taken_again(i, item, stacked))[0]
    for i, item in enumerate(unstacked(stacked)):
        x = rematerialised(turn(i))(x, item)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _taken_again(i: int, item: Any, stacked: Any) -> Any:
    """Item i of a stack. The gradient is that of `item`, so no gradient has the size of the stack.

    forward:   result    = stacked[i]    what the backward pass recomputes needs only the stack
    backward:  d_item    = d_result      the loop adds it up where `item` came from
               d_stacked = 0             else the same gradient would count twice
    """
    del item  # equal to the result, but a use of it would save it
    return element(stacked, i)


# The forward pass must not mention `item` either: it would be saved.
_taken_again.defvjp(
    lambda i, _, stacked: (element(stacked, i), None), lambda _i, _, d_item: (d_item, None)
)


@jax.custom_vjp
def gradients_together(arrays: Any) -> Any:
    """The arrays unchanged; the backward pass waits here until all of their gradients are computed.

    For what enters a block or its MLP, with the weights and the keys and values that it reads. Its backward
    pass is then over before the one below begins: the gradients of its weights are summed over devices.
    XLA would otherwise delay these all-reduces to merge them, and keep their inputs in memory.
    """
    return arrays


gradients_together.defvjp(
    lambda arrays: (arrays, None),
    lambda _, gradients: (jax.lax.optimization_barrier(gradients),),
)


def _is_one_of(*primitives: str) -> Callable[..., bool]:
    """A policy that keeps the results of primitives of jax, by their names."""
    return lambda primitive, *_, **__: primitive.name in primitives


_CUDNN = "dot_product_attention_fwd_wrapper"


def remat(body: Callable, options: ForwardOptions, in_loop: bool) -> Callable:
    """The body, rematerialised in the backward pass as `options` say.

    In a scan, forward and backward pass are separate loops. Outside a loop, XLA would merge the
    recomputation with the forward pass and keep its result; `prevent_cse` stops that.
    """
    policies = jax.checkpoint_policies
    # cuDNN also returns softmax statistics for its backward pass. They have no name: save them by primitive.
    kernels = policies.save_from_both_policies(
        policies.save_only_these_names(ATTENTION_OUTPUT), _is_one_of(_CUDNN)
    )
    if options.remat == "none":
        # A loop keeps all that differentiation asks for, elementwise results in float32 among it. Outside
        # of a loop XLA computes those again; on a CPU it is faster to keep them.
        if not in_loop or on_cpu():
            return body
        products = policies.save_from_both_policies(policies.dots_saveable, kernels)
        return jax.checkpoint(body, policy=products, prevent_cse=False)
    policy = {
        "block": policies.nothing_saveable,
        "attention": kernels,
        "dots": policies.dots_with_no_batch_dims_saveable,
    }[options.remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_loop)
