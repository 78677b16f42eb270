"Maps, channels-last maps and tokens: how layers of transformers are read, and compared with those of other networks."

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, SIZE, Net, hooks, same, state
from torch import nn
from torch.testing import assert_close

from fasterai_kd import *
from fasterai_kd._layer_similarity import attention_maps, layer_features
from fasterai_kd.features import layout
from fasterai_kd.features.layout import Aligner, Layouts, is_channels_last, token_grid

works = pytest.mark.works
BLOCKS = ["blocks.0", "blocks.1"]


class Vit(nn.Module):
    "Four patches of 8x8 pixels behind `prefix` tokens of its own; `blocks.0` and `blocks.1` give tokens."

    def __init__(self, width=8, prefix=1, patch=8, head=True):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=True) for _ in "ab"])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES) if head else nn.Identity()

    def forward(self, x):
        x = torch.cat([self.prefix.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ChannelsLast(nn.Module):
    "`stage` gives (B, H, W, C), as in Swin."

    def __init__(self, width=8):
        super().__init__()
        self.patch, self.stage = nn.Conv2d(3, width, 4, 4), nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.stage(self.patch(x).movedim(1, -1)).mean((1, 2)))


def made(kind, **kwargs):
    torch.manual_seed(3)
    return kind(**kwargs).eval()


def as_tokens(x, prefix=1):
    "A map as tokens, behind others."
    return torch.cat([torch.randn(len(x), prefix, x.shape[1]), x.flatten(2).mT], 1)


def aligned(s, t, layer_s=None, layer_t=None, size=(16, 16), pool=True):
    "Of one pair of layers that return these."
    models = [nn.ModuleDict({"layer": nn.Identity() if layer is None else layer}) for layer in (layer_s, layer_t)]
    aligner = Aligner(*(Layouts(m, who) for m, who in zip(models, ("student", "teacher"), strict=True)), (size, size))
    found = aligner.align({"layer": s}, {"layer": t}, pool)
    return found["fm_s"]["layer"], found["fm_t"]["layer"]


# How many tokens come before those of the grid


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (197, (224, 224), ((14, 14), 1)),
        (198, (224, 224), ((14, 14), 2)),
        (201, (224, 224), ((14, 14), 5)),
        (196, (224, 224), ((14, 14), 0)),
        (49, (224, 224), ((7, 7), 0)),
        (50, (28, 28), ((7, 7), 1)),
        (17, (32, 32), ((4, 4), 1)),
        (25, (64, 96), ((4, 6), 1)),
        (101, (160, 160), ((10, 10), 1)),
        (3, (16, 16), None),
        (30, (16, 16), None),
        (150, (224, 224), None),
    ],
)
def test_tokens_lie_on_a_grid_of_the_images_proportions(n, size, expected):
    assert token_grid(n, size, nn.Identity()) == expected


def test_a_model_that_says_how_many_tokens_come_first_is_believed():
    vit = nn.Identity()
    assert token_grid(4 * 4 + 1, (32, 32), vit) == ((4, 4), 1)
    vit.num_prefix_tokens = 13
    assert token_grid(2 * 2 + 13, (32, 32), vit) == ((2, 2), 13)
    assert token_grid(16, (32, 32), vit) == ((4, 4), 0)  # before they are added


def test_registers_of_a_transformers_model_are_found_where_patches_do_not_divide_the_image():
    "DINOv2 with 4 registers: 128 pixels are 9 patches of 14."
    model = nn.Sequential(nn.Identity())
    model[0].config = SimpleNamespace(num_register_tokens=4)
    assert token_grid(9 * 9 + 5, (128, 128), nn.Identity()) != ((9, 9), 5)
    assert token_grid(9 * 9 + 5, (128, 128), model) == ((9, 9), 5)


# Where the channels are


@pytest.mark.parametrize(
    ("shape", "size", "last"),
    [
        ((2, 64, 7, 7), (224, 224), False),
        ((2, 7, 7, 64), (224, 224), True),
        ((2, 8, 4, 6), (64, 96), False),
        ((2, 4, 6, 16), (64, 96), True),
        ((2, 4, 6, 8), (64, 96), False),  # may be 6x8 too, rounded
        ((2, 8, 5, 9), (64, 96), False),  # a convolution without padding
        ((2, 8, 1, 1), (64, 64), False),
        ((2, 4, 4, 8), None, False),  # of no image
    ],
)
def test_channels_are_found_by_the_images_proportions(shape, size, last):
    assert is_channels_last(torch.zeros(shape), size, nn.Identity()) is last


