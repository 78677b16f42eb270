"`fast_teacher`, `teacher_dtype`, `compile_teacher` and the early stop, in real fits."

import contextlib
import copy
import functools
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import Net, hooks, same, state
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.torch_core import set_seed
from test_fast import Branches, Locked, Recurrent, Stages, anatomy, trained
from torch import nn

import fasterai_kd.prepare
import fasterai_kd.teacher_pass
from fasterai_kd import *

FEATURE = [Attention, Similarity, FitNet, ActivationBoundaries, RKD, PKT, CWD]
LAYERS = ["conv1", "layer1"]
EAGER = {"backend": "eager"}
FAST, COMPILED = {"fast_teacher": True}, {"compile_teacher": EAGER}


class Seen:
    "A loss that keeps what it is given."

    def __init__(self, loss=None, **attributes):
        self.loss, self.outputs, self.features = loss, [], []
        self.__dict__.update(attributes)

    def __call__(self, pred, teacher_pred, fm_s=None, fm_t=None, **kwargs):
        self.outputs.append(teacher_pred)
        self.features.append({name: fm.clone() for name, fm in fm_t.items()})
        if self.loss is not None:
            return self.loss(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t)
        first = pred if isinstance(pred, torch.Tensor) else pred[0]
        return first.square().mean()


@pytest.fixture
def fit(make_learner):
    "Fit a student; returns the callback, and what its loss was given."

    def run(teacher, layers=(), fits=1, student=Net, cbs=(), loss=None, **kwargs):
        loss = Seen() if loss is None else loss
        kd = KnowledgeDistillationCallback(teacher, loss, list(layers), list(layers), **kwargs)
        set_seed(7)
        learn = make_learner(student(), cbs=kd)
        for _ in range(fits):
            learn.fit(1, 0.01, cbs=list(cbs))
        return kd, loss

    return run


@pytest.fixture(params=[True, False], ids=["channels_last", "contiguous"])
def last(request, monkeypatch):
    "Which memory format the probe finds faster."

    def probe(a, b, device):
        a()
        b()
        return request.param

    monkeypatch.setattr(fasterai_kd.prepare, "is_faster", probe)
    return request.param


@pytest.fixture
def contiguous(monkeypatch):
    monkeypatch.setattr(fasterai_kd.prepare, "is_faster", lambda a, b, device: False)


def assert_close(a, b, tolerance=1e-4):
    assert len(a.outputs) == len(b.outputs) > 0
    for x, y in zip(a.outputs, b.outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    for fm, other in zip(a.features, b.features, strict=True):
        assert list(fm) == list(other)
        for name in fm:
            torch.testing.assert_close(fm[name], other[name], rtol=tolerance, atol=tolerance)


def assert_equal(a, b):
    assert_close(a, b, 0)


def dtypes_of(model):
    "Fills up with the dtypes of what the module gives; remove the handle."
    dtypes = []
    return dtypes, model.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))


# --- fast_teacher ---


@pytest.mark.parametrize("layers", [[], ["stem", "bn", "block"], ["block.0", "block.1", "block.0"]], ids=str)
def test_fast_gives_the_outputs_and_features_of_the_plain_teacher(fit, last, layers):
    teacher = trained(Stages())
    kd, fast = fit(teacher, layers, student=Stages, fast_teacher=True)
    assert_close(fast, fit(teacher, layers, student=Stages)[1])
    assert ("channels_last" in kd.teacher_report) == last
    assert " BatchNorm folded" in kd.teacher_report


def test_fast_says_what_was_folded_and_what_it_takes(fit, last):
    kd, _ = fit(trained(Net()), fast_teacher=True)
    own = "2 BatchNorm folded, channels_last, 0.0 MiB more" if last else "2 BatchNorm folded, 0.0 MiB more"
    assert kd.teacher_report.startswith(own)
    assert fit(Net())[0].teacher_report == "plain"


