"""Runs and answers drawn for a terminal: progress bars from events, tables of evaluations, answers with their grounding."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hscr import events as e

if TYPE_CHECKING:
    from hscr.answer import Answer
    from hscr.plan import Plan


LINE_EVERY_S = 15.0


class _Lines(Progress):
    """For a pipe or a log file, where no bar can move: a line a task every LINE_EVERY_S seconds, and one at its end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._due: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        task, now = next(t for t in self.tasks if t.id == task_id), time.monotonic()
        due = self._due.setdefault(task_id, now + LINE_EVERY_S)
        if task.total is None or due == math.inf or not (task.finished or now >= due):
            return
        self._due[task_id] = math.inf if task.finished else now + LINE_EVERY_S
        left = "" if task.finished or task.time_remaining is None else f"  {task.time_remaining:.0f} s left"
        line = f"{task.description}  {task.completed:.0f}/{task.total:.0f}  {task.elapsed or 0:.0f} s{left}"
        self.console.print(f"{line}  {task.fields['note']}".rstrip(), markup=False, highlight=False, soft_wrap=True)


def bars(console: Console) -> Progress:
    """Progress bars with count, elapsed and remaining time and a free text at the end; lines where there is no terminal."""
    if not console.is_terminal:
        return _Lines(console)
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def by_name(progress: Progress) -> Callable[..., None]:
    """A callback (name, done, total, metrics) that keeps one bar a name."""
    tasks: dict[str, Any] = {}

    def show(name: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        if name not in tasks:
            tasks[name] = progress.add_task(name, total=total, note="")
        note = "  ".join(f"{key} {value:.3f}" for key, value in list((metrics or {}).items())[:3])
        progress.update(tasks[name], completed=done, total=total, note=note)

    return show


def draw(events: Iterable[e.Event], console: Console) -> None:
    """Follow a run: one bar a stage, the newest loss and reward beside the optimising one, warnings as they come."""
    with bars(console) as progress:
        tasks: dict[str, Any] = {}

        def task(stage: str) -> Any:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=None, note="")
            return tasks[stage]

        for event in events:
            if isinstance(event, e.Progress):
                progress.update(task(event.stage), completed=event.done, total=event.total)
            elif isinstance(event, e.Stage) and event.status != "started":
                identity = task(event.stage)  # first: `progress.tasks` is a copy made before a bar is added
                bar = progress.tasks[identity]
                note = "unchanged" if event.status == "skipped" else bar.fields["note"]
                progress.update(bar.id, total=bar.total or 1, completed=bar.total or 1, note=note)
            elif isinstance(event, e.Metrics) and "loss" in event.values:
                note = f"loss {event.values['loss']:.3f}  rewards/chosen {event.values['rewards/chosen']:+.3f}"
                progress.update(task(event.stage), note=note)
            elif isinstance(event, e.Part):
                progress.console.print(f"records {event.first} to {event.last} were made elsewhere and are taken up")
            elif isinstance(event, e.Warning_):
                progress.console.print(f"[yellow]warning:[/] {escape(event.message)}", soft_wrap=True)


def plan_line(plan: Plan) -> str:
    """What to expect of a run, in a line."""
    if plan.fits:
        memory = f"of {_gib(plan.available_bytes)} free on {plan.device}"
    elif plan.settings:
        memory = f"where {plan.device} has {_gib(plan.available_bytes)}; it fits with " + " ".join(
            f"-s {name}={str(value).lower()}" for name, value in plan.settings.items()
        )
    else:
        memory = f"where {plan.device} has {_gib(plan.available_bytes)}; try --quantize 4bit (CUDA) or a larger device"
    return f"expected: about {duration(plan.seconds)}, {_gib(plan.bytes)} {memory}"


def plan_table(plan: Plan) -> Table:
    """A row a stage."""
    table = Table(
        title=f"{plan.parameters / 1e6:,.1f} M parameters in {plan.dtype}; a record: {plan.prompt_tokens:.0f} tokens "
        f"({plan.visual_tokens:.0f} visual) and answers of {plan.answer_tokens:.0f}"
    )
    for name in ("stage", "units", "time", "memory"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        table.add_row(stage.stage, str(stage.units), duration(stage.seconds), _gib(stage.bytes))
    return table


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _gib(n: float) -> str:
    return f"{n / 2**30:.2g} GiB" if n < 2**33 else f"{n / 2**30:.0f} GiB"


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Scores with intervals, a row a metric, a column a policy, and the reading of the gain."""
    table = Table(title="real image, 95 % intervals")
    table.add_column("metric", overflow="fold")  # a name cut off says nothing
    for policy in evaluation["scores"]:
        table.add_column(policy, justify="right")
    table.add_column("reading")
    first = next(iter(evaluation["scores"].values()))["real"]
    for metric in first:
        cells = [interval_text(evaluation["scores"][p]["real"][metric]) for p in evaluation["scores"]]
        table.add_row(metric, *cells, reading(evaluation.get("verdict", {}).get(metric)))
    for name, key in (("grounding (nats)", "grounding"), ("changed by another image", "sensitivity")):
        if evaluation.get(key):
            table.add_row(name, *(interval_text(evaluation[key][p]) for p in evaluation["scores"]), "")
    return table


def interval_text(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def reading(verdict: dict[str, Any] | None) -> str:
    """ "better +0.080 [+0.050, +0.110], gone with blank images" for one metric's verdict."""
    if not verdict:
        return ""
    g = verdict["gain"]
    text = f"{verdict['result']} {g['mean']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]"
    for condition in ("blank", "shuffled"):
        if verdict["result"] == "better" and f"gone_when_{condition}" in verdict:
            text += f", {'gone' if verdict[f'gone_when_{condition}'] else 'also'} with {condition} images"
    return text


def grounded_text(answer: Answer) -> Text:
    """The answer, its tokens shaded green by how much likelier the image makes them, and the score."""
    text = Text()
    for token in answer.tokens or ():
        if token.is_content and token.reward > 0:
            strength = min(int(60 * token.reward), 150)
            text.append(token.text, style=f"on rgb({40 - strength // 5},{60 + strength // 2},{50 - strength // 5})")
        elif token.is_content or token.text.strip().isprintable():
            text.append("" if token.text.startswith("<") else token.text)
    start = len(text.plain) - len(text.plain.lstrip())  # tokenizers write the first word's space into its token
    text = text[start:] if text.plain.strip() else Text(answer.text)
    score = "" if answer.score is None else f"\ngrounding {answer.score:+.3f} nats (its least grounded word)"
    return Text.assemble(text, (score, "dim"))
