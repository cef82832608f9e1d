"""Every family alike: dropout, precomputed features, packing, decoding and text that stays text; each guard shown to matter by its trap."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hscr.model
from hscr.adapted_decoder import AdaptedDecoder
from hscr.config import OptimizationConfig
from hscr.decode import decode
from hscr.families import (
    FAMILIES,
    LLAVA_MED,
    VICUNA,
    VICUNA_SYSTEM,
    Family,
    handed_with_deepstack,
    makes_features,
)
from hscr.families import plain_positions as counted_through
from hscr.feature_cache import FeatureCache
from hscr.image_text import _ids, _Written
from hscr.model import VLM, add_lora, decode_text, encode_answer, encode_prompts, load_model
from hscr.packing import packed_logits, row_logits, tree_logits
from hscr.plain_decoder import PlainDecoder, joined
from hscr.visual_tokens import Prompt, drop_visual_tokens, dropout_mask, dropped
from tests.hscr.tiny import picture
from tests.hscr.tiny_families import MADE, NAMES, save_tiny, stock_row

QUESTION = "Where is the lesion?"
ANSWER = "There is a large bright lesion in the left frontal lobe."
WIDE, TALL = (40, 56), (60, 30)  # not square: height and width have positions of their own
SEVERAL = [name for name in NAMES if FAMILIES[name].several_images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family on disk, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=NAMES)
def vlm(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> VLM:
    return load_model(folder(request.param), device="cpu")


def prompts_of(vlm: VLM) -> list[Prompt]:
    """Two prompts of different length; the second has two images where the family takes several."""
    second = [picture(1, TALL), picture(2, WIDE)] if vlm.family.several_images else picture(1, TALL)
    return encode_prompts(vlm, [picture(0, WIDE), second], [QUESTION, "Which plane is shown, and what is it?"])


def stock_inputs(vlm: VLM, images: list[Image.Image], question: str) -> Any:
    """What the processor itself makes of a conversation, pixel values and all."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# (1) dropout by removal


def test_removal_equals_a_mask_with_holes_and_compacted_positions_do_not(vlm: VLM) -> None:
    ids = encode_answer(vlm, QUESTION, ANSWER)
    for prompt in prompts_of(vlm):
        n = int((prompt.input_ids == vlm.image_token_id).sum())
        keep = dropout_mask(n, 0.7, 3)
        oracle = stock_row(vlm, prompt, ids, keep)
        cut = drop_visual_tokens(prompt, keep)
        assert difference(packed_logits(vlm, [cut], [[ids]])[0][0], oracle) < 5e-5
        compact = torch.arange(len(cut.input_ids)).expand(*cut.position_ids.shape)
        moved = dataclasses.replace(cut, position_ids=compact)
        assert difference(packed_logits(vlm, [moved], [[ids]])[0][0], oracle) > 1e-2
        assert difference(stock_row(vlm, prompt, ids), oracle) > 1e-2  # the dropped tokens mattered


# (2) precomputed features


def test_precomputed_features_equal_pixel_values(vlm: VLM) -> None:
    images = [picture(0, WIDE), picture(1, TALL)] if vlm.family.several_images else [picture(0, WIDE)]
    batch = stock_inputs(vlm, images, QUESTION)
    (prompt,) = encode_prompts(vlm, [images], [QUESTION])
    assert torch.equal(batch["input_ids"][0], prompt.input_ids)
    with torch.no_grad():
        stock = vlm.model(**batch).logits[0, -1]
    ours = packed_logits(vlm, [prompt], [[[vlm.eos_id]]])[0][0][0]
    assert difference(ours, stock) < 5e-5
    (other,) = encode_prompts(vlm, [[picture(5, i.size[::-1]) for i in images]], [QUESTION])
    assert difference(packed_logits(vlm, [other], [[[vlm.eos_id]]])[0][0][0], stock) > 1e-2


