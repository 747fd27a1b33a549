"""What a run on one GPU has to show, in the order of its worth; each result is written at once.

    python -m benchmarks.accelerator --minutes 9 --out results/h100     on the machine with the GPU
    python -m benchmarks.accelerator --out results/h100 --show          the tables, anywhere
    python -m benchmarks.accelerator --minutes 1 --out /tmp/x --tiny    small, on any device

Needs the runtime without its packages for data and for command lines. Every measurement is a process of its
own: one that fails, or does not fit the memory, costs the others nothing, and the allocator's peak is its
own. Results are lines of `results-*.jsonl` in --out. What one of these files has for this device is not
measured again, so that several short stays on machines make one set. Files of earlier stays may be copied to
--out, or named by --done. What ran out of memory is not tried again; other failures are. A measurement that
is not over when the minutes are is ended. A later stay tries it last, and only with more time than it had.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cla_jax import chips
from cla_jax.typed_numbers import number

ROOT = Path(__file__).parents[1]
_LEAST_SECONDS = 10.0  # nothing is begun with less time than this left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Something to measure, named by what decides its result."""

    name: str
    run: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]


# ---------------------------------------------------------------------------------- what is measured


def device() -> dict[str, Any]:
    """What it is, and what it reaches alone: bytes a second of its memory, FLOP/s of a product."""
    import statistics

    import jax
    import jax.numpy as jnp

    from benchmarks.bandwidth import probes

    on_cpu = jax.default_backend() == "cpu"
    side, size = (256, 1 << 20) if on_cpu else (8192, 1 << 31)
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    probed = {name: [probe() for _ in range(5)] for name, probe in probes(size).items()}
    return {
        "matmul_flops": 2 * side**3 / statistics.median(seconds),
        "bandwidth": {name: statistics.median(rates) for name, rates in probed.items()},
        "memory": (jax.devices()[0].memory_stats() or {}).get("bytes_limit"),
    }


def attention(d_head: int, n_kv_heads: int, seq_len: int) -> dict[str, Any]:
    """The error of the backend that is chosen, forward and backward, against XLA's in float32."""
    import jax
    import jax.numpy as jnp

    from cla_jax.config import ModelConfig
    from cla_jax.model.attention import KV, causal_attention, choose_backend

    config = ModelConfig(
        vocab_size=64,
        n_layers=1,
        d_model=64,
        d_ff=64,
        n_heads=8,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        compute_dtype="bfloat16",
    )
    chosen = choose_backend("auto", config, seq_len, jax.devices()[0])
    keys = jax.random.split(jax.random.key(0), 4)
    q_shape = (2, seq_len, n_kv_heads, config.q_groups, d_head)
    kv_shape = (2, seq_len, n_kv_heads, d_head)
    shapes = (q_shape, kv_shape, kv_shape, q_shape)
    arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]

    def outputs(backend: str, dtype: Any) -> list[jax.Array]:
        q, k, v, d_o = (array.astype(dtype) for array in arrays)
        call = lambda q, k, v: causal_attention(q, KV(k, v), backend=backend)
        o, backward = jax.vjp(call, q, k, v)
        return [array.astype(jnp.float32) for array in (o, *backward(d_o))]

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(outputs, static_argnums=(0, 1))("xla", jnp.float32)
    outcome = jax.jit(outputs, static_argnums=(0, 1))(chosen, jnp.bfloat16)
    errors = {
        name: float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for name, a, b in zip(("o", "d_q", "d_k", "d_v"), outcome, expected, strict=True)
    }
    return {"backend": chosen, "errors": errors}


