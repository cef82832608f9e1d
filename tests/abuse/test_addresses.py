"""Addresses where they have no business: nothing that a caller sends makes any process of the service connect to it (SSRF)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.abuse.rig import Ear, Rig
from tests.conftest import dataset_zip, png, record, zip_of

FORMS = [
    "http://127.0.0.1:{p}/x",
    "http://localhost:{p}/x",
    "http://2130706433:{p}/x",
    "http://0x7f000001:{p}/x",
    "http://017700000001:{p}/x",
    "http://127.1:{p}/x",
    "http://0:{p}/x",
    "http://[::1]:{p}/x",
    "http://[::ffff:127.0.0.1]:{p}/x",
    "http://[::ffff:7f00:1]:{p}/x",
    "http://127.0.0.1:{hook}@127.0.0.1:{p}/x",
    "http://127.0.0.1:{hook}\\@127.0.0.1:{p}/x",
    "http://127.0.0.1:{p}\\@127.0.0.1:{hook}/x",
    "http://127.0.0.1:{p}#@127.0.0.1:{hook}/x",
    "http://127.0.0.1:{hook}#@127.0.0.1:{p}/x",
    "http://127.0.0.1:{p}?@127.0.0.1:{hook}/x",
    "http://127.0.0.1:{hook}.127.0.0.1:{p}/x",
    "http://127.0.0.1:{p}%2f@127.0.0.1:{hook}/x",
    "http:\\\\127.0.0.1:{p}\\x",
    "http:127.0.0.1:{p}/x",
    "//127.0.0.1:{p}/x",
    " http://127.0.0.1:{p}/x",
    "http://127.0.0.1:{p}/x\r\nHost: 127.0.0.1:{hook}",
    "http://１２７.0.0.1:{p}/x",
    "http://①②⑦.0.0.1:{p}/x",
    "https://127.0.0.1:{p}/x",
    "ftp://127.0.0.1:{p}/x",
    "gopher://127.0.0.1:{p}/x",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]:{p}/x",
    "javascript:alert(1)",
    "",
]


@pytest.mark.parametrize("form", FORMS)
def test_a_webhook_is_called_at_allowed_origins_only(
    rig: Rig, ear: Ear, refused: Callable[..., Any], dataset_id: str, form: str
) -> None:
    """The operator allowed one port of 127.0.0.1; every other way of writing an address of this machine is another address."""
    url, before = form.format(p=ear.port, hook=rig.hook), rig.stored()["jobs"]
    for path, body in (
        ("/align", {"dataset": dataset_id, "adapter": "hooked"}),
        ("/evaluate", {"dataset": dataset_id, "adapter": "hooked"}),
    ):
        refused(rig.http.post(path, json=body | {"webhook": url}), "webhook_not_allowed", *[url] * (len(url) > 4))
    assert rig.stored()["jobs"] == before
    assert ear.heard == 0


def test_no_field_is_an_address_to_fetch(rig: Rig, ear: Ear, untouched: None, refused: Callable[..., Any]) -> None:
    url = f"http://127.0.0.1:{ear.port}/x.png"
    for image in ({"url": url}, {"base64": url}, {"source": url}, {"path": url}, url):
        answer = rig.http.post("/vqa", json={"image": image, "question": url})
        refused(answer, answer.json()["code"], url)
        assert answer.status_code == 422
        part = {"type": "image_url", "image_url": image if isinstance(image, dict) else {"url": image}}
        words = [{"role": "user", "content": [part, {"type": "text", "text": url}]}]
        answer = rig.http.post("/v1/chat/completions", json={"model": "hscr-demo", "messages": words})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), answer.text
        assert url not in answer.text
    form = {"question": url, "image": url}
    assert rig.http.post("/vqa", data=form).status_code in (415, 422)
    for fields in (
        {"source": url},
        {"url": url},
        {"image": url, "question": "a"},
        {"model": url, "dataset": "x", "adapter": "x"},
    ):
        for path in ("/align", "/evaluate", "/vqa"):
            assert rig.http.post(path, json=fields).status_code == 422
    assert rig.http.post("/datasets", data={"source": url, "name": "x"}).status_code == 422
    time.sleep(0.3)
    assert ear.heard == 0


def test_a_data_set_whose_images_are_addresses_is_refused(
    rig: Rig, ear: Ear, untouched: None, refused: Callable[..., Any]
) -> None:
    url = f"http://127.0.0.1:{ear.port}/x.png"
    for image in (
        url,
        f"//127.0.0.1:{ear.port}/x.png",
        "file:///etc/passwd",
        "\\\\127.0.0.1\\x",
        "/etc/passwd",
        "../../x.png",
    ):
        rows = json.dumps(record(0, image=image)).encode()
        sent = zip_of({"records.jsonl": rows, "images/0.png": png()})
        refused(rig.http.post("/datasets", files={"file": ("x.zip", sent)}), "dataset_empty", url, "passwd")
    assert ear.heard == 0


@pytest.fixture(scope="module")
def dataset_id(rig: Rig) -> str:
    return str(rig.http.post("/datasets", files={"file": ("x.zip", dataset_zip(2))}).json()["id"])
