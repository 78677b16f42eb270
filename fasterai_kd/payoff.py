"What a smaller model gives and costs, in one table: `from fasterai_kd.show import compare_models`."

import io
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from operator import length_hint
from statistics import median
from typing import Any

import pandas as pd
import torch
from fastai.learner import Learner
from fastai.torch_core import to_device
from torch import Tensor, nn

from ._modules import evaluating
from ._tensors import map_tensors

__all__ = ["LATENCY", "PARAMETERS", "RATIOS", "SIZES", "ModelTable", "compare_models"]

SIZES = PARAMETERS, FILE, LATENCY = "parameters", "file (KB)", "latency (ms)"
RATIOS = "fewer parameters", "smaller file", "faster"
ROUNDS, WARM_UP = 5, 3


class ModelTable(pd.DataFrame):
    "A DataFrame that shows its numbers rounded, with a line about the measurement; the numbers themselves are exact."

    @property
    def _constructor(self) -> Callable[..., "ModelTable"]:
        return ModelTable

    def formatted(self) -> pd.DataFrame:
        "The same table as text, e.g. for `to_html()`."
        columns = {name: [_text(name, value) for value in self[name]] for name in self}
        return pd.DataFrame(columns, index=self.index)

    @property
    def note(self) -> str:
        "How latency and file size were measured."
        about = self.attrs
        if "device" not in about:
            return ""
        return (
            f"Latency: batch of 1 on {about['device']}, median of {about['repeats']} runs. File: the saved weights. "
            f"Ratios: {self.index[0]} = 1."
        )

    def __repr__(self) -> str:
        return f"{self.formatted().to_string()}\n{self.note}".rstrip()

    def _repr_html_(self) -> str:
        return f"{self.formatted().to_html()}<p>{self.note}</p>"


def compare_models(
    models: Mapping[str, Any],  # name → Learner or model; the ratios are to the first
    dls: Any = None,  # DataLoaders for plain models; None: those of the first Learner that has data
    metrics: Any = None,  # of plain models; None: those of the first Learner
    device: str | torch.device | None = None,  # where latency is measured; None: where each model is
    repeats: int = 50,  # timed runs of each model
) -> ModelTable:
    """Parameters, size of the saved weights, latency and validation metrics of models, a row for each.

    Latency is the median time of one forward pass of one sample, in milliseconds, in evaluation mode and under
    `torch.no_grad`, after a warm-up. The input is already on the device: loading and transforms do not count. The
    number of threads stays as it is. A Learner is validated on its own validation set, one without data (loaded from a
    file) as a plain model. All models are left as they were; for another `device` a copy is timed.

        table = compare_models({"teacher": teacher, "student alone": alone, "student": student})

    Returns a DataFrame whose last columns say how many times fewer parameters, smaller and faster a model is.
    Raises ValueError for no models, for models without data, and for `repeats` below 1; TypeError for what is
    neither a Learner nor a model.
    """
    if not models or repeats < 1:
        raise ValueError(f"compare_models needs models and repeats >= 1, got {list(models)} and {repeats}")
    first = next((m for m in models.values() if _has_data(m)), None)
    learners = {name: _as_learner(name, m, dls, metrics, first) for name, m in models.items()}
    seconds, devices = _latencies(learners, device, repeats)
    rows = {}
    for name, learn in learners.items():
        params = sum(p.numel() for p in learn.model.parameters())
        rows[name] = {PARAMETERS: params, FILE: _file_size(learn.model) / 1e3, LATENCY: 1e3 * seconds[name]}
        rows[name] |= _metrics(learn)
    table = ModelTable.from_dict(rows, orient="index")
    table[PARAMETERS] = table[PARAMETERS].astype(int)
    for ratio, size in zip(RATIOS, SIZES, strict=True):
        table[ratio] = table[size].iloc[0] / table[size]
    table.attrs = {"device": " and ".join(dict.fromkeys(map(_device_name, devices))), "repeats": repeats}
    return table


