"Copies of a teacher that run sooner give the same outputs and features, and leave the teacher alone."

import gc
import weakref

import pytest
import timm
import torch
from conftest import Net, hooks, same, state
from fastai.vision.learner import create_vision_model
from torch import nn
from torchvision.models import resnet18

from fasterai_kd._measure import difference, full_precision, is_faster, size_of
from fasterai_kd.capture import FeatureCapture
from fasterai_kd.fast import (
    compile_with_features,
    fast_copy,
    fold_batchnorm,
    has_hooks,
    private_copy,
    use_channels_last,
    why_no_copy,
)

MAPS = (3, 3, 8, 8)


def trained(model):
    "In evaluation mode, with BatchNorms that do something."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.running_mean, m.weight, m.bias):
                if t is not None:
                    t.data.normal_()
            if m.running_var is not None:
                m.running_var.uniform_(0.5, 2)
    return model.eval()


@torch.no_grad()
def seen(model, x, layers=()):
    "The output and the features."
    with FeatureCapture(layers, "teacher").start(model) as capture:
        return {"output": model(x)} | capture.take()


def assert_alike(a, b):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


# --- what is folded ---


FOLDED = {
    "conv without bias": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], MAPS),
    "grouped, strided, dilated": (lambda: [nn.Conv2d(3, 6, 3, 2, 1, 2, groups=3), nn.BatchNorm2d(6)], MAPS),
    "reflected borders": (lambda: [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)], MAPS),
    "without weights": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)], MAPS),
    "Conv1d": (lambda: [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (3, 3, 8)),
    "Conv3d": (lambda: [nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)], (3, 3, 4, 4, 4)),
    "Linear": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4)], (3, 5)),
    "Linear without bias": (lambda: [nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)], (3, 5)),
    "frozen": (lambda: [nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4)], MAPS),
}


@pytest.mark.parametrize(("layers", "shape"), FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batchnorm_after_a_conv_or_linear_is_folded_and_its_name_still_gives_its_output(layers, shape, dtype, device):
    model, x = trained(nn.Sequential(*layers(), nn.ReLU(inplace=True))).to(device, dtype), torch.randn(shape)
    x = x.to(device, dtype)
    fast, folded = fast_copy(model, ["1"])
    assert folded == 1
    assert type(fast[1]) is nn.Identity
    with full_precision():
        assert_alike(seen(model, x, ["1"]), seen(fast, x, ["1"]))


class Forward(nn.Module):
    "A conv, a BatchNorm and a forward pass of one's own."

    def __init__(self, forward, **modules):
        super().__init__()
        self.conv, self.bn, self.f = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.f(self, x)


def two_outputs(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def aliased(which):
    model = Forward(lambda m, x: m.bn(m.conv(x)))
    model.again = nn.Sequential(getattr(model, which))
    return model


NOT_FOLDED = {
    "a conv that runs twice": lambda: Forward(lambda m, x: m.bn(m.conv(m.conv(x)))),
    "a BatchNorm that runs twice": lambda: Forward(lambda m, x: m.bn(m.bn(m.conv(x)))),
    "a pair that runs twice": lambda: Forward(lambda m, x: m.bn(m.conv(m.bn(m.conv(x))))),
    "a conv with another user of its output": lambda: Forward(two_outputs),
    "a conv whose output is part of the output": lambda: Forward(
        lambda m, x: (lambda y: torch.stack((m.bn(y), y)))(m.conv(x))
    ),
    "something in between": lambda: Forward(lambda m, x: m.bn(m.conv(x).relu())),
    "a BatchNorm before the conv": lambda: Forward(lambda m, x: m.conv(m.bn(x))),
    "a conv with two names": lambda: aliased("conv"),
    "a BatchNorm with two names": lambda: aliased("bn"),
    "no running statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "a transposed conv": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    "a subclass": lambda: nn.Sequential(type("Own", (nn.Conv2d,), {})(3, 4, 3), nn.BatchNorm2d(4)),
    "GroupNorm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    "a BatchNorm over another dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 5), nn.BatchNorm1d(3), nn.Flatten()
    ),
}


