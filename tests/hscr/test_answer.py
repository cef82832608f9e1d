"""Answers with adapters and grounding: mixed batches, a base that stays the base, and a score that is the alignment reward."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hscr.answer
from hscr.answer import AnswerBatch, Answerer, AnswerRequest
from hscr.config import OptimizationConfig
from hscr.decode import decode
from hscr.gathering import STEPS
from hscr.model import VLM, add_lora, encode_prompts, load_model
from hscr.prefix import Rows
from hscr.reward import words_of
from hscr.running import Running
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.tiny import picture, save_tiny_llava

QUESTIONS = ["Where is the lesion?", "Which plane is shown?", "Is there a lesion?"]


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with random weights, strong enough to change answers."""
    folders = []
    for seed in (1, 2):
        vlm = load_model(tiny_folder, device="cpu")
        add_lora(vlm, OptimizationConfig(lora_rank=2), seed=seed)
        stream = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in vlm.model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.3, generator=stream)
        folder = tmp_path_factory.mktemp("adapters") / str(seed)
        vlm.model.save_pretrained(str(folder), safe_serialization=True)
        folders.append(folder)
    return folders


def requests(adapter: str | None = None, **changes: Any) -> list[AnswerRequest]:
    return [AnswerRequest(picture(i), q, adapter, max_tokens=8, **changes) for i, q in enumerate(QUESTIONS)]


@pytest.fixture
def answerer(vlm: VLM) -> Answerer:
    return Answerer(vlm)


def test_adapters_change_answers_and_the_base_stays_the_base(answerer: Answerer, adapters: list[Path]) -> None:
    base = answerer.answer(requests())
    answerer.load_adapter("one", adapters[0])
    assert answerer.answer(requests()) == base
    answerer.load_adapter("two", adapters[1])
    one, two = answerer.answer(requests("one")), answerer.answer(requests("two"))
    assert one != base != two != one
    assert answerer.answer(requests()) == base
    assert answerer.answer(requests("one")) == one


