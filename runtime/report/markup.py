"""HTML that is escaped by construction: `tag` escapes every text and attribute that is not already `Html`."""

import html
from collections.abc import Iterable, Sequence

_VOID = {"img", "input"}  # elements without a closing tag, as far as we use them
# Characters that would be invisible, reorder their neighbours, or have no place in HTML: shown as \x1b or \u202e.
_HIDDEN = {*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, 0xFEFF, *range(0x2028, 0x202F)}
_HIDDEN |= {*range(0x2066, 0x206A), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF}
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN}

Attribute = str | int | float | bool | None


class Html(str):
    """Markup that is safe as it stands. Made by `tag` and `join`, never from a user's text."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Return a text as HTML, good between tags and in double quotes; control characters become visible."""
    return Html(html.escape(visible(text)))


def visible(text: str) -> str:
    """Return a text with control, direction and surrogate characters written out, as they may come in file names."""
    return text.translate(_VISIBLE)


def tag(name: str, *children: str | None, **attributes: Attribute) -> Html:
    """Return an element. `class_` gives `class`, `data_low` gives `data-low`; None and False leave an attribute out."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        parts.append(label if value is True else f'{label}="{join(value if isinstance(value, Html) else str(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Return children one after the other, escaping those that are plain text."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child))


def table(head: Sequence[str], rows: Iterable[Html], caption: str | None = None, **attributes: Attribute) -> Html:
    """Return a table: the titles of its columns, of `th` where they are plain text, and its rows."""
    titles = (title if isinstance(title, Html) else tag("th", title, scope="col") for title in head)
    parts = tag("thead", tag("tr", *titles)), tag("tbody", *rows)
    return tag("table", tag("caption", caption) if caption else None, *parts, **attributes)
