"""The import of the LLaVA fork's checkpoints: the fork's logits, tokens and pixels, nothing lost, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

from hscr.import_llava_med import plan_import
from hscr.llava_med_text import _sentencepiece_vocabulary, check_prompt_ids
from hscr.llava_med_write import REPORT, write_import
from hscr.model import encode_answer, encode_prompts, load_model
from tests.hscr.tiny import picture

SIDE, PATCH, HIDDEN, VISION = 28, 7, 48, 32
QUESTION = "Where is the lesion?"
ORACLE = {
    "[INST] ": [1, 276, 282, 366, 346],
    "\nWhere is the lesion? [/INST]": [1, 346, 13, 375, 324, 281, 266, 270, 362, 318, 282, 366],
    "Is there a 2 cm lesion?\nAnswer é ü 肺 no": [
        1,
        317,
        345,
        277,
        301,
        320,
        270,
        362,
        13,
        284,
        327,
        346,
        198,
        172,
        346,
        198,
        191,
        346,
        235,
        133,
        189,
        321,
    ],
}
TOWER = "model.vision_tower.vision_tower.vision_model."
VISION_CONFIG = CLIPVisionConfig(
    hidden_size=VISION, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
)  # fmt: skip


def save_tokenizer(folder: Path) -> int:
    """The files of a Mistral tokenizer in small: sentencepiece BPE with byte fallback, "▁" before every piece, padding by <unk>."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f"[INST] {QUESTION} [/INST] The lesion is in the left lobe. yes no"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks | kind))
    return tokenizer.get_vocab_size()


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two shards and their index."""
    names = list(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, keys in halves.items():
        save_file({k: tensors[k] for k in keys}, folder / shard, metadata={"format": "pt"})
    where = {k: shard for shard, keys in halves.items() for k in keys}
    size = sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where})
    )


def save_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as the fork's `LlavaMistralForCausalLM.save_pretrained` leaves it, and beside it the CLIP folder it names."""
    folder.mkdir(parents=True)
    vocabulary = save_tokenizer(folder)
    clip = folder.parent / "clip"
    text = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.25,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    fork = {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "mm_vision_tower": str(clip),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": VISION,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(text | fork))
    torch.manual_seed(0)
    tensors = dict(MistralForCausalLM(MistralConfig(**text)).state_dict())
    tower = CLIPVisionModel(VISION_CONFIG)
    tower.save_pretrained(clip)
    tensors |= {TOWER + k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    tensors |= {f"model.mm_projector.{k}": v for k, v in projector().state_dict().items()}
    tensors["model.image_newline"] = torch.randn(HIDDEN)
    tensors[TOWER + "embeddings.position_ids"] = torch.arange((SIDE // PATCH) ** 2 + 1)[None]
    save_shards(folder, {k: v.to(dtype).contiguous() if v.is_floating_point() else v for k, v in tensors.items()})
    return folder


def projector() -> torch.nn.Sequential:
    """`mlp2x_gelu` of llava/model/multimodal_projector/builder.py, spread out so that images differ."""
    made = torch.nn.Sequential(torch.nn.Linear(VISION, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(20)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in sorted(folder.glob("model*.safetensors")) for k, v in load_file(shard).items()}


@torch.no_grad()
def fork_logits(folder: Path, prompt: str, image: Image.Image) -> torch.Tensor:
    """The fork's forward, again from its description: pad to a square, CLIP's hidden_states[-2][:, 1:], two linear layers and a GELU,
    put in the place of id -200 (llava/model/llava_arch.py::prepare_inputs_labels_for_multimodal), then the Mistral decoder."""
    tensors, settings = weights(folder), json.loads((folder / "config.json").read_text())
    decoder = MistralForCausalLM(MistralConfig(**settings)).eval()
    decoder.load_state_dict(
        {k: v for k, v in tensors.items() if "vision" not in k and "mm_" not in k and "newline" not in k}
    )
    tower = CLIPVisionModel(VISION_CONFIG).eval()
    nested = next(iter(tower.state_dict())).startswith("vision_model.")
    tower.load_state_dict(
        {
            ("vision_model." if nested else "") + k.removeprefix(TOWER): v
            for k, v in tensors.items()
            if TOWER in k and "position_ids" not in k
        }
    )
    features = tower(fork_pixels(image), output_hidden_states=True).hidden_states[-2][:, 1:]
    mlp = torch.nn.Sequential(torch.nn.Linear(VISION, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    mlp.load_state_dict({k.removeprefix("model.mm_projector."): v for k, v in tensors.items() if "mm_projector" in k})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, after = (tokenizer(piece)["input_ids"] for piece in prompt.split("<image>"))
    ids = torch.tensor([*before, -200, *after[1:]])  # both pieces begin with <s>; the second's is dropped
    at = int((ids == -200).nonzero())
    embed = decoder.get_input_embeddings()
    embeds = torch.cat([embed(ids[:at]), mlp(features)[0], embed(ids[at + 1 :])])
    return decoder(inputs_embeds=embeds[None]).logits[0]


def fork_pixels(image: Image.Image) -> torch.Tensor:
    """`process_images` with image_aspect_ratio "pad" (llava/mm_utils.py), its one-pixel jitter left out."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in images.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return images(square, return_tensors="pt")["pixel_values"]


def convert(source: Path, out: Path, **arguments: Any) -> Path:
    for _ in write_import(plan_import(source, **arguments), out):
        pass
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("fork") / "llava-med")


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    return convert(checkpoint, checkpoint.parent / "converted")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def change_config(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = weights(folder)
    change(tensors)
    save_shards(folder, tensors)


PROMPT = f"[INST] <image>\n{QUESTION} [/INST]"


def test_logits_are_the_forks(checkpoint: Path, converted: Path) -> None:
    """With a wide image, so that padding to a square counts, and of the prompt that the chat template makes."""
    image = picture(3, (28, 52))
    processor = AutoProcessor.from_pretrained(converted)
    model = LlavaForConditionalGeneration.from_pretrained(converted).eval()
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert prompt == PROMPT
    batch = processor(images=[image], text=prompt, return_tensors="pt")
    assert torch.allclose(batch["pixel_values"], fork_pixels(image), atol=1e-6)
    with torch.no_grad():
        ours = model(**batch).logits[0]
    theirs = fork_logits(checkpoint, PROMPT, image)
    n = theirs.shape[-1]
    assert ours.shape[0] == theirs.shape[0]
    assert (ours[:, :n] - theirs).abs().max() < 1e-5
    other = fork_logits(checkpoint, PROMPT, picture(4, (28, 52)))
    assert (other - theirs).abs().max() > 0.1  # the image matters, else the above says little


def test_answers_are_written_as_the_fork_trained_them(converted: Path) -> None:
    """mistral_instruct: "[INST] q [/INST] a </s>[INST] …"; the answer's first word carries its space."""
    processor = AutoProcessor.from_pretrained(converted)
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " q1 "}]},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    text = processor.apply_chat_template(talk, tokenize=False)
    assert text == "[INST] <image>\nq1 [/INST] a1 </s>[INST] q2 [/INST]"
    vlm = load_model(converted, device="cpu")
    ids = encode_answer(vlm, QUESTION, "The lesion")
    assert vlm.tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert ids[-1] == vlm.eos_id == 2


def test_hscr_loads_the_folder(converted: Path) -> None:
    vlm = load_model(converted, device="cpu")
    prompt = encode_prompts(vlm, [picture(1)], [QUESTION])[0]
    assert int((prompt.input_ids == vlm.image_token_id).sum()) == (SIDE // PATCH) ** 2
    assert vlm.base.config.text_config.rope_parameters["rope_theta"] == 1e6
    assert vlm.eos_ids == {2}


def test_every_tensor_is_moved_bit_by_bit_and_reported(checkpoint: Path, converted: Path) -> None:
    before, after = weights(checkpoint), weights(converted)
    report = json.loads((converted / REPORT).read_text())
    rows = {r["name"]: r for r in report["tensors"]}
    unused = {r["name"]: r["reason"] for r in report["unused"]}
    assert rows.keys() | unused.keys() == before.keys()
    assert unused.keys() == {"model.image_newline", TOWER + "embeddings.position_ids"}
    assert {r["target"] for r in rows.values()} == after.keys()
    for name, row in rows.items():
        assert row["shape"] == list(before[name].shape)
        assert torch.equal(after[row["target"]][: len(before[name])], before[name]), name
        with safe_open(converted / row["file"], "pt") as file:
            assert row["target"] in file.keys()  # noqa: SIM118
        with safe_open(checkpoint / row["shard"], "pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert rows["model.mm_projector.2.weight"]["target"] == "multi_modal_projector.linear_2.weight"
    assert report["source"] == checkpoint.name  # and no path of this machine
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2
    # Whatever of config.json was neither carried over nor checked is listed: here nothing that a forward reads.
    assert report["config_left"].keys() == {
        "mm_use_im_patch_token", "tokenizer_padding_side", "tokenizer_model_max_length", "use_mm_proj"
    }  # fmt: skip


def test_new_rows_are_the_mean_and_rows_a_multiple_of_64(checkpoint: Path, converted: Path) -> None:
    n = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    before, after = weights(checkpoint), weights(converted)
    image = AutoProcessor.from_pretrained(converted).image_token_id
    assert image == n
    for old, new in (
        ("model.embed_tokens", "language_model.model.embed_tokens"),
        ("lm_head", "language_model.lm_head"),
    ):
        grown = after[new + ".weight"]
        assert len(grown) == -(-(n + 1) // 64) * 64
        assert torch.allclose(grown[image], before[old + ".weight"].mean(0), atol=1e-6)
        assert torch.equal(grown[n:], grown[image].expand(len(grown) - n, -1))


def test_tokens_are_the_forks_whatever_the_tokenizer_says_of_legacy(copy: Path, tmp_path: Path) -> None:
    """The fork reads the text after the image as a text of its own, "▁" first; a saved LlamaTokenizer does not."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": False}))
    processor = AutoProcessor.from_pretrained(convert(copy, tmp_path / "out"))
    source = AutoTokenizer.from_pretrained(copy)
    before, after = (source(piece)["input_ids"] for piece in PROMPT.split("<image>"))
    assert processor.tokenizer(PROMPT)["input_ids"] == [*before, processor.image_token_id, *after[1:]]
    assert "▁" in source.convert_ids_to_tokens(after[1])


def test_tokenizer_model_alone_is_read(copy: Path, tmp_path: Path) -> None:
    """As in Microsoft's release. data/mistral_like_tokenizer.model was trained with sentencepiece 0.2.3 (BPE, byte fallback, 380
    pieces), whose own `encode` gave these ids, here with <s> before them."""
    (copy / "tokenizer.json").unlink()
    shutil.copy(Path(__file__).parent / "data" / "mistral_like_tokenizer.model", copy / "tokenizer.model")
    config = json.loads((copy / "config.json").read_text())
    change_config(copy, vocab_size=380)
    change_weights(
        copy, lambda t: t.update({k: torch.zeros(380, HIDDEN) for k in ("model.embed_tokens.weight", "lm_head.weight")})
    )
    assert config["vocab_size"] != 380
    processor = AutoProcessor.from_pretrained(convert(copy, tmp_path / "out"))
    image, tokenizer = processor.image_token_id, processor.tokenizer
    assert image == 380
    assert tokenizer(PROMPT)["input_ids"] == [*ORACLE["[INST] "], image, *ORACLE["\nWhere is the lesion? [/INST]"][1:]]
    strange = "Is there a 2 cm lesion?\nAnswer é ü 肺 no"
    assert tokenizer(strange)["input_ids"] == ORACLE[strange]
    assert tokenizer.decode(ORACLE[strange], skip_special_tokens=True) == strange
    (copy / "tokenizer.model").write_bytes((copy / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        plan_import(copy)
    (copy / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        plan_import(copy)


def test_shards_and_half_precision(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "half", torch.bfloat16)
    plan = plan_import(source)
    out = tmp_path / "out"
    assert not out.exists()
    moved = list(write_import(plan, out, shard_bytes=40_000))
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert sorted(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == sorted(
        m.target for m in moved
    )
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}
    held = [list(load_file(shard).values()) for shard in shards]
    sizes = [sum(t.nbytes for t in tensors) for tensors in held]
    assert all(size <= 40_000 or len(tensors) == 1 for size, tensors in zip(sizes, held, strict=True))
    assert any(len(tensors) > 1 for tensors in held)
    for row in json.loads((out / REPORT).read_text())["tensors"]:
        assert row["target"] in load_file(out / row["file"])
    first = [next(m.n_bytes for m in moved if m.target in load_file(shard)) for shard in shards]
    assert all(a + b > 40_000 for a, b in zip(sizes, first[1:], strict=False))  # no shard ends before it must
    each = tmp_path / "a tensor a shard"
    list(write_import(plan, each, shard_bytes=1))
    assert len(list(each.glob("model-*.safetensors"))) == len(moved)
    model, info = LlavaForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert (
        json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    )  # other readers do not look at the weights
    assert not any(info.values()), info
    assert os.listdir(tmp_path).count(".out.importing") == 0


def test_the_same_import_gives_the_same_bytes(checkpoint: Path, converted: Path, tmp_path: Path) -> None:
    again = convert(checkpoint, tmp_path / "elsewhere")
    assert {p.name: p.read_bytes() for p in converted.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


def test_tower_from_its_own_folder(copy: Path, checkpoint: Path, converted: Path, tmp_path: Path) -> None:
    change_weights(copy, lambda t: [t.pop(k) for k in list(t) if "vision_tower" in k] and None)
    with pytest.raises(ValueError, match=r"carries no vision tower.*--vision-tower"):
        plan_import(copy)
    with pytest.raises(ValueError, match=r"vision tower '/nowhere/clip': no config.json at hand"):
        plan_import(copy, "/nowhere/clip")
    (tmp_path / "shell").mkdir()
    shutil.copy(checkpoint.parent / "clip" / "config.json", tmp_path / "shell")
    with pytest.raises(ValueError, match=r"has no model.safetensors at hand"):
        plan_import(copy, str(tmp_path / "shell"))
    clip = save_file_names(checkpoint.parent / "clip", tmp_path / "clip")
    out = convert(copy, tmp_path / "out", vision_tower=str(clip))
    before, after = weights(converted), weights(out)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert before.keys() == after.keys()


def save_file_names(clip: Path, out: Path) -> Path:
    """The tower's folder as OpenAI's CLIP is published: under `vision_model.`, with a text half beside it."""
    shutil.copytree(clip, out)
    tensors = {
        "vision_model." + k.removeprefix("vision_model."): v for k, v in load_file(clip / "model.safetensors").items()
    }
    tensors["text_model.final_layer_norm.bias"] = torch.zeros(4)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensor\(s\) missing: language_model.model.norm.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "without a place in the target model: model.extra.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm.weight is \[7\], config.json asks for \[48\]"),
        (lambda t: t.update({"lm_head.weight": torch.ones(9, HIDDEN)}), r"lm_head.weight is \[9, 48\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(HIDDEN, dtype=torch.int8)}), r"norm.weight \(dtype I8\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(copy: Path, change: Any, message: str) -> None:
    change_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        plan_import(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava"}, "Hugging Face LLaVA already.*--model"),
        ({"model_type": "llava_llama"}, "model_type 'llava_llama'; only 'llava_mistral'"),
        ({"mm_projector_type": "linear"}, 'mm_projector_type = "linear"'),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = true"),
        ({"image_aspect_ratio": "anyres"}, 'image_aspect_ratio = "anyres"'),
        (
            {"mm_vision_tower": "/nowhere/clip"},
            "names the vision tower '/nowhere/clip', whose shape is not known here.*--vision-tower",
        ),
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
            r"mm_projector.0.weight is \[48, 32\], config.json asks for \[48, 1024\]",
        ),
        ({"vocab_size": "300"}, 'vocab_size is "300", must be a number above 0'),
        ({"vocab_size": 0}, "vocab_size is 0, must be a number above 0"),
        ({"num_attention_heads": 0}, r"config.json: describes no LLaVA-Med \(ZeroDivisionError"),
        ({"hidden_size": None}, r"config.json: describes no LLaVA-Med .*hidden_size"),
        ({"hidden_act": "nosuch"}, r"config.json: describes no LLaVA-Med \(KeyError: 'nosuch'\)"),
        ({"mm_vision_select_layer": 4}, "mm_vision_select_layer is 4, the vision tower has 3 layers"),
        ({"mm_vision_select_layer": "last"}, "mm_vision_select_layer is 'last', the vision tower has 3 layers"),
        ({"vocab_size": 300}, "tokenizer has 335 tokens, config.json 300"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ],
)
def test_other_models_are_refused(copy: Path, fields: dict[str, Any], message: str) -> None:
    change_config(copy, **fields)
    with pytest.raises(ValueError, match=message):
        plan_import(copy)


def test_broken_downloads_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        plan_import(tmp_path / "nowhere")
    second = copy / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00002-of-00002.safetensors: not a whole safetensors file \(\d+ bytes"):
        plan_import(copy)
    second.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4949453792\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        plan_import(copy)
    second.unlink()
    with pytest.raises(ValueError, match="not there, but the index names it"):
        plan_import(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is a pickle, which is not opened"):
        plan_import(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer cannot be read .*must be there, whole"):
        plan_import(copy)


def test_a_broken_config_index_or_tower_is_named(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    clip = shutil.copytree(checkpoint.parent / "clip", tmp_path / "clip")
    change_config(clip, model_type="siglip_vision_model")
    with pytest.raises(ValueError, match=r"clip': is a 'siglip_vision_model'; give a CLIP as --vision-tower"):
        plan_import(copy, str(clip))
    index = copy / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 1}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index.json: is no index of weights .*download it again"):
            plan_import(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: cannot be read .*download it again"):
        plan_import(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"copy: no config.json there; give the folder that holds it"):
        plan_import(copy)


def test_a_source_that_changes_under_the_import_is_named(copy: Path, tmp_path: Path) -> None:
    plan = plan_import(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"00002-of-00002.safetensors: cannot be read any more .*leave the source as it is"
    ):
        list(write_import(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_converted_tokenizer_that_reads_otherwise_is_refused(
    copy: Path, checkpoint: Path, converted: Path, tmp_path: Path
) -> None:
    """Piece by piece with "▁" first, as the fork reads, or not at all; and every prompt begins with <s>."""
    check_prompt_ids(checkpoint, converted)
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    stored = json.loads((damaged / "tokenizer.json").read_text())
    assert stored["pre_tokenizer"]["prepend_scheme"] == "always"
    stored["pre_tokenizer"]["prepend_scheme"] = "first"
    (damaged / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"its tokenizer reads a prompt as .*the converted one as"):
        check_prompt_ids(checkpoint, damaged)
    source = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(source | {"post_processor": None}))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its tokenizer reads a prompt as"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_model_needs_pieces_and_each_once() -> None:
    def model(*pieces: str) -> bytes:
        fields = [b"\x0a" + bytes([len(p)]) + p.encode() for p in pieces]
        return b"".join(b"\x0a" + bytes([len(f)]) + f for f in fields)

    assert _sentencepiece_vocabulary(model("<unk>", "a", "b")) == {"<unk>": 0, "a": 1, "b": 2}
    for pieces in (("<unk>", "a"), ("<unk>", "a", "a")):
        with pytest.raises(ValueError, match="is no sentencepiece model"):
            _sentencepiece_vocabulary(model(*pieces))


def test_index_and_files_must_agree(copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"holds lm_head.weight, which model.safetensors.index.json does not place there"
    ):
        plan_import(copy)
    index["weight_map"] |= {"lm_head.weight": name, "model.ghost": name}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"but not in its file: model.ghost"):
        plan_import(copy)
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside its folder"):
        plan_import(copy)


def test_output_appears_whole_or_not_at_all(checkpoint: Path, tmp_path: Path) -> None:
    plan, out = plan_import(checkpoint), tmp_path / "a b's" / "out"
    stopped = write_import(plan, out, shard_bytes=20_000)
    for _ in range(20):
        next(stopped)
    with pytest.raises(ValueError, match="another run is working in it"):
        next(write_import(plan, out))
    assert not out.exists()
    stopped.close()
    assert not list(out.parent.iterdir())
    (out.parent / ".out.importing").mkdir()  # what a killed import leaves
    (out.parent / ".out.importing" / "junk").write_text("")
    convert(checkpoint, out)
    assert (out / REPORT).is_file()
    assert {".lock", "junk"}.isdisjoint(os.listdir(out))
    assert os.listdir(out.parent) == ["out"]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(ValueError, match="out: exists already; name another folder"):
        convert(checkpoint, out)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


def test_no_room_and_no_right_are_said(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*choose another --out"):
        convert(checkpoint, tmp_path / "file" / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB, 0\.00 GB are free; make room"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys, json, threading, time
from pathlib import Path
from hscr.import_llava_med import plan_import
from hscr.llava_med_write import write_import
plan = plan_import(Path(sys.argv[1]))
def kib(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # peak starts again from here
start = kib("VmRSS")
for _ in write_import(plan, Path(sys.argv[2]), shard_bytes=int(sys.argv[3])):
    pass
sizes = [m.n_bytes for m in plan.moves]
print(json.dumps({"peak": (kib("VmHWM") - start) * 1024, "largest": max(sizes), "all": sum(sizes)}))
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc tells the peak")
def test_memory_is_one_shard_and_one_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """190 MB of weights in two shards, embeddings that get new rows among them, written in shards of 40 MB: resident memory, mapped pages
    of the source included, grows by less than one output shard, one tensor, and 15 MB for what transformers and the processor bring."""
    big = shutil.copytree(checkpoint, tmp_path / "big")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "vocab_size": 8001}
    change_config(big, **sizes)
    config = MistralConfig(
        **{k: v for k, v in json.loads((big / "config.json").read_text()).items() if k != "model_type"}
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in MistralForCausalLM(config).state_dict().items()}
    tensors = {k: v for k, v in weights(big).items() if k not in shapes}
    shapes |= {"model.mm_projector.0.weight": (1024, VISION), "model.mm_projector.2.weight": (1024, 1024)}
    shapes |= {"model.mm_projector.0.bias": (1024,), "model.mm_projector.2.bias": (1024,)}
    save_shards(big, tensors | {k: torch.full(s, 0.5, dtype=torch.bfloat16) for k, s in shapes.items()})
    command = [sys.executable, "-c", MEASURE, str(big), str(tmp_path / "out"), "40000000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    got = json.loads(run.stdout.splitlines()[-1])
    assert got["all"] > 190e6
    assert got["peak"] < 40e6 + got["largest"] + 15e6, got


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """As typed: a path with spaces and quotes, the summary, and help without torch."""
    from typer.testing import CliRunner

    from hscr.cli import app

    out = tmp_path / "it's [here] now" / "llava med"
    result = CliRunner().invoke(app, ["import-llava-med", str(checkpoint), "--out", str(out)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.exception
    assert (out / REPORT).is_file()
    code = (
        "import sys; from hscr.cli import app\n"
        "try: app(['import-llava-med', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
