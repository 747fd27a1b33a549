"""What a process that computes on the CPU tells its C allocator."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_REPORT = """
import ctypes, gc, sys
from pathlib import Path
from launch import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

for _ in range(2):  # a second entry point in the same process
    allocator.set_up()
assert "jax" not in sys.modules
before = resident()
array = bytearray(b"1") * (256 << 20)
held = resident() - before
middle = ctypes.addressof(ctypes.c_char.from_buffer(array, 128 << 20))
del array
kept = resident() - before
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
