"""The site and JupyterLab in a real browser: `make test-browser`. Skipped without Chromium or without a built site."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_site"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


class Page(HTMLParser):
    "Links, anchors and fetched files of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.fetched = [], {""}, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        at = dict(attributes)
        self.anchors |= {at[k] for k in ("id", "name") if at.get(k)}
        if tag == "a" and at.get("href"):
            self.links.append(at["href"])
        if tag in ("script", "img", "iframe") and at.get("src"):
            self.fetched.append(at["src"])
        if tag == "link" and "stylesheet" in (at.get("rel") or ""):
            self.fetched.append(at["href"])


@pytest.fixture(scope="module")
def pages():
    if not (SITE / "index.html").is_file():
        pytest.skip("no site in _site: run make docs")
    return {p: Page(p) for p in SITE.rglob("*.html") if "_static" not in p.parts}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=found, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(pages):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            "Log nothing."

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def tab(browser):
    context = browser.new_context(viewport=dict(width=1280, height=900))
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda m: page.trouble.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.trouble.append(str(e)))
    page.on("response", lambda r: page.trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    aborted = "net::ERR_ABORTED"  # by leaving the page
    page.on("requestfailed", lambda r: page.trouble.append(f"failed: {r.url}") if r.failure != aborted else None)
    yield page
    context.close()


def test_every_link_has_a_target(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            anchor = unquote(parts.fragment)
            if not place.is_file() or place in pages and anchor not in pages[place].anchors:
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_downloaded_from_other_hosts(pages):
    assert not [(p.name, f) for p, page in pages.items() for f in page.fetched if urlsplit(f).netloc]


def test_pages_load_without_an_error(pages, address, tab):
    other = []
    tab.on("request", lambda r: other.append(r.url) if not r.url.startswith((address, "data:")) else None)
    for path in pages:
        tab.goto(f"{address}/{path.relative_to(SITE)}")
    assert (tab.trouble, other) == ([], [])


def test_search_finds_guidance(address, tab):
    tab.goto(f"{address}/search.html?q=guidance")
    tab.wait_for_selector("#search-results ul.search li a", timeout=20_000)
    titles = tab.locator("#search-results ul.search li a").all_inner_texts()
    assert any("Sampling" in t for t in titles)


def test_equations_are_rendered(address, tab):
    for page in ("method.html", "library/models/09_sampling.html"):
        tab.goto(f"{address}/{page}")
        boxes = [e.bounding_box() for e in tab.locator("math").all()]
        assert len(boxes) > 2 and all(b and b["width"] > 4 and b["height"] > 4 for b in boxes)
        assert not re.search(r"\\(frac|epsilon|nabla|sqrt)", tab.inner_text("article"))


def test_dark_mode(address, tab):
    tab.goto(f"{address}/index.html")

    def shade():
        return sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    tab.evaluate("document.documentElement.dataset.theme = 'light'")
    light = shade()
    tab.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert shade() < 200 < light


@pytest.mark.parametrize("name", ["index.html", "method.html", "library.html", "library/measure/01_selection.html",
                                  "experiments/table_1.html", "gallery.html"])  # fmt: skip
def test_fits_a_phone(address, tab, name):
    tab.set_viewport_size(dict(width=390, height=800))
    tab.goto(f"{address}/{name}")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 391


@pytest.fixture
def lab(tmp_path):
    log = open(tmp_path / "lab.log", "w+")
    folders = dict(HISTODIFFUSION_RESULTS_PATH="results", HISTODIFFUSION_FIGURES_PATH="figures",
                   JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data")  # fmt: skip
    env = os.environ | {name: str(tmp_path / folder) for name, folder in folders.items()}
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("library", "experiments"))
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--port=0", "--IdentityProvider.token=",
               "--allow-root", "--expose-app-in-browser", "--ServerApp.open_browser=False",
               f"--ServerApp.root_dir={tmp_path / 'nbs'}"]  # fmt: skip
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    for _ in range(120):
        time.sleep(0.5)
        if found := re.search(r"http://(127\.0\.0\.1|localhost):(\d+)/lab", (tmp_path / "lab.log").read_text()):
            break
    assert found, (tmp_path / "lab.log").read_text()
    yield f"http://{found[1]}:{found[2]}"
    process.terminate()
    process.wait(20)


def test_start_notebook_and_explorer(lab, tab):
    pytest.importorskip("jupyterlab")
    tab.goto(f"{lab}/lab/tree/start.ipynb")
    tab.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    idle = "/Python 3.*Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText)"
    tab.wait_for_function(idle, timeout=90_000)
    tab.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    drawn = "document.querySelector('.widget-html table') && document.body.innerText.includes('Below each')"
    tab.wait_for_function(drawn, timeout=400_000)
    stderr = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']"
    assert not tab.locator(f"{stderr} >> text=Error").count()

    def picture():
        return tab.locator(".widget-html-content").filter(has_text="Below each").first.inner_html()

    before = picture()
    handle = tab.locator(".widget-slider .noUi-handle").first  # of the guidance scale
    handle.focus()
    for _ in range(6):
        handle.press("ArrowRight")
    for _ in range(120):
        tab.wait_for_timeout(500)
        try:
            after = picture()
        except Exception:
            continue  # a new row is being drawn
        if after != before:
            break
    assert after != before and after.count("<img") == before.count("<img")
