"examples/quantize.py, unmodified, for a few steps."

import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor

from fasterai_kd import KnowledgeDistillationCallback, SoftTarget

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401
    except (ImportError, AttributeError) as e:  # not installed, or made for a newer torch
        pytest.skip(f"torchao: {e}", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "examples" / "quantize.py"
ROWS = ["teacher, float", "student, float", "trained on"]
ROWS += [f"{bits} bits, {how}" for bits in (8, 4) for how in ("as it is", "QAT, labels", "QAT, teacher")]


@pytest.fixture(scope="module")
def quantize():
    with pytest.MonkeyPatch.context() as patch, inductor.patch(pre_grad_custom_pass=None):  # torchao's import sets it
        patch.syspath_prepend(SCRIPT.parent)
        yield SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="quantize"))


@pytest.fixture
def learn(quantize):
    return quantize.get_learner(6, 100, 320, seed=0)


@pytest.mark.slow
def test_the_table_has_every_student_and_int8_takes_less_than_half_the_bytes(quantize, capsys):
    quantize.main(["--seeds=1", "--epochs=1", "--draws=160"])
    table = re.findall(r"^(\w.*?) {2,}(\d+\.\d) +([\d,]+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in table] == ROWS
    assert all(0 <= float(acc) <= 100 for _, acc, _ in table)
    sizes = {name: int(size.replace(",", "")) for name, _, size in table}
    for bits in (8, 4):
        assert sizes[f"{bits} bits, QAT, teacher"] < sizes["student, float"] / 2


@pytest.mark.parametrize("bits", [8, 4])
def test_after_training_with_a_teacher_every_weight_is_int8_and_outputs_are_as_trained(quantize, learn, bits):
    teacher = quantize.cnn(8)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    kd = KnowledgeDistillationCallback(teacher, SoftTarget)
    weights = {p.shape for p in learn.model.parameters() if p.ndim > 1}
    fake = quantize.train(learn, 1, 5e-3, kd, quantize.prepare(learn.model, bits, qat=True))
    x, _ = learn.dls.valid.one_batch()
    trained = fake(x)
    graph = quantize.convert(fake)

    torch.testing.assert_close(graph(x), trained)
    state = graph.state_dict()
    int8 = [p for p in state.values() if p.dtype == torch.int8]
    assert {p.shape for p in int8} == weights
    assert len(int8) == 4
    assert all(p.ndim == 1 for p in state.values() if p.dtype != torch.int8)  # biases, scales, zero points
    top = 2 ** (bits - 1)
    assert min(p.min() for p in int8) >= -top
    assert max(p.max() for p in int8) in (top - 1, top - 2)
    ops = [str(node.target) for node in graph.graph.nodes]
    assert sum("dequantize_per_channel" in op for op in ops) == 4
    assert sum(".quantize_per_tensor" in op for op in ops) == 6  # inputs: of 3 convolutions, pooling, view, linear
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert len(kd.history["kd_loss"]) == 9


def test_validation_images_do_not_move_the_ranges(quantize, learn):
    graph = quantize.prepare(learn.model, 8, qat=True)
    x, _ = learn.dls.valid.one_batch()
    graph.train()
    graph(x)
    before = {name: b.clone() for name, b in graph.named_buffers() if name.endswith(("min_val", "max_val", "scale"))}
    graph.eval()
    graph(10 * x)
    assert before
    assert all(torch.equal(b, before[name]) for name, b in graph.named_buffers() if name in before)
    graph.train()
    graph(10 * x)
    assert not all(torch.equal(b, before[name]) for name, b in graph.named_buffers() if name in before)
