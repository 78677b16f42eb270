"""What `match_feature_layers` pairs in many architectures with a ResNet-18, at square and other sizes.

After a deliberate change: `python tests/test_matching_architectures.py > tests/snapshots/matching.txt`.
"""

import warnings
from pathlib import Path

import pytest
import torch
from torchvision import models

from fasterai_kd import match_feature_layers
from fasterai_kd.features.hooks import FeatureHooks

TORCHVISION = [
    "resnet34", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x1_0",
    "squeezenet1_1", "mnasnet0_5", "alexnet", "convnext_tiny", "swin_t", "vit_b_16",
]  # fmt: skip
TIMM = [
    "resnet10t", "repvgg_a0", "ghostnet_100", "efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto",
    "edgenext_xx_small", "mobilevit_xxs", "vit_tiny_patch16_224", "mixer_s32_224",
]  # fmt: skip
SIZES = [(64, 64), (64, 96), (224, 224)]
SNAPSHOT = Path(__file__).parent / "snapshots" / "matching.txt"


def make(arch):
    if arch in TORCHVISION:
        return getattr(models, arch)()
    return pytest.importorskip("timm").create_model(arch, pretrained=False)


def pairs_of(student, teacher, size):
    try:
        return match_feature_layers(student, teacher, torch.randn(1, 3, *size))
    except (ValueError, AssertionError, RuntimeError) as e:
        return e


def lines(arch, size, result):
    "What stands in the snapshot: the pairs, or the error's first words."
    head = f"resnet18 <- {arch} at {size[0]}x{size[1]}"
    if isinstance(result, Exception):
        return f"{head}: {type(result).__name__}: {str(result).split(':')[0].split(' (')[0][:70]}\n"
    return f"{head}\n" + "".join(f"  {s} <-> {t}\n" for s, t in zip(*result.values(), strict=True))


def maps(model, names, size):
    "The shapes of what the layers give."
    hooks = FeatureHooks(names, "model")
    with hooks.on(model.eval()), torch.no_grad():
        model(torch.randn(1, 3, *size))
    return [fm.shape for fm in hooks.pop().values()]


@pytest.fixture(scope="module")
def resnet18():
    return models.resnet18()


@pytest.mark.works("tasks", "match_feature_layers in 27 architectures of torchvision and timm, square and not")
@pytest.mark.parametrize("arch", TORCHVISION + TIMM)
def test_pairs_are_those_of_the_snapshot_and_have_one_resolution(resnet18, arch):
    teacher, snapshot = make(arch), SNAPSHOT.read_text()
    for size in SIZES:
        result = pairs_of(resnet18, teacher, size)
        assert lines(arch, size, result) in snapshot
        if isinstance(result, Exception):
            continue
        shapes = [maps(m, names, size) for m, names in zip((resnet18, teacher), result.values(), strict=True)]
        assert [s[2:] for s in shapes[0]] == [t[2:] for t in shapes[1]]
        areas = [s[2] * s[3] for s in shapes[0]]
        assert areas == sorted(areas, reverse=True)
        assert min(areas) > 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    student = models.resnet18()
    for arch in TORCHVISION + TIMM:
        teacher = make(arch)
        for size in SIZES:
            print(lines(arch, size, pairs_of(student, teacher, size)), end="")
