"""A tiny random model with its real processor for every family, made from configuration classes; the templates copy the real ones.

`stock_row` is the oracle of their tests: the stock forward on one whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMVisionConfig,
)

from hscr.inputs import image_inputs
from hscr.model import VLM
from hscr.processor import images_only
from hscr.visual_tokens import Prompt
from tests.hscr.tiny import save_tiny_llava, tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
IMAGE_OR_TEXT = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)


def chat_ml(image: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        + IMAGE_OR_TEXT.replace("IMAGE", image)
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ prefix if loop.first else '' }}"
    + IMAGE_OR_TEXT.replace("IMAGE", "<start_of_image>").replace("c['text'] ", "c['text'] | trim ")
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% if m['content'][0]['type'] == 'text' %} {% endif %}"
    + IMAGE_OR_TEXT.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def llava_next() -> tuple[Any, Any]:
    """On Mistral and without a chat template, as older conversions are."""
    tokens = tiny_tokenizer(["<pad>", "<s>", "</s>", "<image>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    pinpoints = [[28, 56], [56, 28]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(vocab_size=len(tokens), sliding_window=None, **TEXT),
        image_token_index=3,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = LlavaNextProcessor(
        images, tokens, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor


def gemma3() -> tuple[Any, Any]:
    """A window of 24 tokens, shorter than a prompt; turns end with a token that is not the tokenizer's eos_token."""
    special = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
    tokens = tiny_tokenizer(
        [*special, "<image_soft_token>"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    text = Gemma3TextConfig(
        vocab_size=len(tokens),
        **{**TEXT, "num_hidden_layers": 3},
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
        tie_word_embeddings=False,
    )
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return config, Gemma3Processor(images, tokens, chat_template=GEMMA, image_seq_length=16)


def _qwen_tokens() -> Any:
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    return tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision], pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def _qwen(config: type, processor: str, vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    """4 px patches merged two by two, about 32 × 32 pixels: some 16 to 24 visual tokens."""
    tokens = _qwen_tokens()
    made = config(
        text_config={**TEXT, "vocab_size": len(tokens), "rope_parameters": MROPE, **text},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 48,
            **vision,
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=6,
        video_token_id=7,
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 2048}, patch_size=4, temporal_patch_size=2, merge_size=2
    )
    template = chat_ml("<|vision_start|><|image_pad|><|vision_end|>")
    return made, images_only(processor)(images, tokens, None, chat_template=template)


def qwen2_5_vl() -> tuple[Any, Any]:
    return _qwen(Qwen2_5_VLConfig, "Qwen2_5_VLProcessor", {"window_size": 16, "fullatt_block_indexes": [1]}, {})


def qwen3_vl() -> tuple[Any, Any]:
    """Two deepstack layers."""
    vision = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _qwen(Qwen3VLConfig, "Qwen3VLProcessor", vision, {"num_hidden_layers": 3, "head_dim": 12})


def _idefics_tokens() -> Any:
    rows = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    return tiny_tokenizer(
        [*special, *rows], pad_token="<pad>", bos_token="<|im_start|>", eos_token="<end_of_utterance>"
    )


def idefics3() -> tuple[Any, Any]:
    """Four tiles and the whole image, four tokens each."""
    tokens = _idefics_tokens()
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    config = Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(tokens), **TEXT),
        vision_config=Idefics3VisionConfig(**TOWER),
        image_token_id=3,
        scale_factor=2,
    )
    return config, Idefics3Processor(images, tokens, image_seq_len=4, chat_template=IDEFICS)


def smolvlm() -> tuple[Any, Any]:
    tokens = _idefics_tokens()
    images = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    config = SmolVLMConfig(
        text_config=LlamaConfig(vocab_size=len(tokens), **TEXT),
        vision_config=SmolVLMVisionConfig(**TOWER),
        image_token_id=3,
        scale_factor=2,
    )
    return config, images_only("SmolVLMProcessor")(images, tokens, None, image_seq_len=4, chat_template=IDEFICS)


def internvl() -> tuple[Any, Any]:
    """Up to four tiles and the whole image, four tokens each."""
    tokens = tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = InternVLConfig(
        text_config=Qwen2Config(vocab_size=len(tokens), **TEXT),
        vision_config=InternVLVisionConfig(**{**TOWER, "image_size": (28, 28), "patch_size": (7, 7)}),
        image_token_id=3,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=4)
    processor = images_only("InternVLProcessor")(
        images, tokens, None, image_seq_length=4, chat_template=chat_ml("<IMG_CONTEXT>\n")
    )
    return config, processor


MADE: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f for f in (llava_next, gemma3, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl)
}
NAMES = ("llava", *MADE)


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Save the tiny model of a family. Features are spread out so that greedy answers differ between images."""
    if name == "llava":
        return save_tiny_llava(folder, seed)
    config, processor = MADE[name]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("mm_input_projection_weight"):  # zeros in a new Gemma 3
                parameter.normal_()
            elif any(part in key for part in ("multi_modal_projector", "merger", "connector")) and parameter.ndim > 1:
                parameter.mul_(30)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = [2, 4] if name == "gemma3" else 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stock_row(vlm: VLM, prompt: Prompt, answer: list[int], kept: Tensor | None = None, **changes: Any) -> Tensor:
    """Logits [A, V] of an answer by the stock forward: one whole row, the family's own masks, `kept` [N] as holes in a 2-D mask."""
    n = len(prompt.input_ids)
    first = int(prompt.position_ids.max()) + 1  # the oracle's own count: a prompt ends with text
    ids = torch.cat([prompt.input_ids, torch.tensor(answer)])[None]
    after = (first + torch.arange(len(answer))).expand(*prompt.position_ids.shape[:-1], -1)
    mask = torch.ones_like(ids)
    if kept is not None:
        mask[0, :n][prompt.input_ids == vlm.image_token_id] = kept.long()
    inputs = {
        "input_ids": ids,
        "position_ids": torch.cat([prompt.position_ids, after], -1)[..., None, :],
        "attention_mask": mask,
        **image_inputs(vlm, [prompt]),
        **({"token_type_ids": (ids == vlm.image_token_id).long()} if vlm.family.name == "gemma3" else {}),
        **changes,
    }
    with torch.no_grad():
        return vlm.model(**inputs).logits[0, n - 1 : -1]
