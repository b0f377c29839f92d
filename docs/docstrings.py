"""How docstrings are read for the API reference: what numpy's form leaves open, as this project writes it."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from griffe import Class, DocstringSectionKind, Extension

if TYPE_CHECKING:
    from griffe import Docstring, Module, Object

LITERAL = re.compile(r"^ *::\n", re.MULTILINE)
# A colon alone is numpy's line for "no name, and the type is in the signature".
RETURNS = re.compile(r"(?<=^Returns\n-------\n)(?P<text>.+)", re.MULTILINE | re.DOTALL)
SHARED = (DocstringSectionKind.parameters, DocstringSectionKind.attributes)


class Docstrings(Extension):
    """Whole sentences under Returns, shared descriptions once, no reStructuredText; overrides are described."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Rewrite each docstring, have it parsed, and merge neighbours with the same description."""
        _inherit(pkg)
        for docstring in _docstrings(pkg):
            text = LITERAL.sub("", docstring.value)
            docstring.value = RETURNS.sub(lambda sentence: f":\n{_indented(sentence['text'])}", text)
            for section in docstring.parsed:
                if section.kind in SHARED:
                    section.value[:] = [
                        _merged(list(items)) for _, items in groupby(section.value, _description)
                    ]


def _inherit(obj: Object) -> None:
    """Give members without a docstring that of what they override."""
    for member in [member for member in obj.members.values() if not member.is_alias]:
        _inherit(member)
        if member.docstring is None and isinstance(obj, Class):
            overridden = (base.members[member.name] for base in obj.mro() if member.name in base.members)
            member.docstring = next((each.docstring for each in overridden if each.docstring), None)


def _docstrings(obj: Object) -> list[Docstring]:
    own = [] if obj.docstring is None else [obj.docstring]
    members = [member for member in obj.members.values() if not member.is_alias]
    return own + [docstring for member in members for docstring in _docstrings(member)]


def _description(item: Any) -> str:
    return item.description


def _merged(items: list[Any]) -> Any:
    first = items[0]
    if len(items) > 1:
        first.name = ", ".join(item.name for item in items)
        first.annotation = first.value = None
    return first


def _indented(text: str) -> str:
    """The first paragraph, four spaces in."""
    paragraph, blank, rest = text.partition("\n\n")
    return "\n".join(f"    {line}" for line in paragraph.splitlines()) + blank + rest
