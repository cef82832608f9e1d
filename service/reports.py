"""The files of a published report. They lie in the store (service/artifact_store.py) under the digest of their content."""

from __future__ import annotations

FILES = ("report.html", "report.json", "evaluation.json")
