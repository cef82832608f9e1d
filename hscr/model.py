"""Load a vision-language model with its processor, say what differs between families, and turn questions into prompts.

Everything that depends on a family (where image features come from, which modules carry LoRA) is a field of `Family`; a new family
is one entry of FAMILIES. Remote code is never run; weights are read from safetensors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hscr.artifacts import bytes_digest, file_digest, json_digest
from hscr.config import OptimizationConfig
from hscr.visual_tokens import FeatureCache, Prompt


@dataclass(frozen=True)
class Family:
    """What differs between architectures. `language_model_linear`: regular expression of the language model's linear layers."""

    name: str
    language_model_linear: str


# model_type of config.json -> family. The modules of the vision tower share names with the decoder's, hence full paths.
FAMILIES = {
    "llava": Family("llava", r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"),
}


@dataclass
class VLM:
    """A loaded model (wrapped by peft once it carries an adapter), its processor, and where it came from."""

    model: Any
    processor: Any
    family: Family
    device: torch.device
    name: str
    digest: str
    features: FeatureCache = field(default_factory=FeatureCache)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def base(self) -> Any:
        """The Hugging Face model below a peft wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def image_token_id(self) -> int:
        return self.base.config.image_token_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer; the first of `eos_id` is what a reference answer is closed with."""
        ids = self.base.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids)

    @property
    def eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return eos if eos is not None else min(self.eos_ids)


def load_model(name: str | Path, *, dtype: str = "auto", device: str = "auto", revision: str | None = None) -> VLM:
    """Load a Hugging Face name or a local folder, frozen and in eval mode.

    dtype `auto`: bfloat16 on CUDA, float32 elsewhere. Raises ValueError for an unknown name, folder, architecture or dtype.
    """
    try:
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device: no such device {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} is not available here")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    if dtype not in kinds:
        raise ValueError(f"dtype: must be auto or one of {', '.join(kinds)}")
    family = _family(name, revision)
    source = str(name)
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=kinds[dtype], trust_remote_code=False, use_safetensors=True
        )
    except OSError as error:
        raise ValueError(f"model {source!r}: {str(error).splitlines()[0]}") from error
    model.requires_grad_(False)
    torch.nn.Module.to(model, where).eval()
    digest = folder_digest(Path(name)) if Path(name).is_dir() else f"hub:{getattr(model.config, '_commit_hash', None)}"
    return VLM(model, processor, family, where, source, digest)


def _family(name: str | Path, revision: str | None) -> Family:
    """Read config.json alone, so that an unknown architecture is refused before gigabytes are read."""
    from transformers.utils import cached_file

    try:
        path = cached_file(str(name), "config.json", revision=revision)
    except OSError as error:
        raise ValueError(
            f"model {str(name)!r}: no such folder or Hugging Face name at hand ({str(error).splitlines()[0]})"
        ) from error
    if path is None:  # a folder without the file, where transformers raises nothing
        raise ValueError(f"model {str(name)!r}: no config.json there")
    model_type = json.loads(Path(str(path)).read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model {str(name)!r}: architecture {model_type!r} is not supported yet; supported: {', '.join(FAMILIES)}. "
            "To add it, describe it as a Family in hscr/model.py (FAMILIES)."
        )
    return FAMILIES[model_type]


def folder_digest(folder: Path) -> str:
    """Identity of a local model folder: the digest of its files' digests, documentation left out."""
    skip = {".md", ".txt"}
    files = sorted(p for p in folder.iterdir() if p.is_file() and (p.suffix not in skip or p.name == "merges.txt"))
    return json_digest({p.name: file_digest(p) for p in files})


def add_lora(vlm: VLM, config: OptimizationConfig, seed: int) -> None:
    """Wrap the model with a fresh, trainable LoRA on the language model only; its weights are float32 whatever the base's dtype.

    The adapter off (`disable_adapter`) is the reference policy π_sft. Raises ValueError where no module matches `lora_targets`.
    """
    torch.manual_seed(seed)  # peft draws A from the global stream
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,  # dropout would make the policy differ from the reference at step 0
        target_modules=config.lora_targets or vlm.family.language_model_linear,
        task_type="CAUSAL_LM",
    )
    vlm.model = get_peft_model(vlm.model, lora)
    if any(p.requires_grad and makes_features(n) for n, p in vlm.model.named_parameters()):
        vlm.model = vlm.model.unload()
        raise ValueError(
            "lora_targets: matches the vision tower or its projector, whose features must stay those of the base"
        )


