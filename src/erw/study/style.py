"""The house style of every figure: colours, type, axes, and SVG coloured by the page around it.

Colours are of Okabe and Ito (told apart with any colour vision); a method has the same one
everywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FONTS = ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"]
MARKERS = {"sit": "o", "repa": "s", "erw": "D"}
OTHERS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance. `series` has one per method; other names take `spare` in turn."""

    name: str
    paper: str
    ink: str
    soft: str
    line: str
    series: dict[str, str]
    spare: tuple[str, ...]
    parts: tuple[str, str, str, str]  # ledger: warm-up, full, projector, teacher

    def color(self, method: str, *, among: Sequence[str] = ()) -> str:
        """The colour of a method; a name without its own takes the spare colour of its place."""
        if method in self.series:
            return self.series[method]
        others = [name for name in among if name not in self.series]
        place = others.index(method) if method in others else 0
        return self.spare[place % len(self.spare)]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#16181d",
    soft="#626873",
    line="#e3e5ea",
    series={"sit": "#6f7683", "repa": "#0072b2", "erw": "#d55e00"},
    spare=("#009e73", "#a0528a", "#9a7400", "#3b4cc0"),
    parts=("#f0a35e", "#8d95a5", "#5aa5d6", "#b9a0d0"),
)
DARK = Theme(
    name="dark",
    paper="#14161b",
    ink="#eceef2",
    soft="#a0a6b2",
    line="#2b2f38",
    series={"sit": "#a3abb9", "repa": "#56b4e9", "erw": "#ff9140"},
    spare=("#2fc79b", "#d78bc0", "#d6b03c", "#8ea2ff"),
    parts=("#d98a3f", "#69717f", "#3d86b5", "#8a73a3"),
)
# Colours that stand for CSS variables: `inline_svg` replaces each by var(--name).
VARIABLES = {
    "#010001": "paper",
    "#010002": "ink",
    "#010003": "soft",
    "#010004": "line",
    "#010005": "sit",
    "#010006": "repa",
    "#010007": "erw",
    "#010008": "spare-0",
    "#010009": "spare-1",
    "#01000a": "spare-2",
    "#01000b": "spare-3",
    "#01000c": "part-0",
    "#01000d": "part-1",
    "#01000e": "part-2",
    "#01000f": "part-3",
}
_CODES = {name: code for code, name in VARIABLES.items()}
PAGE = Theme(
    name="page",
    paper="none",
    ink=_CODES["ink"],
    soft=_CODES["soft"],
    line=_CODES["line"],
    series={name: _CODES[name] for name in ("sit", "repa", "erw")},
    spare=tuple(_CODES[f"spare-{i}"] for i in range(4)),
    parts=(_CODES["part-0"], _CODES["part-1"], _CODES["part-2"], _CODES["part-3"]),
)


def css_variables(theme: Theme) -> str:
    """The theme's colours as CSS declarations, under the names that `inline_svg` uses."""
    pairs = {"paper": theme.paper, "ink": theme.ink, "soft": theme.soft, "line": theme.line}
    pairs |= theme.series
    pairs |= {f"spare-{i}": color for i, color in enumerate(theme.spare)}
    pairs |= {f"part-{i}": color for i, color in enumerate(theme.parts)}
    return " ".join(f"--{name}: {value};" for name, value in pairs.items())


def settings(theme: Theme, *, size: float = 13.0) -> dict[str, Any]:
    """Matplotlib settings of the house."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": FONTS,
        "font.size": size,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": "auto",
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.soft,
        "axes.linewidth": 1.0,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": theme.line,
        "grid.linewidth": 1.0,
        "text.color": theme.ink,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.soft,
        "ytick.labelcolor": theme.soft,
        "xtick.labelsize": size - 1,
        "ytick.labelsize": size - 1,
        "ytick.major.size": 0,
        "xtick.major.size": 4,
        "lines.solid_capstyle": "round",
        "lines.linewidth": 2.4,
    }


def to_svg(figure: Any, *, as_paths: bool = True) -> str:
    """The figure as an SVG document, the same bytes each time; text as outlines or as text."""
    import matplotlib

    stream = io.StringIO()
    fixed = {"svg.fonttype": "path" if as_paths else "none", "svg.hashsalt": "erw"}
    with matplotlib.rc_context(fixed):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def to_png(figure: Any, *, scale: float = 2.0) -> bytes:
    """The figure as PNG, `scale` device pixels a point."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=72 * scale, metadata={"Software": None})
    return stream.getvalue()


def inline_svg(figure: Any, *, name: str, label: str) -> str:
    """The figure (drawn in `PAGE`) as an element for an HTML page, without colours or font.

    `name` keeps ids apart on a page with several figures; `label` is read out by screen readers.
    """
    svg = to_svg(figure, as_paths=False)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib wrote an SVG without a viewBox"
    svg = re.sub(r"^<svg[^>]*>", "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's family instead
    svg = re.sub(r"font: (?:(\w+) )?([\d.]+)px [^;\"]*", _font, svg)
    svg = re.sub(r" transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for code, variable in VARIABLES.items():
        svg = svg.replace(code, f"var(--{variable})")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    opening = f'<svg class="figure {name}" viewBox="{box[1]}" role="img" aria-label="{label}"'
    return f'{opening} stroke-linejoin="round">{svg}'


def _font(found: re.Match[str]) -> str:
    weight = {"bold": "600", None: "400"}.get(found[1], found[1])
    return f"font-weight: {weight}; font-size: {found[2]}px"
