"""The recipe over a run directory: stages, skipping, kill and resume, the adapter as stock libraries see it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hscr import cli_events
from hscr.align import _result, align
from hscr.answer import Answerer, AnswerRequest
from hscr.artifacts import verify_manifest
from hscr.calibration import says_nothing, too_few
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.events import Checkpoint, Event, Metrics, Progress, Result, Stage, Stopped, Warning_, to_line
from hscr.model import VLM, load_model
from hscr.predictions import read_predictions
from hscr.records import read_preferences
from hscr.run_dir import RunDir
from hscr.scoring import _caption_libraries
from hscr.tables import summarize
from tests.hscr.test_cli import hscr  # noqa: F401 - a fixture
from tests.hscr.tiny import picture, save_records

CONFIG = AlignConfig.from_dict(
    {
        "preference": {"similarity": "token_f1", "batch_size": 1, "max_similarity": 1.0, "similarity_gap": 0.0},
        "optimization": {
            "lora_rank": 2,
            "lr": 0.02,
            "batch_size": 2,
            "epochs": 6,
            "checkpoint_every": 3,
            "anchor": 0.5,
        },
        "evaluation": {
            "max_new_tokens": 6,
            "batch_size": 1,
            "n_bootstrap": 100,
            "allow_leak": True,
        },  # on the same data
        "seed": 5,
    }
)
STAGES = ["generating", "optimizing", "evaluating", "reporting"]


@dataclasses.dataclass
class Finished:
    """An uninterrupted run: everything the others must end with."""

    model: Path
    data: Path
    out: Path
    config: Path
    events: list[Event]

    @property
    def weights(self) -> bytes:
        return (self.out / "adapter" / "adapter_model.safetensors").read_bytes()

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.out, to)
        return to


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("align")
    data = save_records(root / "data")
    config = root / "config.json"
    config.write_text(json.dumps(CONFIG.to_dict()))
    events = run(tiny_folder, data, root / "out")
    return Finished(tiny_folder, data, root / "out", config, events)


def run(
    model: Path | VLM, data: Path, out: Path, config: AlignConfig = CONFIG, *, evaluate: bool = True, **options: Any
) -> list[Event]:
    vlm = model if isinstance(model, VLM) else load_model(model, device="cpu")
    return list(align(vlm, DataSet(data), out, config, evaluation_data=DataSet(data) if evaluate else None, **options))


def statuses(events: list[Event]) -> dict[str, str]:
    """The last status of every stage."""
    return {e.stage: e.status for e in events if isinstance(e, Stage)}


def test_the_whole_recipe_leaves_a_whole_run_directory(finished: Finished) -> None:
    assert statuses(finished.events) == dict.fromkeys(STAGES, "completed")
    started = [e.stage for e in finished.events if isinstance(e, Stage) and e.status == "started"]
    assert started == STAGES
    result = finished.events[-1]
    assert isinstance(result, Result)
    assert result.digest == verify_manifest(finished.out / result.adapter)
    assert "adapter/open/strict" in result.metrics
    files = {p.name for p in finished.out.iterdir()}
    assert files >= {"config.json", "manifest.json", "preferences.jsonl", "adapter", "predictions.jsonl"}
    assert files >= {"evaluation.json", "report.html", "report.json", "steps.jsonl", "checkpoints"}
    assert not [f for f in files if "partial" in f or "tmp" in f]
    assert (finished.out / "adapter" / "README.md").is_file()


def test_progress_is_whole_and_rises(finished: Finished) -> None:
    for stage, total in (("generating", 8), ("optimizing", 24), ("evaluating", 48)):
        done = [e.done for e in finished.events if isinstance(e, Progress) and e.stage == stage]
        assert done == sorted(done)
        assert done[-1] == total
    steps = [e.step for e in finished.events if isinstance(e, Metrics) and e.stage == "optimizing"]
    assert steps == list(range(1, 25))
    assert [e.step for e in finished.events if isinstance(e, Checkpoint)] == list(range(3, 25, 3))


def test_events_hold_no_question_answer_or_file_name(finished: Finished) -> None:
    text = "\n".join(to_line(e) for e in finished.events).lower()
    for secret in ("lesion", "where", "frontal", "r0", ".png", str(finished.data), str(finished.model)):
        assert secret.lower() not in text, secret
    for line in text.splitlines():
        assert json.loads(line)["type"] in {"stage", "progress", "metrics", "checkpoint", "warning", "result"}


def test_the_report_shows_questions_escaped_and_pictures_embedded(finished: Finished) -> None:
    html = (finished.out / "report.html").read_text()
    assert "Where is the lesion?" in html
    assert "data:image/png;base64," in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    report = json.loads((finished.out / "report.json").read_text())
    assert report["preferences"]["records"] == 8
    assert report["training"]["steps"] == 24


def test_the_stored_evaluation_is_what_its_predictions_say(finished: Finished) -> None:
    stored = json.loads((finished.out / "evaluation.json").read_text())
    assert summarize(read_predictions(finished.out / "predictions.jsonl"), CONFIG.evaluation) == stored
    assert set(stored["separation"]["adapter"]) == {"open", "closed", "all"}
    assert stored["flag"]["adapter"]["threshold"] is None  # eight records carry none
    assert "20 of each are needed" in stored["flag"]["adapter"]["reason"]


def test_a_threshold_and_the_auroc_are_headline_metrics(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    evaluation = json.loads((out / "evaluation.json").read_text())
    evaluation["flag"]["adapter"]["threshold"] = 0.25
    evaluation["separation"]["adapter"]["all"]["auroc"] = {"mean": 0.75, "low": 0.6, "high": 0.9, "n": 8}
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    metrics = _result(out).metrics
    assert (metrics["adapter/grounding_threshold"], metrics["adapter/grounding_auroc"]) == (0.25, 0.75)
    assert "base/grounding_threshold" not in metrics


def test_what_a_threshold_lacks_can_be_said_from_the_headline_metrics(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    evaluation = json.loads((out / "evaluation.json").read_text())
    flag, metrics = evaluation["flag"]["adapter"], _result(out).metrics
    n, n_wrong = (int(metrics[f"adapter/grounding_calibration/{name}"]) for name in ("n", "n_wrong"))
    assert too_few(n, n_wrong) == flag["reason"]
    flag["calibration"]["auroc"] = {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 60}
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    assert says_nothing(_result(out).metrics["adapter/grounding_calibration/auroc_low"]) is not None


def test_captions_need_their_scorers_before_the_first_stage(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)  # as if it were not installed
    _caption_libraries.cache_clear()
    data = save_records(tmp_path / "data", 2)
    rows = [json.loads(line) | {"answer_type": "caption"} for line in (data / "records.jsonl").read_text().splitlines()]
    (data / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    events = align(
        load_model(finished.model, device="cpu"),
        DataSet(finished.data),
        tmp_path / "out",
        CONFIG,
        evaluation_data=DataSet(data),
    )
    with pytest.raises(ValueError, match=r"pip install 'hscr\[caption\]'"):
        next(events)
    assert not (tmp_path / "out").exists()


def test_a_second_call_skips_everything_and_gives_the_same_result(finished: Finished, tmp_path: Path) -> None:
    out = finished.copy(tmp_path / "out")
    events = run(finished.model, finished.data, out)
    assert statuses(events) == dict.fromkeys(STAGES, "skipped")
    assert events[-1] == finished.events[-1]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        pytest.param({"evaluation": {"n_bootstrap": 101}}, ["evaluating", "reporting"], marks=pytest.mark.thorough),
        ({"optimization": {"gamma": 0.2}}, ["optimizing", "evaluating", "reporting"]),
        pytest.param({"preference": {"beta": 0.1, "n_levels": 1}}, STAGES, marks=pytest.mark.thorough),
        pytest.param({"seed": 6}, STAGES, marks=pytest.mark.thorough),
    ],
)
def test_a_changed_configuration_redoes_only_what_it_must(
    finished: Finished, tmp_path: Path, change: dict[str, Any], redone: list[str]
) -> None:
    out = finished.copy(tmp_path / "out")
    found = statuses(run(finished.model, finished.data, out, AlignConfig.from_dict(change, CONFIG)))
    assert [s for s in STAGES if found[s] == "completed"] == redone
    if redone == STAGES or "optimizing" in redone:
        steps = [json.loads(x)["step"] for x in (out / "steps.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.thorough
def test_a_changed_image_redoes_what_depends_on_it(finished: Finished, tmp_path: Path) -> None:
    out, data = finished.copy(tmp_path / "out"), tmp_path / "data"
    shutil.copytree(finished.data, data)
    picture(77).save(data / "images" / "3.png")
    assert statuses(run(finished.model, data, out)) == dict.fromkeys(STAGES, "completed")


@pytest.mark.parametrize("damaged", ["preferences.jsonl", "adapter/adapter_model.safetensors", "predictions.jsonl"])
def test_a_damaged_output_is_made_again(finished: Finished, tmp_path: Path, damaged: str) -> None:
    out = finished.copy(tmp_path / "out")
    (out / damaged).write_bytes(b"x")
    run(finished.model, finished.data, out)
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == finished.weights
    assert (out / damaged).read_bytes() == (finished.out / damaged).read_bytes()


def test_an_evaluation_never_outlives_its_adapter(finished: Finished, tmp_path: Path) -> None:
    """Without evaluation data nothing replaces the old table, so it must go with the old adapter; the same adapter keeps it."""
    out = finished.copy(tmp_path / "out")
    kept = run(finished.model, finished.data, out, evaluate=False)[-1]
    assert isinstance(kept, Result)
    assert kept.metrics
    changed = AlignConfig.from_dict({"optimization": {"gamma": 0.2}}, CONFIG)
    events = run(finished.model, finished.data, out, changed, evaluate=False)
    assert isinstance(events[-1], Result)
    assert events[-1].metrics == {}
    assert not (out / "evaluation.json").exists()
    assert json.loads((out / "report.json").read_text())["evaluation"] is None


def test_a_model_that_was_aligned_answers_as_the_base_again(finished: Finished, tmp_path: Path) -> None:
    vlm = load_model(finished.model, device="cpu")
    before = Answerer(vlm).answer([AnswerRequest(picture(0), "Where?", max_tokens=6)])
    run(vlm, finished.data, tmp_path / "out", evaluate=False)
    assert Answerer(vlm).answer([AnswerRequest(picture(0), "Where?", max_tokens=6)]) == before
    assert not [n for n, p in vlm.model.named_parameters() if "lora" in n or p.requires_grad]


def test_stock_peft_and_transformers_give_the_answerers_tokens(finished: Finished) -> None:
    """Stock classes on the stock base, no code of ours; and some answer differs from the base's, so it's the adapter that speaks."""
    stock = PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(finished.model), str(finished.out / "adapter")
    ).eval()
    processor = AutoProcessor.from_pretrained(finished.model)
    answerer = Answerer(load_model(finished.model, device="cpu"))
    answerer.load_adapter("sha256:x", finished.out / "adapter")
    differs = False
    for i, question in enumerate(["Where is the lesion?", "Is there a lesion?", "Which plane is shown?"]):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=[picture(i)], text=text, return_tensors="pt")
        with torch.no_grad():
            made = stock.generate(
                **inputs, do_sample=False, max_new_tokens=10, suppress_tokens=[answerer.vlm.image_token_id]
            )
        expected = made[0, inputs["input_ids"].shape[1] :].tolist()
        adapter, base = answerer.answer(
            [AnswerRequest(picture(i), question, a, max_tokens=10) for a in ("sha256:x", None)]
        )
        assert adapter.token_ids == expected
        differs |= base.token_ids != expected
    assert differs


@pytest.mark.thorough
def test_stopping_at_every_look_ends_with_the_same_bytes(finished: Finished, tmp_path: Path) -> None:
    """should_stop() says yes once, at the 1st, 4th, 7th … look: the run is stopped in every stage and goes on."""
    out, vlm, stopped = tmp_path / "out", load_model(finished.model, device="cpu"), []
    for look in (3, 6, 9, 2, 40):
        calls = [0]

        def stop(calls: list[int] = calls, look: int = look) -> bool:
            calls[0] += 1
            return calls[0] >= look

        with contextlib.suppress(Stopped):
            try:
                run(vlm, finished.data, out, should_stop=stop)
            except Stopped as error:
                stopped.append(str(error))
                raise
    assert set(stopped) == {"generating", "optimizing", "evaluating"}
    run(vlm, finished.data, out)
    for name in ("preferences.jsonl", "predictions.jsonl", "evaluation.json", "adapter/SHA256SUMS"):
        assert (out / name).read_bytes() == (finished.out / name).read_bytes(), name
    assert [json.loads(x) for x in (out / "steps.jsonl").read_text().splitlines()] == [
        json.loads(x) for x in (finished.out / "steps.jsonl").read_text().splitlines()
    ]


@pytest.mark.thorough
def test_a_stopped_generation_goes_on_with_the_whole_data_set_in_sight(finished: Finished, tmp_path: Path) -> None:
    """Random words come from all answers, those of records made before the stop among them. One record is worded like no other."""
    data = save_records(tmp_path / "data")
    lines = (data / "records.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"answer": "There was one small dark lesion near the right parietal lobe."}
    (data / "records.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    changes = {"candidates": "random", "top_candidates": 3, "n_levels": 10}
    config = AlignConfig.from_dict({"preference": changes, "optimization": {"epochs": 1}}, CONFIG)
    run(finished.model, data, tmp_path / "whole", config, evaluate=False)
    with pytest.raises(Stopped):
        run(finished.model, data, tmp_path / "cut", config, evaluate=False, should_stop=lambda: True)
    run(finished.model, data, tmp_path / "cut", config, evaluate=False)
    whole = (tmp_path / "whole" / "preferences.jsonl").read_bytes()
    assert b'"source": "random"' in whole
    assert (tmp_path / "cut" / "preferences.jsonl").read_bytes() == whole


def test_a_run_for_review_stops_after_generation_and_goes_on_to_the_same_bytes(
    finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(finished.model, finished.data, out, stop_after="generating")
    assert (out / "preferences.jsonl").read_bytes() == (finished.out / "preferences.jsonl").read_bytes()
    assert not (out / "steps.jsonl").exists()
    with pytest.raises(Stopped):
        run(finished.model, finished.data, out, stop_after="generating")
    events = run(finished.model, finished.data, out)
    assert statuses(events)["generating"] == "skipped"
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == finished.weights
    with pytest.raises(ValueError, match="only `generating`"):
        run(finished.model, finished.data, tmp_path / "other", stop_after="optimizing")


def test_a_wish_to_stop_that_comes_between_two_looks_still_writes_a_checkpoint(
    finished: Finished, tmp_path: Path
) -> None:
    """The signal arrives after optimize() looked and before align() does: stopping there would lose the steps since the last one."""
    out = finished.copy(tmp_path / "out")
    changed = AlignConfig.from_dict({"optimization": {"gamma": 0.2, "checkpoint_every": 100}}, CONFIG)
    events: list[Event] = []
    vlm, data, wish = load_model(finished.model, device="cpu"), DataSet(finished.data), [False]
    with contextlib.suppress(Stopped):
        for event in align(vlm, data, out, changed, evaluation_data=data, should_stop=lambda: wish[0]):
            events.append(event)
            wish[0] |= isinstance(event, Metrics) and event.stage == "optimizing" and event.step == 4
    assert not any(isinstance(e, Result) for e in events)
    assert [e.step for e in events if isinstance(e, Checkpoint)] == [5]


def test_steps_after_the_last_checkpoint_are_taken_and_noted_once(finished: Finished, tmp_path: Path) -> None:
    """Left after step 5 without a word, and with a torn line; the checkpoint is that of step 3, so steps 4 and 5 come again."""
    out, vlm, data = tmp_path / "out", load_model(finished.model, device="cpu"), DataSet(finished.data)
    events = align(vlm, data, out, CONFIG)
    for event in events:
        if isinstance(event, Metrics) and event.stage == "optimizing" and event.step == 5:
            break
    events.close()  # type: ignore[attr-defined]
    with (out / "steps.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = run(vlm, finished.data, out)
    assert next(e.step for e in resumed if isinstance(e, Metrics)) == 4
    assert (out / "steps.jsonl").read_bytes() == (finished.out / "steps.jsonl").read_bytes()
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == finished.weights


def test_a_torn_partial_file_is_cut_back_to_whole_batches(finished: Finished, tmp_path: Path) -> None:
    """Three whole lines and half a fourth; the stage was begun with the same inputs."""
    out = tmp_path / "out"
    RunDir(out)
    manifest = json.loads((finished.out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({"generating": {"inputs": manifest["generating"]["inputs"]}}))
    lines = (finished.out / "preferences.jsonl").read_bytes().splitlines(keepends=True)
    (out / "preferences.partial.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    events = run(finished.model, finished.data, out)
    first = next(e for e in events if isinstance(e, Progress))
    assert (first.done, first.total) == (3, 8)
    assert (out / "preferences.jsonl").read_bytes() == b"".join(lines)


def test_a_second_run_in_the_same_directory_is_refused(finished: Finished, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "out")
    with run_dir.locked(), pytest.raises(ValueError, match="another run is working in it"):
        run(finished.model, finished.data, tmp_path / "out")
    with run_dir.locked():  # free again
        pass


def test_a_data_set_without_records_or_images_is_a_clear_error(finished: Finished, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(finished.data, data)
    (data / "images" / "2.png").unlink()
    with pytest.raises(
        ValueError, match=r"data set 'data': 1 of 8 images are missing beside records.jsonl, as images/2.png"
    ):
        DataSet(data)
    (data / "records.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"has no usable record \(line 1: not JSON"):
        DataSet(data)


# The same through real processes and signals.


def command(finished: Finished, out: Path, *more: str) -> list[str]:
    where = [str(finished.data), "--eval", str(finished.data), "--model", str(finished.model), "--out", str(out)]
    return [sys.executable, "-m", "hscr", "align", *where, "--config", str(finished.config), "--events", "json", *more]


@contextlib.contextmanager
def process(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed when the test leaves, however it leaves."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd(), **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
        try:
            yield child
        finally:
            child.kill()


def follow(child: subprocess.Popen[str], stage: str, done: int = 1) -> list[dict[str, Any]]:
    """Read events until `stage` has made `done` units."""
    events = []
    assert child.stdout is not None
    for line in child.stdout:
        events.append(json.loads(line))
        if events[-1]["type"] == "progress" and events[-1]["stage"] == stage and events[-1]["done"] >= done:
            return events
    assert child.stderr is not None
    raise AssertionError(f"{stage} never came: {events[-3:]} {child.stderr.read()[-2000:]}")


@pytest.mark.thorough
def test_killed_with_sigkill_in_every_stage_a_run_ends_with_the_same_adapter(
    finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for stage, done in (("generating", 2), ("optimizing", 4), ("evaluating", 5)):
        with process(command(finished, out)) as child:
            follow(child, stage, done)
            child.kill()
            assert child.wait() == -signal.SIGKILL
        manifest = json.loads((out / "manifest.json").read_text())
        assert "outputs" not in manifest[stage], "the kill came too late to say anything"
    events = run(finished.model, finished.data, out)
    assert statuses(events) == {
        "generating": "skipped",
        "optimizing": "skipped",
        "evaluating": "completed",
        "reporting": "completed",
    }
    first = next(e for e in events if isinstance(e, Progress))
    assert first.done >= 5  # whole batches of the killed process are kept
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == finished.weights
    assert events[-1] == finished.events[-1]
    for name in ("preferences.jsonl", "predictions.jsonl", "evaluation.json"):
        assert (out / name).read_bytes() == (finished.out / name).read_bytes(), name
    steps = [json.loads(x)["step"] for x in (out / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


@pytest.mark.parametrize("where", ["here", pytest.param("process", marks=pytest.mark.thorough)])
def test_sigterm_ends_with_75_after_a_checkpoint_and_the_run_goes_on(
    where: str,
    finished: Finished,
    hscr: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process of its own is another import of torch: where that is too long, the signal comes while this one runs the command."""
    out = finished.copy(tmp_path / "out")
    (out / "manifest.json").write_text(
        json.dumps({"generating": json.loads((finished.out / "manifest.json").read_text())["generating"]})
    )
    if where == "process":
        with process(command(finished, out)) as child:
            follow(child, "optimizing", 1)
            child.send_signal(signal.SIGTERM)
            rest, errors = child.communicate(timeout=60)
        code = child.returncode
    else:

        def told(event: Event) -> str:
            if isinstance(event, Progress) and event.stage == "optimizing" and event.done == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return to_line(event)

        monkeypatch.setattr(cli_events, "to_line", told)
        code, rest, errors = hscr(*command(finished, out)[3:])
    assert code == 75, errors
    events = [json.loads(line) for line in rest.splitlines()]
    last = [e for e in events if e["type"] == "checkpoint"][-1]
    assert last["step"] < 24
    assert verify_manifest(out / "checkpoints" / f"step-{last['step']}") == last["digest"]
    assert not any(e["type"] in ("result", "error") for e in events)
    resumed = run(finished.model, finished.data, out)
    assert next(e.step for e in resumed if isinstance(e, Metrics)) == last["step"] + 1
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == finished.weights


