"""Pages of freed memory are used again, in every thread."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# How often the kernel has to hand a page out when 24 MiB are taken in a thread, freed and taken again.
FAULTS = """
import resource, threading
from service.freed_memory import keep_freed_memory
if {keep}: keep_freed_memory()
def passed():
    held = [bytearray(2**20) for _ in range(24)]
    del held
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    held = [bytearray(2**20) for _ in range(24)]
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
thread = threading.Thread(target=passed)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give no say in it")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_taken_again_without_the_kernel(keep: bool) -> None:
    """The case without shows that it matters: else the pages, 4 KiB each, come anew."""
    script = [sys.executable, "-c", FAULTS.format(keep=keep)]
    faults = int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert faults < 100 if keep else faults > 1000
