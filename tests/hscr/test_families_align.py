"""The whole recipe on every family: an adapter that stock peft loads and that changes answers, several images where they may be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hscr.align import align
from hscr.answer import Answerer, AnswerRequest
from hscr.config import AlignConfig
from hscr.data_set import DataSet
from hscr.families import FAMILIES
from hscr.images import as_images
from hscr.model import encode_prompts, load_model
from hscr.packing import token_logprobs
from hscr.records import read_preferences
from hscr.reward import words_of
from hscr.visual_tokens import Prompt, derived_seed, drop_visual_tokens, dropout_mask
from tests.hscr.tiny import picture, save_records
from tests.hscr.tiny_families import NAMES, save_tiny, stock_row

CONFIG = AlignConfig.from_dict(
    {
        "preference": {"similarity": "token_f1", "max_similarity": 1.0, "similarity_gap": 0.0, "n_candidates": 2},
        "optimization": {
            "lora_rank": 2,
            "lr": 0.05,
            "batch_size": 2,
            "epochs": 3,
            "anchor": 0.5,
        },
        # What is learnt by heart is enough to see the adapter at work.
        "evaluation": {"allow_leak": True, "max_new_tokens": 4, "max_records": 2, "n_bootstrap": 100},
    }
)
QUESTIONS = ["Where is the lesion?", "Is there a lesion?", "Which plane is shown?"]


def with_second_images(data: Path) -> Path:
    """Every second record gets a second image."""
    rows = [json.loads(line) for line in (data / "records.jsonl").read_text().splitlines()]
    for i in range(0, len(rows), 2):
        rows[i]["images"] = [rows[i].pop("image"), rows[i + 1]["image"]]
    (data / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


# Those whose layers differ most stand for the others where time is short; what each family does alone is tests/hscr/test_families.py.
STAND_FOR_ALL = ("llava", "gemma3", "qwen3_vl")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in STAND_FOR_ALL else [pytest.mark.thorough]) for n in NAMES]
)
def test_the_recipe_gives_an_adapter_that_stock_peft_loads_and_that_changes_answers(name: str, tmp_path: Path) -> None:
    """Stock classes on the stock base say what the Answerer says; where the adapter is not applied, some answer differs."""
    model, data = save_tiny(name, tmp_path / "model"), save_records(tmp_path / "data", 4)
    several = FAMILIES[name].several_images
    vlm = load_model(model, device="cpu")
    out, data_set = tmp_path / "out", DataSet(with_second_images(data) if several else data)
    list(align(vlm, data_set, out, CONFIG, evaluation_data=data_set))
    assert any(p.levels for p in read_preferences(out / "preferences.jsonl"))
    conditions = {json.loads(line)["condition"] for line in (out / "predictions.jsonl").read_text().splitlines()}
    assert conditions == {"real", "blank", "shuffled"}

    stock = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), str(out / "adapter")).eval()
    answerer = Answerer(vlm)
    answerer.load_adapter("adapter", out / "adapter")
    differs = False
    for i, question in enumerate(QUESTIONS):
        images = [picture(i, (40, 56)), picture(i + 3, (60, 30))] if several and i else [picture(i)]
        content = [*({"type": "image", "image": x} for x in images), {"type": "text", "text": question}]
        batch = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = stock.generate(
                **batch, do_sample=False, max_new_tokens=8, suppress_tokens=vlm.placeholder_ids, pad_token_id=0
            )
        expected = made[0, batch["input_ids"].shape[1] :].tolist()
        adapter, base = answerer.answer([AnswerRequest(images, question, a, max_tokens=8) for a in ("adapter", None)])
        assert adapter.token_ids == expected
        differs |= base.token_ids != expected
    assert differs


def compacted(prompt: Prompt, keep: Tensor) -> Prompt:
    cut = drop_visual_tokens(prompt, keep)
    return dataclasses.replace(cut, position_ids=torch.arange(len(cut.input_ids)).expand(*cut.position_ids.shape))


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_their_grounding_rest_on_every_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's values are those of the stock forward, with the whole image and with a mask that has holes."""
    answerer = Answerer(load_model(save_tiny(name, tmp_path), device="cpu"))
    one, two, three = (picture(i, (40, 56)) for i in range(3))
    asked: list[Any] = [one, [one, two], [one, three], [two, one]]
    if not FAMILIES[name].several_images:
        asked = [one, [two], [three]]
    answers = answerer.answer([AnswerRequest(x, QUESTIONS[0], max_tokens=6, grounding="tokens") for x in asked])
    for images, answer in zip(asked, answers, strict=True):
        assert answer.tokens is not None
        words = words_of(answerer.vlm, answer.token_ids)[1]
        assert {i for i, t in enumerate(answer.tokens) if t.is_content} == {i for word in words for i in word.tokens}
        rewards = [sum(answer.tokens[i].reward for i in word.tokens) for word in words]
        assert answer.score == pytest.approx(min(rewards, default=0.0), abs=1e-5)
        (prompt,) = encode_prompts(answerer.vlm, [images], [QUESTIONS[0]])
        n_visual = int((prompt.input_ids == answerer.vlm.image_token_id).sum())
        kept = dropout_mask(n_visual, 0.7, derived_seed(prompt.image, 0))
        seen, hidden = (
            token_logprobs(stock_row(answerer.vlm, prompt, answer.token_ids, k), answer.token_ids) for k in (None, kept)
        )
        assert [t.logprob for t in answer.tokens] == pytest.approx(seen.tolist(), abs=1e-4)
        assert [t.reward for t in answer.tokens] == pytest.approx((seen - hidden).tolist(), abs=1e-4)
        assert max(abs(t.reward) for t in answer.tokens) > 1e-3
        alone = answerer.answer([AnswerRequest(as_images(images), QUESTIONS[0], max_tokens=6, grounding="tokens")])[0]
        assert alone.token_ids == answer.token_ids
        assert alone.score == pytest.approx(answer.score, abs=1e-4)
    with monkeypatch.context() as patch:  # the trap: what is left after dropping is counted through
        patch.setattr("hscr.visual_tokens.drop_visual_tokens", compacted)
        moved = answerer.answer([AnswerRequest(as_images(images), QUESTIONS[0], max_tokens=6, grounding="tokens")])[0]
    assert moved.tokens is not None
    assert max(abs(t.reward - r) for t, r in zip(moved.tokens, (seen - hidden).tolist(), strict=True)) > 1e-3
    first = [a.tokens[0].logprob for a in answers if a.tokens]
    assert len({round(x, 4) for x in first}) == len(asked)  # no image, and no order of them, is overlooked
    assert len({a.prompt_tokens for a in answers}) == (2 if FAMILIES[name].several_images else 1)


def test_a_family_that_takes_one_image_refuses_more_before_anything_is_computed(tmp_path: Path) -> None:
    vlm = load_model(save_tiny("llava", tmp_path / "model"), device="cpu")
    data = DataSet(with_second_images(save_records(tmp_path / "data", 4)))
    with pytest.raises(ValueError, match="a record has 2, and llava takes one a prompt"):
        list(align(vlm, data, tmp_path / "out", CONFIG))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="a record has 2"):
        Answerer(vlm).answer([AnswerRequest([picture(0), picture(1)], "Where?")])
    with pytest.raises(ValueError, match="at least one image"):
        Answerer(vlm).answer([AnswerRequest([], "Where?")])


@pytest.mark.parametrize("part", sorted({p for f in FAMILIES.values() for p in f.feature_modules}))
def test_an_adapter_that_touches_the_features_of_any_family_is_refused(part: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    answerer = Answerer(load_model(save_tiny("llava", tmp_path / "model"), device="cpu"))
    weights = {f"base_model.model.model.{part}.layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": "q_proj"}))
    with pytest.raises(ValueError, match="changes the vision tower or its projector"):
        answerer.load_adapter("foreign", tmp_path)
