"""TRL itself on our export: its DPOTrainer trains two steps on the file that `hscr export --format trl` writes."""

from pathlib import Path

import pytest
import torch

from hscr.export import write_export
from hscr.records import Level, PreferenceRecord, read_records


@pytest.mark.filterwarnings("ignore")  # what TRL and its accelerate say about a machine without a GPU
def test_dpo_trainer_takes_two_steps(
    tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Image, List, load_dataset
    from peft import LoraConfig
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from trl import DPOConfig, DPOTrainer

    records, _ = read_records(data_folder)
    pairs = [PreferenceRecord(r, (Level("something else", 0.1),), (), {}) for r in records[:4]]
    assert write_export(pairs, "trl", tmp_path / "pairs.jsonl") == 4
    monkeypatch.chdir(data_folder if data_folder.is_dir() else data_folder.parent)  # image paths are relative to it
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    rows = rows.cast_column("images", List(Image()))
    trainer = DPOTrainer(
        model=LlavaForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
        ),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(tiny_folder),
        peft_config=LoraConfig(target_modules=r".*language_model.*q_proj", r=2),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference: log 2 a pair
    assert losses[1] != losses[0]
