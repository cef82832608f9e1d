"""The rig's processes do not outlive the tests that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_for

TESTS = """
import sys, time
from pathlib import Path
from tests.chaos.children import started
print(started(["sleep", "600"], Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whoever_kills_the_tests_kills_their_services(tmp_path: Path, number: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", TESTS, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as tests:
        assert tests.stdout is not None
        service = psutil.Process(int(tests.stdout.readline()))
        tests.send_signal(number)
    wait_for(lambda: not service.is_running() or service.status() == psutil.STATUS_ZOMBIE, 30, "the service is gone")