@pytest.mark.parametrize("options", [FAST, COMPILED], ids=["fast", "compiled"])
def test_the_users_teacher_is_unchanged_bit_for_bit(fit, last, options):
    teacher = trained(Net()).train()
    teacher.conv1.requires_grad_(False)
    teacher.bn1.eval()
    teacher.conv1.weight.data = teacher.conv1.weight.data.contiguous(memory_format=torch.channels_last)
    before, weights = anatomy(teacher), state(teacher)
    kd, _ = fit(teacher, LAYERS, fits=2, **options)
    assert not kd.teacher_report.startswith("plain:")
    assert anatomy(teacher) == before
    assert same(state(teacher), weights)


@pytest.mark.parametrize("options", [FAST, COMPILED], ids=["fast", "compiled"])
@pytest.mark.parametrize("make", [Locked, Recurrent], ids=lambda f: f.__name__)
def test_a_teacher_that_no_copy_can_stand_in_for_runs_as_it_is_in_each_fit(fit, contiguous, make, options):
    teacher = trained(make()).train()
    weights = state(teacher)
    kd, seen = fit(teacher, LAYERS, fits=2, **options)
    assert kd.teacher_report.startswith("plain: ")
    assert_equal(seen, fit(teacher, LAYERS, fits=2)[1])
    assert same(state(teacher), weights)
    assert all(m.training for m in teacher.modules())


def test_an_untraceable_teacher_in_half_precision_or_compiled_runs_as_it_is(fit, contiguous):
    for make in (Branches, lambda: Net().bfloat16(), lambda: torch.compile(Net(), backend="eager")):
        teacher = make().train()
        weights = state(teacher)
        kd, seen = fit(teacher, fits=2, fast_teacher=True)
        assert kd.teacher_report.startswith("plain: ")
        assert_equal(seen, fit(teacher, fits=2)[1])
        assert same(state(teacher), weights)


@pytest.mark.parametrize("options", [FAST, COMPILED], ids=["fast", "compiled"])
@pytest.mark.parametrize("since", ["the first fit", "the second"])
def test_the_users_hooks_run_in_each_batch_from_when_they_are_there(make_learner, contiguous, since, options):
    teacher, calls = trained(Net()), []
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, **options)
    learn = make_learner(cbs=kd)
    for i in range(2):
        if i == (since != "the first fit"):
            teacher.layer1.register_forward_hook(lambda *a: calls.append(1))
        learn.fit(1, 0.01)
    assert len(calls) == (12 if since == "the first fit" else 6)
    assert kd.teacher_report == "plain: it has hooks, which must run"


class Reads(Net):
    "Uses the BatchNorm in another way than by calling it."

    def forward(self, x):
        return super().forward(x) * self.bn1.num_features


def test_a_copy_that_does_not_run_is_not_used(fit, contiguous):
    teacher = trained(Reads()).train()
    kd, seen = fit(teacher, fits=2, fast_teacher=True)
    assert kd.teacher_report.startswith("plain: the fast copy does not run")
    assert_equal(seen, fit(teacher, fits=2)[1])


def test_a_forward_pass_that_needs_contiguous_maps_gets_them(fit, monkeypatch):
    class Views(Net):
        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.head(self.layer2(self.layer1(x)).view(x.size(0), -1)[:, :8])

    monkeypatch.setattr(fasterai_kd.prepare, "is_faster", lambda a, b, device: (a(), b(), True)[-1])
    teacher = trained(Views())
    kd, seen = fit(teacher, fast_teacher=True)
    assert kd.teacher_report.startswith("2 BatchNorm folded, 0.0 MiB more")
    assert_close(seen, fit(teacher)[1])


class Tied(Net):
    "Uses the weights of a conv twice, once where a trace sees no module; its outputs are small."

    def forward(self, x):
        y = nn.functional.conv2d(x, self.conv1.weight, padding=1)
        return 1e-3 * (super().forward(x) + y.mean((2, 3)))


def test_a_copy_whose_outputs_differ_is_not_used_with_a_warning(fit, contiguous):
    teacher = trained(Tied()).train()
    with pytest.warns(UserWarning, match=r"fast_teacher: the fast copy's outputs differ by .* runs as it is"):
        kd, seen = fit(teacher, fits=1, fast_teacher=True)
    assert kd.teacher_report.startswith("plain: the fast copy's outputs differ by")
    assert_equal(seen, fit(teacher)[1])


