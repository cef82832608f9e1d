"""What OpenAI's clients send to /v1/fine_tuning/jobs, as the POST /align that means the same; each refusal names their field.

Methods are `hscr`, `dpo` and `supervised` (the objective `sft`), with OpenAI's four hyperparameters and the groups of POST /align; `model`
is the served base, or a version to align on top of.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hscr.config import PRESETS, preset
from service.adapters import NAME, REFERENCE
from service.errors import Problem
from service.routes.align import AlignRequest
from service.routes.evaluate import Metadata

ID = r"^[A-Za-z0-9_\-]+$"  # OpenAI's own have a hyphen: such a job is not found, and not a broken request
Auto = Literal["auto"] | None
DEFAULT_NAME = "fine-tuned"  # of the adapter, where neither a suffix nor a parent names it
METHODS = {"hscr": "hscr", "dpo": "dpo", "supervised": "sft"}  # -> objective
_FILES = {"dataset": "training_file", "evaluation.dataset": "validation_file"}  # our field -> OpenAI's
# OpenAI's hyperparameter -> ours; β of DPO is the reward's scale γ.
_NAMES = {"n_epochs": "epochs", "batch_size": "batch_size", "beta": "gamma", "learning_rate_multiplier": "lr"}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(_Body):
    """OpenAI's (`auto`: the preset's value), and beside them the groups of POST /align."""

    n_epochs: int | Auto = None
    batch_size: int | Auto = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | Auto = Field(
        default=None, description="Times the preset's rate."
    )
    beta: float | Auto = None
    preset: Annotated[str, StringConstraints(max_length=40)] = "recommended"
    preference: dict[str, Any] = Field(default_factory=dict)
    optimization: dict[str, Any] = Field(default_factory=dict)
    evaluation: dict[str, Any] = Field(default_factory=dict)


class _Given(_Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(_Body):
    type: Literal["hscr", "dpo", "supervised", "reinforcement"]
    hscr: _Given | None = None
    dpo: _Given | None = None
    supervised: _Given | None = None
    reinforcement: dict[str, Any] | None = None


class FineTuningRequest(_Body):
    training_file: Annotated[str, StringConstraints(max_length=40, pattern=ID)]
    model: Annotated[str, StringConstraints(max_length=300)] = Field(
        description="The served base, or name:version of it to go on from."
    )
    validation_file: Annotated[str, StringConstraints(max_length=40, pattern=ID)] | None = None
    suffix: Annotated[str, StringConstraints(pattern=NAME)] | None = Field(None, description="The adapter's name.")
    seed: int | None = None
    method: Method | None = Field(None, description="`hscr` where it is left out.")
    hyperparameters: Hyperparameters | None = Field(None, description="OpenAI's older place of them.")
    metadata: Metadata | None = Field(None, max_length=32)
    integrations: list[Any] | None = None


def align_request(request: FineTuningRequest, base: str) -> AlignRequest:
    """The POST /align that means the same. Raises Problem."""
    method = request.method or Method(
        type="hscr", hscr=_Given(hyperparameters=request.hyperparameters or Hyperparameters())
    )
    if method.type == "reinforcement":
        detail = "Methods here are hscr, dpo and supervised; graders are not run."
        raise Problem("method_not_supported", detail, param="method.type")
    others = [name for name in (*METHODS, "reinforcement") if name != method.type and getattr(method, name) is not None]
    if others or (request.method is not None and request.hyperparameters is not None):
        field = f"method.{others[0]}" if others else "hyperparameters"
        raise Problem("invalid_request", f"Put the hyperparameters into method.{method.type}.", param=field)
    if request.integrations:
        raise Problem("invalid_request", "Nothing is sent to other services.", param="integrations")
    own = (getattr(method, method.type) or _Given()).hyperparameters
    parent = None if request.model == base else request.model
    if parent is not None and not REFERENCE.match(parent):
        raise _not_a_base(base)
    evaluation = own.evaluation | ({"dataset": request.validation_file} if request.validation_file else {})
    return AlignRequest.model_validate(
        {
            "dataset": request.training_file,
            "adapter": request.suffix or (re.split("[:@]", parent)[0] if parent else DEFAULT_NAME),
            "parent": parent,
            "preset": own.preset,
            "preference": own.preference,
            "optimization": _optimization(own, METHODS[method.type]),
            "evaluation": evaluation,
            "seed": request.seed,
            "metadata": request.metadata or {},
        }
    )


def _optimization(own: Hyperparameters, objective: str) -> dict[str, Any]:
    """POST /align's group of that name. Raises Problem."""
    if own.preset not in PRESETS:
        raise Problem("invalid_config", f"preset: must be one of {', '.join(PRESETS)}", param="preset")
    values: dict[str, Any] = {"objective": objective}
    if objective == "dpo":
        values["anchor"] = 0.0  # the presets' supervised term would be most of the loss: that is RPO, not DPO
    for theirs, ours in _NAMES.items():
        given = getattr(own, theirs)
        if given is None or given == "auto":
            continue
        if ours in own.optimization:
            raise Problem("invalid_config", f"{theirs}: is optimization.{ours}; give one of them", param=theirs)
        values[ours] = given * preset(own.preset).optimization.lr if theirs == "learning_rate_multiplier" else given
    if own.optimization.get("objective", objective) != objective and objective != "hscr":
        raise Problem("invalid_config", "optimization.objective: is the method's", param="optimization.objective")
    return values | own.optimization


def in_their_words(refusal: Problem, base: str) -> Problem:
    """A refusal of POST /align with the names of this route's fields."""
    if refusal.code in ("adapter_not_found", "version_not_found", "alias_not_found"):
        return _not_a_base(base)
    ours = refusal.extra.get("param")
    theirs = None if ours is None else _FILES.get(ours, ours)
    detail = refusal.detail.replace(f"`{ours}`", f"`{theirs}`")
    return Problem(refusal.code, detail, headers=refusal.headers, **(refusal.extra | {"param": theirs}))


def _not_a_base(base: str) -> Problem:
    return Problem("model_not_served", f"Fine-tuned is {base}, or name:version of an adapter of it.", param="model")