@pytest.mark.thorough
def test_a_run_dies_with_the_parent_that_started_it(finished: Finished, tmp_path: Path) -> None:
    """A supervisor that is killed -9 leaves no writer behind: the run ends and its lock is free."""
    out = finished.copy(tmp_path / "out")
    long = command(finished, out, "-s", "optimization.epochs=1000")
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], env={**os.environ, 'HSCR_PARENT_PID': str(os.getpid())})\n"
        'print(\'{"type": "pid", "pid": %d}\' % child.pid, flush=True)\n'
        "child.wait()"
    )
    with process([sys.executable, "-c", code, *long]) as parent:
        pid = follow(parent, "optimizing")[0]["pid"]
        parent.kill()
        parent.wait()
        # A dying leader is a zombie for as long as one of its threads still ends, and its files are open until then: ask the lock.
        deadline = time.monotonic() + 20
        while True:
            try:
                with RunDir(out).locked():
                    break
            except ValueError:
                assert time.monotonic() < deadline, f"process {pid} outlived its parent and holds the run directory"
                time.sleep(0.05)


def test_what_the_data_say_twice_is_learnt_from_with_a_warning_and_a_line_in_the_report(
    finished: Finished, tmp_path: Path
) -> None:
    """Of nine records the ninth asks what the first does, with another answer; finished's eight say nothing twice."""
    data = Path(shutil.copytree(finished.data, tmp_path / "data"))
    lines = (data / "records.jsonl").read_text().splitlines()
    again = {**json.loads(lines[0]), "id": "r8", "answer": "Nowhere.", "grounded": []}
    (data / "records.jsonl").write_text("\n".join([*lines, json.dumps(again)]))
    config = dataclasses.replace(CONFIG, optimization=dataclasses.replace(CONFIG.optimization, epochs=1))
    events = run(finished.model, data, tmp_path / "out", config, evaluate=False)
    (warned,) = (e for e in events if isinstance(e, Warning_) and e.code in ("contradictions", "duplicates"))
    assert warned.code == "contradictions"
    assert warned.message == (
        "2 records answer 1 of the questions in different ways, on the same pictures; all are kept, the first are on lines 1, 9"
    )
    told = json.loads((tmp_path / "out" / "report.json").read_text())["data"]["repeats"]
    assert told["contradictions"] == {"questions": 1, "records": 2, "first": [[{"line": 1}, {"line": 9}]]}
    assert len(list(read_preferences(tmp_path / "out" / "preferences.jsonl"))) == 9
    assert re.search(
        r"different answers</td><td class=\"n\">1</td><td class=\"n\">2</td><td>1, 9<",
        (tmp_path / "out" / "report.html").read_text(),
    )
    assert "different answers" not in (finished.out / "report.html").read_text()
    assert not [e for e in finished.events if isinstance(e, Warning_) and e.code in ("contradictions", "duplicates")]
