"""mkdocs hook: pages of the site that lie outside of docs/, beside what they describe.

On the site they keep their path from the root of the repository, and docs/ is the root itself.
Links are written as they hold in the repository: here they are turned into those of the site. Links
to source files and folders, which the site does not have, become text.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^):#]+)(?P<anchor>#[^)]*)?\)")
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/results/*.md",
    "bench/results/*.png",
    "examples/*/README.md",
    "kernels/README.md",
)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    on_site = os.path.dirname(page.file.src_uri)
    in_repository = os.path.relpath(page.file.abs_src_path, ROOT)

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(in_repository), match["target"]))
        if files.get_file_from_path(target.removeprefix("docs/")):
            path = os.path.relpath(target.removeprefix("docs/"), on_site or ".")
            return f"{match['image']}[{match['text']}]({path}{match['anchor'] or ''})"
        return match["text"] if (ROOT / target).exists() else match[0]

    return LINK.sub(link, markdown)
