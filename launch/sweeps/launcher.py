"""Hands the trials of a sweep to an engine, and starts them again, until all have ended."""

import dataclasses
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from etils import epath

import experiments
from cla_jax import files, preflight
from cla_jax.directories import is_local
from cla_jax.messages import near_choice, printable_lines
from experiments.sweeping import Result
from launch.sweeps import engines, fitting, records, trials
from launch.sweeps.engines.jobset import JobSet, Xpk
from launch.sweeps.engines.local import Local, Pool
from launch.sweeps.engines.queued_resources import QueuedResources
from launch.sweeps.engines.sky import Sky
from launch.sweeps.engines.slurm import Slurm
from launch.sweeps.records import Submission
from launch.sweeps.retry import Retry
from launch.sweeps.trials import LaunchPlan

STOPPED = 42  # as launch.train: the trials were told to save, launch again to go on


# Seconds between two looks of a pool at all trials: one of an earlier launcher that ended is seen then.
_POOL_SECONDS = 3.0
# Seconds between two lines about a running trial, and the most trials that have one.
_PROGRESS_SECONDS = 60.0
_PROGRESS_TRIALS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # A sweep, or a study (which trains all rows of the study).
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    # Where to run: local, slurm, queued-resources, jobset, xpk or sky.
    engine: str = "local"
    # Print what would be submitted, and submit nothing.
    dry_run: bool = False
    # With --dry-run: write the files to this directory instead of printing them.
    out: str = ""
    # Wait until the sweep is complete: restart dead trials, and submit those that depend on results.
    wait: bool = False
    # With --wait: seconds between two checks of the trials.
    every: float = 10.0
    # Evaluate the finished trials on this machine, and submit nothing.
    evaluate: bool = False
    # Also start failed and cancelled trials again.
    again: bool = False
    # Hardware of one trial: a TPU slice in chips (v5e:16x16), or, with slurm, nodes x GPUs (h100:16x8).
    topology: str = ""
    # TPU slices for each trial.
    slices: int = 1
    # Priority, as the engine defines it: a number (slurm), a priority class (jobset), or low to high (xpk).
    priority: str = ""
    # NAME=VALUE, an environment variable for the trials; repeat the flag for several.
    env: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # When a trial that ends badly is not started again.
    retry: Retry = Retry()
    # Processes of this machine.
    local: Local = Local()
    # A job array.
    slurm: Slurm = Slurm()
    # Cloud TPU through gcloud.
    queued_resources: QueuedResources = QueuedResources()
    # Pods on GKE.
    jobset: JobSet = JobSet()
    # Pods on GKE through xpk.
    xpk: Xpk = Xpk()
    # SkyPilot managed jobs.
    sky: Sky = Sky()


ENGINES = ("local", "slurm", "queued-resources", "jobset", "xpk", "sky")


def chosen(arguments: Arguments) -> Any:
    """The engine with its options. Raises ValueError with the nearest names."""
    near_choice("engine", arguments.engine, ENGINES)
    engine = getattr(arguments, arguments.engine.replace("-", "_"))
    if engine.topology == "needed" and not arguments.topology:
        raise ValueError(f"engine {arguments.engine} needs --topology, for example v5e:16x16")
    if engine.topology == "none" and arguments.topology:
        raise ValueError(
            f"engine {arguments.engine} takes no --topology: it runs on the hardware of this machine"
        )
    return engine


def engine_of(name: str) -> Any:
    """The engine that a trial was submitted to, with its usual options: enough to ask after its jobs."""
    near_choice("engine", name, ENGINES)
    return getattr(Arguments(name=""), name.replace("-", "_"))