@pytest.mark.parametrize(
    ("layer", "last"),
    [
        (nn.Conv2d(4, 4, 1), False),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)), False),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), True),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(4)), None),
        (nn.ReLU(), False),
    ],
    ids=["convolution", "with squeeze and excitation", "norm and linear", "both", "activation"],
)
def test_where_all_sizes_are_equal_the_layers_modules_tell(layer, last):
    assert is_channels_last(torch.zeros(2, 4, 4, 4), (16, 16), layer) is last


@pytest.mark.parametrize("shape", [(2, 40, 30, 23), (2, 4, 3, 5)], ids=["rounded", "without padding"])
def test_a_convolution_whose_channels_and_height_look_like_the_image_has_its_channels_first(shape):
    "EfficientNet-B0 gives 40 channels of 30x23 for images of 240x180, whose proportions are those of 40x30."
    layer = nn.Conv2d(8, shape[1], 1)
    assert is_channels_last(torch.zeros(shape), (240, 180), layer) is False
    assert is_channels_last(torch.zeros(2, 40, 30, 23), (240, 180), nn.Linear(8, 23)) is True


def test_where_nothing_tells_it_is_an_error_that_says_what_was_seen():
    layer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"layer 'layer' of the student gives \(2, 4, 4, 4\) for images of 16×16: are"):
        aligned(torch.randn(2, 4, 4, 4), torch.randn(2, 8, 4, 4), layer)


def test_tokens_that_are_no_grid_are_an_error_that_says_what_was_seen():
    with pytest.raises(
        ValueError, match=r"layer 'layer' of the teacher gives \(2, 30, 8\) for .* its 30 tokens are no"
    ):
        aligned(torch.randn(2, 8, 4, 4), torch.randn(2, 30, 8))


# One form


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("h", "w", "size"), [(4, 4, (16, 16)), (2, 3, (64, 96)), (3, 2, (96, 64))])
def test_tokens_become_the_map_that_they_were(h, w, size, prefix):
    x = torch.randn(2, 8, h, w)
    for s, t in (aligned(x, as_tokens(x, prefix), size=size), aligned(as_tokens(x, prefix), x, size=size)):
        assert torch.equal(s, x)
        assert torch.equal(t, x)


def test_a_map_with_channels_last_becomes_one_with_channels_first():
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(aligned(x.movedim(1, -1), x)[0], x)


def test_equally_many_tokens_are_compared_as_they_are_and_unequal_ones_as_maps():
    s, t = torch.randn(2, 17, 8), torch.randn(2, 17, 5)
    assert aligned(s, t) == (s, t)
    s, t = aligned(s, torch.randn(2, 18, 5))
    assert (s.shape, t.shape) == ((2, 8, 4, 4), (2, 5, 4, 4))


def test_positions_are_averaged_where_the_other_side_is_a_vector_without_the_tokens_before_them():
    x, vector = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    for features in (x, x.movedim(1, -1), as_tokens(x, 5)):
        s, t = aligned(features, vector)
        assert_close(s, x.mean((2, 3)))
        assert t is vector
    assert aligned(x, vector, pool=False) == (x, vector)


@pytest.mark.parametrize("loss", [Attention, FitNet, ActivationBoundaries, CWD])
def test_a_loss_between_a_map_and_itself_as_tokens_is_that_with_itself(loss):
    x = torch.randn(2, 8, 4, 4)
    for features in (as_tokens(x), as_tokens(x, 5), x.movedim(1, -1)):
        s, t = aligned(x, features)
        assert_close(loss({"s": s}, {"t": t}), loss({"s": x}, {"t": x}))
    assert Attention({"s": s}, {"t": t}).item() == pytest.approx(0, abs=1e-12)


def test_cosine_between_a_map_and_itself_as_tokens_is_0():
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    s, t = aligned(x, as_tokens(x).double())
    assert Cosine({"s": s}, {"t": t}).item() == pytest.approx(0, abs=1e-12)


# In a training


def ours(teacher, loss, student="layer2", of_teacher="blocks.1", **kwargs):
    return KnowledgeDistillationCallback(teacher, loss, student, of_teacher, **kwargs)


@works("tasks", "vision transformers and Swin as teachers of convolutional networks, and the other way round")
@pytest.mark.parametrize("loss", [Attention, FitNet, ActivationBoundaries, CWD, Cosine, Similarity, RKD, PKT])
@pytest.mark.parametrize(
    ("kind", "layer"), [(Vit, "blocks.1"), (ChannelsLast, "stage")], ids=["tokens", "channels last"]
)
@pytest.mark.parametrize("teaches", ["teacher", "student"])
def test_every_loss_on_layers_trains_across_layouts(make_learner, loss, kind, layer, teaches):
    other, net = made(kind), made(Net)
    student, teacher, names = (
        (net, other, ("layer1", layer)) if teaches == "teacher" else (other, net, (layer, "layer1"))
    )
    kd = KnowledgeDistillationCallback(teacher, loss, *names, weight=1.0, adapter=None if unequal(loss) else "auto")
    before = state(teacher)
    make_learner(student).fit(4, 0.01, cbs=kd)
    steps = kd.history["kd_loss"]
    assert sum(steps[-4:]) < sum(steps[:4])
    assert same(before, state(teacher))
    assert hooks(student) == hooks(teacher) == 0


