"""What a passage's text is, and when two texts are the same: one rule for encoding, training, mining and comparing."""

from __future__ import annotations

from ..model.tokenization_helpers import without_lone_surrogates


def join_title(title: str | None, text: str) -> str:
    """Put a passage's title before its text.

    >>> join_title("Fjord", "A long narrow inlet."), join_title(" ", "A car maker.")
    ('Fjord. A long narrow inlet.', 'A car maker.')
    """
    return f"{title}. {text}" if title and title.strip() else text


def text_key(text: str) -> str:
    """Return what texts that differ in white space alone have in common.

    >>> text_key("a river\\n") == text_key(" a  river")
    True
    """
    return " ".join(without_lone_surrogates(text).split())
