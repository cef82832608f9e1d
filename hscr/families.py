"""What differs between vision-language architectures: one frozen description a family, a small function where a family has its own way.

A new family is one entry of FAMILIES (docs/families.md says how to add and test one). Nothing here loads a model; `model` below is
always the Hugging Face class, `config` its configuration. Axis letters as in hscr/__init__.py, K keys of a row, Q its last queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures


def plain_positions(model: Any, ids: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Position ids [T] of a prompt's tokens [T]: counted through."""
    return torch.arange(len(ids))


def mrope_positions(model: Any, ids: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """M-RoPE position ids [3, T] (time, height, width): text counts through, an image of h × w tokens takes max(h, w) positions."""
    visual = (ids == model.config.image_token_id).int()[None]
    positions, _ = model.model.get_rope_index(ids[None], visual, image_grid_thw=batch["image_grid_thw"])
    return positions[:, 0]


def pooled(out: Any, n_images: int) -> list[Tensor]:
    """Features [N, D] of each image, from what the tower gave for images of equal shape: a list an image, or one tensor of tiles."""
    features = out.pooler_output
    if isinstance(features, Tensor):
        features = features.reshape(n_images, -1, features.shape[-1])
    return list(features)


def pooled_with_deepstack(out: Any, n_images: int) -> list[Tensor]:
    """Features [N, (1 + L)·D]: what enters the first layer, then what is added after each of the first L, so one index drops them all."""
    layers = [pooled(out, n_images), *out.deepstack_features]
    return [torch.cat([layer[i] for layer in layers], dim=-1) for i in range(n_images)]


def handed_as_list(features: Sequence[Tensor], config: Any) -> Any:
    """Precomputed features as `mm_encoder_outputs["image"]` of a class that concatenates a list, whatever the field's annotation says."""
    return BaseModelOutputWithPooling(pooler_output=list(features))  # type: ignore[arg-type]


def handed_as_tensor(features: Sequence[Tensor], config: Any) -> Any:
    """The same for a class that wants one tensor; [N, D] over all images serves, for it is scattered flat."""
    return BaseModelOutputWithPooling(pooler_output=torch.cat(list(features)))


def handed_with_deepstack(features: Sequence[Tensor], config: Any) -> Any:
    """The inverse of `pooled_with_deepstack`."""
    width = config.get_text_config().hidden_size
    first, *deeper = [list(layer) for layer in zip(*[f.split(width, dim=-1) for f in features], strict=True)]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=deeper)  # type: ignore[arg-type]


def gemma3_masks(seen: Tensor, visual: Tensor, positions: Tensor, config: Any) -> dict[str, Tensor]:
    """Gemma 3's two masks [B, 1, Q, K]: tokens of one image see each other both ways, and local layers see a window only.

    seen [B, 1, Q, K] is the causal mask, visual [B, K] marks image tokens. The window is measured in positions, not in columns, so that
    dropped tokens and packed answers leave it where it was.
    """
    q = seen.shape[2]
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    block = torch.where(visual, starts.cumsum(1), 0)  # 0: text
    same = (block[:, -q:, None] == block[:, None, :]) & visual[:, None, :]
    near = positions[:, -q:, None] - positions[:, None, :] < config.get_text_config().sliding_window
    full = seen | same[:, None]
    return {"full_attention": full, "sliding_attention": full & near[:, None]}


