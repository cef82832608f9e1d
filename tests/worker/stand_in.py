"""A run program that speaks the run contract in a few tenths of a second: events, locks, checkpoints, resume, exit codes. No torch.

What it does is told by the JSON file that STAND_IN names: steps, step_s, crash_at (step) and crashes (how often), exit (code at the
start), ignore_term, checkpoints (tell of each step's), device (a file in the place of a device's memory: it must be the only one to make
it), child (leave a grandchild), metrics (of the result), hold (wait while that file exists, after saying so in <file>.here), noise,
secret (words that a careless run says on both outputs and in its events), record_s (the generation makes a line for each record of the data
set, at this pace, and takes up parts), part_crash (the making of parts with these numbers dies at once). With --generate it makes the parts
that it is told, as `hscr generate --shard -`.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from hscr.artifacts import file_digest, json_digest, write_json, write_manifest
from hscr.disk import is_full
from hscr.events import Rate
from hscr.parts import Parts, part_name, shard_bounds
from hscr.records import PreferenceRecord, VQARecord, read_records
from hscr.run_dir import PartialFile, RunDir


def say(kind: str, **values: object) -> None:
    print(json.dumps({"type": kind, **values}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    for name in (
        "--model",
        "--device",
        "--dtype",
        "--config",
        "--eval",
        "--events",
        "--stop-after",
        "--review",
        "--adapter",
        "--before",
        "--parent",
        "--parts",
        "--shard",
    ):
        parser.add_argument(name)
    parser.add_argument("--trained-on", action="append", default=[])
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    told = json.loads(Path(os.environ["STAND_IN"]).read_text())
    if arguments.generate:
        return make_parts(arguments, told)
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
        if stage == "generating" and "record_s" in told:
            if not generate(out, arguments, told, stopped):
                return 75
        elif stage == "generating":
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
            if "record_s" in told and state["step"] == 0:  # here: a run may be killed between the two stages
                state["weights"] = file_digest(out / "preferences.jsonl")
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


def generate(out: Path, arguments: argparse.Namespace, told: dict, stopped: list[int]) -> bool:
    """Batch by batch, as hscr/align.py does; False where it was stopped."""
    records, size, inputs = asked(arguments)
    resumed = (out / "preferences.partial.jsonl").is_file()
    partial = PartialFile(out / "preferences.partial.jsonl", lengths(len(records), size), resume=resumed)
    parts, position = Parts(Path(arguments.parts), inputs, records, size), min(partial.done * size, len(records))
    rate = Rate("generating", len(records), position)
    while True:
        now = rate.at(position)
        say("progress", stage="generating", done=position, total=len(records), rate=now.rate, eta_s=now.eta_s)
        if position == len(records):
            break
        if stopped:
            return False
        if lines := parts.at(position):
            partial.append_lines(lines)
            say("part", stage="generating", first=position + 1, last=position + len(lines))
            position += len(lines)
        else:
            position += make_batch(partial, records[position : position + size], told)
    hold(told, "generating")
    partial.rename(out / "preferences.jsonl")
    return True


def make_batch(partial: PartialFile, records: list[VQARecord], told: dict) -> int:
    time.sleep(told.get("record_s", 0) * len(records))
    partial.append(PreferenceRecord(r, (), (), {}) for r in records)
    return len(records)


def lengths(n: int, size: int) -> list[int]:
    return [min(size, n - at) for at in range(0, n, size)]


def make_parts(arguments: argparse.Namespace, told: dict) -> int:
    """One part after the other, as standard input says (--shard -)."""
    assert arguments.shard == "-"
    for line in sys.stdin:
        make_part(arguments, told, line.strip())
    return 0


def make_part(arguments: argparse.Namespace, told: dict, shard: str) -> None:
    """One part into the folder, as hscr/shard.py does."""
    records, size, inputs = asked(arguments)
    number, _, of = shard.partition("/")
    start, stop = shard_bounds(len(records), size, int(number), int(of))
    if int(number) in told.get("part_crash", []):
        os.kill(os.getpid(), signal.SIGKILL)
    scratch = RunDir(Path(arguments.parts) / f".{inputs[7:23]}.{start}-{stop}.partial")
    with scratch.locked():
        resumed = scratch.start("generating", inputs)
        partial = PartialFile(scratch.path / "lines", lengths(stop - start, size), resume=resumed)
        position = min(start + partial.done * size, stop)
        while position < stop:
            say("progress", stage="generating", done=position - start, total=stop - start)
            hold(told, "part")
            position += make_batch(partial, records[position : min(position + size, stop)], told)
        name = part_name(inputs, start, stop, file_digest(partial.path))
        partial.rename(Path(arguments.parts) / name)
        shutil.rmtree(scratch.path)
    say("stage", stage="generating", status="completed")


def asked(arguments: argparse.Namespace) -> tuple[list[VQARecord], int, str]:
    """The records, how many a batch has, and the digest of what is made from what."""
    records, config = read_records(arguments.data)[0], json.loads(Path(arguments.config).read_text())
    named = [str(arguments.data), config.get("seed"), Path(arguments.parent).name if arguments.parent else None]
    return records, config.get("preference", {}).get("batch_size", 32), json_digest(named)


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
