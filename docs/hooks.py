"""Pages of the site that are files of the project's top folder: they are written once, and read well in both places."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_for_the_site((ROOT / source).read_text(), config)))


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Links from the other pages to these."""
    for source, page in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def _for_the_site(text: str, config: MkDocsConfig) -> str:
    """Links that start at the top folder: those to pages lead to pages, those to other files to the repository."""

    def moved(found: re.Match[str]) -> str:
        before, target = found.groups()
        if target in PAGES:
            return before + PAGES[target]
        if target.startswith("docs/"):
            return before + target.removeprefix("docs/")
        return f"{before}{config.repo_url}/blob/main/{target}"

    return re.sub(r'(\]\(|src=")(?!https?:|#)([^)"#\s]+)', moved, text)
