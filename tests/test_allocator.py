"""What a process that computes on the CPU tells its C allocator."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_REPORT = """
import ctypes, gc, sys, threading
from pathlib import Path
from launch import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

for _ in range(2):  # a second entry point in the same process
    allocator.set_up()
assert "jax" not in sys.modules

def allocate():  # in a thread, as XLA does: each has an arena of its own unless glibc is told otherwise
    global held, middle, kept
    before = resident()
    array = bytearray(b"1") * (256 << 20)
    held = resident() - before
    middle = ctypes.addressof(ctypes.c_char.from_buffer(array, 128 << 20))
    del array
    kept = resident() - before

thread = threading.Thread(target=allocate)
thread.start()
thread.join()
for line in Path("/proc/self/smaps").read_text().splitlines():
    name, *rest = line.split()
    if "-" in name and not name.endswith(":"):
        low, high = (int(end, 16) for end in name.split("-"))
    elif name == "VmFlags:" and low <= middle < high:
        huge = "hg" in rest
print(held, kept, huge, gc.get_threshold()[0])
"""


def test_large_arrays_are_on_huge_pages_and_their_memory_is_kept():
    command = [sys.executable, "-c", _REPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    held, kept, huge, threshold = done.stdout.split()
    assert 256 <= int(held) <= 300  # MiB; reserving took none
    assert int(kept) >= 256
    assert (huge, threshold) == ("True", "100000")


def test_too_few_threads_are_refused_before_a_library_aborts():
    program = (
        "import threading\n"
        "from launch import allocator, cli\n"
        "begin, started = threading.Thread.start, []\n"
        "def start(thread):\n"
        "    if len(started) == 20:\n"
        '        raise RuntimeError("can\'t start new thread")\n'
        "    started.append(begin(thread))\n"
        "threading.Thread.start = start\n"
        "cli.user_errors(allocator.set_up)()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: can't start new thread: the limits on memory")
    assert done.stderr.count("\n") == 1
