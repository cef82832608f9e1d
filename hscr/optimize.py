"""Multi-level preference optimisation of a LoRA adapter: the loop, its batch plan, checkpoints and resume. Paper §3.3.

The policy is the model with its adapter, the reference the same model with the adapter off; reference log-probabilities are computed once,
by the same route, and kept with the run. A run that was killed resumes from its last whole checkpoint and ends with the weights
of the uninterrupted run (CPU: bit for bit), because the batch plan and every float it depends on are stored.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hscr.artifacts import write_json
from hscr.attention_choice import SDPA, Attention, Guarded, chosen
from hscr.checkpoints import restore_checkpoint, save_checkpoint
from hscr.config import OptimizationConfig
from hscr.images import Images
from hscr.losses import RecordLogProbs, record_loss
from hscr.model import VLM, checkpoint_gradients, encode_answer, encode_prompts, reference_policy
from hscr.packing import answer_logits, token_logprobs
from hscr.processes import add_up, gathered, own_share, rank, told
from hscr.records import PreferenceRecord, VQARecord
from hscr.token_budget import TokenBudget, budget_batches
from hscr.visual_tokens import derived_seed

_READ = {"sft": 0, "dpo": 1}  # levels that an objective reads, where not all: the others are not scored

# Of a forward on a CPU: its products are at their full rate there, and more tokens only leave its caches and take memory.
CPU_TOKENS = 1024


@dataclass(frozen=True)
class TrainStep:
    """One optimiser step: `step` of `total` (from 1), batch means of the metrics, the digest of a checkpoint written after it, the
    tokens that a forward may have, below `OptimizationConfig.token_budget` once the device ran out of memory, and the attention taken."""

    step: int
    total: int
    metrics: dict[str, float]
    checkpoint: str | None
    token_budget: int
    attention: Attention = SDPA


@dataclass(frozen=True)
class Item:
    """A preference record ready to score: y_w and its levels as token ids."""

    record: VQARecord
    answers: list[list[int]]

    @property
    def n_tokens(self) -> Tensor:
        """[1 + J]"""
        return torch.tensor([len(a) for a in self.answers], dtype=torch.float32)


def optimize(
    vlm: VLM,
    preferences: Sequence[PreferenceRecord],
    open_image: Callable[[VQARecord], Images],
    config: OptimizationConfig,
    folder: Path,
    *,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[TrainStep]:
    """Train the adapter that `add_lora` put on `vlm`, yielding every step; resumes from FOLDER/checkpoints where there is one.

    With several processes (hscr/processes.py) all of them call this alike; each scores its share of every step.

    Stops early, after a checkpoint, once `should_stop()`: the last step yielded then has step < total. Raises ValueError where no record
    can teach anything under `config` (no levels and no supervised term).
    """
    supervised = config.anchor > 0 or config.objective == "sft"
    needed = 2 if config.objective == "implicit" else 1  # implicit pairs are among the levels
    useful = [p for p in preferences if p.levels or supervised]
    if not supervised and not any(len(p.levels) >= needed for p in useful):
        few = "a usable level" if needed == 1 else "two levels, which the implicit objective compares"
        raise ValueError(f"no record has {few}; see the reasons in preferences.jsonl")
    items = [
        Item(
            p.record,
            [
                encode_answer(vlm, p.record.question, text)
                for text in (p.record.answer, *(level.text for level in p.levels[: _READ.get(config.objective)]))
            ],
        )
        for p in useful
    ]
    checkpoint_gradients(vlm, config.gradient_checkpointing)
    budget = TokenBudget(config.token_budget)
    # Before a checkpoint is restored: the policy may have begun as its own reference.
    attention = SDPA
    if rank() == 0:

        def scored(blocks: bool) -> None:
            def first(tokens: int) -> None:
                score_first(vlm, items[: config.batch_size], open_image, tokens, config, blocks)

            # Flex may need more memory than there is; that must not halve what SDPA works with.
            first(budget.tokens) if blocks else budget.within(first)

        attention = chosen(vlm, config.attention, folder, len(items) * config.epochs, scored)
        guard = Guarded(attention, folder)
        guard(lambda: _keep_reference(vlm, items, open_image, config, budget, folder / "reference.json", guard))
        attention = guard.attention
    guard = Guarded(told(attention), folder if rank() == 0 else None)
    reference = [torch.tensor(row) for row in told(_kept(folder / "reference.json") if rank() == 0 else None)]
    plan = batch_plan(len(items), config.batch_size, config.epochs, seed)
    parameters = {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    checkpoints = folder / "checkpoints"
    state = restore_checkpoint(checkpoints, plan, parameters, optimizer)
    budget.tokens = min(budget.tokens, state.get("token_budget", budget.tokens))
    for step in range(state.get("step", 0) + 1, len(plan) + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step, len(plan), config.lr_schedule, config.warmup_ratio)
        batch = plan[step - 1]

        def gradients(tokens: int, batch: list[int] = batch) -> dict[str, list[float]]:
            optimizer.zero_grad(set_to_none=True)  # also of an attempt that ran out of memory half-way
            metrics: defaultdict[str, list[float]] = defaultdict(list)
            share = own_share(batch)
            for part, scored in answer_logprobs(
                vlm,
                [items[i] for i in share],
                open_image,
                tokens,
                checkpointing=config.gradient_checkpointing,
                blocks=guard.attention.blocks,
            ):
                losses = []
                for at, policy in zip(part, scored, strict=True):
                    item, own = items[share[at]], reference[share[at]].to(policy.device)
                    loss, values = record_loss(RecordLogProbs(policy, own, item.n_tokens.to(policy.device)), config)
                    losses.append(loss)
                    for name, value in values.items():
                        metrics[name].append(value)
                (torch.stack(losses).sum() / len(batch)).backward()
            return metrics

        shares = gathered(guard(lambda gradients=gradients: budget.within(gradients)))  # type: ignore[misc]
        add_up(parameters.values())
        metrics = {name: [v for own in shares for v in own.get(name, ())] for own in shares for name in own}
        budget.tokens = min(gathered(budget.tokens))
        guard.agree(gathered(guard.attention))
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        means |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
        # Before the step: clipping an infinite gradient gives NaN, and no checkpoint may hold that.
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                raise ArithmeticError(f"{name} is {means[name]} at step {step}; a smaller lr or gamma may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop = any(gathered(should_stop()))
        digest = None
        if stop or step % config.checkpoint_every == 0 or step == len(plan):
            state = {"step": step, "plan": plan, "token_budget": budget.tokens}
            digest = told(save_checkpoint(checkpoints, state, parameters, optimizer) if rank() == 0 else None)
        yield TrainStep(step, len(plan), means, digest, budget.tokens, guard.attention)
        if stop:
            return


def batch_plan(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Which records make up each step: every epoch a seeded permutation, its last batch as short as it comes."""
    plan = []
    for epoch in range(epochs):
        stream = torch.Generator().manual_seed(derived_seed("plan", seed, epoch))
        order = torch.randperm(n, generator=stream).tolist()
        plan += [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return plan


def lr_factor(step: int, total: int, schedule: str, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (from 1): linear warm-up, then constant, linear or cosine decay to zero."""
    warmup = round(warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    progress = (step - 1 - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[schedule]


def answer_logprobs(
    vlm: VLM,
    items: Sequence[Item],
    open_image: Callable[[VQARecord], Images],
    budget: int,
    *,
    checkpointing: bool = False,
    blocks: bool = False,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Summed log-probabilities [1 + J] of records' answers, one forward a batch of at most `budget` tokens.

    Yields indices into `items` and their tensors, a batch at a time, so that the caller can let go of a batch's graph before the next. A
    record takes the same route (hscr/packing.py) whatever its batch: in bfloat16 routes differ by up to 0.04 nats.
    """
    prompts = encode_prompts(vlm, [open_image(i.record) for i in items], [i.record.question for i in items])
    lengths = [len(p.input_ids) + sum(map(len, i.answers)) for p, i in zip(prompts, items, strict=True)]
    if vlm.device.type == "cpu":
        budget = min(budget, CPU_TOKENS)
    for part in budget_batches(lengths, budget):
        answers = [items[i].answers for i in part]
        logits = answer_logits(vlm, [prompts[i] for i in part], answers, checkpointing=checkpointing, blocks=blocks)
        yield (
            part,
            [
                torch.stack([token_logprobs(row, ids).sum() for row, ids in zip(rows, own, strict=True)])
                for rows, own in zip(logits, answers, strict=True)
            ],
        )


def _kept(path: Path) -> list[list[float]]:
    """JSON keeps every float exactly."""
    rows: list[list[float]] = json.loads(path.read_text())
    return rows


def _keep_reference(
    vlm: VLM,
    items: Sequence[Item],
    open_image: Callable[[VQARecord], Images],
    config: OptimizationConfig,
    budget: TokenBudget,
    path: Path,
    guard: Guarded,
) -> None:
    """Write log π_sft of every answer, adapter off, to `path` unless it is there."""
    if not path.is_file():
        rows: list[list[float]] = []
        with torch.no_grad(), reference_policy(vlm):
            for start in range(0, len(items), config.batch_size):
                chunk = items[start : start + config.batch_size]

                def scored(tokens: int, chunk: Sequence[Item] = chunk) -> dict[int, list[float]]:
                    batches = answer_logprobs(
                        vlm,
                        chunk,
                        open_image,
                        tokens,
                        checkpointing=config.gradient_checkpointing,
                        blocks=guard.attention.blocks,
                    )
                    return {i: sums.tolist() for part, made in batches for i, sums in zip(part, made, strict=True)}

                made = budget.within(scored)
                rows += [made[i] for i in range(len(chunk))]
        write_json(path, rows)


def score_first(
    vlm: VLM,
    items: Sequence[Item],
    open_image: Callable[[VQARecord], Images],
    tokens: int,
    config: OptimizationConfig,
    blocks: bool,
) -> None:
    """Forward and backward of the first records that share a pass; gradients are thrown away."""
    batches = answer_logprobs(
        vlm, items, open_image, tokens, checkpointing=config.gradient_checkpointing, blocks=blocks
    )
    _, sums = next(batches)
    torch.stack([own.sum() for own in sums]).sum().backward()
    vlm.model.zero_grad(set_to_none=True)
