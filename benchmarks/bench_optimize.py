"""Two epochs of multi-level preference optimisation: ours (what `hscr align` calls), naive MLPO, and TRL's DPOTrainer.

naive: every answer a forward of its own from pixels, policy and reference, all logits, at every step. TRL: its DPOTrainer on our TRL
export, a pair (y_w, level) a row, as it comes (gradient checkpointing on) and with it off; it covers j of MLPO's j + j(j − 1)/2 pairs. Ours
starts with cold caches: tower and reference log-probabilities are in its time. Losses and gradients are compared with the naive ones first.

Seconds are processor time of the one thread, which other work on the machine moves less than the clock.

python -m benchmarks.bench_optimize [--quick] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.child import arguments_of, interleaved, measured, run, with_stock_tower
from benchmarks.llava import Shape, report, save_data, save_llava
from hscr.config import OptimizationConfig, preset
from hscr.images import decode_image
from hscr.losses import RecordLogProbs, record_loss
from hscr.model import VLM, add_lora, encode_answer, load_model
from hscr.optimize import Item, answer_logprobs, lr_factor, optimize
from hscr.records import PreferenceRecord, read_preferences

METHODS = ("naive", "trl", "trl_no_checkpointing", "hscr", "hscr_one_record_a_forward")
EPOCHS, BATCH = 2, 4
QUESTION_TEMPLATE = "USER: <image>\n{} ASSISTANT:"


def configuration() -> OptimizationConfig:
    """What `hscr align` has by default but for the batch: few records must still make several steps."""
    return dataclasses.replace(preset("recommended").optimization, epochs=EPOCHS, batch_size=BATCH)


def naive_logprobs(vlm: VLM, data: Path, preference: PreferenceRecord) -> torch.Tensor:
    """Summed log-probabilities [1 + J], a plain forward from pixels an answer."""
    image = decode_image(data / preference.record.image)
    sums = []
    for text in (preference.record.answer, *(level.text for level in preference.levels)):
        prompt = vlm.processor(
            images=[image], text=QUESTION_TEMPLATE.format(preference.record.question), return_tensors="pt"
        )
        answer = torch.tensor([encode_answer(vlm, preference.record.question, text)], device=vlm.device)
        ids = torch.cat([prompt["input_ids"].to(vlm.device), answer], dim=1)
        pixels = prompt["pixel_values"].to(vlm.device, vlm.base.dtype)
        logits = vlm.model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
        own = logits[0, -answer.shape[1] - 1 : -1].float().log_softmax(-1)
        sums.append(own.gather(-1, answer[0, :, None]).sum())
    return torch.stack(sums)


def naive_backward(vlm: VLM, data: Path, batch: Sequence[PreferenceRecord], config: OptimizationConfig) -> float:
    """Accumulate the gradient of a step; its loss."""
    total = 0.0
    for preference in batch:
        with torch.no_grad(), vlm.model.disable_adapter():
            reference = naive_logprobs(vlm, data, preference)
        policy = naive_logprobs(vlm, data, preference)
        texts = (preference.record.answer, *(level.text for level in preference.levels))
        n = torch.tensor([len(encode_answer(vlm, preference.record.question, t)) for t in texts], dtype=torch.float32)
        loss, _ = record_loss(RecordLogProbs(policy, reference, n.to(policy.device)), config)
        (loss / len(batch)).backward()
        total += float(loss.detach()) / len(batch)
    return total


def naive(vlm: VLM, data: Path, preferences: Sequence[PreferenceRecord], config: OptimizationConfig) -> None:
    """The same steps with the same optimiser."""
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr)
    steps = [list(preferences[i : i + BATCH]) for _ in range(EPOCHS) for i in range(0, len(preferences), BATCH)]
    for number, batch in enumerate(steps, 1):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(
            number, len(steps), config.lr_schedule, config.warmup_ratio
        )
        naive_backward(vlm, data, batch, config)
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trl(model: Any, processor: Any, data: Path, levels: int, *, checkpointing: bool) -> Any:
    """A DPOTrainer of a loaded model, ready to train on our export; LoRA on the same modules. A record's pairs share a batch."""
    import os

    from datasets import Image, List, load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from hscr.export import write_export
    from hscr.families import family_of

    write_export(read_preferences(data / "preferences.jsonl"), "trl", data / "trl.jsonl")
    os.chdir(data)  # image paths are relative to it
    rows = load_dataset("json", data_files="trl.jsonl", split="train", cache_dir=str(data / "cache"))
    config = configuration()
    cuda = torch.cuda.is_available()
    return DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(data / "trl"),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=levels,
            gradient_accumulation_steps=BATCH,
            gradient_checkpointing=checkpointing,
            learning_rate=config.lr,
            report_to=[],
            save_strategy="no",
            use_cpu=not cuda,
            bf16=cuda,
            max_length=None,
            disable_tqdm=True,
        ),
        train_dataset=rows.cast_column("images", List(Image())),
        processing_class=processor,
        peft_config=LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=family_of("llava", "bench").language_model_linear,
        ),
    )


