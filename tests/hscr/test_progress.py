"""Progress where it is read: bars on a terminal, lines in a log."""

import io

from rich.console import Console

from hscr import progress
from hscr.progress import bars, by_name


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))  # each update takes a second
    log = io.StringIO()
    with bars(Console(file=log)) as lines:
        show = by_name(lines)
        for done in range(1, 41):
            show("tower", done, 40, {"loss": 1 / done})
        show("tower", 40, 40)
    said = log.getvalue().splitlines()
    assert 3 <= len(said) <= 5
    assert all(line.startswith("tower  ") for line in said)
    assert " s left  loss 0." in said[0]
    assert "40/40" in said[-1]
    assert "left" not in said[-1]


def test_a_terminal_gets_bars():
    screen = io.StringIO()
    with bars(Console(file=screen, force_terminal=True, width=100)) as drawn:
        by_name(drawn)("tower", 1, 2)
    assert "━" in screen.getvalue()
