"""VQA-RAD, PathVQA and their kind from Hugging Face: `<split>-*.parquet` with columns image {bytes, path}, question, answer.

Read in batches through pyarrow, so that a file larger than memory is no matter. There are no answer types (yes/no is closed) unless the
file has such a column; the published VQA-RAD here has 1,793 training and 451 test rows. TRL's preference columns are trl_preference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hscr.readers.rows import Found, Part, each, find_image, image_target, label_files, make, row_id, split_of, text
from hscr.records import RejectedRow

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COLUMNS = {"image", "question", "answer"}
_BATCH_ROWS = 64  # embedded images: 64 rows are some tens of megabytes


def open_parquet(path: Path) -> pq.ParquetFile:
    """ValueError where pyarrow is missing, naming the extra, or the file is damaged."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path.name}: parquet needs pyarrow: pip install 'hscr[data]'") from None
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: is no whole parquet file ({type(error).__name__})") from None


def parquet_parts(source: Path, columns: set[str]) -> list[Part]:
    """One part a parquet file that has these columns."""
    files = [*label_files(source, ".parquet"), *label_files(source / "data", ".parquet")]
    return [Part(f, split_of(f.name), f.parent) for f in files if columns <= set(open_parquet(f).schema_arrow.names)]


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as dicts, a batch in memory at a time; ValueError where the file is damaged."""
    import pyarrow as pa

    try:
        for batch in open_parquet(path).iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()
    except MemoryError:  # few bytes of a parquet file may hold gigabytes
        raise MemoryError(f"{path.name}: {_BATCH_ROWS} of its rows need more memory than there is") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: is damaged ({type(error).__name__})") from None


def parts(source: Path) -> list[Part]:
    return parquet_parts(source, COLUMNS)


def rows(part: Part) -> Iterator[Found | RejectedRow]:
    return each(enumerate(parquet_rows(part.file), 1), part, _found)


def embedded(value: Any, root: Path) -> tuple[Path | bytes, str]:
    """A cell's image, its bytes or its file, and the name it shall have. ValueError where the cell has neither."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if isinstance(data, bytes) and data:
        return data, "images/embedded"  # the import names it by its digest
    if not isinstance(name, str) or not name:
        raise ValueError("image: the row has neither bytes nor a path")
    return find_image(root, name, (".", "images")), image_target(name)


def _found(line: int, row: dict[str, Any], part: Part) -> Found:
    image, target = embedded(row.get("image"), part.root)
    number = row.get("id", row.get("qid"))
    fields = {
        "id": row_id(part, line) if number is None else text(number),
        "image": target,
        "question": row.get("question"),
        "answer": row.get("answer"),
        "answer_type": row.get("answer_type"),
        "meta": {"split": part.split},
    }
    return make(line, fields, image)
