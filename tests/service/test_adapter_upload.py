"""Uploads of foreign adapters: a good one answers like the one it was, and everything else is refused with nothing left behind."""

from __future__ import annotations

import io
import json
import math
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import save

from hscr.artifacts import verify_manifest
from hscr.foreign_adapter import HEADER_MAX_BYTES, check, read_header
from service import adapter_upload, adapters
from service.db import Database
from service.settings import Settings
from tests.conftest import zip_of

pytestmark = pytest.mark.either_database

Q = "model.language_model.layers.0.self_attn.q_proj"
SHAPES = {Q: (192, 192), "model.language_model.layers.1.mlp.up_proj": (512, 192)}
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "lora_dropout": 0.05,
}
PATH = "/adapters/foreign/versions"


def weights(**changes: Any) -> dict[str, Any]:
    noise = np.random.default_rng(0)
    pair = {"A": noise.normal(size=(4, 192)), "B": noise.normal(size=(192, 4))}
    named = {f"base_model.model.{Q}.lora_{part}.weight": v.astype(np.float32) for part, v in pair.items()}
    return {k: v for k, v in (named | changes).items() if v is not None}


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def pack(config: Any = CONFIG, tensors: bytes | None = None, **files: bytes) -> bytes:
    body = config if isinstance(config, bytes) else json.dumps(config).encode()
    data = save(weights()) if tensors is None else tensors
    return zip_of({"adapter_config.json": body, "adapter_model.safetensors": data, **files})


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo base's layers without a child process; that it says so is tested below."""
    monkeypatch.setattr(adapter_upload, "base_shapes", lambda model, revision: SHAPES)


def send(client: TestClient, body: bytes, path: str = PATH) -> Any:
    return client.post(path, files={"file": ("x.zip", body)})


def left_behind(settings: Settings) -> list[Path]:
    return [p for p in (settings.data_dir / "artifacts").rglob("*") if p.is_file() and p.name != ".lock"]


def test_good_adapter_becomes_a_version_of_checked_numbers_only(
    client: TestClient, settings: Settings, database: Database, shapes: None
) -> None:
    extra = {
        "tokenizer_config.json": b'{"chat_template": "canary", "auto_map": {"x": "canary.py"}}',
        "README.md": b"canary",
    }
    answer = send(
        client,
        pack(
            CONFIG | {"base_model_name_or_path": "/home/canary", "auto_mapping": {"parent_library": "canary"}}, **extra
        ),
    )
    assert answer.status_code == 201, answer.text
    version = answer.json()
    assert (version["source"], version["job_id"], version["dataset_id"]) == ("upload", None, None)
    assert answer.headers["location"] == f"{PATH}/1"
    folder = adapters.folder(settings.data_dir, version["digest"])
    assert verify_manifest(folder) == version["digest"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not any(b"canary" in p.read_bytes() for p in folder.iterdir())
    assert "LoRA of rank 4 (α 8) on 1 linear layers" in (folder / "README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"], config["lora_dropout"]) == (4, 8, [Q], 0.0)
    again = send(client, pack())
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert client.get("/adapters/foreign").json()["last_version"] == 1
    changed = weights(**{f"base_model.model.{Q}.lora_B.weight": np.ones((192, 4), np.float32)})
    assert send(client, pack(tensors=save(changed))).json()["version"] == 2
    origin = client.get(f"{PATH}/1/lineage").json()
    assert (origin["job"], origin["dataset"], origin["parent"]) == (None, None, None)
    told = [e["action"] for e in client.get("/audit", params={"subject": "foreign:1"}).json()["data"]]
    assert told == ["version.upload"]
    assert client.get(f"{PATH}/1/download").status_code == 200
    assert client.put("/adapters/foreign/aliases/champion", json={"version": 1}).status_code == 200
    assert not list((settings.data_dir / "artifacts" / "adapters").glob(".*"))


