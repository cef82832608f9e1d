"""Whether a run fits on the device beside what is there: the plan of hscr/plan.py, made in a child process before the run starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from service import plans
from service.errors import Problem
from service.settings import Settings

log = logging.getLogger("hscr.worker")


def check_fits(settings: Settings, data: Path, evaluation: Path | None, config: dict[str, Any]) -> None:
    """Raises Problem where the estimate is larger than what is free. Without an estimate the run is let go."""
    try:
        plan = plans.estimate(settings, data, evaluation, config)
    except Problem as problem:
        log.warning("no estimate of the run's memory: %s", problem.code)
        return
    if plan["fits"]:
        return
    needed, free = (f"{plan[name] / 2**30:.1f} GB" for name in ("bytes", "available_bytes"))
    change = ", ".join(f"{name}={value}" for name, value in plan["settings"].items())
    hint = f"align with {change}, or " if change else ""
    raise Problem(
        "device_too_small",
        f"The run needs about {needed} of the device, and {free} are free beside the engine: {hint}set HSCR_DEVICE_POLICY to train_first "
        "or serve_first.",
    )
