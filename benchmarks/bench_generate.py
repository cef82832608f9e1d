"""Preference generation with five re-decoded answers a record: ours (what `hscr align` calls), the plain route, and HF generate.

All three run hscr.preferences.generate; what differs is how y_w is scored and tokens are decoded. naive: a full forward from pixels a
token and branch, dropped tokens behind a mask with holes. hf_generate: y_w in one forward from pixels a branch, every replacement and
every answer a call of `generate` from pixels (it compacts positions after dropped tokens, so its replacements may differ). Ours and naive
must say the same.

python -m benchmarks.bench_generate [--quick] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hscr.preferences
import hscr.replacement
from benchmarks.child import arguments_of, interleaved, measured, run, with_stock_tower
from benchmarks.llava import Shape, report, save_data, save_llava
from hscr.artifacts import bytes_digest
from hscr.config import PreferenceConfig, preset
from hscr.images import decode_image
from hscr.model import VLM, encode_prompts, load_model
from hscr.records import PreferenceRecord, VQARecord, read_records
from hscr.reward import Branches
from hscr.similarity import load_similarity
from hscr.visual_tokens import Prompt

Ended = Callable[[int, Sequence[int]], bool]
METHODS = ("naive", "hf_generate", "hscr")


def configuration(tokens: int) -> PreferenceConfig:
    """The default but for the continuation: answers decoded again after the last replacement cost the most. Every candidate is kept."""
    return dataclasses.replace(
        preset("recommended").preference,
        continuation="redecode",
        max_new_tokens=tokens,
        similarity="token_f1",
        n_levels=5,
        similarity_gap=0.0,
        max_similarity=1.0,
    )


class Plain:
    """The model asked from pixels: in place of hscr's `contrast` and `decode`."""

    def __init__(self, vlm: VLM, data: Path, records: Sequence[VQARecord], *, by_generate: bool) -> None:
        self.vlm = vlm
        self.by_generate = by_generate
        self.full: dict[str, tuple[Prompt, Tensor]] = {}
        for record in records:
            image = decode_image(data / record.image)
            prompt = encode_prompts(vlm, [image], [record.question])[0]
            pixels = vlm.processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
            self.full[prompt.image] = prompt, pixels.to(vlm.device, vlm.base.dtype)

    def inputs(self, prompt: Prompt, after: Sequence[int]) -> dict[str, Tensor]:
        """What stock forward and generate take; tokens that `prompt` has dropped are hidden by the mask."""
        whole, pixels = self.full[prompt.image]
        seen = torch.isin(whole.position_ids, prompt.position_ids).long()
        ids = torch.cat([whole.input_ids, torch.tensor(after, dtype=torch.long)])[None].to(self.vlm.device)
        mask = torch.cat([seen, torch.ones(len(after), dtype=torch.long)])[None].to(self.vlm.device)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    @torch.no_grad()
    def logits(self, prompt: Prompt, after: Sequence[int]) -> Tensor:
        """[T, V] over prompt and `after`."""
        inputs = self.inputs(prompt, after)
        positions = torch.arange(inputs["input_ids"].shape[1], device=self.vlm.device)[None]
        logits: Tensor = self.vlm.model(**inputs, position_ids=positions, use_cache=False).logits[0]
        return logits

    def scored(self, prompt: Prompt, ids: Sequence[int]) -> Tensor:
        """Log-softmax [A, V] of an answer's positions."""
        if self.by_generate:
            return self.logits(prompt, ids)[-len(ids) - 1 : -1].float().log_softmax(-1)
        return torch.stack([self.logits(prompt, ids[:n])[-1].float().log_softmax(-1) for n in range(len(ids))])

    def contrast(
        self, vlm: VLM, prompts: Sequence[Prompt], cuts: Iterable[Sequence[Prompt]], answers: Any, known: object
    ) -> list[Branches]:
        (cut,) = cuts
        return [
            Branches(self.scored(p, ids), self.scored(c, ids)) for p, c, ids in zip(prompts, cut, answers, strict=True)
        ]

    def decode(
        self,
        vlm: VLM,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        ended: Ended = lambda row, ids: False,
        **_: Any,
    ) -> list[list[int]]:
        rows = zip(prompts, prefixes, strict=True)
        return [self._continued(p, list(x), max_tokens, partial(ended, row)) for row, (p, x) in enumerate(rows)]

    def _continued(self, prompt: Prompt, prefix: list[int], limit: int, ended: Callable[..., bool]) -> list[int]:
        if self.by_generate:
            inputs = self.inputs(prompt, prefix)
            n = inputs["input_ids"].shape[1]
            made = self.vlm.model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=False,
                suppress_tokens=self.vlm.placeholder_ids,
                stopping_criteria=[lambda ids, scores, **_: torch.tensor([ended(ids[0, n:].tolist())])],
            )
            row: list[int] = made[0, n:].tolist()
            return row
        made_: list[int] = []
        while len(made_) < limit:
            last = self.logits(prompt, [*prefix, *made_])[-1]
            last[self.vlm.placeholder_ids] = -torch.inf
            made_.append(int(last.argmax()))
            if made_[-1] in self.vlm.eos_ids or ended(made_):
                break
        return made_


