"""The prompt templates, which are data: templates.yaml beside this file."""

import importlib.resources
from typing import Any

import yaml


def templates() -> dict[str, Any]:
    """By name (full, compact): text, fused, separator, none, answers."""
    return yaml.safe_load((importlib.resources.files("sellarec.language") / "templates.yaml").read_text())