def test_mixed_adapters_in_a_batch_answer_as_alone_and_in_order(answerer: Answerer, adapters: list[Path]) -> None:
    answerer.load_adapter("one", adapters[0])
    answerer.load_adapter("two", adapters[1])
    alone = [answerer.answer([r])[0] for name in ("one", None, "two") for r in requests(name)]
    wanted = [r for name in ("one", None, "two") for r in requests(name)]
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    assert answerer.answer([wanted[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("at", ["base", "adapter"])
def test_an_exception_in_the_middle_leaves_no_adapter_behind(
    answerer: Answerer, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    base = answerer.answer(requests())
    answerer.load_adapter("one", adapters[0])
    one = answerer.answer(requests("one"))
    with monkeypatch.context() as patch:

        def broken(*args: Any, **kw: Any) -> Any:
            raise RuntimeError("out of memory")

        patch.setattr(Running, "_say", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            answerer.answer(requests("one" if at == "adapter" else None))
    assert answerer.answer(requests()) == base
    assert answerer.answer(requests("one")) == one


def test_an_exception_inside_the_network_leaves_no_adapter_behind(answerer: Answerer, adapters: list[Path]) -> None:
    base = answerer.answer(requests())
    answerer.load_adapter("one", adapters[0])
    one = answerer.answer(requests("one"))

    def broken(*args: Any) -> None:
        raise RuntimeError("in a layer")

    for adapter in ("one", None):
        hook = answerer.vlm.base.model.language_model.layers[1].mlp.act_fn.register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="in a layer"):
            answerer.answer([*requests(), *requests(adapter)])
        hook.remove()
        prompts = encode_prompts(answerer.vlm, [picture(i) for i in range(3)], QUESTIONS)
        assert decode(answerer.vlm, prompts, max_tokens=8) == [
            a.token_ids for a in base
        ]  # who names no adapter has none
        assert answerer.answer(requests()) == base
        assert answerer.answer(requests("one")) == one


def test_a_joining_that_fails_half_way_breaks_off_what_ran_and_no_more(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers may hold the newcomer already: nothing may go on from there."""
    wanted, batch = answerer.answer(requests()[1:2]), AnswerBatch(answerer)
    (running,) = batch.join(requests()[:1])

    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "join", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.join(requests()[1:2])
    assert batch.lost() == [running]
    (row,), answers = batch.join(requests()[1:2]), {}
    while not answers:
        answers = batch.step()
    assert answers == {row: wanted[0]}


def test_unloading_the_last_adapter_gives_the_base_back(answerer: Answerer, adapters: list[Path]) -> None:
    base = answerer.answer(requests())
    hooks = sum(len(module._forward_hooks) for module in answerer.vlm.base.modules())  # transformers' own
    answerer.load_adapter("one", adapters[0])
    answerer.load_adapter("two", adapters[1])
    one, two = answerer.answer(requests("one")), answerer.answer(requests("two"))
    answerer.unload_adapter("two")
    answerer.unload_adapter("never loaded")
    assert answerer.answer(requests("one")) == one
    with pytest.raises(ValueError, match="no adapter of that name"):
        answerer.answer(requests("two"))
    answerer.unload_adapter("one")
    assert answerer.answer(requests()) == base
    assert not answerer.lora._hooks
    assert sum(len(module._forward_hooks) for module in answerer.vlm.base.modules()) == hooks
    answerer.load_adapter("two", adapters[1])
    assert answerer.answer(requests("two")) == two


def test_names_that_differ_only_in_their_dots_are_two_adapters(answerer: Answerer, adapters: list[Path]) -> None:
    answerer.load_adapter("v1.0", adapters[0])
    one = answerer.answer(requests("v1.0"))
    answerer.load_adapter("v1_0", adapters[1])
    assert answerer.answer(requests("v1.0")) == one
    assert answerer.answer(requests("v1_0")) != one


def test_loading_a_name_again_does_nothing(answerer: Answerer, adapters: list[Path]) -> None:
    answerer.load_adapter("one", adapters[0])
    one = answerer.answer(requests("one"))
    answerer.load_adapter("one", adapters[1])
    assert answerer.answer(requests("one")) == one


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "no config", "other model", "pickle", "tower"])
def test_an_adapter_that_cannot_be_used_is_refused_and_leaves_the_model_as_it_was(
    answerer: Answerer, adapters: list[Path], tmp_path: Path, damage: str, others: bool
) -> None:
    base = answerer.answer(requests())
    if others:
        answerer.load_adapter("one", adapters[0])
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[1], folder)
    weights = folder / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "other model":  # half of the tensors fit, and would be in place when the other half fails
        tensors = load_file(weights)
        save_file({n: (t + 1 if i % 2 else t[:, :3].contiguous()) for i, (n, t) in enumerate(tensors.items())}, weights)
    elif damage == "pickle":
        torch.save({}, folder / "adapter_model.bin")
        weights.unlink()
    else:
        save_file({n.replace("language_model", "vision_tower"): t for n, t in load_file(weights).items()}, weights)
    for _ in range(2):
        with pytest.raises(ValueError, match="adapter"):
            answerer.load_adapter("two", folder)
        assert answerer.answer(requests()) == base
        # 7 linear layers in 2 blocks of the good adapter, nothing of the bad one
        assert len(answerer.lora._hooks) == (14 if others else 0)
    with pytest.raises(ValueError, match="no adapter of that name"):
        answerer.answer(requests("two"))
    answerer.load_adapter("two", adapters[1])
    assert answerer.answer(requests("two")) != base


def test_an_adapter_of_a_larger_model_is_refused(answerer: Answerer, tmp_path: Path, adapters: list[Path]) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters[0], folder)
    weights = folder / "adapter_model.safetensors"
    save_file({n.replace("layers.1", "layers.7"): t for n, t in load_file(weights).items()}, weights)
    base = answerer.answer(requests())
    try:
        answerer.load_adapter("larger", folder)
    except ValueError:
        assert answerer.answer(requests()) == base


def test_grounding_is_the_alignment_reward_of_the_answers_words(answerer: Answerer) -> None:
    plain, summary, tokens = (answerer.answer(requests(grounding=g)) for g in ("none", "summary", "tokens"))
    assert [a.token_ids for a in plain] == [a.token_ids for a in summary] == [a.token_ids for a in tokens]
    assert all(a.score is None and a.tokens is None and a.grounded is None for a in plain)
    assert all(a.score is not None and a.tokens is None for a in summary)
    for a in tokens:
        assert a.tokens is not None
        assert len(a.tokens) == a.completion_tokens == len(a.token_ids)
        for t in a.tokens:
            assert t.reward == pytest.approx(t.logprob - t.logprob_without_image, abs=1e-5)
            assert t.logprob <= 0
        words = words_of(answerer.vlm, a.token_ids)[1]
        assert {i for i, t in enumerate(a.tokens) if t.is_content} == {i for w in words for i in w.tokens}
        rewards = [sum(a.tokens[i].reward for i in w.tokens) for w in words]
        assert a.score == pytest.approx(min(rewards, default=0.0), abs=1e-5)
    assert [a.score for a in summary] == [a.score for a in tokens]


def test_the_dropout_mask_belongs_to_the_image(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same image in another batch and from another object: the same mask and score. Another image: another mask."""
    masks: dict[str, set[tuple[int, ...]]] = {}

    def noted(prompt: Prompt, *args: Any) -> Prompt:
        cut = dropped(prompt, *args)
        kept = cut.position_ids[..., cut.input_ids == cut.image_token_id]
        masks.setdefault(prompt.image, set()).add(tuple(kept.flatten().tolist()))
        return cut

    monkeypatch.setattr(hscr.answer, "dropped", noted)
    score = answerer.answer(requests(grounding="summary"))[1].score
    alone = answerer.answer([AnswerRequest(picture(1), QUESTIONS[1], max_tokens=8, grounding="summary")])[0].score
    assert alone == pytest.approx(score, abs=1e-5)
    assert len(masks) == len(requests())
    assert all(len(own) == 1 for own in masks.values())
    assert len(set.union(*masks.values())) == len(masks)


def test_grounding_without_dropout_is_zero(vlm: VLM) -> None:
    for answer in Answerer(vlm, dropout_ratio=0.0).answer(requests(grounding="summary")):
        assert answer.grounded is not None
        assert answer.grounded[0] < answer.grounded[1]
        assert answer.score == pytest.approx(0, abs=1e-5)


def test_finish_reason_and_counts(answerer: Answerer) -> None:
    for answer in answerer.answer(requests()):
        said_end = answer.token_ids[-1] in answerer.vlm.eos_ids
        assert answer.finish_reason == ("stop" if said_end else "length")
        assert said_end or answer.completion_tokens == 8
        assert answer.prompt_tokens > 16
    answerer.vlm.base.generation_config.eos_token_id = answer.token_ids[0]
    (ended,) = answerer.answer(requests()[2:])
    assert (ended.finish_reason, ended.completion_tokens) == ("stop", 1)
    assert answerer.answer([]) == []


def test_an_answer_never_holds_the_images_placeholder(vlm: VLM) -> None:
    """Made a hundred times as likely (in logits) as the first word of the answer: whoever took the likeliest would say it."""
    (first,) = Answerer(vlm).answer(requests()[:1])
    with torch.no_grad():
        vlm.base.lm_head.weight[vlm.image_token_id] = 100 * vlm.base.lm_head.weight[first.token_ids[0]]
    for heat in (0.0, 1.0):
        (said,) = Answerer(vlm).answer([replace(requests()[0], temperature=heat)])
        assert vlm.image_token_id not in said.token_ids


def test_models_of_other_weights_answer_otherwise(tmp_path: Path, answerer: Answerer) -> None:
    """So that equal answers elsewhere say something."""
    other = Answerer(load_model(save_tiny_llava(tmp_path / "m", seed=1), device="cpu"))
    assert other.answer(requests()) != answerer.answer(requests())


def test_answers_that_end_soon_after_each_other_are_grounded_together(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    ground = answerer.ground

    def noted(prompts: Any, *rest: Any) -> Any:
        passes.append(len(prompts))
        return ground(prompts, *rest)

    monkeypatch.setattr(answerer, "ground", noted)
    limits = [2, 3, 3, 4, *[20] * 8]
    asked = [AnswerRequest(picture(i), QUESTIONS[0], max_tokens=n, grounding="summary") for i, n in enumerate(limits)]
    plain = AnswerRequest(picture(12), QUESTIONS[0], max_tokens=2)
    batch = AnswerBatch(answerer)
    rows = batch.join([*asked, plain])
    came: dict[int, int] = {}
    step = 1
    while len(batch):
        step += 1
        came |= {rows.index(row): step for row in batch.step()}
    assert came[12] == 2  # who asks for no grounding waits for nobody
    assert [came[i] for i in range(4)] == [3, 3, 3, 4 + STEPS]
    assert [came[i] for i in range(4, 12)] == [20] * 8
    assert passes == [3, 1, 8]
    passes.clear()
    (row,) = batch.join(asked[:1])
    assert list(batch.step()) == [row]  # nothing else runs
