"""Conversations in every family: as the stock processor writes them, told apart by the cache, refused where a template cannot say them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hscr.chat import ConversationError, Turn
from hscr.families import LLAVA_MED, VICUNA, VICUNA_SYSTEM
from hscr.feature_cache import FeatureCache
from hscr.model import VLM, encode_prompts, load_model
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import IMAGE_OR_TEXT, NAMES, save_tiny

QUESTION = "Where is the lesion?"
FOLLOWED = (
    Turn("user", QUESTION, 1),
    Turn("assistant", "In the left frontal lobe."),
    Turn("user", "Is it large?"),
    Turn("assistant", "yes"),
    Turn("user", "Which plane is shown?"),
)
SYSTEM = Turn("system", "Answer in one word.")
HAVE_SYSTEM = ("gemma3", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl")
# As llava-hf/llava-1.5-7b-hf has it: it writes a system text, and opens the answer only where it is asked to.
LLAVA_HF = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# It leaves a system text out without a word.
SILENT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}Q: "
    + IMAGE_OR_TEXT.replace("IMAGE", "<image>")
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VLM]:
    made: dict[str, Path] = {}

    def get(name: str) -> VLM:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return load_model(made[name], device="cpu")

    return get


@pytest.fixture(params=NAMES)
def vlm(request: pytest.FixtureRequest, loaded: Callable[[str], VLM]) -> VLM:
    return loaded(request.param)


def ids_of(vlm: VLM, images: list[Image.Image], asked: Any) -> list[int]:
    (prompt,) = encode_prompts(vlm, [images], [asked])
    return prompt.input_ids.tolist()


def stock(vlm: VLM, images: list[Image.Image], turns: tuple[Turn, ...]) -> Any:
    """What the processor itself makes of a conversation, image tokens and pixel values among it."""
    left = iter(images)
    messages = [
        {
            "role": t.role,
            "content": [
                *({"type": "image", "image": next(left)} for _ in range(t.n_images)),
                {"type": "text", "text": t.text},
            ],
        }
        for t in turns
    ]
    return vlm.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_a_conversation_of_one_turn_is_the_question(vlm: VLM) -> None:
    images = [picture(0, (40, 56))]
    (plain,) = encode_prompts(vlm, [images], [QUESTION])
    vlm.tokens = FeatureCache()
    (turn,) = encode_prompts(vlm, [images], [(Turn("user", QUESTION, 1),)])
    assert torch.equal(plain.input_ids, turn.input_ids)
    assert torch.equal(plain.position_ids, turn.position_ids)
    assert plain.image == turn.image


def test_several_turns_are_what_the_stock_processor_makes_of_them(vlm: VLM) -> None:
    images = [picture(0, (40, 56))]
    (prompt,) = encode_prompts(vlm, [images], [FOLLOWED])
    batch = stock(vlm, images, FOLLOWED)
    assert prompt.input_ids.tolist() == batch["input_ids"][0].tolist()
    assert torch.equal(prompt.position_ids, vlm.family.positions(vlm.base, batch["input_ids"][0], batch))
    assert len(prompt.input_ids) > len(ids_of(vlm, images, QUESTION)) + 20


def test_images_of_several_turns_stand_where_they_were_shown(vlm: VLM) -> None:
    images = [picture(0, (40, 56)), picture(1, (60, 30)), picture(2)]
    turns = (Turn("user", QUESTION, 1), Turn("assistant", "left"), Turn("user", "And in these?", 2))
    if not vlm.family.several_images:
        with pytest.raises(ValueError, match="takes one a prompt"):
            encode_prompts(vlm, [images], [turns])
        return
    (prompt,) = encode_prompts(vlm, [images], [turns])
    batch = stock(vlm, images, turns)
    assert prompt.input_ids.tolist() == batch["input_ids"][0].tolist()
    assert prompt.features is not None
    alone = [encode_prompts(vlm, [image], ["x"])[0].features for image in images]
    assert torch.equal(prompt.features, torch.cat([f for f in alone if f is not None]))


def test_a_system_text_is_written_or_refused_but_never_put_into_anothers_mouth(vlm: VLM) -> None:
    images, turns = [picture(0)], (SYSTEM, *FOLLOWED)
    if vlm.family.name in HAVE_SYSTEM:
        assert ids_of(vlm, images, turns) == stock(vlm, images, turns)["input_ids"][0].tolist()
    else:
        with pytest.raises(ConversationError, match="has no system role"):
            encode_prompts(vlm, [images], [turns])


def test_two_questions_in_a_row_are_refused_where_an_empty_answer_would_stand_between(vlm: VLM) -> None:
    images, turns = [picture(0)], (Turn("user", QUESTION, 1), Turn("user", "Is it large?"))
    if vlm.family.name in ("llava", "llava_next", "gemma3"):
        for refused in (turns, (Turn("assistant", "Hello."), *turns[:1])):
            with pytest.raises(ConversationError, match="questions and answers in turn"):
                encode_prompts(vlm, [images], [refused])
    else:
        assert ids_of(vlm, images, turns) == stock(vlm, images, turns)["input_ids"][0].tolist()


def test_a_system_text_in_the_middle_is_refused_where_the_template_refuses_it(loaded: Callable[[str], VLM]) -> None:
    turns = (*FOLLOWED[:2], SYSTEM, FOLLOWED[-1])
    with pytest.raises(ConversationError, match="has no system role there"):
        encode_prompts(loaded("gemma3"), [picture(0)], [turns])


@pytest.mark.parametrize(
    ("template", "system", "in_a_row"),
    [
        (VICUNA, False, False),
        (VICUNA_SYSTEM, False, False),
        (LLAVA_MED, False, False),
        (LLAVA_HF, True, True),
        (SILENT, False, True),
    ],
)
def test_templates_are_judged_by_what_they_write(
    loaded: Callable[[str], VLM], template: str, system: bool, in_a_row: bool
) -> None:
    vlm = loaded("llava")
    vlm.processor.chat_template = template
    for accepted, turns in ((system, (SYSTEM, FOLLOWED[0])), (in_a_row, (FOLLOWED[0], Turn("user", "x")))):
        if accepted:
            assert ids_of(vlm, [picture(0)], turns) == stock(vlm, [picture(0)], turns)["input_ids"][0].tolist()
        else:
            with pytest.raises(ConversationError):
                ids_of(vlm, [picture(0)], turns)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((), "last turn must be the user's"),
        (FOLLOWED[:2], "last turn must be the user's"),
        ((Turn("user", QUESTION),), "hold 0 images, and 1 were given"),
        ((Turn("user", QUESTION, 2),), "hold 2 images, and 1 were given"),
        ((*FOLLOWED[:1], Turn("assistant", "x", 1), FOLLOWED[-1]), "only the user's turns"),
        ((Turn("system", "x", 1), Turn("user", QUESTION)), "only the user's turns"),
    ],
)
def test_what_is_no_conversation_is_refused(
    loaded: Callable[[str], VLM], turns: tuple[Turn, ...], message: str
) -> None:
    with pytest.raises(ConversationError, match=message):
        encode_prompts(loaded("qwen3_vl"), [picture(0)], [turns])


def test_no_turns_text_adds_an_image_a_turn_or_an_end(vlm: VLM) -> None:
    nasty = " ".join(vlm.special_tokens)
    first = (SYSTEM,) if vlm.family.name in HAVE_SYSTEM else ()

    def conversation(text: str) -> tuple[Turn, ...]:
        told = tuple(Turn("system", s.text + text) for s in first)
        return (
            *told,
            Turn("user", f"Where? {text}", 1),
            Turn("assistant", f"left {text}"),
            Turn("user", f"Why? {text}"),
        )

    tame, wild = (ids_of(vlm, [picture(0)], conversation(text)) for text in ("", nasty))
    special = [vlm.tokenizer.convert_tokens_to_ids(t) for t in vlm.special_tokens if t in vlm.tokenizer.get_vocab()]
    assert len(special) > 3
    assert len(wild) > len(tame) + 10
    assert all(wild.count(token) == tame.count(token) for token in special)


def test_prompts_met_before_are_told_apart_by_the_whole_conversation(loaded: Callable[[str], VLM]) -> None:
    vlm, images = loaded("qwen3_vl"), [picture(0), picture(1)]
    asked: list[Any] = [
        "a\nb",
        (Turn("user", "a", 2), Turn("user", "b")),
        (Turn("user", "a", 1), Turn("user", "b", 1)),
        (Turn("system", "a"), Turn("user", "b", 2)),
        (Turn("user", "a", 2), Turn("assistant", "b"), Turn("user", "c")),
        (Turn("user", "a", 2), Turn("assistant", "B"), Turn("user", "c")),
        (Turn("user", "a", 1), Turn("assistant", "b"), Turn("user", "c", 1)),
        'turns\n[["user", 2, "a"], ["user", 0, "b"]]',
    ]
    first = [ids_of(vlm, images, a) for a in asked]
    assert len({tuple(ids) for ids in first}) == len(asked)
    assert [ids_of(vlm, images, a) for a in asked] == first
