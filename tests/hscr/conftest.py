"""Fixtures of the library's tests: a tiny LLaVA on disk (once a session) and loaded afresh (a test)."""

from pathlib import Path

import pytest
import torch

from hscr.model import VLM, load_model
from tests.hscr.tiny import save_records, save_tiny_llava


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture
def vlm(tiny_folder: Path) -> VLM:
    return load_model(tiny_folder, device="cpu")


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    return save_records(tmp_path / "data")
