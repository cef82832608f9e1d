"""A run program that speaks the run contract in a few tenths of a second: events, locks, checkpoints, resume, exit codes. No torch.

What it does is told by the JSON file that STAND_IN names: steps, step_s, crash_at (step) and crashes (how often), exit (code at the
start), ignore_term, checkpoints (tell of each step's), device (a file in the place of a device's memory: it must be the only one to make
it), child (leave a grandchild), metrics (of the result), hold (wait while that file exists, after saying so in <file>.here), noise,
secret (words that a careless run says on both outputs and in its events).
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hscr.artifacts import file_digest, write_json, write_manifest
from hscr.disk import is_full


def say(kind: str, **values: object) -> None:
    print(json.dumps({"type": kind, **values}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    for name in (
        "--model",
        "--config",
        "--eval",
        "--events",
        "--stop-after",
        "--review",
        "--adapter",
        "--before",
        "--parent",
    ):
        parser.add_argument(name)
    parser.add_argument("--trained-on", action="append", default=[])
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    told = json.loads(Path(os.environ["STAND_IN"]).read_text())
    out: Path = arguments.out
    lock = (out / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if told.get("ignore_term") else lambda *_: stopped.append(1))
    if (arguments.data / "records.jsonl").is_file() is False:
        say("error", code="no_data", message="the data set is missing")
        return 2
    if "device" in told:
        with Path(told["device"]).open("x") as file:  # FileExistsError: the engine is still there
            file.write("run")
        atexit.register(Path(told["device"]).unlink)
    if told.get("noise"):
        print("not json", "x" * 200_000, flush=True)
        say("secret", question="What is left?")
        say("metrics", stage="optimizing", step=1, values={"loss": float("nan")})
    if "secret" in told:
        print(told["secret"], file=sys.stderr, flush=True)
        print(told["secret"], flush=True)
        say("question", text=told["secret"])
        say("progress", stage="generating", done=1, total=told["secret"])
        say("warning", code=told["secret"] + " ", message="a code with a space is no code")
    if told.get("child"):
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
        )
        (out.parent / "grandchild.pid").write_text(str(child.pid))
    if "exit" in told:
        say("error", code="bad_records", message="the run refuses its input")
        return int(told["exit"])

    if arguments.evaluate:
        return evaluate(out, arguments, told)
    state_file = out / "state.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {"step": 0, "weights": ""}
    for stage in ("generating", "optimizing"):
        if stage == "generating" and (out / "preferences.jsonl").is_file():
            say("stage", stage=stage, status="skipped")
            if arguments.stop_after == stage:
                return 75
            if arguments.review:
                (out / "reviewed.jsonl").write_bytes(Path(arguments.review).read_bytes())
            continue
        say("stage", stage=stage, status="started")
        if stage == "generating":
            partial = out / "preferences.partial.jsonl"
            done = len(partial.read_text().splitlines()) if partial.is_file() else 0
            for number in range(done, 3):
                with partial.open("a") as file:
                    file.write(json.dumps({"n": number}) + "\n")
                say("progress", stage=stage, done=number + 1, total=3, rate=1.0, eta_s=0.0)
            hold(told, stage)
            partial.rename(out / "preferences.jsonl")
        else:
            hold(told, stage)
            while state["step"] < told.get("steps", 5):
                time.sleep(told.get("step_s", 0.02))
                if stopped:
                    say("checkpoint", stage=stage, step=state["step"], digest="sha256:" + "0" * 64)
                    return 75
                if state["step"] + 1 == told.get("crash_at") and crash_again(out, told):
                    os.kill(os.getpid(), signal.SIGKILL)
                state["step"] += 1
                state["weights"] = hashlib.sha256(f"{state['weights']}{state['step']}".encode()).hexdigest()
                write_json(state_file, state)
                say("progress", stage=stage, done=state["step"], total=told.get("steps", 5), rate=1.0, eta_s=0.0)
                say("metrics", stage=stage, step=state["step"], values={"loss": 1 / state["step"]})
                if told.get("checkpoints"):
                    say("checkpoint", stage=stage, step=state["step"], digest="sha256:" + "0" * 64)
        say("stage", stage=stage, status="completed")
        if arguments.stop_after == stage:
            return 75
    adapter = out / "adapter"
    adapter.mkdir(exist_ok=True)
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA"})
    (adapter / "adapter_model.safetensors").write_bytes(state["weights"].encode())
    digest = write_manifest(adapter)
    if told.get("damage"):
        (adapter / "adapter_model.safetensors").write_bytes(b"other")
    (out / "report.html").write_text("<h1>report</h1>")
    write_json(
        out / "report.json", {"steps": state["step"], **({"parent": arguments.parent} if arguments.parent else {})}
    )
    hold(told, "reporting")
    if stopped:
        return 75
    say("result", adapter="adapter", digest=digest, metrics=told.get("metrics", {"accuracy": 0.5}))
    return 0


def evaluate(out: Path, arguments: argparse.Namespace, told: dict) -> int:
    """What `hscr evaluate` says; the arguments that it got stand in report.json."""
    say("stage", stage="evaluating", status="started")
    hold(told, "evaluating")
    say("progress", stage="evaluating", done=3, total=3, rate=1.0, eta_s=0.0)
    say("stage", stage="evaluating", status="completed")
    write_json(out / "evaluation.json", {"scores": {}})
    (out / "report.html").write_text("<h1>evaluation</h1>")
    given = {name: getattr(arguments, name) for name in ("adapter", "before", "trained_on")}
    write_json(out / "report.json", given)
    say(
        "result",
        adapter=None,
        digest=file_digest(out / "evaluation.json"),
        metrics=told.get("metrics", {"accuracy": 0.5}),
    )
    return 0


def hold(told: dict, stage: str) -> None:
    """Wait while the file exists; its text names the stage."""
    path = Path(told.get("hold", "/nonexistent"))
    if path.is_file() and path.read_text() == stage:
        path.with_suffix(".here").write_text(str(os.getpid()))
        while path.is_file():
            time.sleep(0.02)


def crash_again(out: Path, told: dict) -> bool:
    counter = out.parent / "crashes"
    count = int(counter.read_text()) if counter.is_file() else 0
    counter.write_text(str(count + 1))
    return count < told.get("crashes", 1000)


def run() -> int:
    """As the real one, it says so where the disk takes no more."""
    try:
        return main()
    except OSError as error:
        if not is_full(error):
            raise
        say("error", code="disk_full", message="the disk is full")
        return 2


if __name__ == "__main__":
    sys.exit(run())
