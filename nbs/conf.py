"The documentation site: sphinx-build -W nbs nbs/_build/html"

import os
from html import escape
from inspect import Parameter

from docutils.nodes import SkipNode, paragraph, title
from fastcore.docments import docments
from latex2mathml.converter import convert
from sphinx.util.typing import stringify_annotation

import fasterai_kd
from fasterai_kd._docs import PARAMETERS

project = "fasterai_kd"
release = version = fasterai_kd.__version__
copyright = "the fasterai_kd contributors"
html_title = f"fasterai_kd {version}"
html_theme = "furo"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
repository = f"{os.environ.get('GITHUB_SERVER_URL')}/{os.environ.get('GITHUB_REPOSITORY')}"
if repository.startswith("https://github.com/"):  # where GitHub builds the site, its pages link to their source
    html_theme_options = {
        "source_repository": repository,
        "source_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "source_directory": "nbs/",
    }

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
copybutton_exclude = ".linenos, .gp, .go"  # what a reader would not type
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
nb_execution_mode = "off"  # notebooks are stored with their outputs, and run by the tests
nb_ipywidgets_js = {}  # there are no widgets: nothing is loaded from elsewhere
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"  # what browsers read without a script from elsewhere
suppress_warnings = ["mystnb.unknown_mime_type"]

default_role = "literal"  # docstrings write `names` as Markdown does
autodoc_typehints = "none"  # types stand with the parameters
autodoc_member_order = "bysource"
maximum_signature_line_length = 88


def add_docments(app, what, name, obj, options, lines):
    "Parameters, their types and the comments beside them become the page's list of parameters."
    for i in reversed(range(len(lines))):
        lines[i] = lines[i].replace("|", r"\|")  # |x| is no substitution
        if lines[i].startswith(("Raises ", "Returns ", "Source")):
            lines.insert(i, "")  # a paragraph of its own
    if what not in ("class", "function", "method"):
        return
    if PARAMETERS in lines:  # for help(): here they follow with their types
        del lines[lines.index(PARAMETERS) :]
    found = docments(obj, full=True)
    of_kwargs = found.pop("return", {}).get("docment")  # fastcore takes the comment beside **kwargs for the result's
    lines.append("")
    for name, about in found.items():
        starred = about["kind"] is Parameter.VAR_KEYWORD
        comment = of_kwargs if starred else about["docment"]
        if name == "self" or (starred and not comment):
            continue
        lines.append(f":param {name}: {comment or ''}")
        if about["anno"] is not Parameter.empty:
            lines.append(f":type {name}: {stringify_annotation(about['anno'], 'smart')}")


def add_formula(translator, node):
    translator.body.append(convert(node.astext(), display="block" if node.tagname == "math_block" else "inline"))
    raise SkipNode


def describe_page(app, pagename, templatename, context, doctree):
    "What search engines and chats show of a page: its title and its first paragraph."
    if doctree is None:
        return
    text = next((" ".join(p.astext().split()) for p in doctree.findall(paragraph) if len(p.astext()) > 40), "")
    about = text if len(text) <= 200 else text[:200].rpartition(" ")[0] + " …"
    heading = next(doctree.findall(title)).astext()
    tags = {"og:title": heading, "og:description": about, "og:type": "article", "og:site_name": project}
    metas = [f'<meta property="{name}" content="{escape(value)}">' for name, value in tags.items()]
    context["metatags"] += f'<meta name="description" content="{escape(about)}">' + "".join(metas)


def setup(app):
    app.add_html_math_renderer("mathml", (add_formula, None), (add_formula, None))
    app.connect("autodoc-process-docstring", add_docments)
    app.connect("html-page-context", describe_page)
