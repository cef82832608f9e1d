"""Load a vision-language model with its processor, put LoRA on it, and turn questions into prompts.

What depends on the architecture is in hscr/families.py. Remote code is never run; weights are read from safetensors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hscr.artifacts import bytes_digest, file_digest, json_digest
from hscr.chat import Asked, Turn, plain, prompt_text, templated, turns_of
from hscr.config import OptimizationConfig
from hscr.families import Family, family_of, makes_features
from hscr.feature_cache import DiskFeatures, FeatureCache
from hscr.grouped_attention import group_heads
from hscr.image_text import ImageTexts, adds_special_tokens
from hscr.images import Images, as_images
from hscr.processor import load_processor
from hscr.tower import pass_over_unread_layers
from hscr.visual_tokens import Prompt


@dataclass
class VLM:
    """A loaded model (wrapped by peft once it carries an adapter), its processor, and where it came from."""

    model: Any
    processor: Any
    family: Family
    device: torch.device
    name: str
    digest: str
    on_top: bool = False  # its trainable adapter began as another one (hscr/parent.py)
    features: FeatureCache = field(default_factory=FeatureCache)
    tokens: FeatureCache = field(
        default_factory=lambda: FeatureCache(64 * 2**20)
    )  # ids and positions of prompts met before
    image_texts: ImageTexts = field(default_factory=ImageTexts)
    empty_cache: Any = None  # of keys and values, to be copied (hscr/prefix.py)
    static_steps: Any = None  # decode steps captured as CUDA graphs (hscr/static_steps.py); none but on CUDA

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def base(self) -> Any:
        """The Hugging Face model below a peft wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def decoder(self) -> Any:
        """The language model's layers, without its head."""
        return next(m for n, m in self.base.named_modules() if n.split(".")[-1] == self.family.language_model)

    @property
    def image_token_id(self) -> int:
        return self.base.config.image_token_id

    @cached_property
    def placeholder_ids(self) -> list[int]:
        """Tokens that stand for images (and what frames them): no answer holds one."""
        known, size = self.tokenizer.get_vocab(), self.base.config.get_text_config().vocab_size
        ids = {self.image_token_id, *(known[t] for t in self.family.vision_tokens if t in known)}
        return sorted(i for i in ids if i < size)  # an image token outside the vocabulary has no logit

    @cached_property
    def special_tokens(self) -> list[str]:
        """Every token that is no text: a user's text that spells one must stay text."""
        added = self.tokenizer.added_tokens_decoder
        # Turn markers are special added tokens without being in any list of the tokenizer's; older tokenizers have the image token as
        # an added token that is not special.
        return list(
            dict.fromkeys(
                [
                    *self.tokenizer.all_special_tokens,
                    *(token.content for token in added.values() if token.special),
                    *self.family.vision_tokens,
                    self.tokenizer.convert_ids_to_tokens(self.image_token_id),
                ]
            )
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ids = self.base.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids)

    @property
    def eos_id(self) -> int:
        """What closes a reference answer where the chat template closes it with none of `eos_ids`."""
        eos = self.tokenizer.eos_token_id
        return eos if eos is not None else min(self.eos_ids)


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    quantize: str | None = None,
    feature_cache: Path | None = None,
    feature_cache_bytes: int = 20 * 2**30,
) -> VLM:
    """Load a Hugging Face name or a local folder, frozen and in eval mode.

    dtype `auto`: bfloat16 on CUDA, float32 elsewhere. quantize `4bit`: the language model's linear layers as NF4 (QLoRA), CUDA only.
    feature_cache: a folder that keeps image features across runs, up to `feature_cache_bytes`.
    Raises ValueError for an unknown name, folder, architecture, dtype or quantisation, or where a package is missing.
    """
    where, kind = device_and_dtype(device, dtype)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # streams, graphs and synchronisation are the current device's
    source = str(name)
    config, commit = _config_json(source, revision)
    revision = commit or revision  # all of it from one commit, whatever a branch's name comes to mean meanwhile
    family = family_of(config.get("model_type"), source)
    options = {} if quantize is None else _quantized(quantize, where, kind, family)
    try:
        processor = load_processor(family, source, revision, config.get("text_config", {}).get("model_type", "llama"))
        model = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=kind, trust_remote_code=False, use_safetensors=True, **options
        )
    except OSError as error:
        raise ValueError(f"model {source!r}: {str(error).splitlines()[0]}") from error
    model.requires_grad_(False)
    if quantize is None:  # 4-bit weights are made on their device and stay there
        torch.nn.Module.to(model, where)
    model.eval()
    pass_over_unread_layers(model)
    group_heads(next(m for n, m in model.named_modules() if n.split(".")[-1] == family.language_model))
    local = Path(name).is_dir()
    if local:
        # Cards and reports leave the machine, so a folder is named without its path.
        source, digest = Path(name).resolve().name, folder_digest(Path(name))
    else:
        digest = f"hub:{source}@{commit}"
    digest = digest if quantize is None else f"{digest}+{quantize}"
    disk = None
    if feature_cache is not None and (local or commit):
        identity = [digest, str(kind).removeprefix("torch."), where.type, torch.__version__, transformers.__version__]
        disk = DiskFeatures(feature_cache, identity=identity, device=where, max_bytes=feature_cache_bytes)
    return VLM(model, processor, family, where, source, digest, features=FeatureCache(disk=disk))


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What `auto` and names stand for on this machine. Raises ValueError for an unknown or absent one."""
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
    return where, kinds[dtype]


def _config_json(source: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """Read config.json alone, so that an unknown architecture is refused before gigabytes are read; the commit that a name stands for."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        path = cached_file(source, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(
            f"model {source!r}: no such folder or Hugging Face name at hand ({str(error).splitlines()[0]})"
        ) from error
    if path is None:  # a folder without the file, where transformers raises nothing
        raise ValueError(f"model {source!r}: no config.json there")
    config: dict[str, Any] = json.loads(Path(str(path)).read_text())
    return config, None if Path(source).is_dir() else extract_commit_hash(str(path), None)


