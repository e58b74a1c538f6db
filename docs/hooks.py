"""Hooks of MkDocs: formulas become MathML, and cells of tables know their column, for narrow screens."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """What the Markdown extensions have made, with formulas that need no script and tables that extra.css can stack."""
    return _TABLE.sub(_labelled, _FORMULA.sub(_formula, content))


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return f'<{match[1]} class="math">{convert(html.unescape(match[2]), display=display)}</{match[1]}>'


def _labelled(match: re.Match[str]) -> str:
    heads = [re.sub(r"<[^>]*>", "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", match[0], re.DOTALL)]

    def row(found: re.Match[str]) -> str:
        labels = iter(heads)
        return re.sub(r"<td", lambda _: f'<td data-label="{html.escape(next(labels, ""))}"', found[0])

    def breakable(found: re.Match[str]) -> str:
        return re.sub(r"[:,]", r"\g<0><wbr>", found[0])

    table = re.sub(r"<code>[^<]*</code>", breakable, match[0])
    return re.sub(r"<tr>.*?</tr>", row, table, flags=re.DOTALL)