def test_a_layer_whose_features_would_differ_counts_as_a_difference(make_learner, contiguous):
    class Block(Net):
        def forward(self, x):
            return self.conv1(x)

    class Outside(nn.Module):
        "Calls the BatchNorm of a block after the block."

        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block.bn1(self.block(x)).mean((2, 3))

    teacher, student = trained(Outside()), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen = []
    for fast in (True, False):
        loss = Seen()
        kd = KnowledgeDistillationCallback(teacher, loss, "0", "block", fast_teacher=fast)
        with pytest.warns(UserWarning, match="differ") if fast else contextlib.nullcontext():
            make_learner(copy.deepcopy(student), cbs=kd).fit(1, 0.01)
        seen.append(loss)
    assert_equal(*seen)


def test_where_there_is_nothing_to_fold_and_no_faster_format_the_teacher_runs_itself(fit, contiguous):
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    kd, seen = fit(teacher, fits=2, fast_teacher=True)
    assert kd.teacher_report == "plain: there is nothing to fold, and channels_last does not pay"
    assert_equal(seen, fit(teacher, fits=2)[1])


def test_preparing_draws_no_random_numbers_so_the_student_is_the_same_bit_for_bit(make_learner, contiguous):
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    students = []
    for fast in (True, False):
        set_seed(3)
        learn = make_learner(Net(), cbs=KnowledgeDistillationCallback(teacher, SoftTarget, fast_teacher=fast))
        learn.fit(2, 0.1)
        students.append(state(learn.model))
    assert same(*students)


@pytest.mark.parametrize(("options", "nested"), [(FAST, False), (FAST, True), (COMPILED, True)])
def test_each_member_of_an_ensemble_is_prepared(fit, contiguous, nested, options):
    members = [trained(Net()), trained(Net(8)), trained(Net())]
    ensemble = [members[0], members[1:]] if nested else members
    kd, seen = fit(ensemble, fits=2, **options)
    reports = kd.teacher_report.split("; ")
    assert len(reports) == 3
    assert not any(r.startswith("plain:") for r in reports)
    assert_close(seen, fit(ensemble, fits=2)[1])


# --- the teacher changes ---


class Change(Callback):
    "In one batch."

    order = 5

    def __init__(self, change, batch):
        self.change, self.batch = change, batch

    def after_batch(self):
        if self.training and self.iter == self.batch:
            self.change()


def in_place(teacher):
    with torch.no_grad():
        teacher.conv1.weight.mul_(2)


def by_optimizer(teacher):
    opt = torch.optim.SGD(teacher.parameters(), lr=1)
    teacher(torch.randn(2, 3, 16, 16)).sum().backward()
    opt.step()
    opt.zero_grad()


def statistics(teacher):
    teacher.bn1.running_mean.add_(1)


def loaded(teacher):
    teacher.load_state_dict({k: v * 2 for k, v in teacher.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "options", "layers"),
    [
        (in_place, FAST, LAYERS),
        (by_optimizer, FAST, []),
        (statistics, FAST, LAYERS),
        (loaded, FAST, LAYERS),
        (in_place, COMPILED, []),
        (in_place, COMPILED, LAYERS),
        (statistics, FAST | COMPILED, LAYERS),
    ],
)
def test_a_teacher_that_changes_during_a_fit_runs_as_it_is_from_then_on(fit, contiguous, change, options, layers):
    runs = []
    for how in (options, {}):
        torch.manual_seed(1)
        teacher = trained(Net())
        torch.manual_seed(2)
        kd, seen = fit(teacher, layers, cbs=[Change(partial(change, teacher), 1)], **how)
        runs.append((kd, seen))
    (kd, seen), (_, plain) = runs
    assert kd.teacher_report == "plain: its weights changed during the fit"
    assert_close(seen, plain)
    assert torch.equal(seen.outputs[2], plain.outputs[2])
    assert not torch.allclose(seen.outputs[2], plain.outputs[0])


