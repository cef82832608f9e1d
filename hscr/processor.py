"""A model's processor, images and text only: the stock classes, without the video half that would need torchvision.

Qwen's, InternVL's and SmolVLM's processors insist on a video processor, which needs torchvision to be loaded at all
(docs/decisions/0015). Text and images go through the stock class's own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

from hscr.families import Family


@cache
def images_only(name: str) -> Any:
    """The transformers processor class `name` with two parts, image processor and tokenizer; its third argument may be None."""
    stock: Any = getattr(transformers, name)
    own = {
        "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"]),
        "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM's own asks its video processor for defaults
        "__module__": stock.__module__,
    }
    return type(name, (stock,), own)


def load_processor(family: Family, source: str, revision: str | None, text_model: str) -> Any:
    """Load the processor of a model name or folder and see that it has a chat template.

    A conversion without one gets the family's documented form for its `text_model` (model_type). Raises ValueError where there is none
    or a package is missing, OSError from the hub.
    """
    try:
        if family.processor is None:
            processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        else:
            stock = images_only(family.processor)
            options, _ = stock.get_processor_dict(source, revision=revision)
            images = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            processor = stock.from_args_and_dict([images, tokenizer, None], options)
    except ImportError as error:  # SmolVLM's wants num2words
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {source!r}: a package is missing ({reason})") from error
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template or family.templates.get(text_model)
    if processor.chat_template is None:
        raise ValueError(
            f"model {source!r}: its processor has no chat template, and hscr/families.py has none for {family.name} on {text_model}; "
            "add a chat_template.jinja to the model's folder (an instruction-tuned version of the model brings one)"
        )
    return processor
