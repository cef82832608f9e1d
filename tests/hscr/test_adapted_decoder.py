"""The training pass of plain decoders: which models take it, and that LoRA's gradients are autograd's over the stock forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hscr.adapted_decoder import AdaptedDecoder
from hscr.config import OptimizationConfig
from hscr.model import VLM, add_lora, checkpoint_gradients, encode_answer, encode_prompts, load_model
from hscr.packing import answer_logits, packed_logits
from hscr.parent import load_parent
from hscr.prompt_attention import Layout, attend, attend_backward
from hscr.visual_tokens import Prompt, dropped
from tests.hscr.tiny import picture

QUESTION = "Where is the lesion?"
GROUPS = [["There is a large lesion in the left lobe.", "no", "A small dark lesion."], ["axial", "no"]]


@pytest.fixture
def batch(vlm: VLM) -> tuple[list[Prompt], list[list[list[int]]]]:
    """Two prompts of different length, answers of different number and length."""
    whole, other = encode_prompts(vlm, [picture(0), picture(1)], [QUESTION, "Is there a lesion in the right lobe?"])
    ids = [[encode_answer(vlm, QUESTION, a) for a in group] for group in GROUPS]
    return [whole, dropped(other, 0.5, 1)], ids


def adapted(vlm: VLM, config: OptimizationConfig) -> None:
    """LoRA as after some steps: B is not zero."""
    add_lora(vlm, config, seed=0)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def gradients(vlm: VLM, logits: list[list[Tensor]]) -> dict[str, Tensor]:
    """Of a sum in which every answer has a weight of its own."""
    vlm.model.zero_grad(set_to_none=True)
    rows = [row for group in logits for row in group]
    sum((n + 1) * row.log_softmax(-1)[:, 5].sum() for n, row in enumerate(rows)).backward()  # type: ignore[union-attr]
    return {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["", r".*language_model\.layers.*\.(k_proj|down_proj)"])
def test_logits_and_gradients_are_those_of_the_packed_row(vlm: VLM, batch: Any, targets: str) -> None:
    prompts, ids = batch
    adapted(vlm, OptimizationConfig(lora_rank=3, lora_alpha=5, lora_targets=targets))
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    ours, stock = decoder.answer_logits(prompts, ids), packed_logits(vlm, prompts, ids)
    for left, right in zip([x for g in ours for x in g], [x for g in stock for x in g], strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-5)
    mine, its = gradients(vlm, ours), gradients(vlm, stock)
    assert mine.keys() == its.keys()
    largest = max(float(g.abs().max()) for g in its.values())
    assert largest > 0.1
    for name, gradient in its.items():
        # The stock route itself is up to 2e-6 from float64 here; test_packing.py has the loss's own gradients, within 2e-6.
        assert float((gradient - mine[name]).abs().max()) < 8e-6 * largest, name


def test_with_the_adapter_off_it_is_the_reference(vlm: VLM, batch: Any) -> None:
    prompts, ids = batch
    base = packed_logits(vlm, prompts, ids)[0][0]
    adapted(vlm, OptimizationConfig(lora_rank=2))
    with torch.no_grad(), vlm.model.disable_adapter():
        decoder = AdaptedDecoder.of(vlm)
        assert decoder is not None
        torch.testing.assert_close(decoder.answer_logits(prompts, ids)[0][0], base, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        assert float((packed_logits(vlm, prompts, ids)[0][0] - base).abs().max()) > 1e-2


def test_of_the_last_layer_prompts_have_keys_and_values_only(
    vlm: VLM, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, ids = batch
    asked: list[tuple[int, int]] = []

    def noting(q: Tensor, k: Tensor, *args: Any) -> Any:
        asked.append((len(q), len(k)))
        return attend(q, k, *args)

    monkeypatch.setattr("hscr.adapted_layer.attend", noting)
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    decoder.answer_logits(prompts, ids)
    answers = sum(len(a) for group in ids for a in group)
    whole = sum(len(p.input_ids) - 1 for p in prompts) + answers
    assert asked == [(whole, whole)] * (len(decoder.layers) - 1) + [(answers, whole)]


def test_features_for_the_last_layer_are_nobodys(vlm: VLM, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many deeper features as layers: behind the last, the visual tokens they belong to are not computed any more."""
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    embedded, layers = AdaptedDecoder._embedded, len(decoder.layers)

    def logits(n: int) -> list[list[Tensor]]:
        def deep(self: AdaptedDecoder, ids: Tensor, prompts: Any) -> tuple[Tensor, list[Tensor], Tensor]:
            x, _, visual = embedded(self, ids, prompts)
            return x, [x[visual] + layer for layer in range(n)], visual

        monkeypatch.setattr(AdaptedDecoder, "_embedded", deep)
        return decoder.answer_logits(*batch)

    some, all_but_one, all_of_them = logits(0), logits(layers - 1), logits(layers)
    assert torch.equal(all_of_them[0][0], all_but_one[0][0])
    assert not torch.equal(all_of_them[0][0], some[0][0])