def test_a_teacher_that_changes_in_each_batch_costs_no_more_fingerprints(fit, contiguous, monkeypatch):
    calls, own = [], fasterai_kd.teacher_pass.fingerprint
    monkeypatch.setattr(fasterai_kd.teacher_pass, "fingerprint", lambda m: (calls.append(1), own(m))[1])
    teacher = trained(Net())
    fit(teacher, cbs=[Change(partial(in_place, teacher), i) for i in range(4)], fast_teacher=True)
    assert len(calls) == 2


@pytest.fixture
def prepared(monkeypatch):
    "How often a copy was made."
    calls, own = [], fasterai_kd.prepare.fast_copy
    monkeypatch.setattr(fasterai_kd.prepare, "fast_copy", lambda *a: (calls.append(1), own(*a))[1])
    return calls


def by_data(teacher):
    teacher.conv1.weight.data.mul_(2)


@pytest.mark.parametrize("change", [None, in_place, statistics, by_data])
def test_the_copy_serves_the_next_fit_unless_the_weights_changed(make_learner, contiguous, prepared, change):
    teacher, seen = trained(Net()), Seen()
    kd = KnowledgeDistillationCallback(teacher, seen, fast_teacher=True)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01)
    if change is not None:
        change(teacher)
    learn.fit(1, 0.01)
    assert len(prepared) == (1 if change is None else 2)
    assert kd.teacher_report.startswith("2 BatchNorm folded")
    x = next(iter(learn.dls.valid))[0]
    with torch.no_grad():
        torch.testing.assert_close(seen.outputs[-2], teacher(x), rtol=1e-4, atol=1e-4)


def test_a_copy_used_again_is_reported_again(make_learner, contiguous):
    teacher = trained(Net())
    weights = state(teacher)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, fast_teacher=True)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01, cbs=Change(partial(in_place, teacher), 1))
    assert kd.teacher_report == "plain: its weights changed during the fit"
    teacher.load_state_dict(weights)
    learn.fit(1, 0.01)
    assert kd.teacher_report.startswith("2 BatchNorm folded")


def test_another_teacher_is_prepared_anew(make_learner, contiguous, prepared):
    seen = Seen()
    kd = KnowledgeDistillationCallback(trained(Net()), seen, fast_teacher=True)
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01)
    kd.teacher = other = trained(Net(8))
    learn.fit(1, 0.01)
    assert len(prepared) == 2
    with torch.no_grad():
        torch.testing.assert_close(seen.outputs[-2], other(next(iter(learn.dls.valid))[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # fastai loads the weights back
def test_lr_find_and_fine_tune_prepare_once(make_learner, contiguous, prepared):
    kd = KnowledgeDistillationCallback(trained(Net()), SoftTarget, fast_teacher=True)
    learn = make_learner(Net(), cbs=kd, splitter=lambda m: [list(m.conv1.parameters()), list(m.head.parameters())])
    learn.lr_find(num_it=6, show_plot=False)
    learn.fine_tune(1)
    assert len(prepared) == 1


def test_validation_alone_prepares_nothing(make_learner, prepared):
    kd = KnowledgeDistillationCallback(trained(Net()), SoftTarget, fast_teacher=True)
    make_learner(cbs=kd).validate()
    assert prepared == []
    assert kd.teacher_report == "plain"


@pytest.mark.parametrize("options", [FAST, COMPILED], ids=["fast", "compiled"])
def test_copies_and_files_carry_no_copy_and_make_their_own(make_learner, teacher, contiguous, options):
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, **options)
    make_learner().fit(1, 0.01, cbs=kd)
    assert len(pickle.dumps(kd)) < 2000
    learn = make_learner(cbs=kd)
    learn.fit(1, 0.01)
    learn.export("s.pkl")
    for other in (copy.deepcopy(kd), load_learner(learn.path / "s.pkl").knowledge_distillation):
        assert other.teacher_report == "plain"
        other.teacher = teacher
        make_learner(Net()).fit(1, 0.01, cbs=other)
        assert other.teacher_report == kd.teacher_report != "plain"


# --- teacher_dtype ---


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_teachers_alone(make_learner, teacher, dtype, ensemble):
    dtypes, _ = dtypes_of(teacher.head)
    student = Net()
    students, _ = dtypes_of(student.head)
    seen = Seen(SoftTarget)
    source = [teacher, [teacher, Net()]] if ensemble else teacher
    make_learner(student, cbs=KnowledgeDistillationCallback(source, seen, teacher_dtype=dtype)).fit(1, 0.01)
    assert set(dtypes) == {dtype}
    assert set(students) == {torch.float32}
    assert {o.dtype for o in seen.outputs} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in teacher.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)]
)
def test_beside_a_student_in_autocast_the_teacher_has_its_own_dtype_or_the_students(fit, teacher, dtype, expected):
    dtypes, _ = dtypes_of(teacher.head)
    with torch.autocast("cpu", torch.bfloat16):
        _, seen = fit(teacher, LAYERS, teacher_dtype=dtype)
    assert set(dtypes) == {expected}
    assert {fm.dtype for features in seen.features for fm in features.values()} == {torch.float32}


