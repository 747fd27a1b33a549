"""What every entry point does alike."""

import _thread
import contextlib
import contextvars
import dataclasses
import difflib
import errno
import functools
import io
import itertools
import logging
import operator
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

import tyro

# There is no public way to say a refusal in own words. The version is pinned, and the messages of
# tests/test_launch.py need every event and field that is used here.
from tyro import _errors

from cla_jax import extras, fields, machine
from cla_jax.config import (
    CALIBRATED_INITS,
    WSD,
    CacheAttention,
    Component,
    Config,
    DecodingMatmul,
    FromRun,
    Stage,
)
from cla_jax.formats import FORMATS
from cla_jax.messages import near_choice, printable_lines, shown
from cla_jax.typed_numbers import number, whole_number

PICTURES = ("png", "svg", "pdf")  # endings of --plot
# What --cache takes, for --help.
CACHES = (
    f"{', '.join(FORMATS)} (dense has the model's dtype). Or a policy that evicts tokens, such as "
    "fastgen:T=0.95 or h2o:keep=0.25 (docs/eviction.md)"
)

# What --attention takes, in all commands that decode.
Attention = Annotated[
    CacheAttention,
    tyro.conf.arg(
        help="What reads the cache: xla, or a kernel. The kernel native is for CPUs, and needs a C++ "
        "compiler. For steps of few tokens, mosaic is for NVIDIA H100 and H200, and paged for TPUs. These "
        "two were never run on such hardware (docs/pods.md)."
    ),
]
# What --matmul takes.
Matmul = Annotated[
    DecodingMatmul,
    tyro.conf.arg(
        help="What multiplies tokens with weights in steps through a cache: xla, or the kernel native. It is "
        "for CPUs, on one device, and faster, above all for bfloat16. It needs a C++ compiler "
        "(docs/pods.md)."
    ),
]

P = ParamSpec("P")
T = TypeVar("T")

_ROOT = Path(__file__).parents[1]
# Of paths that are not what they were given for.
_PATHS = {
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EILSEQ,
    errno.EOPNOTSUPP,
    errno.ETXTBSY,
}
# Of paths at which there is nothing, and nothing can be made: a mount may come back.
_ABSENT = {
    errno.ENOENT,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.EBUSY,
    errno.ETIMEDOUT,
}
_OURS = tuple(f"{_ROOT / name}/" for name in ("benchmarks", "cla_jax", "experiments", "launch"))
# Of what has run out: another start may find more of it.
_RESOURCES = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EIO,
    errno.ENOLCK,
}
# What to raise where an error names no file.
_LIMITS = {
    errno.EMFILE: "the limit on open files (ulimit -n) is too low",
    errno.EFBIG: "the limit on the size of a file (ulimit -f) is too low",
    errno.ENOMEM: "the limit on memory (ulimit -v) or the memory of this machine is too low",
    errno.EAGAIN: "the limit on processes (ulimit -u) is too low",
}
_NO_THREAD = "can't start new thread"  # in Python's words
_RAN_OUT = re.compile(
    "|".join(
        re.escape(words) for words in (*(os.strerror(number) for number in _RESOURCES), _NO_THREAD)
    )
)
_LONGEST = 300  # characters of a library's message
_LONGEST_LINE = 4000  # of a log message
_STDOUT = 1
_INTERRUPTED = 130  # what a shell says of SIGINT
_AGAIN_S = 0.02  # until a Ctrl-C that was lost is sent again


_FORMS = tyro.constructors.ConstructorRegistry()
_UNIONS = dict(fields.unions(Config))


