"The examples on the API pages run and print what they show; every public name has one."

import doctest
import re
from pathlib import Path

import fastai.learner
import pytest
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import defaults

import fasterai_kd
from fasterai_kd.losses._traits import REGISTRY

PAGES = sorted((Path(__file__).parents[1] / "nbs" / "api").glob("*.md"))
NAMES = [name for name in fasterai_kd.__all__ if name != "distill"]


def examples(path):
    "The code that is not shown as output, of all examples of a page in their order."
    blocks = re.findall(r"```pycon\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    return doctest.DocTestParser().get_doctest("\n".join(blocks), {}, path.name, str(path), 0)


@pytest.fixture
def quiet(monkeypatch):
    "Training prints no progress table."
    monkeypatch.setattr(defaults, "callbacks", [cb for cb in defaults.callbacks if cb is not ProgressCallback])
    monkeypatch.setattr(fastai.learner, "print", lambda *args, **kwargs: None, raising=False)


@pytest.mark.filterwarnings("ignore:More than 20 figures")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_an_api_page_print_what_it_shows(path, quiet):
    page, problems = examples(path), []
    assert len(page.examples) > 3
    failed, _ = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(page, out=problems.append)
    assert not failed, "".join(problems)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name):
    code = "".join(example.source for path in PAGES for example in examples(path).examples)
    assert re.search(rf"\b{name}\(|\({name},", code)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_loss_has_a_formula(name):
    page = next(path for path in PAGES if path.stem == "losses").read_text(encoding="utf-8")
    assert rf"$$\mathrm{{{name}}} = " in page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_examples_fit_into_a_page(path):
    assert [line for line in path.read_text().splitlines() if line.startswith((">>>", "...")) and len(line) > 92] == []
