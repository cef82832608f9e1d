"""`python -m tests.chaos.mutants [STEPS [NAME…]]`: does the chaos suite find it where a guard is taken away?

For each mutant (all, or those whose names have a NAME in them) the suite (SQLite, STEPS steps) must fail, and with words that fit; the copy
without a change must pass. Exit status 1 else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in `file`; `words` are what may be said of the service without it."""

    name: str
    file: str
    old: str
    new: str
    words: tuple[str, ...]


MUTANTS = (
    Mutant(
        "without the fence",
        "service/jobs.py",
        '        .where(Job.id == mine.job_id, Job.status == "running", Job.fence == mine.fence)\n',
        "        .where(Job.id == mine.job_id)\n",
        ("a superseded attempt wrote", "its events have gaps", "two runs of one job at once", "->"),
    ),
    Mutant(
        "without the second ringing",
        "worker/sweep.py",
        "    if not ids or waiting_bells(celery) > 0:\n",
        "    if True:\n",
        ("jobs never end",),
    ),
    Mutant(
        "without the lock of the run's folder",
        "worker/supervise.py",
        "        while not try_lock(lock):\n",
        "        while False:\n",
        ("two runs of one job at once",),
    ),
    Mutant(
        "without taking shards back",
        "worker/sweep.py",
        "        lambda: reap_shards(database, settings.max_crashes),\n",
        "",
        ("shards that nobody takes back",),
    ),
)


def main() -> int:
    steps = sys.argv[1] if len(sys.argv) > 1 else "60"
    names, wrong = sys.argv[2:], 0
    for mutant in (None, *MUTANTS):
        if names and not any(name in (mutant.name if mutant else "as it is") for name in names):
            continue
        with tempfile.TemporaryDirectory(prefix="hscr-mutant-") as folder:
            status, said = _suite(Path(folder), mutant, steps)
        found = [line[1:].strip() for line in said.splitlines() if line.startswith("E   ")]
        if mutant is None:
            good, name = status == 0, "as it is"
        else:
            good, name = status == 1 and any(w in line for line in found for w in mutant.words), mutant.name
        verdict = "passes" if status == 0 else f"fails: {found[0] if found else said[-500:]}"
        print(f"{'as it should' if good else 'WRONG':12} {name:38} {verdict[:160]}", flush=True)
        wrong += not good
    return 1 if wrong else 0


def _suite(folder: Path, mutant: Mutant | None, steps: str) -> tuple[int, str]:
    for name in ("hscr", "service", "worker", "migrations", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "alembic.ini"):
        shutil.copy(ROOT / name, folder / name)
    if mutant is not None:
        path = folder / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} has changed; bring the mutant up to date"
        path.write_text(text.replace(mutant.old, mutant.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/chaos/test_chaos.py",
        "-q",
        "-x",
        "-k",
        "sqlite",
        "--timeout",
        "0",
    ]
    environment = dict(os.environ) | {
        "PYTHONPATH": str(folder),
        "HSCR_CHAOS_STEPS": steps,
        "HSCR_THOROUGH": "1",
        "OMP_NUM_THREADS": "1",
    }
    command += ["-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
