"""POST /vqa: one question on one image or several, as JSON or multipart; the answer with how far the image carries it.

The adapter is resolved to an immutable version first; from there on only its digest counts. Images are data, never addresses.
"""

from __future__ import annotations

import asyncio
import binascii
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

import pybase64
from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from starlette.datastructures import UploadFile

from hscr.answers import Answer, Delta
from hscr.image_view import View
from hscr.images import Decoded
from hscr.record_fields import MAX_IMAGES
from service import asking
from service.adapters import Resolved
from service.answer_view import AnswerView, answer_view, scored
from service.body_schema import body_schema
from service.engine import Question
from service.errors import Problem
from service.event_stream import event, event_stream
from service.problems import invalid_fields
from service.routing import Router, direct, json_response
from service.state import Service, State

router = Router(tags=["vqa"])


class Parameters(BaseModel):
    """What both forms of the request share."""

    model_config = ConfigDict(extra="forbid")

    question: Annotated[str, Field(min_length=1, max_length=8000, pattern=r"\S")]
    adapter: Annotated[str, Field(max_length=160)] | None = Field(
        None,
        description="`name@alias`, `name:version` or `name` (its champion, else its newest); left out: the base model.",
    )
    max_tokens: int = Field(64, ge=1, le=1024)
    temperature: float = Field(0.0, ge=0, le=5, allow_inf_nan=False)
    seed: int = Field(0, ge=0, le=2**31 - 1)
    grounding: Literal["none", "summary", "tokens"] = "none"
    abstain: bool = Field(
        False,
        description="Withhold an answer whose grounding score is below the version's threshold; not with `stream`.",
    )
    compare: Annotated[str, Field(min_length=1, max_length=160)] | None = Field(
        None, description="Another version, written as `adapter` is, that answers the same question beside it."
    )
    stream: bool = Field(
        False, description="Server-sent events: `delta` with text as it comes, then `answer` with the whole response."
    )

    @field_validator("stream")
    @classmethod
    def _flag_comes_last(cls, stream: bool, info: ValidationInfo) -> bool:
        if stream and info.data.get("abstain"):
            raise ValueError("does not go together with abstain: the flag is known when the answer is whole")
        return stream


class ViewFields(BaseModel):
    """Which frame, slice and window of the file is meant; all counts are from 0."""

    model_config = ConfigDict(extra="forbid")

    frame: int | None = Field(None, ge=0, lt=1_000_000, description="Of a DICOM or TIFF file; NIfTI: the time point.")
    plane: Literal["axial", "coronal", "sagittal"] | None = Field(None, description="Of a NIfTI volume; else axial.")
    slice: int | None = Field(
        None,
        ge=0,
        lt=1_000_000,
        description="Of a NIfTI volume, from the right, the back or the feet; else the middle.",
    )
    window: (
        tuple[
            Annotated[float, Field(gt=-1e9, lt=1e9, allow_inf_nan=False)],
            Annotated[float, Field(ge=1e-6, lt=1e9, allow_inf_nan=False)],
        ]
        | None
    ) = Field(None, description="[centre, width] in the file's units (Hounsfield for CT); else the file's own window.")

    def view(self) -> View:
        return View(self.frame, self.plane, self.slice, self.window)


class InlineImage(ViewFields):
    base64: str = Field(
        min_length=1, description="The bytes of a PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM or NIfTI (.nii, .nii.gz) file."
    )


