"What an epoch costs, as in losses_guide.py on generated pictures and as in quickstart.py."

import tempfile
import time
from copy import deepcopy

import quickstart  # beside benchmark_speed.py
from fastai.vision.all import *

from .common import in_rounds, ms, ratio
from .steps import get_callbacks, get_models, quiet

SHOWN = ("student alone", "limit", "ours", "fasterai")


def user(args):
    "Rows of the table of epochs: a student of losses_guide.py on generated pictures, one of quickstart.py."
    yield "training", "callback", "ms an epoch (fastest)", "/ student alone"
    student, teacher, layers = get_models(args)
    digits, quick_teacher = quickstart.get_learner, quickstart.cnn(quickstart.TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        dls = get_pictures(args, Path(folder))
        for loss in args.losses or ("SoftTarget", "Attention"):
            guide = lambda: Learner(dls, deepcopy(student), metrics=accuracy)  # noqa: E731
            yield from epochs(args, f"guide, {loss}", guide, teacher, loss, layers)
            quick_layers = [["0", "1", "2"]] * 2
            quick = lambda: digits(quickstart.STUDENT, quickstart.FEW, args.draws, 0)  # noqa: E731
            yield from epochs(args, f"quickstart, {loss}", quick, quick_teacher, loss, quick_layers)


def epochs(args, title, make_learner, teacher, loss, layers):
    def epoch(make_cb):
        learn, cb = quiet(make_learner()), make_cb(teacher)
        now = time.process_time if args.clock == "cpu" else time.perf_counter
        start = now()
        learn.fit_one_cycle(1, 1e-3, cbs=cb)
        return now() - start

    callbacks = {k: f for k, f in get_callbacks(loss, layers).items() if callable(f) and k in SHOWN}
    seconds = in_rounds({name: partial(epoch, make_cb) for name, make_cb in callbacks.items()}, args.rounds)
    for name in seconds:
        yield title, name, ms(seconds[name]), ratio(seconds, name, "student alone")


def get_pictures(args, folder):
    "Noise, named as Pets are."
    rng = np.random.default_rng(0)
    for i in range(args.images):
        noise = rng.integers(0, 256, (args.px, args.px, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{'Cat' if i % 2 else 'dog'}_{i}.jpg")
    kwargs = {"bs": args.bs, "num_workers": 0, "item_tfms": Resize(args.px), "device": torch.device(args.device)}
    return ImageDataLoaders.from_name_func(folder, get_image_files(folder), lambda f: f[0].isupper(), **kwargs)
