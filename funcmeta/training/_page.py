"""A page for the browser: everything in one file, nothing from elsewhere, for small screens and dark ones too."""

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --text: #1d2430; --faint: #5d6878;
  --edge: #dfe3e9; --grid: #e6e9ee; --line: #0072b2; --noise: #a9cfe6; --mark: #c4420b; --good: #00704f; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --card: #1a2028; --text: #e4e8ee; --faint: #9aa6b5;
  --edge: #2c3540; --grid: #2a323d; --line: #5bb8f0; --noise: #2d5a78; --mark: #ff9a5c; --good: #4cc79b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 1.15rem; }
p { margin: 6px 0; }
.faint, figcaption, caption, th, dt { color: var(--faint); }
.faint { overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 22px; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 11px 12px; display: flex; flex-direction: column; justify-content: space-between; }
.tile b { font-size: 1.05rem; font-weight: 600; line-height: 1.4; overflow-wrap: anywhere; }
.tile span { color: var(--faint); font-size: .85rem; }
.tile.bad b { color: var(--mark); }
.tile.good b { color: var(--good); }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px;
  margin: 12px 0; }
.columns figure:only-child { height: 100%; }
figure { margin: 0; padding: 14px 14px 8px; min-width: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
figcaption b { color: var(--text); font-size: 1rem; display: block; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; }
svg text { font-family: inherit; }
.card { padding: 6px 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption, th { text-align: left; font-size: .85rem; font-weight: 500; }
caption { padding: 6px 0 2px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
td { overflow-wrap: break-word; }
.number { text-align: right; }
td.number { white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); column-gap: 28px;
  margin: 6px 0; }
dl div { display: flex; justify-content: space-between; gap: 14px; padding: 4px 0;
  border-bottom: 1px solid var(--edge); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; font-variant-numeric: tabular-nums; }
@media (max-width: 480px) { main { padding: 18px 12px 32px; } h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile { padding: 10px 12px; } .tile b { font-size: 1.1rem; }
  figure { padding: 12px 8px 4px; } figcaption { padding: 0 4px; } .card { padding: 4px 12px; } }
@media print { body { background: none; } .tile, figure, .card { break-inside: avoid; } }
"""


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The whole page. Titles are texts, parts are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(subtitle)}</p>\n'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what is below it, in HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    """A line of explanation."""
    return f'<p class="faint">{escape(text)}</p>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Figures at a glance: what it is, its value, and "good", "bad" or ""."""
    return '<div class="tiles">' + "".join(_tile(*entry) for entry in entries) + "</div>"


def _tile(name: str, value: str, kind: str) -> str:
    return f'<div class="tile {kind}"><span>{escape(name)}</span><b>{escape(value)}</b></div>'


def columns(parts: Iterable[str]) -> str:
    """Parts side by side where there is room, in HTML."""
    return '<div class="columns">' + "".join(f"<div>{part}</div>\n" for part in parts) + "</div>"


def chart(title: str, text: str, svg: str) -> str:
    """A picture with its title and explanation."""
    return f"<figure>\n<figcaption><b>{escape(title)}</b>{escape(text)}</figcaption>\n{svg}\n</figure>\n"


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with what it shows above it. Columns whose head ends with ``#`` are numbers."""
    classes = [' class="number"' if head.endswith("#") else "" for head in heads]
    top = "".join(
        f'<th scope="col"{kind}>{escape(head.removesuffix("#"))}</th>'
        for kind, head in zip(classes, heads, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(classes, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="card"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def pairs(entries: Iterable[tuple[str, str]]) -> str:
    """Names and values, in as many columns as there is room for."""
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in entries)
    return f'<div class="card"><dl>\n{body}</dl></div>'
