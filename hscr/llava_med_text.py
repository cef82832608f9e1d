"""The processor of an imported LLaVA-Med: prompt, tokens and pixels as the LLaVA fork made them.

The fork tokenises the text before and after `<image>` as separate texts and puts features between them; a Hugging Face processor has
`<image>` as a token. Both give the same ids only where the tokenizer begins each piece with "▁", which transformers 5 forgets of a saved
LlamaTokenizer (`legacy` is not stored): so the tokenizer is stored by its own file, and `check_prompt_ids` compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
# conv_templates["mistral_instruct"] of microsoft/LLaVA-Med (llava/conversation.py), with the image first as llava/eval/model_vqa.py puts it.
# No <s>: the tokenizer adds it.
_PARTS = "{% for part in message['content'] if part['type'] == "
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    + _PARTS + "'image' %}{{ '<image>\n' }}{% endfor %}"
    + _PARTS + "'text' %}{{ part['text'] | trim }}{% endfor %}"
    "{% endif %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + _PARTS + "'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ ' </s>' }}"
    "{% else %}{{ raise_exception('LLaVA-Med v1.5 knows user and assistant turns only') }}{% endif %}"
    "{% endfor %}"
)  # fmt: skip


def make_processor(
    source: Path, vision: CLIPVisionConfig, settings: dict[str, Any], preprocessor: Path | None
) -> LlavaProcessor:
    """The processor for the checkpoint in `source`, whose config.json is `settings`. preprocessor: the tower's preprocessor_config.json;
    without one CLIP's own means are used. Raises ValueError where the tokenizer cannot be read."""
    side = vision.image_size
    means = json.loads(preprocessor.read_text(encoding="utf-8")) if preprocessor is not None else {}
    images = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=settings.get("image_aspect_ratio") == "pad",  # to a square of the mean colour, before resizing
        **{k: means[k] for k in ("image_mean", "image_std", "resample") if k in means},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=_with_image_token(_tokenizer(source)),
        patch_size=vision.patch_size,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[
            settings.get("mm_vision_select_feature", "patch")
        ],
        num_additional_image_tokens=1,  # CLIP's class token
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{source}: its tokenizer cannot be read ({str(error).strip().splitlines()[0]}); tokenizer.json and tokenizer_config.json must be "
            "there, or tokenizer.model and the packages sentencepiece and protobuf"
        ) from error


def _with_image_token(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with `<image>`, and `<pad>` where it has no padding token, every piece of text beginning with "▁"."""
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "always"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",  # answers are generated to the right of a batch's prompts
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": AddedToken(IMAGE, special=True, normalized=False)},
    )
    if fast.pad_token is None:
        fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


def fork_ids(tokenizer: Any, prompt: str, image: int) -> list[int]:
    """Ids [T] of a prompt as `tokenizer_image_token` of the fork (llava/mm_utils.py) makes them, with `image` where `<image>` stood."""
    pieces = [tokenizer(piece)["input_ids"] for piece in prompt.split(IMAGE)]
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [image, *piece[int(piece[:1] == [tokenizer.bos_token_id]) :]]
    return ids


def check_prompt_ids(source: Path, saved: Path) -> None:
    """ValueError where the processor in `saved` reads the model's own prompt otherwise than the fork with the tokenizer in `source`."""
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=False)
    question = {"type": "text", "text": "Is there a 2 cm lesion in the left lung?\nAnswer with one word."}
    messages = [{"role": "user", "content": [{"type": "image"}, question]}]
    prompt = processor.apply_chat_template(messages, tokenize=False)
    ours = processor.tokenizer(prompt)["input_ids"]
    theirs = fork_ids(_tokenizer(source), prompt, processor.tokenizer.convert_tokens_to_ids(IMAGE))
    if ours != theirs:
        raise ValueError(
            f"{source}: its tokenizer reads a prompt as {theirs}, the converted one as {ours}; use the tokenizer files of "
            "microsoft/llava-med-v1.5-mistral-7b"
        )
