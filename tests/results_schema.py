"""The JSON Schema of the files of results, for the tests that write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads((Path(__file__).parent.parent / "docs/results.schema.json").read_text())


def validate(content: Any, definition: str | None = None) -> None:
    """Raise jsonschema's ValidationError if a file of results, or a part of one, does not follow the schema."""
    schema = SCHEMA
    if definition is not None:
        schema = {k: v for k, v in SCHEMA.items() if k != "oneOf"} | {"$ref": f"#/$defs/{definition}"}
    jsonschema.validate(content, schema, cls=jsonschema.Draft202012Validator)
