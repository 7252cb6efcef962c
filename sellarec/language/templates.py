"""The prompt templates, which are data: templates.yaml beside this file."""

import importlib.resources
from collections.abc import Sequence
from typing import Any

import yaml


def templates() -> dict[str, Any]:
    """By name (full, compact): text, fused, separator, none, answers."""
    return yaml.safe_load((importlib.resources.files("sellarec.language") / "templates.yaml").read_text())


def fused_text(template: dict[str, Any], soft: Sequence[str]) -> str:
    """A template's `fused` text where these soft tokens are injected: of each piece that depends on them the first that fits."""
    texts = []
    for piece in template["fused"]:
        choices = {"": piece} if isinstance(piece, str) else piece
        texts.append(next((text for tokens, text in choices.items() if set(tokens.split()) <= set(soft)), ""))
    return "".join(texts)
