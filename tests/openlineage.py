"""A server that collects OpenLineage events, and their check against the specification.

No package ships the specification's own JSON schemas. The part that all events share is written out
here from version 2-0-2. The schema of each facet is made from the class that openlineage-python
generates from its JSON schema, which its `_schemaURL` names.
"""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Union, get_args, get_origin

import attr
import jsonschema
from openlineage.client import generated
from openlineage.client.generated import base

# Keys of facets that are not the name of their class without its ending.
KEYS = {"DatasetVersionDatasetFacet": "version", "ProcessingEngineRunFacet": "processing_engine"}
ENDINGS = ("InputDatasetFacet", "OutputDatasetFacet", "DatasetFacet", "RunFacet", "JobFacet")
PLAIN: dict[Any, dict[str, str]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    Any: {},
}
TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"
ADDRESS = r"^https?://[^\s/]+/\S+$"
NAMED = {
    "namespace": {"type": "string", "minLength": 1},
    "name": {"type": "string", "minLength": 1},
}


def _facets(name: str) -> dict[str, Any]:
    return {name: {"type": "object", "additionalProperties": {"$ref": "#/$defs/Facet"}}}


def _dataset(own: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["namespace", "name"],
        "properties": {**NAMED, **_facets("facets"), **_facets(own)},
        "additionalProperties": False,
    }


RUN_EVENT: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {
        "Facet": {
            "type": "object",
            "required": ["_producer", "_schemaURL"],
            "properties": {
                "_producer": {"type": "string", "pattern": ADDRESS},
                "_schemaURL": {"type": "string", "pattern": ADDRESS},
            },
        }
    },
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "additionalProperties": False,
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "pattern": TIME},
        "producer": {"type": "string", "pattern": ADDRESS},
        "schemaURL": {
            "const": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
        },
        "run": {
            "type": "object",
            "required": ["runId"],
            "properties": {"runId": {"type": "string", "format": "uuid"}, **_facets("facets")},
            "additionalProperties": False,
        },
        "job": {
            "type": "object",
            "required": ["namespace", "name"],
            "properties": {**NAMED, **_facets("facets")},
            "additionalProperties": False,
        },
        "inputs": {"type": "array", "items": _dataset("inputFacets")},
        "outputs": {"type": "array", "items": _dataset("outputFacets")},
    },
}

# What the classes of openlineage-python do not know of the schemas of their facets.
FORMATS: dict[str, Any] = {
    "nominalTime": {
        "properties": {
            "nominalStartTime": {"pattern": TIME},
            "nominalEndTime": {"pattern": TIME},
        }
    },
    "parent": {
        "properties": {"run": {"properties": {"runId": {"type": "string", "format": "uuid"}}}}
    },
}


def check(event: dict[str, Any]) -> None:
    """Assert that `event` and all its facets are as the specification wants them."""
    _validate(event, RUN_EVENT)
    holders = [event["run"], event["job"], *event["inputs"], *event["outputs"]]
    for holder in holders:
        for group in ("facets", "inputFacets", "outputFacets"):
            for key, facet in holder.get(group, {}).items():
                kind = _kinds()[facet["_schemaURL"]]
                assert key == _key(kind.__name__)
                _validate(facet, _schema(kind))
                _validate(facet, FORMATS.get(key, {}))


def _validate(value: Any, schema: dict[str, Any]) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)


def _key(name: str) -> str:
    ending = next(ending for ending in ENDINGS if name.endswith(ending))
    short = name.removesuffix(ending)
    return KEYS.get(name, short[0].lower() + short[1:])


@lru_cache
def _kinds() -> dict[str, type]:
    """The class of each facet, by the address of its schema."""
    kinds = {}
    for module in iter_modules(generated.__path__):
        for kind in vars(import_module(f"{generated.__name__}.{module.name}")).values():
            if attr.has(kind) and hasattr(kind, "_get_schema") and kind.__name__.endswith("Facet"):
                kinds[kind._get_schema()] = kind
    return kinds


def _schema(kind: type) -> dict[str, Any]:
    """The JSON schema of the facet that a generated class stands for."""
    defs: dict[str, Any] = {}
    return {**_part(kind, defs), "$defs": defs}


def _part(kind: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field's type. Those of classes, which may hold one another, go to `defs`."""
    if kind in PLAIN:
        return PLAIN[kind]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if attr.has(kind):
        if kind.__name__ not in defs:
            defs[kind.__name__] = {}
            defs[kind.__name__] = _object(kind, defs)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, types.UnionType):
        return {"anyOf": [_part(part, defs) for part in parts]}
    if get_origin(kind) is list:
        return {"type": "array", "items": _part(parts[0], defs)}
    assert get_origin(kind) is dict, kind
    return {"type": "object", "additionalProperties": _part(parts[1], defs)}


def _object(kind: Any, defs: dict[str, Any]) -> dict[str, Any]:
    names = {"ClassVar": ClassVar, "Any": Any, **vars(base), **vars(import_module(kind.__module__))}
    attr.resolve_types(kind, names)
    fields = attr.fields(kind)
    return {
        "type": "object",
        "properties": {each.name: _part(each.type, defs) for each in fields},
        "required": [each.name for each in fields if each.default is attr.NOTHING],
        "additionalProperties": False,
    }


@dataclass
class Catalogue:
    """The address of a server, and what it was sent. While `held`, it does not answer."""

    url: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    status: int = 201

    @property
    def kinds(self) -> list[str]:
        return [event["eventType"] for event in self.events]


@contextmanager
def catalogue() -> Iterator[Catalogue]:
    """A server on loopback with the one path that OpenLineage's servers have for events."""
    found = Catalogue()
    found.held.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.held.wait(60)
            if self.path == "/api/v1/lineage" and found.status < 400:
                found.events.append(json.loads(body))
                found.headers.append(dict(self.headers))
            try:
                self.send_response(found.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
            except ConnectionError:
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.held.set()
            server.shutdown()
            thread.join()
