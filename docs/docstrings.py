"""Read docstrings the way they are written here.

Google-style docstrings have a section `Examples:`; ours say `Example:`, as there is
one, and end with a `Reference:`. Papers named by their arXiv number become links, and
tables drawn with equals signs, and examples outside a section, stay as they are.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_REFERENCE = re.compile(r"^References?:\n((?:(?: +.*)?\n)*(?: +.*)?)", re.MULTILINE)
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_TABLE = re.compile(r"^(=+(?: +=+)+)\n(?:.+\n)*\1$", re.MULTILINE)
_PROMPT = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_INDENT = re.compile(r"^ +", re.MULTILINE)


def link_papers(text: str) -> str:
    """Turn arXiv numbers into links."""
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _reference(match: re.Match[str]) -> str:
    papers = _INDENT.sub("", match[1]).strip()
    return f"**Reference:** {link_papers(papers)}\n{{: .doc-reference }}\n"


class Sections(griffe.Extension):
    """Rename or rewrite the sections that the parser does not know."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        del kwargs
        if obj.docstring is None:
            return
        text = _EXAMPLE.sub("Examples:", obj.docstring.value)
        text = _TABLE.sub(r"```text\n\g<0>\n```", text)
        text = _PROMPT.sub(r"```pycon\n\g<0>\n```", text)
        obj.docstring.value = _REFERENCE.sub(_reference, text)
