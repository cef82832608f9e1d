"""Features in memory and on disk: bounded, whole or not there, and the tower not run again by a later run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hscr.feature_cache import DiskFeatures, FeatureCache, features_folder
from hscr.model import VLM, encode_prompts, load_model
from tests.hscr.tiny import picture

CPU = torch.device("cpu")


def test_memory_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = FeatureCache(max_bytes=100)
    for name in "ab":
        cache.put(name, torch.zeros(10))  # 40 bytes each
    cache.get("a")
    cache.put("c", torch.zeros(10))
    assert [cache.get(n) is not None for n in "abc"] == [True, False, True]
    cache.put("a", torch.zeros(10))  # again: counted once
    assert cache.n_bytes == 80
    cache.put("big", torch.zeros(26))
    assert cache.get("big") is None
    assert cache.n_bytes == 80


def test_cached_features_hold_no_view_of_their_batch() -> None:
    cache = FeatureCache()
    cache.put("x", torch.zeros(100, 10)[3])
    held = cache.get("x")
    assert held is not None
    assert held.untyped_storage().nbytes() == 40


def disk(folder: Path, identity: object = "model", max_bytes: int = 2**20) -> DiskFeatures:
    return DiskFeatures(folder, identity=identity, device=CPU, max_bytes=max_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_is_read_by_another_process_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    features = torch.randn(5, 3).to(dtype)
    FeatureCache(disk=disk(tmp_path)).put("sha256:ab", features)
    found = FeatureCache(disk=disk(tmp_path)).get("sha256:ab")
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, features)
    assert disk(tmp_path, identity="another model").get("sha256:ab") is None


def test_what_memory_forgot_comes_from_the_disk(tmp_path: Path) -> None:
    cache = FeatureCache(max_bytes=40, disk=disk(tmp_path))
    for name in "ab":
        cache.put(name, torch.full((10,), float(ord(name))))
    assert torch.equal(cache.get("a"), torch.full((10,), 97.0))  # type: ignore[arg-type]
    assert cache.n_bytes == 40


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "text"])
def test_a_damaged_file_counts_as_not_there(tmp_path: Path, damage: str) -> None:
    store = disk(tmp_path)
    store.put("a", torch.ones(100))
    (path,) = tmp_path.glob("*/a.safetensors")
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-8], "zeroed": whole[:-400] + bytes(400), "text": b"not a tensor"}[damage])
    assert store.get("a") is None


def test_the_folder_is_bounded_over_all_models_and_loses_the_longest_unread_first(tmp_path: Path) -> None:
    """Twenty files of about a kilobyte in a bound of ten: reading one keeps it, whoever wrote it."""
    first = disk(tmp_path, "one", max_bytes=10_000)
    first.put("read", torch.zeros(250))
    for n in range(20):
        disk(tmp_path, "two", max_bytes=10_000).put(str(n), torch.zeros(250))
        for path in tmp_path.glob("*/*"):  # as if a minute went by
            os.utime(path, (path.stat().st_atime - 60, path.stat().st_mtime - 60))
        assert first.get("read") is not None
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 11_500
    second = disk(tmp_path, "two", max_bytes=10_000)
    assert second.get("0") is None
    assert second.get("19") is not None


def test_what_nobody_reads_for_a_month_goes(tmp_path: Path) -> None:
    store = disk(tmp_path)
    for name in ("old", "new"):
        store.put(name, torch.zeros(3))
    (path,) = tmp_path.glob("*/old.safetensors")
    os.utime(path, (time.time() - 31 * 86400,) * 2)
    store = disk(tmp_path)
    assert (store.get("old"), store.get("new") is not None) == (None, True)


def test_a_disk_that_takes_no_more_ends_the_writing_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(disk=disk(tmp_path / "a file where the folder should be"))
    (tmp_path / "a file where the folder should be").write_text("")
    cache.put("a", torch.ones(3))
    cache.put("b", torch.ones(3))
    assert cache.get("b") is not None


def test_a_later_run_never_runs_the_tower(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, questions = [picture(0), picture(1)], ["Where?", "What?"]
    first = encode_prompts(load_model(tiny_folder, device="cpu", feature_cache=tmp_path), images, questions)
    again = load_model(tiny_folder, device="cpu", feature_cache=tmp_path)

    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(again.model, "get_image_features", run)
    for a, b in zip(first, encode_prompts(again, images, questions), strict=True):
        assert torch.equal(a.features, b.features)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the tower ran"):
        encode_prompts(again, [picture(2)], ["Where?"])
    half = load_model(tiny_folder, device="cpu", dtype="bfloat16", feature_cache=tmp_path)
    assert encode_prompts(half, images, questions)[0].features.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_where_features_are_kept(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    monkeypatch.delenv("HSCR_FEATURE_CACHE", raising=False)
    assert features_folder() == Path("/there/hscr/features")
    monkeypatch.setenv("HSCR_FEATURE_CACHE", "off")
    assert features_folder() is None
    monkeypatch.setenv("HSCR_FEATURE_CACHE", "/elsewhere")
    assert features_folder() == Path("/elsewhere")
    assert vlm.features.disk is None  # a library call without a folder writes nowhere
