"""Decoding in processes of their own: the same pixels, and what kills, stalls or swells one of them reaches nobody else."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from hscr.image_limits import Note
from hscr.images import Decoded, ImageError, ImageLimits, View, decode_image
from service import decode_process, decoding
from service.decode_arena import ARENA_BYTES, Arena, arena_file
from service.decoding import Decoders, DecodersBusy, Recent
from tests.conftest import png, wait_for
from tests.hscr.medical import dicom
from tests.hscr.test_images import encoded

LIMITS = ImageLimits()


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(1, 2**30, 20)
    yield made
    made.close()


def child(decoders: Decoders) -> psutil.Process:
    free = decoders._free.get()
    decoders._free.put(free)
    assert free is not None
    return psutil.Process(free.process.pid)


def test_pixels_notes_and_views_are_those_of_the_library(decoders: Decoders) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))
    scan = dicom(np.array([[[0, 9]], [[9, 0]]], np.uint8), BurnedInAnnotation="YES")
    one, two = decoders.decode([encoded(picture), scan], LIMITS, [View(), View(frame=1)])
    assert one.image.tobytes() == picture.tobytes()
    assert two.image.tobytes() == decode_image(scan, view=View(frame=1)).tobytes()
    assert (two.note.format, two.note.flags) == ("dicom", ("burned_in_annotation",))
    with pytest.raises(ImageError, match="the data is not a PNG"):
        decoders.decode([b"canary"], LIMITS, [View()])


def test_what_does_not_fit_into_the_shared_memory_goes_through_the_pipes(decoders: Decoders) -> None:
    """A file and its pixels, pixels alone; in between what fits, as four bytes a pixel or as three."""
    kinds = [(2400, "BMP"), (100, "BMP"), (2400, "PNG"), (2100, "BMP")]
    pictures = [Image.linear_gradient("L").resize((side, side)).convert("RGB") for side, _ in kinds]
    files = [encoded(picture, kind) for picture, (_, kind) in zip(pictures, kinds, strict=True)]
    assert [len(data) > ARENA_BYTES for data in files] == [True, False, False, False]
    assert ARENA_BYTES < 3 * 2400**2
    assert 4 * 2100**2 > ARENA_BYTES > 3 * 2100**2
    for picture, data in zip(pictures, files, strict=True):
        assert decoders.decode([data], LIMITS, [View()])[0].image.tobytes() == picture.tobytes()
    several = decoders.decode(files[:2], LIMITS, [View(), View()])
    assert [d.image.tobytes() for d in several] == [p.tobytes() for p in pictures[:2]]


def test_without_shared_memory_all_goes_through_the_pipes(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", forbidden, raising=False)
    assert decoders.decode([png(3)], LIMITS, [View()])[0].image.tobytes() == decode_image(png(3)).tobytes()
    (tmp_path / "good.png").write_bytes(png())
    assert decoders.clean(tmp_path / "good.png", b"key").note.format == "png"


def test_an_image_is_its_own_when_the_next_one_comes(decoders: Decoders) -> None:
    first = decoders.decode([png(1)], LIMITS, [View()])[0].image
    before = first.tobytes()
    assert decoders.decode([png(2)], LIMITS, [View()])[0].image.tobytes() != before
    assert first.tobytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is shared")
def test_shared_memory_cannot_be_cut_or_read_beyond_and_ends_with_its_process() -> None:
    """Whoever reads a mapped file that another process has cut is killed."""
    descriptor = arena_file()
    assert descriptor is not None
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    arena = Arena(descriptor)
    os.close(descriptor)
    for sizes in ([ARENA_BYTES, 1], [-1, 2]):
        with pytest.raises(ValueError, match="more than"):
            list(arena.get(sizes))
    del arena

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("hscr-decode")

    gc.collect()  # of pools of other tests
    before, descriptors = mapped(), psutil.Process().num_fds()
    with closing(Decoders(1, 2**30, 20)) as pool:
        for _ in range(3):
            pool.decode([png()], LIMITS, [View()])
            assert mapped() == before + 1
            process = child(pool)
            process.kill()
            process.wait(10)
    assert (mapped(), psutil.Process().num_fds()) == (before, descriptors)


def test_a_killed_process_is_replaced(decoders: Decoders) -> None:
    decoders.warm()
    first = child(decoders)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(10)
    assert decoders.decode([png()], LIMITS, [View()])[0].image.size == (8, 8)
    assert child(decoders).pid != first.pid


def test_a_process_that_stalls_is_killed_in_time_and_replaced() -> None:
    decoders = Decoders(1, 2**30, 1.5)
    decoders.warm()
    stalled = child(decoders)
    os.kill(stalled.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ImageError, match="takes more than"):
        decoders.decode([png()], LIMITS, [View()])
    assert time.monotonic() - begin < 10
    assert not psutil.pid_exists(stalled.pid)
    decoders.seconds = 20
    assert decoders.decode([png()], LIMITS, [View()])[0].image.size == (8, 8)
    decoders.close()


def test_memory_is_bounded_and_what_needs_more_is_refused() -> None:
    decoders = Decoders(1, 2**29, 20)
    image = Image.new("RGBA", (6000, 6000))  # 144 MB, twice more while it is laid on black
    with pytest.raises(ImageError, match=r"memory|damaged|ended"):
        decoders.decode([encoded(image)], LIMITS, [View()])
    assert decoders.decode([png()], LIMITS, [View()])[0].image.size == (8, 8)
    decoders.close()


def test_no_free_process_is_said(decoders: Decoders) -> None:
    decoders.seconds = 0.1
    taken = decoders._free.get()
    with pytest.raises(DecodersBusy):
        decoders.decode([png()], LIMITS, [View()])
    decoders._free.put(taken)


def test_a_file_is_checked_where_it_lies_and_its_name_is_not_told(decoders: Decoders, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "canary.png").write_bytes(b"canary")
    assert decoders.check(tmp_path / "good.png").format == "png"
    with pytest.raises(ImageError) as error:
        decoders.check(tmp_path / "canary.png")
    assert "canary" not in str(error.value)


def test_a_process_that_reads_strangers_files_is_told_no_secret(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HSCR_API_KEY", "DATABASE_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary")
    decoders.warm()
    # The kernel closes the pipe that starting it waits for before it lays this out.
    told = wait_for(child(decoders).environ, 10)
    assert "canary" not in told.values()
    assert told["OMP_NUM_THREADS"] == "1"


def test_processes_end_with_their_stdin(decoders: Decoders) -> None:
    decoders.warm()
    process = child(decoders)
    free = decoders._free.get()
    assert free is not None
    free.pipes[0].close()
    process.wait(10)
    decoders._free.put(None)
    free.process.wait()
    free.pipes[1].close()


def test_images_that_are_held_are_bounded_together_and_counted_out_when_they_go() -> None:
    """64 waiting questions of 40 Mpx, each a PNG of a few kilobytes, would be 7.7 GB."""
    with closing(Decoders(1, 2**30, 20.0, held_max_bytes=2 * 8 * 8 * 4)) as pool:
        first, second = (pool.decode([png(n)], ImageLimits(), [View()]) for n in range(2))
        with pytest.raises(DecodersBusy):
            pool.decode([png()], ImageLimits(), [View()])
        assert pool.stats().no_room == 1
        del first
        third = pool.decode([png()], ImageLimits(), [View()])
        assert second[0].image.size == third[0].image.size == (8, 8)


def test_a_file_that_was_decoded_a_moment_ago_is_not_decoded_again() -> None:
    """But another view of it is, for another salt, and once it had to go."""
    one = 8 * 8 * 4
    with closing(Decoders(1, 2**30, 20.0, held_max_bytes=3 * one, recent_max_bytes=2 * one)) as pool:
        first = pool.decode([png(0)], LIMITS, [View()])
        assert pool.decode([png(0)], LIMITS, [View()]) is first
        assert pool.stats().orders == 1
        pool.decode([png(0)], LIMITS, [View()], "another key")
        assert pool.stats().orders == 2
        with pytest.raises(ImageError):
            pool.decode([png(0)], LIMITS, [View(frame=1)])
        pool.decode([png(1)], LIMITS, [View()])  # two are kept: the longest unused goes
        assert pool.decode([png(0)], LIMITS, [View()]) is not first
        assert pool.stats().orders == 5


def test_files_that_look_alike_at_a_glance_are_told_apart() -> None:
    """By the digest; the last of them is kept."""
    one = bytearray(encoded(Image.new("RGB", (64, 64)), "BMP"))
    other = bytearray(one)
    other[-2] = 255
    common = decoding._common(LIMITS, [View()])
    assert decoding._glance([bytes(one)], common, "") == decoding._glance([bytes(other)], common, "")
    with closing(Decoders(1, 2**30, 20.0, recent_max_bytes=3 * 64 * 64 * 4)) as pool:
        first, second, again = (pool.decode([bytes(data)], LIMITS, [View()]) for data in (one, other, other))
        assert first[0].image.tobytes() != second[0].image.tobytes()
        assert again is second
        assert pool._recent._n_bytes == 64 * 64 * 4
        assert pool.decode([bytes(one)], LIMITS, [View()])[0].image.tobytes() == first[0].image.tobytes()


def test_a_files_digest_is_made_while_another_process_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known one's before, so that nothing is decoded; each once."""
    busy: list[int] = []
    with closing(Decoders(1, 2**30, 20.0, recent_max_bytes=2**20)) as pool:

        def digest(*of: Any) -> bytes:
            busy.append(pool.stats().busy)
            return made(*of)

        made = decoding._digest
        monkeypatch.setattr(decoding, "_digest", digest)
        for n in (0, 1, 1):
            pool.decode([png(n)], LIMITS, [View()])
    assert busy == [1, 1, 0]


