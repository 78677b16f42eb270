"FeatureCapture gives the features of the named layers as the layers returned them, and leaves nothing behind."

import gc
import weakref

import pytest
import torch
from conftest import Net, hooks
from torch import nn

from fasterai_kd.capture import FeatureCapture


def features(model, names, x, whose="student"):
    with FeatureCapture(names, whose).start(model) as capture:
        model(x)
        return capture.take()


def test_features_come_in_the_order_given_not_in_the_order_of_execution():
    fm = features(Net(), ["layer2", "conv1", "layer1"], torch.randn(2, 3, 16, 16))
    assert list(fm) == ["layer2", "conv1", "layer1"]
    assert [f.shape[-1] for f in fm.values()] == [4, 16, 8]


def test_a_layer_may_come_twice():
    fm = features(Net(), ["conv1", "layer1", "conv1", "conv1"], torch.randn(2, 3, 16, 16))
    assert list(fm) == ["conv1", "layer1", "conv1#2", "conv1#3"]
    assert torch.equal(fm["conv1"], fm["conv1#3"])


@pytest.mark.parametrize("training", [True, False])
def test_features_overwritten_in_place_later_are_kept_as_the_layer_returned_them(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train(training)
    capture = FeatureCapture(["1"], "student")
    for _ in range(3):  # the first forward finds out, the later ones know
        x = torch.randn(2, 3, 8, 8)
        expected = model[1](model[0](x))
        capture.start(model)
        model(x)
        assert torch.equal(capture.take()["1"], expected)
        assert (expected < 0).any()


def test_only_what_is_overwritten_is_cloned_after_the_first_forward():
    model, seen = Net(), {}
    capture = FeatureCapture(["bn1", "layer1"], "student")
    for name in capture.names:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    for _ in range(2):
        capture.start(model)
        model(torch.randn(2, 3, 16, 16))
        fm = capture.take()
    assert fm["layer1"] is seen["layer1"]
    assert fm["bn1"] is not seen["bn1"]


def test_overwriting_that_starts_later_is_an_error_not_a_wrong_feature():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.overwrite = nn.Conv2d(3, 4, 1), False

        def forward(self, x):
            x = self.conv(x)
            return x.relu_() if self.overwrite else x.relu()

    model, capture = Moody(), FeatureCapture(["conv"], "student")
    capture.start(model)
    model(torch.randn(1, 3, 4, 4))
    capture.take()
    model.overwrite = True
    capture.start(model)
    model(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="'conv' of the student was overwritten"):
        capture.take()


def test_a_layer_overwritten_in_one_mode_only_is_right_in_both():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5, inplace=True))
    capture = FeatureCapture(["0"], "student")
    for training in (False, True, False, True):
        model.train(training)
        x = torch.randn(2, 3, 8, 8)
        capture.start(model)
        model(x)
        assert torch.equal(capture.take()["0"], model[0](x))


def test_a_layer_called_several_times_counts_with_its_last_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    model, x = Twice(), torch.randn(1, 3, 4, 4)
    assert torch.equal(features(model, ["conv"], x)["conv"], model(x))


def test_the_gradient_of_a_feature_reaches_the_model():
    model = Net()
    features(model, ["conv1"], torch.randn(2, 3, 16, 16))["conv1"].pow(2).sum().backward()
    assert model.conv1.weight.grad is not None
    assert model.head.weight.grad is None


@pytest.mark.parametrize("wrap", [lambda t: (t,), lambda t: [t, "x"], lambda t: {"map": t}, lambda t: (t, (t, t))])
def test_a_single_tensor_inside_a_tuple_list_or_dict_is_found(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()
            self.inner.register_forward_hook(lambda m, i, o: wrap(o))

        def forward(self, x):
            self.inner(x)

    x = torch.randn(1, 3)
    assert torch.equal(features(Wrapped(), ["inner"], x)["inner"], x)


def test_an_output_of_several_tensors_is_an_error_that_names_the_layer():
    model = nn.Sequential(nn.MultiheadAttention(4, 1))
    with FeatureCapture(["0"], "teacher").start(model), pytest.raises(TypeError, match=r"'0' of the teacher .* tuple"):
        model[0](*[torch.randn(2, 1, 4)] * 3)


def test_half_precision_and_tensor_subclasses_become_plain_float32():
    from fastai.vision.core import TensorImage

    fm = features(nn.Sequential(nn.Identity()), ["0"], TensorImage(torch.randn(1, 3, 4, 4)).half())["0"]
    assert type(fm) is torch.Tensor
    assert fm.dtype == torch.float32


def test_an_unknown_layer_is_an_error_with_near_matches():
    with pytest.raises(ValueError, match=r"the student has no layer 'layr2': did you mean 'layer2'"):
        FeatureCapture(["layr2"], "student").layers(Net())
    with pytest.raises(ValueError, match=r"the teacher has no layer 'xyz': get_model_layers\(model\) lists them"):
        FeatureCapture(["xyz"], "teacher").layers(Net())


def test_a_layer_that_does_not_run_is_an_error():
    model = Net()
    model.aux = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="'aux' of the student did not run"):
        features(model, ["aux"], torch.randn(1, 3, 16, 16))


def test_a_name_may_start_at_the_learner_unless_the_student_has_such_a_child():
    capture = FeatureCapture(["model.layer1"], "student")
    model, x = Net(), torch.randn(1, 3, 16, 16)
    assert capture.layers(model) == {"model.layer1": model.layer1}
    assert list(features(model, ["model.layer1"], x)) == ["model.layer1"]
    outer = nn.ModuleDict({"model": model, "layer1": nn.ReLU()})
    assert capture.layers(outer) == {"model.layer1": model.layer1}


@pytest.mark.parametrize("name", ["model", "loss", "dls", "path", "learn"])
def test_a_layer_may_have_the_name_of_an_attribute_of_the_learner(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    assert list(features(model, [name], torch.randn(1, 2))) == [name]


def test_hooks_and_features_are_gone_after_take_and_after_an_exception():
    model = Net()
    features(model, ["conv1"], torch.randn(1, 3, 16, 16))
    assert hooks(model) == 0
    capture = FeatureCapture(["conv1"], "student")
    held = []
    model.conv1.register_forward_hook(lambda m, i, o: held.append(weakref.ref(o)))
    model.head.register_forward_hook(lambda m, i, o: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture.start(model):
        model(torch.randn(1, 3, 16, 16))
    gc.collect()
    assert hooks(model) == 2
    assert held[0]() is None


def test_starting_twice_hooks_once():
    model, capture = Net(), FeatureCapture(["conv1"], "student")
    capture.start(model)
    capture.start(model)
    assert hooks(model) == 1
    capture.stop()
