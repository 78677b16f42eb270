"The average of the student as its teacher."

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGES, PAIRS, Net, hooks, same, state
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.hook import ActivationStats, hook_output
from fastai.callback.rnn import rnn_cbs
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_clas_split
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from torch.nn.utils import prune

from fasterai_kd import *

works = pytest.mark.works
SGD = partial(OptimWrapper, opt=torch.optim.SGD)


def mean_teacher(loss=SoftTarget, decay=0.9, layers=(), **kwargs):
    return KnowledgeDistillationCallback(EMATeacher(decay), loss, *layers, **kwargs)


def follow(average, model, decay):
    "By hand: floating point is averaged, counts are copied."
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        a.copy_(a * decay + b * (1 - decay) if a.is_floating_point() else b)


@works("teachers", "EMATeacher: the exponential moving average of the student (mean teacher)")
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_fit_is_that_of_a_hand_written_mean_teacher(make_learner, dls, decay):
    learn, kd = make_learner(opt_func=SGD, wd=0.0), mean_teacher(decay=decay)
    model = copy.deepcopy(learn.model)
    average = copy.deepcopy(model).eval()
    set_seed(3)
    learn.fit(2, 0.1, cbs=kd)

    set_seed(3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        for x, y in dls.train:
            x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
            pred = model(x)
            with torch.no_grad():
                teacher_pred = average(x)
            torch.lerp(F.cross_entropy(pred, y), SoftTarget(pred, teacher_pred), 0.5).backward()
            opt.step()
            opt.zero_grad()
            follow(average, model, decay)
        model.eval()
        for _ in dls.valid:
            pass
    for mine, by_hand in ((learn.model, model), (kd.teacher, average)):
        for name, x in mine.state_dict().items():
            torch.testing.assert_close(x, by_hand.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_a_plain_model_of_the_students_form_that_can_be_used_after_the_fit(make_learner, dls):
    learn, kd = make_learner(), mean_teacher()
    assert kd.teacher is None
    learn.fit(1, 0.1, cbs=kd)
    assert type(kd.teacher) is Net
    assert not kd.teacher.training
    assert hooks(kd.teacher) == hooks(learn.model) == 0
    assert not same(state(kd.teacher), state(learn.model))
    assert [p.requires_grad for p in kd.teacher.parameters()] == [p.requires_grad for p in learn.model.parameters()]
    loss = make_learner(kd.teacher).validate()[0]
    learn.model.load_state_dict(kd.teacher.state_dict())
    assert learn.validate()[0] == loss


@pytest.mark.parametrize("loss", [Attention, FitNet], ids=lambda f: f.__name__)
def test_layers_are_the_students_own_and_the_first_batch_compares_a_model_with_itself(make_learner, loss):
    learn = make_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 4)))
    kd = mean_teacher(loss, layers=("0", "0"))
    learn.fit(1, 0.1, cbs=kd)
    assert kd.history["kd_loss"][0] == 0
    assert all(x > 0 for x in kd.history["kd_loss"][1:])


def test_a_layer_that_the_student_does_not_have_is_an_error_before_the_first_step(make_learner):
    learn = make_learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match="the teacher has no layer 'layr1': did you mean"):
        learn.fit(1, cbs=mean_teacher(Attention, layers=("layer1", "layr1")))
    assert same(before, state(learn.model))


def test_only_steps_that_are_taken_move_the_average(make_learner):
    class Overflow(Callback):
        order = 10  # as MixedPrecision

        def before_step(self):
            if self.iter % 2:
                raise CancelStepException

    for cb, steps in ((Overflow(), 2), (GradientAccumulation(8), 2), (Callback(), 4)):
        learn, kd, seen = make_learner(Net()), mean_teacher(), []
        averages = Callback(after_batch=lambda self, kd=kd, seen=seen: seen.append(kd.teacher.head.weight.clone()))
        first = learn.model.head.weight.detach().clone()
        learn.fit(1, 0.1, cbs=[kd, cb, averages])
        moved = [not torch.equal(a, b) for a, b in zip([first, *seen[:3]], seen[:4], strict=True)]
        assert sum(moved) == steps


def test_each_fit_starts_anew_and_validation_after_it_does_not(make_learner):
    learn, kd, first = make_learner(cbs=mean_teacher()), None, []
    kd = learn.knowledge_distillation
    learn.add_cb(Callback(before_backward=lambda self: first.append(same(state(kd.teacher), state(self.model)))))
    learn.fit(1, 0.1)
    average = state(kd.teacher)
    learn.validate()
    learn.get_preds()
    assert same(average, state(kd.teacher))
    learn.fit(1, 0.1)
    weights = [torch.equal(average[k], v) for k, v in kd.teacher.state_dict().items() if "weight" in k]
    assert not any(weights)


def test_before_a_fit_validation_compares_the_student_with_itself(make_learner):
    learn = make_learner(cbs=mean_teacher(Mutual, weight=1.0))
    assert learn.validate()[0] == pytest.approx(0, abs=1e-6)


