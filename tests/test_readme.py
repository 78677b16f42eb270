"The commands, links and code of the README and of the pages beside it are true."

import re
import runpy
import shutil
from pathlib import Path

import pytest
from torchvision.models import resnet18

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = r"\]\((?!http|#)([^)#]+)"
SMALL = {
    "10, 1e-3": "1, 1e-3",
    "teacher, 10": "teacher, 1",
    "num_classes=2": "num_classes=4",
    "224": "16",
    "Learner(dls": "learner(dls",
    'get_image_files("photos")': "list(range(8))",
}


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def page(name):
    return (ROOT / "nbs" / f"{name}.md").read_text(encoding="utf-8")


def after(diff):
    "The code that a diff leaves."
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))


def test_the_two_commands_are_those_that_ci_runs():
    commands, ci = "\n".join(blocks("bash")), (ROOT / ".ci" / "run").read_text()
    assert "pip install . && python examples/quickstart.py\n" in commands
    assert 'pip install -e ".[dev]" && pytest -n auto\n' in commands
    assert 'pip install -e ".[dev]" && pytest -n auto ' in ci


def test_every_relative_link_leads_somewhere():
    links = re.findall(LINK, README)
    assert len(links) > 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_can_be_read_in_five_minutes():
    prose = re.sub(r"```.*?```|^\|.*?$|<!--.*?-->", "", README, flags=re.S | re.M)
    assert len(prose.split()) < 1000


@pytest.fixture
def space(make_learner, dls):
    "What the code of a page may take for granted."
    names = {"dls": dls, **{who: make_learner(resnet18(num_classes=4)) for who in ("teacher", "student")}}
    names["learner"] = lambda dls, model, metrics: make_learner(model, metrics=metrics)
    exec("from fastai.vision.all import *\nfrom fasterai_kd.all import *", names)
    return names


CODE = {
    "README, the change": [after(blocks("diff")[0])],
    "README, the cache": [blocks("python")[-1]],
    "losses": blocks("python", page("losses")),
    "unlabeled": blocks("python", page("unlabeled")),
}


@pytest.mark.parametrize("codes", CODE.values(), ids=CODE)
def test_the_code_runs_in_the_order_of_the_page(codes, space, make_learner):
    for code in codes:
        for old, new in SMALL.items():
            code = code.replace(old, new)
        exec(code, space)
        student = make_learner(resnet18(num_classes=4))
        if "kd" in space:
            student.fit(1, 1e-3, cbs=space["kd"])
            assert len(space["kd"].history["kd_loss"]) == 4


def test_one_call_distills(space):
    code = blocks("python")[0]
    for old, new in SMALL.items():
        code = code.replace(old, new)
    exec(code, space)
    assert "kd_loss" not in [str(metric) for metric in space["student"].metrics]


def test_a_student_of_ones_own_photos_is_exported_and_predicts(tmp_path, monkeypatch):
    "The README's lines on a folder of generated photos, without pretrained weights."
    from PIL import Image

    for folder in ("photos/cat", "photos/dog", "more_photos"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(10):
            Image.effect_noise((24, 24), 50 + i).convert("RGB").save(tmp_path / folder / f"{i}.png")
    code = blocks("python")[1]
    small = {"Resize(224)": "Resize(32), bs=4, num_workers=0", "resnet50,": "resnet18,", "fine_tune(5)": "fine_tune(1)"}
    small |= {"metrics=accuracy": "metrics=accuracy, pretrained=False", "10, freeze": "1, freeze"}
    for old, new in small.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    assert (tmp_path / "photos" / "student.pkl").stat().st_size < 60e6


def test_the_printed_pairs_are_what_the_code_prints():
    import torch
    from fastai.vision.learner import create_body, create_head
    from torch import nn
    from torchvision.models import resnet34

    from fasterai_kd import match_feature_layers

    teacher = nn.Sequential(create_body(resnet34(), pretrained=False, cut=-2), create_head(512, 2))
    pairs = match_feature_layers(resnet18(num_classes=2), teacher, torch.randn(1, 3, 224, 224))
    assert str(pairs) == blocks("text", page("losses"))[0].strip()


def test_for_pypi_every_link_is_absolute_and_the_repository_named(tmp_path):
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    script = runpy.run_path(str(ROOT / ".ci" / "for_pypi.py"))
    script["main"]("https://example.org/a/b", "v1", tmp_path)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert re.findall(LINK, readme) == []
    assert "](https://example.org/a/b/raw/v1/nbs/images/payoff.png)" in readme
    assert "](https://example.org/a/b/blob/v1/nbs/losses.md)" in readme
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == "https://example.org/a/b"
