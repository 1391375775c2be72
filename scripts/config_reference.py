#!/usr/bin/env python
"""Write docs/config.md and its JSON schema from the configuration's own descriptions."""

from __future__ import annotations

import json
from typing import Any

import written
from pydantic.json_schema import GenerateJsonSchema

from qncd_cli.config.keys import Key, sections
from qncd_cli.config.own_settings import OWN_KEYS
from qncd_cli.config.presets import PRESETS
from qncd_cli.config.schema import Config

TARGET = written.DOCS / "config.md"
SCHEMA = written.DOCS / "config.schema.json"
HEAD = """# Configuration

Written by `make docs` from the configuration's own descriptions.

A configuration is a YAML file; `qncd init MODEL > my.yaml` writes one to begin with. Only
`model.source` has to be set. `--set KEY.PATH=VALUE` overrides a key, `--dry-run` prints what came
of it. What a file does not set comes from its preset (`quantization.preset`, `best` unless another
one is named; `qncd models` lists them with what they set); scheduler, steps and guidance come from
the model's own files. Relative paths are looked for in the current folder, then beside the file;
`~` is the home folder. The defaults below are those without a preset (`preset: null`).

Editors that know YAML schemas complete and check these keys by
[config.schema.json](config.schema.json), once a file's first line names it, as those in `configs/`
do: `# yaml-language-server: $schema=PATH/config.schema.json`."""


def _default(key: Key) -> str:
    if key.required:
        return "must be set"
    if key.path.removeprefix("sampling.") in OWN_KEYS:
        return "the model's own"
    word = isinstance(key.default, str) and key.default
    return f"`{word or json.dumps(key.default)}`"


def document() -> str:
    parts = [HEAD]
    for section in sections():
        rows = ["| key | default | what it is |", "|---|---|---|"]
        for key in section.keys:
            words = f" ({', '.join(key.values)})" if key.values else ""
            name = key.path.rpartition(".")[2]
            rows.append(f"| `{name}` | {_default(key)} | {key.description}{words} |")
        table = "\n".join(rows)
        parts.append(f"## {section.path}\n\n{section.description}\n\n{table}")
    return "\n\n".join(parts) + "\n"


class _NoTitles(GenerateJsonSchema):
    """Without pydantic's titles, which repeat the names of keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, as a person writes it.

    It takes what the loader puts right before it validates: null for what is the model's own, and a
    file's name for prompts. What contradicts something elsewhere is found when a file is read.
    """
    tree = Config.model_json_schema(schema_generator=_NoTitles)
    for section in (tree, *tree["$defs"].values()):
        section.pop("title")
        for key, value in section["properties"].items():
            if "$ref" in value:
                section["properties"][key] = {"$ref": value["$ref"]}
    sampling = tree["$defs"]["SamplingConfig"]["properties"]
    for key in OWN_KEYS:
        said, limits = sampling[key].pop("description"), sampling[key]
        del limits["default"]
        sampling[key] = {"anyOf": [limits, {"type": "null"}], "description": said}
    sampling["prompts"]["anyOf"].append({"type": "string"})
    preset = tree["$defs"]["QuantizationConfig"]["properties"]["preset"]
    preset["anyOf"][0] = {"enum": list(PRESETS)}
    preset["default"] = "best"
    return {"$schema": "http://json-schema.org/draft-07/schema#", **tree}


def files() -> dict[Any, str]:
    return {TARGET: document(), SCHEMA: json.dumps(schema(), indent=1) + "\n"}


if __name__ == "__main__":
    written.main(__doc__, files)