def kernel(d_head: int, cache: str, batch: int, context: int) -> dict[str, Any]:
    """A decoding kernel for 16 queries of one KV head: its error against XLA's float32, and its bandwidth."""
    import functools
    import statistics

    import jax
    import jax.numpy as jnp

    from cla_jax.cache import make_format
    from cla_jax.model import mosaic
    from cla_jax.model.attention import KV, normalized

    attend = mosaic.attend
    if jax.default_backend() == "cpu":
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        attend = functools.partial(attend, interpret=InterpretGPUParams())
    width = mosaic.kept_width(d_head)
    shapes = [(batch, 1, 16, d_head), *[(batch, context, 1, d_head)] * 2]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jnp.pad(jax.random.normal(key, shape, jnp.bfloat16), [(0, 0)] * 3 + [(0, width - d_head)])
        for key, shape in zip(keys, shapes, strict=True)
    ]
    q_BKNH = arrays[0] * d_head**-0.5
    # Rows of different lengths; the first is full.
    lengths_B = context - jnp.arange(batch, dtype=jnp.int32) * context // (2 * batch)
    entries_BE = jnp.arange(context, dtype=jnp.int32) + jnp.zeros((batch, 1), jnp.int32)
    positions_BN = jnp.repeat(lengths_B[:, None] - 1, 16, axis=1)
    format: Any = make_format(cache, "float32")
    coded = format.encode(KV(*arrays[1:]))
    read = KV(*(a.astype(jnp.float32) for a in format.decode(coded)))
    kept = format.for_kernel(coded, entries_BE)

    @jax.jit
    def expected(q_BKNH: jax.Array, k_BEKH: jax.Array, v_BEKH: jax.Array) -> jax.Array:
        s_BKNE = jnp.einsum("BKNH,BEKH->BKNE", q_BKNH.astype(jnp.float32), k_BEKH)
        seen_B11E = (entries_BE < lengths_B[:, None])[:, None, None]
        return jnp.einsum(
            "BKNE,BEKH->BKNH", jax.nn.softmax(jnp.where(seen_B11E, s_BKNE, -1e30)), v_BEKH
        )

    with jax.default_matmul_precision("highest"):
        right = expected(q_BKNH, *read)
    call = jax.jit(lambda q, kept: normalized(attend(q, kept, positions_BN, 0 * positions_BN)))
    outcome = call(q_BKNH, kept)
    repeats = 2 if jax.default_backend() == "cpu" else 200
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            again = call(q_BKNH, kept)
        again.block_until_ready()
        seconds.append((time.perf_counter() - begin) / repeats)
    size = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(coded))
        * int(lengths_B.sum())
        / (batch * context)
    )
    return {
        "error": float(jnp.abs(outcome - right).max() / jnp.abs(right).max()),
        "bytes": size,
        "bytes_per_s": size / statistics.median(seconds),
        "seconds": seconds,
    }


def training(row: str, rows: int, remat: str, scan: bool, steps: int) -> dict[str, Any]:
    """Tokens a second and MFU of a step on one device; the predicted peak, and the allocator's."""
    import statistics

    import jax
    import numpy as np

    import experiments
    from cla_jax import budget, costs, memory
    from cla_jax.fields import replaced
    from cla_jax.plan.estimates import estimate
    from cla_jax.session import plan_layout
    from cla_jax.state import initial_state
    from cla_jax.step import make_step

    (config,) = experiments.find(row)
    changes = {"batch_size": rows, "placement.accumulate": 1, "placement.remat": remat}
    config = replaced(config, changes | {"placement.scan_layers": scan})
    one = jax.devices()[:1]
    layout = plan_layout(config, one)
    shape = (1, rows, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    begin = time.perf_counter()
    with jax.set_mesh(layout.mesh):
        step = make_step(layout).lower(layout.state, layout.batch).compile()
        compile_seconds = time.perf_counter() - begin
        state = initial_state(config, layout.optimizer, layout.state)
        batch = jax.device_put(tokens, layout.batch.sharding)
        seconds, losses = [], []
        for _ in range(steps + 2):  # the first two warm up
            begin = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[2:])
    tokens_per_s = rows * config.data.seq_len / median
    chip = chips.find(one[0].device_kind)
    flops = costs.train_flops_per_token(config.model, config.data.seq_len)
    return {
        "backend": layout.options.attention,
        "tokens_per_s": tokens_per_s,
        "mfu": flops * tokens_per_s / chip.flops if chip else None,
        "step_seconds": seconds,
        "compile_seconds": compile_seconds,
        "losses": losses,
        "compiled_peak": budget.program_bytes(step),
        "estimated_peak": sum(estimate(layout).values()),
        "allocator_peak": memory.allocator_peak(),
    }


