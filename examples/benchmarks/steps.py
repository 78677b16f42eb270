"What a step of each variant costs: time, memory saved for backward, gradients left on the teacher."

from copy import deepcopy

import torchvision.models
from fastai.vision.all import *

from fasterai_kd.all import *

from .callbacks import ByHand, Clock, Saved, WithTorchdistill
from .common import LAYERS, LOSSES, MISSING, get_peer, in_rounds, installed, mb, ms, ratio

CLASSES = 10
OURS = {"ours": {}, "ours, cache": {"cache": True}}  # options of the teacher


def steps(args):
    "Rows of the table of steps: each loss, each variant."
    yield "loss", "step", "ms (fastest)", "/ student alone", "/ limit", "saved, MiB", "peak, MiB", "left, MiB"
    student, teacher, layers = get_models(args)
    for loss in args.losses or LOSSES:
        callbacks = get_callbacks(loss, layers)
        epochs = {"ours, cache": 2}  # the first fills it
        variants = {
            name: Variant(args, student, teacher, make_cb, epochs.get(name, 1))
            for name, make_cb in callbacks.items()
            if callable(make_cb)
        }
        seconds = in_rounds({name: v.seconds for name, v in variants.items()}, args.rounds)
        for name in callbacks:
            if name not in variants:
                yield loss, name, callbacks[name], "", "", "", "", ""
                continue
            ratios = [ratio(seconds, name, base) for base in ("student alone", "limit")]
            saved, left = variants[name].memory()
            yield loss, name, ms(seconds[name]), *ratios, mb(saved), mb(variants[name].clock.peak), mb(left)


class Variant:
    "A Learner with its own student and teacher, and the callback that distils."

    def __init__(self, args, student, teacher, make_cb, epochs):
        self.teacher, self.epochs, self.clock = deepcopy(teacher), epochs, Clock(args.clock)
        self.learn = quiet(Learner(get_dls(args), deepcopy(student), loss_func=CrossEntropyLossFlat()))
        precision = {"float16": AMPMode.FP16, "bfloat16": AMPMode.BF16}.get(args.dtype)
        self.cbs = L(make_cb(self.teacher)) + L(MixedPrecision(precision) if precision else None)

    def fit(self, cb):
        self.learn.fit(self.epochs, 1e-3, cbs=[*self.cbs, cb])
        return cb

    def seconds(self):
        return self.fit(self.clock).seconds

    def memory(self):
        "Bytes saved for backward, and left on the teacher."
        saved = self.fit(Saved(self.learn.model, self.teacher)).n_bytes
        return saved, sum(p.grad.nbytes for p in self.teacher.parameters() if p.grad is not None)


def quiet(learn):
    learn.logger = noop
    return learn.remove_cb(learn.progress) if hasattr(learn, "progress") else learn


def get_dls(args):
    "The same batches each time, one more than are timed; nothing to validate on."
    g = torch.Generator().manual_seed(0)
    n = args.bs * (args.steps + 1)
    images = L(zip(torch.randn(n, 3, args.px, args.px, generator=g), torch.arange(n) % CLASSES, strict=True))
    return DataLoaders(DataLoader(images, bs=args.bs), DataLoader([], bs=args.bs), device=torch.device(args.device))


def get_models(args):
    "Student, teacher and the layers to compare."
    arch_s, arch_t = (getattr(torchvision.models, arch) for arch in (args.student_arch, args.teacher_arch))
    if args.teacher == "vision_learner":  # its body is frozen, but for BatchNorm; its head is not
        kwargs = {"n_out": CLASSES, "pretrained": False, "normalize": False, "loss_func": CrossEntropyLossFlat()}
        learn = vision_learner(get_dls(args), arch_t, **kwargs)
        learn.freeze()
        teacher = learn.model
    else:
        teacher = arch_t(num_classes=CLASSES).requires_grad_(args.teacher == "trainable")
    student, teacher = arch_s(num_classes=CLASSES).to(args.device), teacher.to(args.device).eval()  # as a fit leaves it
    pairs = match_feature_layers(student, teacher, torch.randn(1, 3, args.px, args.px))
    return student, teacher, [pairs[who][: args.pairs] for who in ("student", "teacher")]


def get_callbacks(name, layers):
    "What is compared: functions from a teacher to a callback; a text says why there is none."
    loss, layers = LOSSES[name], layers if name in LAYERS else [None, None]
    by_hand = [layer or [] for layer in layers]
    callbacks = {"student alone": lambda t: None, "limit": lambda t: ByHand(t, loss, *by_hand)}
    for title, options in OURS.items():
        callbacks[title] = lambda t, o=options: KnowledgeDistillationCallback(Teacher(t, **o), loss, *layers)
    peer, found = get_peer(), installed("torchdistill")
    callbacks["fasterai"] = (lambda t: peer[0](t, getattr(peer[1], name), *layers)) if peer else MISSING
    callbacks["torchdistill"] = (lambda t: WithTorchdistill(t, loss, *by_hand)) if found else MISSING
    return callbacks
