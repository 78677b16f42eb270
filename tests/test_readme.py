"The README's commands, links and code are true."

import re
from pathlib import Path

from torchvision.models import resnet18

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def after(diff):
    "The code that a diff leaves."
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))


def test_the_two_commands_are_those_that_ci_runs():
    commands, ci = "\n".join(blocks("bash")), (ROOT / ".ci" / "run").read_text()
    assert "pip install . && python examples/quickstart.py" in commands
    for tests in (commands, ci):
        assert 'pip install -e ".[dev]" && pytest' in tests


def test_every_relative_link_leads_somewhere():
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert len(links) > 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_code_runs_in_the_order_of_the_page(make_learner, dls, teacher):
    diff, *rest = blocks("diff") + blocks("python")
    assert len(rest) == 6
    small = {
        "10, 1e-3": "1, 1e-3",
        "num_classes=2": "num_classes=4",
        "224": "16",
        "Learner(dls": "learner(dls",
        'get_image_files("photos")': "list(range(8))",
    }
    space = {"dls": dls, "teacher": make_learner(resnet18(num_classes=4))}
    space["learner"] = lambda dls, model, metrics: make_learner(model, metrics=metrics)
    for code in (after(diff), *rest):
        for old, new in small.items():
            code = code.replace(old, new)
        space["student"] = make_learner(resnet18(num_classes=4))
        exec(code, space)
        space["student"].fit(1, 1e-3, cbs=space["kd"])
        assert len(space["kd"].history["kd_loss"]) == 4


def test_the_printed_pairs_are_what_the_code_prints():
    import torch
    from fastai.vision.learner import create_body, create_head
    from torch import nn
    from torchvision.models import resnet34

    from fasterai_kd import match_feature_layers

    teacher = nn.Sequential(create_body(resnet34(), pretrained=False, cut=-2), create_head(512, 2))
    pairs = match_feature_layers(resnet18(num_classes=2), teacher, torch.randn(1, 3, 224, 224))
    assert str(pairs) == blocks("text")[0].strip()
