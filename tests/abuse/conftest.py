"""One service of real processes for all tests of this folder, and what must hold around each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.errors import TABLE
from tests.abuse.rig import Ear, Rig


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, valkey_server: str) -> Iterator[Rig]:
    running = Rig(tmp_path_factory.mktemp("rig"), valkey_server.replace("/0", "/7"))
    yield running
    running.close()


@pytest.fixture
def ear() -> Iterator[Ear]:
    listening = Ear()
    yield listening
    listening.close()


@pytest.fixture
def untouched(rig: Rig) -> Iterator[None]:
    """Whatever the test sends: nothing is stored, and memory stays within its limits."""
    before = rig.stored()
    with rig.bounded():
        yield
    assert rig.stored() == before


@pytest.fixture
def refused(rig: Rig) -> Callable[..., Any]:
    """Check that an answer is this refusal and tells nothing: no path, no object, no traceback, nothing of what was sent."""

    def check(answer: Any, code: str, *sent: str) -> Any:
        status, title = TABLE[code]
        body = answer.json()
        assert (answer.status_code, body["code"], body["title"]) == (status, code, title), body
        assert answer.headers["content-type"] == "application/problem+json"
        for word in ("/tmp/", str(rig.data), "Traceback", " object at 0x", "Error(", 'File "', *sent):
            assert word not in answer.text, body
        return body

    return check
