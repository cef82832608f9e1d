"""The command line: exit codes, messages, help, and what is printed where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hscr import __version__, cli, cli_data, cli_demo, cli_events, cli_model, cli_options
from hscr.artifacts import json_digest
from hscr.cli import app
from hscr.cli_options import configuration
from hscr.events import Stopped
from hscr.records import read_preferences
from hscr.run_dir import RunDir
from tests.hscr.tiny import picture

FAST = ["-s", "preference.similarity=token_f1", "-s", "optimization.lora_rank=2", "-s", "optimization.epochs=1"]
FAST += ["-s", "evaluation.n_bootstrap=100", "-s", "evaluation.max_new_tokens=4", "-s", "evaluation.max_records=3"]
FAST += ["-s", "evaluation.allow_leak=true"]  # these runs evaluate on what they align on


@pytest.fixture
def hscr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command as `python -m hscr` does; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hscr", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped or coloured, so that messages can be searched."""
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    for module in (cli, cli_data, cli_demo, cli_events, cli_model, cli_options):
        monkeypatch.setattr(module, "console", Console(stderr=True, width=300, color_system=None))


COMMANDS = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]


def test_all_promised_commands_exist() -> None:
    assert {"align", "generate", "evaluate", "ask", "export"} <= set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_and_names_every_command(hscr: Any, command: str) -> None:
    code, out, _ = hscr(*([command] if command else []), "--help")
    assert code == 0
    assert "Usage" in out
    assert all(c in out for c in COMMANDS) or command


