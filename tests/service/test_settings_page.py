"""docs/settings.md says of every setting what it is, and is what service/settings.py says."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, variables
from service.settings_page import GROUPS, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page(), (
        "python -m service.settings_page > docs/settings.md"
    )


def test_every_setting_is_named_and_described() -> None:
    rows = {row.split("|")[1].strip(): row.strip("| ").split(" | ") for row in page().splitlines() if "| `" in row}
    for field, variable in variables().items():
        told = rows[f"`{variable}`"]
        assert len(told[-1]) >= 8, f"{field} has no text below it in service/settings.py"
    assert set(GROUPS) <= set(Settings.model_fields)
    assert next(iter(GROUPS)) == next(iter(Settings.model_fields)), "the first field begins a group"


def test_variables_are_those_that_settings_read(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {field: info.default for field, info in Settings.model_fields.items()}
    for field, variable in variables().items():
        value = {int: "7", float: "7", bool: "true"}.get(type(defaults[field]))
        if value is not None:
            monkeypatch.setenv(variable, str(2**40) if variable.endswith("_BYTES") else value)
    monkeypatch.setenv("HSCR_SHARE_GENERATION", "false")
    monkeypatch.setenv("HSCR_OPEN_DOCS", "false")
    read = Settings()
    given = [f for f in defaults if type(defaults[f]) in (int, float, bool)]
    assert [field for field in given if getattr(read, field) == defaults[field]] == []


@pytest.mark.parametrize("field", ["keep_runs_s", "key_waiting_max", "key_running_max", "connections_max"])
def test_null_lifts_a_limit(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says it; a variable is always text."""
    assert f"| `HSCR_{field.upper()}` | " in page()
    monkeypatch.setenv(f"HSCR_{field.upper()}", "null")
    assert getattr(Settings(), field) is None