class Launcher:
    """Hands the trials of a sweep to an engine, once or until all have ended."""

    def __init__(self, arguments: Arguments, overrides: Sequence[str]):
        self.arguments, self.overrides = arguments, overrides
        self.engine = chosen(arguments)
        self.results = trials.Results()
        self.checked: dict[str, str] = {}  # trials asked about, with why they are refused or ""
        self.stuck: dict[str, str] = {}  # trials that this launcher gives up, with the reason
        self.said: dict[str, str] = {}
        self.told: dict[str, str] = {}  # the reasons that were printed with these states
        self.written: set[str] = set()  # trials whose records this launcher has written
        self.said_at = time.monotonic()  # when a line about the trials was last printed
        self.stopping = False
        self.pool = Pool(self.engine) if isinstance(self.engine, Local) else None
        self.waits = arguments.wait or self.pool is not None

    def plan(self, dry: bool = False) -> LaunchPlan:
        """From the sweep and what the run directories say by now."""
        arguments = self.arguments
        environment = {}
        for setting in arguments.env:
            name, equals, value = setting.partition("=")
            if not equals or not (name.isascii() and name.isidentifier()):
                raise ValueError(f"--env {setting!r} must be NAME=VALUE")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"--env {setting!r} is not UTF-8")
            environment[name] = value
        return trials.make(
            arguments.name,
            overrides=self.overrides,
            result=self.results,
            resources=trials.resources(arguments.topology, arguments.slices, self.engine.vms),
            environment=environment,
            priority=arguments.priority,
            retry=arguments.retry,
            python=getattr(self.engine, "python", sys.executable),
            dry=dry,
        )

    # --------------------------------------------------------------------------- dry run

    def show(self) -> None:
        """Prints or writes what would be submitted."""
        plan = self.plan(dry=True)
        if plan.unread:
            print(f"# {plan.unread}; all trials are shown as not started")
            refusals = fitting.check(plan, _progress)
            wrong = {trial.name: refusals.get(trial.name, "") for trial in plan.trials}
            states = {name: ("refused" if why else "todo", why) for name, why in wrong.items()}
        else:
            states = self.states(plan)
        todo = _only(plan, [name for name, (state, _) in states.items() if state == "todo"])
        out = Path(self.arguments.out or f"{plan.directory}/.sweep/jobs")
        for name, (state, reason) in states.items():
            if state != "todo":
                print(f"# {name}: {state}{reason and f': {reason}'}")
        numbers = {} if plan.unread else self._numbers(todo)
        jobs = self.engine.jobs(todo, numbers) if todo.trials else []
        commands = [_shell(job, out) for job in jobs]
        if self.arguments.out:
            out.mkdir(parents=True, exist_ok=True)
            contents = {name: text for job in jobs for name, text in job.files.items()}
            for name, text in contents.items():
                (out / name).write_text(text, encoding="utf-8")
            lines = "\n".join(["set -e", *commands]) + "\n"
            (out / "submit.sh").write_text(lines, encoding="utf-8")
            print(f"wrote {len(contents) + 1} files to {out}; submit.sh has the commands")
        else:
            for job, command in zip(jobs, commands, strict=True):
                for name, text in job.files.items():
                    print(f"# ---- {out / name}\n{text}", end="")
                print(command)
        print(f"# {len(todo.trials)} of {len(plan.trials)} trials would be submitted")
        if plan.waits_for:
            print(f"# more to come: {plan.waits_for}")

    def evaluate(self) -> None:
        """Evaluates what is done, as launch.evaluate does: what is evaluated already is not done again."""
        from launch import evaluate

        plan = self.plan(dry=True)
        done = [trial for trial in plan.trials if self.results(trial.config).metrics]
        if not done:
            raise ValueError(
                f"no trial of {self.arguments.name} is finished yet; start them with python -m launch.sweep "
                f"{self.arguments.name}"
            )
        evaluate.main([trial.directory for trial in done])
        print(f"compare: {self._comparison(plan)}", flush=True)

    def _comparison(self, plan: LaunchPlan) -> str:
        """The command that compares the trials; of a declared study, the one that tests its claims."""
        study = (
            ["--study", self.arguments.name] if experiments.is_declared(self.arguments.name) else []
        )
        return shlex.join(["python", "-m", "launch.compare", *study, str(plan.directory)])

    # ---------------------------------------------------------------------------- launch

    def run(self) -> int:
        """Submits what is to be submitted; the exit code."""
        plan = self.plan(dry=True)  # before anything is made, what is wrong with the sweep
        if plan.unread:
            raise ValueError(plan.unread)
        if self.engine.here:
            first = plan.trials[0].config  # a placement is common to all
            preflight.check_trackers(first)
            preflight.check_directory("placement.runs", first.placement.runs)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            with records.launching(plan.directory):
                record = {"name": self.arguments.name, "engine": self.arguments.engine}
                records.write(plan.directory / ".sweep" / "sweep.json", record)
                if self.arguments.again:
                    records.in_parallel(
                        lambda trial: _record(plan, trial.name).clear_failure(), plan.trials
                    )
                    self.results.known.clear()  # some may have been known to diverge
                return self._loop()
        except OSError as error:
            raise ValueError(f"{error.filename or plan.directory}: {error.strerror}") from error

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _loop(self) -> int:
        while True:
            # First who has ended, then the results: what ended in between would be started again.
            ended = {} if self.pool is None else self.pool.ended()
            plan = self.plan()
            self._collect(plan, ended)
            states = self.states(plan)
            todo = [name for name, (state, _) in states.items() if state == "todo"]
            self._write(_only(plan, todo))
            busy = [name for name, (state, _) in states.items() if state in ("running", "queued")]
            if self.pool is not None:
                elsewhere = [name for name in busy if name not in self.pool.running]
                todo = todo[: self.pool.free(len(elsewhere))]
                busy += self.pool.running  # what is done, or cancelled, may not have ended yet
            self._say(plan, states)
            if todo and not self.stopping:
                self._submit(_only(plan, todo))
                busy += todo
            if self.stopping or not self.waits or not busy:
                break
            self._say_progress(plan, states)
            self._sleep()
        if self.pool is not None:
            if self.stopping and self.pool.running:
                print(
                    f"running trials are asked to save and end: {len(self.pool.running)}",
                    flush=True,
                )
            self.pool.end(self.stopping)
        return self._conclude(plan, states)

    def _sleep(self) -> None:
        """Until a process of the pool has ended, or it is time to look at the files of all trials again."""
        pool = self.pool
        until = time.monotonic() + (self.arguments.every if pool is None else _POOL_SECONDS)
        while time.monotonic() < until and not self.stopping and not (pool and pool.has_ended()):
            time.sleep(0.1)

    def _collect(self, plan: LaunchPlan, ended: Mapping[str, int]) -> None:
        """Gives up trials whose runner is broken, or sees what this launcher does not see.

        Others are judged by their records.
        """
        configs = {trial.name: trial.config for trial in plan.trials}
        for name, code in ended.items():
            record = _record(plan, name)
            if code == 0 and name in configs and configs[name].name not in self.results.known:
                # A runner of newer code, for one: this launcher would start it again and again.
                why = trials.misplaced(configs[name], record)
                if not why and record.state().status == "done":
                    why = "there is no result"
                if why:
                    self.stuck[name] = f"its runner reported success, but {why}"
            elif (
                code > 0
                and code != STOPPED
                and record.state().status != "failed"
                and not record.is_cancelled
            ):
                said = list(files.read_lines(record.path / "runner.log", links=False))
                said = [line for line in said if line.strip()]
                last = said[-1].decode(errors="replace") if said else ""
                why = last or files.write_fault(record.path) or "it printed nothing"
                self.stuck[name] = f"exit code {code}: {why}"

    def states(self, plan: LaunchPlan) -> dict[str, tuple[str, str]]:
        """What is to be done about each trial: todo, or why nothing is: (state, reason)."""
        new = [trial for trial in plan.trials if trial.name not in self.checked]
        if new:
            refusals = fitting.check(dataclasses.replace(plan, trials=tuple(new)), _progress)
            for trial in new:
                wrong = trials.misplaced(trial.config, _record(plan, trial.name))
                self.checked[trial.name] = wrong or refusals.get(trial.name, "")
        sound = [trial.name for trial in plan.trials if not self.checked[trial.name]]
        alive = self._alive(_only(plan, sound))
        state = lambda trial: self._state(trial, plan, alive)
        pairs = records.in_parallel(state, plan.trials)
        return {trial.name: pair for trial, pair in zip(plan.trials, pairs, strict=True)}

    def _state(self, trial: trials.Trial, plan: LaunchPlan, alive: set[str]) -> tuple[str, str]:
        if reason := self.checked[trial.name]:
            return "refused", reason
        if (
            trial.config.name in self.results.known
            and not self.results.known[trial.config.name].diverged
        ):
            return "done", ""
        if reason := self.stuck.get(trial.name):
            return "stuck", reason
        record = _record(plan, trial.name)
        if not record.path.exists():
            return "todo", ""
        state = record.state()
        if record.is_cancelled:
            return "cancelled", ""
        if state.status == "failed":
            return "failed", state.error
        runs_here = self.pool is not None and trial.name in self.pool.running
        # Without locks, by its signs of life.
        unlocked = not self.engine.here or not record.is_local
        heard = unlocked and state.status == "running" and not state.silent
        if runs_here or record.is_locked or heard:
            return "running", _failures(state)
        submission = record.submission()
        if submission and submission.job in alive:
            return "queued", ""
        queued = not self.pool and self.said.get(trial.name) in ("submitted", "queued")
        if submission and queued and state.attempts == submission.attempts:
            return self._give_up(trial.name)
        return "todo", ""

    def _give_up(self, name: str) -> tuple[str, str]:
        self.stuck[name] = "its job left the queue without starting: see the engine's job log"
        return "stuck", self.stuck[name]

    def _alive(self, plan: LaunchPlan) -> set[str]:
        """Jobs that wait or run, asked of every engine that ever got one."""
        if not (plan.directory / ".sweep").exists():
            return set()
        submissions = records.in_parallel(lambda t: _record(plan, t.name).submission(), plan.trials)
        by_engine: dict[str, list[Submission]] = {}
        for trial, submission in zip(plan.trials, submissions, strict=True):
            if submission and trial.config.name not in self.results.known:
                by_engine.setdefault(submission.engine, []).append(submission)
        alive = set()
        for name, jobs in by_engine.items():
            engine = engine_of(name)
            engines.check_tools(engine)
            alive |= engine.alive(jobs)
        return alive

    def _numbers(self, plan: LaunchPlan) -> dict[str, int]:
        before = records.in_parallel(lambda t: _record(plan, t.name).submission(), plan.trials)
        return {
            trial.name: submission.number + 1 if submission else 1
            for trial, submission in zip(plan.trials, before, strict=True)
        }

    def _write(self, plan: LaunchPlan) -> None:
        """Writes the records of trials: also those that wait for a place can be seen and cancelled."""
        for trial in plan.trials:
            if trial.name not in self.written:
                further = {"command": trial.command, "retry": dataclasses.asdict(trial.retry)}
                _record(plan, trial.name).write_trial(trial.config, further)
                self.written.add(trial.name)

    def _submit(self, plan: LaunchPlan) -> None:
        """Hands trials over; what fails is reported, the others go on."""
        numbers = self._numbers(plan)
        folder = plan.directory / ".sweep" / "jobs"
        if not is_local(folder):
            folder = epath.Path(tempfile.mkdtemp(prefix="cla_jax-jobs-"))
        folder.mkdir(parents=True, exist_ok=True)
        for job in self.engine.jobs(plan, numbers):
            for name, text in job.files.items():
                (folder / name).write_bytes(text.encode())
            # Before too: a launcher that is killed meanwhile must find what it asked for.
            self._note(plan, job, numbers, "")
            try:
                printed = self._hand_over(plan, job, folder)
            except ValueError as error:
                self.stuck |= dict.fromkeys(job.jobs, str(error))
                continue
            self._note(plan, job, numbers, printed.strip().partition(";")[0])
            self.said |= dict.fromkeys(job.jobs, "submitted")

    def _note(
        self, plan: LaunchPlan, job: engines.Job, numbers: Mapping[str, int], printed: str
    ) -> None:
        for name, pattern in job.jobs.items():
            record = _record(plan, name)
            submission = Submission(
                engine=self.arguments.engine,
                job=pattern.replace("{}", printed),
                number=numbers[name],
                group=job.group,
                attempts=record.state().attempts,
            )
            record.write_submission(submission)

    def _hand_over(self, plan: LaunchPlan, job: engines.Job, folder: epath.Path) -> str:
        if self.pool is None:
            return engines.call(
                [word.replace("{files}", os.fspath(folder)) for word in job.command]
            )
        (name,) = job.jobs
        trial = next(trial for trial in plan.trials if trial.name == name)
        log = _record(plan, name).path / "runner.log"
        self.pool.start(name, job, trial.environment, log)
        return ""

    # ------------------------------------------------------------------------------ words

    def _say(self, plan: LaunchPlan, states: Mapping[str, tuple[str, str]]) -> None:
        """A line for each trial whose state has changed."""
        done = sum(state == "done" for state, _ in states.values())
        changed = []
        for name, (state, reason) in states.items():
            if state == "todo" or (
                self.said.get(name) == state and not self._is_news(name, reason)
            ):
                continue
            if (self.said.get(name), state) == ("submitted", "queued"):
                self.said[name] = state
                continue
            self.said[name], self.told[name] = state, reason
            if state == "done":
                known = self.results.known[f"{trials.sweep_name(plan.sweep)}/{name}"]
                reason = f"perplexity {known.perplexity:.4f} ({done} of {len(states)})"
            changed.append((name, state, reason))
        _print_together(changed)
        if changed:
            self.said_at = time.monotonic()

    def _say_progress(self, plan: LaunchPlan, states: Mapping[str, tuple[str, str]]) -> None:
        """From time to time, how far the running trials are: during a long trial nothing else is printed."""
        if time.monotonic() - self.said_at < _PROGRESS_SECONDS:
            return
        self.said_at = time.monotonic()
        running = _only(plan, [name for name, (state, _) in states.items() if state == "running"])
        shown = running.trials[:_PROGRESS_TRIALS]
        reasons = records.in_parallel(
            lambda trial: _how_far(_record(plan, trial.name), trial), shown
        )
        _print_together(
            [(trial.name, "running", why) for trial, why in zip(shown, reasons, strict=True)]
        )
        if more := len(running.trials) - len(shown):
            print(f"and {more} more running; see python -m launch.status", flush=True)

    def _is_news(self, name: str, reason: str) -> bool:
        """Whether a running trial has failed since it was last spoken of."""
        return bool(reason) and self.told.get(name) != reason

    def _conclude(self, plan: LaunchPlan, states: Mapping[str, tuple[str, str]]) -> int:
        reported = {name for name, (state, _) in states.items() if state == "stuck"}
        stuck = [(name, "stuck", why) for name, why in self.stuck.items() if name not in reported]
        _print_together(stuck)
        states = dict(states) | {name: (state, why) for name, state, why in stuck}
        submitted = [n for n, s in self.said.items() if s == "submitted"] if not self.waits else []
        words = {n: s for n, (s, _) in states.items()} | dict.fromkeys(submitted, "submitted")
        print(f"{plan.directory}: {trials.count(words.values())}", flush=True)
        if plan.waits_for:
            how = "" if self.waits else "; run this command again later, or with --wait"
            print(f"more to come: {plan.waits_for}{how}", flush=True)
        elif plan.found is not None:
            results = plan.found if isinstance(plan.found, list) else [plan.found]
            for best in (one for one in results if isinstance(one, Result)):
                print(f"best: {best.name}, perplexity {best.perplexity:.4f}", flush=True)
        whole = set(words.values()) == {"done"} and not plan.waits_for
        watch = shlex.join(["python", "-m", "launch.status", str(plan.directory)])
        print(f"compare: {self._comparison(plan)}" if whole else f"watch: {watch}", flush=True)
        if self.stopping:
            return STOPPED
        bad = {"failed", "refused", "stuck"} & set(words.values())
        return 1 if bad else 0


