"""One rendered slice: plane, pose, intensities, a blended lesion, a marker, and the truth about all of them.

Owns the picture and its facts; knows nothing of questions. Every random choice comes from the generator handed in.
Axial and coronal slices follow the neurological convention (the patient's left is on the image's left); sagittal
slices face either way and are never asked for a side.

Axes: images are [R, C], 112 x 112 pixels of about 2 mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from hscr.demo.volumes import LOBES, PLANE_AXIS, PLANES, STRUCTURES, Template

SIZE = 112
PIXEL_MM = 2.0
PATCH = 14  # the side of one visual token, in pixels
POSITION_RANGE_MM = {"axial": (-50, 68), "coronal": (-98, 62), "sagittal": (-58, 58)}
SMALL_RADIUS = (2.6, 3.8)  # pixels
LARGE_RADIUS = (6.5, 9.5)


@dataclass(frozen=True)
class LesionWish:
    """What a lesion shall be; `side` is ignored in sagittal slices."""

    side: str  # left | right
    region: str  # a name from LOBES
    size: str  # small | large
    look: str  # bright | dark


@dataclass(frozen=True)
class MarkerWish:
    """What the marker shall lie on; `side` is ignored in sagittal slices."""

    side: str
    structure: str  # a name from STRUCTURES


@dataclass(frozen=True)
class Facts:
    """All that is true of one slice and may be asked. A side is "" where it is not asked (sagittal)."""

    plane: str
    present: frozenset[str]  # structures clearly visible
    absent: frozenset[str]  # structures of which not one pixel is in the slice
    lesion: LesionWish | None = None
    marker: MarkerWish | None = None


@dataclass(frozen=True)
class Slice:
    """A picture, its facts and the label pictures that dense training uses."""

    image: NDArray[np.uint8]  # [R, C]
    facts: Facts
    structure: NDArray[np.uint8]  # [R, C] index into STRUCTURES
    x_mm: NDArray[np.float32]  # [R, C] left is negative
    lesion_mask: NDArray[np.float32]  # [R, C] 0..1, all zero without a lesion
    lesion_centre: tuple[int, int] | None = None  # (row, column)
    marker_centre: tuple[int, int] | None = None


def render(
    rng: np.random.Generator,
    template: Template,
    plane: str,
    lesion: LesionWish | None = None,
    marker: MarkerWish | None = None,
    shows: str | None = None,
    lacks: str | None = None,
    contrasts: float = 0.0,
    tries: int = 60,
) -> Slice | None:
    """Render a slice that fulfils the wishes, or None when `tries` draws did not.

    `shows` and `lacks` name a structure that must be visible or wholly absent. `contrasts` is the share of slices
    whose tissue contrast is mixed anew from the grey and white matter maps.
    """
    positions = _positions(template, plane, lesion, marker, shows, lacks)
    if not len(positions):
        return None
    for _ in range(tries):
        pose = _pose(rng, template, plane, int(rng.choice(positions)))
        index = [np.rint(axis).astype(np.intp) for axis in pose]
        bounds = template.t1.shape
        inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(index, bounds, strict=True)])
        flat = (index[0] * bounds[1] + index[1]) * bounds[2] + index[2]
        truth = template.truth.take(flat, mode="clip") * inside  # one look-up for all labels: it is the hot spot
        lobe, structure, brain = truth & 15, (truth >> 4) & 15, truth >= 256
        counts = np.bincount(structure.ravel().astype(np.intp), minlength=len(STRUCTURES))
        present = frozenset(s for i, s in enumerate(STRUCTURES) if i and counts[i] >= 30)
        absent = frozenset(s for i, s in enumerate(STRUCTURES) if i and counts[i] == 0)
        if brain.sum() < 1100 or (shows and shows not in present) or (lacks and lacks not in absent):
            continue
        x_mm = (pose[0] + template.origin[0]).astype(np.float32)
        lesion_mask = np.zeros((SIZE, SIZE), np.float32)
        lesion_centre = marker_centre = None
        if lesion is not None:
            placed = _place_lesion(rng, lesion, lobe, brain, x_mm, plane)
            if placed is None:
                continue
            lesion_centre, lesion_mask = placed
        if marker is not None:
            marker_centre = _place_marker(rng, marker, structure, x_mm, plane, lesion_mask)
            if marker_centre is None:
                continue
        picture = _tissue(rng, template, pose, contrasts) * inside
        picture = _intensities(rng, picture, brain, lesion, lesion_mask)
        if marker_centre is not None:
            _draw_marker(picture, marker_centre)
        side_known = plane != "sagittal"
        if lesion is not None and not side_known:
            lesion = LesionWish("", lesion.region, lesion.size, lesion.look)
        if marker is not None and not side_known:
            marker = MarkerWish("", marker.structure)
        image = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        facts = Facts(plane, present, absent, lesion, marker)
        return Slice(image, facts, structure.astype(np.uint8), x_mm, lesion_mask, lesion_centre, marker_centre)
    return None


def _positions(
    template: Template,
    plane: str,
    lesion: LesionWish | None,
    marker: MarkerWish | None,
    shows: str | None,
    lacks: str | None,
) -> NDArray[np.intp]:
    """The slice positions (voxel index along the plane's axis) at which the wishes have a chance."""
    areas = template.areas[plane]
    origin = template.origin[PLANE_AXIS[plane]]
    low, high = POSITION_RANGE_MM[plane]
    index = np.arange(len(areas))
    good = (index + origin >= low) & (index + origin <= high)
    if plane == "sagittal":
        good &= np.abs(index + origin) >= 4
    if lesion is not None:
        need = 900 if lesion.size == "large" else 250
        good &= areas[:, 0, LOBES.index(lesion.region)] >= need
    if marker is not None:
        good &= areas[:, 1, STRUCTURES.index(marker.structure)] >= 120
    if shows is not None:
        good &= areas[:, 1, STRUCTURES.index(shows)] >= 120
    if lacks is not None:
        good &= areas[:, 1, STRUCTURES.index(lacks)] == 0
    return np.flatnonzero(good)


def _pose(rng: np.random.Generator, template: Template, plane: str, position: int) -> list[NDArray[np.float64]]:
    """Voxel coordinates (x, y, z), each [R, C], after rotation, zoom, shift and a small tilt out of the plane."""
    half = (SIZE - 1) / 2
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    zoom = PIXEL_MM * rng.uniform(0.88, 1.12)
    angle = np.deg2rad(rng.uniform(-14, 14))
    down, right = (rows - half) * zoom, (columns - half) * zoom
    down, right = np.cos(angle) * down + np.sin(angle) * right, -np.sin(angle) * down + np.cos(angle) * right
    down, right = down + rng.uniform(-16, 16), right + rng.uniform(-16, 16)
    tilt = np.tan(np.deg2rad(rng.uniform(-5, 5, size=2)))
    depth = position + tilt[0] * down + tilt[1] * right
    middle = np.array([0.0, -18.0, 8.0]) - np.array(template.origin)
    if plane == "axial":
        return [middle[0] + right, middle[1] - down, depth]
    if plane == "coronal":
        return [middle[0] + right, depth, middle[2] - down]
    facing = 1.0 if rng.random() < 0.5 else -1.0
    return [depth, middle[1] + facing * right, middle[2] - down]


def _place_lesion(
    rng: np.random.Generator, wish: LesionWish, lobe: NDArray, brain: NDArray, x_mm: NDArray, plane: str
) -> tuple[tuple[int, int], NDArray[np.float32]] | None:
    """A centre and an irregular soft blob, most of it inside the wished region and side; None when it has no room."""
    radius = rng.uniform(*(LARGE_RADIUS if wish.size == "large" else SMALL_RADIUS))
    region = lobe == LOBES.index(wish.region)
    home = region & (ndimage.uniform_filter(region.astype(np.float32), 2 * int(radius * 0.8) + 1) > 0.55)
    if plane != "sagittal":
        margin = 5.0 + 0.9 * radius * PIXEL_MM
        home &= (x_mm < -margin) if wish.side == "left" else (x_mm > margin)
    choices = np.flatnonzero(home)
    for _ in range(4 if len(choices) else 0):
        row, column = divmod(int(rng.choice(choices)), SIZE)
        mask = _blob(rng, row, column, radius) * brain
        body = mask > 0.5
        if body.sum() < 0.75 * np.pi * radius**2 * 0.8:
            continue
        elsewhere = body & (lobe != 0) & ~region
        if (body & region).sum() >= 0.5 * body.sum() and elsewhere.sum() <= 0.2 * body.sum():
            return (row, column), mask.astype(np.float32)
    return None


def _blob(rng: np.random.Generator, row: int, column: int, radius: float) -> NDArray[np.float64]:
    reach = int(2 * radius) + 2
    window = (slice(max(row - reach, 0), row + reach + 1), slice(max(column - reach, 0), column + reach + 1))
    rows, columns = np.ogrid[0:SIZE, 0:SIZE]
    down, right = rows[window[0]] - row, columns[:, window[1]] - column
    angle = np.arctan2(down, right)
    outline = np.full(angle.shape, radius)
    for harmonic in (2, 3, 4):
        outline += radius * rng.uniform(0, 0.14) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    blob = np.zeros((SIZE, SIZE))
    blob[window] = 1 / (1 + np.exp(-(outline - np.hypot(down, right)) / 0.6))
    return blob


def _place_marker(
    rng: np.random.Generator, wish: MarkerWish, structure: NDArray, x_mm: NDArray, plane: str, lesion_mask: NDArray
) -> tuple[int, int] | None:
    """A pixel whose surroundings are mostly the wished structure, away from the lesion; None when there is none."""
    own = structure == STRUCTURES.index(wish.structure)
    home = own & (ndimage.uniform_filter(own.astype(np.float32), 3) > 0.7)
    home[:7], home[-7:], home[:, :7], home[:, -7:] = False, False, False, False
    if plane != "sagittal":
        home &= (x_mm < -5) if wish.side == "left" else (x_mm > 5)
    if lesion_mask.any():
        home &= ndimage.distance_transform_edt(lesion_mask < 0.1) > 9
    choices = np.flatnonzero(home)
    if not len(choices):
        return None
    row, column = divmod(int(rng.choice(choices)), SIZE)
    return row, column


def _tissue(
    rng: np.random.Generator, template: Template, pose: list[NDArray], contrasts: float
) -> NDArray[np.floating]:
    """Tissue intensity [R, C]: the template's T1, or another contrast mixed from its grey and white matter."""

    def look_up(volume: NDArray) -> NDArray:
        return ndimage.map_coordinates(volume, pose, order=1, mode="constant")

    t1 = look_up(template.t1)
    if rng.random() >= contrasts:
        return t1
    grey, white = look_up(template.gm), look_up(template.wm)
    fluid = np.clip((t1 > 0.05) - grey - white, 0, 1)
    levels = rng.uniform(0.35, 0.9, size=2)
    mixed = levels[0] * grey + levels[1] * white + rng.uniform(0.1, 0.6) * fluid
    share = rng.uniform(0.4, 1.0)
    return share * mixed + (1 - share) * t1


def _intensities(
    rng: np.random.Generator, tissue: NDArray, brain: NDArray, lesion: LesionWish | None, lesion_mask: NDArray
) -> NDArray[np.float64]:
    """Gamma, gain, lesion, bias field and noise, in the order in which a scanner would meet them."""
    picture = np.clip(tissue, 0, 1.15) ** rng.uniform(0.9, 2.0) * rng.uniform(0.6, 0.74)
    if lesion is not None:
        level = rng.uniform(0.93, 1.08) if lesion.look == "bright" else rng.uniform(0.06, 0.18)
        alpha = rng.uniform(0.85, 1.0) * lesion_mask
        picture = picture * (1 - alpha) + level * alpha
    grid = np.linspace(-1, 1, SIZE)
    down, right = grid[:, None], grid[None, :]
    weights = rng.normal(0, 0.09, size=5)
    bias = weights[0] * down + weights[1] * right + weights[2] * down * right
    bias = bias + weights[3] * (down**2 - 0.3) + weights[4] * (right**2 - 0.3)
    picture = picture * np.exp(np.clip(bias, -0.3, 0.3)) * np.where(brain, 1.0, 0.6)
    return np.abs(picture + rng.normal(0, rng.uniform(0.008, 0.035), size=picture.shape))


def _draw_marker(picture: NDArray, centre: tuple[int, int]) -> None:
    """A white open cross with a dark edge; its middle stays free so that the tissue under it can be seen."""
    row, column = centre
    for value, width in ((0.0, 1), (1.0, 0)):
        for sign in (-1, 1):
            near, far = sign * 3, sign * 6
            rows = slice(row + min(near, far) - width, row + max(near, far) + 1 + width)
            columns = slice(column + min(near, far) - width, column + max(near, far) + 1 + width)
            picture[max(rows.start, 0) : rows.stop, column - width : column + 1 + width] = value
            picture[row - width : row + 1 + width, max(columns.start, 0) : columns.stop] = value


__all__ = ["LOBES", "PLANES", "STRUCTURES", "Facts", "LesionWish", "MarkerWish", "Slice", "render"]
