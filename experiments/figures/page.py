"""One page of HTML with everything inside."""

import base64
import html
import pathlib
from collections.abc import Mapping

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1.05rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 0 auto; padding: 1rem; }
body { background: white; color: #1b1b1b; overflow-wrap: anywhere; }
a { color: #3949ab; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; padding: 0.15rem 1.2rem 0.15rem 0; }
td { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
img { width: 100%; height: auto; background: white; border-radius: 0.4rem; }
p { margin: 0.4rem 0; } nav { font-size: 0.9rem; }
@media (prefers-color-scheme: dark) {
  body { background: #16181d; color: #dfe2e8; } a { color: #9fa8da; }
}
"""


def page(
    title: str,
    facts: dict[str, str],
    figures: list[tuple[str, str, pathlib.Path]],
    command: str,
    links: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
      title: of the page.
      facts: shown as a table.
      figures: heading, explanation and PNG file of each.
      command: that made the page.
      links: text and address of other pages, shown at the top.
    """
    escape = html.escape
    rows = "\n".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    parts = []
    for heading, text, file in figures:
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>")
        parts.append(
            f'<img alt="{escape(heading)}: {escape(text)}" src="data:image/png;base64,{data}">'
        )
    shown = " · ".join(
        f'<a href="{escape(address)}">{escape(text)}</a>' for text, address in (links or {}).items()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<nav>{shown}</nav>\n<h1>{escape(title)}</h1>\n"
        f"<table>\n{rows}\n</table>\n"
        + "\n".join(parts)
        + f"\n<p>Made by <code>{escape(command)}</code></p>\n</body>\n</html>\n"
    )
