"""The frame of a page and its tables, for light and dark mode, phones and large screens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sparse_export.pages.escaping import escape

__all__ = ["document", "figure", "table"]

# Okabe and Ito's hues, which people of every colour vision can tell apart, each at least 3 : 1 against its
# background.
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1c1c; --faint: #6663; --shade: #8881;
  --c0: #0072b2; --c1: #d55e00; --c2: #008a65; --c3: #b5588c; --c4: #a06a00; --c5: #2b88bd; --c6: #666; }
@media (prefers-color-scheme: dark) { :root { --page: #161616; --ink: #e8e8e8; --faint: #aaa4; --shade: #aaa2;
  --c0: #5db7ee; --c1: #ff8c42; --c2: #2fd0a0; --c3: #e29bc3; --c4: #f2c14e; --c5: #9ad4f5; --c6: #aaa; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); vertical-align: top;
  white-space: nowrap; overflow-wrap: break-word; }
.wrap th, .wrap .text { white-space: normal; } .wrap .text { min-width: 5.6rem; }
@media (max-width: 600px) { table { font-size: .84rem; } th, td { padding: .3rem .35rem; } }
tr > :first-child { padding-left: 0; } tr > :last-child { padding-right: 0; }
th:first-child, td:first-child, .text { text-align: left; } th { font-weight: 600; }
figure { margin: .8rem 0; } figcaption { font-size: .9rem; max-width: 34rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } .grid { stroke: var(--faint); } .level { stroke: var(--ink); stroke-dasharray: 6 4; }
.band { fill: var(--faint); stroke: none; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }
.verdict { font-size: 1.12rem; border-left: .3rem solid var(--c0); padding: .2rem 0 .2rem .9rem; }
.failed { border-color: var(--c1); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--faint); border-top: .3rem solid var(--c6); border-radius: .3rem; padding: .6rem .8rem; }
.card.good { border-top-color: var(--c2); } .card.bad { border-top-color: var(--c1); }
.card h2 { font-size: .92rem; margin: 0; } .card p { margin: .15rem 0; font-size: .86rem; }
.card .word { font-weight: 600; font-size: 1rem; } .card .figure { font-size: 1.35rem; line-height: 1.3; }
pre { white-space: pre-wrap; background: var(--shade); padding: .7rem; border-radius: .3rem; font-size: .86rem; }
"""
# The page may load nothing from anywhere, whatever a name in it contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, parts: Sequence[str]) -> str:
    """Assemble a page.

    Args:
        title: plain text, also the heading.
        parts: HTML.

    Returns:
        The whole HTML.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: Sequence[int] = (0,),
    wrap: bool = False,
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """Format a table, which scrolls by itself where it is wider than the page.

    Args:
        head: plain text of the columns; no head where all are empty.
        rows: plain text, as long as the head.
        text_columns: indices of the columns that are aligned left.
        wrap: break lines inside cells instead.
        bold: numbers of row and column of the cells that stand out.

    Returns:
        HTML.
    """

    def row(cells: Sequence[str], tag: str, at: int | None = None) -> str:
        kinds = (' class="text"' if n in text_columns else "" for n in range(len(cells)))
        texts = (
            f"<b>{escape(cell)}</b>" if (at, n) in bold else escape(cell) for n, cell in enumerate(cells)
        )
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    body = "".join(f"<tr>{row(cells, 'td', at)}</tr>" for at, cells in enumerate(rows))
    top = f"<thead><tr>{row(head, 'th')}</tr></thead>" if any(head) else ""
    return (
        f'<div class="wide{" wrap" if wrap else ""}" tabindex="0"><table>{top}'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(drawing: str, caption: str) -> str:
    """Add a caption to a drawing.

    Args:
        drawing: HTML.
        caption: plain text.

    Returns:
        HTML.
    """
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"
