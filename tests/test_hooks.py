"FeatureHooks gives the features of the named layers as the layers returned them, and leaves nothing behind."

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import Net, hooks
from fastai.callback.core import Callback
from torch import nn

from fasterai_kd import Attention, KnowledgeDistillationCallback, get_model_layers
from fasterai_kd._modules import keeps_state
from fasterai_kd.features.hooks import FeatureHooks
from fasterai_kd.features.student import StudentForward


def features(model, names, x, whose="student"):
    hooks = FeatureHooks(names, whose)
    with hooks.on(model):
        model(x)
    return hooks.pop()


def test_features_come_in_the_order_given_not_in_the_order_of_execution():
    fm = features(Net(), ["layer2", "conv1", "layer1"], torch.randn(2, 3, 16, 16))
    assert list(fm) == ["layer2", "conv1", "layer1"]
    assert [f.shape[-1] for f in fm.values()] == [4, 16, 8]


def test_a_layer_may_come_twice():
    fm = features(Net(), ["conv1", "layer1", "conv1", "conv1"], torch.randn(2, 3, 16, 16))
    assert list(fm) == ["conv1", "layer1"]


@pytest.mark.parametrize("training", [True, False])
def test_features_overwritten_in_place_later_are_kept_as_the_layer_returned_them(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).train(training)
    kept = FeatureHooks(["1"], "student")
    for _ in range(3):  # the first forward finds out, the later ones know
        x = torch.randn(2, 3, 8, 8)
        expected = model[1](model[0](x))
        with kept.on(model):
            model(x)
        assert torch.equal(kept.pop()["1"], expected)
        assert (expected < 0).any()


def test_only_what_is_overwritten_is_cloned_after_the_first_forward():
    model, seen = Net(), {}
    kept = FeatureHooks(["bn1", "layer1"], "student")
    for name in kept.names:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    for _ in range(2):
        with kept.on(model):
            model(torch.randn(2, 3, 16, 16))
        fm = kept.pop()
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

    model, kept = Moody(), FeatureHooks(["conv"], "student")
    with kept.on(model):
        model(torch.randn(1, 3, 4, 4))
    kept.pop()
    model.overwrite = True
    with kept.on(model):
        model(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="'conv' of the student was overwritten"):
        kept.pop()


def test_a_layer_overwritten_in_one_mode_only_is_right_in_both():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5, inplace=True))
    kept = FeatureHooks(["0"], "student")
    for training in (False, True, False, True):
        model.train(training)
        x = torch.randn(2, 3, 8, 8)
        with kept.on(model):
            model(x)
        assert torch.equal(kept.pop()["0"], model[0](x))


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
    with FeatureHooks(["0"], "teacher").on(model), pytest.raises(TypeError, match=r"'0' of the teacher .* tuple"):
        model[0](*[torch.randn(2, 1, 4)] * 3)


def test_half_precision_and_tensor_subclasses_become_plain_float32():
    from fastai.vision.core import TensorImage

    fm = features(nn.Sequential(nn.Identity()), ["0"], TensorImage(torch.randn(1, 3, 4, 4)).half())["0"]
    assert type(fm) is torch.Tensor
    assert fm.dtype == torch.float32


def test_an_unknown_layer_is_an_error_with_near_matches():
    with pytest.raises(ValueError, match=r"the student has no layer 'layr2': did you mean 'layer2'"):
        FeatureHooks(["layr2"], "student").layers(Net())
    with pytest.raises(ValueError, match=r"the teacher has no layer 'xyz': get_model_layers\(model\) lists them"):
        FeatureHooks(["xyz"], "teacher").layers(Net())


def test_a_layer_that_does_not_run_is_an_error():
    model = Net()
    model.aux = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="'aux' of the student did not run"):
        features(model, ["aux"], torch.randn(1, 3, 16, 16))


def test_a_name_may_start_at_the_learner_unless_the_student_has_such_a_child():
    kept = FeatureHooks(["model.layer1"], "student")
    model, x = Net(), torch.randn(1, 3, 16, 16)
    assert kept.layers(model) == {"model.layer1": model.layer1}
    assert list(features(model, ["model.layer1"], x)) == ["model.layer1"]
    outer = nn.ModuleDict({"model": model, "layer1": nn.ReLU()})
    assert kept.layers(outer) == {"model.layer1": model.layer1}


