"""The report's page: its style sheet, its frame, and the few HTML elements that the sections are made of.

No script, no font, no link to anywhere: a content security policy in the page forbids what it does not need.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from fastanchor.evaluate.figures import PALETTE


def clean_text(text: object) -> str:
    """Text fit for a UTF-8 page and for XML: control characters and lone surrogates become a replacement character."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "\ufffd" for c in str(text))


def safe(text: object) -> str:
    """`clean_text`, HTML-escaped."""
    return escape(clean_text(text))


def command(*words: object) -> str:
    """A shell command line, HTML-escaped."""
    return safe(shlex.join(str(word) for word in words))


def section(title: str, body: str) -> str:
    """A section of HTML `body` under a heading."""
    return f"<section><h2>{safe(title)}</h2>{body}</section>"


def figure(body: str, caption: str) -> str:
    """HTML `body` with a plain-text caption."""
    return f"<figure>{body}<figcaption>{safe(caption)}</figcaption></figure>"


def finding(text: str, alarm: bool = False) -> str:
    """A plain-text sentence that states what the figure below it shows."""
    return f'<p class="finding{" alarm" if alarm else ""}">{safe(text)}</p>'


def card(value: float, title: str, details: str, color: str) -> str:
    """A headline figure in percent, with what it is and under which conditions; color: a name of the palette."""
    return (f'<div class="card" style="border-color:var(--{color})"><span class="title">{safe(title)}</span>'
            f"<b>{value:.1f}<small> %</small></b><span>{safe(details)}</span></div>")  # fmt: skip


def swatch(color: str, text: str, dashed: bool = False) -> str:
    """A legend entry for a line in a colour of the palette."""
    style = f"border-top-style:{'dashed' if dashed else 'solid'};border-color:var(--{color})"
    return f'<span class="key"><i style="{style}"></i>{safe(text)}</span>'


def table(rows: dict[str, object], columns: Sequence[object] = ()) -> str:
    """A table of two columns; with `columns`, which names those after the first, every row's value is a sequence of cells."""
    head = f"<tr><td></td>{''.join(f'<th scope=col>{safe(name)}</th>' for name in columns)}</tr>" if columns else ""
    lines = ((key, value if columns else (value,)) for key, value in rows.items())
    body = "".join(
        f"<tr><th scope=row>{safe(key)}</th>{''.join(f'<td>{safe(cell)}</td>' for cell in cells)}</tr>" for key, cells in lines
    )
    return f"<table>{head}{body}</table>"


def image(pixels: Tensor, alternative: str, *, shown: int = 128) -> str:
    """An <img> of pixels (3, H, W) in [0, 1] as a PNG data URI without interpolation, longer side at most about `shown`.

    Small images are enlarged by whole factors, large ones thinned to every k-th pixel.
    """
    side = max(pixels.shape[1:])
    every, times = -(-side // shown), max(1, shown // side)
    grey_levels = (pixels[:, ::every, ::every] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(grey_levels.repeat(times, 0).repeat(times, 1))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{safe(alternative)}" width="{picture.width}" height="{picture.height}">'


def page(title: str, sections: list[str]) -> str:
    """The whole document; `title` is plain text."""
    return _PAGE.format(title=safe(title), style=_STYLE, body="\n".join(sections))


_VARIABLES = [";".join(f"--{name}:{pair[theme]}" for name, pair in PALETTE.items()) for theme in (0, 1)]
_STYLE = (
    f":root{{{_VARIABLES[0]};color-scheme:light dark}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_VARIABLES[1]}}}}}\n"
    """*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15.5px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:860px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:.1em 0 .7em;overflow-wrap:anywhere;font-weight:650}
h2{font-size:1.15rem;margin:2.6em 0 .7em;padding-top:.7em;border-top:1px solid var(--grid);font-weight:650}
p{margin:.5em 0}
.kicker{color:var(--muted);font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:14px;margin:0 0 18px}
.card{border-top:3px solid;padding:8px 0 0;font-size:.78rem;line-height:1.4;color:var(--muted)}
.card .title{display:block;color:var(--ink);font-weight:600;font-size:.85rem}
.card b{display:block;font-size:1.9rem;line-height:1.2;font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.card small{font-size:1rem;font-weight:400;color:var(--muted)}
.facts{margin:0;font-size:.88rem}
.facts div{display:grid;grid-template-columns:8.5em 1fr;padding:3px 0;border-top:1px solid var(--grid)}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.finding{border-left:3px solid var(--accent);padding:1px 0 1px 12px;margin:.7em 0}
.finding.alarm{border-color:var(--robust);font-weight:600}
figure{margin:18px 0 26px;break-inside:avoid}
figcaption{font-size:.83rem;line-height:1.5;color:var(--muted);margin-top:8px;max-width:76ch}
figure svg{display:block;width:100%;height:auto;margin:0 auto;overflow:visible;stroke-linejoin:round;stroke-linecap:butt}
.halo text{paint-order:stroke;stroke:var(--page);stroke-width:2.5px;stroke-linejoin:round}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:18px 20px}
.row.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,220px),1fr))}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.8rem;color:var(--muted);margin:10px 0 0}
.key i{display:inline-block;width:26px;border-top:2.5px;vertical-align:.28em;margin-right:6px}
.examples{display:grid;grid-template-columns:repeat(8,1fr);gap:14px 10px}
.example{font-size:.7rem;line-height:1.35;min-width:0;break-inside:avoid}
.example div{white-space:nowrap;overflow:hidden;text-overflow:ellipsis;margin-bottom:7px}
.example .true{font-weight:600;margin-bottom:3px}
.example .answer{display:flex;white-space:pre}
.example .answer span{overflow:hidden;text-overflow:ellipsis}.example .answer i{font-style:normal;flex:none}
.example .wrong{color:var(--robust);font-weight:600}
.example img{display:block;width:100%;height:auto;image-rendering:pixelated}
.example .what{color:var(--muted)}
details{margin:8px 0;border-top:1px solid var(--grid);padding-top:8px}
summary{cursor:pointer;font-weight:600;font-size:.92rem}
pre,code{font:.82rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;
margin:8px 0;padding:10px 12px;border:1px solid var(--grid);border-radius:4px}
code{overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{text-align:left;vertical-align:top;padding:3px 12px 3px 0;border-top:1px solid var(--grid);
overflow-wrap:anywhere;font-weight:400}
th{color:var(--muted);width:10em}
.note{color:var(--muted);font-size:.9rem}
@media(max-width:640px){main{padding:22px 16px 40px}
.examples{grid-template-columns:repeat(4,1fr)}.facts div{grid-template-columns:7em 1fr}
.cards{grid-template-columns:repeat(auto-fill,minmax(140px,1fr))}}
@media print{body{font-size:10.5pt}main{max-width:none;padding:0}h2{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title} · fastanchor report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
