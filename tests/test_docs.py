"The documentation site builds without a warning, has every public name, and works in a browser."

import contextlib
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
from fasterai_kd.losses._traits import REGISTRY

MODULES = ("sphinx", "myst_nb", "furo", "latex2mathml", "sphinx_copybutton", "playwright")
MISSING = [name for name in MODULES if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason='needs pip install -e ".[docs]"')
ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
CONTRAST = """
cells => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length == 3 || color[3] == 1) return color;
    }
    return [255, 255, 255];
  };
  return cells.filter(cell => cell.innerText.trim()).map(cell => {
    const [a, b] = [light(numbers(getComputedStyle(cell).color)), light(behind(cell))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}
"""


def build(nbs, out):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(nbs), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built from a copy, into a folder in it, as a contributor does."
    root = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "tests", ".github"):
        ignored = shutil.ignore_patterns("_build", "jupyter_execute", ".ipynb_checkpoints", "__pycache__", "models")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    out = root / "nbs" / "_build"
    built = build(root / "nbs", out)
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

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the browser has seen enough
            super().handle()


@pytest.fixture(scope="module")
def url(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def open_home(browser, url):
    "Opens the home page; whatever a page complains about, or asks of another host, fails the test."
    pages, complaints = [], []

    def open_page(width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else complaints.append(r.url))
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture
def page(open_home):
    return open_home()


def test_a_second_build_has_no_warning_either(site):
    (site.parent / "index.md").touch()
    built = build(site.parent, site)
    assert built.returncode == 0, built.stderr


def test_every_public_name_is_on_an_api_page(site):
    lines = zlib.decompress((site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]).decode().splitlines()
    documented = {line.split()[0] for line in lines if " py:" in line}
    assert {f"fasterai_kd.{name}" for name in fasterai_kd.__all__} - documented == set()
    assert "fastai.learner.Learner.distill" in documented


def test_every_notebook_and_page_is_in_the_menu(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    menu = {href.split("#")[0] for href in re.findall(r'toctree-l1.*?href="(.*?)"', home)}
    pages = {p.relative_to(NBS).with_suffix(".html").as_posix() for e in ("md", "ipynb") for p in NBS.rglob(f"*.{e}")}
    ignored = ("_build", "jupyter_execute")
    assert menu == {p for p in pages if not p.startswith(ignored) and ".ipynb_checkpoints" not in p} - {"index.html"}


def test_every_page_has_a_title_of_words_a_description_and_an_icon(site):
    menu = re.findall(r'toctree-l1.*?href="(.*?)[#"]', (site / "index.html").read_text(encoding="utf-8"))
    assert len(menu) > 25
    for path in ["index.html", *menu]:
        html = (site / path).read_text(encoding="utf-8")
        title = re.search(r"<title>(.*?)( - .*)?</title>", html)[1]
        assert not (re.search("[-_]", Path(path).stem) and Path(path).stem in title), path
        assert len(re.search(r'name="description" content="(.*?)"', html)[1]) > 20, path
        for tag in ("og:title", "og:description", "og:type"):
            assert f'property="{tag}"' in html
        assert re.search(r'<link rel="(shortcut )?icon" href="', html)


def test_code_on_pages_fits_their_width():
    for path in [ROOT / "README.md", *NBS.rglob("*.md")]:
        code = re.findall(r"```(?:python|diff|text)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        assert [line for block in code for line in block.splitlines() if len(line) > 88] == [], path


def test_every_loss_is_in_the_table_of_losses():
    rows = re.findall(r"^\| `(\w+)` \|", (NBS / "losses.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(REGISTRY)


def test_a_reader_finds_the_guide_a_loss_and_its_parameters(page, tmp_path):
    page.locator('.sidebar-tree a[href$="02_losses_guide.html"]').click()
    page.get_by_role("heading", level=1, name="losses").wait_for()
    assert page.locator("img").count() > 0

    page.get_by_placeholder("Search").fill("SoftTarget")
    page.get_by_placeholder("Search").press("Enter")
    page.locator("#search-results li a", has_text="fasterai_kd.SoftTarget").first.click()
    entry = page.locator("dl.function", has=page.locator(r"#fasterai_kd\.SoftTarget"))
    assert "teacher_pred (Tensor) – teacher logits, same shape" in entry.inner_text()
    assert "Hinton" in entry.inner_text()
    assert page.locator("math").count() > 10
    shot = page.screenshot(path=tmp_path / "api.png")
    assert shot.startswith(b"\x89PNG")


def test_the_home_page_shows_its_picture_and_the_change(page):
    width = page.locator("article img").first.evaluate("img => img.naturalWidth")
    assert width > 600
    assert (
        "kd = KnowledgeDistillationCallback(teacher, SoftTarget)" in page.locator(".highlight-diff").first.inner_text()
    )
    assert "Add a loss in three steps" in page.locator(".sidebar-tree").inner_text()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_can_be_read(open_home, site, url, width, scheme):
    "No broken picture, nothing wider than the screen, no cut code on a wide one, tables and diffs in contrast."
    page = open_home(width, scheme)
    for path in sorted(site.rglob("*.html")):
        page.goto(url + path.relative_to(site).as_posix())
        broken = "imgs => imgs.filter(i => i.complete && i.naturalWidth == 0).map(i => i.src)"
        assert page.locator("img").evaluate_all(broken) == [], path.name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        cut = "pres => pres.filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.innerText.slice(0, 80))"
        assert width < 1280 or page.locator("article pre").evaluate_all(cut) == [], path.name
        contrasts = page.locator("article :is(th, td), .highlight-diff :is(.gi, .gd)").evaluate_all(CONTRAST)
        assert min(contrasts, default=21) >= 4.5, path.name


@pytest.mark.parametrize("word", ["unlabeled", "ONNX"])
def test_search_finds(page, word):
    page.get_by_placeholder("Search").fill(word)
    page.get_by_placeholder("Search").press("Enter")
    page.locator("#search-results li a").first.wait_for()


def test_added_lines_of_a_diff_have_a_color_in_both_modes(open_home):
    for scheme in SCHEMES:
        page = open_home(scheme=scheme)
        color = "element => getComputedStyle(element).color"
        colors = [page.locator(f".highlight-diff {part}").first.evaluate(color) for part in (".gi", ".gd", "pre")]
        assert len(set(colors)) == 3, scheme


def test_code_has_a_button_to_copy_it(page):
    page.locator(".highlight-python").first.hover()
    page.locator(".highlight-python button.copybtn").first.wait_for(state="visible")


def test_the_menu_opens_on_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    link = page.locator('.sidebar-tree a[href$="06_faster.html"]')
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator("label.nav-overlay-icon").first.click()
    link.click()
    page.wait_for_url("**/06_faster.html")
