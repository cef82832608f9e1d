"""How the most read answers of the API are made: jobs, one or a page, from one statement, each job written once for equal rows.

What was written of a row is taken again while the database gives the very same row, for a minute at most, so that no write has to put
anything right (docs/decisions/0097).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Dialect, Select, bindparam, func, select

from service import jobs, promotion
from service.db import Database
from service.look import Look, Raw
from service.models import AdapterVersion, Dataset, GenerationShard, Job, JobEvent
from service.outlook import Ahead, Outlook
from service.routes.job_view import PromotionView, Sharing, VersionRef, view
from service.written import kept

# What is shown of a job, and what Outlook looks at; with the version that it made, and its data sets' digests.
_J, _V, _E, _S = Job.__table__.c, AdapterVersion.__table__.c, JobEvent.__table__.c, GenerationShard.__table__.c
_DATA, _TESTED = Dataset.__table__.alias("data"), Dataset.__table__.alias("tested")
_UNSEEN = {"fence", "lease_until", "crashes", "high_water", "crash_water", "last_seq", "rung_at", "files_removed_at"}
_UNSEEN |= {"webhook", "deadline_s"}
_COLUMNS: list[Any] = [c for c in _J if c.key not in _UNSEEN]
_COLUMNS += [_V.adapter_name.label("made_name"), _V.version.label("made_version"), _V.digest.label("made_digest")]
_COLUMNS += [_DATA.c.digest.label("data_digest"), _TESTED.c.digest.label("tested_digest")]
_FROM = (
    Job.__table__.outerjoin(AdapterVersion.__table__, _V.job_id == _J.id)
    .join(_DATA, _DATA.c.id == _J.dataset_id)
    .outerjoin(_TESTED, _TESTED.c.id == _J.evaluation_dataset_id)
)
_LAST = (_E.job_id == _J.id) & (_E.seq == _J.last_seq) & (_J.status == "succeeded")  # tells of a promotion


def _shards(*where: Any) -> Any:
    return select(func.count()).where(_S.job_id == _J.id, *where).scalar_subquery()


_ONE = Look(
    select(
        *_COLUMNS,
        _E.data.label("said"),
        _shards().label("shards"),
        _shards(_S.status == "done").label("shards_made"),
        _shards(_S.status == "running").label("shards_running"),
    )
    .select_from(_FROM.outerjoin(JobEvent.__table__, _LAST))
    .where(_J.id == bindparam("job_id"))
)


def _page_of(after: bool, status: bool) -> Look:
    query: Select[Any] = select(*_COLUMNS).select_from(_FROM).where(_J.deleted_at.is_(None))
    query = query.where(_J.id < bindparam("after")) if after else query
    query = query.where(_J.status == bindparam("status")) if status else query
    return Look(query.order_by(_J.id.desc()).limit(bindparam("most")))


_PAGES = {(after, status): _page_of(after, status) for after in (False, True) for status in (False, True)}
_ID, _STATUS, _SAID = (_ONE.place(name) for name in ("id", "status", "said"))


def one(database: Database, job_id: str) -> str:
    """The JobView as JSON. Raises Problem."""
    rows = _ONE.rows(database, job_id=job_id)
    if not rows:
        raise jobs.not_found()
    said = rows[0][_SAID]
    told = json.loads(said).get("promotion") if said is not None else None
    return _texts(database, _ONE, rows, promotion.gate_of(database, told) if told is not None else None)[0]


def page(database: Database, after: str | None, status: str | None, most: int) -> list[tuple[str, str]]:
    """Jobs, newest first: of each its id and its JobView as JSON."""
    look = _PAGES[after is not None, status is not None]
    given = {"after": after, "status": status, "most": most}
    rows = look.rows(database, **{name: value for name, value in given.items() if value is not None})
    return [(row[_ID], text) for row, text in zip(rows, _texts(database, look, rows), strict=True)]


def _texts(database: Database, look: Look, rows: Sequence[Raw], gate: promotion.GateNow | None = None) -> list[str]:
    dialect = database.engine.dialect
    open_ = [row for row in rows if row[_STATUS] in ("queued", "running")]
    ahead: dict[str, Ahead] = {}
    if open_:
        with database.read() as session:
            outlook = Outlook(session, glance=True)
            ahead = {row[_ID]: outlook.of(look.read(dialect, row)) for row in open_}
    return [_text(dialect, look, row, ahead.get(row[_ID], Ahead()), gate) for row in rows]


@kept(8 * 2**20)
def _text(dialect: Dialect, look: Look, raw: Raw, ahead: Ahead, gate: promotion.GateNow | None) -> str:
    row = look.read(dialect, raw)
    made = row.made_name and VersionRef(name=row.made_name, version=row.made_version, digest=row.made_digest)
    shown = view(row, ahead, made or None, (row.data_digest, row.tested_digest))
    if look is _ONE:
        if row.shards:
            shown.sharing = Sharing(shards=row.shards, made=row.shards_made, working=row.shards_running)
        if row.said and "promotion" in row.said:
            shown.promotion = _promotion(row, gate)
    return shown.model_dump_json()


def _promotion(row: Any, gate: promotion.GateNow | None) -> PromotionView:
    """What the last event said, and what became of the gate since."""
    told = row.said["promotion"]
    where = f"/adapters/{row.adapter_name}/aliases/{told['alias']}/gates" if "job_id" in told else None
    return PromotionView(
        decision=gate.decision if gate is not None else told["decision"],  # type: ignore[arg-type]
        gate_job_id=told.get("job_id"),
        gate_job_status=gate.job_status if gate is not None else None,  # type: ignore[arg-type]
        decisions_url=where,
        code=told.get("code"),
        message=told.get("message"),
    )
