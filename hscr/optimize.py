"""Multi-level preference optimisation of a LoRA adapter: the loop, its batch plan, checkpoints and resume. Paper §3.3.

The policy is the model with its adapter, the reference the same model with the adapter off; reference log-probabilities are computed once,
by the same packed route, and kept with the run. A run that was killed resumes from its last whole checkpoint and ends with the weights
of the uninterrupted run (CPU: bit for bit), because the batch plan and every float it depends on are stored.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hscr.artifacts import verify_manifest, write_json, write_manifest
from hscr.config import OptimizationConfig
from hscr.images import Images
from hscr.losses import RecordLogProbs, record_loss
from hscr.model import VLM, encode_answer, encode_prompts, reference_policy
from hscr.packing import packed_logits, token_logprobs
from hscr.records import PreferenceRecord, VQARecord
from hscr.visual_tokens import derived_seed

_READ = {"sft": 0, "dpo": 1}  # levels that an objective reads, where not all: the others are not scored


@dataclass(frozen=True)
class TrainStep:
    """One optimiser step: `step` of `total` (from 1), batch means of the metrics, and the digest of a checkpoint written after it."""

    step: int
    total: int
    metrics: dict[str, float]
    checkpoint: str | None


@dataclass(frozen=True)
class _Item:
    """A preference record ready to score: y_w and its levels as token ids."""

    record: VQARecord
    answers: list[list[int]]


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
        _Item(
            p.record,
            [
                encode_answer(vlm, p.record.question, text)
                for text in (p.record.answer, *(level.text for level in p.levels[: _READ.get(config.objective)]))
            ],
        )
        for p in useful
    ]
    reference = _reference(vlm, items, open_image, config, folder / "reference.json")
    plan = batch_plan(len(items), config.batch_size, config.epochs, seed)
    parameters = {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    checkpoints = folder / "checkpoints"
    done = _restore(checkpoints, plan, parameters, optimizer)
    for step in range(done + 1, len(plan) + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(step, len(plan), config.lr_schedule, config.warmup_ratio)
        batch = plan[step - 1]
        metrics: defaultdict[str, list[float]] = defaultdict(list)
        for start in range(0, len(batch), config.micro_batch_size):
            part = batch[start : start + config.micro_batch_size]
            sums = answer_logprobs(vlm, [items[i] for i in part], open_image)
            losses = []
            for index, (policy, n_tokens) in zip(part, sums, strict=True):
                loss, values = record_loss(RecordLogProbs(policy, reference[index].to(policy.device), n_tokens), config)
                losses.append(loss)
                for name, value in values.items():
                    metrics[name].append(value)
            (torch.stack(losses).sum() / len(batch)).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        means |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
        # Before the step: clipping an infinite gradient gives NaN, and no checkpoint may hold that.
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means[name]):
                raise ArithmeticError(f"{name} is {means[name]} at step {step}; a smaller lr or gamma may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop = should_stop()
        digest = None
        if stop or step % config.checkpoint_every == 0 or step == len(plan):
            digest = _save(checkpoints, step, plan, parameters, optimizer)
        yield TrainStep(step, len(plan), means, digest)
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
    vlm: VLM, items: Sequence[_Item], open_image: Callable[[VQARecord], Images]
) -> list[tuple[Tensor, Tensor]]:
    """Summed log-probabilities [1 + J] and token counts [1 + J] of each record's answers, one packed forward."""
    prompts = encode_prompts(vlm, [open_image(i.record) for i in items], [i.record.question for i in items])
    out = []
    for item, logits in zip(items, packed_logits(vlm, prompts, [i.answers for i in items]), strict=True):
        sums = torch.stack([token_logprobs(row, ids).sum() for row, ids in zip(logits, item.answers, strict=True)])
        out.append((sums, torch.tensor([len(a) for a in item.answers], dtype=torch.float32, device=sums.device)))
    return out


def _reference(
    vlm: VLM,
    items: Sequence[_Item],
    open_image: Callable[[VQARecord], Images],
    config: OptimizationConfig,
    path: Path,
) -> list[Tensor]:
    """log π_sft of every answer, adapter off; read back from `path` where it is there (JSON keeps every float exactly)."""
    if not path.is_file():
        rows: list[list[float]] = []
        with torch.no_grad(), reference_policy(vlm):
            for start in range(0, len(items), config.micro_batch_size):
                part = items[start : start + config.micro_batch_size]
                rows += [sums.tolist() for sums, _ in answer_logprobs(vlm, part, open_image)]
        write_json(path, rows)
    return [torch.tensor(row) for row in json.loads(path.read_text())]


def _save(
    checkpoints: Path, step: int, plan: list[list[int]], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> str:
    """Write checkpoints/step-N whole or not at all, then delete older ones. Tensors only, in safetensors: nothing is ever unpickled."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary, final = checkpoints / f".step-{step}.tmp", checkpoints / f"step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, temporary / "adapter.safetensors")
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, temporary / "optimizer.safetensors")
    write_json(temporary / "state.json", {"step": step, "plan": plan})
    digest = write_manifest(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for other in checkpoints.iterdir():
        if other != final:
            shutil.rmtree(other)
    return digest


def _restore(
    checkpoints: Path, plan: list[list[int]], parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load the newest whole checkpoint of this plan into the weights and the optimiser; its step, or 0 where there is none."""
    found = sorted(checkpoints.glob("step-*"), key=lambda p: -int(p.name.removeprefix("step-")))
    for folder in found:
        try:
            verify_manifest(folder)
        except ValueError:
            continue  # damaged: an older one, or the start, gives the same weights later
        state = json.loads((folder / "state.json").read_text())
        if state["plan"] != plan:
            continue
        weights, moments = load_file(folder / "adapter.safetensors"), load_file(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
                optimizer.state[parameter] = {
                    key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(state["step"])
    return 0