@dataclass(frozen=True)
class Family:
    """One architecture. Adding one: docs/families.md.

    language_model: the decoder's module. feature_modules: modules whose weights make the visual features (no LoRA there). vision_tokens:
    tokens that stand for images, never said and never taken from a user's text; those a tokenizer lacks are ignored. several_images:
    whether a prompt may hold more than one. processor: the class to load without its video half (None: AutoProcessor's choice).
    templates: chat template by the text model's model_type, for conversions whose processor brings none.
    """

    name: str
    language_model: str
    feature_modules: tuple[str, ...]
    vision_tokens: tuple[str, ...]
    several_images: bool = True
    processor: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    positions: Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor] = plain_positions
    features_of: Callable[[Any, int], list[Tensor]] = pooled
    hand_over: Callable[[Sequence[Tensor], Any], Any] = handed_as_list
    masks: Callable[[Tensor, Tensor, Tensor, Any], dict[str, Tensor]] | None = None

    @property
    def language_model_linear(self) -> str:
        """Regular expression of the decoder's linear layers. Full paths, for a vision tower's layers have the same last names."""
        return rf"(.*\.)?{self.language_model}\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    @property
    def full_precision(self) -> list[str]:
        """Patterns of what 4-bit loading leaves alone, as transformers matches them: from the start of a full name, so not bare names."""
        return [rf"(.*\.)?{part}" for part in (*self.feature_modules, "lm_head")]


def _template(start: str, before: str, after: str) -> str:
    """A chat template: `start`, then each question with its images between `before` and `after`, each answer closed by end-of-sequence."""
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{before}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        f"{after}{{% else %}} {{{{ m['content'][0]['text'] }}}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


# The documented prompt forms of LLaVA conversions that bring no chat template.
VICUNA = _template("", "USER: ", " ASSISTANT:")
VICUNA_SYSTEM = _template(
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. ",
    "USER: ",
    " ASSISTANT:",
)
LLAVA_MED = _template("", "[INST] ", " [/INST]")  # LLaVA-Med 1.5 and LLaVA-NeXT on Mistral

_LLAVA_PARTS = ("vision_tower", "multi_modal_projector")
_QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
_IDEFICS_TOKENS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<video>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)

# model_type of config.json -> family.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava",
            "language_model",
            _LLAVA_PARTS,
            ("<image>",),
            several_images=False,  # trained on one image a prompt
            templates={"llama": VICUNA, "mistral": LLAVA_MED},
        ),
        Family(
            "llava_next",
            "language_model",
            (*_LLAVA_PARTS, "image_newline"),
            ("<image>",),
            templates={"llama": VICUNA_SYSTEM, "mistral": LLAVA_MED},
        ),
        Family(
            "gemma3",
            "language_model",
            _LLAVA_PARTS,
            ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
            hand_over=handed_as_tensor,
            masks=gemma3_masks,
        ),
        Family(
            "qwen2_5_vl",
            "language_model",
            ("visual",),
            _QWEN_TOKENS,
            processor="Qwen2_5_VLProcessor",
            positions=mrope_positions,
        ),
        Family(
            "qwen3_vl",
            "language_model",
            ("visual",),
            _QWEN_TOKENS,
            processor="Qwen3VLProcessor",
            positions=mrope_positions,
            features_of=pooled_with_deepstack,
            hand_over=handed_with_deepstack,
        ),
        Family("idefics3", "text_model", ("vision_model", "connector"), _IDEFICS_TOKENS),
        Family("smolvlm", "text_model", ("vision_model", "connector"), _IDEFICS_TOKENS, processor="SmolVLMProcessor"),
        Family(
            "internvl",
            "language_model",
            _LLAVA_PARTS,
            ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
            processor="InternVLProcessor",
            hand_over=handed_as_tensor,
        ),
    )
}
_FEATURE_MODULES = frozenset(part for family in FAMILIES.values() for part in family.feature_modules)


def family_of(model_type: str | None, model: str) -> Family:
    """The family of config.json's model_type; ValueError names what is missing and where to add it."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model {model!r}: architecture {model_type!r} is not supported yet; supported: {', '.join(FAMILIES)}. "
            "To add it, describe it as a Family in hscr/families.py (FAMILIES); docs/families.md says how."
        )
    return FAMILIES[model_type]


def makes_features(name: str) -> bool:
    """A weight of this name changes the visual features, which are cached and shared by the base and all adapters: in any family."""
    return not _FEATURE_MODULES.isdisjoint(name.split("."))
