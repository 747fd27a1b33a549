"""README and docs: links lead somewhere, commands parse, and sentences are short."""

import contextlib
import csv
import dataclasses
import importlib
import inspect
import re
import shlex
import typing
from pathlib import Path

import pytest
import tyro

from cla_jax.formats import FORMATS
from launch import __main__ as launch_commands

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LONGEST = 25  # words of a sentence


def prose(page):
    """The text of a page without code blocks and tables, links as what they show."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = (re.sub(r"^\s*(?:-|\d+\.) ", "", line) for line in text.replace("**", "").splitlines())
    return [line for line in lines if not line.startswith("|")]


def long_sentences(lines):
    return [
        sentence
        for line in lines
        for sentence in re.split(r"(?:(?<=[.!?:])|(?<=[.!?]\)))\s+(?=[A-Z`(*]|--|docs/)", line)
        if len(sentence.split()) > LONGEST
    ]


STANDS_FOR = {"NAME": "smoke", "HOST:PORT": "host:1234"}


def commands():
    """The `python -m launch.…` commands of all pages, without comments, placeholders filled in."""
    found = []
    for page in (README, *PAGES):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if not line.startswith("python -m launch."):
                    continue
                words = [w for w in shlex.split(line, comments=True) if w != "…"]
                for several in " ".join(map(shlex.quote, words)).split(" '&&' "):
                    module, *argv = shlex.split(several)[2:]
                    argv = [STANDS_FOR.get(word, word) for word in argv]
                    name = f"{page.stem}: {' '.join([module, *argv])}"
                    found.append(pytest.param(module, argv, id=name))
    return found


class Parsed(BaseException):
    """A command line was read without a complaint."""


@pytest.mark.parametrize(("module", "argv"), commands())
def test_every_command_parses(module, argv, monkeypatch, capsys):
    """Experiments and flags exist, and values have the right type. Nothing is run."""
    cli = tyro.cli

    def read(kind, *args, **options):
        # Of a command that is a function, the arguments alone: it would be called with them.
        if inspect.isfunction(kind):
            kind = dataclasses.make_dataclass("Arguments", signature_of(kind), kw_only=True)
        cli(kind, *args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", read)
    with pytest.raises((Parsed, SystemExit)) as end:
        importlib.import_module(module).main(argv)
    helps = end.type is SystemExit and end.value.code == 0 and "--help" in argv
    assert end.type is Parsed or helps, capsys.readouterr().err


def signature_of(function):
    """The parameters of a function as fields of a dataclass."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            yield name, hints[name]
        else:
            default = parameter.default
            yield name, hints[name], dataclasses.field(default_factory=lambda value=default: value)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_a_list_begins_after_an_empty_line(page):
    """Else a website of these pages shows it as one paragraph."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"^(?!\s*(?:- |\d+\. )|  )\S.*\n- .*", text, flags=re.MULTILINE) == []


def test_the_readme_is_one_screen_and_every_page_is_reached_from_it():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 1100
    for page in PAGES:
        assert f"docs/{page.name}" in text, page


WRITTEN = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cla_jax").rglob("*.md")]


@pytest.mark.parametrize(
    "page",
    # A report is written by the code, and committed with its numbers.
    [page for page in WRITTEN if page.name != "report.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_sentences_are_short(page):
    assert long_sentences(prose(page)) == []


@pytest.mark.parametrize(
    "words",
    [
        *([command] for command in launch_commands.COMMANDS),
        ["train", "smoke.tiny"],
        *(["convert", what] for what in ("import", "export", "fetch", "uptrain")),
    ],
    ids=" ".join,
)
def test_sentences_of_help_are_short(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")  # no sentence is broken into lines
    with contextlib.suppress(SystemExit):
        launch_commands.main([*words, "--help"])
    out = capsys.readouterr().out
    assert "--help" in out
    # Columns that stand side by side.
    cells = re.split(r"\s{3,}|\n|[│╭╮╰╯]", out)
    assert (
        long_sentences(cell for cell in cells if not cell.startswith(("usage:", "python -m"))) == []
    )


def test_the_results_in_readme_are_those_of_the_report():
    """Each number with a sign, and its interval, stands in the tables that the report's command makes."""
    text = README.read_text()
    opening = text[text.index("](docs/results/small/pareto.svg)") : text.index("## Two commands")]
    results = ROOT / "docs/results/small"
    claims = list(csv.DictReader((results / "claims.csv").open()))
    (gain,) = csv.DictReader((results / "gains.csv").open())
    plain = opening.replace("\N{MINUS SIGN}", "-")
    stated = re.findall(r"[+-]\d\.\d{4}", plain)
    for first, second in (
        ("h16_mqa_cla2", "h16_mqa"),
        ("h8_mqa", "h16_mqa"),
        ("h16_mqa_cla2", "h8_mqa"),
    ):
        (claim,) = (
            one
            for one in claims
            if [w for w in one["claim"].split() if "_" in w] == [first, second]
        )
        of_claim = [claim["difference"], *claim["interval"].split(" to ")]
        assert stated[:3] == of_claim
        stated = stated[3:]
    maps = list(csv.DictReader((ROOT / "docs/results/maps/claims.csv").open()))
    differences = sorted((one["difference"] for one in maps), key=float)
    assert stated[:2] == [differences[0], differences[-1]]
    (latent,) = (
        one
        for one in csv.DictReader((ROOT / "docs/results/league/claims.csv").open())
        if one["claim"].startswith("latent24 is better than h16_mqa")
    )
    assert stated[2:] == [latent["difference"], *latent["interval"].split(" to ")]
    assert (latent["verdict"] in plain) == (latent["verdict"] == "contradicted")
    assert [one["verdict"] for one in maps] == ["inconclusive"] * 3
    times, low, high = re.findall(r"\d\.\d\d", gain["gain"])
    assert f"need {times} times CLA2's bytes; the interval, {low} to {high}," in plain
    verdicts = {one["verdict"] for one in claims}
    assert ("all four declared claims are inconclusive" in plain) == (verdicts == {"inconclusive"})


def test_the_page_on_evaluation_lists_every_cache_format():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = page.partition("| format |")[2].partition("\n\n")[0].splitlines()
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1] or "")}
    assert listed >= set(FORMATS)
