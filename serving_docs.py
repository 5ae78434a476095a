"""What the server says of itself: the OpenAPI descriptions with examples, and a page of them without scripts.

The usual documentation pages load scripts from elsewhere; a hospital network has no elsewhere.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

from pydantic import BaseModel

DESCRIPTION = (
    "A chest film in (JPEG, PNG, TIFF, DICOM), a calibrated probability out. Not a medical device. "
    "Send API keys, where they are asked for, as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
)


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str


class Health(BaseModel):
    """Whether the server is up."""

    status: str
    model_loaded: bool
    device: str
    model_version: str


class PredictionOut(BaseModel):
    """What the model says of one film; `findings` (those called) and `thresholds` of several findings only."""

    prediction: str
    confidence: float
    probabilities: dict[str, float]
    inference_time_ms: float
    model_version: str
    positive_class: str | None
    threshold: float | None
    in_distribution: bool | None
    reason: str | None
    features: list[float] | None = None
    findings: list[str] | None = None
    thresholds: dict[str, float] | None = None


class BatchEntry(PredictionOut):
    """One film of a batch."""

    index: int


class BatchRefusal(BaseModel):
    """A film of a batch that could not be answered."""

    index: int
    error: str
    status: int


class BatchOut(BaseModel):
    """One entry a file, in the order sent."""

    predictions: list[BatchEntry | BatchRefusal]
    inference_time_ms: float
    model_version: str


class ExplanationOut(PredictionOut):
    """A prediction with the map of where the model looked."""

    method: str
    target: str
    opacity: float
    heat_map_png: str
    overlay_png: str


EXAMPLE = {
    "prediction": "PNEUMONIA",
    "confidence": 0.9731,
    "probabilities": {"NORMAL": 0.0269, "PNEUMONIA": 0.9731},
    "inference_time_ms": 38.2,
    "model_version": "efficientnet_b4-1f2e3d4c5b6a",
    "positive_class": "PNEUMONIA",
    "threshold": 0.62,
    "in_distribution": True,
    "reason": None,
}
BATCH_EXAMPLE = {
    "predictions": [
        {"index": 0, **EXAMPLE},
        {"index": 1, "error": "uploaded image: not an image (it holds text); convert it to PNG or JPEG", "status": 422},
    ],
    "inference_time_ms": 61.0,
    "model_version": EXAMPLE["model_version"],
}
MEANINGS = {
    400: "A malformed form",
    401: "No API key, or a wrong one",
    408: "The body did not arrive in time",
    413: "Too large, or too many files",
    415: "Not multipart/form-data",
    422: "No readable film, a wrong parameter, or (with --abstain) a film unlike those the model was trained on",
    429: "More requests than this key may make",
    503: "Busy, starting or stopping: try again after `Retry-After` seconds",
}
FEATURES = {
    "name": "return_features",
    "in": "query",
    "required": False,
    "description": "Also give the pooled features of the network, for search or monitoring",
    "schema": {"type": "boolean", "default": False},
}
EXPLAIN_PARAMETERS = [
    {
        "name": "target",
        "in": "query",
        "required": False,
        "description": "The class to explain; the predicted one when left out",
        "schema": {"type": "string"},
    },
    {
        "name": "opacity",
        "in": "query",
        "required": False,
        "description": "How far the hottest places of the overlay are covered",
        "schema": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    },
    {
        "name": "format",
        "in": "query",
        "required": False,
        "description": "`json` holds both pictures as base64; the others are one PNG. `Accept: image/png` is `overlay`",
        "schema": {"type": "string", "enum": ["json", "overlay", "heat_map"], "default": "json"},
    },
]


def upload(name: str, *, many: bool = False) -> dict[str, Any]:
    """The request body of an upload under `name`."""
    file = {"type": "string", "format": "binary", "description": "JPEG, PNG, TIFF or DICOM; the content decides"}
    beside = {
        "cases" if many else "text": {
            "type": "string",
            "description": "for models that read notes (`reads` in /model/info): "
            + ('a JSON list with an object for each file, such as [{"text": "…", "age": "63"}]' if many else "the note")
            + "; left out, it counts as missing",
        }
    }
    schema = {
        "type": "object",
        "required": [name],
        "properties": {name: {"type": "array", "items": file, "minItems": 1} if many else file, **beside},
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def answers(
    model: type[BaseModel], example: Any, *refusals: int, image: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its model with an example, and the refusals it may give."""
    content: dict[str, Any] = {"application/json": {"example": example}}
    if image:
        content["image/png"] = {"schema": {"type": "string", "format": "binary"}}
    return {200: {"model": model, "content": content}, **refused(*refusals)}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may refuse."""
    return {status: {"model": Refusal, "description": MEANINGS[status]} for status in statuses}


def page(openapi: dict[str, Any]) -> str:
    """The OpenAPI document as one HTML page without scripts."""
    rows = "".join(
        _operation(path, method, facts) for path, item in openapi["paths"].items() for method, facts in item.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>API</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/static/style.css"></head>'
        f"<body><main><h1>{escape(openapi['info']['title'])}</h1><p>{escape(openapi['info']['description'])}</p>"
        f'<p>Machine-readable: <a href="/openapi.json">openapi.json</a></p>{rows}</main></body></html>'
    )


def _operation(path: str, method: str, facts: dict[str, Any]) -> str:
    parameters = "".join(
        f"<li><code>{escape(item['name'])}</code> {escape(item.get('description', ''))}</li>"
        for item in facts.get("parameters", [])
    )
    results = "".join(
        f"<li>{escape(status)} {escape(answer.get('description', ''))}</li>"
        for status, answer in facts.get("responses", {}).items()
    )
    example = facts["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("example")
    shown = f"<pre>{escape(json.dumps(example, indent=2))}</pre>" if example else ""
    return (
        f"<section><h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
        f"<p>{escape(facts.get('summary', ''))}</p><ul>{parameters}</ul>"
        f"<p>Answers</p><ul>{results}</ul>{shown}</section>"
    )
