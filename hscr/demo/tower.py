"""Stage 1 of the demo base: a pool of rendered slices, and a tiny CLIP tower trained densely on it, patch by patch.

A tower trained on one label an image spreads the whole answer over every token, and dropping 70 % of the tokens then
changes nothing (design notes, section 8). Here each patch is asked what is in it: lesion or marker, its attributes,
the structures, the side, the plane. The heads are thrown away afterwards.

Axes: S pool slices, P = 64 patches, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from hscr.demo.data import BALANCED, draw_lesion, draw_marker
from hscr.demo.language import LOOKS, PARTS, REGIONS, SIDES, SIZES
from hscr.demo.slices import PATCH, SIZE, Facts, Slice, render
from hscr.demo.volumes import PLANES, load_template

GRID = SIZE // PATCH
MEAN, STD = 0.3, 0.3
NOTHING_FROM = 0.4  # share of the steps after which empty patches are asked for attributes too
POOL_NUMBER = 100  # splits are numbered below; the pool's generators never meet theirs

TOWER_CONFIG = CLIPVisionConfig(
    hidden_size=160, intermediate_size=512, num_hidden_layers=5, num_attention_heads=5, image_size=SIZE,
    patch_size=PATCH, num_channels=3, hidden_act="gelu", attention_dropout=0.0, initializer_factor=1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """Rendered slices with their facts and patch targets. -1 in a class target means: not asked here."""

    images: Tensor  # uint8 [S, R, C]
    facts: list[Facts]
    lesion: Tensor  # float [S, P] this patch holds a good part of the lesion
    marker: Tensor  # float [S, P] the marker's middle lies in this patch
    parts: Tensor  # float [S, P, 12] this structure fills at least 6 % of the patch
    lesion_facts: Tensor  # long [S, 4] side, region, size, look
    marker_facts: Tensor  # long [S, 2] side, structure
    plane: Tensor  # long [S]


def draw_pool_slice(rng: np.random.Generator) -> Slice:
    """A training slice, balanced, with a lesion in 60 % and a marker in 50 % of the slices."""
    template = load_template("09a")
    while True:
        lesion = draw_lesion(rng, BALANCED) if rng.random() < 0.6 else None
        marker = draw_marker(rng, BALANCED) if rng.random() < 0.5 else None
        for index in rng.permutation(len(PLANES)):
            drawn = render(rng, template, PLANES[index], lesion, marker, contrasts=0.1, tries=8)
            if drawn is not None:
                return drawn


def render_pool(size: int, seed: int) -> Iterator[tuple[int, int] | Pool]:
    """Yields (done, size) now and then and the Pool at last."""
    rows: list[tuple[Tensor, ...]] = []
    facts: list[Facts] = []
    for index in range(size):
        drawn = draw_pool_slice(np.random.default_rng([seed, POOL_NUMBER, index]))
        facts.append(drawn.facts)
        rows.append(_targets(drawn))
        if index % 200 == 199:
            yield index + 1, size
    images, *targets = (torch.stack(column) for column in zip(*rows, strict=True))
    yield Pool(images, facts, *targets)


def _patches(pixels: np.ndarray) -> np.ndarray:
    """[R, C] -> [P, pixels a patch]."""
    return pixels.reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, -1)


def _targets(drawn: Slice) -> tuple[Tensor, ...]:
    mass = _patches(drawn.lesion_mask).sum(1)
    lesion = mass >= max(min(0.3 * mass.sum(), 60.0), 1.0)
    marker = np.zeros(GRID * GRID)
    if drawn.marker_centre:
        marker[(drawn.marker_centre[0] // PATCH) * GRID + drawn.marker_centre[1] // PATCH] = 1
    structure = _patches(drawn.structure)
    parts = np.stack([(structure == i + 1).sum(1) >= 12 for i in range(len(PARTS))], axis=1)
    lesion_facts, marker_facts = [-1] * 4, [-1] * 2
    if (wish := drawn.facts.lesion) is not None:
        lesion_facts = [SIDES.index(wish.side) if wish.side else -1, REGIONS.index(wish.region)]
        lesion_facts += [SIZES.index(wish.size), LOOKS.index(wish.look)]
    if (mark := drawn.facts.marker) is not None:
        marker_facts = [SIDES.index(mark.side) if mark.side else -1, PARTS.index(mark.structure)]
    return (
        torch.from_numpy(drawn.image),
        torch.from_numpy(lesion).float(),
        torch.from_numpy(marker).float(),
        torch.from_numpy(parts).float(),
        torch.tensor(lesion_facts),
        torch.tensor(marker_facts),
        torch.tensor(PLANES.index(drawn.facts.plane)),
    )


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [S, R, C] -> what the processor makes of them: float [S, 3, R, C]."""
    scaled = (images.float() / 255.0 - MEAN) / STD
    return scaled[:, None].expand(-1, 3, -1, -1)


