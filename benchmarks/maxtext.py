"""The compiled training step beside MaxText's: memory, traffic and collectives of a chip, on TPUs.

    python3.12 -m venv maxtext                               # 5 GB
    maxtext/bin/pip install 'maxtext[tpu]==0.2.4' jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
    pip install -e '.[plan]'                                 # libtpu for ours
    python -m benchmarks.maxtext --python maxtext/bin/python
    python -m benchmarks.maxtext --python maxtext/bin/python --topology v5e:16x16 --sequences 8 40 48

Nothing runs on a TPU. Ours is `launch.plan`; the peer is MaxText's ahead-of-time compiler, `train_compile`,
with the same model, batch, parameters split over all chips and AdamW in float32. `cla_jax.hlo` reads the
optimised programs of both. A pair such as `block:full` has our rematerialisation and MaxText's.

Each row is written to the JSON at once. A row of MaxText's is not compiled again with the same versions, so a
run may be stopped and continued. `launch.plan` remembers ours as long as the program is the same. Both
environments should have the same versions of jaxlib and libtpu; they are printed below the table.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, save
from cla_jax import chips, hlo
from cla_jax.config import Config, HeadsKV, SwiGLU
from cla_jax.messages import printable
from cla_jax.plan.compiler import LAST_OF_TPU, REPORT, needed_bytes
from launch.cli import user_errors
from launch.plan import compiling_elsewhere
from launch.sweeps import tpus
from launch.train import parse

PACKAGES = ("maxtext", "jaxlib", "libtpu")
HOW = (
    "make an environment of Python 3.12 and install it there: pip install 'maxtext[tpu]==0.2.4' "
    "jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1 (5 GB). Then give its interpreter with --python"
)
# What MaxText's environment says of itself. The package is not imported: that takes long.
_ASK = f"""
import importlib.metadata, importlib.util, json
(folder,) = importlib.util.find_spec("maxtext").submodule_search_locations
versions = {{name: importlib.metadata.version(name) for name in {PACKAGES}}}
print(json.dumps({{"folder": folder, "versions": versions}}))
"""
_OURS = """
import importlib.metadata, json
print(json.dumps({name: importlib.metadata.version(name) for name in ("jaxlib", "libtpu")}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # The experiment, without cross-layer attention.
    name: Annotated[str, tyro.conf.Positional] = "cla_1b.h128_mqa"
    # The interpreter of the environment that has MaxText.
    python: str = sys.executable
    # TPUs, as `launch.plan --list` has them.
    topology: tuple[str, ...] = ("v5e:16x16", "v6e:16x16", "v5p:4x4x8")
    # Rematerialisation: ours, a colon, MaxText's `remat_policy`.
    remat: tuple[str, ...] = ("block:full", "dots:minimal")
    # Sequences per chip. By default the batch of the experiment, over all chips.
    sequences: tuple[int, ...] = ()
    # Where the JSON goes.
    output: Path = HERE / "results" / "maxtext.json"


@dataclasses.dataclass(frozen=True)
class Installed:
    """Where MaxText is, and the versions there."""

    python: str
    folder: Path
    versions: dict[str, str]


def installed(python: str) -> Installed:
    """MaxText in the environment of an interpreter. Raises ValueError if it is not there."""
    try:
        # Our packages are not the peer's.
        asked = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, env=peer_environment()
        )
    except OSError as error:
        raise ValueError(f"--python {python} cannot be started: {error.strerror}; {HOW}") from None
    if asked.returncode:
        raise ValueError(f"--python {python} has no MaxText: {HOW}")
    found = json.loads(asked.stdout)
    return Installed(python, Path(found["folder"]), found["versions"])


def peer_environment(**more: str) -> dict[str, str]:
    """The variables of this process without those that bring our packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


def peer_command(
    peer: Installed, config: Config, topology: str, sequences: int, remat: str
) -> list[str]:
    """What compiles this model with MaxText. Raises ValueError for a model that it cannot have."""
    model = config.model
    plain = model.kv_map == "identity" and model.windows == "0"
    if not plain or not isinstance(model.kv, HeadsKV) or not isinstance(model.mlp, SwiGLU):
        raise ValueError(
            f"{config.name}: MaxText's llama2 has no shared keys and values, windows, latents or other MLPs; "
            "choose an experiment without them"
        )
    settings = {
        "run_name": "compare",
        "compile_topology": accelerator(topology),
        "compile_topology_num_slices": 1,
        "decoder_block": "llama2",
        "base_num_decoder_layers": model.n_layers,
        "base_emb_dim": model.d_model,
        "base_mlp_dim": model.d_ff,
        "base_num_query_heads": model.n_heads,
        "base_num_kv_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "vocab_size": model.vocab_size,
        "logits_via_embedding": str(model.tied_embeddings).lower(),
        "max_target_length": config.data.seq_len,
        "per_device_batch_size": sequences,
        "attention": "flash",
        "scan_layers": "true",
        "remat_policy": remat,
        "dtype": model.compute_dtype,
        "weight_dtype": "float32",
        "opt_type": "adamw",
        "enable_checkpointing": "false",
    }
    return [
        *(peer.python, "-m", "maxtext.trainers.pre_train.train_compile"),
        str(peer.folder / "configs" / "base.yml"),
        *(f"{name}={value}" for name, value in settings.items()),
    ]


def accelerator(topology: str) -> str:
    """MaxText's name of a topology: v5e-256; v5p-256 has 128 chips of two cores each."""
    return tpus.find(topology).accelerator_type.replace("v5litepod", "v5e")


def read_dump(dump: Path) -> dict[str, Any]:
    """What the compiler wrote about a step, as a row of the table. Raises ValueError if it wrote nothing."""
    text, report = hlo.find(dump, "after_optimizations.txt"), hlo.find(dump, REPORT)
    if not text or not report:
        raise ValueError(f"{dump} has no optimised program of a TPU, or no report on its memory")
    traffic = hlo.memory_traffic(text)
    return {
        "fits": True,
        "peak": hlo.allocated_bytes(report),
        "traffic": traffic.total,
        "copies": traffic.copies,
        "collectives": hlo.collective_bytes(text),
    }


def compile_peer(
    peer: Installed, config: Config, topology: str, sequences: int, remat: str
) -> dict[str, Any]:
    """A row of MaxText. The compiler is ended when it has laid out the memory: the rest takes long."""
    command = peer_command(peer, config, topology, sequences, remat)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        dump = Path(folder, "dump")
        flags = (
            f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
        )
        process = subprocess.Popen(
            [*command, f"base_output_directory={folder}"],
            cwd=folder,
            env=peer_environment(XLA_FLAGS=flags),
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                if hlo.find(dump, LAST_OF_TPU) and hlo.find(dump, REPORT):
                    return read_dump(dump)
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            return read_dump(dump)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if needed := needed_bytes(text):
        return {"fits": False, "peak": needed}
    last = (text.strip().splitlines() or ["it printed nothing"])[-1]
    raise ValueError(
        f"MaxText ended with {process.returncode} for {topology}: {printable(last)}. "
        "-9 means that this machine has too little memory"
    )


def compile_ours(experiment: str, topology: str, sequences: int, remat: str) -> dict[str, Any]:
    """Our row, by `launch.plan` in a process of its own."""
    batch = sequences * tpus.find(topology).chips
    fields = ["--placement.remat", remat, "--batch-size", str(batch)]
    command = [sys.executable, "-m", "launch.plan", experiment, "--topology", topology, "--json"]
    planned = subprocess.run(
        [*command, "--", *fields],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    if planned.returncode:
        raise ValueError(
            printable((planned.stderr.strip().splitlines() or ["no reason given"])[-1])
        )
    (plan,) = json.loads(planned.stdout)
    if not plan["fits"]:
        return {"fits": False, "peak": plan["peak"]}
    return {
        "fits": True,
        "peak": plan["peak"],
        "traffic": plan["traffic"],
        "copies": plan["copied"],
        "collectives": plan["collective_bytes"],
    }


# Columns: bytes of a row; None where it has none.
COLUMNS: dict[str, tuple[float, int, Callable[[dict[str, Any]], float | None]]] = {
    "peak, GiB": (2**30, 2, lambda row: row["peak"]),
    "HBM, GB": (1e9, 1, lambda row: row.get("traffic")),
    "layout copies, GB": (1e9, 1, lambda row: row.get("copies")),
    "all-gathers, GB": (1e9, 2, lambda row: _collectives(row, "all-gather")),
    "all-reduces and reduce-scatters, GB": (
        *(1e9, 2),
        lambda row: _collectives(row, "all-reduce", "reduce-scatter"),
    ),
    "all collectives, GB": (1e9, 2, lambda row: _collectives(row)),
}


def _collectives(row: dict[str, Any], *kinds: str) -> float | None:
    if "collectives" not in row:
        return None
    return sum(size for kind, size in row["collectives"].items() if not kinds or kind in kinds)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ours, MaxText's and the ratio of each case, as Markdown. What was not computed is empty."""
    shown = Table(box=box.MARKDOWN)
    for column in ("topology", "sequences per chip", "remat", "", *COLUMNS):
        shown.add_column(column, justify="right" if column in COLUMNS else "left", no_wrap=True)
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        case = (row["topology"], row["sequences"], row["remat"])
        cases.setdefault(case, {})[row["peer"]] = row
    for (topology, sequences, remat), peers in cases.items():
        first = [topology, str(sequences), remat.replace(":", " / ")]
        for peer, row in peers.items():
            name = peer if row["fits"] else f"{peer}, does not fit"
            cells = [_cell(read(row), unit, digits) for unit, digits, read in COLUMNS.values()]
            shown.add_row(*first, name, *cells)
            first = ["", "", ""]
        if len(peers) == 2:
            shown.add_row(*first, "ours / MaxText", *_ratios(peers["ours"], peers["MaxText"]))
    return shown


def _cell(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:,.{digits}f}"


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    pairs = [(read(ours), read(peer)) for _, _, read in COLUMNS.values()]
    return ["" if a is None or not b else f"{a / b:.2f}" for a, b in pairs]


def _versions(python: str) -> dict[str, str]:
    """Those of our compiler. Raises ValueError if it is not installed."""
    asked = subprocess.run([python, "-c", _OURS], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError("our rows need libtpu: pip install -e '.[plan]' in the repository")
    return json.loads(asked.stdout)


def _check(options: Options, config: Config) -> None:
    for topology in options.topology:
        chips.check_topology(topology)
        count = tpus.find(topology).chips
        if not options.sequences and config.batch_size % count:
            raise ValueError(f"--sequences: {config.batch_size} sequences do not divide by {count}")
    for pair in options.remat:
        if pair.count(":") != 1:
            raise ValueError(f"--remat {pair!r} must be a pair, such as block:full")
    if any(count < 1 for count in options.sequences):
        raise ValueError("--sequences must be at least 1")


def _cases(options: Options, config: Config) -> Iterator[tuple[str, int, str]]:
    """Topology, sequences per chip, pair of rematerialisations."""
    for pair in options.remat:
        for topology in options.topology:
            batch = config.batch_size // tpus.find(topology).chips
            for sequences in options.sequences or (batch,):
                yield topology, sequences, pair


def _rows(options: Options, config: Config, peer: Installed) -> Iterator[dict[str, Any]]:
    """The rows of all cases. Those of the peer that the output has are not compiled again."""
    versions = {"ours": _versions(sys.executable), "MaxText": peer.versions}
    done = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for topology, sequences, pair in _cases(options, config):
        for name in versions:
            key = {
                "experiment": options.name,
                "topology": topology,
                "sequences": sequences,
                "remat": pair,
                "peer": name,
                "versions": versions[name],
            }
            same = [row for row in done if key.items() <= row.items()]
            if same and name != "ours":
                yield from same
                continue
            print(f"{name}: {topology}, {sequences} sequences per chip, {pair}", flush=True)
            ours, theirs = pair.split(":")
            if name == "ours":
                made = compile_ours(options.name, topology, sequences, ours)
            else:
                made = compile_peer(peer, config, topology, sequences, theirs)
            done = [row for row in done if row not in same] + [key | made]
            what = "a chip's part of the compiled training step, ours and MaxText's"
            save({"what": what, "when": time.strftime("%Y-%m-%d"), "rows": done}, options.output)
            yield key | made


@user_errors
def main(options: Options) -> None:
    configs = parse([options.name])
    if len(configs) != 1:
        raise ValueError(f"{options.name!r} names {len(configs)} experiments; one is compiled")
    (config,) = configs
    _check(options, config)
    peer = installed(options.python)
    with compiling_elsewhere():
        rows = list(_rows(options, config, peer))
    console = Console()
    console.width = max(console.width, 220)
    console.print(table(rows))
    for row in rows[:2]:
        versions = (f"{package} {version}" for package, version in row["versions"].items())
        print(f"{row['peer']}: {', '.join(versions)}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