def test_greedy_decoding_equals_stock_generate_with_pixel_values(vlm: VLM) -> None:
    made = decode(vlm, prompts_of(vlm), max_tokens=12)
    asked = [
        ([picture(0, WIDE)], QUESTION),
        (
            [picture(1, TALL), picture(2, WIDE)][: 1 + vlm.family.several_images],
            "Which plane is shown, and what is it?",
        ),
    ]
    for row, (images, question) in zip(made, asked, strict=True):
        batch = stock_inputs(vlm, images, question)
        stock = vlm.model.generate(
            **batch, do_sample=False, max_new_tokens=12, suppress_tokens=vlm.placeholder_ids, pad_token_id=0
        )
        assert row == stock[0, batch["input_ids"].shape[1] :].tolist()
    assert made[0] != made[1]


def without_deepstack(features: Any, config: Any) -> Any:
    """The trap: what goes in after the first layers is lost, as it is where embeddings are made by hand."""
    out = handed_with_deepstack(features, config)
    out.deepstack_features = [[0 * x for x in layer] for layer in out.deepstack_features]
    return out


def counted_by_two(family: Family) -> dict[str, Any]:
    return {"positions": lambda *a: 2 * family.positions(*a)}


def in_another_order(family: Family) -> dict[str, Any]:
    return {"hand_over": lambda features, config: family.hand_over([x.flip(0) for x in features], config)}


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        *((name, trap) for name in NAMES for trap in (counted_by_two, in_another_order)),
        ("gemma3", {"masks": None}),  # token types forgotten: no bidirectional image attention
        ("qwen2_5_vl", {"positions": lambda *a: counted_through(*a).expand(3, -1)}),  # no M-RoPE
        ("qwen3_vl", {"positions": lambda *a: counted_through(*a).expand(3, -1)}),
        ("qwen3_vl", {"hand_over": without_deepstack}),
    ],
)
def test_a_family_described_wrongly_is_noticed(name: str, trap: Any, folder: Callable[[str], Path]) -> None:
    vlm = load_model(folder(name), device="cpu")
    batch = stock_inputs(vlm, [picture(0, WIDE)], QUESTION)
    with torch.no_grad():
        stock = vlm.model(**batch).logits[0, -1]
    vlm.family = dataclasses.replace(vlm.family, **(trap(vlm.family) if callable(trap) else trap))
    (prompt,) = encode_prompts(vlm, [picture(0, WIDE)], [QUESTION])
    assert difference(packed_logits(vlm, [prompt], [[[vlm.eos_id]]])[0][0][0], stock) > 1e-2