def _failures(state: records.State) -> str:
    """What to say of a running trial that has failed before; empty if it has not."""
    if not state.failed_in_a_row:
        return ""
    first = state.error.partition("\n")[0]
    times = "once" if state.failed_in_a_row == 1 else f"{state.failed_in_a_row} times"
    return f"failed {times} and is started again: {first}"


def _how_far(record: records.Record, trial: trials.Trial) -> str:
    """The last step of a running trial, its loss, and the time that is left."""
    try:
        last = records.last_step(record.run)
    except ValueError:  # what is damaged is told when the trial has ended
        last = {}
    if "step" not in last:
        return "no step yet"
    eta = f", ETA {last['eta_s'] / 60:.1f} min" if "eta_s" in last else ""
    return f"step {last['step']:,} of {trial.config.steps:,}, loss {last['loss']:.4f}{eta}"


def _record(plan: LaunchPlan, name: str) -> records.Record:
    return records.Record(plan.directory, name)


def _only(plan: LaunchPlan, names: Sequence[str]) -> LaunchPlan:
    chosen = set(names)
    return dataclasses.replace(plan, trials=tuple(t for t in plan.trials if t.name in chosen))


def _print_together(lines: Sequence[tuple[str, str, str]]) -> None:
    """Prints (trial, state, reason); what several trials were refused for is said once."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for name, state, reason in lines:
        own = "" if state in ("refused", "stuck") else name
        together.setdefault((state, reason, own), []).append(name)
    for (state, reason, _), those in together.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        why = f": {reason}" if reason else ""
        print(printable_lines(f"{those[0]}{more}  {state}{why}"), flush=True)


def _shell(job: engines.Job, folder: Path) -> str:
    return shlex.join(word.replace("{files}", str(folder)) for word in job.command)


def _progress(said: str) -> None:
    print(said, file=sys.stderr, flush=True)