def test_float32_beside_a_student_in_autocast_is_the_plain_teacher_bit_for_bit(fit, teacher):
    with torch.autocast("cpu", torch.bfloat16):
        _, seen = fit(teacher, LAYERS, teacher_dtype=torch.float32)
    assert_equal(seen, fit(teacher, LAYERS)[1])


@pytest.mark.parametrize("students", [True, False])
def test_a_fast_copy_is_judged_in_full_precision_and_runs_in_its_own(fit, contiguous, students):
    teacher = trained(Net())
    around = torch.autocast("cpu", torch.bfloat16) if students else contextlib.nullcontext()
    with around:
        kd, seen = fit(teacher, fast_teacher=True, teacher_dtype=None if students else torch.bfloat16)
    assert kd.teacher_report.startswith("2 BatchNorm folded")
    plain = fit(teacher)[1]
    assert_close(seen, plain, 0.1)
    assert not torch.allclose(seen.outputs[0], plain.outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.float64, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(teacher, bad):
    with pytest.raises(ValueError, match="teacher_dtype must be"):
        KnowledgeDistillationCallback(teacher, SoftTarget, teacher_dtype=bad)


# --- compile_teacher ---


MANY = ["conv1", "bn1", "relu", "layer1", "conv1"]  # the first ones overwritten in place


@pytest.mark.parametrize(
    ("backend", "fast", "layers"),
    [("eager", False, []), ("eager", True, MANY), ("aot_eager", False, MANY), ("aot_eager", True, MANY[1:4])],
)
def test_compiled_gives_the_outputs_and_features_of_the_plain_teacher(fit, last, layers, fast, backend):
    teacher = trained(Net())
    kd, seen = fit(teacher, layers, compile_teacher={"backend": backend}, fast_teacher=fast)
    assert kd.teacher_report.endswith("compiled")
    assert_close(seen, fit(teacher, layers)[1])
    assert hooks(teacher) == 0


@pytest.mark.parametrize(("layers", "fast", "reads"), [([], False, True), (LAYERS, False, True), (LAYERS, True, False)])
def test_several_fits_compile_once(fit, contiguous, layers, fast, reads):
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    torch.compiler.reset()
    fit(
        trained(Net()),
        layers,
        3,
        loss=Seen(reads_predictions=reads),
        compile_teacher={"backend": backend},
        fast_teacher=fast,
    )
    assert len(compiled) == 1


class Broken(Net):
    "torch.compile makes several pieces of it."

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        torch._dynamo.graph_break()
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [Net, Broken])
def test_what_was_compiled_for_other_layers_is_not_used_again(fit, make):
    teacher = trained(make())
    for layers in (["conv1"], ["layer1"], ["conv1"]):
        assert_close(fit(teacher, layers, compile_teacher=EAGER)[1], fit(teacher, layers)[1])


def test_no_arguments_are_the_defaults_and_false_is_off(fit, teacher, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: (asked.append(kwargs), f)[1])
    for how in (True, {}, {"mode": "max-autotune"}, False):
        fit(teacher, compile_teacher=how)
    assert asked == [{}, {}, {"mode": "max-autotune"}]


