"""What the benchmarks run on: a random LLaVA of a given shape with a word-a-token tokenizer, noise images, and answers of given lengths.

Speed does not depend on what weights say. The default shape is the design notes' prototype: 576 visual tokens, 4 decoder layers.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
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

from hscr.records import Level, PreferenceRecord, VQARecord, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:"
    "{% else %} {{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYLLABLES = ("ba", "co", "di", "fu", "ga", "le", "mi", "no", "pa", "re", "sa", "tu")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES[:3]]
QUESTION = "What does this picture show in the upper left, and how large is it?"


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA: `patches` a side, decoder layers and widths, tower layers and width. 0: follows from the others."""

    patches: int = 24
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    tower_layers: int = 6
    tower_hidden: int = 192
    kv_heads: int = 0
    inner: int = 0
    vocabulary: int = 0


SHAPE_7B = Shape(
    layers=32, hidden=4096, heads=32, tower_layers=24, tower_hidden=1024, kv_heads=8, inner=14336, vocabulary=32064
)


def processor_of(shape: Shape) -> LlavaProcessor:
    """A processor with a tokenizer of a token a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + word for word in WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = shape.patches * 14
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def random_llava(shape: Shape, processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """A model with random weights, in torch's default dtype and on its default device."""
    torch.manual_seed(seed)
    vocabulary = processor.tokenizer.get_vocab()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_hidden,
            intermediate_size=4 * shape.tower_hidden,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=max(shape.tower_hidden // 64, 1),
            image_size=shape.patches * 14,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary or len(vocabulary),
            hidden_size=shape.hidden,
            intermediate_size=shape.inner or shape.hidden * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            initializer_range=0.1 if shape.hidden < 1024 else 0.02,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def save_llava(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """A Hugging Face folder with random float32 weights."""
    processor = processor_of(shape)
    processor.save_pretrained(folder)
    random_llava(shape, processor, seed).save_pretrained(folder)
    return folder


def save_data(folder: Path, n: int, tokens: int, levels: int, seed: int = 0) -> list[PreferenceRecord]:
    """n records with answers of `tokens` tokens (end of sequence included) and as long levels, a fifth of their words changed a level more.

    Writes records.jsonl, preferences.jsonl and 400 × 400 images, each its own.
    """
    stream = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(n):
        noise = np.random.default_rng([seed, i]).integers(0, 255, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{i}.png", compress_level=1)
        words = stream.choices(WORDS, k=tokens - 1)
        record = VQARecord(str(i), f"images/{i}.png", QUESTION, " ".join(words))
        wrong = list(words)
        graded = []
        for level in range(levels):
            for at in stream.sample(range(len(words)), max(len(words) // 5, 1)):
                wrong[at] = stream.choice(WORDS)
            graded.append(Level(" ".join(wrong), round(0.9 - 0.1 * level, 2)))
        made.append(PreferenceRecord(record, tuple(graded), (), {}))
    write_jsonl(folder / "records.jsonl", [p.record for p in made])
    write_jsonl(folder / "preferences.jsonl", made)
    return made


def machine() -> str:
    """One line for the head of a table."""
    import os
    import platform

    import peft
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{where}, {platform.machine()}, Python {platform.python_version()}, {versions}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report(name: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print a table of rows with equal keys, and write them as JSON where `out` is given."""
    text = table(list(rows[0]), [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    print(f"\n{name}\n{machine()}\n\n{text}\n", flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"name": name, "machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
