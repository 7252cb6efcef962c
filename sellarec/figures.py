"""Figures and values as a page shows them, in colours that follow its light or dark ground."""

import io
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NOTHING = "–"
FIGURE_WIDTH = 3.3  # inches: a figure fits a phone's width, and three of them a desktop's

# Colours on a light and on a dark screen. Figures are drawn in the light ones, which then give way to CSS variables.
PALETTE = {
    "ink": ("#1c2733", "#e3e8ed"),
    "muted": ("#5b6875", "#9aa7b4"),
    "rule": ("#d3dae1", "#39434e"),
    "accent": ("#0a63b8", "#6bb3f5"),
    "second": ("#b4531a", "#eb9b62"),
    "bar": ("#b9cbdd", "#44607c"),
    "ground": ("#ffffff", "#14191f"),
    "panel": ("#f5f7f9", "#1c232b"),
}
INK, MUTED, RULE, ACCENT, SECOND, GROUND = (
    PALETTE[name][0] for name in ("ink", "muted", "rule", "accent", "second", "ground")
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sellarec",  # otherwise the ids in a figure differ from call to call
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
}


def svg(draw: Callable[[Axes], None], description: str, height: float) -> Markup:
    """A figure as inline SVG, `height` in inches, in colours that follow the page's."""
    figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    draw(figure.subplots())
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    # A page with several figures would hold these ids, and the style for all that it holds, several times.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for name, (light, _) in PALETTE.items():
        text = text.replace(f": {light}", f": var(--{name})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1))


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole in percent."""
    return NOTHING if part is None or not whole else f"{100 * part / whole:.1f}%"


def show(value: Any) -> str:
    """Any value of a manifest in a line of text."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {show(part)}" for name, part in value.items()) or NOTHING
    return ", ".join(show(part) for part in value) or NOTHING
