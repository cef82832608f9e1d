"""Convert a checkpoint of the LLaVA fork's class (`microsoft/llava-med-v1.5-mistral-7b`) to a `LlavaForConditionalGeneration` folder.

`plan_import` reads headers only and checks every tensor by name and shape against the target model built on the meta device; `write_import`
copies tensor by tensor, so that memory holds one output shard and one tensor, and the folder appears whole or not at all.
Safetensors only, as everywhere here: the released checkpoint has them, and a pickle is not opened. docs/import-llava-med.md has the table.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from hscr.artifacts import write_json
from hscr.llava_med_checkpoint import (
    COUNTERPARTS,
    INDEX,
    TORCH_NAMES,
    TOWER_PREFIX,
    TOWERS,
    Stored,
    read_checkpoint,
    read_settings,
    refuse,
    tower_config,
    tower_file,
    tower_weights,
)
from hscr.llava_med_text import check_prompt_ids, make_processor
from hscr.run_dir import RunDir

REPORT = "import-report.json"
SHARD_BYTES = 1_000_000_000
ROWS_MULTIPLE = 64  # as Hugging Face's own LLaVA conversions: matrix products like it
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
# Fork name -> name in published LLaVA folders, which transformers 4 and 5 and other engines read. First match wins.
RENAMES = (
    (TOWER_PREFIX, "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Tensors without a place in the target, and why nothing is lost.
UNUSED = {
    "rotary_emb.inv_freq": "computed from rope_theta",
    "embeddings.position_ids": "computed, a plain 0, 1, 2, …",
    "model.image_newline": "read only by mm_patch_merge_type other than flat",
}
# The decoder's own fields; the other fields that are read; whatever else is in config.json concerns training and goes into the report.
READ_FIELDS = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
TEXT_FIELDS = {*MistralConfig().to_dict(), "rope_theta", "rope_scaling"} - READ_FIELDS
READ_FIELDS |= {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size"}  # the last one by the projector's shape


@dataclass(frozen=True)
class Move:
    """One tensor of the target: where it comes from and what it becomes; `shape` is the target's."""

    stored: Stored
    target: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes in the target; only rows are ever added."""
        return self.stored.n_bytes // self.stored.shape[0] * self.shape[0]


@dataclass(frozen=True)
class Plan:
    """A checked import: all moves in the order of the source's files, what is left out and why, and the target's configuration."""

    source: Path
    config: Any
    processor: Any
    moves: tuple[Move, ...]
    unused: tuple[tuple[Stored, str], ...]
    tower: str
    config_left: dict[str, Any]


def plan_import(source: Path, vision_tower: str | None = None) -> Plan:
    """Check the checkpoint in `source` and say what becomes what; no weight is read, nothing is written.

    vision_tower: folder or Hugging Face name of the CLIP tower: needed where the checkpoint does not carry the tower, or names one whose
    configuration is not known here. Raises ValueError that says what is wrong, where, and what to do.
    """
    settings = read_settings(source)
    tower = vision_tower or str(settings.get("mm_vision_tower", ""))
    if (
        vision_tower is None and tower not in TOWERS and not Path(tower).is_dir()
    ):  # nothing is fetched that was not asked for
        raise ValueError(
            f"{source}: names the vision tower {tower!r}, whose shape is not known here (known: {', '.join(TOWERS)}); "
            "give the tower's folder as --vision-tower"
        )
    vision = tower_config(tower)
    pixels = None if tower in TOWERS else tower_file(tower, "preprocessor_config.json")
    processor = make_processor(source, vision, settings, pixels)
    config = _config(settings, vision, processor)
    stored = read_checkpoint(source)
    if not any(name.startswith(TOWER_PREFIX) for name in stored):
        stored |= tower_weights(vision_tower, source)
    moves, unused = _moves(stored, config, int(settings.get("vocab_size", 32000)), source)
    config.dtype = TORCH_NAMES[Counter(m.stored.dtype for m in moves).most_common(1)[0][0]]
    left = {k: v for k, v in settings.items() if k not in TEXT_FIELDS | READ_FIELDS | COUNTERPARTS.keys()}
    return Plan(source, config, processor, moves, unused, tower, left)


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
            tensors = {}
            for move in moves:
                tensors[move.target] = _tensor(move)
                yield move
            save_file(tensors, folder / name, metadata={"format": "pt"})
            del tensors  # before the next shard is gathered, not after
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


def _config(settings: dict[str, Any], vision: Any, processor: Any) -> LlavaConfig:
    """The target's configuration; the embeddings have a row for every token of the processor, in multiples of 64."""
    known = {*MistralConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "model_type",
        "architectures",
        "transformers_version",
    }
    text = MistralConfig(**{k: v for k, v in settings.items() if k in known})
    text.pad_token_id = processor.tokenizer.pad_token_id
    rows = max(int(settings.get("vocab_size", 32000)), len(processor.tokenizer))
    text.vocab_size = -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def _published(state: str) -> str:
    """A name of the model's state dict as published LLaVA folders spell it."""
    if state.startswith("model.vision_tower."):
        return "vision_tower.vision_model." + state.removeprefix("model.vision_tower.").removeprefix("vision_model.")
    if state.startswith("model.language_model."):
        return "language_model.model." + state.removeprefix("model.language_model.")
    return "language_model." + state if state.startswith("lm_head.") else state.removeprefix("model.")


def _moves(
    stored: dict[str, Stored], config: LlavaConfig, vocab_size: int, source: Path
) -> tuple[tuple[Move, ...], tuple[tuple[Stored, str], ...]]:
    """Every tensor's place in the target, or the reason it has none; ValueError where one is unknown, missing or of another shape."""
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    expected = {_published(name): tuple(tensor.shape) for name, tensor in state.items()}
    moves, unused, unknown, wrong = [], [], [], []
    for name, tensor in stored.items():
        reason = next((why for end, why in UNUSED.items() if name.endswith(end)), None)
        target = next((new + name.removeprefix(old) for old, new in RENAMES if name.startswith(old)), name)
        if reason is not None:
            unused.append((tensor, reason))
        elif target not in expected or tensor.dtype not in TORCH_NAMES:
            unknown.append(name if target not in expected else f"{name} (dtype {tensor.dtype})")
        else:
            shape = expected[target]
            wanted = (vocab_size, *shape[1:]) if target in EMBEDDINGS else shape
            if tensor.shape != wanted:
                wrong.append(f"{name} is {list(tensor.shape)}, config.json asks for {list(wanted)}")
            moves.append(Move(tensor, target, shape))
    refuse(source, "without a place in the target model", unknown)
    refuse(source, "of another shape", wrong)
    refuse(source, "missing", sorted(expected.keys() - {m.target for m in moves}))
    return tuple(moves), tuple(unused)


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