def decoding(
    row: str, batch: int, cache: str, context: int, new_tokens: int, attention: str = "xla"
) -> dict[str, Any]:
    """Tokens a second, and the fraction of the measured bandwidth that they need."""
    import types

    import jax

    import experiments
    from benchmarks.bandwidth import measure

    (config,) = experiments.find(row)
    options = types.SimpleNamespace(
        batch=(batch,),
        context=context,
        new_tokens=new_tokens,
        cache=cache,
        attention=attention,
        chunk=256,
        rounds=3,
    )
    size = 1 << 20 if jax.default_backend() == "cpu" else 1 << 31
    measured = measure(config.model, options, size)
    return {"bandwidth": measured["bandwidth"], **measured["rows"][0]}


def prefix_sharing(
    heads: tuple[int, int, int], layers: int, batch: int, shared: int, whole: bool
) -> dict[str, Any]:
    """Requests with a common prefix: attention alone or a whole step, with shared pages and without.

    `heads` are query heads, KV heads and head size.
    """
    import statistics
    import types

    import jax

    from benchmarks import prefix
    from benchmarks.bandwidth import probes
    from benchmarks.common import shape_of
    from cla_jax.config import ModelConfig
    from cla_jax.decode import random_weights

    config = ModelConfig(**shape_of(heads, layers), compute_dtype="bfloat16")
    options = types.SimpleNamespace(alone=64, page=64, attention="xla")
    weights = random_weights(config) if whole else None
    call = prefix.step if whole else prefix.attention
    calls = {
        name: call(weights, spec, cache)
        for name, (spec, cache) in prefix.contestants(config, batch, shared, options).items()
    }
    rounds = prefix.interleaved(calls, 5)
    seconds = {name: statistics.median(values) for name, values in rounds.items()}
    size = prefix.read_bytes(config, batch, shared, options.alone)["two-phase"]
    probe = probes(1 << 20 if jax.default_backend() == "cpu" else 1 << 31)["read"]
    bandwidth = statistics.median(probe() for _ in range(5))
    reached = None if whole else size / seconds["two-phase"] / bandwidth
    return {"seconds": seconds, "rounds": rounds, "bandwidth": bandwidth, "fraction": reached}


def eviction(
    policy: str, heads: tuple[int, int, int], layers: int, context: int, steps: int
) -> dict[str, Any]:
    """A decode step through a cache that evicts tokens, beside a dense cache."""
    from benchmarks import eviction_step
    from benchmarks.common import shape_of
    from cla_jax.config import ModelConfig

    config = ModelConfig(**shape_of(heads, layers), compute_dtype="bfloat16")
    dense, evicting = eviction_step.measure(config, context, (policy,), steps=steps, rounds=5)
    return {"dense": dense, "evicting": evicting}


# ------------------------------------------------------------------------------------------ the list