@_FORMS.primitive_rule
def _number(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Numbers of a command line, with words of our own for what is none."""
    readers: dict[Any, Callable[[str], Any]] = {int: whole_number, float: number}
    union = typing.get_origin(info.type) in (typing.Union, types.UnionType)
    members: set[Any] = set(typing.get_args(info.type)) if union else {info.type}
    numeric = [kind for kind in readers if members in ({kind}, {kind, types.NoneType})]
    if not numeric:
        return None
    kind, optional = numeric[0], types.NoneType in members

    def read_number(arguments: list[str]) -> Any:
        if optional and arguments[0] == "None":
            return None
        return readers[kind](arguments[0])

    def is_instance(value: Any) -> bool:
        if value is None:
            return optional
        return isinstance(value, (int, kind)) and not isinstance(value, bool)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=("{None}|" if optional else "") + kind.__name__.upper(),
        instance_from_str=read_number,
        is_instance=is_instance,
        str_from_instance=lambda x: [str(x)],
    )


@_FORMS.primitive_rule
def _written_as_text(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Components and stages of a mixture are one word each, not flags of their own."""
    forms: dict[Any, str] = {
        Component: "NAME=WEIGHT:SOURCE",
        Stage: "STEP:NAME=WEIGHT,NAME=WEIGHT",
    }
    # With a default of two members, tyro writes typing.Tuple[KIND, ...]: equal in its parts, not as a whole.
    matching = [kind for kind in forms if typing.get_args(info.type) == (kind, ...)]
    if typing.get_origin(info.type) is not tuple or not matching:
        return None
    kind = matching[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{forms[kind]} ...]",
        instance_from_str=lambda words: tuple(map(kind.parse, words)),
        is_instance=lambda value: (
            isinstance(value, tuple) and all(isinstance(one, kind) for one in value)
        ),
        str_from_instance=lambda value: list(map(str, value)),
    )


_asks_tyro = contextvars.ContextVar("_asks_tyro", default=False)


