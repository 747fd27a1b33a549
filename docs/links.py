"""For the docs site: links to files outside docs/ become their names, because the site has no such pages."""

import re


def on_page_markdown(markdown: str, **_) -> str:
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)", r"\1", markdown)
