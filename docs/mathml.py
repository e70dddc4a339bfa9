"""Equations as MathML, which browsers draw themselves: no script and no font is fetched."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(self, node):
    "An equation within a line."
    self.body.append(convert(node.astext()))
    raise SkipNode


def display(self, node):
    "An equation on lines of its own."
    self.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    "Called by Sphinx."
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return dict(version="1", parallel_read_safe=True, parallel_write_safe=True)
