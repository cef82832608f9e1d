"""PathVQA as published: pickles `qas/<split>/<split>_qa.pkl`, images `images/<split>/<image>.jpg`. The Hugging Face form: hf_parquet.py.

A pickle is a program, so it is read by an unpickler that knows no names at all: lists, dicts, texts and numbers come out, everything else
(a class, a function, an array) ends the reading with an error. Quirks: image names have no extension, there are no answer types.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hscr.readers.rows import Found, Part, each, find_image, label_files, make, read_limited, row_id, split_of, text
from hscr.records import RejectedRow


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, texts and numbers only: whatever needs a name from a module is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("the pickle asks for an object from elsewhere")


def load_plain(path: Path) -> Any:
    """The value of a pickle of plain data. ValueError where it holds anything else or is damaged."""
    data = read_limited(path)
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name}: is refused: {error}; only lists, dicts, texts and numbers are read") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path.name}: is no whole pickle ({type(error).__name__})") from None


def parts(source: Path) -> list[Part]:
    """One part a `*_qa.pkl`; none where the source holds none."""
    nested = [f for folder in sorted(source.glob("qas/*")) for f in label_files(folder, ".pkl")]
    found = [f for f in nested or label_files(source, ".pkl") if f.name.endswith("_qa.pkl")]
    return [Part(f, split_of(f.name), f.parents[2] if f.parent.parent.name == "qas" else f.parent) for f in found]


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    items = load_plain(part.file)
    if not isinstance(items, list):
        raise ValueError(f"{part.file.name}: must hold a list, got {type(items).__name__}")
    yield from each(enumerate(items, 1), part, _found)


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    name = text(row.get("image"))
    if not isinstance(name, str):  # never str() of it: lists in a pickle may share their items a billion times over
        raise ValueError("image: the row names none")
    folders = [f"images/{part.split}", "images"] if part.split else ["images"]
    places = [find_image(part.root, name and f"{name}{suffix}", folders) for suffix in (".jpg", ".png", ".jpeg", "")]
    image = next((p for p in places if p.is_file()), places[0])
    fields = {
        "id": row_id(part, line),
        "image": f"images/{image.name}",
        "question": row.get("question"),
        "answer": row.get("answer"),
        "meta": {"split": part.split},
    }
    return make(line, fields, image)
