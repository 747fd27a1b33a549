"""Train one trial of a sweep. Every engine starts this command on every host of the trial.

    python -m launch.trial runs/SWEEP TRIAL

It runs launch.train from the newest checkpoint and keeps a record (launch/sweeps/records.py). Its exit code
tells the engine what to do:

    0    complete, or another process is training the trial
    42   start again: the trial was stopped and has saved, or another host died
    1    do not start again: the trial failed or is cancelled; the record has the error

A trial fails at once if its config is wrong or its loss is not finite. Other failures are tried again, up to
--failures times in a row without a new checkpoint. A trial that is stopped counts as preempted, not as
failed. So does one that is killed together with this process, or whose other host dies. After --preemptions
of them in a row without a new checkpoint, the trial fails. On one host, this command starts training again
after a failure. With --hosts above 1, the engine starts all hosts again, and only the first host writes the
record.
"""

import contextlib
import os
import signal
from collections.abc import Sequence

from launch.cli import read, user_errors
from launch.sweeps.retry import COMPLETE
from launch.sweeps.runner import Arguments, Runner


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.trial", description=__doc__)
    if arguments.cores:
        os.sched_setaffinity(0, {int(core) for core in arguments.cores.split(",")})
    runner = Runner(arguments)
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, runner.stop)
    locking = runner.record.locked() if runner.leader else contextlib.nullcontext(())
    with locking as lock:
        if lock is None:
            print(f"{runner.record.name} is being trained by another process", flush=True)
            raise SystemExit(COMPLETE)
        runner.state = runner.record.state()  # now that nobody else writes it
        raise SystemExit(runner.run(lock))


if __name__ == "__main__":
    main()
