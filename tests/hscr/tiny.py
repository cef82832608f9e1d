"""A tiny random LLaVA with a real processor, and a small data set: with tiny_families.py the only fake of these tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "There is a large bright lesion in the left frontal lobe.",
    "A small dark lesion lies in the right temporal region.",
    "Which plane is shown? This is an axial slice. The coronal and sagittal planes.",
    "Is there a lesion? yes no USER: ASSISTANT: where what size side occipital parietal",
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def tiny_tokenizer(special: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens, `special` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def save_tiny_llava(folder: Path, seed: int = 0) -> Path:
    """28 px image, 7 px patches: 16 visual tokens. Weights are spread out so that greedy answers differ between images."""
    fast = tiny_tokenizer(
        ["<pad>", "<s>", "</s>", "<image>"],
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            vocab_size=len(fast),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.25,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # a random tower's features are nearly the same everywhere; spread them
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(30)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def save_records(folder: Path, n: int = 8, first: int = 0) -> Path:
    """A data set of n records, every fourth closed; `first` is the number of the first picture."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        picture(first + i).save(folder / "images" / f"{i}.png")
        side, region = ("left", "right")[i % 2], ("frontal", "temporal")[i // 2 % 2]
        row = {"id": f"r{i}", "image": f"images/{i}.png"}
        if i % 4 == 3:
            row |= {
                "question": "Is there a lesion?",
                "answer": "yes",
                "answer_type": "closed",
                "options": ["yes", "no"],
            }
        else:
            row |= {
                "question": "Where is the lesion?",
                "answer": f"There is a large bright lesion in the {side} {region} lobe.",
                "grounded": [
                    {"word": side, "among": ["left", "right"]},
                    {"word": region, "among": ["frontal", "temporal"]},
                ],
            }
        rows.append(row)
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