def test_another_student_gets_another_average(make_learner):
    kd = mean_teacher()
    make_learner(Net()).fit(1, 0.1, cbs=kd)
    make_learner(Net(width=8)).fit(1, 0.1, cbs=kd)
    assert kd.teacher.conv1.out_channels == 8
    make_learner(kd.teacher).fit(1, 0.1, cbs=kd)  # also the average itself
    assert kd.teacher.conv1.out_channels == 8


@pytest.mark.parametrize("how", ["fine_tune", "fit_one_cycle"])
def test_it_serves_every_fit(make_learner, how):
    kd = mean_teacher(Attention, layers=PAIRS)
    getattr(make_learner(), how)(1, cbs=kd)
    assert all(x == x for x in kd.history["kd_loss"])


def test_indices_and_counts_are_copied_not_averaged(make_learner):
    model = Net()
    model.register_buffer("index", torch.tensor([5, 7, 123456789]))
    kd = mean_teacher(decay=0.999)
    make_learner(model).fit(3, 0.1, cbs=kd)
    assert torch.equal(kd.teacher.index, model.index)
    assert kd.teacher.bn1.num_batches_tracked == 12
    assert not torch.equal(kd.teacher.bn1.running_mean, model.bn1.running_mean)


def test_the_student_is_not_kept_alive_and_gradients_do_not_reach_the_average(make_learner):
    kd = mean_teacher()
    learn = make_learner(Net())
    learn.fit(1, 0.1, cbs=kd)
    assert all(p.grad is None for p in kd.teacher.parameters())
    student = weakref.ref(learn.model)
    del learn
    gc.collect()
    assert student() is None


def test_copies_and_files_leave_the_average_out_and_start_their_own(make_learner, tmp_path):
    learn = make_learner(cbs=mean_teacher(decay=0.8))
    learn.fit(1, 0.1)
    kd = learn.knowledge_distillation
    for other in (copy.deepcopy(kd._distiller.teacher), pickle.loads(pickle.dumps(kd._distiller.teacher))):
        assert other.decay == 0.8
        assert other.model is None
    learn.export("e.pkl")
    loaded = load_learner(learn.path / "e.pkl")
    assert loaded.knowledge_distillation.teacher is None
    loaded.dls = learn.dls
    with loaded.no_bar(), loaded.no_logging():
        loaded.fit(1, 0.1)
    assert loaded.knowledge_distillation.teacher is not None


def test_an_average_is_no_member_of_an_ensemble(teacher):
    with pytest.raises(ValueError, match="cannot be a member of an ensemble"):
        KnowledgeDistillationCallback([teacher, EMATeacher()], SoftTarget)


@pytest.mark.parametrize("decay", [-0.1, 1, 2, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and less than 1"):
        EMATeacher(decay)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_student_is_followed_by_a_plain_average(make_learner, wrap):
    learn, kd = make_learner(Net()), mean_teacher()
    learn.model = wrap(learn.model, **({"backend": "eager"} if wrap is torch.compile else {"device_ids": []}))
    learn.fit(1, 0.1, cbs=kd)
    assert type(kd.teacher) is Net
    assert kd.teacher.bn1.num_batches_tracked == 4


def test_a_student_with_other_layers_may_follow_after_the_first(make_learner):
    kd = mean_teacher(Attention, layers=("layer1", "layer1"))
    make_learner(Net()).fit(1, 0.1, cbs=kd)
    kd.activations_student = kd.activations_teacher = ["0"]
    make_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 4))).fit(1, 0.1, cbs=kd)
    assert isinstance(kd.teacher, nn.Sequential)


class KeepsOutput(Net):
    "As WeightDropout of a text model does, and the hooks of a unet."

    def forward(self, x):
        self.last = {"maps": [self.layer1(self.relu(self.bn1(self.conv1(x))))]}
        return self.head(self.layer2(self.last["maps"][0]).mean((2, 3)))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_student_that_keeps_tensors_of_its_last_batch_has_the_average_of_one_that_does_not(make_learner, hooked):
    def average(net):
        torch.manual_seed(2)
        learn = make_learner(net, opt_func=SGD)
        if net.__class__ is KeepsOutput and hooked:
            learn.model.hook = hook_output(learn.model.layer1, detach=False)
        learn.model.eval()(IMAGES[:1])
        torch.manual_seed(0)
        kd = mean_teacher()
        learn.fit(1, 0.1, cbs=kd)
        return state(kd.teacher)

    torch.manual_seed(1)
    plain, keeps = Net(), KeepsOutput()
    keeps.load_state_dict(plain.state_dict())
    assert same(average(plain), average(keeps))


