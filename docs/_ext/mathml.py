"""Equations as MathML, which browsers display themselves: no script, no request, readable by screen readers."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    self.body.append(convert(node.astext()) + "</span>")
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    text = node.astext()
    if "\\\\" in text and "\\begin" not in text:  # several lines, as Sphinx lets them be written
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    number = f'<span class="eqno">({node["number"]})</span>' if node["number"] else ""
    self.body.append(number + convert(text, display="block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Registers the renderer with Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