def test_version_is_printed(hscr: Any) -> None:
    assert hscr("--version") == (0, f"hscr {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_names_a_path_of_this_machine(hscr: Any, command: str) -> None:
    assert str(Path(cli.__file__).parent) not in hscr(command, "--help")[1]


def test_ask_shows_the_frame_that_is_named(hscr: Any, tiny_folder: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "two.tiff", save_all=True, append_images=[picture(1)])
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.tiff")
    more = ["Where?", "-m", tiny_folder, "--max-tokens", 3, "--json"]
    first, second = (json.loads(hscr("ask", tmp_path / f"{n}.tiff", *more)[1]) for n in (0, 1))
    shown = json.loads(hscr("ask", tmp_path / "two.tiff", *more, "--frame", 1)[1])
    assert (shown["tokens"], shown["tokens"] == first["tokens"]) == (second["tokens"], False)


def test_help_shows_brackets_and_names_no_path_of_this_machine(hscr: Any) -> None:
    _, out, _ = hscr("align", "--help")
    assert "pip install 'hscr[quantized]'" in out  # rich takes a bare [word] for markup
    assert "the demo model" in out
    assert str(Path(cli.__file__).parent) not in out


def test_help_answers_without_loading_torch() -> None:
    code = "import sys, hscr.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_align_in_json_writes_nothing_but_events_to_stdout(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    where = ["align", data_folder, "--eval", data_folder, "-m", tiny_folder, "-o", tmp_path / "out", *FAST]
    code, out, _ = hscr(*where, "--events", "json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [e["status"] for e in events if e["type"] == "stage"] == ["started", "completed"] * 4
    assert events[-1]["type"] == "result"
    assert events[-1]["adapter"] == "adapter"
    assert events[-1]["digest"].startswith("sha256:")
    code, out, err = hscr(*where)  # again, drawn: everything is skipped
    assert code == 0
    assert "unchanged" in err
    assert "settings changed" not in err
    assert "open/strict" in out
    _, out, _ = hscr(
        *where, "-s", "optimization.lr=1e-4", "--seed", 3, "--events", "json", "--stop-after", "generating"
    )
    told = [e["message"] for e in map(json.loads, out.splitlines()) if e.get("code") == "settings_changed"]
    assert told == ["settings changed in this folder: optimization.lr, seed; what rests on them is made anew"]


def test_evaluate_compares_base_and_adapter_and_does_not_repeat_itself(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert hscr("align", data_folder, "-m", tiny_folder, "-o", run, *FAST)[0] == 0
    where = ["evaluate", data_folder, "-m", tiny_folder, "--adapter", run / "adapter", "-o", tmp_path / "out", *FAST]
    code, out, err = hscr(*where)
    assert code == 0, err
    assert "base" in out
    assert "adapter" in out
    before = (tmp_path / "out" / "predictions.jsonl").stat().st_mtime_ns
    assert hscr(*where)[0] == 0
    assert (tmp_path / "out" / "predictions.jsonl").stat().st_mtime_ns == before
    assert hscr(*where, "-s", "preference.dropout_ratio=0.3")[0] == 0  # another grounding score: asked again
    assert (tmp_path / "out" / "predictions.jsonl").stat().st_mtime_ns > before
    code, _, err = hscr(*where, "-s", "evaluation.max_records=0")
    assert code == 2
    assert "nothing to evaluate" in err
    same = ["--before", run / "adapter"]  # compared with itself: no gain in any answer
    assert hscr(*where, *same)[0] == 0
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {(v["mean"], v["low"], v["high"]) for v in stored["gain_over_before"]["real"].values()} == {(0.0, 0.0, 0.0)}
    assert list(stored["scores"]) == ["base", "adapter", "before"]
    assert "Over the version before" in (tmp_path / "out" / "report.html").read_text()
    code, _, err = hscr(*where, "--before", tmp_path)
    assert code == 2
    assert "--before: no adapter_model.safetensors in" in err


def test_tables_again_from_the_predictions_equal_the_stored_evaluation(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again" / "tables.json"
    settings = [*FAST, "-s", "evaluation.n_bootstrap=123", "-s", "evaluation.calibration_share=0.6"]
    assert hscr("evaluate", data_folder, "-m", tiny_folder, "-o", run, *settings)[0] == 0
    stored = (run / "evaluation.json").read_bytes()
    assert hscr("tables", run, "-o", again)[0] == 0
    assert again.read_bytes() == stored
    code, out, _ = hscr("tables", run / "predictions.jsonl", "-o", again, "-s", "evaluation.n_bootstrap=100")
    assert code == 0
    assert "open/strict" in out
    assert again.read_bytes() != stored
    assert (run / "evaluation.json").read_bytes() == stored
    code, _, err = hscr("tables", data_folder)
    assert code == 2
    assert "no predictions.jsonl there; run `hscr align --eval` or `hscr evaluate` first" in err


def test_generate_and_export_write_rows(hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "new" / "p.jsonl"
    code, _, err = hscr("generate", data_folder, "-m", tiny_folder, "-o", made, *FAST)
    assert code == 0, err
    levels = sum(len(p.levels) for p in read_preferences(made))
    assert levels > 0
    assert hscr("export", made, "-o", tmp_path / "other" / "t.jsonl")[0] == 0
    assert len((tmp_path / "other" / "t.jsonl").read_text().splitlines()) == levels


def test_ask_prints_an_answer_and_json_with_everything(hscr: Any, tiny_folder: Path, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    where = ["ask", tmp_path / "a.png", "Where?", "-m", tiny_folder, "--max-tokens", 5]
    code, out, _ = hscr(*where, "--json")
    answer = json.loads(out)
    assert code == 0
    assert len(answer["token_ids"]) == answer["completion_tokens"] == len(answer["tokens"]) <= 5
    assert {"text", "logprob", "logprob_without_image", "reward", "is_content"} == answer["tokens"][0].keys()
    assert answer["finish_reason"] in ("stop", "length")
    code, out, _ = hscr(*where)
    assert code == 0
    assert re.search(r"grounding -?\d", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["align", "{data}", "-o", "{tmp}/o", "-s", "optimization.lr=-1"],
            "optimization.lr: must be in (0, 1], got -1",
        ),
        (["align", "{data}", "-o", "{tmp}/o", "-s", "optimization.lr"], "write field=value"),
        (["align", "{data}", "-o", "{tmp}/o", "-s", "lr=1"], "lr: unknown field"),
        (["align", "{data}", "-o", "{tmp}/o", "--preset", "best"], "preset: must be one of"),
        (["align", "{data}", "-o", "{tmp}/o", "--config", "{tmp}/none.json"], "--config: no such file: none.json"),
        (["align", "{data}", "-o", "{tmp}/o", "--config", "{data}/records.jsonl"], "is not JSON"),
        (["align", "{data}", "-o", "{tmp}/o", "-m", "{tmp}"], "no config.json there"),
        (["align", "{tmp}/[b]none", "-o", "{tmp}/o"], "data set '[b]none': no such file or folder"),
        (
            ["align", "{data}", "-o", "{tmp}/o", "-m", "{model}", "--events", "xml"],
            "--events: must be progress or json",
        ),
        (["align", "{data}", "-o", "{tmp}/o", "-m", "{model}", "--dtype", "int4"], "dtype: must be auto or one of"),
        (
            ["align", "{data}", "-o", "{tmp}/o", "-m", "{model}", "--quantize", "8bit"],
            "quantize: must be 4bit, not '8bit'",
        ),
        (["ask", "{tmp}/none.png", "Where?"], "none.png: the image file is missing"),
        (
            ["ask", "{data}/images/0.png", "Where?", "-i", "{data}/records.jsonl"],
            "records.jsonl: the data is not a PNG",
        ),
        (["ask", "{data}/images/0.png", "Where?", "--adapter", "{tmp}/[/b]"], "[/b]; give the adapter folder of a run"),
        (["evaluate", "{data}", "-o", "{tmp}/o", "--adapter", "{tmp}"], "--adapter: no adapter_model.safetensors in"),
        (
            ["ask", "{data}/images/0.png", "Where?", "-i", "{data}/images/1.png", "-m", "{model}"],
            "a record has 2, and llava takes one a prompt",
        ),
        (
            ["ask", "{data}/records.jsonl", "Where?"],
            "the data is not a PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM or NIfTI image",
        ),
        (["ask", "{data}/images/0.png", " "], "the question is empty"),
        (
            ["ask", "{data}/images/0.png", "Where?", "--frame", "1"],
            "0.png: a frame can be chosen of DICOM, TIFF and NIfTI",
        ),
        (
            ["ask", "{data}/images/0.png", "Where?", "--plane", "oblique"],
            "image.plane: must be axial, coronal or sagittal",
        ),
        (["ask", "{data}/images/0.png", "Where?", "--window", "wide"], "--window wide: write CENTRE,WIDTH"),
        (["ask", "{data}/images/0.png", "Where?", "--window", "40"], "image.window: must be [centre, width]"),
        (["tables", "{empty}"], "its predictions.jsonl is empty"),
        (["demo-model", "--rebuild"], "say where with --out FOLDER"),
        (["export", "{tmp}", "-o", "{tmp}/x"], "no preferences.jsonl there"),
        (["export", "{tmp}/nothing", "-o", "{tmp}/x", "--format", "csv"], "no preferences.jsonl there"),
    ],
)
def test_bad_input_ends_with_2_and_one_clear_line(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "predictions.jsonl").touch()
    names = {"{data}": data_folder, "{tmp}": tmp_path, "{model}": tiny_folder, "{empty}": empty}
    filled = []
    for argument in arguments:
        for name, value in names.items():
            argument = argument.replace(name, str(value))
        filled.append(argument)
    code, out, err = hscr(*filled)
    assert code == 2
    assert message in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("form", [["--events", "json"], ["--events=json"]])
def test_bad_input_in_json_is_an_error_event(hscr: Any, data_folder: Path, tmp_path: Path, form: list[str]) -> None:
    code, out, _ = hscr("align", data_folder, "-o", tmp_path / "o", "-s", "seed=-1", *form)
    assert code == 2
    assert json.loads(out) == {"type": "error", "code": "bad_input", "message": json.loads(out)["message"]}
    assert "seed: must be in" in out


def test_usage_errors_end_with_2(hscr: Any) -> None:
    assert hscr("align")[0] == 2
    assert hscr("no-such-command")[0] == 2
    assert hscr("ask", "a.png", "Where?", "--max-tokens", 0)[0] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Stopped("optimizing"), 75),
        (ArithmeticError("loss is nan"), 2),
        (KeyboardInterrupt(), 130),
        (ValueError("x"), 2),
    ],
)
def test_ends_of_a_run_map_to_exit_codes(
    hscr: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def end(*a: Any, **kw: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", end)
    assert hscr("align", "--events=json")[0] == code


def test_a_crash_is_no_bad_input(hscr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything unforeseen keeps its traceback and Python's exit code 1, so that the service tries again."""

    def crash() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(cli, "app", crash)
    with pytest.raises(RuntimeError, match="CUDA error"):
        hscr("align")


def test_paths_with_brackets_are_told_as_they_are_and_a_run_serves_as_its_adapter(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run [/] 1"
    code, _, err = hscr("align", data_folder, "-m", tiny_folder, "-o", run, *FAST)
    assert code == 0
    assert f"adapter: {run / 'adapter'}\n" in err
    assert "is_gradient_checkpointing" not in err
    code, _, err = hscr("export", run, "-o", tmp_path / "[bold]" / "[x].jsonl")
    assert (code, f"rows: {tmp_path / '[bold]' / '[x].jsonl'}\n" in err) == (0, True)
    where = ["ask", data_folder / "images" / "0.png", "Where?", "-m", tiny_folder, "--max-tokens", 5]
    assert hscr(*where, "--adapter", run, "--json")[1] == hscr(*where, "--adapter", run / "adapter", "--json")[1]


def test_a_locked_run_directory_is_bad_input(hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    with RunDir(tmp_path / "out").locked():
        code, _, err = hscr("align", data_folder, "-m", tiny_folder, "-o", tmp_path / "out", *FAST)
    assert code == 2
    assert "another run is working in it" in err


def test_rows_left_out_are_told(hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    with (data_folder / "records.jsonl").open("a") as file:
        file.write('{"id": "x"}\n')
    code, _, err = hscr("align", data_folder, "-m", tiny_folder, "-o", tmp_path / "out", *FAST)
    assert code == 0
    assert "line 9 left out: image: must be a text" in err


def test_configuration_lays_file_over_preset_and_fields_over_both(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"optimization": {"lr": 0.5, "gamma": 0.25}, "seed": 4}')
    found = configuration("recommended", file, ["optimization.lr=0.25", "preference.similarity=token_f1"], None)
    assert (found.optimization.lr, found.optimization.gamma, found.optimization.anchor) == (0.25, 0.25, 2.0)
    assert (found.preference.similarity, found.seed) == ("token_f1", 4)
    assert configuration("paper", file, [], 9).seed == 9
    assert json_digest(configuration("paper", None, None).to_dict())


def test_import_split_and_align_refuse_what_leaks(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    with (data_folder / "records.jsonl").open("a") as file:
        file.write('{"id": "x"}\n')
    code, _, err = hscr("import", data_folder, "-o", tmp_path / "in")
    assert code == 0, err
    assert "records.jsonl 9 left out: image: the row names none" in err
    assert "table: 9 rows, 8 records, 8 images, 1 rejected" in err
    code, _, err = hscr("split", tmp_path / "in", "-o", tmp_path / "parts", "--shares", "train=.5,test=.5")
    assert code == 0, err
    assert "8 records name no group" in err
    where = ["align", tmp_path / "parts" / "train", "-m", tiny_folder, *FAST[:-2]]
    code, _, err = hscr(*where, "--eval", tmp_path / "in", "-o", tmp_path / "leaky")
    assert code == 2
    assert "evaluation records have a picture that is also in the data to align on" in err
    assert not (tmp_path / "leaky" / "preferences.jsonl").exists()
    code, _, err = hscr(*where, "--eval", tmp_path / "parts" / "test", "-o", tmp_path / "clean")
    assert code == 0, err
    ask = ["evaluate", "-m", tiny_folder, "--adapter", tmp_path / "clean" / "adapter", *FAST[:-2]]
    code, _, err = hscr(*ask, tmp_path / "parts" / "train", "-o", tmp_path / "e1")
    assert code == 2
    assert "aligned on this very data set" in err
    ask += ["--trained-on", tmp_path / "parts" / "train"]
    code, _, err = hscr(*ask, tmp_path / "in", "-o", tmp_path / "e2")
    assert code == 2
    assert hscr(*ask, tmp_path / "in", "-o", tmp_path / "e2", "--allow-leak")[0] == 0


def test_an_imported_preference_set_is_aligned_on_without_generating(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """Our own export in TRL's columns comes back in: its levels are the run's, and the stage is skipped."""
    made = data_folder / "p.jsonl"
    assert hscr("generate", data_folder, "-m", tiny_folder, "-o", tmp_path / "g.jsonl", *FAST)[0] == 0
    assert hscr("export", tmp_path / "g.jsonl", "-o", made)[0] == 0
    assert hscr("import", data_folder, "--format", "trl", "-o", tmp_path / "in")[0] == 0
    code, out, _ = hscr("align", tmp_path / "in", "-m", tiny_folder, "-o", tmp_path / "run", *FAST, "--events", "json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [e["status"] for e in events if e["type"] == "stage" and e["stage"] == "generating"] == ["skipped"]
    assert [e["code"] for e in events if e["type"] == "warning"][:1] == ["given_levels"]

    def levels(path: Path) -> list[list[str]]:
        return [texts for p in read_preferences(path) if (texts := [level.text for level in p.levels])]

    assert levels(tmp_path / "run" / "preferences.jsonl") == levels(tmp_path / "g.jsonl")
    text = (tmp_path / "in" / "preferences.jsonl").read_text()
    (tmp_path / "in" / "preferences.jsonl").write_text(text.replace("Where is", "Where was"))
    code, out, _ = hscr("align", tmp_path / "in", "-m", tiny_folder, "-o", tmp_path / "run2", *FAST, "--events", "json")
    assert code == 2
    assert "lines that fit no record (line 1: record: is none of the data set's" in out


def test_our_own_export_is_aligned_on_with_its_levels_alone_or_beside_the_records(
    hscr: Any, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    assert hscr("generate", data_folder, "-m", tiny_folder, "-o", tmp_path / "g.jsonl", *FAST)[0] == 0
    made = list(read_preferences(tmp_path / "g.jsonl"))
    assert any(p.levels for p in made)
    for name in ("preferences.jsonl", "pairs.jsonl"):
        out = tmp_path / name.removesuffix(".jsonl")
        file = data_folder / name
        assert hscr("export", tmp_path / "g.jsonl", "--format", "hscr", "-o", file)[0] == 0
        file.write_text(file.read_text().rstrip("\n"))  # an editor's last line is no torn one
        data = file if name == "pairs.jsonl" else data_folder
        code, text, _ = hscr("align", data, "-m", tiny_folder, "-o", out, *FAST, "--events", "json")
        assert code == 0, text
        assert '"given_levels"' in text
        assert list(read_preferences(out / "preferences.jsonl")) == made
        file.unlink()
    assert hscr("export", tmp_path / "g.jsonl", "--format", "hscr", "-o", data_folder / "pairs.jsonl")[0] == 0
    where = ["split", data_folder / "pairs.jsonl", "-o", tmp_path / "parts", "--shares", "a=.5,b=.5"]
    assert hscr(*where)[0] == 0
    kept = [p for part in "ab" for p in read_preferences(tmp_path / "parts" / part / "preferences.jsonl")]
    assert sorted(kept, key=lambda p: p.record.id) == made
