"""A SLURM cluster of one node, this machine, on loopback, with all its files in one directory.

Debian's `slurm-wlm` and `munge` are what it needs, and root, since munge and slurmd ask for it. Nothing
outside the directory is touched, and ports are free ones: a cluster of the machine's own is left alone.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")

# Two partitions on the same node: `urgent` preempts what runs in `spot`, which is requeued.
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin={tasks}
MaxArraySize={array}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SchedulerTimeSlice=5
MpiDefault=none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/completed.txt
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=spot Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """The programs of a cluster that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def cluster(
    directory: Path, tasks: str = "task/none", array: int = 1001
) -> Iterator[Mapping[str, str]]:
    """Starts a cluster and yields what the environment of `sbatch` and the others needs to talk to it.

    With `tasks="task/affinity"` it binds each step to cores. An array has `array` jobs at most.
    """
    directory.mkdir(mode=0o755)
    for part in ("state", "spool"):
        (directory / part).mkdir()
    configuration = directory / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            directory=directory,
            controller=free_port(),
            node=free_port(),
            cpus=os.cpu_count(),
            tasks=tasks,
            array=array,
        )
    )
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(configuration)}
    munge = [f"--{what}={directory}/munge.{end}" for what, end in MUNGE.items()]
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    ]
    daemons = []
    try:
        for command in commands:
            out = open(directory / f"{command[0]}.out", "wb")  # noqa: SIM115  the daemon's
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            out.close()
            if command[0] == "munged":
                _wait_for((directory / "munge.socket").exists, directory)
        idle = ["sinfo", "--noheader", "--format=%t"]
        _wait_for(lambda: "idle" in _output(idle, environment), directory)
        yield {"SLURM_CONF": str(configuration)}
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        deadline = time.monotonic() + 60
        while _output(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
            time.sleep(0.5)  # their processes end while there is a slurmd to see to it
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


MUNGE = {
    "socket": "socket",
    "key-file": "key",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    ).stdout


def _wait_for(condition, directory: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = [file.read_text(errors="replace")[-2000:] for file in directory.glob("*.log")]
            outs = [file.read_text(errors="replace")[-500:] for file in directory.glob("*.out")]
            raise AssertionError("the cluster does not start:\n" + "\n".join(logs + outs))
        time.sleep(0.2)
