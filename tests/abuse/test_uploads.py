"""Uploads against the real server: archives that cost more to look at than to send, archives in archives, and what must never be loaded."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from tests.abuse.rig import Rig
from tests.abuse.test_images import bombs
from tests.conftest import png, record, zip_of


def directory_of(entries: int, *, extra: bytes = b"") -> bytes:
    """A zip that is nearly all list of entries, which Python's zipfile makes objects of before anybody can count them."""
    one = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, len(extra), 0, 0, 0, 0, 0)
    listed = (one + b"a" + extra) * entries
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries & 0xFFFF, entries & 0xFFFF, len(listed), 0, 0)
    return listed + end


def bomb_of(mb: int) -> bytes:
    return zip_of({"records.jsonl": bytes(mb * 2**20)})


def overlapping() -> bytes:
    """Many entries that all name the same compressed bytes (a bomb without nesting)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**20))
        first = archive.infolist()[0]
        for n in range(1, 2000):
            twin = zipfile.ZipInfo(f"{n}.png")
            for name in ("compress_type", "header_offset", "compress_size", "file_size", "CRC"):
                setattr(twin, name, getattr(first, name))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    return out.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "half a million entries": lambda: directory_of(500_000),
    "a list of entries of 65 MB": lambda: directory_of(1_000, extra=b"\0" * 65_000),
    "a bomb": lambda: bomb_of(64),
    "a bomb in a zip": lambda: zip_of({"records.zip": bomb_of(16), "records.json.gz": bomb_of(8)}),
    "a zip in a zip in a zip": lambda: zip_of({"a.zip": zip_of({"a.zip": zip_of({"records.jsonl": b"{}"})})}),
    "entries that share their bytes": overlapping,
}


@pytest.mark.parametrize("path", ["/datasets", "/adapters/x/versions"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_is_refused_at_the_cost_of_its_bytes(
    rig: Rig, untouched: None, refused: Callable[..., Any], kind: str, path: str
) -> None:
    begin = time.monotonic()
    answer = rig.http.post(path, files={"file": ("x.zip", ARCHIVES[kind]())})
    code = answer.json()["code"]
    refused(answer, code)
    assert code in ("invalid_archive", "invalid_adapter"), answer.text
    assert time.monotonic() - begin < 10


def test_bombs_among_a_data_sets_images_are_left_out_by_their_lines(rig: Rig) -> None:
    bad = bombs()
    rows = [record(0), *(record(n, image=f"images/{n}.png") for n in range(1, len(bad) + 1))]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    files = {f"images/{n}.png": data for n, data in enumerate(bad.values(), 1)}
    sent = zip_of({"records.jsonl": lines, "images/0.png": png(), **files})
    with rig.bounded():
        made = rig.http.post("/datasets", files={"file": ("x.zip", sent)}, data={"name": "bombs"})
    assert made.status_code == 201, made.text
    assert made.json()["n_records"] == 1
    told = {row["line"]: row["reason"] for row in made.json()["rejected"]}
    assert set(told) == {n + 1 for n in range(1, len(bad) + 1)}
    assert not any("missing" in reason for reason in told.values())


LOADED = ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "training_args.pkl", "x.ckpt"]


@pytest.mark.parametrize("name", LOADED)
def test_what_would_be_unpickled_is_refused_unread(
    rig: Rig, untouched: None, refused: Callable[..., Any], name: str
) -> None:
    sent = zip_of({"adapter_config.json": b"{}", name: b"cos\nsystem\n(S'touch /tmp/hscr-evil'\ntR."})
    refused(rig.http.post("/adapters/x/versions", files={"file": ("x.zip", sent)}), "invalid_adapter")


# What other servers let a caller say of templates, processors and loading (CVE-2025-62426 and its kin).
KWARGS = [
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "trust_remote_code",
    "auto_map",
    "add_generation_prompt",
    "prompt_token_ids",
    "prompt_embeds",
    "guided_regex",
    "logits_processors",
    "vllm_xargs",
    "n",
    "best_of",
]


@pytest.mark.parametrize("name", KWARGS)
def test_no_template_and_no_argument_of_a_library_comes_from_a_caller(rig: Rig, untouched: None, name: str) -> None:
    value: Any = 10**9 if name in ("n", "best_of") else {"x": "{{ 7 * 7 }}"}
    doors = {
        "/vqa": {"question": "a", "image": {"base64": "AAAA"}},
        "/align": {"dataset": "ds_x", "adapter": "x"},
        "/evaluate": {"dataset": "ds_x", "adapter": "x"},
        "/v1/chat/completions": {"model": "hscr-demo", "messages": [{"role": "user", "content": "a"}]},
    }
    for path, body in doors.items():
        answer = rig.http.post(path, json=body | {name: value})
        assert answer.status_code in (400, 422), (path, answer.text)
        assert "49" not in answer.text.replace(answer.headers["x-request-id"], "")


def test_poisoned_rows_are_reported_with_their_lines(rig: Rig) -> None:
    """An id twice, empty answers and empty questions are no records; what is another language is one."""
    rows = [
        record(0),
        record(0, id="r0"),  # the same id again
        record(0, id="r1", answer=""),
        record(0, id="r2", answer="   "),
        record(0, id="r3", question=""),
        record(0, id="r4", answer="Die Läsion liegt links vorn."),  # another language is a language
    ]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    sent = zip_of({"records.jsonl": lines, "images/0.png": png()})
    with rig.bounded():
        made = rig.http.post("/datasets", files={"file": ("x.zip", sent)}, data={"name": "poisoned"})
    assert made.status_code == 201, made.text
    told = {row["line"]: row["reason"] for row in made.json()["rejected"]}
    assert set(told) == {2, 3, 4, 5}
    assert made.json()["n_records"] == 2
