"""A Llama-like decoder whose layers share keys and values: cross-layer attention (CLA, arXiv 2405.12981).

One file, PyTorch and transformers only; `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`
finds it through `auto_map` in config.json. What differs from a Llama:

    kv_map      one entry a layer: the layer whose keys and values it attends to. A layer that names itself
                is a producer: it has k_proj and v_proj and an entry in the cache. The others have neither.
    kv_norm     the norm before k_proj and v_proj: "own", kv_norm of the layer, or "block", input_layernorm.
    windows     one entry a layer: how many tokens it sees, its own included; 0 for all.

Keys are rotated once, by their producer. The cache has one entry a producer, numbered in their order.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class ClaConfig(PreTrainedConfig):
    model_type = "cla"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        kv_map=None,
        kv_norm="own",
        windows=None,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters=None,
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=True,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.kv_map = list(range(num_hidden_layers)) if kv_map is None else list(kv_map)
        self.kv_norm = kv_norm
        self.windows = [0] * num_hidden_layers if windows is None else list(windows)
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def producers(self):
        """The layers that own keys and values; entry p of the cache belongs to producers[p]."""
        return [layer for layer, source in enumerate(self.kv_map) if layer == source]


class ClaRMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


# ------------------------------------------------------------------------------- rotary embedding


def frequencies(config, device):
    """Radians a position by which each pair of dimensions (i, i + H/2) turns, [H/2], and a factor."""
    rope, half = config.rope_parameters, config.head_dim // 2
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    pairs = torch.arange(half, device=device, dtype=torch.float32)
    turning = theta ** (-pairs / half)
    if kind == "default":
        return turning, 1.0
    slowed = turning / rope["factor"]
    if kind == "linear":
        return slowed, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = (original * turning / (2 * math.pi) - low) / (high - low)
    elif kind == "yarn":

        def pair(turns):
            return half * math.log(original / (2 * math.pi * turns)) / math.log(theta)

        first = max(math.floor(pair(rope["beta_fast"])), 0)
        last = min(math.ceil(pair(rope["beta_slow"])), config.head_dim - 1)
        kept = 1 - (pairs - first) / (last - first or 1e-3)
    else:
        raise ValueError(f"rope_type = {kind!r} is not supported")
    kept = kept.clamp(0, 1)
    return kept * turning + (1 - kept) * slowed, rope.get("attention_factor", 1.0)


def rotate(x, cos, sin):
    """x [B, heads, T, H], cos and sin [B, 1, T, H/2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ----------------------------------------------------------------------------------------- layers


class ClaAttention(nn.Module):
    """Queries of one layer; keys and values too if it is a producer."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.head_dim, self.source = config.head_dim, config.kv_map[layer]
        self.layer = layer
        width, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        if self.source == layer:
            kv_width = config.num_key_value_heads * config.head_dim
            self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
            self.kv_norm = ClaRMSNorm(config) if config.kv_norm == "own" else None

    def heads(self, x):
        """[B, T, heads * H] to [B, heads, T, H]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_and_values(self, x, normed, cos, sin):
        """Of a producer, from the residual stream that enters its layer, [B, K, T, H] each."""
        h = normed if self.kv_norm is None else self.kv_norm(x)
        return rotate(self.heads(self.k_proj(h)), cos, sin), self.heads(self.v_proj(h))

    def forward(self, normed, keys, values, seen, cos, sin, output_attentions):
        """The output, and the weights [B, heads, T, S] if they are asked for."""
        q, weights = rotate(self.heads(self.q_proj(normed)), cos, sin), None
        # Query head n reads key/value head n // G.
        if output_attentions or self.config._attn_implementation == "eager":
            groups = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            scores = (q @ keys.transpose(2, 3)) * self.head_dim**-0.5
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            o = weights @ values
        else:
            o = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2)), weights if output_attentions else None


class ClaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ClaDecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = ClaRMSNorm(config)
        self.self_attn = ClaAttention(config, layer)
        self.post_attention_layernorm = ClaRMSNorm(config)
        self.mlp = ClaMLP(config)

    def forward(self, x, keys, values, update, seen, cos, sin, output_attentions):
        """The residual stream after the layer, its keys and values, and its weights of attention.

        A producer makes keys and values, and `update` joins them with those in the cache; others are given
        them. `seen` makes the mask once the number of keys is known.
        """
        normed, attention = self.input_layernorm(x), self.self_attn
        if attention.source == attention.layer:
            keys, values = attention.keys_and_values(x, normed, cos, sin)
            if update is not None:
                keys, values = update(keys, values)
        mask = seen(keys.shape[2])
        out, weights = attention(normed, keys, values, mask, cos, sin, output_attentions)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, keys, values, weights


def refuse(unknown):
    """No argument is left without effect, and without a word."""
    if unknown:
        raise TypeError(f"Cla does not support the argument {min(unknown)}")


def as_dict(config, return_dict):
    return config.return_dict if return_dict is None else return_dict


class ClaPreTrainedModel(PreTrainedModel):
    config_class = ClaConfig
    base_model_prefix = "model"
    _no_split_modules = ["ClaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True


class ClaModel(ClaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([ClaDecoderLayer(config, layer) for layer in layers])
        self.norm = ClaRMSNorm(config)
        self.kv_layers = {layer: index for index, layer in enumerate(config.producers)}
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,  # [B, S], 0 for padding, over the cached tokens too; or [B, 1, T, S]
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,  # noqa: ARG002  # of older versions; the cache says the same
        **unknown,
    ):
        refuse(unknown)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        with_weights = config.output_attentions if output_attentions is None else output_attentions
        with_states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        recomputing = self.gradient_checkpointing and self.training
        use_cache = use_cache and not recomputing
        if recomputing:
            past_key_values = None  # a layer that runs twice would put its keys in twice
        elif past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        past = 0
        if past_key_values is not None:
            # generate() makes one entry per layer.
            del past_key_values.layers[len(self.kv_layers) :]
            past = past_key_values.get_seq_length()
            past = past.clone() if torch.is_tensor(past) else past  # a static cache counts in place
        here = torch.arange(x.shape[1], device=x.device) + past
        if position_ids is None:
            position_ids = here[None]
        turning, factor = frequencies(config, x.device)
        angles = position_ids[:, None, :, None].float() * turning
        cos, sin = angles.cos() * factor, angles.sin() * factor

        kv, states, weights = {}, (x,), ()
        for layer, block in enumerate(self.layers):
            update = None
            if past_key_values is not None and layer in self.kv_layers:
                update = functools.partial(past_key_values.update, layer_idx=self.kv_layers[layer])
            seen = functools.partial(self.seen, here, attention_mask, config.windows[layer])
            source = config.kv_map[layer]
            inputs = (x, *kv.get(source, (None, None)), update, seen, cos, sin, with_weights)
            if recomputing:
                out = self._gradient_checkpointing_func(block.__call__, *inputs)
            else:
                out = block(*inputs)
            x, kv[layer] = out[0], out[1:3]
            states, weights = (*states, x), (*weights, out[3])
        x = self.norm(x)
        out = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], x) if with_states else None,
            attentions=weights if with_weights else None,
        )
        return out if as_dict(config, return_dict) else out.to_tuple()

    @staticmethod
    def seen(here, attention_mask, window, length):
        """Which of `length` entries each query sees, [1 or B, 1, T, length]."""
        entries, queries = torch.arange(length, device=here.device), here[:, None]
        seen = entries <= queries
        if window:
            seen = seen & (entries > queries - window)
        if attention_mask is None:
            return seen[None, None]
        if attention_mask.ndim == 4:  # made by generate() for a static cache: True, or 0, is seen
            mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            return seen & mask[..., :length] | (entries == queries)
        is_text = F.pad(attention_mask, (0, length - attention_mask.shape[1])).bool()
        # A padding token sees itself: a softmax over nothing is not a number.
        return seen[None, None] & is_text[:, None, None] | (entries == queries)


class ClaForCausalLM(ClaPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = False  # forward takes them and has no use for num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = ClaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,  # the last so many, 0 for all; or the positions
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,  # noqa: ARG002
        **unknown,
    ):
        refuse(unknown)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        is_number = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if is_number else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        out = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return out if as_dict(self.config, return_dict) else out.to_tuple()