def makes_features(name: str) -> bool:
    """A weight of this name changes the visual features, which are cached and shared by the base and all adapters."""
    return "vision_tower" in name or "multi_modal_projector" in name


def _plain(vlm: VLM, text: str) -> str:
    """Text that spells a special token is broken up and so stays text: an "<image>" in a question adds no image."""
    # The image token by its id: an older tokenizer has it as an added token that is in no list of special ones.
    for token in dict.fromkeys(
        [*vlm.tokenizer.all_special_tokens, vlm.tokenizer.convert_ids_to_tokens(vlm.image_token_id)]
    ):
        text = text.replace(token, token[0] + " " + token[1:])
    return text


def _chat(vlm: VLM, question: str, answer: str | None = None) -> str:
    """The family's chat template with one image; both texts have been through `_plain`."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return vlm.processor.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)


@torch.no_grad()
def encode_prompts(vlm: VLM, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Prompt]:
    """One prompt a (image, question), the tower run once per distinct image (features stay in `vlm.features`)."""
    keys = [bytes_digest(f"{i.mode}{i.size}".encode() + i.tobytes()) for i in images]
    prompts: list[Prompt] = []
    missing: dict[str, torch.Tensor] = {}
    known: dict[str, torch.Tensor] = {}  # held here: a `put` below may evict what this very batch needs
    for key, image, question in zip(keys, images, questions, strict=True):
        batch = vlm.processor(images=[image], text=_chat(vlm, _plain(vlm, question)), return_tensors="pt")
        ids = batch["input_ids"][0]
        if key in vlm.features:
            known[key] = vlm.features[key]
        elif key not in missing:
            missing[key] = batch["pixel_values"]
        prompts.append(Prompt(ids, torch.arange(len(ids)), None, key, vlm.image_token_id))
    if missing:
        pixels = torch.cat(list(missing.values())).to(vlm.device, vlm.base.dtype)
        # Chunked: a tower's activations for hundreds of images at once are the largest tensors of a run. On a CPU one at a time, for
        # features depend on their batch mates in the last bits, and a resumed run meets its images in other batches.
        size = 1 if vlm.device.type == "cpu" else 16
        for start in range(0, len(pixels), size):
            out = vlm.base.get_image_features(pixel_values=pixels[start : start + size], return_dict=True)
            for key, features in zip(list(missing)[start : start + size], out.pooler_output, strict=True):
                known[key] = features
                vlm.features.put(key, features)
    return [p.with_features(known[p.image]) for p in prompts]


def encode_answer(vlm: VLM, question: str, answer: str) -> list[int]:
    """Token ids [A] of an answer as they follow the prompt, closed by end-of-sequence.

    Tokenised jointly with the prompt, because many tokenisers split the first word differently at the start of a text.
    """
    question, answer = _plain(vlm, question), _plain(vlm, answer)
    prompt, whole = _chat(vlm, question), _chat(vlm, question, answer)
    end = whole.find(answer, len(prompt)) + len(answer)
    if whole.startswith(prompt) and end >= len(prompt) + len(answer):
        before = vlm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        both = vlm.tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before:
            return [*both[len(before) :], vlm.eos_id]
    return [*vlm.tokenizer(answer, add_special_tokens=False)["input_ids"], vlm.eos_id]


def decode_text(vlm: VLM, ids: Sequence[int]) -> str:
    """The text of answer tokens, special tokens left out."""
    return vlm.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def set_threads() -> None:
    """One torch thread unless OMP_NUM_THREADS says otherwise: on small busy machines two were 7–26 times slower, and one is repeatable."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1" if not torch.cuda.is_available() else "4")))