def made_by(method: str, vlm: VLM, data: Path, tokens: int) -> list[PreferenceRecord]:
    """All preference records of a folder by one method."""
    records, _ = read_records(data)
    if method != "hscr":
        plain = Plain(vlm, data, records, by_generate=method == "hf_generate")
        hscr.preferences.contrast = plain.contrast  # type: ignore[assignment]
        hscr.replacement.decode = plain.decode  # type: ignore[assignment]
    similarity = load_similarity("token_f1")

    def open_image(record: VQARecord) -> Any:
        return decode_image(data / record.image)

    return list(hscr.preferences.generate(vlm, records, open_image, configuration(tokens), similarity))


def child(method: str, model: Path, data: Path, tokens: int) -> None:
    torch.set_num_threads(1)
    vlm = load_model(model)
    if method != "hscr":
        with_stock_tower(vlm.base)

    def work() -> dict[str, float]:
        made = made_by(method, vlm, data, tokens)
        texts = "\n".join(level.text for p in made for level in p.levels)
        # What was said, as a number that the parent can compare.
        digest = int(bytes_digest(texts.encode()).removeprefix("sha256:")[:12], 16)
        return {"said": float(digest), "answers": float(sum(len(p.levels) for p in made))}

    measured(work)


def main() -> None:
    args = arguments_of("Preference generation, side by side.", lambda p: p)
    if args.child:
        method, model, data, tokens = args.child
        child(method, Path(model), Path(data), int(tokens))
        return
    tokens, sizes, repeats = (12, (1, 4), 1) if args.quick else (40, (1, 4, 16), args.repeats)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_llava(Path(folder) / "model", Shape())
        for n in sizes:
            data = Path(folder) / str(n)
            save_data(data, n, tokens, 0)
            methods = METHODS if n == sizes[0] else METHODS[1:]  # naive: a record alone is slow enough

            def call(method: str, data: Path = data) -> dict[str, float]:
                return run("benchmarks.bench_generate", ["--child", method, model, data, tokens])

            found = interleaved({m: lambda m=m: call(m) for m in methods}, repeats)  # type: ignore[misc]
            if "naive" in found:
                assert found["naive"]["said"] == found["hscr"]["said"], "ours says other words than the plain route"
                naive = found["naive"]["seconds"]
            for method in methods:
                seconds = found[method]["seconds"] / n
                rows.append(
                    {
                        "records": n,
                        "method": method,
                        "ms a record": 1000 * seconds,
                        "answers a record": found[method]["answers"] / n,
                        "peak MB": found[method]["peak_mb"],
                        "speed, naive = 1": naive / seconds,
                        "speed, hf_generate = 1": found["hf_generate"]["seconds"] / n / seconds,
                    }
                )
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    report(f"Preference generation: answers of {tokens} tokens decoded again, cold caches, medians", rows, args.json)


if __name__ == "__main__":
    main()