def measurements(tiny: bool) -> list[Measurement]:
    """All that is measured, the most valuable first."""
    listed: list[Measurement] = []

    def add(run: Callable[..., dict[str, Any]], **arguments: Any) -> None:
        words = ",".join(f"{name}={value}" for name, value in arguments.items())
        name = f"{run.__name__}({words})"
        listed.append(Measurement(name=name, run=run, arguments=arguments))

    add(device)
    if tiny:
        add(attention, d_head=16, n_kv_heads=1, seq_len=32)
        for scan in (True, False):
            add(training, row="smoke.tiny", rows=2, remat="none", scan=scan, steps=1)
        add(decoding, row="smoke.tiny", batch=2, cache="dense", context=6, new_tokens=4)
        add(kernel, d_head=46, cache="bfloat16", batch=1, context=128)
        few = {"heads": (2, 2, 16), "layers": 1}
        add(prefix_sharing, **few, batch=2, shared=64, whole=False)
        add(eviction, policy="window:keep=0.5", **few, context=64, steps=1)
        return listed
    for d_head in (128, 64):
        add(attention, d_head=d_head, n_kv_heads=1, seq_len=1024)
    train = lambda row, rows, remat, scan=True: add(
        training, row=row, rows=rows, remat=remat, scan=scan, steps=8
    )
    decode = lambda row, batch, cache="dense", **more: add(
        decoding, row=row, batch=batch, cache=cache, context=1024, new_tokens=129, **more
    )
    mqa, cla2 = "cla_1b.h128_mqa", "cla_1b.h128_mqa_cla2"
    # Without rematerialisation 8 rows fit an H100 by the plan.
    train(cla2, 8, "none")
    train(cla2, 8, "none", scan=False)
    train(mqa, 8, "none")
    train("cla_1b.h128_mha", 8, "none")
    for batch in (1, 64):
        decode(cla2, batch)
        decode(mqa, batch)
    for cache in ("bfloat16", "int8"):
        add(kernel, d_head=128, cache=cache, batch=64, context=4096)
    for batch in (1, 64):
        decode(cla2, batch, attention="mosaic")
    train(cla2, 16, "none")
    train(cla2, 16, "block")
    train("cla_3b.h128_mqa_cla2", 4, "block")
    train("cla_3b.h128_mqa", 4, "block")
    for batch in (1, 64):
        decode(cla2, batch, "int8")
    # The table of ChunkAttention's paper has these heads; then the heads of the 1B rows.
    for shared in (1024, 4096):
        share = {"heads": (32, 32, 128), "layers": 1, "batch": 32, "shared": shared}
        add(prefix_sharing, **share, whole=False)
    for heads in ((16, 16, 128), (16, 1, 128)):
        add(prefix_sharing, heads=heads, layers=4, batch=32, shared=1024, whole=True)
    for policy in ("window:keep=0.5", "h2o:keep=0.5", "fastgen:T=0.95"):
        add(eviction, policy=policy, heads=(16, 1, 128), layers=4, context=8192, steps=16)
    for d_head, n_kv_heads in ((46, 1), (90, 1), (256, 1), (32, 1), (512, 1), (128, 8)):
        add(attention, d_head=d_head, n_kv_heads=n_kv_heads, seq_len=1024)
    for d_head, cache in ((46, "bfloat16"), (64, "bfloat16"), (90, "bfloat16"), (256, "bfloat16")):
        add(kernel, d_head=d_head, cache=cache, batch=64, context=4096)
    add(kernel, d_head=512, cache="bfloat16", batch=16, context=4096)
    add(kernel, d_head=128, cache="bfloat16", batch=1, context=32768)
    decode(cla2, 64, "int8", attention="mosaic")
    train(cla2, 8, "attention")
    train(cla2, 8, "dots")
    for row in ("h64_mqa", "h32_mqa", "h64_mqa_cla2", "h128_mqa_cla2"):  # what the study would take
        train(f"one_gpu.{row}", 64, "none")
    return listed


# --------------------------------------------------------------------------------------- running them


