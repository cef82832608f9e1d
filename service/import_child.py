"""`python -m service.import_child`: one import of a foreign layout (hscr/importing.py) in a process of its own, under a memory limit.

Labels are read whole and a parquet file may unpack to far more than it holds: what goes wrong with them must not take the API along.
The order comes as JSON in the only argument, the answer goes to stdout as JSON: {} or {"refused": a word, "rejected": rows}.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from service.lifeline import watch_parent


def main() -> None:
    watch_parent()
    order = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (order["memory_bytes"],) * 2)
    json.dump(_import(order), sys.stdout)


def _import(order: dict[str, Any]) -> dict[str, Any]:
    from hscr.importing import ImportLimits, NoUsableRow, TooLarge, import_data
    from hscr.readers import UnknownLayout

    try:
        import_data(
            Path(order["source"]),
            Path(order["out"]),
            layout=order["layout"],
            split=order["split"],
            languages=order["languages"],
            limits=ImportLimits(order["rows_max"], order["bytes_max"]),
        )
    except UnknownLayout:
        return {"refused": "layout"}
    except NoUsableRow as error:
        return {"refused": "empty", "rejected": error.rejected[:20]}
    except TooLarge:
        return {"refused": "large"}
    except MemoryError:
        return {"refused": "memory"}
    except ValueError:
        return {"refused": "damaged"}
    return {}


if __name__ == "__main__":
    main()
