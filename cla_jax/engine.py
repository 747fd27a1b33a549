"""Continuous batching: requests join a batch, decode and leave it while others go on.

    engine = Engine(weights, spec, stop=[end])
    first = engine.submit([1, 2, 3], new_tokens=100)
    while engine.step():
        print(first.completion.tokens)

A row of the cache serves one request at a time. A step of the engine gives free rows to the requests that
wait, in the order of their submission, if the cache has room. It puts their prompts through the model, and
then decodes all rows in a loop that stays on the device. What a request gets does not depend on what else is
in the batch.

Four programs have the model in them, and are compiled once for a cache spec and a way of sampling. They are a
chunk of a prompt for all rows, the same for one row, the first token, and the loop of decode steps. Requests
are data of these programs, and of a few small ones that copy and clear rows.
"""

import collections
import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from cla_jax.batch import Batch, Emitted, Seed
from cla_jax.cache import Cache, CacheSpec
from cla_jax.config import Sampling, check_new_tokens
from cla_jax.decode import Weights, check_prompt, check_weights, is_integer
from cla_jax.places import make_places

log = logging.getLogger(__name__)

LOOP = 64  # decode steps before the host reads the outputs, if there are no listeners

Finish = Literal["stop", "length", "cancelled"]
# Called with new tokens. True ends the request; these are its last tokens.
Listener = Callable[[list[int]], bool | None]


