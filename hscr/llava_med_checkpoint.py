"""Read a checkpoint of the LLaVA fork and its CLIP tower without reading weights: config.json, the index and the headers of the shards.

Everything that can be wrong with a download is found here and named: pointers of git-lfs, half files, an index of another version, pickles,
a configuration that the target class does not compute. Knows nothing of the target (hscr/import_llava_med.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CLIPVisionConfig
from transformers.utils import cached_file

INDEX = "model.safetensors.index.json"
TOWER_PREFIX = "model.vision_tower.vision_tower."
# The dtypes that are taken, in safetensors' words and in torch's.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Towers that fork checkpoints name without carrying their configuration (the published config.json of each).
VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
VIT_L |= {"patch_size": 14, "projection_dim": 768}
TOWERS = {
    "openai/clip-vit-large-patch14-336": VIT_L | {"image_size": 336},
    "openai/clip-vit-large-patch14": VIT_L | {"image_size": 224},
}
# Fields of the fork's config.json that change what the model computes: values with a counterpart in the target, the fork's default first.
COUNTERPARTS: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("square", None, "pad"),
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, by its header."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' word: BF16, F16, F32
    shard: Path

    @property
    def n_bytes(self) -> int:
        n = {"F64": 8, "F32": 4}.get(self.dtype, 2)
        for size in self.shape:
            n *= size
        return n


def read_settings(source: Path) -> dict[str, Any]:
    """The fork's config.json with its `vocab_size`, refused where a field says something that the target class does not compute."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give the folder that the checkpoint was downloaded to")
    try:
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{source}: no config.json there; give the folder that holds it and the weights") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{source / 'config.json'}: cannot be read ({error}); download it again") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind == "llava":
        raise ValueError(f"{source}: is a Hugging Face LLaVA already (model_type 'llava'); give it to --model as it is")
    if kind != "llava_mistral":
        raise ValueError(
            f"{source}: config.json says model_type {kind!r}; only 'llava_mistral' (LLaVA-Med v1.5) is imported"
        )
    rows = settings.setdefault("vocab_size", 32000)  # MistralConfig's own, which the fork does not write
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"{source}: config.json: vocab_size is {json.dumps(rows)}, must be a number above 0")
    for name, known in COUNTERPARTS.items():
        value = settings.get(name, known[0])
        if value not in known or (name == "mm_projector_type" and value != "mlp2x_gelu"):
            raise ValueError(
                f"{source}: config.json says {name} = {json.dumps(value)}, which LlavaForConditionalGeneration does not compute; "
                "this command imports the layout of microsoft/llava-med-v1.5-mistral-7b"
            )
    return settings


def tower_file(tower: str, name: str) -> Path | None:
    """A file of a tower that is a folder, or a Hugging Face name at hand; None where there is none."""
    try:
        path = cached_file(tower, name)
    except OSError:
        return None
    return Path(str(path)) if path else None


def tower_config(tower: str) -> Any:
    """The CLIPVisionConfig of a tower: a folder, a Hugging Face name at hand, or one that is known here."""
    if tower in TOWERS:
        return CLIPVisionConfig(**TOWERS[tower])
    path = tower_file(tower, "config.json")
    if path is None:
        raise ValueError(f"vision tower {tower!r}: no config.json at hand; give the folder of a CLIP as --vision-tower")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"vision tower {tower!r}: is a {settings.get('model_type')!r}; give a CLIP as --vision-tower")
    return CLIPVisionConfig(**settings.get("vision_config", settings))


def _header(shard: Path) -> dict[str, Stored]:
    try:
        with safe_open(shard, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {n: Stored(n, tuple(s.get_shape()), s.get_dtype(), shard) for n, s in parts.items()}
    except FileNotFoundError:
        raise ValueError(f"{shard}: not there, but the index names it; download the missing file") from None
    except (SafetensorError, OSError) as error:
        size = shard.stat().st_size
        raise ValueError(
            f"{shard}: not a whole safetensors file ({size} bytes: {error}); download it again (`git lfs pull` where it is a pointer)"
        ) from error


def read_checkpoint(source: Path) -> dict[str, Stored]:
    """All tensors of the source by name, from the files' own headers; the index must agree with them."""
    if not (source / INDEX).is_file():
        if (source / "model.safetensors").is_file():
            return _header(source / "model.safetensors")
        pickles = [p.name for p in sorted(source.glob("pytorch_model*.bin"))]
        raise ValueError(
            f"{source}: no {INDEX} and no model.safetensors there"
            + (f"; {pickles[0]} is a pickle, which is not opened: save it as safetensors first" if pickles else "")
        )
    try:
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(name) for name in index.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source / INDEX}: is no index of weights ({error}); download it again") from error
    if any(Path(name).name != name for name in shards):
        raise ValueError(f"{source / INDEX}: names files outside its folder; download the checkpoint again")
    stored: dict[str, Stored] = {}
    for name in shards:
        for key, tensor in _header(source / name).items():
            if index.get(key) != name:
                raise ValueError(
                    f"{source / name}: holds {key}, which {INDEX} does not place there; download both again"
                )
            stored[key] = tensor
    refuse(source, f"named by {INDEX} but not in its file", sorted(index.keys() - stored.keys()))
    return stored


def tower_weights(tower: str | None, source: Path) -> dict[str, Stored]:
    """The tower's tensors under the fork's names; of a whole CLIP only the vision half."""
    weights = tower_file(tower, "model.safetensors") if tower else None
    if weights is None:
        where = (
            f"vision tower {tower!r}: has no model.safetensors at hand"
            if tower
            else f"{source}: carries no vision tower"
        )
        raise ValueError(
            f"{where}; give a folder with config.json and model.safetensors of the CLIP tower as --vision-tower"
        )
    found = {n: s for n, s in _header(weights).items() if n.startswith("vision_model.")}
    return {TOWER_PREFIX + name: tensor for name, tensor in found.items()}


def refuse(source: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"{source}: {len(names)} tensor(s) {what}: {'; '.join(names[:5])}{more}; compare with "
            "microsoft/llava-med-v1.5-mistral-7b, download again or name the right --vision-tower"
        )