# Slices of the one output vector a patch gets from the head. The attributes of lesion and marker have a last class
# "nothing here", asked of every other patch: so they stand in the tokens that hold the thing and in no other. Without
# it a token's own side is in every token, their mean says nothing, and the decoder never learned left from right.
_HEADS = {
    "lesion": 1, "marker": 1, "parts": len(PARTS), "plane": 3,
    "l_side": 3, "l_region": len(REGIONS) + 1, "l_size": 3, "l_look": 3, "m_side": 3, "m_part": len(PARTS) + 1,
}  # fmt: skip


def dense_loss(outputs: Tensor, pool: Pool, rows: Tensor, nothing: bool = True) -> tuple[Tensor, dict[str, float]]:
    """The sum of all patch losses and a few accuracies. outputs [B, P, sum of head sizes].

    nothing: whether patches without lesion or marker are asked for the class "nothing here" too.
    """
    head = dict(zip(_HEADS, outputs.split(list(_HEADS.values()), dim=-1), strict=True))
    lesion, marker = pool.lesion[rows], pool.marker[rows]
    patches = lesion.shape[1]
    rare = torch.tensor(3.0)  # one patch in eighty is positive
    loss = 2 * F.binary_cross_entropy_with_logits(head["lesion"][..., 0], lesion, pos_weight=rare)
    loss = loss + 2 * F.binary_cross_entropy_with_logits(head["marker"][..., 0], marker, pos_weight=rare)
    loss = loss + 2 * F.binary_cross_entropy_with_logits(head["parts"], pool.parts[rows])
    plane = pool.plane[rows][:, None].expand(-1, patches)
    loss = loss + 0.5 * F.cross_entropy(head["plane"].flatten(0, 1), plane.flatten())
    metrics = {}
    for names, where, facts in (
        (("l_side", "l_region", "l_size", "l_look"), lesion > 0, pool.lesion_facts[rows]),
        (("m_side", "m_part"), marker > 0, pool.marker_facts[rows]),
    ):
        image = where.nonzero()[:, 0]
        for column, name in enumerate(names):
            logits, target = head[name][where], facts[image, column]
            logits, target = logits[target >= 0], target[target >= 0]
            weight = 1.0 if name in ("l_region", "m_part") else 0.5
            if len(target):
                loss = loss + weight * F.cross_entropy(logits, target)
                metrics[name] = (logits.argmax(-1) == target).float().mean().item()
            if nothing:
                empty = head[name][~where]
                last = torch.full((len(empty),), empty.shape[-1] - 1)
                loss = loss + weight * F.cross_entropy(empty, last)
    found = head["lesion"][..., 0] > 0
    metrics["lesion"] = (found == (lesion > 0)).all(1).float().mean().item()
    metrics["present"] = (found.any(1) == (lesion > 0).any(1)).float().mean().item()
    metrics["marker"] = (head["marker"][..., 0].argmax(1) == marker.argmax(1))[marker.any(1)].float().mean().item()
    metrics["parts"] = ((head["parts"] > 0) == (pool.parts[rows] > 0)).float().mean().item()
    return loss, metrics


def fast_precision() -> torch.autocast:
    """bfloat16 autocast where the CPU multiplies it natively (about three times as fast), else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_tower(
    tower: CLIPVisionModel, pool: Pool, steps: int, seed: int, batch: int = 48, lr: float = 1.2e-3
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train in place; yields (step, metrics) every 50 steps."""
    torch.manual_seed(seed)
    width = tower.config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_HEADS.values())))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    order = torch.Generator().manual_seed(seed)
    tower.train()
    tower.set_attn_implementation("eager")  # at 65 tokens three times as fast as SDPA on a CPU
    queue = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(len(pool.images), generator=order)
        rows, queue = queue[:batch], queue[batch:]
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, 100)
        pixels = _jitter(to_pixels(pool.images[rows]), order)
        with fast_precision():
            hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
            outputs = head(hidden)
        # Asked from the start, "nothing here" keeps the attributes on their plateau for thousands of steps more.
        loss, metrics = dense_loss(outputs.float(), pool, rows, nothing=step >= NOTHING_FROM * steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49 or step + 1 == steps:
            yield step + 1, {"loss": loss.item()} | metrics
    tower.eval()


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Fresh gain, offset and noise on every visit, so that a pool can be seen several times."""
    n = len(pixels)
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, generator=generator)
    noise = 0.06 * torch.randn(n, 1, SIZE, SIZE, generator=generator)
    return pixels * gain + 0.05 * torch.randn(n, 1, 1, 1, generator=generator) + noise


@torch.no_grad()
def encode_pool(tower: CLIPVisionModel, images: Tensor, fast: bool = False, batch: int = 32) -> Tensor:
    """Features [S, P, D] in float16: what LLaVA takes from the last layer with the class token left out."""
    tower.eval()
    tower.set_attn_implementation("eager")
    chunks = []
    for start in range(0, len(images), batch):
        with fast_precision() if fast else nullcontext():
            out = tower(pixel_values=to_pixels(images[start : start + batch]), output_hidden_states=True)
        chunks.append(out.hidden_states[-1][:, 1:].half())
    return torch.cat(chunks)