def _quantized(kind: str, where: torch.device, dtype: torch.dtype, family: Family) -> dict[str, Any]:
    """Options of from_pretrained that load the language model in 4 bits; what makes the features keeps its precision."""
    if kind != "4bit":
        raise ValueError(f"quantize: must be 4bit, not {kind!r}")
    if where.type != "cuda":
        raise ValueError(f"quantize: 4-bit weights need a CUDA device, and this is {where.type}; load without quantize")
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize: bitsandbytes is not installed; pip install 'hscr[quantized]'")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=family.full_precision,
    )
    return {"quantization_config": config, "device_map": {"": where}}


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


def checkpoint_gradients(vlm: VLM, on: bool) -> None:
    """Compute a layer's activations again in the backward pass instead of keeping them (Chen et al. 2016, arXiv 1604.06174).

    While it is on, layers take no key-value cache: scoring works, decoding does not.
    """
    for module in vlm.base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = on
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
            # Layers checkpoint in training mode only; the flag is set on the layer alone, so that no dropout inside it wakes up.
            module.training = on


def reference_policy(vlm: VLM) -> AbstractContextManager[None]:
    """The model as the reference, where no step has been taken yet: the adapter off, or on where the policy begins as a parent."""
    return nullcontext() if vlm.on_top else vlm.model.disable_adapter()


def processed(vlm: VLM, images: Sequence[Image.Image], asked: Asked) -> Any:
    """The processor's tensors of one prompt: input_ids [1, T] with a placeholder a visual token, pixel_values and their like."""
    chat = prompt_text(vlm, asked, len(images))
    return vlm.processor(
        images=list(images),
        text=chat,
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(vlm, chat),
        return_text_replacement_offsets=True,
    )


def require_images(vlm: VLM, n: int) -> None:
    """ValueError where the family takes no prompt with n images."""
    if n > 1 and not vlm.family.several_images:
        raise ValueError(
            f"images: a record has {n}, and {vlm.family.name} takes one a prompt; docs/families.md lists who takes several"
        )


@torch.no_grad()
def encode_prompts(vlm: VLM, images: Sequence[Images], questions: Sequence[Asked]) -> list[Prompt]:
    """One prompt a (image or images, question), the tower run once per distinct image (features stay in `vlm.features`).

    A question may be a conversation (hscr/chat.py) that ends with one; its images are given in order over the turns. Raises ValueError
    where the family takes one image a prompt and there are more, ConversationError where the chat template cannot say the conversation.
    """
    drafts: list[tuple[Prompt, list[str]]] = []
    missing: dict[str, dict[str, torch.Tensor]] = {}
    known: dict[str, torch.Tensor] = {}  # held here: a `put` below may evict what this very batch needs
    for item, question in zip(images, questions, strict=True):
        pictures = as_images(item)
        require_images(vlm, len(pictures))
        keys = [bytes_digest(f"{i.mode}{i.size}".encode() + i.tobytes()) for i in pictures]
        asked = "\n".join([str(len(keys)), *keys, _identity(turns_of(question, len(keys)))])
        for key in keys:
            if key not in known and (features := vlm.features.get(key)) is not None:
                known[key] = features
        met = vlm.tokens.get(asked)
        one_known = len(keys) == 1 and (keys[0] in known or keys[0] in missing)
        # Met before: the processor, which resizes every image, has nothing to add.
        if met is not None and (one_known or all(key in known for key in keys)):
            ids, positions = met[0], met[1:].squeeze(0)
        elif one_known and (written := vlm.image_texts.prompt(vlm, keys[0], question)):
            ids, positions = written
            vlm.tokens.put(asked, torch.cat([ids[None], positions.reshape(-1, len(ids))]))
        else:
            batch = processed(vlm, pictures, question)
            for key, picture in zip(keys, pictures, strict=True):
                if key not in known and key not in missing:
                    missing[key] = _pixels(batch if len(pictures) == 1 else processed(vlm, [picture], ""))
            if len(keys) == 1:
                vlm.image_texts.learn(keys[0], batch)
            ids = batch["input_ids"][0]
            positions = vlm.family.positions(vlm.base, ids, batch)
            vlm.tokens.put(asked, torch.cat([ids[None], positions.reshape(-1, len(ids))]))
        name = keys[0] if len(keys) == 1 else bytes_digest("".join(keys).encode())
        drafts.append((Prompt(ids, positions, None, name, vlm.image_token_id), keys))
    for key, features in _encoded(vlm, missing):
        known[key] = features
        vlm.features.put(key, features)
    return [_with_features(vlm, prompt, [known[key] for key in keys]) for prompt, keys in drafts]