def test_the_tower_runs_once_a_distinct_image_also_among_several(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    stock = vlm.base.get_image_features

    def spy(**inputs: Any) -> Any:
        calls[0] += 1
        return stock(**inputs)

    monkeypatch.setattr(vlm.base, "get_image_features", spy)
    a, b = picture(0, WIDE), picture(1, TALL)
    groups = [[a, b], [b, a], [a]] if vlm.family.several_images else [[a], [b], [a]]
    prompts = encode_prompts(vlm, groups, ["x", "y", "z"])
    encode_prompts(vlm, [b], ["again"])
    assert calls == [2]
    assert len({p.image for p in prompts}) == (3 if vlm.family.several_images else 2)
    vlm.features = FeatureCache()
    alone = encode_prompts(vlm, groups[:1], ["x"])[0]
    assert alone.features is not None
    assert prompts[0].features is not None
    assert torch.equal(alone.features, prompts[0].features)


def test_a_prompt_met_before_is_the_same_without_the_processor(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images, questions = [picture(0), picture(1)], ["Where is it?", "Is it left or right?"]
    first = encode_prompts(vlm, images, questions)
    stock, seen = hscr.model.processed, []

    def counted(*args: Any) -> Any:
        seen.append(args[2])
        return stock(*args)

    monkeypatch.setattr(hscr.model, "processed", counted)
    again = encode_prompts(vlm, images, questions)
    assert not seen
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.position_ids, b.position_ids)
        assert a.position_ids.shape == b.position_ids.shape
        assert torch.equal(a.features, b.features)
        assert a.image == b.image
    vlm.features = FeatureCache()  # features are gone: the prompt alone is not enough
    encode_prompts(vlm, images[:1], questions[:1])
    assert len(seen) == 1


def test_another_question_on_a_known_image_is_written_as_the_processor_writes_it(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of two sizes; the second question comes with the first, the third when the image is known."""
    images = [picture(0), picture(1, (40, 28))]
    asked: list[Any] = ["Where is it?", "\nIs it <image> left, or right? ", "x"]
    encode_prompts(vlm, images, asked[:2])  # each with its own
    wanted = [(image, question, hscr.model.processed(vlm, [image], question)) for image in images for question in asked]

    def never(*args: Any) -> Any:
        raise AssertionError("processed again")

    monkeypatch.setattr(hscr.model, "processed", never)
    for image, question, batch in wanted:
        prompt = encode_prompts(vlm, [image], [question])[0]
        ids = batch["input_ids"][0]
        assert torch.equal(prompt.input_ids, ids)
        assert torch.equal(prompt.position_ids, vlm.family.positions(vlm.base, ids, batch))


def test_a_model_that_answered_holds_its_weights_once_and_is_saved_as_it_was_loaded(vlm: VLM, tmp_path: Path) -> None:
    def held() -> int:
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in vlm.base.parameters()}.values()
        )

    before, n_bytes = {name: t.clone() for name, t in vlm.base.state_dict().items()}, held()
    if PlainDecoder.of(vlm) is None:
        pytest.skip("no plain decoder")
    assert held() <= n_bytes
    vlm.base.save_pretrained(tmp_path / "saved")
    again = type(vlm.base).from_pretrained(tmp_path / "saved").state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in before.items())


@pytest.mark.parametrize(("dtype", "by_row"), [(torch.float32, False), (torch.bfloat16, True)])
def test_only_float32_weights_are_laid_input_by_input(dtype: torch.dtype, by_row: bool) -> None:
    """On a CPU: a product of bfloat16 takes twelve times as long so."""
    layers = [torch.nn.Linear(8, n, bias=False, dtype=dtype) for n in (6, 4)]
    before = [layer.weight.clone() for layer in layers]
    first, again = (joined(["a", "b"], layers) for _ in range(2))
    assert first.weight.is_contiguous() == by_row
    assert first.weight.data_ptr() == again.weight.data_ptr() == layers[0].weight.data_ptr()
    assert torch.equal(first.weight, torch.cat(before))
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_a_placeholder_is_repeated_as_a_token_only_where_it_is_one_beside_others() -> None:
    words = Tokenizer(models.WordLevel({"?": 0, "<image>": 1, "<image><image>": 2, "what": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    written = _Written("<image>", "<image>" * 2, 2, {})
    for added, ids in [([], [2, 3]), (["<image>"], [1, 1, 3])]:
        fast = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=added)
        assert _ids(SimpleNamespace(tokenizer=fast), "<image> what", written) == ids  # type: ignore[arg-type]


def test_a_processor_that_does_not_fit_its_model_is_named(folder: Callable[[str], Path]) -> None:
    vlm = load_model(folder("gemma3"), device="cpu")
    vlm.processor.full_image_sequence = "<start_of_image>" + "<image_soft_token>" * 9 + "<end_of_image>"
    with pytest.raises(ValueError, match="writes 9 visual tokens where its tower gives 16"):
        encode_prompts(vlm, [picture(0)], [QUESTION])


# (3) shared-prefix packing


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_packed_answers_of_a_padded_batch_equal_separate_stock_rows(vlm: VLM, how: str) -> None:
    vlm.model.set_attn_implementation(how)
    full = prompts_of(vlm)
    groups = [[ANSWER, "no", "A small dark lesion."], ["axial", "This is a coronal slice."]]
    ids = [[encode_answer(vlm, QUESTION, a) for a in group] for group in groups]
    together = packed_logits(vlm, full, ids)
    cut = packed_logits(vlm, [dropped(p, 0.7, i, 0) for i, p in enumerate(full)], ids)
    for b, prompt in enumerate(full):
        n = int((prompt.input_ids == vlm.image_token_id).sum())
        alone = dropped(prompt, 0.7, b, 0)
        for j, answer in enumerate(ids[b]):
            assert together[b][j].isfinite().all()
            assert difference(together[b][j], stock_row(vlm, prompt, answer)) < 5e-5
            assert difference(cut[b][j], packed_logits(vlm, [alone], [[answer]])[0][0]) < 5e-5
        assert n > len(alone.features if alone.features is not None else ())


def plain_logits(vlm: VLM, prompts: list[Prompt], ids: list[list[list[int]]]) -> list[list[Tensor]]:
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    return decoder.answer_logits(prompts, ids)


def test_trees_expanded_caches_and_plain_training_equal_the_packed_row_in_logits_and_gradients(vlm: VLM) -> None:
    full = prompts_of(vlm)
    prompts = [*full, *(dropped(p, 0.7, i, 0) for i, p in enumerate(full))]
    groups = [[ANSWER, "no", "A small dark lesion."], ["axial", "This is a coronal slice."]] * len(full)
    ids = [[encode_answer(vlm, QUESTION, a) for a in group] for group, _ in zip(groups, prompts, strict=False)]
    add_lora(vlm, OptimizationConfig(lora_rank=2), seed=0)
    weight = next(p for n, p in vlm.model.named_parameters() if "lora_B" in n and "v_proj" in n)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made = []
    plain = AdaptedDecoder.of(vlm)
    assert (plain is None) == (vlm.family.name == "gemma3")
    for route in (packed_logits, tree_logits, row_logits, *(() if plain is None else (plain_logits,))):
        logits = route(vlm, prompts, ids)
        vlm.model.zero_grad()
        sum(row.float().log_softmax(-1)[:, 5].sum() for group in logits for row in group).backward()  # type: ignore[union-attr]
        assert weight.grad is not None
        made.append((logits, weight.grad.clone()))
    (packed, by_packed), *others = made
    for other, by_other in others:
        for a, b in zip(packed, other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.shape == y.shape
                assert difference(x.detach(), y.detach()) < 5e-5
        assert float((by_packed - by_other).norm()) < 1e-4 * float(by_packed.norm())


def test_rows_of_one_prompt_decode_as_alone(vlm: VLM) -> None:
    """Prefixes of several lengths after shared prompts: the tokens of a row of its own, also with removed visual tokens."""
    prefix = encode_answer(vlm, QUESTION, ANSWER)[:-1]
    prompts = [p for i, full in enumerate(prompts_of(vlm)) for p in (full, dropped(full, 0.7, i, 0))]
    rows = [(p, prefix[:n]) for p in prompts for n in (0, 4, 1)]
    together = decode(vlm, [p for p, _ in rows], [x for _, x in rows], max_tokens=10)
    assert together == [decode(vlm, [p], [x], max_tokens=10)[0] for p, x in rows]
    assert len({tuple(row) for row in together}) > len(rows) / 2  # the answers differ, so equality says something


def test_answers_that_see_each_other_or_stand_elsewhere_are_noticed(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts_of(vlm)[0]
    ids = [encode_answer(vlm, QUESTION, ANSWER), encode_answer(vlm, QUESTION, "A small dark lesion.")]
    rows = [stock_row(vlm, prompt, answer) for answer in ids]

    def causal(segments: Tensor) -> Tensor:
        t = segments.shape[1]
        return torch.ones(len(segments), 1, t, t, dtype=torch.bool).tril()

    with monkeypatch.context() as patch:
        patch.setattr("hscr.packing.tree_mask", causal)
        assert difference(packed_logits(vlm, [prompt], [ids])[0][1], rows[1]) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(Prompt, "next_position", property(lambda self: int(self.position_ids.max()) + 5))
        assert difference(packed_logits(vlm, [prompt], [ids])[0][1], rows[1]) > 1e-2


def test_the_cached_loop_equals_the_plain_route_for_dropped_prompts_in_a_padded_batch(vlm: VLM) -> None:
    """Gemma 3's window (24) is shorter than its prompts: a cache or mask that counts columns would differ here."""
    cut = [dropped(p, 0.7, i, 0) for i, p in enumerate(prompts_of(vlm))]
    for prompt, made in zip(cut, decode(vlm, cut, max_tokens=10), strict=True):
        with torch.no_grad():
            logits = packed_logits(vlm, [prompt], [[made]])[0][0]
        logits[:, vlm.placeholder_ids] = -torch.inf
        assert logits.argmax(-1).tolist() == made


# LoRA, tokens, templates


def test_lora_lies_on_every_linear_layer_of_the_decoder_and_on_nothing_else(vlm: VLM) -> None:
    pattern = re.compile(vlm.family.language_model_linear)
    linear = [n for n, m in vlm.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hit = {n for n in linear if pattern.fullmatch(n)}
    layers = vlm.base.config.get_text_config().num_hidden_layers
    assert len(hit) == 7 * layers
    assert all(vlm.family.language_model in n.split(".") for n in hit)
    tower = [n for n in linear if n not in hit and "lm_head" not in n]
    assert tower
    assert all(makes_features(n) for n in tower)
    assert not any(makes_features(n) for n in (*hit, "lm_head"))
    add_lora(vlm, OptimizationConfig(lora_rank=2), seed=0)
    assert len([p for p in vlm.model.parameters() if p.requires_grad]) == 2 * len(hit)
    vlm.model = vlm.model.unload()
    for part in vlm.family.feature_modules:
        inside = [n for n in tower if part in n.split(".")]
        if inside:  # LLaVA-NeXT's image_newline is a bare parameter
            with pytest.raises(ValueError, match="matches the vision tower or its projector"):
                add_lora(vlm, OptimizationConfig(lora_targets=re.escape(inside[0])), seed=0)


def test_a_users_text_adds_no_image_no_turn_and_no_end(vlm: VLM) -> None:
    (plain,) = encode_prompts(vlm, [picture(0)], ["Where?"])
    nasty = "Where? " + " ".join(vlm.special_tokens)
    (prompt,) = encode_prompts(vlm, [picture(0)], [nasty])
    special = [vlm.tokenizer.convert_tokens_to_ids(t) for t in vlm.special_tokens if t in vlm.tokenizer.get_vocab()]
    assert len(special) > 3
    for token in special:
        assert (prompt.input_ids == token).sum() == (plain.input_ids == token).sum()
    answer = encode_answer(vlm, "Where?", "left " + " ".join(vlm.special_tokens))
    assert not set(answer[:-1]) & set(special)
    assert answer[-1] in vlm.eos_ids


def test_turn_markers_are_special_though_in_no_list_of_the_tokenizer(folder: Callable[[str], Path]) -> None:
    vlm = load_model(folder("gemma3"), device="cpu")
    assert "<end_of_turn>" not in vlm.tokenizer.all_special_tokens
    assert {"<start_of_turn>", "<end_of_turn>"} <= set(vlm.special_tokens)


def test_no_vision_placeholder_is_ever_said(vlm: VLM) -> None:
    """Each placeholder in turn is made a hundred times as likely (in logits) as the first greedy token."""
    prompt = prompts_of(vlm)[0]
    first = decode(vlm, [prompt], max_tokens=1)[0][0]
    counts = {"gemma3": 3, "qwen2_5_vl": 5, "qwen3_vl": 5, "idefics3": 7, "smolvlm": 7, "internvl": 4}
    assert vlm.image_token_id in vlm.placeholder_ids
    assert len(vlm.placeholder_ids) == counts.get(vlm.family.name, 1)  # those of the tiny vocabularies
    for token in vlm.placeholder_ids:
        with torch.no_grad():
            vlm.base.lm_head.weight[token] = 100 * vlm.base.lm_head.weight[first]
    with torch.no_grad():
        assert int(packed_logits(vlm, [prompt], [[[first]]])[0][0][0].argmax()) in vlm.placeholder_ids
    assert not set(vlm.placeholder_ids) & set(decode(vlm, [prompt], max_tokens=6)[0])


def test_an_answers_tokens_are_those_of_the_template_and_its_end_of_turn(vlm: VLM) -> None:
    ids = encode_answer(vlm, QUESTION, "left lobe")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left lobe"}]},
    ]
    whole = vlm.processor.apply_chat_template(chat, tokenize=False)
    tokens = vlm.tokenizer(whole, add_special_tokens=False)["input_ids"]
    at = max(i for i in range(len(tokens)) if tokens[i : i + len(ids)] == ids)
    assert at + len(ids) <= len(tokens)
    assert decode_text(vlm, ids) == "left lobe"
    end = {"gemma3": "<end_of_turn>"}.get(vlm.family.name, vlm.tokenizer.eos_token)
    assert vlm.tokenizer.convert_ids_to_tokens(ids[-1]) == end


@pytest.mark.parametrize("name", ["gemma3", "idefics3"])
def test_a_template_that_begins_the_sequence_gets_no_second_beginning(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The tokenizer of such a model adds its first token too, where it is not told not to."""
    from tokenizers.processors import TemplateProcessing

    vlm = load_model(folder(name), device="cpu")
    bos, bos_id = vlm.tokenizer.bos_token, vlm.tokenizer.bos_token_id
    vlm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    assert vlm.tokenizer("x")["input_ids"][0] == bos_id
    (prompt,) = encode_prompts(vlm, [picture(0)], [QUESTION])
    assert int((prompt.input_ids == bos_id).sum()) == 1


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA, "USER: <image>\nWhere? ASSISTANT: left</s>"),
        (
            VICUNA_SYSTEM,
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
            "and polite answers to the human's questions. USER: <image>\nWhere? ASSISTANT: left</s>",
        ),
        (LLAVA_MED, "[INST] <image>\nWhere? [/INST] left</s>"),
    ],
)
def test_default_prompt_forms(template: str, expected: str, folder: Callable[[str], Path]) -> None:
    """As the model cards of the conversions give them; the prompt is the beginning of the whole."""
    processor = load_model(folder("llava"), device="cpu").processor
    processor.chat_template = template
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    assert processor.apply_chat_template(chat, tokenize=False) == expected
    prompt = processor.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    assert expected == prompt + " left</s>"


def test_a_conversion_without_a_template_gets_its_familys_and_others_an_error(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    assert load_model(folder("llava_next"), device="cpu").processor.chat_template == LLAVA_MED
    bare = tmp_path / "gemma"
    shutil.copytree(folder("gemma3"), bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template.*gemma3.*chat_template\.jinja"):
        load_model(bare, device="cpu")


def test_an_unknown_architecture_is_named_with_where_to_add_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    with pytest.raises(
        ValueError, match=r"'paligemma' is not supported yet; supported: llava.*hscr/families.py.*docs/families.md"
    ):
        load_model(tmp_path)


def test_every_family_is_tested_here_and_documented() -> None:
    assert set(NAMES) == set(FAMILIES) == {"llava", *MADE}
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert all(f"`{name}`" in text for name in FAMILIES)


# 4-bit loading


def test_four_bits_are_for_the_decoder_alone(vlm: VLM) -> None:
    """By transformers' own rule; a bare "vision_tower" would match nothing and leave the tower quantised."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = {n for n, m in vlm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    pattern = re.compile(vlm.family.language_model_linear)
    assert {n for n in linear if should_convert_module(n, vlm.family.full_precision)} == {
        n for n in linear if pattern.fullmatch(n)
    }


def test_quantisation_that_cannot_be_had_is_a_clear_error(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="quantize: must be 4bit, not '3bit'"):
        load_model(folder("llava"), device="cpu", quantize="3bit")
    with pytest.raises(ValueError, match="quantize: 4-bit weights need a CUDA device, and this is cpu"):
        load_model(folder("llava"), device="cpu", quantize="4bit")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("hscr.model.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bitsandbytes is not installed; pip install 'hscr\[quantized\]'"):
        load_model(folder("llava"), device="cuda", quantize="4bit")
