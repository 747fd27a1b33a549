"""Generates text with the model of a run, through a KV cache.

import cla_jax

decoder = cla_jax.Decoder.open("runs/x", cache="int8")
print(decoder.generate(["Fellow citizens", "The state of"], new_tokens=100))
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import jax

from cla_jax import checkpoint, eviction
from cla_jax import mesh as meshes
from cla_jax.cache import CacheFormat, CacheSpec, cache_spec, make_format
from cla_jax.cache.evicting import evicting_spec
from cla_jax.config import MeshConfig, Sampling, check_new_tokens
from cla_jax.data import tokenizers
from cla_jax.decode import Weights, decoding_weights, on_one_device
from cla_jax.engine import Completion
from cla_jax.eviction import Policy
from cla_jax.eviction.classes import classes_of_tokenizer
from cla_jax.generate import generate
from cla_jax.mesh import AxisRules
from cla_jax.messages import near_choice
from cla_jax.model import cpu_matmul, decode_kernels
from cla_jax.runs import Run, find_decodable

log = logging.getLogger(__name__)


class Options(TypedDict, total=False):
    """Options of `Decoder.generate`; `Decoder.complete` explains them and has the defaults."""

    new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    on_tokens: Callable[[int, list[int]], bool | None] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Generates text with a run's weights and tokenizer, on the first device. Make it with `Decoder.open`."""

    run: Run
    tokenizer: tokenizers.Tokenizer
    weights: Weights
    mesh: jax.sharding.Mesh | None  # None: arrays of one device, which know of no mesh
    rules: AxisRules
    cache: CacheFormat | Policy
    chunk: int
    attention: str = "xla"
    # The lengths that a warning was about: one warning is enough.
    _warned: list[int] = dataclasses.field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        run: str | os.PathLike[str] | Run,
        *,
        cache: str = "dense",
        chunk: int = 256,
        attention: str = "xla",
        matmul: str = "xla",
    ) -> "Decoder":
        """Reads the newest checkpoint of a run.

        Args:
          run: the run, or its directory.
          cache: the format of the KV cache, a key of `cla_jax.formats.FORMATS`; or an eviction policy, such
            as "h2o:keep=0.5".
          chunk: prompt tokens per prefill step; an eviction policy reads a prompt at once.
          attention: what reads the cache: `xla`, or a kernel of `cla_jax.model.decode_kernels`. Most kernels
            read it in steps of few tokens only.
          matmul: what multiplies tokens with weights, as in `decoding_weights`.

        Raises:
          ValueError: the run or the format does not exist, or the run has no intact checkpoint. Or a kernel
            does not support this model, format or hardware.
        """
        run = find_decodable(run, cache, chunk)
        config = run.config()
        decode_kernels.check(attention, config.model, (cache,))
        cpu_matmul.check(matmul)
        # One device: a handful of rows gains nothing from more.
        mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        rules = meshes.axis_rules(config.model, mesh)
        with jax.set_mesh(mesh):
            _, model = checkpoint.load_model(run, rules, mesh)
        kind: CacheFormat | Policy
        if eviction.is_policy(cache):
            kind, rules, mesh = eviction.parse(cache), AxisRules(), None
            weights = decoding_weights(on_one_device(model), matmul=matmul)
        else:
            kind = make_format(cache, config.model.compute_dtype)
            with jax.set_mesh(mesh):
                weights = decoding_weights(model, rules, matmul)
        return cls(
            run=run,
            tokenizer=tokenizers.load(run.tokenizer_json(), config.data.end_token),
            weights=weights,
            mesh=mesh,
            rules=rules,
            cache=kind,
            chunk=chunk,
            attention=attention,
        )

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, after the token that starts a document in training."""
        begin = self.tokenizer.begin(self.run.config().data.begin_token)
        return [begin, *self.tokenizer.encode(text).tolist()]

    def complete(
        self,
        prompts: Sequence[str],
        *,
        new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
          prompts: texts; an empty one starts a document.
          new_tokens: the most tokens to generate for each prompt. An end token stops a prompt earlier.
          temperature: 0 always takes the most likely token; 1 samples the model's distribution.
          top_k: sample from the k most likely tokens only; 0 for all.
          top_p: sample from the smallest set of tokens whose total probability is at least this.
          seed: random seed. Each prompt uses a seed derived from this one and its position.
          on_tokens: called with the number of a prompt and its new tokens, as they are generated. If it
            returns True, that prompt stops.

        Returns:
          For each prompt: `tokens` (ids, without the stop token), `logprobs` (natural logarithms of their
          probabilities under the model), and `finish`, the reason why it stopped.

        Raises:
          ValueError: there is no prompt, or new_tokens, temperature, top_k or top_p is not valid.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        check_new_tokens(new_tokens)
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, not one text")
        ids = [self.tokens(text) for text in prompts]
        if not ids:
            raise ValueError("no prompt was given")
        reach = max(map(len, ids)) + new_tokens
        self._warn_of_length(reach)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return generate(
                self.weights,
                self._spec(batch=len(ids), capacity=reach),
                ids,
                new_tokens=new_tokens,
                stop=self.run.end_ids(self.tokenizer.end, self.tokenizer.size),
                n_ids=self.tokenizer.size,
                sampling=sampling,
                seeds=seed,
                on_tokens=on_tokens,
            )

    def _warn_of_length(self, reach: int) -> None:
        """Warns once if the context may become longer than the model supports, or was trained on."""
        origin = self.run.origin()
        longest = origin.get("max_length") if origin else self.run.config().data.seq_len
        if self._warned or not isinstance(longest, int) or reach <= longest:
            return
        self._warned.append(reach)
        log.warning(
            "the model %s contexts of %d tokens, but prompt and new tokens may have %d together: the text "
            "beyond %d tokens may be worse",
            *("supports only" if origin else "was trained on", longest, reach, longest),
        )

    def _spec(self, **sizes: int) -> CacheSpec:
        model = self.run.config().model
        if isinstance(self.cache, Policy):
            return evicting_spec(model, self.cache, classes=self._classes, **sizes)
        return cache_spec(
            model,
            self.cache,
            chunk=self.chunk,
            rules=self.rules,
            attention=self.attention,
            **sizes,
        )

    @functools.cached_property
    def _classes(self) -> bytes:
        """The class of each token, for policies; once, because it decodes the whole vocabulary."""
        return classes_of_tokenizer(self.tokenizer, self.run.config().data.begin_token)

    def generate(self, prompts: Sequence[str], **options: Unpack[Options]) -> list[str]:
        """Each prompt followed by its generated text. Options and errors are those of `complete`."""
        for name in options:
            near_choice("option of Decoder.generate", name, Options.__annotations__)
        completions = self.complete(prompts, **options)
        # Together: some tokenizers join words.
        return [
            self.tokenizer.decode([*self.tokens(text), *completion.tokens])
            for text, completion in zip(prompts, completions, strict=True)
        ]
