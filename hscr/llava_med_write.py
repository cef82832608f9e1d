"""Write a planned import of a LLaVA-Med checkpoint (hscr/import_llava_med.py) as a folder that appears whole or not at all.

Tensor by tensor: memory holds one output shard and one tensor. What was done with each stands in import-report.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from hscr.artifacts import write_json
from hscr.import_llava_med import ROWS_MULTIPLE, Move, Plan
from hscr.llava_med_checkpoint import INDEX, TOWERS, Stored
from hscr.llava_med_text import check_prompt_ids
from hscr.run_dir import RunDir

REPORT = "import-report.json"
SHARD_BYTES = 1_000_000_000


def write_import(plan: Plan, out: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[Move]:
    """Write the planned folder, yielding each tensor once it is read; `out` appears when the iterator is exhausted, never before.

    Memory: at most `shard_bytes` of output, or one tensor where that is larger, and one tensor besides.
    Raises ValueError where `out` exists or cannot be written.
    """
    size = sum(m.n_bytes for m in plan.moves)
    with _appearing(out, size) as folder:
        plan.config.save_pretrained(folder)
        ids = {k: getattr(plan.config.text_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        plan.processor.save_pretrained(folder)
        check_prompt_ids(plan.source, folder)
        shards = _shards(plan.moves, shard_bytes)
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        for name, moves in zip(names, shards, strict=True):
            tensors = {}  # lets go of the last shard's before the next is gathered
            for move in moves:
                tensors[move.target] = _tensor(move)
                yield move
            save_file(tensors, folder / name, metadata={"format": "pt"})
        where = {m.target: n for n, moves in zip(names, shards, strict=True) for m in moves}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        write_json(folder / REPORT, report(plan, where))


def report(plan: Plan, where: dict[str, str]) -> dict[str, Any]:
    """What was done with every tensor. No absolute paths, no time: the same import gives the same bytes, by which a folder is known."""
    rows = plan.config.text_config.vocab_size
    return {
        "source": plan.source.resolve().name,
        "vision_tower": plan.tower if plan.tower in TOWERS else Path(plan.tower).name,
        "image_token_id": plan.config.image_token_id,
        "rows": {
            "tokens": len(plan.processor.tokenizer),
            "target": rows,
            "new rows": "mean of the checkpoint's rows",
            "multiple of": ROWS_MULTIPLE,
        },
        "tensors": [
            _row(m.stored) | {"target": m.target, "target_shape": m.shape, "file": where[m.target]} for m in plan.moves
        ],
        "unused": [_row(stored) | {"reason": reason} for stored, reason in plan.unused],
        "config_left": plan.config_left,
    }


def _row(stored: Stored) -> dict[str, Any]:
    return {k: v.name if isinstance(v, Path) else v for k, v in asdict(stored).items()}


def _shards(moves: tuple[Move, ...], limit: int) -> list[list[Move]]:
    """Consecutive moves of at most `limit` bytes together; a larger tensor stands alone."""
    shards: list[list[Move]] = [[]]
    for move in moves:
        if shards[-1] and sum(m.n_bytes for m in shards[-1]) + move.n_bytes > limit:
            shards.append([])
        shards[-1].append(move)
    return shards


def _tensor(move: Move) -> torch.Tensor:
    """The tensor as the target holds it: bytes unchanged, and new rows (no text has them) the mean of the old ones, so that they stand out
    neither as input nor as output."""
    try:
        with safe_open(move.stored.shard, "pt") as file:
            tensor = file.get_tensor(move.stored.name)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{move.stored.shard}: cannot be read any more ({error}); leave the source as it is"
        ) from error
    if tuple(tensor.shape) == move.shape:
        return tensor.contiguous()
    grown = torch.empty(move.shape, dtype=tensor.dtype)
    grown[: len(tensor)] = tensor
    total = torch.zeros(move.shape[1:], dtype=torch.float64)
    for rows in tensor.split(1024):  # a float64 copy of the whole would be four times the tensor
        total += rows.to(torch.float64).sum(0)
    grown[len(tensor) :] = (total / len(tensor)).to(tensor.dtype)
    return grown


@contextmanager
def _appearing(out: Path, n_bytes: int) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` at the end; what a killed import left there is cleared by the next one."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; name another folder with --out, or move it away")
    work = out.absolute().parent / f".{out.name}.importing"
    try:
        with RunDir(work).locked():
            try:
                for left in work.iterdir():
                    if left.name != ".lock":
                        left.unlink()
                free = shutil.disk_usage(work).free
                if free < n_bytes * 1.01:
                    need = f"needs {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
                    raise ValueError(f"{out}: {need}; make room or choose another --out")
                yield work
                for path in work.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                work.rename(out)
                (out / ".lock").unlink()  # after the renaming: without its lock the folder would be anyone's to clear
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out}: cannot be written ({error}); nothing is left there, choose another --out") from error
