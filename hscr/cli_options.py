"""What the commands share: their options, the configuration that options make, and how a model and an adapter are loaded.

Heavy imports stand inside the functions, so that `hscr --help` answers at once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from hscr.config import PRESETS, AlignConfig, preset

if TYPE_CHECKING:
    from hscr.model import VLM

DEMO_MODEL = Path(__file__).parent / "demo" / "model"

console = Console(stderr=True)


def tell(text: str, path: Path) -> None:
    """One line "text: path" on stderr: never wrapped, and brackets in a path are no markup."""
    console.print(f"{escape(text)}: [bold]{escape(str(path))}[/]", soft_wrap=True)


Data = Annotated[
    Path, typer.Argument(help="Data set: a folder with records.jsonl and its images, or the .jsonl itself.")
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Hugging Face name or local folder.", show_default="the demo model")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hugging Face name; pin it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DType = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16, float16.")]
Quantize = Annotated[
    str | None, typer.Option(help="4bit: the language model in NF4 (CUDA; pip install 'hscr\\[quantized]').")
]
Preset = Annotated[str, typer.Option("--preset", help=f"Start from: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="JSON file laid over the preset.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="One field, e.g. -s optimization.lr=1e-4. Repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random streams.")]
AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Evaluate although pictures are in the data to align on too.")
]
Events = Annotated[str, typer.Option(help="progress: bars on stderr. json: typed events as JSON lines on stdout.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Run directory; the same command resumes an interrupted run there.")
]


def configuration(base: str, file: Path | None, sets: Iterable[str] | None, seed: int | None = None) -> AlignConfig:
    """Preset, then file, then single fields. ValueError names the field that is wrong."""
    config = preset(base)
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--config: no such file: {file.name}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config: {file.name} is not JSON: {error}") from error
        config = AlignConfig.from_dict(values, config)
    for item in sets or ():
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write field=value")
        try:
            value: Any = json.loads(text)
        except ValueError:
            value = text
        for key in reversed(name.split(".")):
            value = {key: value}
        config = AlignConfig.from_dict(value, config)
    return config if seed is None else AlignConfig.from_dict({"seed": seed}, config)


def leak_setting(allow: bool) -> list[str]:
    """--allow-leak as a --set: the flag only ever loosens what the configuration says."""
    return ["evaluation.allow_leak=true"] if allow else []


def quiet() -> None:
    """No bars of weights, no warning that only concerns the libraries."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    # peft asks transformers by an old name; nothing that a user could do about it.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def load(model: str, dtype: str, device: str, revision: str | None, quantize: str | None) -> VLM:
    """The model, with the command's features on disk."""
    from hscr.feature_cache import features_folder
    from hscr.model import load_model, set_threads

    quiet()
    set_threads()
    return load_model(
        model, dtype=dtype, device=device, revision=revision, quantize=quantize, feature_cache=features_folder()
    )


def adapter_folder(path: Path | None, option: str = "--adapter") -> Path | None:
    """The PEFT folder of an option, which may also be a run directory. ValueError before a model is loaded for nothing."""
    for folder in () if path is None else (path, path / "adapter"):
        if (folder / "adapter_model.safetensors").is_file():
            return folder
    if path is not None:
        raise ValueError(f"{option}: no adapter_model.safetensors in {path}; give the adapter folder of a run")
    return None