@pytest.mark.parametrize("bad", ["inductor", None, 1, ["eager"]])
def test_what_is_no_argument_of_compile_is_refused_at_once(teacher, bad):
    with pytest.raises(TypeError, match="compile_teacher must be True or a dict"):
        KnowledgeDistillationCallback(teacher, SoftTarget, compile_teacher=bad)


def test_a_layer_that_does_not_run_is_named_when_compiled_too(make_learner, teacher):
    teacher.aux = nn.Linear(1, 1)
    kd = KnowledgeDistillationCallback(teacher, FitNet, "head", "aux", compile_teacher=EAGER)
    with pytest.raises(RuntimeError, match="'aux' of the teacher did not run"):
        make_learner(cbs=kd).fit(1)


def test_compiled_holds_no_batch(make_learner, teacher):
    kept = []

    def loss(fm_t, pred, **kwargs):
        kept.append(weakref.ref(fm_t["layer1"]))
        return pred.square().mean()

    kd = KnowledgeDistillationCallback(teacher, loss, "layer1", "layer1", compile_teacher=EAGER)
    make_learner(cbs=kd).fit(1, 0.01)
    gc.collect()
    assert len(kept) == 6
    assert [r for r in kept if r() is not None] == []


# --- the early stop ---


class Counted(Net):
    "Counts how often its head runs; a hook would forbid the stop."

    def __init__(self):
        super().__init__()
        self.head = CountedLinear(8, 4)


class CountedLinear(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Careful(Counted):
    "Catches what its forward pass may raise."

    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:
            return x.new_zeros(len(x), 4)


LOSSES = [*FEATURE, partial(Attention, p=4), partial(partial(RKD, w_a=0), w_d=1.0), Seen(reads_predictions=False)]


@pytest.mark.parametrize(
    ("loss", "make"),
    [*((loss, Counted) for loss in LOSSES), (Attention, Careful)],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)
def test_with_a_loss_on_features_the_teacher_ends_after_its_last_layer_and_the_student_is_the_same(
    make_learner, loss, make
):
    def whole(**kwargs):
        return loss(**kwargs)

    students, calls = [], []
    for f in (loss, whole):
        torch.manual_seed(1)
        teacher = trained(make()).train()
        kd = KnowledgeDistillationCallback(teacher, f, LAYERS, LAYERS)
        set_seed(3)
        learn = make_learner(Net(), cbs=kd)
        learn.fit(2, 0.1)
        students.append(state(learn.model))
        calls.append(teacher.head.calls)
        assert hooks(teacher) == 0
        assert all(m.training for m in teacher.modules())
    assert same(*students)
    assert calls == [1, 12]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("layers", [["layer1", "conv1"], ["conv1", "conv1"], ["bn1", "relu"], ["layer1", "layer1.0"]])
def test_features_are_exact_after_the_stop(fit, contiguous, layers, fast):
    teacher = trained(Counted())
    _, stopped = fit(teacher, layers, loss=Seen(reads_predictions=False), fast_teacher=fast)
    assert stopped.outputs == [None] * 6
    _, whole = fit(teacher, layers)
    assert all(isinstance(o, torch.Tensor) for o in whole.outputs)
    whole.outputs = stopped.outputs = [torch.zeros(1)]
    assert_close(stopped, whole, 1e-4 if fast else 0)


class Again(Counted):
    "A layer runs twice."

    def forward(self, x):
        return super().forward(self.conv1(x)[:, :3])


def hooked():
    model = Counted()
    model.bn1.register_forward_pre_hook(lambda *a: None)
    return model


class State(Counted):
    "Has a state that the end of each forward pass sets."

    def reset(self):
        self.before = 0

    def forward(self, x):
        output = super().forward(x + self.before)
        self.before = output.mean()
        return output


@pytest.mark.parametrize("make", [Again, hooked, State], ids=["a layer runs twice", "the user's hooks", "a state"])
def test_the_whole_forward_pass_runs_where_a_part_is_not_enough(fit, make):
    teacher = trained(make())
    _, seen = fit(teacher, LAYERS, loss=Seen(reads_predictions=False))
    assert teacher.head.calls == 6
    teacher.head.calls = 0
    _, whole = fit(teacher, LAYERS)
    whole.outputs = seen.outputs
    for a, b in zip(seen.features, whole.features, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in LAYERS)


def test_a_recurrent_teacher_keeps_its_state_from_batch_to_batch(make_learner):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.layer1, self.head = AWD_LSTM(20, 8, 8, 2), nn.Identity(), nn.Linear(8, 4)
            self.reset = self.rnn.reset

        def forward(self, x):
            x = self.layer1(self.rnn.encoder((x[:, 0, :, 0].abs() * 5).long().clamp(0, 19)))
            return self.head(self.rnn(x, from_embeds=True)[:, -1])

    teacher = Words().eval()
    layer = "rnn.hidden_dps.0"
    seen = []
    for loss in (Seen(reads_predictions=False), Seen()):
        kd = KnowledgeDistillationCallback(teacher, loss, "layer1", layer)
        make_learner(Net(), cbs=kd).fit(1, 0.01)
        seen.append([features[layer] for features in loss.features])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: lambda **kwargs: Attention(**kwargs) + SoftTarget(**kwargs),
        lambda: functools.wraps(Attention)(lambda **kwargs: Attention(**kwargs) + SoftTarget(**kwargs)),
        lambda: partial(functools.wraps(Attention)(lambda **kwargs: Attention(**kwargs) + SoftTarget(**kwargs)), p=2),
    ],
    ids=["a function", "one that wraps a loss on features", "a partial of it"],
)
def test_other_functions_get_the_teachers_predictions(fit, wrap):
    teacher = trained(Counted())
    fit(teacher, LAYERS, loss=wrap())
    assert teacher.head.calls == 6