@pytest.mark.parametrize("make", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_what_cannot_be_folded_stays(make):
    model, x = trained(make()), torch.randn(MAPS)
    fast, folded = fast_copy(model, [])
    assert folded == 0
    assert torch.equal(fast(x), model(x))


def test_one_pair_that_cannot_be_folded_does_not_keep_another_from_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(2), nn.Linear(64, 5), nn.BatchNorm1d(3))
    fast, folded = fast_copy(trained(model), [])
    x = torch.randn(MAPS)
    assert folded == 1
    assert_alike(seen(model, x), seen(fast, x))


class Stages(nn.Module):
    "`stem` ends with a conv whose BatchNorm is outside of it; `block` holds both."

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.bn10 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.bn10(self.block(self.bn(self.stem(x)).relu_())).mean((2, 3))


@pytest.mark.parametrize(
    ("layers", "folded"),
    [
        ([], 3),
        (["stem"], 2),
        (["stem.0"], 2),
        (["bn"], 3),
        (["block"], 3),
        (["block.0"], 2),
        (["block.1", "block.2"], 3),
        (["bn10", "bn10.1", "bn10"], 3),
        (["stem", "block.0", "bn10.0"], 0),
    ],
)
def test_features_are_those_that_the_named_layers_give_whatever_is_folded(layers, folded):
    model, x = trained(Stages()), torch.randn(MAPS)
    fast, n = fast_copy(model, layers)
    assert n == folded
    assert_alike(seen(model, x, layers), seen(fast, x, layers))


MODELS = {
    "torchvision": (lambda: resnet18(num_classes=4), 20, ["conv1", "layer1", "layer2.0.bn1"]),
    "fastai": (lambda: create_vision_model(resnet18, 4, pretrained=False), 20, ["0.4", "1.2"]),
    "timm": (lambda: timm.create_model("resnet10t", num_classes=4), 14, ["layer1", "layer2.0.bn2"]),
    "timm, own BatchNorms": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=4), 0, ["blocks.1"]),
}


@pytest.mark.parametrize(("make", "folded", "layers"), MODELS.values(), ids=MODELS)
def test_known_architectures_give_the_same_outputs_and_features(make, folded, layers):
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    fast, n = fast_copy(model, layers)
    assert n == folded - ("conv1" in layers)
    assert_alike(seen(model, x, layers), seen(fast, x, layers))


def test_layers_inside_dataparallel_keep_their_names():
    import fastai.distributed  # noqa: F401  # gives DataParallel a method `reset`, as recurrent models have

    model, x = nn.DataParallel(trained(Net())), torch.randn(2, 3, 16, 16)
    fast, folded = fast_copy(model, ["conv1", "layer1"])
    assert folded == 1
    assert_alike(seen(model, x, ["conv1", "layer1"]), seen(fast, x, ["conv1", "layer1"]))


# --- what is not copied ---


def test_a_model_that_keeps_what_it_is_traced_with_still_runs():
    class Lazy(Net):
        grid = None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.ones_like(x)
            return super().forward(x + self.grid)

    model, x = trained(Lazy()), torch.randn(2, 3, 16, 16)
    fast, folded = fast_copy(model, [])
    assert folded == 2
    assert_alike(seen(model, x), seen(fast, x))


class Branches(Net):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Locked(Net):
    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


class Recurrent(Net):
    def reset(self):
        pass


def with_hook(add):
    model = Net()
    getattr(model.layer1[0], add)(lambda *a: None)
    return model


def replaced():
    model = Net()
    own = model.forward
    model.forward = lambda x: own(x) * 2
    return model


