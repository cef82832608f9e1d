"""Where published reports lie: DATA/artifacts/reports/<digest>/."""

from __future__ import annotations

from pathlib import Path

FILES = ("report.html", "report.json", "evaluation.json")


def folder(data_dir: Path, name: str) -> Path:
    return data_dir / "artifacts" / "reports" / name