class Watcher(Callback):
    "Keeps outputs of a layer by a hook, and a generator, which nobody can copy."

    def before_fit(self):
        self.n, self.gen, layer = [], (i for i in range(3)), self.learn.model.layer1
        self.handles = [
            layer.register_forward_hook(self.keep),
            layer.register_forward_hook(lambda m, i, o: self.n.append(len(o))),
            layer.register_forward_pre_hook(partial(self.keep, o=None)),
            layer.register_full_backward_hook(self.keep),
        ]

    def keep(self, m, i, o):
        self.n.append(len(i))

    def after_fit(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore:You are shadowing an attribute")  # fastai's own
def test_hooks_of_callbacks_are_not_on_the_average_and_do_not_see_it(make_learner):
    learn, kd, watcher = make_learner(), mean_teacher(), Watcher()
    learn.fit(1, 0.1, cbs=[kd, watcher, ActivationStats(with_hist=False)])
    assert hooks(kd.teacher) == sum(len(m._backward_hooks) for m in kd.teacher.modules()) == 0
    assert len(watcher.n) == 4 * 4 + 2 * 3  # four training batches, two of validation without a backward


class HooksItself(Net):
    def __init__(self):
        super().__init__()
        self.layer2.register_forward_hook(self.double)
        self.head.register_forward_pre_hook(partial(self.double, out=0))

    def double(self, module, args, out):
        return 2 * out if isinstance(out, torch.Tensor) else (2 * args[0],)


def normed(norm):
    net = Net()
    norm(net.head)
    return net


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "make",
    [
        HooksItself,
        lambda: normed(nn.utils.weight_norm),
        lambda: normed(nn.utils.spectral_norm),
        lambda: normed(nn.utils.parametrizations.weight_norm),
        lambda: normed(nn.utils.parametrizations.spectral_norm),
        lambda: normed(lambda head: prune.l1_unstructured(head, "weight", 0.5)),
        lambda: DynamicUnet(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)), 4, (16, 16)),
    ],
    ids=["own methods", "weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm", "pruned", "unet"],
)
def test_what_hooks_of_the_model_itself_do_the_average_does_too(make_learner, make):
    torch.manual_seed(2)
    learn, kd = make_learner(make(), loss_func=lambda pred, y: pred.mean(), metrics=[]), mean_teacher(Logits)
    watched = learn.model.get_submodule("layers" if isinstance(learn.model, DynamicUnet) else "head")
    handle = watched.register_forward_hook(lambda m, i, o: None)  # so that the copy is one without

    outputs = []

    def run(self):
        if self.training and not self.iter:
            with torch.no_grad():
                outputs.append(self.model.eval()(IMAGES[:2]))
            self.model.train()

    def compare(self):
        if self.training and not self.iter:
            torch.testing.assert_close(kd.teacher(IMAGES[:2]), outputs[0], rtol=1e-5, atol=1e-6)

    first = Callback(before_batch=run, after_pred=compare)
    first.order = -1
    learn.fit(1, 1e-3, cbs=[kd, first])
    assert outputs
    assert hooks(kd.teacher) == hooks(learn.model) - 1
    handle.remove()


def test_a_trial_leaves_the_average_as_it_was(make_learner):
    learn, teacher = make_learner(), EMATeacher(0.9)
    learn.fit(1, 0.1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    before, model = state(teacher.model), teacher.model
    for ends in (True, False):  # or is it interrupted?
        teacher.begin_fit(learn.model, trial=True)
        teacher.follow(learn.model, anew=True)
        with torch.no_grad():
            learn.model.head.weight.add_(1)
        teacher.after_step()
        assert teacher.model is not model
        if ends:
            teacher.end_fit()
        else:
            teacher.begin_fit(learn.model)
        assert teacher.model is model
        assert same(before, state(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_after_lr_find_the_average_from_before_it_is_there_again(make_learner):
    kd = KnowledgeDistillationCallback(EMATeacher(0.9), SoftTarget)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.1)
    before = state(kd.teacher)
    learn.lr_find(num_it=6, show_plot=False)
    assert same(before, state(kd.teacher))


def test_a_fresh_text_classifier_can_be_followed():
    rnn = get_text_classifier(AWD_LSTM, 20, 2, config={**awd_lstm_clas_config, "emb_sz": 6, "n_hid": 8, "n_layers": 2})
    items = [(torch.arange(2, 9), torch.tensor(i % 2)) for i in range(8)]
    dls = DataLoaders.from_dsets(items, items, bs=4, device="cpu", num_workers=0)
    learn = Learner(dls, rnn, loss_func=F.cross_entropy, splitter=awd_lstm_clas_split, cbs=rnn_cbs())
    learn.logger = lambda *_: None
    kd = mean_teacher()
    with learn.no_bar():
        learn.fit(1, 0.01, cbs=kd)
    assert torch.tensor(kd.history["kd_loss"]).isfinite().all()


def test_one_average_in_two_callbacks_is_refused(make_learner):
    teacher = EMATeacher()
    kds = [KnowledgeDistillationCallback(teacher, loss) for loss in (SoftTarget, Logits)]
    with pytest.raises(ValueError, match="two callbacks would update one EMATeacher twice a step"):
        make_learner().fit(1, cbs=kds)


def test_a_second_fit_of_the_student_starts_with_a_copy_of_it(make_learner):
    kd, equal = mean_teacher(decay=0.5), []
    look = Callback(
        after_pred=lambda self: (
            equal.append(torch.equal(kd.teacher.head.weight, self.model.head.weight)) if self.training else None
        )
    )
    learn = make_learner()
    for _ in range(2):
        learn.fit(1, 0.1, cbs=[kd, look])
    assert equal == 2 * [True, False, False, False]
