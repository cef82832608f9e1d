"""`python -m service.decode_child`: decodes and cleans images that others sent, one order after the other, under limits of memory and time.

An order is a line of JSON on stdin; the answer, on stdout, JSON behind its length (4 bytes, the highest first). The order's files, and the
answer's pixels or cleaned file, lie in the memory that both processes share (service/decode_arena.py), or follow there.
The process ends with its stdin, writes no file, and is killed by its own alarm where whoever ordered is too late to do it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from hscr.image_limits import ImageError, ImageLimits, Note
from hscr.image_view import View, parsed_view
from hscr.images import read_image, read_images, read_limited
from service.decode_arena import ARENA_BYTES, Arena


def main() -> None:
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    arena = _arena(int(sys.argv[3])) if len(sys.argv) > 3 else None
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    orders, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := orders.readline():
        order = json.loads(line)
        if arena and order["shared"]:
            given = [bytes(part) for part in arena.get(order["sizes"])]
        else:
            given = [orders.read(size) for size in order["sizes"]]
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        pixels: list[bytes] = []
        try:
            answer = _decoded(order, given, pixels)
        except ImageError as error:
            answer, pixels = {"refused": str(error)}, []
        except MemoryError:
            answer, pixels = {"refused": "decoding the image needs more memory than it may take"}, []
        signal.setitimer(signal.ITIMER_REAL, 0)
        shared = arena is not None and arena.put(pixels)
        told = json.dumps({**answer, "shared": shared}).encode()
        answers.write(len(told).to_bytes(4, "big") + told)
        for part in () if shared else pixels:
            answers.write(part)
        answers.flush()


def _arena(descriptor: int) -> Arena:
    arena = Arena(descriptor)
    os.close(descriptor)
    return arena


def _decoded(order: dict[str, Any], given: list[bytes], pixels: list[bytes]) -> dict[str, Any]:
    limits, views = ImageLimits(**order["limits"]), [parsed_view(view) for view in order["views"]]
    if "key" in order:
        return _cleaned(Path(order["path"]), bytes.fromhex(order["key"]), limits, views[0], pixels)
    if "path" in order:  # a file that was unpacked to our own disk: only whether it can be read, and its note
        return {"images": [_told(read_image(Path(order["path"]), limits, views[0]).note)]}
    decoded = read_images(given, limits, views)
    # Small pictures go as they lie in Pillow's memory: to take a byte that is not used out and put it in again costs more than to carry it.
    mode = "RGBX" if sum(4 * d.image.width * d.image.height for d in decoded) <= ARENA_BYTES else "RGB"
    pixels += (d.image.tobytes("raw", mode) for d in decoded)
    return {"images": [{**_told(d.note), "size": d.image.size, "mode": mode} for d in decoded]}


def _cleaned(path: Path, key: bytes, limits: ImageLimits, view: View, out: list[bytes]) -> dict[str, Any]:
    """The file's bytes go out only where cleaning changed them."""
    from hscr.clean_image import clean_image

    data = read_limited(path, limits)
    after, note = clean_image(data, key, limits, view)
    if after == data:
        return {"images": [_told(note)]}
    out.append(after)
    return {"images": [{**_told(note), "bytes": len(after)}]}


def _told(note: Note) -> dict[str, Any]:
    return {"format": note.format, "modality": note.modality, "flags": note.flags}


if __name__ == "__main__":
    main()
