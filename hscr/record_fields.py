"""What the fields of a record may hold: values as JSON gives them in, checked values out; ValueError names the field that is wrong and how.

What passes here can be written as UTF-8, stored in a database and sent as JSON again. Knows no record (hscr/records.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hscr.image_view import View, parsed_view

MAX_TEXT_CHARS = 20_000
MAX_IMAGES = 16
MAX_META_DEPTH = 20


def text(value: Any, name: str) -> str:
    """A text that is not empty, without the spaces around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: must be a text that is not empty")
    return storable(value, name).strip()


def storable(value: Any, name: str) -> str:
    """A text that every file and database takes."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a text")
    if len(value) > MAX_TEXT_CHARS:
        raise ValueError(f"{name}: longer than {MAX_TEXT_CHARS} characters")
    if "\x00" in value:
        raise ValueError(f"{name}: holds a NUL character")
    if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name}: holds half of a surrogate pair, which is no text")
    return value


def text_or_number(value: Any, name: str) -> str:
    """A text, or a number as text (VQA-RAD has numeric answers)."""
    if isinstance(value, float) and not math.isfinite(value):  # what pandas writes for a missing value
        raise ValueError(f"{name}: is {value}, which is no value")
    return text(str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value, name)


def image_paths(row: dict[str, Any]) -> list[str]:
    """The paths under `image` (one) or `images` (a list)."""
    several = row.get("images")
    if several is None:
        return [_image_path(row.get("image"), "image")]
    if "image" in row:
        raise ValueError("image: give image or images, not both")
    if not isinstance(several, list) or not 0 < len(several) <= MAX_IMAGES:
        raise ValueError(f"images: must be a list of 1 to {MAX_IMAGES} paths")
    return [_image_path(path, "images") for path in several]


def _image_path(value: Any, name: str) -> str:
    path = text(value, name)
    parts = Path(path).parts
    if Path(path).is_absolute() or ".." in parts or "\\" in path:
        raise ValueError(f"{name}: must be a path inside the data set's folder")
    if len(path) > 1000 or any(len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{name}: the path is longer than a file system allows")
    return path


def views(row: dict[str, Any], n: int) -> tuple[View, ...]:
    """The view under `view` (of one image) or the views under `views` (a list, one an image); nothing where all are the usual one."""
    one, several = row.get("view"), row.get("views")
    if one is not None and (several is not None or n != 1):
        raise ValueError("view: is for one image; give views with images")
    if several is not None and not (isinstance(several, list) and len(several) == n):
        raise ValueError("views: must be a list with one object for each image")
    given = [one] if one is not None else several or []
    parsed = tuple(parsed_view(v, "view" if one is not None else "views") for v in given)
    return parsed if any(view != View() for view in parsed) else ()


def options(value: Any) -> tuple[str, ...]:
    """Texts that are not empty, as they are: scorers compare them with the answer."""
    if not (isinstance(value, list) and all(isinstance(o, str) and o for o in value)):
        raise ValueError("options: must be a list of texts")
    return tuple(storable(o, "options") for o in value)


def grounded(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(word, words of its category) of each entry."""
    if not isinstance(value, list):
        raise ValueError("grounded: must be a list")
    for row in value:
        if not (isinstance(row, dict) and isinstance(row.get("word"), str) and isinstance(row.get("among"), list)):
            raise ValueError('grounded: must be a list of {"word": text, "among": [texts]}')
    return tuple(
        (storable(row["word"], "grounded"), tuple(storable(str(w), "grounded") for w in row["among"])) for row in value
    )


def meta(value: Any) -> dict[str, Any]:
    """An object of plain values, MAX_META_DEPTH levels deep at most, without NaN and infinities, which are no JSON."""
    if not isinstance(value, dict):
        raise ValueError("meta: must be an object")
    level: list[Any] = [value]
    for _ in range(MAX_META_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                storable(item, "meta")
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"meta: holds {item}, which is no JSON")
        if not inner:
            return value
        level = inner
    raise ValueError(f"meta: nested more than {MAX_META_DEPTH} levels deep")


def objects(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects under `name`, empty where there is none."""
    values = row.get(name, [])
    if not (isinstance(values, list) and all(isinstance(v, dict) for v in values)):
        raise ValueError(f"{name}: must be a list of objects")
    return values


def number(row: dict[str, Any], name: str) -> float:
    """The number under `name`."""
    value = row.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (isinstance(value, int) and abs(value) > 2**53)
    ):
        raise ValueError(f"{name}: must be a number")
    return value