@pytest.mark.parametrize("name", ["model", "loss", "dls", "path", "learn"])
def test_a_layer_may_have_the_name_of_an_attribute_of_the_learner(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    assert list(features(model, [name], torch.randn(1, 2))) == [name]


def test_hooks_and_features_are_gone_after_take_and_after_an_exception():
    model = Net()
    features(model, ["conv1"], torch.randn(1, 3, 16, 16))
    assert hooks(model) == 0
    kept = FeatureHooks(["conv1"], "student")
    held = []
    model.conv1.register_forward_hook(lambda m, i, o: held.append(weakref.ref(o)))
    model.head.register_forward_hook(lambda m, i, o: 1 / 0)
    with pytest.raises(ZeroDivisionError), kept.on(model):
        model(torch.randn(1, 3, 16, 16))
    gc.collect()
    assert hooks(model) == 2
    assert held[0]() is None


def test_starting_twice_hooks_once():
    model, kept = Net(), FeatureHooks(["conv1"], "student")
    kept.put_on(model)
    kept.put_on(model)
    assert hooks(model) == 1
    kept.take_off()
    assert hooks(model) == 0


# --- names of wrapped models ---


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_names_are_those_of_the_plain_or_the_wrapped_model(wrap):
    model = Net()
    wrapped = wrap(model)
    printed = next(name for name in get_model_layers(wrapped) if name.endswith("conv1"))
    for name in ("conv1", printed):
        for m in (model, wrapped):
            assert FeatureHooks([name], "student").layers(m) == {name: model.conv1}


# --- the learner's own forward ---


def stance():
    return torch._dynamo.eval_frame._stance.stance


def compiled(how):
    model = Net()
    if how == "in place":
        model.compile(backend="eager")
        return model
    if how == "a part":
        model.layer1 = torch.compile(model.layer1, backend="eager")
        return model
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch, while it compiles a part
@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError])
def test_nothing_process_wide_outlives_the_forward_of_a_compiled_student(how, end):
    model, xb = compiled(how), (torch.randn(2, 3, 16, 16),)
    model(*xb)  # compiled without hooks, as by an earlier call
    seen, student = [], StudentForward(["conv1"])

    def look(*args):
        seen.append(stance())
        if end is not None:
            raise end

    handle = model.get_submodule("_orig_mod.head" if how == "whole" else "head").register_forward_hook(look)
    student.start(SimpleNamespace(model=model, xb=xb))
    assert stance() == "default"
    if end is None:
        model(*xb)
    else:
        with pytest.raises(end):
            model(*xb)
    assert (seen, stance()) == (["force_eager"], "default")
    if end is None:
        assert list(student.pop()[0]) == ["conv1"]
    handle.remove()
    student.stop()
    assert hooks(model) == 0
    assert model(*xb).shape == (2, 4)


def test_layers_are_hooked_during_the_learners_own_forward_alone():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    seen, student = [], StudentForward(["conv1", "layer1"])
    model.head.register_forward_pre_hook(lambda m, args: seen.append(hooks(model.conv1) + hooks(model.layer1)))
    student.start(SimpleNamespace(model=model, xb=(x,)))
    for xb in (x + 1, x, x + 2):
        seen.clear()
        model(xb)
        assert seen == [2 if xb is x else 0]
        assert hooks(model.conv1) + hooks(model.layer1) == 0
    assert torch.equal(student.pop()[0]["conv1"], model.conv1(x))
    assert hooks(model) == 1


def test_an_exception_in_the_forward_takes_the_hooks_off():
    model, x = Net(), torch.randn(2, 3, 16, 16)
    handle = model.head.register_forward_hook(lambda m, i, o: 1 / 0)
    student = StudentForward(["conv1"])
    student.start(SimpleNamespace(model=model, xb=(x,)))
    with pytest.raises(ZeroDivisionError):
        model(x)
    assert hooks(model.conv1) == 0
    handle.remove()
    student.stop()
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_features_of_a_forward_pass_that_is_interrupted_are_dropped(error):
    def stop(*_):
        raise error

    model, kept = Net(), FeatureHooks(["conv1"], "teacher")
    model.head.register_forward_hook(stop)
    with pytest.raises(error), kept.on(model):
        model(torch.randn(2, 3, 16, 16))
    assert not kept._features
    assert not kept._outputs


def test_a_copy_of_a_model_that_is_hooked_keeps_nothing():
    model, kept = Net(), FeatureHooks(["conv1"], "student")
    with kept.on(model):
        copied = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    copied(x)
    (hook,) = copied.conv1._forward_hooks.values()
    assert not hook.func.__self__._features


def test_a_forward_with_more_inputs_than_the_learners_is_not_the_learners(make_learner, teacher):
    class Scaled(Net):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    look = Callback(before_batch=lambda self: self.model(self.x, 2.0))
    look.order = 1
    kd = KnowledgeDistillationCallback(teacher, Attention, "layer1", "layer1")
    learn = make_learner(Scaled())
    learn.fit(1, 0.01, cbs=[kd, look])
    assert all(k > 0 for k in kd.history["kd_loss"])
    assert hooks(learn.model) == 0


def test_a_model_keeps_state_if_a_part_of_it_does():
    class Recurrent(nn.Module):
        def reset(self):
            pass

    assert keeps_state(nn.Sequential(nn.ReLU(), Recurrent()))
    assert not keeps_state(nn.DataParallel(nn.ReLU()))
