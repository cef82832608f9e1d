"""The processor of an imported LLaVA-Med: prompt, tokens and pixels as the LLaVA fork made them.

The fork tokenises the text before and after `<image>` as separate texts and puts features between them; a Hugging Face processor has
`<image>` as a token. Both give the same ids only where the tokenizer begins each piece with "▁", which transformers 5 forgets of a saved
LlamaTokenizer (`legacy` is not stored): so the tokenizer is stored by its own file, and `check_prompt_ids` compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE = "<image>"
# conv_templates["mistral_instruct"] of microsoft/LLaVA-Med (llava/conversation.py), the image first as in llava/eval/model_vqa.py.
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


def make_processor(source: Path, vision: Any, settings: dict[str, Any], preprocessor: Path | None) -> LlavaProcessor:
    """The processor for the checkpoint in `source`, whose config.json is `settings`; vision: the tower's configuration.

    preprocessor: the tower's preprocessor_config.json; without one CLIP's own means are used. Raises ValueError where the tokenizer
    cannot be read or has more tokens than the checkpoint has rows.
    """
    tokenizer, rows = _tokenizer(source), settings["vocab_size"]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, config.json {rows}; put the checkpoint's own tokenizer files there"
        )
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
        tokenizer=_with_image_token(tokenizer),
        patch_size=vision.patch_size,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[
            settings.get("mm_vision_select_feature", "patch")
        ],
        num_additional_image_tokens=1,  # CLIP's class token
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(source: Path) -> Any:
    """The checkpoint's own tokenizer, from tokenizer.json or, as Microsoft's release has it, from tokenizer.model alone."""
    try:
        if (source / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        vocabulary = _sentencepiece_vocabulary((source / "tokenizer.model").read_bytes())
        settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        marks = {k: settings.get(k) for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
        marks = {k: v["content"] if isinstance(v, dict) else v for k, v in marks.items()}
        # A sentencepiece BPE joins the pair whose whole has the lowest id; a split of a piece into two pieces is a merge of that rank.
        splits = [(p[:i], p[i:]) for p in vocabulary for i in range(1, len(p))]
        merges = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        length = settings.get("model_max_length", 2048)
        tokenizer = LlamaTokenizer(vocabulary, merges, legacy=True, model_max_length=length, **marks)
        tokenizer.add_bos_token = True  # type: ignore[misc]  # only from_pretrained takes it as an argument
        return tokenizer
    except Exception as error:  # the Rust half of tokenizers raises bare Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{source}: its tokenizer cannot be read ({reason}); tokenizer_config.json and tokenizer.json or tokenizer.model of "
            "microsoft/llava-med-v1.5-mistral-7b must be there, whole"
        ) from error


def _sentencepiece_vocabulary(model: bytes) -> dict[str, int]:
    """Piece -> id, in the order of a sentencepiece ModelProto (field 1, repeated: pieces; in each, field 1: its text).

    Read here because the packages sentencepiece and protobuf would be needed for nothing else.
    """
    if model.startswith(b"version https://git-lfs"):
        raise ValueError("tokenizer.model is a git-lfs pointer, run `git lfs pull`")
    pieces = [piece for number, piece in _fields(model) if number == 1]
    texts = [next(text for number, text in _fields(piece) if number == 1).decode() for piece in pieces]
    if len(texts) < 3 or len(set(texts)) != len(texts):
        raise ValueError("tokenizer.model is no sentencepiece model")
    return {text: i for i, text in enumerate(texts)}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and bytes of a protobuf message (numbers in varints come as empty bytes, nothing here asks for one)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            varint()
            size = 0
        else:
            size = {1: 8, 5: 4}[tag & 7] if tag & 7 != 2 else varint()
        if at + size > len(message):
            raise ValueError("tokenizer.model ends early")
        yield tag >> 3, message[at : at + size]
        at += size


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
    if ours != theirs or ours[:1] != [processor.tokenizer.bos_token_id]:
        raise ValueError(
            f"{source}: its tokenizer reads a prompt as {theirs}, the converted one as {ours}; use the tokenizer files of "
            "microsoft/llava-med-v1.5-mistral-7b"
        )