PLAIN = {
    "untraceable": Branches,
    "not to be copied": Locked,
    "recurrent": Recurrent,
    "a hook": lambda: with_hook("register_forward_hook"),
    "a pre-hook": lambda: with_hook("register_forward_pre_hook"),
    "compiled": lambda: torch.compile(Net(), backend="eager"),
    "compiled in parts": lambda: (lambda m: (m.layer1.compile(backend="eager"), m)[1])(Net()),
    "half precision": lambda: Net().half(),
    "bfloat16": lambda: Net().bfloat16(),
    "another forward": replaced,
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_a_model_that_no_copy_can_stand_in_for_gets_none(make):
    assert fast_copy(make().eval(), []) == (None, 0)


def test_the_reasons_are_said():
    assert why_no_copy(Net()) == ""
    assert "state" in why_no_copy(Recurrent())
    assert "hooks" in why_no_copy(with_hook("register_forward_hook"))
    assert "compiled" in why_no_copy(torch.compile(Net(), backend="eager"))
    assert "forward" in why_no_copy(replaced())
    assert has_hooks(with_hook("register_forward_pre_hook"))
    assert not has_hooks(Net())


# --- the original ---


def anatomy(model):
    "All that must not change, beside the values."
    tensors = [*model.parameters(), *model.buffers()]
    return (
        [(id(t), t.data_ptr(), t._version, t.requires_grad, t.stride(), t.grad) for t in tensors],
        [(name, id(m), m.training) for name, m in model.named_modules()],
        hooks(model),
    )


def test_the_original_is_unchanged_bit_for_bit_and_tensors_are_shared():
    model = trained(Net()).train()
    model.conv1.requires_grad_(False)
    model.bn1.eval()
    model.layer2[0].weight.data = model.layer2[0].weight.data.contiguous(memory_format=torch.channels_last)
    before, weights = anatomy(model), state(model)
    fast, _ = fast_copy(model, ["layer1"])
    use_channels_last(fast)
    compile_with_features(private_copy(model), ["layer1"], True, backend="eager")(torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        fast.train()(torch.randn(2, 3, 16, 16))
    assert anatomy(model) == before
    assert same(state(model), weights)
    assert fast.head.weight is model.head.weight
    assert fast.conv1.weight is not model.conv1.weight


def test_a_private_copy_shares_every_tensor_and_is_in_evaluation_mode():
    model = Net().train()
    copied = private_copy(model)
    assert [id(t) for t in copied.state_dict(keep_vars=True).values()] == [
        id(t) for t in model.state_dict(keep_vars=True).values()
    ]
    assert not any(m.training for m in copied.modules())
    assert model.training
    assert size_of(copied, besides=model) == 0


def test_copying_draws_no_random_numbers():
    model, before = Net(), torch.get_rng_state()
    fast, _ = fast_copy(model, [])
    use_channels_last(fast)
    assert torch.equal(torch.get_rng_state(), before)


def test_folding_in_place_says_how_many():
    model = trained(Net())
    x = torch.randn(2, 3, 16, 16)
    expected = seen(model, x)
    assert fold_batchnorm(model, []) == 2
    assert_alike(seen(model, x), expected)
    assert fold_batchnorm(model, []) == 0


# --- memory format ---


def test_channels_last_gives_each_conv_weights_of_its_own():
    model, x = trained(Net()), torch.randn(2, 3, 16, 16)
    other = private_copy(model)
    assert use_channels_last(other)
    assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.conv1.weight.is_contiguous()
    assert other.bn1.weight is model.bn1.weight
    assert_alike(seen(model, x, ["layer1"]), seen(other, x.contiguous(memory_format=torch.channels_last), ["layer1"]))


def test_a_model_without_2d_convs_has_no_memory_format():
    assert not use_channels_last(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(2, 2)))


# --- compiled ---


class Twice(Net):
    def forward(self, x):
        return super().forward(self.conv1(x)[:, :3])


REPEATED = ["relu", "conv1", "bn1", "layer1", "layer1.0", "conv1"]


@pytest.mark.parametrize(
    ("make", "layers", "reads_output"),
    [
        (Net, REPEATED, True),
        (Net, REPEATED, False),
        (Net, ["head"], True),
        (Twice, REPEATED, True),
        (lambda: nn.DataParallel(Net()), REPEATED, True),
    ],
    ids=["all", "features only", "the last layer", "a layer runs twice", "DataParallel"],
)
def test_compiled_gives_the_features_as_the_layers_returned_them(make, layers, reads_output):
    torch.compiler.reset()
    model, x = trained(make()), torch.randn(2, 3, 16, 16)
    layers_once = list(dict.fromkeys(layers))
    expected = seen(model, x, layers_once)
    with torch.no_grad():
        output, features = compile_with_features(private_copy(model), layers, reads_output, backend="aot_eager")(x)
    assert_alike(
        expected,
        {"output": output if reads_output else expected["output"]} | {name: features[name] for name in layers_once},
    )
    assert (output is None) == (not reads_output)


def test_compiled_without_layers_gives_the_output_whatever_its_structure():
    model = Forward(lambda m, x: (m.conv(x), {"bn": m.bn(x)})).eval()
    x = torch.randn(MAPS)
    with torch.no_grad():
        a, b = compile_with_features(private_copy(model), [], True, backend="eager")(x)
        assert torch.equal(a, model.conv(x))
        assert torch.equal(b["bn"], model.bn(x))


def test_compiled_keeps_no_features():
    run = compile_with_features(private_copy(Net()), ["layer1"], True, backend="eager")
    with torch.no_grad():
        kept = [weakref.ref(t) for t in run(torch.randn(2, 3, 16, 16))[1].values()]
    gc.collect()
    assert [r() for r in kept] == [None]


def test_each_model_is_compiled_however_many_there_are_in_a_session():
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    with torch.no_grad():
        for _ in range(10):
            compile_with_features(private_copy(nn.Linear(2, 2)), [""], True, backend=backend)(torch.randn(2, 2))
    assert len(compiled) == 10  # torch compiles one code object 8 times


# --- measures ---


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0, 4.0], [2.0, 4.0], 0.25),
        ([0.0, 0.1], [0.0, 0.2], 0.1),
        ([1.0], [1.0, 1.0], float("inf")),
        ([1.0], [float("nan")], float("inf")),
        ([float("nan")], [1.0], float("inf")),
        ([], [], 0),
    ],
)
def test_the_difference_is_a_share_of_the_largest_value(a, b, expected):
    assert difference(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_the_difference_of_small_values_is_a_share_of_the_floor_if_there_is_one():
    a, b = torch.tensor([0.001]), torch.tensor([0.002])
    assert difference(a, b) == pytest.approx(0.001)
    assert difference(a, b, floor=1e-12) == pytest.approx(1)


def test_is_faster_counts_the_clock_and_warms_both_up(monkeypatch):
    clock, calls = [0.0], []

    def work(name, seconds):
        def f():
            calls.append(name)
            clock[0] += 100 if len(calls) <= 2 else seconds

        return f

    monkeypatch.setattr("fasterai_kd._measure._now", lambda device: clock[0])
    assert is_faster(work("a", 1.0), work("b", 2.0), None)
    assert calls == ["a", "b"] * 4
    calls.clear()
    assert not is_faster(work("a", 1.0), work("b", 1.0), None)
    assert not is_faster(work("a", 0.98), work("b", 1.0), None)


def test_full_precision_puts_the_users_settings_back_also_after_an_exception():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before[1:]


def test_size_counts_each_tensor_once_and_none_that_is_shared():
    model = Net()
    other = private_copy(model)
    use_channels_last(other)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    changed = [c for c in convs if not c.weight.is_contiguous(memory_format=torch.channels_last)]
    assert size_of(other, besides=model) == sum(c.weight.nbytes for c in changed) > 0
    twin = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    twin[1].weight = twin[0].weight
    assert size_of(twin, besides=model) == 36
