"The documentation site builds without a warning, has every public name, and works in a browser."

import os
import re
import shutil
import subprocess
import sys
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

import fasterai_kd

MISSING = [name for name in ("sphinx", "myst_nb", "furo", "latex2mathml", "playwright") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason='needs pip install -e ".[docs]"')
NBS = Path(__file__).parents[1] / "nbs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(NBS), str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(browser, url):
    "The home page; whatever it complains about, or asks of another host, fails the test."
    page, complaints = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))  # browsers ask for it, there is none
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((url, "data:")) else complaints.append(r.url))
    page.goto(url)
    yield page
    page.close()
    assert complaints == []


def test_every_public_name_is_on_an_api_page(site):
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode().splitlines()
    documented = {line.split()[0] for line in lines if " py:" in line}
    assert {f"fasterai_kd.{name}" for name in fasterai_kd.__all__} - documented == set()
    assert "fastai.learner.Learner.distill" in documented


def test_every_notebook_and_page_is_in_the_menu(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    menu = {href.split("#")[0] for href in re.findall(r'toctree-l1.*?href="(.*?)"', home)}
    pages = {p.relative_to(NBS).with_suffix(".html").as_posix() for e in ("md", "ipynb") for p in NBS.rglob(f"*.{e}")}
    assert menu == {page for page in pages if not page.startswith("_build") and ".ipynb_checkpoints" not in page} - {
        "index.html"
    }


def test_a_reader_finds_the_guide_a_loss_and_its_parameters(page, tmp_path):
    page.get_by_role("link", name="Losses guide").first.click()
    page.get_by_role("heading", level=1, name="Losses guide").wait_for()
    assert page.locator("img").count() > 0
    assert page.locator("math").count() > 20

    page.get_by_placeholder("Search").fill("SoftTarget")
    page.get_by_placeholder("Search").press("Enter")
    page.locator("#search-results li a", has_text="fasterai_kd.SoftTarget").first.click()
    entry = page.locator("dl.function", has=page.locator(r"#fasterai_kd\.SoftTarget"))
    assert "teacher_pred (Tensor) – teacher logits, same shape" in entry.inner_text()
    assert "Hinton" in entry.inner_text()
    shot = page.screenshot(path=tmp_path / "api.png")
    assert shot.startswith(b"\x89PNG")


def test_the_home_page_shows_its_picture_and_the_change(page):
    width = page.locator("article img").first.evaluate("img => img.naturalWidth")
    assert width > 600
    assert "kd = KnowledgeDistillationCallback(teacher, SoftTarget)" in page.locator(".highlight-diff").inner_text()
    assert "Add a loss in three steps" in page.locator(".sidebar-tree").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_has_a_broken_picture_or_is_wider_than_the_screen(page, site, url, width):
    page.set_viewport_size({"width": width, "height": 800})
    for path in sorted(site.rglob("*.html")):
        page.goto(url + path.relative_to(site).as_posix())
        broken = "imgs => imgs.filter(i => i.complete && i.naturalWidth == 0).map(i => i.src)"
        assert page.locator("img").evaluate_all(broken) == [], path.name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name


def test_the_menu_opens_on_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    link = page.locator(".sidebar-tree").get_by_role("link", name="Faster", exact=True)
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator("label.nav-overlay-icon").first.click()
    link.click()
    page.get_by_role("heading", level=1, name="Faster").wait_for()
