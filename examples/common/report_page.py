"""One HTML page with everything in it: text that is escaped, and pictures as part of the file."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; margin: 1rem 0 }
th, td { padding: 0.15rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line) }
th { text-align: center } td:first-child, th:first-child, .plan td { text-align: left }
.layer-report { overflow-x: auto } img { max-width: 100%; background: white; border-radius: 4px }
pre { white-space: pre-wrap } figcaption, .small { font-size: 0.85rem; opacity: 0.8 } figure { margin: 1rem 0 }
"""


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        heading: As text.
        text: As text, before the rest.
        fragment: As HTML, from someone who has escaped its values.
        picture: A PNG.
    """

    heading: str
    text: str = ""
    fragment: str = ""
    picture: Path | None = None


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page under another name, then rename: the file is always whole."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.heading)}</h2>")
        if section.text:
            body.append(f"<p>{html.escape(section.text)}</p>")
        body.append(section.fragment)
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode("ascii")
            body.append(f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{data}">')
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, "utf-8")
    partial.replace(path)