def _as_tyro_has_it(
    info: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec:
    """A dataclass without help of our own."""
    token = _asks_tyro.set(True)
    try:
        spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
    finally:
        _asks_tyro.reset(token)
    assert isinstance(spec, tyro.constructors.StructConstructorSpec)
    return spec


@_FORMS.struct_rule
def _explained(
    info: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """Dataclasses, with help of our own: all kinds of a union, and no default that is empty."""
    if _asks_tyro.get() or not dataclasses.is_dataclass(info.type):
        return None
    spec = _as_tyro_has_it(info)
    return dataclasses.replace(
        spec,
        fields=tuple(
            _with_all_kinds(info.type, field)
            if field.name == "kind"
            else _without_empty_default(field)
            for field in spec.fields
        ),
    )


def _without_empty_default(
    field: tyro.constructors.StructFieldSpec,
) -> tyro.constructors.StructFieldSpec:
    """A flag that may be left out, and whose help ends in no "(default: None)"."""
    is_repeated = tyro.conf.UseAppendAction in getattr(field.type, "__metadata__", ())
    is_empty = field.default is None or (
        isinstance(field.default, str | tuple) and not field.default
    )
    if is_repeated or not is_empty:
        return field
    hidden: Any = Annotated[field.type, tyro.conf.arg(help_behavior_hint="")]
    return dataclasses.replace(field, type=hidden)


def _with_all_kinds(
    variant: Any, field: tyro.constructors.StructFieldSpec
) -> tyro.constructors.StructFieldSpec:
    """The kind of a field that is one of several dataclasses: all of them, not only the chosen one."""
    known = {
        cls: union for union, hint in _UNIONS.items() for cls in fields.variants(hint).values()
    }
    union = known[variant]
    kinds = fields.variants(_UNIONS[union])
    *parents, name = union.split(".")
    owner = functools.reduce(lambda cls, field: typing.get_type_hints(cls)[field], parents, Config)
    meanings = "\n".join(f"{kind}: {_summary(kinds[kind])}" for kind in kinds)
    (described,) = (
        one.helptext
        for one in _as_tyro_has_it(
            tyro.constructors.StructTypeInfo.make(owner, tyro.MISSING, in_union_context=False)
        ).fields
        if one.name == name
    )
    described = f"{described() if callable(described) else described}\n{meanings}"
    every_kind: Any = Literal[tuple(kinds)]
    return dataclasses.replace(field, type=every_kind, helptext=described)


def _summary(variant: Any) -> str:
    """What one of several dataclasses is, and the fields that it has."""
    own = ", ".join(
        field.name.replace("_", "-") for field in dataclasses.fields(variant) if field.init
    )
    return variant.__doc__.splitlines()[0] + (f" Fields: {own}." if own else "")


def read(
    kind: type[T] | Callable[..., T],
    also: Sequence[str] = (),
    fields_follow: bool = False,
    elsewhere: Mapping[str, str] = types.MappingProxyType({}),
    **options: Any,
) -> T:
    """How every entry point reads its command line: `tyro.cli` with its `options`.

    Args:
      also: flags that were taken out of the command line before.
      fields_follow: whether the fields of a run's config come later, after `--`.
      elsewhere: flags that are refused here, with what to say of them.

    Raises:
      ValueError: one line with the flag, the value and the nearest match, for what is refused.
    """
    if description := options.get("description"):
        # tyro would keep the end of a line before a word such as "--flag" or "(aside)".
        options["description"] = re.sub(r"(?<=\S)\n(?=\S)", " ", description)
    argv = options.get("args")
    argv = sys.argv[1:] if argv is None else argv
    known = lambda: [*also, *_known(kind, options)]

    def misplaced() -> dict[str, str]:
        fields_of_runs = []
        if fields_follow:
            fields_of_runs = _known(Config, {"args": []})
            for union in _UNIONS:
                fields_of_runs += _flags_of_kinds(union)
        after = dict.fromkeys(fields_of_runs, "is a config field: put it after a separate `--`")
        return after | dict(elsewhere)

    with _errors.on_parse_error(functools.partial(_refuse, argv, known, misplaced)):
        return tyro.cli(kind, registry=_FORMS, **options)


def read_config(
    config: Config, argv: Sequence[str], check_effects: bool = True, **options: Any
) -> Config:
    """A config with the fields of a command line put in; `options` are those of `read`.

    With `check_effects`, it raises ValueError for a flag that changes a field without an effect.
    `--optimizer.schedule.kind wsd` comes first, wherever it stands: it decides what other flags there are.
    """
    options["description"] = (
        f"{options.get('description', '')} A flag that ends in .kind chooses one of several kinds, which "
        "have different fields. For the flags of another kind, choose it before --help: "
        f"`{options.get('prog', '')} --optimizer.rule.kind muon --help`."
    ).lstrip()
    flags = {_flag(f"{field}.kind"): field for field in _UNIONS}
    rest, words = [], iter(argv)
    for word in words:
        flag, equals, kind = word.replace("_", "-").partition("=")
        if flag in flags:
            kind = kind if equals else next(words, "")
            if not kind or kind.startswith("--"):
                raise ValueError(f"{flag} needs a value; see `{options.get('prog', '')} --help`")
            config = fields.with_kind(config, flags[flag], kind)
        else:
            rest.append(word)
    elsewhere = _unions_as_values(rest) | {
        flag: f"needs {_flag(field)}.kind {' or '.join(kinds)}"
        for field in _UNIONS
        for flag, kinds in _flags_of_kinds(field).items()
        if operator.attrgetter(f"{field}.kind")(config) not in kinds
    }
    options |= {"config": (tyro.conf.AvoidSubcommands,), "elsewhere": elsewhere}
    changed = read(Config, default=config, args=rest, **options)
    if check_effects:
        refuse_unused(unused_flags(config, changed, argv))
    return changed


def unused_flags(before: Config, config: Config, argv: Sequence[str]) -> dict[str, str]:
    """The flags that changed a field without an effect on this config, and the reason of each."""
    given = {word.partition("=")[0].replace("_", "-") for word in argv}
    missing = object()  # the field of another kind

    def value(config: Config, field: str) -> Any:
        try:
            return operator.attrgetter(field)(config)
        except AttributeError:
            return missing

    # A config with a mixture keeps no source, whatever is given.
    changed = lambda field: (
        value(config, field) == "" or value(before, field) != value(config, field)
    )
    return {
        _flag(field): reason
        for field, reason in _unused(config)
        if _flag(field) in given and changed(field)
    }


def refuse_unused(unused: Mapping[str, str]) -> None:
    """Raises ValueError for a flag without an effect."""
    for flag, reason in unused.items():
        raise ValueError(f"{flag} would have no effect: {reason}")


def _unused(config: Config) -> Iterator[tuple[str, str]]:
    """The fields that have no effect because of others, and the reason of each."""
    start, schedule = config.start, config.optimizer.schedule
    if config.data.mixture:
        instead = (
            "--data.mixture without a value removes the mixture, together with a --data.source"
        )
        yield "data.source", f"each component of a mixture has its own source; {instead}"
    if isinstance(schedule, WSD) and not schedule.decay_fraction:
        yield "optimizer.schedule.final_fraction", "--optimizer.schedule.decay-fraction is 0"
    if isinstance(start, FromRun):
        yield "model.init_std", "with --start.kind run, the weights are those of another run"
        if start.init not in CALIBRATED_INITS:
            yield "start.calibration_windows", f"--start.init {start.init} reads no text"
        if not start.distill_weight:
            yield "start.distill_temperature", "--start.distill-weight is 0, so there is no teacher"


def _unions_as_values(argv: Sequence[str]) -> dict[str, str]:
    """What to say of fields that are one of several dataclasses, where they are given one value: `yarn:4`."""
    values: dict[str, str] = {}
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        values[flag.replace("_", "-")] = value if equals else following
    said = {}
    for union, hint in _UNIONS.items():
        kinds = fields.variants(hint)
        kind = values.get(_flag(union), "").partition(":")[0]
        own = (
            [field.name for field in dataclasses.fields(kinds[kind]) if field.init]
            if kind in kinds
            else []
        )
        others = (
            f" and its flags {', '.join(_flag(f'{union}.{name}') for name in own)}" if own else ""
        )
        choice = kind if kind in kinds else ", ".join(kinds)
        said[_flag(union)] = f"takes no value: use {_flag(union)}.kind {choice}{others}"
    return said


def _flags_of_kinds(union: str) -> dict[str, list[str]]:
    """The flags of a field that is one of several dataclasses, with the kinds that have them."""
    kinds: dict[str, list[str]] = {}
    for kind, variant in fields.variants(_UNIONS[union]).items():
        for field in dataclasses.fields(variant):
            kinds.setdefault(_flag(f"{union}.{field.name}"), []).append(kind)
    return kinds


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _refuse(
    argv: Sequence[str],
    known: Callable[[], list[str]],
    misplaced: Callable[[], Mapping[str, str]],
    event: _errors.ParseErrorEvent,
) -> None:
    """Raises ValueError for what tyro is about to refuse; what is not known here, tyro tells itself."""
    see = f"see `{event.prog} --help`"
    match event:
        case _errors.UnrecognizedArgs(tokens=words) if words:
            _refuse_value_of_switch(argv, words, known())
            _refuse_words(words, known(), misplaced(), see)
        case _errors.MissingArgs(unrecognized_tokens=words) if words:
            _refuse_value_of_switch(argv, words, known())
            _refuse_words(words, known(), misplaced(), see)
        case _errors.MissingArgs(missing_arguments=missing):
            names = " and ".join(_name(one.arg) for one in missing)
            raise ValueError(f"{names} must be given; {see}")
        case _errors.MissingSubcommand(subcommand_spec=commands):
            raise ValueError(f"give one of {', '.join(commands.parser_from_name)}; {see}")
        case _errors.BadValue(reason="too_few_values", argument=argument):
            number = argument.lowered.nargs
            values = "a value" if number == 1 else f"{number} values"
            raise ValueError(f"{argument.display_name()} needs {values}; {see}")
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            near_choice(argument.display_name(), value, choices)
        case _errors.InstantiationFailure(argument=None, message=message):
            raise ValueError(message)  # of a config, which names the field itself
        case _errors.InstantiationFailure(argument=argument, message=message) if argument:
            name, said = argument.display_name(), " ".join(message.split())
            own = said.startswith(name.lstrip("-").replace("-", "_"))
            raise ValueError(said if own else f"{name}: {said}")


def _name(argument: Any) -> str:
    """How the help calls a flag or a word."""
    return argument.lowered.metavar if argument.is_positional() else argument.display_name()


def _refuse_value_of_switch(
    argv: Sequence[str], words: Sequence[str], known: Sequence[str]
) -> None:
    """Raises ValueError if one of the words was given to a flag that is only on or off."""
    for flag, word in itertools.pairwise(part for one in argv for part in one.split("=", 1)):
        on = re.sub(r"(^--|\.)no-(?=[^.]*$)", r"\1", flag.replace("_", "-"))
        off = re.sub(r"(^--|\.)(?=[^.]*$)", r"\1no-", on)
        if word in words and {on, off} <= {*known}:
            raise ValueError(
                f"{flag} takes no value, but {shown(word)} follows it: use {on} or {off}"
            )


def _refuse_words(
    words: Sequence[str], known: Sequence[str], misplaced: Mapping[str, str], see: str
) -> None:
    flags = [word for word in words if word.startswith("-")]
    what, word = ("flag", flags[0].partition("=")[0]) if flags else ("argument", words[0])
    name = word.replace("_", "-")
    if what == "flag" and name in misplaced:
        raise ValueError(f"{shown(word)} {misplaced[name]}; {see}")
    within = [flag for flag in known if flag.endswith("." + name.lstrip("-"))]  # --peak-lr
    near = within or difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
    raise ValueError(f"unknown {what} {shown(word)}; {f'did you mean {near[0]}?' if near else see}")


def _known(kind: Any, options: Mapping[str, Any]) -> list[str]:
    """The flags and subcommands of a command line, as its help lists them."""
    argv = options.get("args")
    argv = sys.argv[1:] if argv is None else argv
    text = io.StringIO()
    for words in ([], argv[:1]):  # the help of a subcommand has its flags
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.suppress(SystemExit),
            _errors.on_parse_error(lambda _: None),
        ):
            tyro.cli(kind, registry=_FORMS, **{**options, "args": [*words, "--help"]})
    rows = [line.strip() for line in text.getvalue().splitlines()]
    flags = [
        flag for row in rows if row.startswith("-") for flag in re.findall(r"--\w[\w.-]*", row)
    ]
    return [
        *dict.fromkeys(flags),
        *(row.split()[1] for row in rows if row.startswith(("* ", "• "))),
    ]


def utf8(text: str) -> str:
    """An argument that is text, as it was typed: Python decodes arguments by the locale, often wrongly.

    Raises ValueError for bytes that are no text in either encoding.
    """
    with contextlib.suppress(UnicodeDecodeError, UnicodeEncodeError):
        return os.fsencode(text).decode("utf-8")
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{shown(text)} is not UTF-8")
    return text


def user_errors(main: Callable[P, T]) -> Callable[P, T]:
    """Turns errors that a user can understand into one line and an exit code.

    The message goes to stderr after `error: `, without a traceback.

    - Exit code 2: a `ValueError` of this project, which is how it reports a user's mistake. A
      `ChildProcessError`, a process of ours that was killed. A path that is not what it was given for: a file
      instead of a directory, one that may not be read, too long a name. More memory than the device has.
    - Exit code 1, because another start may succeed: the machine has no more space on a disk, memory or open
      files. A path at which nothing is, or can be made. A reader of stdout that has gone.
    - Exit code 130: Ctrl-C.

    Every other exception, also a library's ValueError, is a bug of ours and keeps its traceback. A character
    that the terminal's encoding lacks is printed as an escape, on stdout as on stderr.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _interrupts_that_arrive():
                return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            leave(_INTERRUPTED)
        except BrokenPipeError:
            if not _reader_has_gone():
                raise
            leave(1)
        except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
            ran_out = _ran_out(error)
            words = ran_out or _absent(error) or _words(error)
            if words is None:
                _leave_a_compiler()
                raise
            print(f"error: {printable_lines(words)}", file=sys.stderr)
            code = 1 if ran_out or _absent(error) else 2
            # Threads of a library that met the same may wait for each other for ever.
            if (ran_out or machine.is_compiling()) and not _has_peers():
                leave(code)
            sys.exit(code)
        except Exception:  # a bug: nothing is swallowed, only the wait at exit is left out
            _leave_a_compiler()
            raise

    return wrapped


@contextlib.contextmanager
def _interrupts_that_arrive() -> Iterator[None]:
    """Sends a Ctrl-C again that Python could only print.

    A handler may run in a callback of the garbage collector, as jax has one, or in a destructor. Python
    prints the exceptions that leave those, and goes on. It does that through this hook.
    """
    report = sys.unraisablehook
    sending = threading.Lock()

    def interrupt_later() -> None:
        time.sleep(_AGAIN_S)
        sending.release()
        os.kill(os.getpid(), signal.SIGINT)

    def send_again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        # Not at once: the handler would run in this hook, and its exception be lost too. For the same reason
        # the hook waits for nothing (a Timer's start does), and one signal stands for several lost ones.
        if sending.acquire(blocking=False):
            _thread.start_new_thread(interrupt_later, ())

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _leave_a_compiler() -> None:
    """Ends the process with the traceback of a bug, where Python would first wait for a compiler."""
    if machine.is_compiling() and not _has_peers():
        traceback.print_exc()
        leave(1)


@contextlib.contextmanager
def collected(refused: list[str]) -> Iterator[None]:
    """Keeps what one of several runs or trials is refused for, so that the others go on.

    Who calls raises it at the end. As in `user_errors`, an error of a library is not a refusal.
    """
    try:
        yield
    except ValueError as error:
        if not _is_ours(error):
            raise
        refused.append(str(error))


def refuse(refused: Sequence[str]) -> None:
    """Raises ValueError with what was collected, each once, if there is anything."""
    if refused:
        raise ValueError("; ".join(dict.fromkeys(refused)))


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time: a progress bar puts itself there, and messages above it."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None: ...


class _Printable(logging.Formatter):
    """Messages have names of files and directories that others chose: no terminal should obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record), _LONGEST_LINE)


