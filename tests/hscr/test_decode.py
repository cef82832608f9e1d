"""The decoding loop against stock `generate`, and what it promises about rows of a batch."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hscr.decode import decode
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.packing import packed_logits
from hscr.prefix import Rows
from hscr.trees import Trees
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.tiny import picture

QUESTIONS = ["Where is the lesion?", "Which plane?", "Is there a lesion in the left frontal lobe? yes no", "what"]


def prompts_of(vlm: VLM) -> list[Prompt]:
    return encode_prompts(vlm, [picture(i) for i in range(4)], QUESTIONS)


def test_greedy_equals_stock_generate_with_pixel_values(vlm: VLM) -> None:
    ours = decode(vlm, prompts_of(vlm), max_tokens=16)
    for i, question in enumerate(QUESTIONS):
        batch = vlm.processor(images=[picture(i)], text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        stock = vlm.model.generate(
            **batch, do_sample=False, max_new_tokens=16, suppress_tokens=[vlm.image_token_id], pad_token_id=0
        )
        assert ours[i] == stock[0, batch["input_ids"].shape[1] :].tolist()
    assert len({tuple(row) for row in ours}) == 4  # the answers differ, so equality says something


@pytest.mark.parametrize("seed", range(4))
def test_a_row_does_not_depend_on_its_batch_mates(vlm: VLM, seed: int) -> None:
    """Random mixes of prompts, dropped prompts, prefixes, limits and temperatures, in random order."""
    prompts = prompts_of(vlm)
    prefix = encode_answer(vlm, QUESTIONS[0], "There is a large lesion")[:-1]
    rows = []
    for i, p in enumerate(prompts):
        rows += [(p, [], 8, 0.0, i), (dropped(p, 0.7, i, 0), prefix[: i + 1], 5, 0.0, i), (p, prefix, 6, 1.0, i)]
    chosen = random.Random(seed).sample(rows, 5)
    together = decode(
        vlm,
        [r[0] for r in chosen],
        [r[1] for r in chosen],
        max_tokens=[r[2] for r in chosen],
        temperature=[r[3] for r in chosen],
        seeds=[r[4] for r in chosen],
    )
    for (p, x, limit, heat, stream), made in zip(chosen, together, strict=True):
        assert decode(vlm, [p], [x], max_tokens=limit, temperature=heat, seeds=[stream])[0] == made


def test_a_prefix_is_continued_not_repeated(vlm: VLM) -> None:
    prompt = prompts_of(vlm)[0]
    whole = decode(vlm, [prompt], max_tokens=10)[0]
    assert decode(vlm, [prompt], [whole[:4]], max_tokens=6)[0] == whole[4:]
    other = encode_answer(vlm, QUESTIONS[0], "right right right")[:-1]
    assert decode(vlm, [prompt], [other], max_tokens=6)[0] != whole[4:]


@pytest.mark.parametrize("ratio", [0.0, 0.7])
def test_the_cached_loop_equals_the_plain_route_without_a_cache(vlm: VLM, ratio: float) -> None:
    for i, prompt in enumerate(prompts_of(vlm)):
        cut = dropped(prompt, ratio, i, 0)
        made = decode(vlm, [cut], max_tokens=10)[0]
        with torch.no_grad():
            logits = packed_logits(vlm, [cut], [[made]])[0][0]
        logits[:, vlm.image_token_id] = -torch.inf
        assert logits.argmax(-1).tolist() == made


def test_sampling_has_one_stream_a_row(vlm: VLM) -> None:
    prompt = prompts_of(vlm)[0]
    a, b, again = decode(vlm, [prompt] * 3, max_tokens=12, temperature=2.0, seeds=[1, 2, 1])
    assert a == again != b
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert decode(vlm, [prompt], max_tokens=12, temperature=2.0, seeds=[1])[0] == a
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone


def test_a_small_temperature_tends_to_greedy_and_never_overflows(vlm: VLM) -> None:
    prompt = prompts_of(vlm)[0]
    greedy = decode(vlm, [prompt], max_tokens=6)[0]
    for heat in (1e-3, 1e-30, 1e-45, float("nan")):
        assert decode(vlm, [prompt], max_tokens=6, temperature=heat, seeds=[3])[0] == greedy


def test_the_image_token_is_never_produced(vlm: VLM) -> None:
    """The image token is made a hundred times as likely (in logits) as the first greedy one: stock argmax would take it."""
    prompt = prompts_of(vlm)[0]
    first = decode(vlm, [prompt], max_tokens=1)[0][0]
    with torch.no_grad():
        vlm.base.lm_head.weight[vlm.image_token_id] = 100 * vlm.base.lm_head.weight[first]
        wanted = packed_logits(vlm, [prompt], [[[first]]])[0][0][0].argmax()
    assert int(wanted) == vlm.image_token_id
    for heat in (0.0, 1.0):
        assert vlm.image_token_id not in decode(vlm, [prompt], max_tokens=20, temperature=heat)[0]


def test_rows_end_with_end_of_sequence_or_at_their_limit(vlm: VLM) -> None:
    """With the end of sequence made likely on one step only one row stops; the other goes on to its limit."""
    prompts = prompts_of(vlm)
    free = decode(vlm, prompts[:2], max_tokens=6)
    end = free[0][2]
    assert end not in free[0][:2]
    vlm.base.generation_config.eos_token_id = [end, 2]
    stopped, other = decode(vlm, prompts[:2], max_tokens=[6, 4])
    assert stopped == free[0][:3]
    assert other == free[1][:4] or other[-1] == end
    assert decode(vlm, prompts[:2], max_tokens=[0, 2])[0] == []
    assert decode(vlm, [], max_tokens=3) == []


def test_rows_of_one_prompt_share_its_prefill(vlm: VLM) -> None:
    """Ten rows over two prompts, each prefix the beginning of the longest: the tokens of rows decoded alone, no column computed twice."""
    prompts, prefix = prompts_of(vlm), encode_answer(vlm, QUESTIONS[0], "There is a large lesion")[:-1]
    first, second = prompts[0], dropped(prompts[1], 0.7, 1, 0)
    rows = [(p, prefix[:n]) for p in (first, second) for n in (0, 3, 1, 5, 2)]
    alone = [decode(vlm, [p], [x], max_tokens=8)[0] for p, x in rows]
    computed: list[int] = []
    hook = vlm.base.get_input_embeddings().register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    assert decode(vlm, [p for p, _ in rows], [x for _, x in rows], max_tokens=8) == alone
    hook.remove()
    assert computed[0] == 2 * (len(first.input_ids) - 1)
    assert computed[1] == 2 * (1 + 5)
    assert all(n <= 10 for n in computed[2:])


def test_a_token_budget_bounds_the_cache_and_changes_no_row(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(vlm) * 2
    expected = decode(vlm, prompts, max_tokens=6)
    width = max(len(p.input_ids) for p in prompts)
    sizes: list[int] = []

    def counting(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(rows: Any, *args: Any) -> Tensor:
            made = stock(rows, *args)
            sizes.append(rows.cache.layers[0].keys[:, 0, :, 0].numel())
            return made

        return counted

    monkeypatch.setattr(Trees, "_forward", counting(Trees._forward))
    monkeypatch.setattr(Rows, "logits", counting(Rows.logits))
    budget = 2 * (width + 2 * 6)  # two prompts, each with two answers
    assert decode(vlm, prompts, max_tokens=6, token_budget=budget) == expected
    assert budget / 2 < max(sizes) <= budget
    sizes.clear()
    assert decode(vlm, prompts[:4], max_tokens=6, token_budget=3 * (width + 6)) == expected[:4]
    assert max(sizes) <= 3 * (width + 6)
    assert decode(vlm, prompts, max_tokens=6, token_budget=1) == expected


def test_finished_rows_leave_the_batch(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(vlm)
    expected = [row[:n] for row, n in zip(decode(vlm, prompts, max_tokens=12), (2, 12, 3, 2), strict=True)]
    stock, rows = vlm.model.forward, []

    def counted(*args: object, **kwargs: object) -> object:
        rows.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        return stock(*args, **kwargs)

    monkeypatch.setattr(vlm.model, "forward", counted)
    assert decode(vlm, prompts, max_tokens=[2, 12, 3, 2]) == expected
    assert rows == [4, 4, 2] + [1] * 9


def test_a_row_ends_where_its_caller_says(vlm: VLM) -> None:
    """Each row after a number of tokens of its own; the others' tokens stay."""
    prompts = prompts_of(vlm)
    whole, asked = decode(vlm, prompts, max_tokens=8), []

    def ended(row: int, ids: Sequence[int]) -> bool:
        asked.append(row)
        return len(ids) == row + 2

    assert decode(vlm, prompts, max_tokens=8, ended=ended) == [ids[: row + 2] for row, ids in enumerate(whole)]
    assert len(asked) == 2 + 3 + 4 + 5
