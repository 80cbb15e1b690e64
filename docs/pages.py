"""Hooks of mkdocs: the repository as it is, read as a site.

Documents keep links that hold on a code host: relative ones, to files of the repository. Here those to documents
outside docs/ become links to pages, and every other file that is linked becomes a page that shows it: no host has to be
known.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "infra/README.md": "infra.md",
}
"""Documents outside docs/: where they lie in the repository, and their page."""
SHOWN = "files/"
"""Folder of the pages that show files."""
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"^(`{3,}).*?^\1`*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def page_of(path: str) -> str:
    """The site's source path of the file PATH of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"{SHOWN}{path}.md")


def linked(text: str, folder: str) -> list[str]:
    """Paths in the repository that a document of FOLDER links to."""
    return [posixpath.normpath(posixpath.join(folder, link["path"])) for link in LINK.finditer(CODE.sub("", text))]


def rewritten(text: str, path: str) -> str:
    """The document PATH of the repository with its links as the site has them; code stays."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match["path"]))
        if not (ROOT / target).is_file():
            return match[0]  # left for mkdocs to refuse
        return posixpath.relpath(page_of(target), posixpath.dirname(page_of(path)) or ".") + (match["anchor"] or "")

    parts, end = [], 0
    for code in CODE.finditer(text):
        shown = code[0] if code[1] else code[0].replace(r"\|", "|")  # escaped for tables of code hosts, needless here
        parts += [LINK.sub(link, text[end : code.start()]), shown]
        end = code.end()
    return "".join([*parts, LINK.sub(link, text[end:])])


def shown(path: str) -> str:
    """A page with the file PATH."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n`````{Path(path).suffix[1:]}\n{text}\n`````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, and the files that any document links to."""
    documents = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in PAGES:
        files.append(File.generated(config, PAGES[path], content=(ROOT / path).read_text(encoding="utf-8")))
    for document in documents:
        for path in linked((ROOT / document).read_text(encoding="utf-8"), posixpath.dirname(document)):
            page = page_of(path)
            if page.startswith(SHOWN) and (ROOT / path).is_file() and page not in files.src_uris:
                files.append(File.generated(config, page, content=shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    if page.file.src_uri.startswith(SHOWN):
        return markdown
    paths = {uri: path for path, uri in PAGES.items()}
    return rewritten(markdown, paths.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