def log_to_stderr(*, informed: bool = False) -> None:
    """Prints warnings of all packages, and, if `informed`, what this project has to say besides."""
    handler = _Stderr()
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    # orbax logs the traceback of every error that it raises too; a full disk is one line of ours.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.raiseExceptions = False  # nor does a log that cannot be written to show one
    if informed:
        logging.getLogger("cla_jax").setLevel(logging.INFO)


def check_picture(path: str) -> None:
    """Raises ValueError unless --plot can be written there. Call it before the work, not after."""
    directory, ending = os.path.dirname(path) or ".", os.path.splitext(path)[1]
    near_choice("ending of --plot", ending.removeprefix(".").lower(), PICTURES)
    if not os.path.isdir(directory):
        raise ValueError(f"plot = {shown(path)}: the directory {shown(directory)} does not exist")
    if os.path.isdir(path) or not os.access(directory, os.W_OK):
        raise ValueError(
            f"plot = {shown(path)} cannot be written: it is a directory, or not writable"
        )


def _reader_has_gone() -> bool:
    """Of our stdout; another pipe that breaks is none of the user's doing."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave(code: int) -> NoReturn:
    """Ends the process at once: the threads of a compiler at work do not survive Python's own end."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _ran_out(error: BaseException | None) -> str | None:
    """What the machine has run out of, in one line; None if that is not what an error is about."""
    if isinstance(error, MemoryError):
        return "this machine has run out of memory"
    if isinstance(error, OSError) and error.errno in _RESOURCES:
        where = _LIMITS.get(error.errno) if error.filename is None else error.filename
        return f"{error.strerror}: {where}" if where else error.strerror
    # Libraries pass the system's words on, in exceptions of their own.
    own_message = isinstance(error, ValueError) and _is_ours(error)
    if error is not None and not own_message and (match := _RAN_OUT.search(str(error))):
        if match.group() == _NO_THREAD:
            return f"{_NO_THREAD}: the limits on memory (ulimit -v) or on processes (ulimit -u) are too low"
        line = next(line for line in str(error).splitlines() if match.group() in line)
        return f"{match.group()}: {line[:_LONGEST]}"
    return None


def _absent(error: BaseException) -> str | None:
    """A path at which nothing is, or can be made, in one line; None if an error is not about one."""
    if isinstance(error, OSError) and error.errno in _ABSENT and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return None


def _has_peers() -> bool:
    """Whether other processes train with this one: they have to be told how it ends."""
    distributed = sys.modules.get("launch.hosts.distributed")
    return distributed is not None and distributed.has_peers()


def _is_ours(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(_OURS)


def _words(error: Exception) -> str | None:
    """What to tell the user about their mistake; None if it is one of ours."""
    if isinstance(error, OSError) and error.errno in _PATHS and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        return f"gs:// paths need the extra `gcs`: {extras.how('gcs')}"
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return f"the device has run out of memory: {str(error).splitlines()[0]}"
    told = isinstance(error, ValueError | ChildProcessError)
    return str(error) if told and _is_ours(error) else None