@dataclasses.dataclass(kw_only=True)
class Completion:
    """The tokens generated for one prompt so far."""

    tokens: list[int] = dataclasses.field(default_factory=list)  # without the stop token
    # Natural logarithm of each token's probability under the model, before the sampling changes it.
    logprobs: list[float] = dataclasses.field(default_factory=list)
    # Why it stopped: a stop token or on_tokens, the limit of new tokens, or `cancel`. None: not stopped.
    finish: Finish | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to continue. Made by `Engine.submit`."""

    prompt: list[int]
    new_tokens: int
    seed: Seed
    listener: Listener | None
    completion: Completion = dataclasses.field(default_factory=Completion)
    # Tokens that the device has been asked for; it may have ended the request before.
    asked: int = 0

    @property
    def ended(self) -> bool:
        return self.completion.finish is not None


class Engine:
    """Requests over the rows of one cache.

    Args:
      weights: from `decoding_weights`.
      spec: from `cache_spec`. Its batch is the number of requests that decode at once. Its capacity bounds
        the tokens of a prompt and its continuation together.
      stop: ids that end a request; they are not returned.
      n_ids: ids from here on are padding of the vocabulary and never drawn.
      sampling: how tokens are drawn.
      every: decode steps per synchronisation with the host. Listeners are called at this interval.

    Raises:
      ValueError: weights of another model, ids outside the vocabulary, a bad `every`.
    """

    def __init__(
        self,
        weights: Weights,
        spec: CacheSpec,
        *,
        stop: Sequence[int] = (),
        n_ids: int | None = None,
        sampling: Sampling = Sampling(),
        every: int = LOOP,
    ):
        if not is_integer(every) or every < 1:
            raise ValueError(f"every = {every} must be a positive integer")
        check_weights(weights, spec)
        vocabulary = spec.config.vocab_size
        n_ids = vocabulary if n_ids is None else n_ids
        for name, ids in (("stop", stop), ("n_ids - 1", [n_ids - 1])):
            if not all(is_integer(i) and 0 <= i < vocabulary for i in ids):
                raise ValueError(f"{name} = {ids} lies outside the vocabulary of {vocabulary} ids")
        self.weights, self.spec, self.sampling, self.every = weights, spec, sampling, every
        self._allowed = np.arange(vocabulary) < n_ids
        self._stops = np.isin(np.arange(vocabulary), list(stop))
        self._waiting: collections.deque[Request] = collections.deque()
        self._requests: list[Request | None] = [None] * spec.batch  # of each row
        self._ended_on_host = np.zeros(spec.batch, bool)  # rows that the device does not know of
        # Outputs that the host has not read yet, each with the requests of its rows.
        self._in_flight: collections.deque[tuple[list[Request | None], Emitted]] = (
            collections.deque()
        )
        self._batch: Batch | None = None  # made for the first request
        self.places = make_places(spec)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        new_tokens: int,
        seed: Seed = 0,
        listener: Listener | None = None,
        name: str = "the prompt",
    ) -> Request:
        """Adds a request to the queue.

        Args:
          prompt: token ids.
          new_tokens: tokens to generate at most.
          seed: of its draws.
          listener: is called with new tokens as they come.
          name: of the prompt, for messages.

        Raises:
          ValueError: an empty prompt, an id outside the vocabulary, more tokens than a row of the
            cache holds.
        """
        if not is_integer(new_tokens):
            raise ValueError(f"new_tokens = {new_tokens} must be an integer")
        check_new_tokens(new_tokens)
        if isinstance(seed, tuple) and len(seed) != 2:
            raise ValueError(f"seed = {seed} must be an integer or two")
        for part in seed if isinstance(seed, tuple) else (seed,):
            if not is_integer(part):
                raise ValueError(f"seed = {part} must be an integer")
            if not 0 <= part < 2**32:
                raise ValueError(f"seed = {part} must lie in 0 to 2**32 - 1")
        check_prompt(prompt, self.spec, int(new_tokens), name)
        self.places.check(len(prompt), int(new_tokens), name)
        request = Request(
            prompt=np.asarray(prompt).tolist(),
            new_tokens=int(new_tokens),
            seed=seed,
            listener=listener,
        )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request with what it has; its row is free for others. Does nothing if it has ended.

        Raises ValueError for a request of another engine.
        """
        if request.ended:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        elif request not in self._requests:
            raise ValueError("the request was submitted to another engine")
        self._end(request, "cancelled")

    @property
    def idle(self) -> bool:
        """Whether no request waits or decodes."""
        return not self._waiting and not any(self._requests)

    @property
    def cache(self) -> Cache:
        """The live cache. There is one from the first request on."""
        assert self._batch is not None
        return self._batch.cache

    def step(self) -> bool:
        """Admits what waits and decodes up to `every` tokens per row. Returns whether requests remain."""
        if self._waiting and all(self._requests):
            self._collect()  # a row may have become free
        self._admit()
        if self._decode() and not self._waiting:
            # The next steps are under way before the host looks at the last ones.
            self._collect(but=1)
        else:
            self._collect()
        if self.idle:
            self._in_flight.clear()
        return not self.idle

    def run(self) -> None:
        """Steps until no request is left."""
        while self.step():
            pass

    def _admit(self) -> None:
        """Free rows get the requests that wait: their prompts go into the cache, a first token comes out."""
        joining: dict[int, Request] = {}
        for row, running in enumerate(self._requests):
            if running is not None or not self._waiting:
                continue
            request = self._waiting[0]
            if not self.places.join(row, request.prompt, request.new_tokens):
                break  # first in, first out: a large request is not overtaken for ever
            joining[row] = self._requests[row] = self._waiting.popleft()
            request.asked = 1
        if not joining:
            return
        if self._batch is None:
            ids = self._allowed, self._stops
            self._batch = Batch(self.weights, self.spec, self.sampling, *ids, self.places)
        running = {row: request for row, request in enumerate(self._requests) if request}
        self._batch.end(self._ended_on_host)
        self._batch.choose(
            {row: request.new_tokens for row, request in running.items()},
            {row: request.seed for row, request in running.items()},
        )
        self._batch.fill({row: request.prompt for row, request in joining.items()})
        self._in_flight.append((list(self._requests), self._batch.first(list(joining))))

    def _decode(self) -> bool:
        """Starts the next decode steps, if a row can take one."""
        running = [request for request in self._requests if request is not None]
        if not any(request.asked < request.new_tokens for request in running):
            return False
        assert self._batch is not None  # admitting a request makes the batch
        self._batch.end(self._ended_on_host)
        for row, request in enumerate(self._requests):
            if request is not None:
                new_tokens = min(request.asked + self.every, request.new_tokens)
                self.places.prepare(row, len(request.prompt) + new_tokens)
        emitted = self._batch.decode(self.every, stop_early=bool(self._waiting))
        self._in_flight.append((list(self._requests), emitted))
        for request in running:
            request.asked += self.every
        return True

    def _collect(self, but: int = 0) -> None:
        """Reads what the device has emitted, except for the newest `but` outputs."""
        while len(self._in_flight) > but:
            requests, emitted = self._in_flight.popleft()
            tokens_BN, logprobs_BN, done_B, stopped_B = map(np.asarray, emitted)
            # A listener may raise. By then all rows have their tokens, and the stack still calls the others.
            # It calls the last one added first, so rows are added in reverse.
            with contextlib.ExitStack() as told:
                for row, request in reversed(list(enumerate(requests))):
                    if request is None or request.ended:
                        continue
                    is_token_N = tokens_BN[row] >= 0
                    new = tokens_BN[row][is_token_N].tolist()
                    _append(request, new, logprobs_BN[row][is_token_N].tolist())
                    self.places.grew(row, request.completion.tokens)
                    end: Finish = "stop" if stopped_B[row] else "length"
                    told.callback(self._tell, request, new, end if done_B[row] else None)
        if not self._in_flight:  # a loop may have stopped early
            for request in filter(None, self._requests):
                request.asked = len(request.completion.tokens)

    def _tell(self, request: Request, new: list[int], end: Finish | None) -> None:
        """Tells a request's listener of new tokens, and ends it if the listener or the device says so."""
        if request.ended:  # another listener may have cancelled it
            return
        stops: bool | None = False
        try:
            if new and request.listener is not None:
                stops = request.listener(new)
        finally:
            finish = "stop" if stops else end
            if finish is not None and not request.ended:  # a listener may cancel
                self._end(request, finish, known=not stops)

    def _end(self, request: Request, finish: Finish, known: bool = False) -> None:
        """Ends a request; `known` if the device has ended its row."""
        request.completion.finish = finish
        if request in self._requests:
            row = self._requests.index(request)
            self._requests[row] = None
            self.places.leave(row)
            self._ended_on_host[row] = not known


def _append(request: Request, tokens: list[int], logprobs: list[float]) -> None:
    """Adds what the device has emitted to a request; warns once if log-probabilities are NaN."""
    known = request.completion
    was_finite = not known.logprobs or not math.isnan(known.logprobs[-1])
    if was_finite and any(map(math.isnan, logprobs)):
        log.warning(
            "the numbers of the model are not finite for a request with a prompt of %d tokens: what it "
            "generates means nothing",
            len(request.prompt),
        )
    known.tokens += tokens
    known.logprobs += logprobs
