"""Parts of a data set that share nothing: split by group (patient, study) with a seed, stable when rows are reordered.

Records that name one group, show one image, or show nearly the same one (hscr/leaks.py) go to one part together. Which part is decided by
a hash of the seed and the group's name, or the picture's digest where there is no group, never by position; shares hold in the mean.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hscr.artifacts import appearing_folder, link_or_copy, write_json
from hscr.data_set import PREFERENCES, given_preferences
from hscr.leaks import Prints, near, prints
from hscr.records import VQARecord, read_preferences, read_records, records_file, write_jsonl


def parse_shares(text: str) -> dict[str, float]:
    """ "train=.8,valid=.1,test=.1" as numbers; ValueError unless every part has a plain name and a share above 0 and they sum to 1."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name) or name in shares or not 0 < share <= 1:
            raise ValueError(f"--shares {item.strip()!r}: write NAME=SHARE, a share above 0, every name once")
        shares[name] = share
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"--shares: sum to {sum(shares.values()):g}, must sum to 1")
    return shares


def units(records: Sequence[VQARecord], folder: Path) -> list[str]:
    """The name of each record's unit, which stays whole: the least of its groups' names, or of its pictures' digests where it has none."""
    owners = [i for i, r in enumerate(records) for _ in r.images]  # of each picture: its record
    found = prints([(folder / image, view) for r in records for image, view in r.shown])
    names = [""] * len(records)
    for i, pixels in reversed(
        list(zip(owners, found.pixels, strict=True))
    ):  # the first picture names a record without group
        group = records[i].group
        names[i] = f"group {group}" if group is not None else f"picture {pixels}"
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, name in enumerate(names):
        parent[root(i)] = root(first.setdefault(name, i))
    # Of several records with one picture one stands for all, so that a picture with many questions costs no more.
    shown: dict[str, int] = {}
    for n, pixels in enumerate(found.pixels):
        parent[root(owners[n])] = root(owners[shown.setdefault(pixels, n)])
    chosen = list(shown.values())
    one_each = Prints([found.pixels[i] for i in chosen], found.hashes[chosen])
    for a, b, _, _ in near(one_each, one_each):
        parent[root(owners[chosen[a]])] = root(owners[chosen[b]])
    least: dict[int, str] = {}
    for i, name in enumerate(names):  # "group …" sorts before "picture …"
        least[root(i)] = min(least.get(root(i), name), name)
    return [least[root(i)] for i in range(len(records))]


def part_of(unit: str, shares: dict[str, float], seed: int) -> str:
    """The part a unit falls into: its hash as a number in [0, 1), laid on the shares in their order."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for name, share in shares.items():
        edge += share
        if number < edge:
            return name
    return name


def split_data(data: Path, out: Path, shares: dict[str, float], seed: int) -> dict[str, Any]:
    """Write OUT/<part>/ (records.jsonl, images/, preferences.jsonl where the data set has one) and OUT/split.json; what split.json says.

    Raises ValueError: OUT is not empty, no usable record, an image is missing or damaged, a part stays empty.
    """
    with appearing_folder(out) as partial:
        return _split(data, partial, shares, seed)


def _split(data: Path, out: Path, shares: dict[str, float], seed: int) -> dict[str, Any]:
    records, rejected = read_records(data)
    file = records_file(data)
    folder, given = file.parent, given_preferences(file)
    if not records:
        raise ValueError(f"data set {data.name!r} has no usable record")
    names = units(records, folder)
    parts: dict[str, list[VQARecord]] = {name: [] for name in shares}
    members: dict[str, set[str]] = defaultdict(set)
    for record, unit in zip(records, names, strict=True):
        part = part_of(unit, shares, seed)
        parts[part].append(record)
        members[part].add(unit)
    empty = [name for name, found in parts.items() if not found]
    if empty:
        raise ValueError(
            f"{', '.join(empty)}: no group falls into this part ({len(set(names))} groups); take another seed or share"
        )
    summary = {
        "seed": seed,
        "shares": shares,
        "parts": {n: {"records": len(found), "groups": len(members[n])} for n, found in parts.items()},
        "records_without_group": sum(r.group is None for r in records),
        "largest_group": max(Counter(names).values()),
        "rejected": len(rejected),
    }
    for name, found in parts.items():
        _write(out / name, folder, found, given)
    write_json(out / "split.json", summary)
    return summary


def _write(target: Path, source: Path, records: Sequence[VQARecord], given: Path | None) -> None:
    target.mkdir(parents=True)
    write_jsonl(target / "records.jsonl", records)
    for image in sorted({image for r in records for image in r.images}):
        link_or_copy(source / image, target / image)
    if given is not None:
        ids = {r.id for r in records}
        write_jsonl(target / PREFERENCES, (p for p in read_preferences(given) if p.record.id in ids))
