"""Whether a run fits on the device beside what is there: the plan of hscr/plan.py, made in a child process before the run starts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import plans
from service.errors import Problem
from service.settings import Settings
from worker.carry import Interrupted

log = logging.getLogger("hscr.worker")


def check_fits(
    settings: Settings,
    data: Path,
    evaluation: Path | None,
    config: dict[str, Any],
    *,
    evaluates: bool = False,
    tend: Callable[[], bool],
) -> None:
    """Raises Problem where the estimate is larger than what is free. Without an estimate the run is let go.

    `tend` is called all the while and says whether the attempt is asked to stop: then the estimate ends at once. Raises Interrupted.
    """
    try:
        plan = plans.estimate(settings, data, evaluation, config, evaluates=evaluates, stopped=tend)
    except plans.Stopped:
        raise Interrupted from None
    except Problem as problem:
        log.warning("no estimate of the run's memory: %s", problem.code)
        return
    if plan["fits"]:
        return
    needed, free = (f"{plan[name] / 2**30:.1f} GB" for name in ("bytes", "available_bytes"))
    change = ", ".join(f"{name}={value}" for name, value in plan["settings"].items())
    hint = f"{'evaluate' if evaluates else 'align'} with {change}, or " if change else ""
    raise Problem(
        "device_too_small",
        f"The run needs about {needed} of the device, and {free} are free beside the engine: {hint}set HSCR_DEVICE_POLICY to train_first "
        "or serve_first.",
    )
