"""Pieces of a self-contained HTML page: figures in two widths, tables, pictures, numbers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from erw.errors import DataError
from erw.study.marks import flops_unit
from erw.study.style import DARK, LIGHT, PAGE, Theme, css_variables, inline_svg

WIDE, HALF, NARROW = (1056, 430), (520, 320), (358, 300)
Draw = Callable[[tuple[float, float], Theme], Any]


def page(body: str, *, title: str) -> str:
    """The whole document around `body`. Styles and script are inline; nothing is fetched."""
    css = files("erw.study").joinpath("report.css").read_text(encoding="utf-8")
    script = files("erw.study").joinpath("report.js").read_text(encoding="utf-8")
    light, dark = css_variables(LIGHT), css_variables(DARK)
    css = css.replace("/*light*/", light).replace("/*dark*/", dark)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A section with its heading and, under it, a sentence that says what to look for."""
    lead = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{lead}\n" + "\n".join(parts) + "\n</section>"


def figure(draw: Draw, *, name: str, label: str, half: bool = False, caption: str = "") -> str:
    """A figure drawn twice, for a wide and a narrow page, so that its type keeps its size."""
    sizes = {"wide": HALF if half else WIDE, "narrow": NARROW}
    drawn = "\n".join(
        f'<div class="{kind}">'
        + inline_svg(draw(size, PAGE), name=f"{name}-{kind}", label=escape(label, quote=True))
        + "</div>"
        for kind, size in sizes.items()
    )
    text = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>\n{drawn}\n{text}\n</figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table whose first `words` columns are words and the others numbers. Cells are text."""
    kinds = ["" if i < words else ' class="num"' for i in range(len(head))]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = [
        "<tr>"
        + "".join(f"<td{k}>{escape(c)}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    head_and_body = f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>\n{head_and_body}</table></div>'


def details(title: str, *parts: str, open_: bool = False) -> str:
    """A part that unfolds."""
    state = " open" if open_ else ""
    return (
        f"<details{state}><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"
    )


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Name and value, side by side."""
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f"<dl>{lines}</dl>"


def picture(path: Path, *, alt: str) -> str:
    """A PNG inside the page. Raises FileNotFoundError or DataError if there is none to show."""
    return f'<img src="{data_uri(path)}" alt="{escape(alt, quote=True)}" loading="lazy">'


def data_uri(path: Path) -> str:
    """A PNG file as a data: address."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is named in the results but is not there; keep pictures beside them"
        )
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG") or b"IEND" not in content[-16:]:
        raise DataError(f"{path} is no complete PNG; delete it and run the same command again")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and values in text, in order."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flatten(item, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [pair for i, item in enumerate(value) for pair in flatten(item, f"{prefix}{i}.")]
    if isinstance(value, list):
        return [(prefix.rstrip("."), ", ".join(map(str, value)) or "none")]
    return [(prefix.rstrip("."), "none" if value is None else str(value))]


def flops(value: float) -> str:
    """FLOPs with an SI unit: "1.94 PFLOP"."""
    if not value:
        return "0"
    scale, unit = flops_unit(value)
    return f"{value / scale:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds in words: "41 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: float) -> str:
    """A whole number with thousands apart."""
    return f"{round(value):,}"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"
