"""Callers and what is kept of their images (HSCR_PREFIX_CACHE_PER_KEY): shared, or never; a real engine on a tiny model."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from hscr.prefix_cache import PrefixCache
from service import keys
from service.app import create_app
from service.engine import LocalEngine
from service.settings import Settings
from tests.conftest import png, wait_for
from tests.hscr.tiny import save_tiny_llava

IMAGE = base64.b64encode(png()).decode()


@dataclass
class Two:
    """A service that two keys may ask, and the cache of its engine, empty."""

    client: TestClient
    settings: Settings
    cache: PrefixCache
    secrets: tuple[str, str]

    def ask(self, caller: int, route: str) -> tuple[Any, int, int]:
        """One question of a caller: what was answered, and how many prefixes were found and made for it."""
        hits, misses = self.cache.hits, self.cache.misses
        bearer = {"Authorization": f"Bearer {self.secrets[caller]}"}
        if route == "vqa":
            asked = {"image": {"base64": IMAGE}, "question": "Where?", "max_tokens": 4, "grounding": "summary"}
            answer = self.client.post("/vqa", json=asked, headers=bearer)
            said = answer.json().get("answer"), answer.json().get("grounding")
        else:
            image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}
            messages = [{"role": "user", "content": [image, {"type": "text", "text": "Where?"}]}]
            asked = {"model": "tiny", "messages": messages, "max_tokens": 4}
            answer = self.client.post("/v1/chat/completions", json=asked, headers=bearer)
            said = answer.json().get("choices"), None
        assert answer.status_code == 200, answer.text
        return said, self.cache.hits - hits, self.cache.misses - misses


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Two]:
    data = tmp_path_factory.mktemp("callers")
    shutil.copy(sqlite_template, data / "hscr.db")
    model = save_tiny_llava(data / "tiny")
    settings = Settings(
        data_dir=data, database_url=f"sqlite:///{data / 'hscr.db'}", model=str(model), device="cpu", feature_cache="off"
    )
    engine = LocalEngine(settings)
    app = create_app(settings, engine)
    with app.state.hscr.database.write() as session:
        first, second = (keys.create(session, "cli", name=name, scopes=["vqa"])[1] for name in "ab")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, 60, "the model loads")
        cache = engine._answerer.prefixes
        assert cache is not None
        yield Two(client, settings, cache, (first, second))


@pytest.fixture
def two(service: Two) -> Two:
    service.cache.n_bytes, service.settings.prefix_cache_per_key = 0, False
    service.cache._items.clear()
    return service


@pytest.mark.parametrize(("route", "prefixes"), [("vqa", 2), ("chat", 1)])
def test_callers_share_what_is_kept_of_an_image(two: Two, route: str, prefixes: int) -> None:
    """A grounded answer has two prefixes: of the whole image, and of what was left of it."""
    said, *counts = two.ask(0, route)
    assert counts == [0, prefixes]
    assert two.ask(1, route) == (said, prefixes, 0)


@pytest.mark.parametrize(("route", "prefixes"), [("vqa", 2), ("chat", 1)])
def test_callers_never_share_an_entry_where_the_operator_says_so(two: Two, route: str, prefixes: int) -> None:
    """Nobody can time who asked about an image before; a caller finds their own again."""
    two.ask(0, route)  # without a salt: nobody's afterwards
    two.settings.prefix_cache_per_key = True
    said, *counts = two.ask(0, route)
    assert counts == [0, prefixes]
    assert two.ask(1, route) == (said, 0, prefixes)
    assert two.ask(0, route) == two.ask(1, route) == (said, prefixes, 0)
    assert len(two.cache._items) == 3 * prefixes