def _identity(turns: tuple[Turn, ...]) -> str:
    """A conversation as a part of a key: one question is its own text, more turns are told apart in every role, text and image count."""
    if len(turns) == 1:
        return "question\n" + turns[0].text
    return "turns\n" + json.dumps([[t.role, t.n_images, t.text] for t in turns])


def _pixels(batch: Any) -> dict[str, torch.Tensor]:
    """What `get_image_features` takes of a processed prompt with one image."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    return {name: batch[name] for name in names if name in batch}


def _encoded(vlm: VLM, missing: dict[str, dict[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Run the tower over images by digest: features [N, D] each.

    Chunked: a tower's activations for hundreds of images at once are the largest tensors of a run. On a CPU one at a time, for features
    depend on their batch mates in the last bits, and a resumed run meets its images in other batches.
    """
    size = 1 if vlm.device.type == "cpu" else 16
    shapes: dict[tuple[torch.Size, ...], list[str]] = {}  # images of equal shape (tiles, patches) can share a batch
    for key, pixels in missing.items():
        shapes.setdefault(tuple(p.shape for p in pixels.values()), []).append(key)
    for keys in shapes.values():
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            inputs = {name: torch.cat([missing[key][name] for key in part]) for name in missing[part[0]]}
            inputs = {n: t.to(vlm.device, vlm.base.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
            out = vlm.base.get_image_features(**inputs, return_dict=True)
            yield from zip(part, vlm.family.features_of(out, len(part)), strict=True)


def _with_features(vlm: VLM, prompt: Prompt, features: list[torch.Tensor]) -> Prompt:
    whole = features[0] if len(features) == 1 else torch.cat(features)
    n = int((prompt.input_ids == vlm.image_token_id).sum())
    if n != len(whole):
        raise ValueError(
            f"model {vlm.name!r}: its processor writes {n} visual tokens where its tower gives {len(whole)}; "
            "the processor's patch size or image size does not fit the model's configuration"
        )
    return prompt.with_features(whole)


def encode_answer(vlm: VLM, question: str, answer: str) -> list[int]:
    """Token ids [A] of an answer as they follow the prompt, closed by the end-of-sequence that the chat template writes after it.

    Tokenised jointly with the prompt, because many tokenisers split the first word differently at the start of a text.
    """
    asked, answer = Turn("user", plain(vlm, question), 1), plain(vlm, answer)
    prompt, whole = templated(vlm, [asked]), templated(vlm, [asked, Turn("assistant", answer)])
    end = whole.find(answer, len(prompt)) + len(answer)
    if whole.startswith(prompt) and end >= len(prompt) + len(answer):
        before = vlm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        both = vlm.tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
        if both[: len(before)] == before:
            # An end of turn (Gemma's <end_of_turn>) is what the model learnt to say, and often not the tokenizer's eos_token.
            close = vlm.tokenizer(whole[end:], add_special_tokens=False)["input_ids"][:1]
            return [*both[len(before) :], close[0] if close and close[0] in vlm.eos_ids else vlm.eos_id]
    return [*vlm.tokenizer(answer, add_special_tokens=False)["input_ids"], vlm.eos_id]


def decode_text(vlm: VLM, ids: Sequence[int]) -> str:
    """The text of answer tokens, special tokens left out."""
    return vlm.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def set_threads() -> None:
    """One torch thread unless OMP_NUM_THREADS says otherwise: on small busy machines two were 7–26 times slower, and one is repeatable."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1" if not torch.cuda.is_available() else "4")))
