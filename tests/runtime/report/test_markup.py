"""Markup escapes by construction: what comes from outside stays text."""

from html.parser import HTMLParser

from diffiqa.runtime.report.markup import Html, escape, join, tag, visible

HOSTILE = [
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1)",
    "</title></style></script><!-- ",
    "a & b &lt; c &amp;quot; d",
    "]]> --> <![CDATA[",
    "`${alert(1)}` $title {{x}}",
]


class Reader(HTMLParser):
    """Reads one element back."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_and_attributes_read_back_as_they_were() -> None:
    for text in HOSTILE:
        reader = Reader(tag("p", text, title=text))
        assert reader.tags == [("p", {"title": text})]
        assert reader.text == text


def test_characters_that_deceive_are_written_out() -> None:
    cases: list[tuple[str, str]] = [
        ("a\x00b\x1b[31m\n", "a\\x00b\\x1b[31m\\x0a"),
        ("x\u202egnp.exe", "x\\u202egnp.exe"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("caf\udce9.png", "caf\\udce9.png"),
        ("\x85\ufeff\u2066", "\\x85\\ufeff\\u2066"),
        ("Füße 猫 👩\u200d💻 שלום", "Füße 猫 👩\u200d💻 שלום"),
    ]
    for text, shown in cases:
        assert visible(text) == shown
        escape(text).encode()  # no lone surrogate is left


def test_only_markup_is_left_as_it_is() -> None:
    assert join("<b>", Html("<b>"), None, "") == "&lt;b&gt;<b>"
    assert tag("img", alt="", hidden=True, width=None, data_low=0.5) == '<img alt="" hidden data-low="0.5">'
    assert tag("td", tag("b", "x"), class_="y") == '<td class="y"><b>x</b></td>'