def test_weights_that_change_before_the_backward_pass_and_second_derivatives_are_refused(vlm: VLM, batch: Any) -> None:
    """As autograd does; gradients of other weights than the forward's would be wrong and say nothing."""
    adapted(vlm, OptimizationConfig(lora_rank=2))
    decoder = AdaptedDecoder.of(vlm)
    assert decoder is not None
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        loss = decoder.answer_logits(*batch)[0][0].sum()
        weight = next(p for n, p in vlm.model.named_parameters() if f"layers.0.{part}.lora_A" in n)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        (first,) = torch.autograd.grad(decoder.answer_logits(*batch)[0][0].sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_dropout_counts_in_training_mode_only(vlm: VLM, tiny_folder: Path, tmp_path: Path) -> None:
    """A parent's adapter may have it, and is trained in eval mode, so that the policy begins as the reference."""
    lora = LoraConfig(target_modules=vlm.family.language_model_linear, lora_dropout=0.05)
    get_peft_model(vlm.model, lora).save_pretrained(tmp_path)
    parent = load_model(tiny_folder, device="cpu")
    load_parent(parent, tmp_path, trainable=True)
    checkpoint_gradients(parent, False)
    assert AdaptedDecoder.of(parent) is not None
    parent.model.train()
    assert AdaptedDecoder.of(parent) is None


@pytest.mark.parametrize("odd", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_an_adapter_that_is_more_than_lora_is_left_to_the_stock_forward(vlm: VLM, odd: dict[str, Any]) -> None:
    vlm.model = get_peft_model(vlm.model, LoraConfig(target_modules=vlm.family.language_model_linear, **odd))
    assert AdaptedDecoder.of(vlm) is None


def test_weights_that_are_trained_beside_lora_keep_autograd(vlm: VLM, batch: Any) -> None:
    """A parent may have them (modules_to_save, bias): here they would get no gradient, and nothing would tell."""
    lora = LoraConfig(target_modules=vlm.family.language_model_linear, modules_to_save=["input_layernorm"])
    vlm.model = get_peft_model(vlm.model, lora)
    assert AdaptedDecoder.of(vlm) is None
    found = gradients(vlm, answer_logits(vlm, *batch))
    assert [n for n in found if "input_layernorm" in n]


def test_two_adapters_and_other_precisions_are_left_to_the_stock_forward(vlm: VLM) -> None:
    add_lora(vlm, OptimizationConfig(lora_rank=2), seed=0)
    assert AdaptedDecoder.of(vlm) is not None
    vlm.model.add_adapter("other", LoraConfig(target_modules=vlm.family.language_model_linear))
    vlm.model.base_model.set_adapter(["default", "other"])
    assert AdaptedDecoder.of(vlm) is None
    vlm.model.base_model.set_adapter("default")
    assert AdaptedDecoder.of(vlm) is not None
    vlm.model.bfloat16()
    assert AdaptedDecoder.of(vlm) is None


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("last", [False, True])
def test_attention_without_masks_is_attention_under_the_tree_mask(groups: int, last: bool) -> None:
    torch.manual_seed(0)
    layout = Layout.of([5, 3], [[2, 4], [1, 3, 2]])
    t = layout.answers[-1][-1].stop
    q, k, v = (torch.randn(t, h, 8, requires_grad=True) for h in (4, groups, groups))
    seen = torch.zeros(t, t, dtype=torch.bool)
    for prompt, answers in zip(layout.prompts, layout.answers, strict=True):
        seen[prompt, prompt] = True
        for answer in answers:
            seen[answer, prompt] = seen[answer, answer] = True
    seen &= torch.ones(t, t, dtype=torch.bool).tril()
    first = layout.n_prompt if last else 0
    own, keys, values = (x.repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
    rows = torch.nn.functional.scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=0.3)
    stock = rows.transpose(0, 1)[first:]
    grad = torch.randn_like(stock)
    wanted = torch.autograd.grad(stock, (q, k, v), grad)
    with torch.no_grad():
        out, lse = attend(q[first:], k, v, layout, 0.3)
        dq, dkv = attend_backward(grad, q[first:], k, v, out, lse, layout, 0.3)
    torch.testing.assert_close(out, stock.detach())
    torch.testing.assert_close(dq, wanted[0][first:])
    torch.testing.assert_close(dkv.unbind(1), wanted[1:])
