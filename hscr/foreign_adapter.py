"""A PEFT folder from somebody else, checked before anything loads it, and written anew with nothing in it but what was checked.

Sizes, types and shapes come from the safetensors header, which is read by hand: no unpickling, no library's idea of a file. The
configuration is reduced to a plain LoRA on exactly the modules that the weights name; whatever else it asks for is refused, or left out
where it changes no answer. No torch here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hscr.artifacts import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".h5"})
HEADER_MAX_BYTES, CONFIG_MAX_BYTES, RANK_MAX, MODULES_MAX = 8 * 2**20, 2**20, 1024, 20_000
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # all ones: infinite or not a number
_NAME = re.compile(r"^base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})\.lora_([AB])\.weight$")
# Fields of PEFT's LoRA configuration that change no answer of a finished adapter.
_HARMLESS = frozenset(
    "base_model_name_or_path revision inference_mode task_type peft_version lora_dropout layers_pattern layers_to_transform "
    "exclude_modules megatron_core qalora_group_size ensure_weight_tying runtime_config peft_type r lora_alpha target_modules "
    "use_rslora bias init_lora_weights auto_mapping".split()
)


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header; `begin` and `end` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class ForeignAdapter:
    """A folder that passed: rank, scale, and the modules that it changes."""

    folder: Path
    rank: int
    alpha: int
    rslora: bool
    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    data_start: int


def check(folder: Path, linear: Callable[[], dict[str, tuple[int, int]]]) -> ForeignAdapter:
    """Check a folder against the modules that may be changed, {name: (out, in)}. ValueError says what is wrong.

    `linear` is asked for them last, for they may cost a process.
    """
    if any(path.suffix.lower() in PICKLES for path in folder.rglob("*")):
        raise ValueError("it carries pickled weights, which are never read; send adapter_model.safetensors")
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise ValueError(f"it has no {name}; send the folder that PEFT's save_pretrained writes")
    rank, alpha, rslora = _checked_config(folder / CONFIG)
    start, tensors = read_header(folder / WEIGHTS)
    modules = _checked_shapes(tensors, rank, linear())
    _check_numbers(folder / WEIGHTS, start, tensors)
    return ForeignAdapter(folder, rank, alpha, rslora, tensors, modules, start)


def write_plain(adapter: ForeignAdapter, out: Path, base: str) -> None:
    """Write the adapter anew into the new folder `out`: its numbers as they are; header, configuration and model card ours."""
    out.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.modules),
    }
    write_json(out / CONFIG, config)
    (out / "README.md").write_text(_card(adapter, base), encoding="utf-8")
    entries = {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.begin, t.end]}
        for name, t in sorted(adapter.tensors.items(), key=lambda item: item[1].begin)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with (adapter.folder / WEIGHTS).open("rb") as source, (out / WEIGHTS).open("wb") as target:
        target.write(len(header).to_bytes(8, "little") + header)
        source.seek(adapter.data_start)
        shutil.copyfileobj(source, target, 2**20)


def _card(adapter: ForeignAdapter, base: str) -> str:
    """The model card. It says what was checked and nothing of what was sent: equal weights have one digest."""
    return f"""---
library_name: peft
base_model: {base}
tags: [lora]
---
# Uploaded adapter
LoRA of rank {adapter.rank} (α {adapter.alpha}{", scaled by √r" if adapter.rslora else ""}) on {len(adapter.modules)} linear layers of the
language model of `{base}`. It was trained elsewhere and uploaded to HSCR, which checked its shapes against that base and its numbers to be
finite, and kept nothing else. What it was trained on is not known here.