class VQARequest(Parameters):
    image: InlineImage | None = None
    images: Annotated[list[InlineImage], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="In place of `image`, in order, where the model's family takes several (docs/families.md)."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> VQARequest:
        if (self.image is None) == (self.images is None):
            raise ValueError("give image or images, not both")
        return self


class ImageNote(BaseModel):
    format: str
    modality: str | None = Field(description="Of a DICOM file, where it is a known one.")
    flags: list[str] = Field(
        description="Why the pixels may show who it is: burned_in_annotation, recognizable_features, ultrasound, secondary_capture."
    )


class ModelRef(BaseModel):
    id: str
    revision: str | None
    digest: str | None


class VQAResponse(AnswerView):
    model: ModelRef
    compare: AnswerView | None = Field(None, description="What the version of `compare` answers to the same.")
    images: list[ImageNote]
    timing_ms: dict[str, float] = Field(description="`model`: from the question's coming to the engine to its answer.")
    request_id: str


# The body is read by hand, for it comes in two forms; so the document says both here.
_SCHEMA = body_schema(VQARequest)
_INLINE = body_schema(InlineImage)
_SCHEMA["properties"]["image"] = _INLINE
_SCHEMA["properties"]["images"] = {"type": "array", "items": _INLINE, "minItems": 1, "maxItems": MAX_IMAGES}
_SCHEMA["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
_FORM = Parameters.model_json_schema()
_FILE = {"type": "string", "format": "binary"}
_FORM["properties"] = {
    "image": _FILE,
    "images": {"type": "array", "items": _FILE, "minItems": 1, "maxItems": MAX_IMAGES},
    **ViewFields.model_json_schema()["properties"],
    "window": {"type": "string", "examples": ["40,400"], "description": "centre,width, or as in JSON: [40,400]"},
    **_FORM["properties"],
}
_FORM["oneOf"] = _SCHEMA["oneOf"]
_EXAMPLE = {
    "image": {"base64": "iVBORw0KGgo…"},
    "question": "Which lobe holds the lesion?",
    "adapter": "brain-mri@champion",
    "grounding": "summary",
}
OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _SCHEMA, "example": _EXAMPLE},
            "multipart/form-data": {"schema": _FORM},
        },
    }
}
_STREAM = 'event: delta\ndata: {"text": "The lesion"}\n\nevent: answer\ndata: {"answer": …}\n\n'
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` events: `delta` {text}, then `answer` (this response) or `error` (a problem document).",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _STREAM}},
    }
}


@router.post(
    "/vqa", summary="Ask a question on an image", openapi_extra=OPENAPI, response_model=VQAResponse, responses=STREAMED
)
@direct
async def vqa(state: Service, request: Request) -> Response:
    """Base and adapters are served together. When too many questions wait, 503 at once with Retry-After."""
    begin = time.perf_counter()
    asking.ready(state, request)
    parameters, data, views = await _read(request)
    asking.require_images(state, len(data))
    decoded = await asyncio.to_thread(asking.decode, state, request, data, views)
    versions = [await asking.version(state, parameters.adapter)]
    if parameters.compare is not None:
        versions.append(await asking.version(state, parameters.compare))
    questions = [await _question(state, parameters, decoded, version) for version in versions]
    asked = time.perf_counter()

    def response(answers: Sequence[Answer]) -> VQAResponse:
        end = time.perf_counter()
        views = [
            answer_view(answer, version, parameters.grounding, parameters.abstain)
            for answer, version in zip(answers, versions, strict=True)
        ]
        return VQAResponse(
            **dict(views[0]),
            compare=views[1] if len(views) > 1 else None,
            model=model_ref(state),
            images=[
                ImageNote(format=d.note.format, modality=d.note.modality, flags=list(d.note.flags)) for d in decoded
            ],
            timing_ms={"model": round((end - asked) * 1000, 1), "total": round((end - begin) * 1000, 1)},
            request_id=request.state.request_id,
        )

    if not parameters.stream:
        return json_response(response(await asking.ask_all(state, questions, request)))
    streams: list[AsyncGenerator[Delta | Answer]] = []
    try:  # a refusal of either comes before the first byte
        for question in questions:
            streams.append(await asking.stream(state, question, request))
    except Problem:
        for stream in streams:
            await stream.aclose()
        raise
    return event_stream(_events(request, streams, response))


def model_ref(state: State) -> ModelRef:
    """The base model that is served."""
    digest = state.answering.engine.model_digest if state.answering else None
    return ModelRef(id=state.settings.model_id, revision=state.settings.model_revision, digest=digest)


async def _question(
    state: State, parameters: Parameters, decoded: Sequence[Decoded], version: Resolved | None
) -> Question:
    return Question(
        images=tuple(d.image for d in decoded),
        text=parameters.question,
        adapter_digest=version.digest if version else None,
        adapter_folder=await asking.adapter_folder(state, version),
        max_tokens=parameters.max_tokens,
        temperature=parameters.temperature,
        seed=parameters.seed,
        grounding=scored(parameters.grounding, parameters.abstain),
    )


async def _events(
    request: Request,
    streams: Sequence[AsyncGenerator[Delta | Answer]],
    response: Callable[[Sequence[Answer]], VQAResponse],
) -> AsyncIterator[str]:
    """Deltas of the first version, then the response with all; a failure on the way is an `error` event with its problem document."""
    answers: list[Answer] = []
    try:
        for stream in streams:
            async for part in stream:
                if isinstance(part, Answer):
                    answers.append(part)
                elif stream is streams[0]:
                    yield event("delta", {"text": part.text})
        if len(answers) == len(streams):  # else the client is gone
            yield event("answer", response(answers).model_dump(mode="json"))
    except Problem as problem:
        yield event("error", problem.document(request.state.request_id))
    finally:
        for stream in streams:
            await stream.aclose()  # what is not answered yet is answered no further


async def _read(request: Request) -> tuple[Parameters, list[bytes], list[View]]:
    """Parameters, image bytes and views from either form. Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            body = VQARequest.model_validate_json(await request.body())
            given = body.images or ([body.image] if body.image else [])
            return body, [pybase64.b64decode(i.base64, validate=True) for i in given], [i.view() for i in given]
        if kind == "multipart/form-data":
            return await _read_form(request)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_input=False, include_url=False, include_context=False)) from None
    except (binascii.Error, ValueError):
        raise Problem("invalid_image", "image.base64: is not base64.") from None
    raise Problem("unsupported_media_type", "Send application/json or multipart/form-data.")


async def _read_form(request: Request) -> tuple[Parameters, list[bytes], list[View]]:
    async with request.form(max_files=MAX_IMAGES, max_fields=16, max_part_size=64 * 1024) as form:
        one, several = form.getlist("image"), form.getlist("images")
        files = [f for f in one or several if isinstance(f, UploadFile)]
        if bool(one) == bool(several) or len(one) > 1 or len(files) != len(one or several):
            raise Problem("invalid_request", "Send one file part `image`, or several named `images`.")
        fields = {name: value for name, value in form.multi_items() if name not in ("image", "images")}
        chosen: dict[str, Any] = {
            name: fields.pop(name) for name in ("frame", "plane", "slice", "window") if name in fields
        }
        if isinstance(chosen.get("window"), str):
            chosen["window"] = chosen["window"].strip().removeprefix("[").removesuffix("]").split(",")
        view = ViewFields.model_validate(chosen).view()  # one for all images of a form
        return Parameters.model_validate(fields), [await file.read() for file in files], [view] * len(files)
