"""Every refusal the service can give: one table from a stable code to its HTTP status and title. Nothing else maps errors to HTTP.

Details are fixed sentences that say what to do next: no path, no object's text, no part of an image, question, answer or file name.
This module imports no web framework, so that the worker may use the domain modules that raise these.
"""

from __future__ import annotations

from typing import Any

TABLE: dict[str, tuple[int, str]] = {
    "bad_request": (400, "The request cannot be read"),
    "invalid_parameter": (400, "A parameter is invalid"),
    "unsupported_parameter": (400, "This parameter is not supported here"),
    "conversation_refused": (400, "The model cannot be asked this conversation"),
    "question_refused": (400, "The model server refuses this question"),
    "unauthorized": (401, "An API key is needed"),
    "host_not_allowed": (403, "This address is not served"),
    "origin_not_allowed": (403, "Calls from this web origin are refused"),
    "key_required": (403, "This address is served with an API key only"),
    "scope_missing": (403, "This key may not do that"),
    "not_found": (404, "No such route"),
    "model_not_found": (404, "No such model"),
    "dataset_not_found": (404, "No such data set"),
    "job_not_found": (404, "No such job"),
    "report_not_found": (404, "This job has no report"),
    "preferences_not_found": (404, "This job has no preference records yet"),
    "record_not_found": (404, "No such preference record"),
    "adapter_not_found": (404, "No such adapter"),
    "version_not_found": (404, "No such adapter version"),
    "delivery_not_found": (404, "No such delivery"),
    "key_not_found": (404, "No such key"),
    "alias_not_found": (404, "No such alias"),
    "method_not_allowed": (405, "This route does not take this method"),
    "body_too_slow": (408, "The body comes too slowly"),
    "job_ended": (409, "The job has ended"),
    "job_not_ended": (409, "The job has not ended"),
    "job_elsewhere": (409, "The job is in another status"),
    "key_revoked": (409, "The key is revoked"),
    "nothing_to_roll_back": (409, "The alias has no earlier version"),
    "dataset_in_use": (409, "The data set is in use"),
    "gate_same_weights": (409, "There is nothing to decide"),
    "idempotency_in_flight": (409, "A request with this Idempotency-Key is being worked on"),
    "adapter_for_other_model": (409, "The adapter belongs to another base model"),
    "job_deleted": (410, "The job was deleted"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "This content type is not read here"),
    "invalid_request": (422, "The request has invalid fields"),
    "invalid_purpose": (422, "Files of this purpose are not kept here"),
    "method_not_supported": (422, "This way of fine-tuning is not done here"),
    "invalid_config": (422, "The configuration is out of range"),
    "invalid_correction": (422, "The correction is refused"),
    "leak": (422, "The data set was learnt from"),
    "invalid_adapter": (422, "The adapter is refused"),
    "invalid_archive": (422, "The archive is refused"),
    "webhook_not_allowed": (422, "This address may not be called"),
    "dataset_empty": (422, "The data set has no usable record"),
    "invalid_image": (422, "The image is refused"),
    "one_image_only": (422, "The model takes one image a question"),
    "model_not_served": (422, "This service serves another base model"),
    "idempotency_mismatch": (422, "This Idempotency-Key was used with another body"),
    "too_many_jobs": (429, "Too many jobs of this key are waiting"),
    "too_many_questions": (429, "Too many questions of this key are waiting"),
    "internal": (500, "The service failed"),
    "device_too_small": (500, "The run does not fit on the device"),
    "artifact_damaged": (500, "A stored file is not what it was"),
    "answer_failed": (500, "The model failed on this request"),
    "artifacts_unavailable": (503, "The artifact store does not answer"),
    "engine_unavailable": (503, "This replica answers no questions"),
    "engine_yielded": (503, "A job has the device"),
    "upstream_unavailable": (503, "The model server does not answer"),
    "adapter_not_loadable": (503, "The model server cannot load this adapter"),
    "engine_loading": (503, "The model is still loading"),
    "base_unknown": (503, "The base model cannot be looked at"),
    "too_many_connections": (503, "Too many connections are open"),
    "overloaded": (503, "Too many questions are waiting"),
    "plan_unavailable": (503, "No estimate can be made now"),
    "decoders_busy": (503, "Too many images are being decoded"),
    "draining": (503, "The service is shutting down"),
    "disk_full": (507, "The disk is full"),
    "database_unavailable": (503, "The database does not answer"),
}


class Problem(Exception):
    """A refusal. `detail` is for people, `extra` adds fields to the problem document, `headers` to the response."""

    def __init__(self, code: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.detail, self.headers, self.extra = code, detail, headers or {}, extra

    @property
    def status(self) -> int:
        return TABLE[self.code][0]

    def document(self, request_id: str) -> dict[str, Any]:
        """The RFC 9457 body (`application/problem+json`)."""
        status, title = TABLE[self.code]
        return {
            "type": f"urn:hscr:problem:{self.code}",
            "title": title,
            "status": status,
            "code": self.code,
            "detail": self.detail,
            "request_id": request_id,
            **self.extra,
        }