def unequal(loss):
    return loss in (Attention, Similarity, RKD, PKT)


@pytest.mark.parametrize(("kind", "layer", "width"), [(Vit, "blocks.1", 12), (ChannelsLast, "stage", 6)])
def test_adapters_are_built_for_the_true_channels(make_learner, kind, layer, width):
    kd = ours(made(kind, width=width), FitNet, "layer2", layer, adapter="auto")
    make_learner().fit(1, 0.01, cbs=kd)
    (adapter,) = kd.adapters.values()
    assert adapter[0].weight.shape == (width, 8, 1, 1)


def test_the_value_in_a_fit_is_that_of_the_tokens_laid_out_by_hand(make_learner, dls):
    student, teacher = made(Net), made(Vit)
    kd = ours(teacher, Attention, "layer2", "blocks.1", weight=1.0)
    found = {}

    def keep(layer, args, output):
        found.setdefault(layer, output.detach().clone())

    handles = [layer.register_forward_hook(keep) for layer in (student.layer2, teacher.blocks[1])]
    make_learner(student).fit(1, 0.01, cbs=kd)
    for handle in handles:
        handle.remove()
    t = found[teacher.blocks[1]][:, 1:].mT.reshape(4, 8, 2, 2)
    expected = Attention({"s": found[student.layer2]}, {"t": t}).item()
    assert kd.history["kd_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_ones_own_gets_what_the_layers_return(make_learner):
    shapes = []

    def own(fm_s, fm_t, **kwargs):
        shapes.append((fm_s["layer2"].shape, fm_t["blocks.1"].shape))
        return fm_s["layer2"].mean()

    make_learner().fit(1, 0.01, cbs=ours(made(Vit), own))
    assert set(shapes) == {((4, 8, 4, 4), (4, 5, 8))}


def test_images_that_are_not_square_and_change_their_size_are_laid_out_each_time(make_learner):
    teacher = made(Vit, patch=4)
    kd = ours(Teacher(teacher, tfm=lambda x: x[..., :8]), Attention, "layer2", "blocks.1")
    make_learner().fit(1, 0.01, cbs=kd)  # 16×8: 4×2 tokens, beside the student's 4×4
    assert all(math.isfinite(k) for k in kd.history["kd_loss"])
    kd = ours(Teacher(teacher, tfm=lambda x: x[:, :, :8, :8]), Attention, "layer2", "blocks.1")
    make_learner(made(Net)).fit(1, 0.01, cbs=kd)
    assert all(math.isfinite(k) for k in kd.history["kd_loss"])


def test_stored_tokens_are_laid_out_as_fresh_ones(make_learner):
    histories = []
    for cache in (None, True):
        kd = ours(Teacher(made(Vit), cache=cache), Attention)
        make_learner(made(Net)).fit(3, 0.01, cbs=kd)
        histories.append(kd.history["kd_loss"])
    assert histories[0] == histories[1]


# The output as a layer


def test_output_names_what_the_model_returns(make_learner):
    student, teacher = made(Net), made(Net)
    kd = KnowledgeDistillationCallback(teacher, FitNet, "output", "output", weight=1.0)
    same_loss = KnowledgeDistillationCallback(teacher, Logits, weight=1.0)
    make_learner(student).fit(1, 0.01, cbs=kd)
    make_learner(made(Net)).fit(1, 0.01, cbs=same_loss)
    assert kd.history["kd_loss"] == pytest.approx(same_loss.history["kd_loss"], rel=1e-5)
    assert hooks(student) == 0


@works("tasks", "an encoder without a head as a teacher, by its embeddings")
def test_the_embedding_of_an_encoder_teaches_the_average_of_a_map(make_learner):
    student, teacher = made(Net), made(Vit, head=False, width=12)
    kd = ours(teacher, Cosine, "layer2", "output", adapter="auto", weight=1.0)
    make_learner(student).fit(6, 0.01, cbs=kd)
    steps = kd.history["kd_loss"]
    assert sum(steps[-4:]) < sum(steps[:4])
    (adapter,) = kd.adapters.values()
    assert adapter[0].weight.shape == (12, 8)


def test_a_layer_that_is_called_output_comes_first(make_learner):
    class Named(Net):
        def __init__(self):
            super().__init__()
            self.output = self.layer2

    kd = KnowledgeDistillationCallback(Named(), Attention, "layer2", "output")
    make_learner(Net()).fit(1, 0.01, cbs=kd)
    with pytest.raises(ValueError, match="Attention compares feature maps"):
        make_learner(Net()).fit(1, 0.01, cbs=KnowledgeDistillationCallback(Net(), Attention, "layer2", "output"))


class Encoder(nn.Module):
    "An encoder of images beside one of texts, as CLIP."

    def __init__(self):
        super().__init__()
        self.vision = made(Vit, head=False, width=6)

    def encode_image(self, x):
        return self.vision(x)

    def forward(self, image, text):
        raise AssertionError("needs a text")


@works("tasks", "a method of a model as a teacher, such as `clip.encode_image`")
@pytest.mark.parametrize("cache", [None, True])
def test_a_method_that_gives_embeddings_may_be_the_teacher(make_learner, cache):
    clip = Encoder()
    kd = ours(Teacher(clip.encode_image, cache=cache), Cosine, "layer2", "output", adapter="auto", weight=1.0)
    make_learner(made(Net)).fit(4, 0.01, cbs=kd)
    assert kd.teacher is clip
    assert sum(kd.history["kd_loss"][-4:]) < sum(kd.history["kd_loss"][:4])


def test_the_forward_of_a_model_stands_for_the_model():
    net = Net()
    assert Teacher(net.forward).method is None
    assert Teacher(net.forward).model is net


@pytest.mark.parametrize("kind", ["Dinov2Model", "CLIPVisionModelWithProjection", "ViTModel", "SwinModel"])
def test_encoders_of_transformers_teach_by_their_embeddings(make_learner, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    common = {"image_size": SIZE, "patch_size": 4, "num_channels": 3}
    configs = {
        "Dinov2Model": lambda: transformers.Dinov2Config(**small, **common),
        "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**small, **common, projection_dim=16),
        "ViTModel": lambda: transformers.ViTConfig(**small, **common),
        "SwinModel": lambda: transformers.SwinConfig(
            **common, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
    }
    torch.manual_seed(0)
    learn = make_learner(made(Net))
    kd = learn.distill(getattr(transformers, kind)(configs[kind]()), 2, 1e-2)
    assert kd.loss is Cosine
    assert (kd.activations_student, kd.activations_teacher) == (["layer2"], ["output"])
    (adapter,) = kd.adapters.values()
    assert adapter[0].weight.shape == (16, 8)


# A last batch of one sample


def test_an_adapter_with_batchnorm_takes_a_batch_of_one_sample(make_learner, dls):
    learn = make_learner(made(Net))
    dls.train.bs, learn.dls.train.n = 3, 16  # 16 = 5 · 3 + 1
    kd = ours(made(Vit, head=False, width=12), Cosine, "layer2", "output", adapter="auto", weight=1.0)
    learn.fit(1, 0.01, cbs=kd)
    assert len(kd.history["kd_loss"]) == 6
    assert all(torch.isfinite(p).all() for p in kd.adapters.parameters())


# Pictures


def test_attention_of_tokens_is_that_of_the_map_that_they_are():
    vit, x = made(Vit), torch.randn(2, 3, 16, 16)
    (maps,) = attention_maps(vit, ["blocks.1"], x, "teacher")
    (tokens,) = layer_features(vit, ["blocks.1"], x, "teacher")
    assert_close(maps, tokens[:, 1:].square().mean(2).view(2, 2, 2))


def test_a_layer_is_read_anew_for_images_of_another_size_and_only_then(monkeypatch):
    calls = []
    monkeypatch.setattr(layout, "token_grid", lambda *args: calls.append(args) or token_grid(*args))
    layouts, tokens = Layouts(nn.Sequential(nn.Linear(6, 6)), "student"), torch.zeros(2, 16, 6)
    grids = [layouts.of("0", tokens, size).grid for size in ((32, 32), (64, 16), (32, 32), (64, 16))]
    assert grids == [(4, 4), (8, 2)] * 2
    assert len(calls) == 2


def test_more_than_five_tokens_before_the_grid_are_not_believed():
    assert token_grid(64 + 5, (32, 32), nn.Module()) == ((8, 8), 5)
    assert token_grid(64 + 7, (32, 32), nn.Module()) is None


def test_a_layer_with_batch_norm_has_its_channels_first():
    layer = nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(8))
    assert is_channels_last(torch.zeros(2, 8, 8, 8), (32, 32), layer) is False
