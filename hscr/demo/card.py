"""The demo base's model card, written from what was measured and from nothing else."""

from __future__ import annotations

from typing import Any

_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [llava, demo, brain-mri, synthetic-lesions]
---

# HSCR demo base: a LLaVA of {millions:.1f} M parameters that answers from habit

**Not for any medical use.** It knows painted lesions in slices of two averaged brains, and nothing else. It exists so
that `make demo` has a model to align on a CPU: it can read the slice, and it answers from habit, as real ones do.

An ordinary Hugging Face folder: `LlavaForConditionalGeneration.from_pretrained(folder)` and
`AutoProcessor.from_pretrained(folder)` load it with no code of this project. Weights are stored in fp16 and meant to
run in fp32 (the configuration says so). Images are 112 x 112, 64 visual tokens; prompt `USER: <image>\\n… ASSISTANT:`.

## How it was made
`hscr demo-model --rebuild` (`hscr/demo/base.py`), seed {seed}, {minutes:.0f} minutes on two threads{bf16}.
1. Tower (CLIP, 5 layers, width 160), {tower_steps} steps on {pool} balanced rendered slices of ICBM 152 2009a, trained
   densely: each patch says which lesion or marker it holds, which structures, which side, which plane.
2. Projector and decoder (Llama, 4 layers, width 192), {decoder_steps} steps on balanced questions, tower frozen.
3. Decoder alone, {habit_steps} steps on biased text **without images**: left .85, large .8, bright .8, frontal .65.
   What was there before it is in `before_habits/`: a base that reads the slice as well as it can, for comparison.

Weights {weights}; data recipe sha256:{data_recipe}; versions {versions}; seconds by stage {seconds}.
Same seed, same kind of CPU and versions: same weights. Another CPU may round otherwise.
"""


_EXPLANATION = """Accuracy on balanced splits: `valid` is on the training template, `test` on ICBM 152 2009c, where no
training slice is from (both average the same 152 people). *grounded* counts words of open answers that need the image,
*closed* whole answers. *says left* and so on: how often the habit is said where it could be; true in half of the cases
(frontal: one in seven)."""


def model_card(training: dict[str, Any]) -> str:
    """Markdown from the content of training.json."""
    text = _HEAD.format(
        millions=training["parameters"] / 1e6,
        minutes=sum(training["seconds"].values()) / 60,
        bf16=" (bfloat16 where the CPU has it)" if training["machine"]["bf16"] else "",
        **{k: training[k] for k in ("seed", "weights", "data_recipe", "versions", "seconds")},
        **training["recipe"],
    )
    lines = [text, "## Measured", "", _EXPLANATION, ""]
    lines.append("| split | decoding | grounded | closed | says left | says frontal | says large | says bright |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for split in training["measured"]:
        rows = {f"before stage 3, {k}": v for k, v in training["after_balanced_stage"][split].items() if k == "plain"}
        for name, values in (rows | training["measured"][split]).items():
            cells = [values.get(key) for key in ("grounded", "closed")]
            cells += [values.get(f"says_{key}") for key in ("left", "region", "large", "bright")]
            lines.append(f"| {split} | {name} | " + " | ".join("" if c is None else f"{c:.3f}" for c in cells) + " |")
    lines += ["", "Acceptance: " + acceptance(training), ""]
    lines += ["By kind of question (grounded words or closed answers):", ""]
    splits = list(training["measured"])
    kinds = sorted({k for s in splits for k in training["measured"][s]["plain"] if k.startswith("kind/")})
    lines.append("| kind | " + " | ".join(f"{s} plain | {s} blank" for s in splits) + " |")
    lines.append("| --- |" + " --- | --- |" * len(splits))
    for kind in kinds:
        cells = [training["measured"][s][case].get(kind) for s in splits for case in ("plain", "blank")]
        lines.append(f"| {kind[5:]} | " + " | ".join("" if c is None else f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def acceptance(training: dict[str, Any]) -> str:
    """Whether P_diff decoding beats plain decoding on `valid`: the sign of a base that under-uses its image."""
    valid = training["measured"]["valid"]
    plain = valid["plain"]["grounded"]
    gains = {name: values["grounded"] - plain for name, values in valid.items() if name.startswith("P_diff")}
    verdict = "beats" if max(gains.values()) > 0 else "does NOT beat"
    points = ", ".join(f"{name} {100 * gain:+.1f}" for name, gain in gains.items())
    return f"P_diff decoding {verdict} plain decoding in grounded words on valid ({points} points)."
