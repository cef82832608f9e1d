"""Leaks: the same or nearly the same picture on both sides, in the data to align on and in those to evaluate on. No torch here.

Same: equal decoded pixels, however the file is stored. Near: at most NEAR_BITS of the 256 bits of a perceptual hash differ (pHash: the
16 × 16 lowest frequencies of the picture at 64 × 64, each above or below their median; the package imagehash).
Measured on the demo data, a hard case, for all its slices show heads of one shape: among 3,960 × 900 pairs of different slices (pretrain,
align, align_balanced against valid, test) the least distance is 32; copies of 150 test slices (JPEG quality 30, 50, 75; sizes 0.5, 0.75,
2; brightness or contrast × 1.1, + 15 grey levels; half size, JPEG 75 and × 1.1 together) are at most 12 away, in the median 0 to 4. An
8 × 8 hash cannot do it: different slices come as near as 0.
Missed: crops (2 of 112 pixels off each side: 28 in the median), rotations, mirror images, and many a copy of a picture without detail finer
than an eighth of its side, whose higher frequencies are noise (8 × 8 noise drawn at 64 × 64 and halved: 14 in the median, 24 at most).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hscr.artifacts import json_digest, write_json
from hscr.data_set import DataSet
from hscr.events import Event, Warning_
from hscr.images import View, decode_image
from hscr.run_dir import RunDir

HASH_SIDE = 16
NEAR_BITS = 16
_CHUNK = 4_000_000  # pairs compared at once: 32 MB a word


@dataclass(frozen=True)
class Leak:
    """A record of the first data set and one of the second whose pictures are the same (distance 0 and `same`) or `distance` bits apart.

    Records are told by number, from 1: a report may be stored where ids may not.
    """

    first: int
    second: int
    same: bool
    distance: int


@dataclass(frozen=True)
class Prints:
    """Fingerprints of P pictures: digests of their pixels, and hashes [P, 4] of 64 bits each."""

    pixels: list[str]
    hashes: NDArray[np.uint64]


Picture = Path | tuple[Path, View]  # a file, or what a view shows of it


def pixel_digest(image: Image.Image) -> str:
    """Digest of an RGB picture's size and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}/".encode() + image.tobytes()).hexdigest()


def prints(files: Sequence[Picture]) -> Prints:
    """Fingerprint every picture; a file named twice with one view is read once. Raises ImageError (a ValueError) for a damaged one."""
    known: dict[Picture, tuple[str, NDArray[np.uint64]]] = {}
    for file in files:
        if file not in known:
            image = decode_image(file) if isinstance(file, Path) else decode_image(file[0], view=file[1])
            bits = np.packbits(imagehash.phash(image, hash_size=HASH_SIDE).hash.ravel())
            known[file] = pixel_digest(image), bits.view(np.uint64)
    hashes = [known[file][1] for file in files]
    return Prints([known[file][0] for file in files], np.array(hashes, dtype=np.uint64).reshape(-1, HASH_SIDE**2 // 64))


def near(first: Prints, second: Prints) -> Iterator[tuple[int, int, bool, int]]:
    """(index in `first`, index in `second`, same pixels, bits apart) of every pair that is the same or near."""
    rows = max(1, _CHUNK // max(1, len(second.pixels)))
    for start in range(0, len(first.pixels), rows):
        block = first.hashes[start : start + rows]
        distance = np.zeros((len(block), len(second.pixels)), np.uint16)
        for word in range(block.shape[1]):
            distance += np.bitwise_count(block[:, None, word] ^ second.hashes[None, :, word])
        for row, column in np.argwhere(distance <= NEAR_BITS):
            i, j = start + int(row), int(column)
            yield i, j, first.pixels[i] == second.pixels[j], int(distance[row, column])


def find_leaks(first: Sequence[Picture], second: Sequence[Picture]) -> list[Leak]:
    """Leaks between two data sets, given the picture of every record; the same ones before the near ones, else by number."""
    found = [Leak(i + 1, j + 1, same, bits) for i, j, same, bits in near(prints(first), prints(second))]
    return sorted(found, key=lambda leak: (not leak.same, leak.distance, leak.second, leak.first))


def _record_leaks(data: DataSet, evaluation: DataSet) -> list[Leak]:
    """Leaks between the records of two data sets, each of one picture or several; of a pair of records the nearest pictures count."""
    shown = [
        [(n, (d.folder / i, v)) for n, r in enumerate(d.records, 1) for i, v in r.shown] for d in (data, evaluation)
    ]
    found: dict[tuple[int, int], Leak] = {}
    for leak in find_leaks(*([file for _, file in pictures] for pictures in shown)):
        pair = shown[0][leak.first - 1][0], shown[1][leak.second - 1][0]
        found.setdefault(pair, Leak(*pair, leak.same, leak.distance))
    return list(found.values())


def check_evaluation(run: RunDir, data: DataSet, evaluation: DataSet, *, allow: bool) -> Iterator[Event]:
    """Refuse an evaluation on what the model is aligned on: ValueError, or where `allow` a warning. RUN/leaks.json names every pair."""
    inputs = json_digest([data.digest, evaluation.digest, HASH_SIDE, NEAR_BITS])
    path = run.path / "leaks.json"
    if not run.is_done("leaks", inputs):
        run.start("leaks", inputs)
        leaks = _record_leaks(data, evaluation)
        write_json(path, [asdict(leak) for leak in leaks])
        run.finish("leaks", [path.name])
    leaks = [Leak(**leak) for leak in json.loads(path.read_text())]
    if leaks:
        told = describe(leaks, len(evaluation.records))
        if not allow:
            raise ValueError(
                f"{told} Keep patients apart (hscr split), or take the scores for what they are: --allow-leak (evaluation.allow_leak)."
            )
        yield Warning_("leak", f"{told} The scores say little about new pictures.")


def refuse_own_data(adapter: Path, digest: str) -> None:
    """ValueError where the adapter says (hscr.json) that it was aligned on the data set of this digest; foreign adapters say nothing."""
    path = adapter / "hscr.json"
    lineage = json.loads(path.read_text(encoding="utf-8")).get("lineage", {}) if path.is_file() else {}
    if lineage.get("data") == digest:
        raise ValueError(
            "the adapter was aligned on this very data set: take other data (hscr split), or --allow-leak (evaluation.allow_leak)"
        )


def describe(leaks: Sequence[Leak], n: int) -> str:
    """How many of `n` evaluation records are concerned, and the first pairs by number."""
    same = {leak.second for leak in leaks if leak.same}
    nearly = {leak.second for leak in leaks} - same
    pairs = ", ".join(f"{leak.first} and {leak.second}" for leak in leaks[:3])
    return (
        f"{len(same | nearly)} of {n} evaluation records have a picture that is also in the data to align on "
        f"({len(same)} the same, {len(nearly)} nearly); pairs of record numbers: {pairs}{' …' if len(leaks) > 3 else ''}."
    )