def results(directories: Iterable[Path]) -> list[dict[str, Any]]:
    """The whole lines of all files of results; one that was cut off counts for nothing."""
    records = []
    for directory in directories:
        for file in sorted(directory.glob("results-*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
    return records


def newest(records: Iterable[dict[str, Any]]) -> dict[tuple[str | None, str], dict[str, Any]]:
    """The last record of each measurement on each device.

    Where a process died before it named its device, any later record of the measurement replaces its own.
    """
    kept: dict[tuple[str | None, str], dict[str, Any]] = {}
    for one in sorted(records, key=lambda one: one.get("when", "")):
        kept.pop((None, one["name"]), None)
        kept[one.get("device"), one["name"]] = one
    return kept


def child(name: str, tiny: bool) -> None:
    """Makes one measurement and prints its record, as the last line."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    chosen = next(m for m in measurements(tiny) if m.name == name)
    print(json.dumps(record(chosen)))


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent was killed: otherwise it would hold the memory of the device, and
    the next start would record all others as out of memory."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _about(measurement: Measurement) -> dict[str, Any]:
    return {
        "name": measurement.name,
        "what": measurement.run.__name__,
        **measurement.arguments,
        # Of all machines alike: the order of records is by this.
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def record(measurement: Measurement) -> dict[str, Any]:
    """The result with what it belongs to; or the error, if the device or a kernel refuses."""
    import jax

    about = _about(measurement) | {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    try:
        return about | {"result": measurement.run(**measurement.arguments)}
    except (ValueError, RuntimeError) as error:  # those of XLA and of jax are RuntimeErrors
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return about | {"error": words[:400]}


def _apart(measurement: Measurement, tiny: bool, seconds: float, out: Path) -> dict[str, Any]:
    """`record`, in a process of its own, which is ended after so many seconds."""
    words = [sys.executable, "-m", "benchmarks.accelerator", "--child", measurement.name]
    # Steps are compiled once for all stays; a plan counts on most of the memory.
    environment = (
        chips.GPU_ENVIRONMENT
        | {
            "JAX_COMPILATION_CACHE_DIR": os.fspath(out / "programs"),
        }
        | os.environ
    )
    with open(out / "log.txt", "ab") as log:
        try:
            ran = subprocess.run(
                words + ["--tiny"] * tiny,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _about(measurement) | {"late": round(seconds)}
    lines = ran.stdout.decode(errors="replace").splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        error = f"the process ended with status {ran.returncode}; {out / 'log.txt'} has its words"
        return _about(measurement) | {"error": error}


def _no_room(measured: dict[str, Any]) -> bool:
    """Whether a measurement failed for lack of memory, as it would again."""
    return bool(re.search("RESOURCE_EXHAUSTED|out of memory", measured.get("error", ""), re.I))


def measure_all(options: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * options.minutes
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    earlier = newest(results([*map(Path, options.done), out]))
    file = out / f"results-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
    kind = None  # of the device: the first measurement says it, and is made on every machine
    waiting = collections.deque(measurements(options.tiny))
    last = set()  # names of those that were put behind the others
    while waiting:
        measurement = waiting.popleft()
        before = earlier.get((kind, measurement.name), {}) if kind is not None else {}
        if "result" in before or _no_room(before):
            said = "there already" if "result" in before else "out of memory before"
            print(f"{said}  {measurement.name}", flush=True)
            continue
        if "late" in before and measurement.name not in last:
            last.add(measurement.name)
            waiting.append(measurement)
            continue
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            print("the time is over", flush=True)
            return
        if left <= before.get("late", 0):
            print(f"takes more than is left  {measurement.name}", flush=True)
            continue
        made_now = _apart(measurement, options.tiny, left, out) if options.apart else None
        measured = made_now or record(measurement)
        kind = measured.get("device", kind)
        if kind is not None:
            measured["device"] = (
                kind  # of a process that died or was ended, it is not known otherwise
            )
        with file.open("a") as lines:
            lines.write(json.dumps(measured) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        how = (
            "failed"
            if "error" in measured
            else "not over in time"
            if "late" in measured
            else "measured"
        )
        print(f"{how}  {measurement.name}", flush=True)
    print("all is measured", flush=True)


# ----------------------------------------------------------------------------------------- the tables


_gib = lambda size: "" if size is None else f"{size / 2**30:.2f}"
_percent = lambda part: "" if part is None else f"{part:.0%}"
# Of each kind of measurement: the columns, and their cells from the record and its result.
_COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[dict, dict], Iterable[Any]]]] = {
    "device": (
        ("product, TFLOP/s", "memory read, GB/s"),
        lambda r, x: (f"{x['matmul_flops'] / 1e12:.0f}", f"{x['bandwidth']['read'] / 1e9:.0f}"),
    ),
    "attention": (
        ("head size", "KV heads", "backend", "error of output", "of gradients"),
        lambda r, x: (
            r["d_head"],
            r["n_kv_heads"],
            x["backend"],
            f"{x['errors']['o']:.1e}",
            f"{max(x['errors'][name] for name in ('d_q', 'd_k', 'd_v')):.1e}",
        ),
    ),
    "training": (
        ("row", "rows", "remat", "scanned", "tokens/s", "MFU", "peak GiB, compiled (in use)"),
        lambda r, x: (
            r["row"],
            r["rows"],
            r["remat"],
            r["scan"],
            f"{x['tokens_per_s']:,.0f}",
            _percent(x["mfu"]),
            f"{_gib(x['compiled_peak'])} ({_gib(x['allocator_peak'])})",
        ),
    ),
    "kernel": (
        ("head size", "cache", "batch", "context", "error", "GB/s of the cache"),
        lambda r, x: (
            r["d_head"],
            r["cache"],
            r["batch"],
            r["context"],
            f"{x['error']:.1e}",
            f"{x['bytes_per_s'] / 1e9:,.0f}",
        ),
    ),
    "decoding": (
        ("row", "batch", "cache", "attention", "tokens/s", "of the measured bandwidth"),
        lambda r, x: (
            r["row"],
            r["batch"],
            r["cache"],
            r.get("attention", "xla"),
            f"{x['tokens_per_s']:,.0f}",
            _percent(x["fraction"]),
        ),
    ),
    "prefix_sharing": (
        (
            *("heads", "layers", "what", "batch", "common tokens"),
            *("dense, ms", "paged, ms", "two-phase, ms", "of the measured bandwidth"),
        ),
        lambda r, x: (
            " x ".join(map(str, r["heads"])),
            r["layers"],
            "step" if r["whole"] else "attention",
            r["batch"],
            r["shared"],
            *(f"{1e3 * x['seconds'][name]:.2f}" for name in ("dense", "paged", "two-phase")),
            _percent(x["fraction"]),
        ),
    ),
    "eviction": (
        (
            "policy",
            "context",
            "dense, ms",
            "evicting, ms",
            "bytes of the cache: dense, evicting",
        ),
        lambda r, x: (
            r["policy"],
            r["context"],
            *(f"{x[name]['ms']:.2f}" for name in ("dense", "evicting")),
            ", ".join(f"{x[name]['cache_bytes']:,}" for name in ("dense", "evicting")),
        ),
    ),
}


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown tables of the newest result of each measurement and device; the errors below."""
    last = newest(records).values()
    lines = []
    for what, (names, cells) in _COLUMNS.items():
        rows = [r for r in last if r.get("what") == what and "result" in r]
        lines += [f"### {what}", "", f"| device | {' | '.join(names)} |"]
        lines.append("|---" * (len(names) + 1) + "|")
        for r in rows:
            lines.append(f"| {' | '.join(map(str, (r['device'], *cells(r, r['result']))))} |")
        lines += ["" if rows else "\nNothing of this was measured.\n"]
    lines += [f"- {r['name']}: {r['error']}" for r in last if "error" in r]
    lines += [f"- {r['name']}: not over after {r['late']} s" for r in last if "late" in r]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=number, default=9.0, help="end after so many minutes")
    parser.add_argument("--out", help="directory for the results")
    parser.add_argument("--done", nargs="*", default=[], help="directories of earlier results")
    parser.add_argument("--tiny", action="store_true", help="small measurements, for any device")
    parser.add_argument("--show", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument(
        "--together", dest="apart", action="store_false", help="all in this process"
    )
    options = parser.parse_args(argv)
    if options.child:
        child(options.child, options.tiny)
        return
    if not options.out:
        parser.error("--out: name a directory for the results")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g} must be above 0")
    for flag, names in (("--done", options.done), ("--out", [options.out] * options.show)):
        for name in names:
            if not any(Path(name).glob("results-*.jsonl")):
                parser.error(f"{flag}: there are no results-*.jsonl in {name}")
    if options.show:
        print(tables(results([*map(Path, options.done), Path(options.out)])))
    else:
        measure_all(options)


if __name__ == "__main__":
    main()
