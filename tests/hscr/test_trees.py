"""Trees of columns: their layout by hand, what they compute, what they find computed; and attention in groups of heads."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hscr.decode import decode
from hscr.grouped_attention import NAME, grouped_sdpa
from hscr.model import VLM, encode_answer, encode_prompts
from hscr.packing import packed_logits, remembered_logits
from hscr.trees import Column, Prefixes, Trees, branches
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.tiny import picture

QUESTIONS = ["Where is the lesion?", "Is there a lesion in the left frontal lobe? yes no"]
ANSWERS = ["There is a large lesion in the left lobe.", "no"]


@pytest.fixture
def prompts(vlm: VLM) -> list[Prompt]:
    """A prompt and another with visual tokens dropped: of different length."""
    whole = encode_prompts(vlm, [picture(0), picture(1)], QUESTIONS)
    return [whole[0], dropped(whole[1], 0.7, 1, 0)]


def test_branches_by_hand() -> None:
    """Chain 9 5 6. 9 5 6 8 continues it; 9 5 7 leaves it after 5; 9 5 7 4 goes on there; 9 5 is in it, but its last token has a column."""
    columns, paths = branches([9, 5, 6], [[9, 5, 6, 8], [9, 5, 7], [9, 5, 7, 4], [9, 5], [9, 5]])
    assert columns == [
        Column(8, depth=3, chain=3, parent=None),
        Column(7, depth=2, chain=2, parent=None),
        Column(4, depth=3, chain=2, parent=1),
        Column(5, depth=1, chain=1, parent=None),
    ]
    assert paths == [[0], [1], [1, 2], [3], [3]]
    assert branches([], [[9, 5], [9]])[1] == [[0, 1], [0]]


def test_what_was_scored_is_not_computed_again(vlm: VLM, prompts: list[Prompt]) -> None:
    """Continuations of the scored answers' beginnings, one that leaves them, and none: a column each, and the tokens of rows alone."""
    ids = [encode_answer(vlm, q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    other = ids[1][0]
    rows = [(prompts[0], x) for x in (ids[0][:5], ids[0][:2], [*ids[0][:3], other], [])] + [
        (prompts[1], []),
        (prompts[1], ids[1][:1]),
    ]
    alone = [decode(vlm, [p], [x], max_tokens=6)[0] for p, x in rows]
    known = Prefixes()
    with torch.no_grad():
        scored = remembered_logits(vlm, prompts, ids, known)
        for own, prompt, answer in zip(scored, prompts, ids, strict=True):
            torch.testing.assert_close(own, packed_logits(vlm, [prompt], [[answer]])[0][0], atol=3e-5, rtol=1e-5)
    computed: list[tuple[int, ...]] = []
    hook = vlm.base.get_input_embeddings().register_forward_pre_hook(lambda _, args: computed.append(args[0].shape))
    assert decode(vlm, [p for p, _ in rows], [x for _, x in rows], max_tokens=6, known=known) == alone
    hook.remove()
    assert computed[0] == (2, 4)
    assert len({tuple(row) for row in alone}) > 3


def test_continuations_leave_and_prompts_with_them(vlm: VLM, prompts: list[Prompt]) -> None:
    """Limits that end the first prompt's answers first: what stays says what it says alone."""
    tails = [encode_answer(vlm, QUESTIONS[0], a)[:-1] for a in ("left", "There is", "a large", "in the")]
    rows = [(p, tail) for tail in tails for p in prompts]
    limits = [2, 9, 1, 7, 3, 5, 2, 8]
    alone = [decode(vlm, [p], [x], max_tokens=n)[0] for (p, x), n in zip(rows, limits, strict=True)]
    assert decode(vlm, [p for p, _ in rows], [x for _, x in rows], max_tokens=limits) == alone
    with torch.no_grad():
        trees = Trees(vlm, [p for p, _ in rows], [x for _, x in rows], room=3)
        trees.logits()
        trees.keep([1, 5])
        trees.append([4, 5])
    assert trees.cache.get_seq_length() > 0
    assert len(trees.cache.layers[0].keys) == len(trees.ids) == 1  # type: ignore[arg-type]


def test_siblings_that_see_each_other_are_noticed(vlm: VLM, prompts: list[Prompt]) -> None:
    """The trap: under a plain causal mask the second continuation reads the first."""
    tails = [encode_answer(vlm, QUESTIONS[0], a) for a in ANSWERS]
    with torch.no_grad():
        right = Trees(vlm, [prompts[0]] * 2, tails).path_logits()[1]
        trees = Trees(vlm, [prompts[0]] * 2, tails)
        trees.mask[:, :, -trees.new :] = torch.ones(trees.new, trees.new, dtype=torch.bool).tril()
        assert float((trees.path_logits()[1] - right).abs().max()) > 0.1


@pytest.mark.parametrize("queries", [1, 5, 80])
def test_grouped_attention_equals_stock_attention_and_copies_no_keys(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In values and gradients; 80 queries are more than 2·G·d = 32, where stock attention is the smaller one."""
    stream = torch.Generator().manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    query, key, value = (torch.randn(2, h, n, 8, generator=stream) for h, n in ((6, queries), (2, 90), (2, 90)))
    mask = torch.rand(2, 1, queries, 90, generator=stream) > 0.4
    mask[..., 0] = True
    heads, made = [], []
    stock = F.scaled_dot_product_attention

    def noted(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        heads.append(k.shape[1])
        return stock(q, k, *args, **kwargs)

    for attend in (sdpa_attention_forward, grouped_sdpa):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", noted)
            out, _ = attend(module, *leaves, mask, scaling=0.3)  # type: ignore[operator]
        out.pow(2).sum().backward()
        made.append([out, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b)
    assert heads[1] == (6 if queries == 80 else 2)


def test_a_loaded_decoder_attends_in_groups(vlm: VLM) -> None:
    assert vlm.base.config.get_text_config()._attn_implementation == NAME
    assert vlm.base.config.vision_config._attn_implementation == "sdpa"
