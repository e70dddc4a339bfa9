"""Equations as MathML, which browsers render without downloading a script or a font."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(self, node):
    "An inline equation."
    self.body.append(convert(node.astext()))
    raise SkipNode


def display(self, node):
    "A displayed equation."
    self.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    "Register the renderer; called by Sphinx."
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return dict(version="1", parallel_read_safe=True, parallel_write_safe=True)
