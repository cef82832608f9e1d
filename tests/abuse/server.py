"""`python -m tests.abuse.server`: the real API process, with an engine that echoes instead of a model, so that its memory is its own.

Of a question that says so the engine fails with the question in its exception: what an exception's text may hold must not be told.
"""

from __future__ import annotations

import sys
from typing import Any

from service.engine import Question
from service.serve import main
from tests.service.test_vqa import Echo


class Failing(Echo):
    def _echo(self, q: Question) -> Any:
        said = q.text if isinstance(q.text, str) else " ".join(turn.text for turn in q.text)
        if "engine, fail:" in said:
            raise RuntimeError(f"cannot answer {said!r}")
        return super()._echo(q)


if __name__ == "__main__":
    sys.exit(main(Failing))
