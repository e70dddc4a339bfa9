"""Sphinx configuration of the site; `docs/build.py` writes the pages."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project, author = "HistoDiffusion", "The HistoDiffusion authors"
copyright = "The HistoDiffusion authors, Apache-2.0"
release = version = importlib.metadata.version("histodiffusion")

extensions = ["myst_nb", "mathml"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # show the committed outputs
nb_merge_streams = True
html_math_renderer = "mathml"

nb_code_prompt_show, nb_code_prompt_hide = "Source", "Source"

html_theme = "sphinx_book_theme"
html_title = "HistoDiffusion"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_context = dict(default_mode="auto")
html_copy_source = False
html_show_sourcelink = False
html_theme_options = dict(
    repository_url="https://github.com/histodiffusion/histodiffusion",
    use_repository_button=True,
    use_download_button=False,
    show_toc_level=2,
    show_navbar_depth=1,
    navigation_with_keys=False,
    navbar_persistent=[],
    navbar_start=[],
    extra_footer="Research use only: not a medical device.",
)
