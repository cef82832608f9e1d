"""The demo base: stock classes load it in a fresh process, it answers better than chance, and it can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hscr.demo.base import MODEL_FOLDER, Recipe, rebuild
from hscr.demo.data import build
from hscr.demo.decoder import Packer, _packed_loss, draw_questions
from hscr.demo.language import PARTS, Asked
from hscr.demo.language_model import answer_ids, prompt_ids
from hscr.demo.measure import answers, load_split, scores
from hscr.demo.slices import Facts

FRESH_PROCESS = """
import json, sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
torch.set_num_threads(1)
folder, data = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder)
said = []
for line in open(data + "/records.jsonl"):
    row = json.loads(line)
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[Image.open(data + "/" + row["image"])], text=prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40)
    said.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert not any(name.split(".")[0] == "hscr" for name in sys.modules)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("demo"), seed=0, sizes={"test": 48, "valid": 300})


@pytest.fixture(scope="module")
def base() -> LlavaForConditionalGeneration:
    torch.set_num_threads(1)
    return LlavaForConditionalGeneration.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> object:
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


@pytest.mark.thorough
def test_stock_classes_alone_load_it_and_it_reads_the_held_out_template(splits, base, processor) -> None:
    """Chance on grounded words is about .35; our own decoding loop says the same as generate."""
    test_split = splits["test"]
    command = [sys.executable, "-c", FRESH_PROCESS, str(MODEL_FOLDER), str(test_split)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=test_split)
    said = json.loads(done.stdout.splitlines()[-1])
    records, images = load_split(test_split)
    figures = scores(records, said)
    assert figures["grounded"] > 0.5
    ours = answers(base, processor.tokenizer, [r.question for r in records[:20]], images[:20])
    assert ours == said[:20]


def test_it_answers_better_than_chance(splits, base, processor) -> None:
    """Chance is about .35 and .5; 131 closed questions, so that .6 is beyond luck."""
    records, images = load_split(splits["valid"])
    figures = scores(records, answers(base, processor.tokenizer, [r.question for r in records], images))
    assert figures["grounded"] > 0.6
    assert figures["closed"] > 0.6


def test_the_folder_is_small_and_says_where_it_comes_from(base) -> None:
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size < 16 * 2**20
    assert 2e6 < sum(p.numel() for p in base.parameters()) < 8e6
    training = json.loads((MODEL_FOLDER / "training.json").read_text())
    assert training["weights"] in (MODEL_FOLDER / "README.md").read_text()
    assert {"seed", "recipe", "versions", "measured", "log"} <= set(training)
    assert base.config.vision_feature_layer == -1
    assert base.config.vision_feature_select_strategy == "default"
    assert base.dtype == torch.float32


def test_configuration_asks_for_float32_by_itself() -> None:
    assert LlavaForConditionalGeneration.from_pretrained(MODEL_FOLDER).dtype == torch.float32


@pytest.mark.parametrize(
    "answer", ["left", "There is a large bright lesion in the left frontal lobe.", "Ödem, 3.5 cm?"]
)
def test_an_answer_alone_and_after_its_prompt_gives_the_same_tokens(processor, answer: str) -> None:
    question = "Where is the lesion?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    whole = processor.apply_chat_template(chat)
    tokenizer = processor.tokenizer
    alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
    before = tokenizer(prompt)["input_ids"]
    assert tokenizer(whole)["input_ids"] == before + alone + [tokenizer.eos_token_id]
    assert tokenizer(prompt + answer)["input_ids"] == before + alone
    assert tokenizer.decode(alone).strip() == answer


def test_habit_words_are_one_token_each(processor) -> None:
    tokenizer = processor.tokenizer
    for word in ("left", "right", "frontal", "cerebellar", "large", "small", "bright", "dark", "yes", "no", "axial"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_packed_questions_cost_the_same_as_separate_ones(base, processor) -> None:
    """Tree mask and restarted positions: the packed row's loss is the token-weighted mean of the separate rows'."""
    asked = [
        Asked(
            "side",
            "",
            "Name the side of the lesion.",
            "It lies in the left hemisphere.",
            (("left", ("left", "right")),),
        ),
        Asked("present", "", "Is there a lesion in this slice?", "yes", (("yes", ("yes", "no")),), ("yes", "no")),
    ]
    packer, features = Packer(processor.tokenizer), torch.randn(1, 64, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        together, rows = packer.pack([asked]), [packer.pack([[one]]) for one in asked]
        weights = [row["weights"].sum() for row in rows]
        losses = [_exact_loss(base, row, features) for row in rows]
        mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        assert torch.allclose(_exact_loss(base, together, features), mean, atol=1e-4)


def _exact_loss(model, batch, features) -> torch.Tensor:
    return _packed_loss(model, batch, features)[0]


def test_a_slice_that_shows_no_structure_can_still_be_asked_about() -> None:
    facts = Facts("axial", frozenset(), frozenset(PARTS))
    kinds = {one.kind for one in draw_questions(np.random.default_rng(0), facts, 50)}
    assert kinds == {"plane", "plane_which", "plane_yesno", "present"}


def test_prompt_ids_are_what_the_processor_makes(processor) -> None:
    question = "Is the lesion small or large?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    from PIL import Image

    made = processor(images=[Image.new("L", (112, 112))], text=prompt, return_tensors="pt")
    assert made["input_ids"][0].tolist() == prompt_ids(processor.tokenizer, question)
    assert answer_ids(processor.tokenizer, "small")[-1] == processor.tokenizer.eos_token_id


@pytest.mark.thorough
def test_rebuild_makes_a_whole_folder_twice_alike(tmp_path: Path) -> None:
    """The recipe in miniature: it proves the command, not the model."""
    recipe = Recipe(pool=60, tower_steps=2, decoder_steps=2, habit_steps=2, measured={"valid": 8, "test": 8})
    stages: list[str] = []
    first = rebuild(tmp_path / "a", seed=1, progress=lambda stage, *_: stages.append(stage), recipe=recipe)
    second = rebuild(tmp_path / "b", seed=1, recipe=recipe)
    assert first["weights"] == second["weights"]
    assert {"tower", "decoder", "habits", "measure"} <= set(stages)
    assert first["weights"] in (tmp_path / "a/README.md").read_text()
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "a")
    AutoProcessor.from_pretrained(tmp_path / "a")
