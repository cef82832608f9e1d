"""Convert a checkpoint of the LLaVA fork's class (`microsoft/llava-med-v1.5-mistral-7b`) to a `LlavaForConditionalGeneration` folder.

`plan_import` reads headers only and checks every tensor by name and shape against the target model built on the meta device;
hscr/llava_med_write.py does what was planned. Safetensors only, as everywhere here: the released checkpoint has them, and a pickle is not
opened. docs/import-llava-med.md has the table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from hscr.llava_med_checkpoint import (
    COUNTERPARTS,
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
from hscr.llava_med_text import make_processor

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
    # Nothing is fetched that was not asked for.
    if vision_tower is None and tower not in TOWERS and not Path(tower).is_dir():
        raise ValueError(
            f"{source}: names the vision tower {tower!r}, whose shape is not known here (known: {', '.join(TOWERS)}); "
            "give the tower's folder as --vision-tower"
        )
    vision = tower_config(tower)
    pixels = None if tower in TOWERS else tower_file(tower, "preprocessor_config.json")
    processor = make_processor(source, vision, settings, pixels)
    config, expected = _target(source, settings, vision, processor)
    stored = read_checkpoint(source)
    if not any(name.startswith(TOWER_PREFIX) for name in stored):
        stored |= tower_weights(vision_tower, source)
    moves, unused = _moves(stored, expected, settings["vocab_size"], source)
    config.dtype = TORCH_NAMES[Counter(m.stored.dtype for m in moves).most_common(1)[0][0]]
    left = {k: v for k, v in settings.items() if k not in TEXT_FIELDS | READ_FIELDS | COUNTERPARTS.keys()}
    return Plan(source, config, processor, moves, unused, tower, left)


def _target(
    source: Path, settings: dict[str, Any], vision: Any, processor: Any
) -> tuple[LlavaConfig, dict[str, tuple[int, ...]]]:
    """The target's configuration, and its tensors' shapes by their published names; ValueError where config.json describes no model."""
    layer, n_layers = settings.get("mm_vision_select_layer", -2), vision.num_hidden_layers
    if not isinstance(layer, int) or not -n_layers - 1 <= layer <= n_layers:
        raise ValueError(f"{source}: mm_vision_select_layer is {layer!r}, the vision tower has {n_layers} layers")
    try:
        config = _config(settings, vision, processor)
        with torch.device("meta"):
            state = LlavaForConditionalGeneration(config).state_dict()
    except Exception as error:  # whatever a class of transformers makes of a field that is no number
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{source / 'config.json'}: describes no LLaVA-Med ({reason}); download it again") from error
    return config, {_published(name): tuple(tensor.shape) for name, tensor in state.items()}


def _config(settings: dict[str, Any], vision: Any, processor: Any) -> LlavaConfig:
    """The target's configuration; the embeddings have a row for every token of the processor, in multiples of 64."""
    text = MistralConfig(**{k: v for k, v in settings.items() if k in TEXT_FIELDS})
    text.pad_token_id = processor.tokenizer.pad_token_id
    rows = max(settings["vocab_size"], len(processor.tokenizer))
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
    stored: dict[str, Stored], expected: dict[str, tuple[int, ...]], vocab_size: int, source: Path
) -> tuple[tuple[Move, ...], tuple[tuple[Stored, str], ...]]:
    """Every tensor's place in the target, or the reason it has none; ValueError where one is unknown, missing or of another shape."""
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