def test_what_its_files_alone_condemn_costs_no_look_at_the_base(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That look is a process that loads torch."""
    looked: list[str] = []
    monkeypatch.setattr(adapter_upload, "base_shapes", lambda model, revision: looked.append(model) or SHAPES)
    for bad in (zip_of({"a.json": b"{}"}), zip_of({"x.pt": b"x"}), pack(b"{"), pack(tensors=b"\0" * 20)):
        assert send(client, bad).json()["code"] == "invalid_adapter"
    assert looked == []
    assert send(client, pack()).status_code == 201
    assert len(looked) == 1


def bad_offsets(begin: int, end: int, shape: list[int] | None = None) -> bytes:
    name = f"base_model.model.{Q}.lora_A.weight"
    return raw({name: {"dtype": "F32", "shape": shape or [4, 192], "data_offsets": [begin, end]}}, b"\0" * 3072)


def named(name: str, shape: tuple[int, int] = (4, 192)) -> bytes:
    return save(weights(**{name: np.zeros(shape, np.float32)}))


A = f"base_model.model.{Q}.lora_A.weight"
NAN = np.full((4, 192), np.nan, np.float32)
INF16 = np.full((4, 192), np.inf, np.float16)
WEIGHTS_CASES = {
    "no safetensors": b"\x80\x04pickle",
    "empty": b"",
    "header longer than the file": raw({}, length=2**20),
    "giant header": raw({}, length=HEADER_MAX_BYTES + 1),
    "giant length": raw({}, length=2**63),
    "header no JSON": raw(b"{'a'}"),
    "header a list": raw([1]),
    "deep header": raw(b'{"a":' * 100_000),
    "name twice": raw(b'{"a": {}, "a": {}}'),
    "no tensor": raw({"a": 3}),
    "no tensors at all": raw({}),
    "wrong dtype": save(weights(**{A: np.zeros((4, 192), np.int64)})),
    "overlap": bad_offsets(0, 3072, [4, 191]),
    "hole": bad_offsets(4, 3076),
    "beyond the end": bad_offsets(0, 3072 * 2, [8, 192]),
    "negative": bad_offsets(-4, 3068),
    "huge shape": bad_offsets(0, 3072, [2**47, 2**47]),
    "three axes": bad_offsets(0, 3072, [4, 12, 16]),
    "bytes behind": save(weights()) + b"\0" * 64,
    "wrong rank": save(weights(**{A: np.zeros((5, 192), np.float32)})),
    "wrong width": save(weights(**{A: np.zeros((4, 191), np.float32)})),
    "half a pair": save(weights(**{A: None})),
    "other layer": named("base_model.model.model.language_model.layers.99.self_attn.q_proj.lora_A.weight"),
    "vision tower": named("base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"),
    "embedding": named("base_model.model.model.embed_tokens.lora_embedding_A"),
    "full weights": named(f"base_model.model.{Q}.weight"),
    "path in a name": named("base_model.model.../../x.lora_A.weight"),
    "odd name": named("base_model.model.a\u202eb.lora_A.weight"),
    "not a number": save(weights(**{A: NAN})),
    "infinite": save(weights(**{A: INF16})),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_weights_that_are_not_right_are_refused(
    client: TestClient, settings: Settings, shapes: None, case: str
) -> None:
    answer = send(client, pack(tensors=WEIGHTS_CASES[case]))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_adapter"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert "adapter_model.safetensors" in answer.json()["detail"]
    assert left_behind(settings) == []
    assert client.get("/adapters").json()["data"] == []


LONG = b'"' + random.Random(0).randbytes(2**19).hex().encode() + b'"'


@pytest.mark.parametrize(
    "config",
    [
        b"not json", b"[]", b"[" * 100_000, LONG, {},
        CONFIG | {"peft_type": "IA3"}, CONFIG | {"r": 0}, CONFIG | {"r": True}, CONFIG | {"r": 1e9}, CONFIG | {"r": 2000},
        CONFIG | {"lora_alpha": "8"}, CONFIG | {"lora_alpha": 0}, CONFIG | {"lora_alpha": 1e308}, CONFIG | {"lora_alpha": 8.5},
        CONFIG | {"lora_alpha": math.nan}, CONFIG | {"lora_alpha": math.inf},
        CONFIG | {"bias": "all"}, CONFIG | {"use_dora": True}, CONFIG | {"modules_to_save": ["lm_head"]},
        CONFIG | {"rank_pattern": {"q_proj": 8}}, CONFIG | {"alpha_pattern": {"q": 1}}, CONFIG | {"auto_map": {"x": "y"}},
        CONFIG | {"layer_replication": [[0, 1]]}, CONFIG | {"init_lora_weights": "pissa"}, CONFIG | {"use_rslora": "yes"},
        CONFIG | {"trainable_token_indices": [1]}, CONFIG | {"a new field\u202e": 1}, CONFIG | {"lora_bias": True},
    ],
)  # fmt: skip
def test_configurations_of_more_than_a_plain_lora_are_refused(
    client: TestClient, settings: Settings, shapes: None, config: Any
) -> None:
    answer = send(client, pack(config))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_adapter"), answer.text
    assert "adapter_config.json" in answer.json()["detail"]
    assert "\u202e" not in answer.text
    assert left_behind(settings) == []


def linked() -> bytes:
    out = io.BytesIO(pack())
    with zipfile.ZipFile(out, "a") as archive:
        entry = zipfile.ZipInfo("link.json")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (pack(**{"adapter_model.bin": b"\x80\x04"}), "invalid_adapter"),
        (pack(**{"sub/optimizer.PT": b"\x80\x04"}), "invalid_adapter"),
        (zip_of({"adapter_config.json": b"{}"}), "invalid_adapter"),
        (zip_of({"adapter_model.safetensors": save(weights())}), "invalid_adapter"),
        (zip_of({"README.md": b"x"}), "invalid_adapter"),
        (zip_of({}), "invalid_adapter"),
        (pack(**{"../x.json": b"{}"}), "invalid_archive"),
        (pack(**{"/abs.json": b"{}"}), "invalid_archive"),
        (pack(**{"a\u202eb.json": b"{}"}), "invalid_archive"),
        (pack(**{"big.json": b"0" * 30 * 2**20}), "invalid_archive"),
        (linked(), "invalid_archive"),
        (b"no zip", "invalid_archive"),
        (pack()[:-30], "invalid_archive"),
    ],
)
def test_archives_with_more_than_an_adapter_in_them_are_refused(
    client: TestClient, settings: Settings, shapes: None, body: bytes, code: str
) -> None:
    answer = send(client, body)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert left_behind(settings) == []


def test_limits_and_names(client: TestClient, settings: Settings, shapes: None) -> None:
    for name in ("..", "%2e%2e", "A", "a" * 65, "a%00b"):
        assert send(client, pack(), f"/adapters/{name}/versions").status_code in (404, 405, 422), name
    settings.adapter_max_bytes = 1000
    assert send(client, pack()).json()["code"] == "invalid_archive"
    too_large = client.post(PATH, files={"file": ("x.zip", b"0" * (2**20 + 2000))})
    assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
    assert left_behind(settings) == []


def test_zip_may_hold_the_folder(client: TestClient, shapes: None) -> None:
    files = {"x/adapter_config.json": json.dumps(CONFIG).encode(), "x/adapter_model.safetensors": save(weights())}
    assert send(client, zip_of(files)).status_code == 201


def test_bfloat16_numbers_are_looked_at_too(tmp_path: Path) -> None:
    name, other = A, A.replace("lora_A", "lora_B")
    rows = {name: {"dtype": "BF16", "shape": [4, 192], "data_offsets": [0, 1536]},
            other: {"dtype": "BF16", "shape": [192, 4], "data_offsets": [1536, 3072]}}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    for word, good in ((0x3F80, True), (0x7F80, False), (0xFFC0, False)):
        data = np.full(1536, word, "<u2").tobytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(raw(rows, data))
        if good:
            assert check(tmp_path, lambda: SHAPES).modules == (Q,)
        else:
            with pytest.raises(ValueError, match="infinite"):
                check(tmp_path, lambda: SHAPES)


def test_header_with_a_name_twice_or_tensors_that_share_bytes_is_refused(tmp_path: Path) -> None:
    """Each would pass every other check: the sizes are right and the file ends where the last tensor does."""
    row = {"dtype": "F32", "shape": [4, 192], "data_offsets": [0, 3072]}
    path, data = tmp_path / "x.safetensors", b"\0" * 3072
    path.write_bytes(raw({"a": row}, data))
    assert list(read_header(path)[1]) == ["a"]
    path.write_bytes(raw({"a": row, "b": row}, data))
    with pytest.raises(ValueError, match="overlap"):
        read_header(path)
    one = json.dumps(row).encode()
    path.write_bytes(raw(b'{"a": ' + one + b', "a": ' + one + b"}", data))
    with pytest.raises(ValueError, match="each name once"):
        read_header(path)


@pytest.mark.thorough
def test_upload_answers_as_the_adapter_that_it_was(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    """On the demo base: the child process tells its layers; stock PEFT's own folder and what was stored give the same logits."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaForConditionalGeneration

    folder = settings.model_path
    model = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(folder),
        LoraConfig(
            r=3, lora_alpha=7, use_rslora=True, target_modules=r".*language_model.*\.(q_proj|up_proj)", lora_dropout=0.1
        ),
    )
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if "lora_B" in n:
                parameter.normal_(0, 0.3)
    model.save_pretrained(str(tmp_path / "own"))
    files = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    answer = send(client, zip_of(files))
    assert answer.status_code == 201, answer.text
    stored = adapters.folder(settings.data_dir, answer.json()["digest"])
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for where in (tmp_path / "own", stored):
        peft = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(folder), str(where)).eval()
        with torch.no_grad():
            logits.append(peft(input_ids=ids).logits)
    assert torch.equal(*logits)
    with torch.no_grad():
        plain = LlavaForConditionalGeneration.from_pretrained(folder).eval()(input_ids=ids).logits
    assert not torch.allclose(plain, logits[0])


def test_version_of_an_upload_is_evaluated_and_aligned_on_top_of(
    client: TestClient,
    database: Database,
    settings: Settings,
    shapes: None,
    dataset: Any,
    stand_in: Callable[..., None],
) -> None:
    from worker.supervise import run_job

    send(client, pack())
    job = client.post("/align", json={"dataset": dataset.id, "adapter": "mine", "parent": "foreign:1"}).json()
    assert job["config"]["optimization"]["lora_rank"] == 4
    asked = client.post("/evaluate", json={"dataset": dataset.id, "adapter": "foreign"}).json()
    for job_id in (job["id"], asked["id"]):
        run_job(database, settings, job_id, lambda: False)
        assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    assert client.get("/adapters/mine/versions/1/lineage").json()["parent"]["name"] == "foreign"
