"""Code in the docs is run: as a doctest, as part of an example, or as it stands; names are where links say."""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import woodfisher as wf
from woodfisher.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FRAGMENTS = {"shipping.md", "tour.md"}
"""Pages whose blocks are single lines of longer programs; what they call has tests of its own."""

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'--8<-- "(examples/\w+\.py):(\w+)"')

NAMED = re.compile(r"(`[\w.]+`(?:(?:, | and )`[\w.]+`)*) (?:in |\()\[[^\]]+\]\((?:\.\./)+(src/[\w/]+\.py)\)")


def code_blocks():
    """Each Python block of the docs: page, and its text."""
    for page in PAGES:
        if page.name in FRAGMENTS:
            continue
        for _, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if text.lstrip().startswith(">>> "):  # a doctest, which pytest runs itself
                continue
            yield pytest.param(text.strip(), id=f"{page.stem}: {text.strip().splitlines()[0][:40]}")


@pytest.mark.parametrize("block", list(code_blocks()))
def test_python_in_the_docs_is_run(block):
    snippet = SNIPPET.fullmatch(block)
    if snippet is None:
        exec(compile(block, "docs", "exec"), {})
    else:
        source = (ROOT / snippet[1]).read_text(encoding="utf-8")
        assert source.count(f"--8<-- [start:{snippet[2]}]") == source.count(f"--8<-- [end:{snippet[2]}]") == 1


def test_names_in_the_docs_stand_where_they_are_linked_to():
    named = [match for page in PAGES for match in NAMED.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 10
    for names, path in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`[\w.]*?(\w+)`", names):
            assert re.search(rf"\b(def|class) {name}\b", source), f"{name} is not defined in {path}"


def test_names_and_options_in_the_docs_exist():
    pages = [*PAGES, ROOT / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    names = set(re.findall(r"\bwf\.([A-Za-z_]+)", text))
    assert len(names) > 20
    assert not {name for name in names if not hasattr(wf, name)}
    flags = {
        flag
        for line in re.findall(
            r"^.*\bwoodfisher (?:prune|compare|train|plan|tour|export|bench|report|inspect) .*$", text, re.M
        )
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)
    }
    known = {"--nproc-per-node", "--version", "--help"}
    for command in COMMANDS.values():
        known |= {f"--{name.replace('_', '-')}" for name in _options(command)}
    assert len(flags) > 20
    assert flags <= known, sorted(flags - known)


def _options(command):
    """Names of a command's options, those of its groups included."""
    for name, kind in get_type_hints(command).items():
        if dataclasses.is_dataclass(kind):
            yield from _options(kind)
        else:
            yield from (name, f"no_{name}")


def test_the_reference_has_every_public_name():
    listed = {
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: woodfisher\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(wf.__all__) - {"__version__"} <= listed


def test_the_site_fetches_nothing():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert not re.search(r"https?://", settings)