def test_an_exception_in_a_stopped_forward_pass_leaves_nothing(make_learner):
    teacher = trained(Counted()).train()
    kd = KnowledgeDistillationCallback(teacher, FitNet, LAYERS, LAYERS)
    learn = make_learner(cbs=kd)

    class Bomb(nn.ReLU):
        armed = 0

        def forward(self, x):
            self.armed += 1
            if self.armed == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    teacher.relu = Bomb()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.01)
    assert hooks(teacher) == 0
    assert all(m.training for m in teacher.modules())
    assert teacher(torch.randn(2, 3, 16, 16)).shape == (2, 4)


# --- several outputs ---


class Tuple(Net):
    def forward(self, x):
        y = super().forward(x)
        return y, {"half": y / 2}


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, []),
        ({}, LAYERS),
        (FAST, LAYERS),
        (COMPILED, []),
        (COMPILED, LAYERS),
        ({"teacher_dtype": torch.bfloat16}, []),
    ],
)
def test_a_student_with_several_outputs_gets_the_teachers_as_they_are(make_learner, contiguous, options, layers):
    teacher, seen, ce = trained(Tuple()), Seen(), CrossEntropyLossFlat()
    kd = KnowledgeDistillationCallback(teacher, seen, layers, layers, **options)
    make_learner(Tuple(), loss_func=lambda pred, y: ce(pred[0], y), metrics=[], cbs=kd).fit(1, 0.01)
    assert len(seen.outputs) == 6
    for output in seen.outputs:
        assert isinstance(output, tuple)
        torch.testing.assert_close(output[0] / 2, output[1]["half"])


@pytest.mark.parametrize("options", [{}, {"fast_teacher": True}, {"compile_teacher": EAGER}])
def test_a_student_with_one_output_gets_the_predictions_among_the_teachers(fit, contiguous, options):
    teacher = trained(Tuple())
    _, seen = fit(teacher, **options)
    assert all(isinstance(o, torch.Tensor) for o in seen.outputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [FAST, COMPILED], ids=["fast", "compiled"])
def test_a_teacher_that_moves_to_the_gpu_is_prepared_there_for_each_device(make_learner, options):
    teacher = trained(Net())
    kd = KnowledgeDistillationCallback(teacher, SoftTarget, **options)
    learn = make_learner(cbs=kd)
    for device in ("cuda", "cpu", "cuda"):
        learn.dls.to(device)
        learn.model.to(device)
        learn.fit(1, 0.01)
        assert not kd.teacher_report.startswith("plain:")
