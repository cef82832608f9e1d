"""The folder of a finished adapter: weights that stock PEFT loads, its model card, its configuration, and the manifest that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

from hscr import __version__
from hscr.artifacts import write_json, write_manifest
from hscr.config import AlignConfig
from hscr.model import VLM


def save_adapter(vlm: VLM, folder: Path, config: AlignConfig, lineage: dict[str, str]) -> None:
    """A PEFT folder that stock peft loads, with its model card, configuration and sha256 manifest; whole or not at all."""
    temporary = folder.with_name(".adapter.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    vlm.model.save_pretrained(str(temporary), safe_serialization=True)
    write_json(temporary / "hscr.json", {**config.to_dict(), "lineage": lineage})
    o, p = config.optimization, config.preference
    on_top = f" on top of the adapter with the weights `{lineage['parent']}`" if "parent" in lineage else ""
    card = f"""---
library_name: peft
base_model: {vlm.name}
tags: [hscr, lora]
---
# HSCR adapter
LoRA of rank {o.lora_rank} on the language model of `{vlm.name}` (`{lineage["model"]}`), aligned with HSCR
(arXiv 2506.00805) by hscr {__version__} on the data set `{lineage["data"]}`{on_top}:
objective {o.objective}, γ = {o.gamma:g}, anchor {o.anchor:g}, lr {o.lr:g}, {o.epochs} epochs,
visual {p.perturbation.replace("_", " ")} ρ = {p.dropout_ratio:g}. The whole configuration is in `hscr.json`.

Weights are float32: serve unmerged, or merge in float32 (merging into bfloat16 loses about half of the update).
Not a medical device; not for diagnosis.
"""
    (temporary / "README.md").write_text(card, encoding="utf-8")
    write_manifest(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
