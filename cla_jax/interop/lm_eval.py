"""Downstream tasks: the lm-evaluation-harness asks, a run answers.

Tasks, prompts, metrics and the splitting of text into context and continuation are the harness's own
(github.com/EleutherAI/lm-evaluation-harness). So scores are those that its Hugging Face backend gives for the
same weights. Only the computation of the answers is ours (cla_jax/likelihood.py, cla_jax/engine.py).
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from cla_jax import checkpoint, evaluation, eviction, likelihood, runs
from cla_jax.cache import CacheSpec, cache_spec
from cla_jax.cache.evicting import evicting_spec
from cla_jax.config import Sampling
from cla_jax.decode import Weights, decoding_weights, on_one_device
from cla_jax.engine import Engine, Request
from cla_jax.evaluate import open_session
from cla_jax.evaluation import DepthScore, TaskEvaluation, TaskScore
from cla_jax.eviction.classes import classes_of_tokenizer
from cla_jax.formats import FORMATS
from cla_jax.interop.task_data import Tasks, harness_missing
from cla_jax.likelihood import CACHED, SHORTEST, Likelihood
from cla_jax.mesh import AxisRules
from cla_jax.model import cpu_matmul, decode_kernels
from cla_jax.model.transformer import Transformer
from cla_jax.prefix_groups import doubled, text
from cla_jax.runs import Run
from cla_jax.scoring import Progress
from cla_jax.session import EvaluationSession

try:
    import lm_eval.utils as harness
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate as evaluated
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise harness_missing(error) from None

log = logging.getLogger(__name__)

FULL = "full"  # instead of a cache format: the full forward pass, without a cache
WAYS = (FULL, *FORMATS)
CHUNK = 16  # tokens a cached decoding step, unless told otherwise
_NEW_TOKENS = 256  # of a generation that does not say, as in the harness's own backends


class Model(TemplateLM):
    """A run's model as the harness wants it, on the mesh that is set.

    Args:
      session: the tokenizer, the mesh's rules and how a full forward pass runs.
      model: the weights.
      way: a cache format, an eviction policy, or `full` for full forward passes; what is generated then
        goes through a dense cache. For a policy no mesh is set: its cache is on one device.
      chunk: tokens a cached decoding step.
      attention: what reads a cache: `xla`, or a kernel of `cla_jax.model.decode_kernels`.
      matmul: what multiplies tokens with weights where there is a cache, as in `decoding_weights`.
      context: tokens that the model reads at most; what is longer loses its beginning.
      prefix: the token that a text without context begins with; by default the begin token of texts, or
        the end token, as in training.
      ends: ids that end what is generated, beside the end token.

    Who wants to know how far it is sets `progress`: called with what is done, it gives a `Progress`.
    """

    def __init__(
        self,
        session: EvaluationSession,
        model: Transformer,
        *,
        way: str = FULL,
        chunk: int = CHUNK,
        attention: str = "xla",
        matmul: str = "xla",
        context: int | None = None,
        prefix: int | None = None,
        ends: Sequence[int] = (),
    ):
        super().__init__()
        eviction.check_cache(way, WAYS)
        decode_kernels.check(attention, model.config, ("dense" if way == FULL else way,))
        if way != FULL:
            decode_kernels.check_chunk(attention, model.config, chunk)
        self.attention, self.matmul = attention, matmul
        self.max_length: int = context or session.data.seq_len
        self.kept: list[float] = []  # the shares of prompts that a policy has kept
        self.progress: Callable[[str], Progress] = lambda what: lambda done, total: None
        self._session, self._model, self.way, self.chunk = session, model, way, chunk
        self._tokenizer = session.tokenizer
        self._begin_token = session.data.begin_token
        begin = self._tokenizer.begin(self._begin_token)
        self._prefix = begin if prefix is None else prefix
        self._ends = list(dict.fromkeys([self._tokenizer.end, *ends]))

    @property
    def _rules(self) -> AxisRules:
        return AxisRules() if eviction.is_policy(self.way) else self._session.rules

    @functools.cached_property
    def _weights(self) -> Weights:
        if eviction.is_policy(self.way):
            return decoding_weights(on_one_device(self._model), matmul=self.matmul)
        return decoding_weights(self._model, self._rules, self.matmul)

    @functools.cached_property
    def _classes(self) -> bytes:
        return classes_of_tokenizer(self._tokenizer, self._begin_token)

    # --------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if not self._begin_token or add_special_tokens is False:
            return self._tokenizer.encode(string).tolist()
        # As in the harness's own backend. If the tokenizer puts a token before every text, and the text
        # already has it, it is not put there twice.
        tokens = self._tokenizer.encode(string.removeprefix(self._begin_token)).tolist()
        return [self._tokenizer.begin(self._begin_token), *tokens]

    # ---------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        # A context of spaces has become one of no tokens.
        pairs = [(tuple(context) or (self._prefix,), tuple(rest)) for _, context, rest in requests]
        answers = self._answered(pairs)
        for (words, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", words, answer)
        return [(answer.logprob, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        del disable_tqdm
        windows: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in harness.get_rolling_token_windows(
                tokens, self._prefix, self.max_length, context_len=1
            ):
                before, rest = harness.make_disjoint_window(window)
                windows.append((i, tuple(before), tuple(rest)))
        totals = [0.0] * len(requests)
        answers = self._answered([(before, rest) for _, before, rest in windows])
        for (i, _, _), answer in zip(windows, answers, strict=True):
            totals[i] += answer.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _answered(self, pairs: Sequence[tuple[tuple[int, ...], ...]]) -> list[Likelihood]:
        """The likelihood of each (context, continuation); what is asked twice is computed once."""
        distinct = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        texts = [text(context, rest, self.max_length) for context, rest in distinct]
        progress = self.progress("log-likelihoods")
        if self.way == FULL:
            likelihoods = likelihood.by_forward(self._model, self._session.options, texts, progress)
        elif eviction.is_policy(self.way):
            likelihoods, kept = likelihood.through_policy(
                self._weights,
                self._model.config,
                eviction.parse(self.way),
                self._classes,
                texts,
                chunk=self.chunk,
                progress=progress,
            )
            self.kept += kept
        else:
            likelihoods = likelihood.through_cache(
                self._weights,
                self._model.config,
                self.way,
                texts,
                chunk=self.chunk,
                attention=self.attention,
                rules=self._rules,
                progress=progress,
            )
        return [likelihoods[distinct[pair]] for pair in pairs]

    # ----------------------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        del disable_tqdm
        progress, done = self.progress("generation"), 0
        results = [""] * len(requests)
        asked = lambda i: json.dumps(requests[i].args[1], sort_keys=True)
        for _, alike in itertools.groupby(sorted(range(len(requests)), key=asked), key=asked):
            # Of like length together, the longest first: what does not fit is found out at once.
            prompts = [(i, self.tok_encode(requests[i].args[0]) or [self._prefix]) for i in alike]
            prompts.sort(key=lambda each: -len(each[1]))
            options: dict[str, Any] = dict(
                normalize_gen_kwargs(requests[prompts[0][0]].args[1], _NEW_TOKENS)
            )
            reach = min(len(prompts[0][1]), self.max_length) + options["max_gen_toks"]
            texts = [tokens for _, tokens in prompts]
            tick = lambda ended, done=done: progress(done + ended, len(requests))
            continuations = self._generated(texts, options, doubled(SHORTEST, reach), tick)
            for (i, _), words in zip(prompts, continuations, strict=True):
                results[i] = words
                self.cache_hook.add_partial("generate_until", requests[i].args, words)
            done += len(prompts)
        return results

    def _generated(
        self,
        prompts: list[list[int]],
        options: dict[str, Any],
        capacity: int,
        tick: Callable[[int], None],
    ) -> list[str]:
        """Continuations up to the end token or the first stop string, which are left out."""
        until = [stop for stop in options.pop("until") if stop]
        new_tokens = options.pop("max_gen_toks")
        sampling = _sampling(options)
        if new_tokens >= self.max_length:
            raise ValueError(
                f"a task generates {new_tokens} tokens, which leaves no room for the prompt in the context "
                f"of {self.max_length} tokens: raise --context"
            )
        rows_of = likelihood.rows_of(self._rules)
        spec = self._spec(
            batch=min(rows_of(CACHED // capacity), rows_of(len(prompts))), capacity=capacity
        )
        engine = Engine(
            self._weights,
            spec,
            stop=self._ends,
            n_ids=self._tokenizer.size,
            sampling=sampling,
            every=8,
        )
        requests: list[Request] = []

        def stops(i: int, _new: list[int]) -> bool:
            words = self._tokenizer.decode(requests[i].completion.tokens)
            return any(stop in words for stop in until)

        for i, prompt in enumerate(prompts):
            prompt = prompt[-(self.max_length - new_tokens) :]
            listener = functools.partial(stops, i)
            requests.append(
                engine.submit(prompt, new_tokens=new_tokens, seed=(0, i), listener=listener)
            )
        while engine.step():
            tick(sum(request.ended for request in requests))
        tick(len(requests))
        continuations = [self._tokenizer.decode(request.completion.tokens) for request in requests]
        return [
            min((words.split(stop)[0] for stop in until), key=len, default=words)
            for words in continuations
        ]

    def _spec(self, *, batch: int, capacity: int) -> CacheSpec:
        """Of the cache that generations go through."""
        config = self._model.config
        sizes: dict[str, Any] = {"batch": batch, "capacity": capacity, "chunk": self.chunk}
        if eviction.is_policy(self.way):
            policy = eviction.parse(self.way)
            return evicting_spec(config, policy, classes=self._classes, **sizes)
        way = "dense" if self.way == FULL else self.way
        return cache_spec(config, way, rules=self._rules, attention=self.attention, **sizes)


# Values with which an option changes nothing, as transformers' generate() understands them.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
# Of beams, of which there is one, and of how the other library computes.
_WITHOUT_EFFECT = {"early_stopping", "length_penalty", "use_cache"}


def _sampling(options: dict[str, Any]) -> Sampling:
    """How a request wants tokens drawn. Raises ValueError for what is not built."""
    options = {name: value for name, value in options.items() if value is not None}
    asked = {k: v for k, v in options.items() if k in ("temperature", "top_k", "top_p")}
    neutral = {name for name, value in _NEUTRAL.items() if options.get(name) == value}
    for name in sorted(options.keys() - asked.keys() - neutral - _WITHOUT_EFFECT - {"do_sample"}):
        raise ValueError(
            f"a task generates with {name} = {options[name]!r}, which is not supported"
        )
    return Sampling(**asked) if options.get("do_sample") else Sampling(temperature=0)


# ------------------------------------------------------------------------------------------ tasks


def evaluate(
    run: Run,
    tasks: Tasks,
    *,
    ways: Sequence[str] = (FULL,),
    chunk: int = CHUNK,
    attention: str = "xla",
    matmul: str = "xla",
    limit: int | None = None,
    context: int | None = None,
    again: bool = False,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
    **options: Any,
) -> Iterator[tuple[str, str, TaskScore]]:
    """Scores a run on tasks, each way; yields (way, task, score) as they come, and writes them.

    The scores of a way are in `eval/tasks-WAY.json`, together with those that other evaluations of the same
    checkpoint have written there. If a task is among them, asked in the same way, it is not scored again,
    unless `again`. With `limit`, only so many examples of each task are scored, and nothing is written.
    `attention` reads caches: `xla`, or a kernel of `cla_jax.model.decode_kernels`. `matmul` multiplies tokens
    with weights in steps through a cache, as in `decoding_weights`.
    `options` are those of `open_session`. Raises ValueError for what the arguments or the run do not allow.
    """
    for name, value in (("limit", limit), ("context", context), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be positive")
    for way in ways:
        eviction.check_cache(way, WAYS)
    ways = tuple(dict.fromkeys(map(eviction.canonical, ways)))
    caches = ["dense" if way == FULL else way for way in ways]
    decode_kernels.check(attention, run.config().model, caches)
    session = open_session(run, **options)
    for way in ways:
        # A cache that evicts is on one device.
        cpu_matmul.check(matmul, None if eviction.is_policy(way) else session.mesh)
    step, model = checkpoint.load_model(run, session.rules, session.mesh)
    origin = {"step": step, "checkpoint": checkpoint.fingerprint(run, step)}
    tokenizer = session.tokenizer
    ends = run.end_ids(tokenizer.end, tokenizer.size)
    longest, read = run.origin().get("max_length"), context or session.data.seq_len
    if isinstance(longest, int) and read > longest:
        log.warning(
            "the model supports at most %d tokens of context, but %d are used", longest, read
        )
    for way in ways:
        with contextlib.nullcontext() if eviction.is_policy(way) else jax.set_mesh(session.mesh):
            answers = Model(
                session,
                model,
                way=way,
                chunk=chunk,
                attention=attention,
                matmul=matmul,
                context=context,
                ends=ends,
            )
            tasks.draw_alike()
            for name, loaded in tasks.loaded.items():
                title = f"{name}, {way}"
                answers.progress = lambda what, title=title: progress(f"{title}: {what}")
                asked, known = _asked(answers, loaded), _known(run, way, origin)
                recorded = {task: known[task] for task in asked if task in known}
                same = recorded.keys() == asked.keys() and all(
                    asked[task].is_asked_like(score) for task, score in recorded.items()
                )
                if same and limit is None and not again:
                    log.warning("%s is already recorded (--again scores it again)", title)
                    scores = recorded
                else:
                    if limit is None:
                        run.check_recordable()
                    scores = _scored(answers, loaded, limit, asked)
                    if limit is None:
                        _write(run, way, origin, known | scores)
                for task, score in scores.items():
                    yield way, task, score


def _asked(answers: Model, loaded: Any) -> dict[str, TaskScore]:
    """How tasks, and groups of tasks, are asked: their scores without metrics."""
    chunk = None if answers.way == FULL else answers.chunk
    how = TaskScore(
        metrics={},
        context=answers.max_length,
        chunk=chunk,
        attention="" if answers.attention == decode_kernels.XLA else answers.attention,
        matmul="" if answers.matmul == cpu_matmul.XLA else answers.matmul,
    )
    groups = loaded.get("groups", {}).items()
    asked = {name: how for name, group in groups if group.has_aggregation}
    for name, task in loaded["tasks"].items():
        config = task.config
        asked[name] = dataclasses.replace(
            how,
            split=config.test_split if task.has_test_docs() else config.validation_split,
            shots=config.num_fewshot,
            version=task.VERSION,
            data={"path": config.dataset_path, "name": config.dataset_name}
            | (config.dataset_kwargs or {}),
        )
    return asked


def _scored(
    answers: Model, loaded: Any, limit: int | None, asked: Mapping[str, TaskScore]
) -> dict[str, TaskScore]:
    """The scores of one or several tasks, by their names.

    If the examples of a task say at which depth of the context their answer is, from 0 to 1, its score has
    the metrics of each tenth too (`depths`).
    """
    clock = time.monotonic()
    answers.kept.clear()
    deep = {name for name, task in loaded["tasks"].items() if "depth" in task.eval_docs[0]}
    outcome: Any = evaluated(lm=answers, task_dict=loaded, limit=limit, log_samples=bool(deep))
    seconds = round(time.monotonic() - clock, 3)
    kept = round(statistics.mean(answers.kept), 4) if answers.kept else None
    scores: dict[str, TaskScore] = {}
    for name, results in outcome["results"].items():
        metrics = {
            key.removesuffix(",none"): value
            for key, value in results.items()
            if isinstance(value, (int, float)) and key != "sample_len"
        }
        n, depths = None, {}
        if name in loaded["tasks"]:
            n = outcome["n-samples"][name]["effective"]
        if name in deep:
            depths = _by_depth(loaded["tasks"][name], outcome["samples"][name])
        how = asked.get(name, TaskScore(metrics={}))
        scores[name] = dataclasses.replace(
            how, metrics=metrics, seconds=seconds, n=n, kept_of_prompt=kept, depths=depths
        )
    return scores


def _by_depth(task: Any, samples: Sequence[dict[str, Any]]) -> dict[str, DepthScore]:
    tenths: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        tenths.setdefault(min(int(sample["doc"]["depth"] * 10), 9), []).append(sample)
    return {
        f"{tenth / 10:.1f}": DepthScore(
            n=len(alike),
            metrics={
                name: float(aggregate([sample[name] for sample in alike]))
                for name, aggregate in task.aggregation().items()
                if name in alike[0]
            },
        )
        for tenth, alike in sorted(tenths.items())
    }


def _known(run: Run, way: str, origin: dict[str, Any]) -> dict[str, TaskScore]:
    """The scores that are recorded of tasks asked this way, of the same checkpoint."""
    name = f"tasks-{way}"
    before = run.evals().get(name, {})
    if not origin.items() <= before.items():
        return {}
    return dict(evaluation.read_tasks(before, run.path / "eval" / f"{name}.json").tasks)


def _write(run: Run, way: str, origin: dict[str, Any], scores: Mapping[str, TaskScore]) -> None:
    whole = TaskEvaluation(
        method="lm-evaluation-harness",
        cache="" if way == FULL else way,
        **origin,
        versions=runs.versions() | {"lm_eval": metadata.version("lm_eval")},
        tasks=dict(sorted(scores.items())),
    )
    run.write_eval(f"tasks-{way}", evaluation.plain(whole))