def same_gradients(model: Path, data: Path, *, tolerance: float = 1e-4) -> None:
    """AssertionError unless ours and the naive route agree in a step's loss and in every LoRA gradient, the adapter moved before."""
    preferences, config = list(read_preferences(data / "preferences.jsonl"))[:2], configuration()
    gradients = []
    losses = []
    for ours in (False, True):
        vlm = load_model(model)
        add_lora(vlm, config, seed=0)
        torch.manual_seed(1)
        with torch.no_grad():  # B starts at zero, and the policy would be the reference
            for name, parameter in vlm.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        if ours:
            losses.append(_our_backward(vlm, data, preferences, config))
        else:
            losses.append(naive_backward(vlm, data, preferences, config))
        gradients.append({n: p.grad for n, p in vlm.model.named_parameters() if p.requires_grad})
    assert abs(losses[0] - losses[1]) < tolerance * max(abs(losses[0]), 1), losses
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None
        assert other is not None
        assert float((gradient - other).norm()) < tolerance * float(gradient.norm()) + 1e-7, name


def _our_backward(vlm: VLM, data: Path, preferences: Sequence[PreferenceRecord], config: OptimizationConfig) -> float:
    items = [
        Item(
            p.record, [encode_answer(vlm, p.record.question, t) for t in (p.record.answer, *(x.text for x in p.levels))]
        )
        for p in preferences
    ]

    def logprobs() -> dict[int, torch.Tensor]:
        batches = answer_logprobs(vlm, items, lambda r: decode_image(data / r.image), config.token_budget)
        return {i: row for part, rows in batches for i, row in zip(part, rows, strict=True)}

    with torch.no_grad(), vlm.model.disable_adapter():
        reference = logprobs()
    policy = logprobs()
    losses = [
        record_loss(RecordLogProbs(policy[i], reference[i], item.n_tokens.to(vlm.device)), config)[0]
        for i, item in enumerate(items)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return float(loss.detach())


def child(method: str, model: Path, data: Path, levels: int, count: bool) -> None:
    """One measured run of a method; `count`: its floating-point operations in place of its time."""
    torch.set_num_threads(1)
    preferences, config = list(read_preferences(data / "preferences.jsonl")), configuration()
    if method.startswith("trl"):
        import contextlib
        import io

        from transformers import AutoModelForImageTextToText, AutoProcessor

        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = trl(loaded, AutoProcessor.from_pretrained(model), data, levels, checkpointing=method == "trl")

        def work() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
    else:
        vlm = load_model(model, feature_cache=Path(tempfile.mkdtemp(dir=data)))
        add_lora(vlm, config, seed=0)
        out = Path(tempfile.mkdtemp(dir=data))

        def work() -> None:
            if method == "naive":
                with_stock_tower(vlm.base)
                naive(vlm, data, preferences, config)
            else:
                tokens = 1 if method == "hscr_one_record_a_forward" else config.token_budget
                own = dataclasses.replace(config, token_budget=tokens)
                for _ in optimize(vlm, preferences, lambda r: decode_image(data / r.image), own, out):
                    pass

    def counted() -> dict[str, float]:
        if not count:
            work()
            return {}
        with FlopCounterMode(display=False) as counter:
            work()
        return {"flops": float(counter.get_total_flops())}

    measured(counted)


def main() -> None:
    args = arguments_of(
        "Optimisation, side by side.", lambda p: p.add_argument("--records", type=int, default=8, help="records a run")
    )
    if args.child:
        method, model, data, levels, count = args.child
        child(method, Path(model), Path(data), int(levels), count == "count")
        return
    settings = [(60, 3)] if args.quick else [(10, 3), (60, 3), (200, 3), (60, 1), (60, 7)]
    records, repeats = (4, 1) if args.quick else (args.records, args.repeats)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_llava(Path(folder) / "model", Shape())
        for tokens, levels in settings:
            data = Path(folder) / f"{tokens}-{levels}"
            save_data(data, records, tokens, levels)
            same_gradients(model, data)

            def call(method: str, count: str = "", data: Path = data, levels: int = levels) -> dict[str, float]:
                return run("benchmarks.bench_optimize", ["--child", method, model, data, levels, count])

            found = interleaved({m: lambda m=m: call(m) for m in METHODS}, repeats)  # type: ignore[misc]
            for method in METHODS:
                seconds = found[method]["seconds"] / (EPOCHS * records)
                flops = call(method, "count")["flops"] / (EPOCHS * records)
                rows.append(
                    {
                        "answer tokens": tokens,
                        "levels": levels,
                        "method": method,
                        "ms a record and epoch": 1000 * seconds,
                        "GFLOP": flops / 1e9,
                        "peak MB": found[method]["peak_mb"],
                        "speed, naive = 1": found["naive"]["seconds"] / found[method]["seconds"],
                        "memory, naive = 1": found[method]["peak_mb"] / found["naive"]["peak_mb"],
                    }
                )
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    report("Optimisation: two epochs, cold caches, medians", rows, args.json)


if __name__ == "__main__":
    main()