def test_kept_images_make_room_for_questions_that_wait() -> None:
    one = 8 * 8 * 4
    with closing(Decoders(1, 2**30, 20.0, held_max_bytes=2 * one, recent_max_bytes=2 * one)) as pool:
        assert [pool.decode([png(n)], LIMITS, [View()])[0].image.size for n in range(4)] == [(8, 8)] * 4
        held = [pool.decode([png(n)], LIMITS, [View()]) for n in range(2)]
        with pytest.raises(DecodersBusy):
            pool.decode([png(2)], LIMITS, [View()])
        assert len(held) == 2


def test_kept_images_are_let_go_when_nobody_asks() -> None:
    """They are somebody's pictures; a question in between puts it off, once."""
    kept, image = Recent(2**20, 0.6), Decoded(Image.new("RGB", (8, 8)), Note("PNG", None, ()))
    kept.put(1, b"digest", (image,))
    time.sleep(0.2)
    asked = time.monotonic()
    assert kept.get(1, lambda: b"digest") is not None
    wait_for(lambda: not kept._items, 20)
    assert time.monotonic() - asked >= 0.6
    kept.put(1, b"digest", (image,))
    wait_for(lambda: not kept._items, 20)


def test_a_process_whose_answer_was_not_read_whole_answers_nobody_else(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipe may hold the rest of somebody's picture."""
    decoders.warm()
    first = child(decoders)

    def no_memory(*_: object) -> bytearray:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(decode_process, "_read", no_memory)
        with pytest.raises(MemoryError):
            decoders.decode([png(0)], LIMITS, [View()])
    assert not first.is_running()
    assert decoders.decode([png(1)], LIMITS, [View()])[0].image.size == (8, 8)
