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
TOKENS = {"swin_t", "vit_b_16", "vit_tiny_patch16_224", "mixer_s32_224"}  # pair by depth, or have channels last
TRANSFORMERS = {  # names of models of timm, or functions of `transformers`; with images of 64x64
    "vit_small_patch8": lambda: timm("vit_small_patch8_224", img_size=64, depth=6),
    "vit with registers": lambda: timm("vit_small_patch14_reg4_dinov2", img_size=70, patch_size=14, depth=6),
    "deit, distilled": lambda: timm("deit_tiny_distilled_patch16_224", img_size=64, depth=6),
    "beit": lambda: timm("beit_base_patch16_224", img_size=64, depth=4, embed_dim=48, num_heads=4),
    "swin": lambda: timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
    "swin v2": lambda: timm("swinv2_tiny_window8_256", img_size=64, window_size=2),
    "convnext": lambda: timm("convnext_tiny"),
    "efficientformer": lambda: timm("efficientformer_l1"),
    "mobilevitv2": lambda: timm("mobilevitv2_050"),
    "torchvision vit": lambda: models.VisionTransformer(64, 8, 6, 4, 32, 64),
    "torchvision swin_v2": lambda: models.swin_v2_t(),
    "transformers ViT": lambda: transformers("ViTForImageClassification", "ViTConfig"),
    "transformers DeiT": lambda: transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "transformers Dinov2": lambda: transformers("Dinov2Model", "Dinov2Config"),
    "transformers Dinov2 with registers": lambda: transformers(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4
    ),
    "transformers Swin": lambda: transformers("SwinForImageClassification", "SwinConfig", SWIN),
    "transformers ConvNext": lambda: transformers(
        "ConvNextForImageClassification", "ConvNextConfig", {"depths": [1] * 4}
    ),
    "transformers MobileViT": lambda: transformers("MobileViTForImageClassification", "MobileViTConfig", {}),
}
OTHER_SIZES = {"vit with registers": (70, 70), "efficientformer": (224, 224)}
SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 64, "patch_size": 8}
SWIN = {"image_size": 64, "depths": [1, 1, 2, 1], "window_size": 2}
SIZES = [(64, 64), (64, 96), (224, 224)]
SNAPSHOT = Path(__file__).parent / "snapshots" / "matching.txt"


def timm(name, **kwargs):
    return pytest.importorskip("timm").create_model(name, pretrained=False, **kwargs)


def transformers(model, config, kwargs=SMALL, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        package = pytest.importorskip("transformers")
        return getattr(package, model)(getattr(package, config)(**kwargs, **more))


def make(arch):
    if arch in TRANSFORMERS:
        return TRANSFORMERS[arch]()
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


@pytest.mark.works("tasks", "match_feature_layers in 18 transformers of timm, torchvision and transformers")
@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_pairs_with_transformers_are_those_of_the_snapshot_and_never_the_patch_embedding(resnet18, arch):
    size = OTHER_SIZES.get(arch, (64, 64))
    result = pairs_of(resnet18, make(arch), size)
    assert lines(arch, size, result) in SNAPSHOT.read_text()
    assert not any("embed" in name for name in result["teacher"]) or "ConvNext" in arch


@pytest.mark.works("tasks", "match_feature_layers in 27 architectures of torchvision and timm, square and not")
@pytest.mark.parametrize("arch", TORCHVISION + TIMM)
def test_pairs_are_those_of_the_snapshot_and_have_one_resolution(resnet18, arch):
    teacher, snapshot = make(arch), SNAPSHOT.read_text()
    for size in SIZES:
        result = pairs_of(resnet18, teacher, size)
        assert lines(arch, size, result) in snapshot
        if isinstance(result, Exception) or arch in TOKENS:
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
    for arch in TRANSFORMERS:
        size = OTHER_SIZES.get(arch, (64, 64))
        print(lines(arch, size, pairs_of(student, make(arch), size)), end="")
