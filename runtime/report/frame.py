"""What all our HTML pages share: one style sheet, and a policy by which a page loads nothing and runs only its own."""

import base64
import hashlib
from importlib import resources

from .markup import Html, tag


def asset(name: str) -> str:
    """Return a text file that lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def policy(style: str, script: str = "", *, asks: bool = False) -> str:
    """Return the content security policy of a page with this style and script, and pictures within itself.

    One that `asks` may talk to where it comes from, and show pictures that its reader has given it.
    """
    scripts = f"script-src {_digest(script)}; " if script else ""
    pictures, sources = ("data: blob:", "connect-src 'self'; ") if asks else ("data:", "")
    return (
        f"default-src 'none'; img-src {pictures}; style-src {_digest(style)}; {scripts}{sources}base-uri 'none'; "
        "form-action 'none'"
    )


def page(title: str, lead: str, *content: Html, css: str = "") -> str:
    """Return a whole page without scripts; `css` is what only this page has."""
    style = asset("page.css") + css
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy(style)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(style)),
    )
    header = tag("header", tag("div", tag("h1", title), tag("p", lead, class_="lead")), class_="top")
    return f"<!doctype html>\n{tag('html', head, tag('body', header, tag('main', *content)), lang='en')}\n"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
