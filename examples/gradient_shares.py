"""How much of the gradient comes from the distillation loss: at weight 0.9, and at the published weights.

A ResNet-18 and a ResNet-34 with random weights, batches of 32 generated images of 64 px, 100 classes. For each loss the
norms of the gradients of the task loss and of the distillation loss are taken at the last convolution below the last
layer that it compares. Takes half a minute on a CPU core; the table is in nbs/weights.md.
"""

import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script`")  # raised by fastai's import under a new torch

from fastai.vision.all import *  # noqa: E402

from fasterai_kd.all import *  # noqa: E402

CLASSES, SIZE, BATCH = 100, 64, 32
STAGES = ["layer1", "layer2", "layer3", "layer4"]
LAYERS = {"SoftTarget": [], "DecoupledKD": [], "Attention": STAGES, "Similarity": ["layer4"], "FitNet": ["layer2"]}
PUBLISHED = {  # for CIFAR-100: the loss, its weight, the weight of the task loss
    "SoftTarget": (partial(SoftTarget, T=4), 0.9, 0.1),
    "DecoupledKD": (DecoupledKD, 1.0, 1.0),
    "Attention": (Attention, 1000.0, 1.0),
    "Similarity": (Similarity, 3000.0, 1.0),
    "FitNet": (FitNet, 100.0, 1.0),
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    "Smooth patterns of a color each, and labels."
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(BATCH, 3, 8, 8, generator=g), size=SIZE, mode="bicubic")
    return x, torch.randint(CLASSES, (BATCH,), generator=g)


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    kept = {}
    hooks = [
        getattr(model, name).register_forward_hook(lambda m, i, o, name=name: kept.update({name: o})) for name in STAGES
    ]
    pred = model(x)
    for h in hooks:
        h.remove()
    return pred, kept


def norms(name: str, student: nn.Module, teacher: nn.Module, seed: int) -> tuple[float, float]:
    "Of the gradients of the task loss and of the distillation loss."
    x, y = batch(seed)
    layers = LAYERS[name]
    (pred, fm_s), (teacher_pred, fm_t) = features(student, x), features(teacher, x)
    fm_s, fm_t = ({n: fm[n] for n in layers} for fm in (fm_s, fm_t))
    kd = PUBLISHED[name][0](pred=pred, teacher_pred=teacher_pred.detach(), fm_s=fm_s, fm_t=fm_t, target=y)
    weights = getattr(student, (layers or STAGES)[-1])[-1].conv2.weight
    grads = [torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in (F.cross_entropy(pred, y), kd)]
    return tuple(g.norm().item() for g in grads)


def main() -> None:
    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=CLASSES), resnet34(num_classes=CLASSES)
    with torch.no_grad():
        for seed in range(100, 120):  # BatchNorm's statistics
            teacher(batch(seed)[0])
    teacher.eval()
    print("| loss | share at weight 0.9 | share at the published weight |\n|---|---|---|")
    for name in LAYERS:
        task, kd = (sum(x) for x in zip(*(norms(name, student, teacher, s) for s in range(5)), strict=True))
        _, weight, task_weight = PUBLISHED[name]
        shares = [w * kd / (w * kd + t * task) for w, t in ((0.9, 0.1), (weight, task_weight))]
        print(f"| `{name}` | {shares[0]:.1%} | {shares[1]:.1%} |")


if __name__ == "__main__":
    main()
