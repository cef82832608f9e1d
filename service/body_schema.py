"""The JSON schema of a body that a route reads by hand, for the OpenAPI document: its definitions stand in their places.

FastAPI collects the definitions of the bodies that it reads; a reference in one that it does not read would lead nowhere.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema without references. No model may hold itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        if isinstance(reference, str):
            return placed(definitions[reference.rpartition("/")[2]]) | placed(
                {k: v for k, v in value.items() if k != "$ref"}
            )
        # The mapping of a discriminator names definitions.
        return {key: placed(item) for key, item in value.items() if key != "discriminator"}

    whole: dict[str, Any] = placed(schema)
    return whole
