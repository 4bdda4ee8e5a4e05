"""Sphinx's settings for the book: everything from the stored notebooks, nothing from outside. `make book` calls it."""

import re
import sys

project = "Smaller networks, measured"
author = "the compression-course authors"
copyright = f"2026, {author}. MIT licence."  # Sphinx's own name

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # its default is an address outside
nb_output_stderr = "remove"
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 4
# The claims' own kind of output has an HTML twin, which is shown; Sphinx is new to it.
suppress_warnings = ["mystnb.unknown_mime_type"]

myst_heading_slug_func = "build.anchor"

# MathJax 3 in one file, beside this one.
html_static_path = ["static", "vendor/mathjax"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!course_lib\.).*"),  # torch, numpy, Python: without a network there is no inventory of their names
    ("py:class", ".*"),  # annotations name helper classes that have no page
]

html_theme = "furo"
html_title = project
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = html_show_sourcelink = False  # each page has a link to its notebook instead
html_show_search_summary = False  # it fetches pages, which file:// forbids
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {"navigation_with_keys": True}


def skip_what_is_told_elsewhere(app, what, name, member, skip, options):
    """A function that a module only passes on is described where it is written."""
    module = getattr(member, "__module__", None)
    passed_on = what == "module" and str(module).startswith("course_lib.") and module != current_module(app)
    return True if passed_on else None


def current_module(app) -> str:
    """The module of the page that is being read: its pages are called like them."""
    return app.env.docname.rpartition("/")[2]


def read_as_it_looks(app, what, name, thing, options, lines):
    """Take a lone ``|`` or ``*`` of a docstring's prose for itself, as the docstring's author did."""
    doctest = False
    for number, line in enumerate(lines):
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if not doctest:
            parts = re.split(r"(``.*?``)", line)
            odd = sum(part.count("*") for part in parts[::2]) % 2
            parts[::2] = [re.sub(r"[|*]" if odd else r"\|", r"\\\g<0>", part) for part in parts[::2]]
            lines[number] = "".join(parts)


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_what_is_told_elsewhere)
    app.connect("autodoc-process-docstring", read_as_it_looks)


sys.dont_write_bytecode = True
