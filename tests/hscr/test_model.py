"""Loading models, LoRA's place in them, and the tokens of prompts and answers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hscr.config import OptimizationConfig
from hscr.model import VLM, add_lora, decode_text, encode_answer, encode_prompts, folder_digest, load_model
from tests.hscr.tiny import picture


def test_a_loaded_model_is_frozen_and_in_eval_mode(vlm: VLM) -> None:
    assert not vlm.model.training
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert vlm.model.dtype == torch.float32
    assert vlm.eos_ids == {2}


def test_a_local_model_is_named_without_its_path(vlm: VLM, tiny_folder: Path) -> None:
    """Its name goes into cards and reports, and those leave the machine."""
    assert vlm.name == tiny_folder.name


def test_an_unknown_model_architecture_dtype_or_device_is_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder or Hugging Face name"):
        load_model(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="architecture 'bert' is not supported yet; supported: llava"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="dtype: must be auto or one of float32"):
        load_model(tiny_folder, dtype="int8")
    with pytest.raises(ValueError, match="device: no such device 'banana'"):
        load_model(tiny_folder, device="banana")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: 'cuda' is not available"):
            load_model(tiny_folder, device="cuda")


def test_the_gpu_that_is_asked_for_becomes_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph that is captured on another GPU than the model's is empty, and replaying it says nothing."""
    made: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", made.append)
    for device in ("cuda:1", "cuda", "cpu"):
        with pytest.raises(ValueError, match="no such folder"):
            load_model(tmp_path / "missing", device=device)
    assert made == [torch.device("cuda:1")]


def test_a_model_by_name_is_known_by_the_commit_that_was_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commits in a hub cache, the branch at the second: each has its digest and its weights, and code beside them never runs."""
    first, second, ran = "a" * 40, "b" * 40, tmp_path / "ran"
    repository = tmp_path / "hub" / "models--org--tiny"
    for commit in (first, second):
        shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    weights = load_file(tiny_folder / "model.safetensors")
    save_file(
        {k: v + 1 for k, v in weights.items()}, repository / "snapshots" / first / "model.safetensors", {"format": "pt"}
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(second)
    config = json.loads((tiny_folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (repository / "snapshots" / first / "config.json").write_text(json.dumps(config))
    (repository / "snapshots" / first / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def told(revision: str | None) -> tuple[str, str, float]:
        vlm = load_model("org/tiny", device="cpu", revision=revision, feature_cache=tmp_path / "features")
        assert vlm.features.disk is not None
        return vlm.name, vlm.digest, float(next(vlm.base.parameters()).double().sum())

    branch, pinned, same = told(None), told(first), told(second)
    assert branch == same
    assert [pinned[:2], same[:2]] == [("org/tiny", f"hub:org/tiny@{commit}") for commit in (first, second)]
    assert pinned[2] != same[2]
    assert not ran.exists()
    with pytest.raises(ValueError, match="no such folder or Hugging Face name at hand"):
        load_model("org/tiny", device="cpu", revision="c" * 40)


def test_a_folder_without_weights_and_pickled_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model"):
        load_model(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model"):
        load_model(folder)


def test_digest_names_the_weights_not_the_documentation(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("a card")
    assert folder_digest(folder) == folder_digest(tiny_folder)
    (folder / "generation_config.json").write_text("{}")
    assert folder_digest(folder) != folder_digest(tiny_folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_lies_on_the_language_model_only_and_in_float32(tiny_folder: Path, dtype: str) -> None:
    vlm = load_model(tiny_folder, dtype=dtype, device="cpu")
    add_lora(vlm, OptimizationConfig(lora_rank=2), seed=0)
    trained = {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # A and B of 7 linear layers in 2 blocks
    assert all("language_model" in n and "lora_" in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in vlm.model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}


def test_lora_starts_from_its_seed_as_the_reference_policy(tiny_folder: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        vlm = load_model(tiny_folder, device="cpu")
        torch.manual_seed(99 + seed)
        add_lora(vlm, OptimizationConfig(lora_rank=2), seed=seed)
        return {n: p.detach() for n, p in vlm.model.named_parameters() if p.requires_grad}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    assert all(not p.any() for n, p in first.items() if "lora_B" in n)


@pytest.mark.parametrize("targets", [".*vision_tower.*q_proj", ".*multi_modal_projector.linear_1", "all-linear"])
def test_lora_on_what_makes_the_features_is_refused_and_taken_off_again(vlm: VLM, targets: str) -> None:
    stock = vlm.model
    with pytest.raises(ValueError, match="lora_targets: matches the vision tower or its projector"):
        add_lora(vlm, OptimizationConfig(lora_targets=targets), seed=0)
    assert vlm.model is stock
    assert not [n for n, _ in vlm.model.named_parameters() if "lora" in n]


def test_lora_targets_that_match_nothing_are_refused(vlm: VLM) -> None:
    with pytest.raises(ValueError, match="nothing_like_this"):
        add_lora(vlm, OptimizationConfig(lora_targets="nothing_like_this"), seed=0)


def test_an_answers_tokens_are_those_that_follow_the_prompt(vlm: VLM) -> None:
    """Tokenised jointly: " left" with its space, as the model says it after "ASSISTANT:", not "left" as at the start of a text."""
    ids = encode_answer(vlm, "Where?", "left lobe")
    assert vlm.tokenizer.convert_ids_to_tokens(ids) == ["Ġleft", "Ġlobe", "</s>"]
    whole = vlm.processor(images=[picture(0)], text="USER: <image>\nWhere? ASSISTANT: left lobe</s>")["input_ids"][0]
    prompt = encode_prompts(vlm, [picture(0)], ["Where?"])[0].input_ids.tolist()
    assert list(whole) == prompt + ids


@pytest.mark.parametrize(
    "answer", ["left lobe.", "a  b", "é 中", "ASSISTANT: Where?", "2.5 cm (T2-weighted)", "x </s> y"]
)
def test_an_answers_tokens_spell_it(vlm: VLM, answer: str) -> None:
    ids = encode_answer(vlm, "Where?", answer)
    assert ids[-1] == vlm.eos_id
    assert decode_text(vlm, ids).replace("< /s>", "</s>") == answer


def test_without_a_usable_template_the_answer_is_tokenised_alone(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hscr.model.templated", lambda vlm, turns: f"{len(turns[-1].text)}: {[t.text for t in turns]}")
    assert decode_text(vlm, encode_answer(vlm, "Where?", "left lobe")) == "left lobe"
