"""README.md as the description of the package in an index, where nothing relative leads anywhere."""

from __future__ import annotations

import re

# ![alt](target) or [text](target), the target not absolute and no anchor.
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def index_readme(text: str, source: str | None) -> str:
    """The text with absolute links.

    source: the address that a file's path within the tree is put behind, such as ".../blob/main/"; None where
        there is none: then pictures are left out, and of links their words remain.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if source is not None:
            return f"{picture}[{words}]({source.rstrip('/')}/{target})"
        return "" if picture else words

    return _LINK.sub(absolute, text)