Not a medical device; not for diagnosis.
"""


def read_header(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Where the data begin, and the tensors by name. ValueError where the header is not one of a whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_MAX_BYTES, size - 8):
            raise ValueError(
                f"{WEIGHTS}: is no safetensors file, is cut off, or has a header above {HEADER_MAX_BYTES} bytes"
            )
        raw = file.read(length)
    try:
        rows = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise ValueError(f"{WEIGHTS}: its header is no JSON object with each name once") from None
    if not isinstance(rows, dict):
        raise ValueError(f"{WEIGHTS}: its header is no JSON object")
    rows.pop("__metadata__", None)
    tensors = {name: _tensor(row) for name, row in rows.items()}
    at = 0
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != at or tensor.end - tensor.begin != math.prod(tensor.shape) * _BYTES[tensor.dtype]:
            raise ValueError(f"{WEIGHTS}: its tensors overlap, leave holes, or have other sizes than their shapes")
        at = tensor.end
    if 8 + length + at != size:
        raise ValueError(f"{WEIGHTS}: it is shorter or longer than its header says")
    return 8 + length, tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(row: Any) -> Tensor:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{WEIGHTS}: an entry of its header is no tensor")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{WEIGHTS}: its numbers must be {', '.join(_BYTES)}")
    for numbers, n in ((shape, 2), (offsets, 2)):
        if not (
            isinstance(numbers, list) and len(numbers) == n and all(type(i) is int and 0 <= i < 2**48 for i in numbers)
        ):
            raise ValueError(f"{WEIGHTS}: a shape or place in its header is none of a matrix")
    return Tensor(dtype, tuple(shape), *offsets)


def _checked_config(path: Path) -> tuple[int, int, bool]:
    """Rank, α and whether it is scaled by √r. ValueError names the field."""
    if path.stat().st_size > CONFIG_MAX_BYTES:
        raise ValueError(f"{CONFIG}: is larger than {CONFIG_MAX_BYTES} bytes")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{CONFIG}: is no JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG}: peft_type must be LORA")
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= RANK_MAX:
        raise ValueError(f"{CONFIG}: r must be a whole number from 1 to {RANK_MAX}")
    if (
        not isinstance(alpha, (int, float))
        or isinstance(alpha, bool)
        or not (1 <= alpha <= 65536 and alpha == int(alpha))
    ):
        raise ValueError(f"{CONFIG}: lora_alpha must be a whole number from 1 to 65536")
    if type(rslora) is not bool:
        raise ValueError(f"{CONFIG}: use_rslora must be true or false")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{CONFIG}: bias must be none")
    if config.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        raise ValueError(f"{CONFIG}: init_lora_weights other than true, false and gaussian changes the base's weights")
    asked = sorted(
        name for name, value in config.items() if name not in _HARMLESS and value not in (None, False, "", [], {})
    )
    if asked:
        name = asked[0] if re.fullmatch(r"[a-z0-9_]{1,60}", asked[0]) else "a field"
        raise ValueError(f"{CONFIG}: {name} asks for more than a plain LoRA, which is all that is served here")
    return rank, int(alpha), rslora


def _checked_shapes(tensors: dict[str, Tensor], rank: int, linear: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None:
            raise ValueError(
                f"{WEIGHTS}: a tensor is named otherwise than base_model.model.<module>.lora_A.weight (or lora_B)"
            )
        parts.setdefault(match[1], {})[match[2]] = tensor
    if not 0 < len(parts) <= MODULES_MAX:
        raise ValueError(f"{WEIGHTS}: it changes no module, or more than {MODULES_MAX}")
    for module, pair in parts.items():
        if module not in linear:
            raise ValueError(
                f"{WEIGHTS}: it changes a module that is no linear layer of the served base's language model"
            )
        n_out, n_in = linear[module]
        if pair.keys() != {"A", "B"} or pair["A"].shape != (rank, n_in) or pair["B"].shape != (n_out, rank):
            raise ValueError(f"{WEIGHTS}: its shapes are not those of rank {rank} on the served base model's layers")
    return tuple(sorted(parts))


def _check_numbers(path: Path, start: int, tensors: dict[str, Tensor]) -> None:
    """ValueError where a number is infinite or none: one would poison every answer."""
    for tensor in tensors.values():
        words = np.memmap(
            path, dtype=f"<u{_BYTES[tensor.dtype]}", mode="r", offset=start + tensor.begin, shape=tensor.shape
        )
        exponent = _EXPONENT[tensor.dtype]
        if bool(((words & exponent) == exponent).any()):
            raise ValueError(f"{WEIGHTS}: it holds numbers that are infinite or no numbers")