def _as_learner(name: str, model: Any, dls: Any, metrics: Any, first: Learner | None) -> Learner:
    "The Learner itself; a plain model with the data and the metrics of the first Learner, if not given."
    if _has_data(model):
        return model
    kind = "a Learner without data, as `load_learner` gives it" if isinstance(model, Learner) else "a plain model"
    model = model.model if isinstance(model, Learner) else model
    if not isinstance(model, nn.Module):
        raise TypeError(f"models[{name!r}] must be a Learner or a model (nn.Module), got a {type(model).__name__}")
    if first is not None:
        dls = first.dls if dls is None else dls
        metrics = first.metrics if metrics is None else metrics
    if dls is None:
        raise ValueError(f"models[{name!r}] is {kind}: give dls= and metrics=, or a Learner with data beside it")
    return Learner(dls, model, loss_func=_no_loss, metrics=metrics)


def _has_data(model: Any) -> bool:
    "Is it a Learner whose dataloaders give batches? Those of a loaded one are empty; a stream has no length."
    loaders = model.dls.loaders if isinstance(model, Learner) else ()
    return any(length_hint(dl, 1) for dl in loaders)


def _no_loss(pred: Any, *yb: Any) -> Tensor:
    "The table shows no loss."
    return torch.zeros(())


def _latencies(learners: dict[str, Learner], device: Any, repeats: int) -> tuple[dict[str, float], list[torch.device]]:
    "Median seconds by name, in rounds over all models, so that a busy moment of the machine meets all of them."
    times: dict[str, list[float]] = {name: [] for name in learners}
    passes, devices = {}, []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, learn in learners.items():
            model, xb, at = _on_device(learn, device)
            stack.enter_context(evaluating(model))
            passes[name] = _timed(model, xb, at)
            devices.append(at)
        for i in range(min(ROUNDS, repeats)):
            for name, run in passes.items():
                for _ in range(WARM_UP):
                    run()
                times[name] += [run() for _ in range(i, repeats, ROUNDS)]
    return {name: median(seconds) for name, seconds in times.items()}, devices


def _on_device(learn: Learner, device: Any) -> tuple[nn.Module, tuple[Any, ...], torch.device]:
    "The model, or a copy on another device, and the inputs of one sample there."
    model = learn.model
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    at = here if device is None else torch.device(device)
    if at.type != here.type or at.index not in (None, here.index):
        model = deepcopy(model).to(at)
    return model, to_device(_sample(learn.dls), at), at


def _sample(dls: Any) -> tuple[Any, ...]:
    "Inputs of one sample, of the validation set if there is one; plain tensors, as fastai's types take time."
    loader = dls.valid if len(dls.loaders) > 1 and len(dls.valid) else dls.train
    with torch.random.fork_rng([]):  # a loader draws a seed for its workers
        batch = loader.one_batch() if hasattr(loader, "one_batch") else next(iter(loader))
    batch = (batch,) if isinstance(batch, Tensor) else batch
    inputs = tuple(batch)[: getattr(dls, "n_inp", max(1, len(batch) - 1))]
    return tuple(map_tensors(lambda x: x[:1].as_subclass(Tensor), inputs))


def _timed(model: nn.Module, xb: tuple[Any, ...], device: torch.device) -> Callable[[], float]:
    "A function that runs the model once and returns the seconds."
    wait = getattr(torch, device.type).synchronize

    def run() -> float:
        wait()
        start = time.perf_counter()
        model(*xb)
        wait()
        return time.perf_counter() - start

    return run


def _file_size(model: nn.Module) -> int:
    "Bytes of the state dict as `torch.save` writes it."
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.tell()


def _metrics(learn: Learner) -> dict[str, float]:
    "By name, on the validation set; the Learner's recorder keeps what it has."
    recorder = getattr(learn, "recorder", None)
    if recorder is None or not learn.metrics or len(learn.dls.loaders) < 2 or not len(learn.dls.valid):
        return {}
    kept = {name: list(getattr(recorder, name)) for name in ("values", "iters", "log") if hasattr(recorder, name)}
    with torch.random.fork_rng([]), evaluating(learn.model), learn.no_bar():
        values = learn.validate()[1:]
    for name, old in kept.items():
        setattr(recorder, name, old)
    return dict(zip(learn.metrics.attrgot("name"), map(float, values), strict=False))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type.upper()


def _text(column: str, value: float) -> str:
    if column in RATIOS:
        return f"{value:.1f}×" if value < 9.95 else f"{value:,.0f}×"
    if column in (PARAMETERS, FILE):
        return f"{value:,.0f}"
    if column == LATENCY:
        return f"{value:.2f}" if value < 10 else f"{value:,.1f}"
    return f"{value:.3f}" if value == value else "–"
