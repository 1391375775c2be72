"""The command init: a configuration to begin with."""

from __future__ import annotations

import dataclasses

from .console import Console
from .starter import facts_of, starter_tree, starter_yaml


def init(console: Console, model: str, compvis_config: str | None, base: str | None) -> None:
    facts = facts_of(model, compvis_config, base)
    text = starter_yaml(facts)
    payload = {
        "config": starter_tree(facts),
        "yaml": text,
        "model": {
            **dataclasses.asdict(facts.card),
            "parameters": facts.parameters or None,
            "image": facts.image,
        },
    }
    console.result(payload, lambda: print(text, end=""))
    console.note(
        f"next: qncd init {model} > my.yaml, then qncd run --config my.yaml (--plan: what it takes)"
    )
