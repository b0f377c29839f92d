"""Links from the docs to source files work on the site too, and no page fetches anything from elsewhere.

Each linked source file becomes a page of its own.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?:\.\./)+((?:src|examples|benchmarks|tests)/[\w/]+\.py)\)")
FETCHED = re.compile(r"""<(?:link|script|img|iframe)\b[^>]*\b(?:src|href)=["'](?:https?:)?//[^>]*>""")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each source file that some page links to; a link to none stays, and fails the strict build."""
    linked = {
        path
        for file in files.documentation_pages()
        if file.abs_src_path is not None
        for path in LINK.findall(Path(file.abs_src_path).read_text(encoding="utf-8"))
        if (ROOT / path).is_file()
    }
    for path in sorted(linked):
        source = (ROOT / path).read_text(encoding="utf-8")
        text = f"---\nhide: [toc]\n---\n\n# {path}\n\n````python\n{source}````\n"
        page = File.generated(config, f"source/{path.removesuffix('.py')}.md", content=text)
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point such links at those pages."""
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def to_page(link: re.Match[str]) -> str:
        target = f"source/{link[1].removesuffix('.py')}.md"
        return f"]({up}{target})" if files.get_file_from_path(target) else link[0]

    return LINK.sub(to_page, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load something from another host."""
    fetched = [tag for tag in FETCHED.findall(output) if 'rel="canonical"' not in tag]
    if fetched:
        raise PluginError(f"{page.file.src_uri} would fetch from elsewhere: {fetched[0]}")
    return output
