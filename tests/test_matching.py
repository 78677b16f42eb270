"Which layers are paired, that the table tells the truth, and that the models are left as they were."

import copy
import math
import pickle
from collections import OrderedDict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torchvision.models as tv
from conftest import Net
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_body, create_head
from torch import nn

from fasterai_kd import (
    PKT,
    RKD,
    Attention,
    EMATeacher,
    FitNet,
    KnowledgeDistillationCallback,
    Similarity,
    Teacher,
    get_model_layers,
    get_module_by_name,
    match_feature_layers,
)
from fasterai_kd.losses._stages import _where

# As the guide of fasterai prints them
TABLE = """\
Student          Teacher
conv1        <-> 0.0
layer1       <-> 0.4
layer2       <-> 0.5
layer3       <-> 0.6
layer4       <-> 0"""
UNEQUAL = "Attention, PKT, RKD, Similarity"
STAGES = ["conv1", "layer1", "layer2", "layer3", "layer4"]
PAIRS = {"student": STAGES, "teacher": ["0.0", "0.4", "0.5", "0.6", "0"]}

# The layers that go with the last of STAGES
STAGES_OF = {
    "resnet34": STAGES,
    "mobilenet_v3_small": ["features.0", "features.1", "features.3", "features.8", "features"],
    "efficientnet_b0": ["features.1", "features.2", "features.3", "features.5", "features"],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{i}" for i in (1, 2, 3)), "trunk_output"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features"],
    "shufflenet_v2_x0_5": ["conv1", "maxpool", "stage2", "stage3", "conv5"],
    "densenet121": ["features.conv0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"],
    "timm/regnety_002": ["stem", "s1", "s2", "s3", "s4"],
    "timm/convnext_atto": ["stem", "stages.1", "stages.2", "stages"],
}


@cache
def model(arch):
    "A model with random weights, of torchvision or timm."
    torch.manual_seed(0)
    if arch.startswith("timm/"):
        return pytest.importorskip("timm").create_model(arch.removeprefix("timm/"), num_classes=2)
    return getattr(tv, arch)(weights=None, num_classes=2)


@pytest.fixture(scope="module")
def pairs():
    "Those of the guide: a vision_learner's resnet34 teaches torchvision's resnet18."
    teacher = nn.Sequential(create_body(tv.resnet34(weights=None), pretrained=False, cut=-2), create_head(512, 2))
    return match_feature_layers(model("resnet18"), teacher, torch.randn(1, 3, 224, 224))


def conv(c_in=3, c_out=3):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Run(nn.Module):
    "Layers that run in the order given, whatever the order in which they are registered."

    def __init__(self, order, **layers):
        super().__init__()
        self.order = order.split()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class Pools(nn.Module):
    "Maps of the sizes given, as layers `pools.0`, `pools.1`, ..."

    def __init__(self, *sizes):
        super().__init__()
        self.pools = nn.ModuleList([nn.AdaptiveAvgPool2d(size) for size in sizes])

    def forward(self, x):
        return [pool(x) for pool in self.pools]


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("this layer is broken")


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def chosen(net, x=IMAGE):
    "The layers of `net` that can be paired."
    found = match_feature_layers(net, net, x)
    assert found["student"] == found["teacher"]
    return found["student"]


# The pairs


def test_a_resnet34_of_vision_learner_and_a_resnet18_give_the_pairs_of_the_guide(pairs):
    assert pairs == PAIRS
    assert isinstance(pairs, dict)
    assert list(pairs) == ["student", "teacher"]


def test_pairs_print_the_table_of_the_guide_with_resolution_channels_and_losses(pairs):
    expected = TABLE.splitlines()
    lines = str(pairs).splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    more = [line[len(start) :].split(maxsplit=4) for line, start in zip(lines, expected, strict=True)]
    assert more[0] == ["resolution", "channels", "losses", "that", "fit"]
    sizes, widths = [112, 56, 28, 14, 7], [64, 64, 128, 256, 512]
    assert more[1:] == [[f"{n}x{n}", f"{c}", "<->", f"{c}", "all"] for n, c in zip(sizes, widths, strict=True)]


def test_pairs_can_be_edited_and_still_print(pairs):
    edited = copy.deepcopy(pairs)
    edited["student"] += ["layer1.0.conv1", "fc"]
    edited["teacher"] += ["0.4.0.conv1", "1.8"]
    rows, before = ([line.split() for line in str(p).splitlines()] for p in (edited, pairs))
    assert rows[: len(before)] == before
    assert rows[-1] == ["fc", "<->", "1.8"]


def test_pairs_of_unequal_resolution_named_by_hand_print_both_and_fit_losses_that_need_no_equal_shapes(pairs):
    edited = copy.deepcopy(pairs)
    edited["student"][:], edited["teacher"][:] = ["conv1", "layer1"], ["0.4", "0.5"]
    assert [line.split(maxsplit=9)[3:] for line in str(edited).splitlines()[1:-1]] == [
        ["112x112", "<->", "56x56", "64", "<->", "64", UNEQUAL],
        ["56x56", "<->", "28x28", "64", "<->", "128", UNEQUAL],
    ]
    assert str(edited).endswith("\nThe other losses fit unequal layers with adapter='auto'.")


def test_copies_and_pickles_of_pairs_are_equal_and_print_the_same(pairs):
    for other in (copy.copy(pairs), copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
        assert other == pairs
        assert str(other) == str(pairs)


@pytest.mark.parametrize("arch", STAGES_OF)
def test_pairs_across_architectures_are_the_stages_and_the_table_tells_the_truth(arch):
    x, nets = torch.randn(2, 3, 64, 64), (model("resnet18"), model(arch))
    pairs = match_feature_layers(*nets, x)
    assert pairs == {"student": STAGES[-len(STAGES_OF[arch]) :], "teacher": STAGES_OF[arch]}
    maps_s, maps_t = (features(net, names, x) for net, names in zip(nets, pairs.values(), strict=True))
    rows, footer = str(pairs).splitlines()[1:], "The other losses fit unequal layers with adapter='auto'."
    assert (footer == rows[-1]) is (UNEQUAL in str(pairs))
    for line, s, t in zip([row for row in rows if row != footer], *pairs.values(), strict=True):
        (_, c_s, *size_s), (_, c_t, *size_t) = maps_s[s].shape, maps_t[t].shape
        *columns, fit = line.split(maxsplit=7)
        assert size_s == size_t
        assert columns == [s, "<->", t, f"{size_s[0]}x{size_s[1]}", str(c_s), "<->", str(c_t)]
        assert fit == ("all" if c_s == c_t else UNEQUAL)
        for loss in (Attention, PKT, RKD, Similarity):
            assert loss({s: maps_s[s]}, {t: maps_t[t]}).isfinite()
        if fit == "all":
            assert FitNet({s: maps_s[s]}, {t: maps_t[t]}).isfinite()
        else:
            with pytest.raises(ValueError, match="FitNet needs features of one shape"):
                FitNet({s: maps_s[s]}, {t: maps_t[t]})


def features(net, names, x):
    net, found = copy.deepcopy(net).eval(), {}
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: found.update({name: out.clone()}))
    with torch.no_grad():
        net(x)
    return found


# The rule


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.ReLU6(), nn.BatchNorm2d(3), nn.Dropout(), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_activation_normalization_dropout_and_identity_are_never_chosen(layer):
    assert chosen(nn.Sequential(conv(), layer)) == ["0"]


@pytest.mark.parametrize(
    "head", [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Flatten(2), nn.Unflatten(1, (1, 3))], ids=str
)
def test_maps_of_one_pixel_and_outputs_that_are_no_maps_are_never_chosen(head):
    assert chosen(nn.Sequential(conv(), head)) == ["0"]


@pytest.mark.parametrize("order", ["a b", "b a"])
def test_of_equally_deep_layers_the_last_to_run_is_chosen_not_the_last_registered(order):
    assert chosen(Run(order, a=conv(), b=conv())) == [order[-1]]


def test_the_shallowest_layer_is_chosen_even_if_deeper_ones_run_later():
    block = nn.Sequential(conv(), nn.Sequential(nn.AdaptiveAvgPool2d(4), conv()))
    assert chosen(Run("top block", top=conv(), block=block)) == ["top", "block"]
    assert chosen(Run("block top", top=conv(), block=block)) == ["block.0", "top"]


def test_only_resolutions_of_both_are_paired_from_large_to_small():
    student, teacher = Pools(2, 4, 6, 8), Pools(8, 3, 2, 6)
    assert match_feature_layers(student, teacher, IMAGE) == {
        "student": ["pools.3", "pools.2", "pools.0"],
        "teacher": ["pools.0", "pools.3", "pools.2"],
    }


def test_maps_that_are_not_square_are_paired_from_large_to_small_in_one_order_whichever_runs_first():
    sizes = [(12, 12), (16, 1), (8, 2), (4, 4), (2, 8), (1, 16), (1, 6)]  # equal areas: the higher first
    student, teacher = Pools(*sizes[::-1]), Pools(*sizes[3:], *sizes[:3])
    pairs = match_feature_layers(student, teacher, IMAGE)
    assert pairs["student"] == [f"pools.{i}" for i in (6, 5, 4, 3, 2, 1, 0)]
    assert pairs["teacher"] == [f"pools.{i}" for i in (4, 5, 6, 0, 1, 2, 3)]
    assert [line.split()[3] for line in str(pairs).splitlines()[1:]] == [f"{h}x{w}" for h, w in sizes]


def test_images_that_are_not_square_give_the_same_pairs():
    wide = match_feature_layers(model("resnet18"), model("resnet34"), torch.randn(1, 3, 32, 96))
    high = match_feature_layers(model("resnet18"), model("resnet34"), torch.randn(1, 3, 96, 32))
    assert wide == high == {"student": STAGES, "teacher": STAGES}


# Without a match


def test_no_shared_resolution_is_an_error_that_lists_both_sides_and_says_what_to_do():
    expected = (
        r"no resolution is shared: the student's maps are 9x9 \(pools.0\), 4x3 \(pools.1\), "
        r"the teacher's 8x8 \(pools.0\), 3x4 \(pools.1\)\. Name layers by hand: Attention .* Similarity"
    )
    with pytest.raises(ValueError, match=expected):
        match_feature_layers(Pools(9, (4, 3), 1), Pools(8, (3, 4), 1), IMAGE)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), conv()], ids=["mlp", "a bare layer"])
def test_a_model_without_maps_in_it_is_an_error_that_says_none(net):
    with pytest.raises(ValueError, match=r"student's maps are none, the teacher's 9x9 \(pools.0\)\. Name layers"):
        match_feature_layers(net, Pools(9), IMAGE)
    with pytest.raises(ValueError, match=r"student's maps are 9x9 \(pools.0\), the teacher's none\. Name layers"):
        match_feature_layers(Pools(9), net, IMAGE)


# Transformers


def vit(depth=4, size=32, **kwargs):
    kwargs = {"img_size": size, "patch_size": 8, "depth": depth, "embed_dim": 24, "num_heads": 2, **kwargs}
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", **kwargs)


X32 = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [1, 3, 4, 6, 12])
def test_maps_pair_with_the_blocks_of_a_vision_transformer_that_are_relatively_as_deep(depth):
    pairs = match_feature_layers(model("resnet18"), vit(depth), X32)
    n = min(4, depth)  # at 32x32 the last stage has one pixel
    assert pairs["student"] == [STAGES[math.ceil(i * 4 / n) - 1] for i in range(1, n + 1)]
    assert pairs["teacher"] == [f"blocks.{math.ceil(i * depth / n) - 1}" for i in range(1, n + 1)]
    turned = match_feature_layers(vit(depth), model("resnet18"), X32)
    assert list(turned.values()) == list(pairs.values())[::-1]


def test_two_vision_transformers_pair_block_to_block():
    assert match_feature_layers(vit(4), vit(4), X32)["teacher"] == [f"blocks.{i}" for i in range(4)]
    assert match_feature_layers(vit(2), vit(6), X32) == {
        "student": ["blocks.0", "blocks.1"],
        "teacher": ["blocks.2", "blocks.5"],
    }


@pytest.mark.parametrize("kwargs", [{"patch_size": 4}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_patches_that_have_a_maps_resolution_and_tokens_before_them_change_nothing(kwargs):
    pairs = match_feature_layers(model("resnet18"), vit(4, **kwargs), X32)
    assert pairs == {"student": STAGES[:4], "teacher": [f"blocks.{i}" for i in range(4)]}
    assert not any("patch" in line for line in str(pairs).splitlines())


def test_the_table_shows_the_resolution_of_tokens():
    rows = match_feature_layers(model("resnet18"), vit(4), X32).rows
    assert [row.resolution for row in rows] == ["16x16 <-> 4x4", "8x8 <-> 4x4", "4x4", "2x2 <-> 4x4"]
    assert rows[2].channels == "128 <-> 24"


class Attends(nn.Module):
    "Tokens, behind attention weights and a table that no sample changes."

    def __init__(self):
        super().__init__()
        self.embed, self.softmax = nn.Conv2d(3, 4, 4, 4), nn.Softmax(-1)
        self.own_softmax, self.table = Rows(), Table()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        scores = x @ x.mT + self.table(x)
        x = self.softmax(scores[:, None]).squeeze(1) @ self.own_softmax(scores[:, None]).squeeze(1) @ x
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Rows(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, 16))

    def forward(self, x):
        return self.table.expand(len(x), -1, -1)


def test_attention_weights_and_tables_that_no_sample_changes_are_never_offered():
    assert chosen(Attends()) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16), torch.ones(8, 3, 16, 16), IMAGE[:1].repeat(4, 1, 1, 1)],
    ids=["one", "zeros", "ones", "repeated"],
)
def test_one_sample_is_compared_with_another_made_of_it_also_if_it_is_blank_or_repeated(x):
    assert chosen(Attends(), x) == ["blocks.0", "blocks.1"]


def squares(net, size=64):
    "The resolutions at which `net` can be paired with itself."
    return [row.resolution for row in match_feature_layers(net, net, torch.randn(2, 3, size, size)).rows]


def test_activations_within_blocks_with_channels_last_are_never_offered():
    swin = tv.SwinTransformer([4, 4], 24, [1, 1, 1, 1], [2, 2, 2, 2], [2, 2], num_classes=2)
    for net in (model("convnext_tiny"), model("timm/edgenext_xx_small"), swin):
        assert squares(net) == ["16x16", "8x8", "4x4", "2x2"]


def test_windows_and_grids_of_attention_are_no_maps():
    net = tv.MaxVit((64, 64), 16, 2, [16, 32, 64], [1, 1, 1], 16, 0.1, num_classes=2)
    assert squares(net) == ["32x32", "16x16", "8x8", "4x4"]
    assert squares(model("timm/mobilevitv2_050")) == ["32x32", "16x16", "8x8", "4x4", "2x2"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("twins_svt_small", {"depths": (1, 1, 1, 1)}),
        ("levit_128s", {"img_size": 64}),
        ("xcit_nano_12_p16_224", {"depth": 3}),
    ],
)
def test_an_embedding_of_several_layers_or_before_each_stage_is_never_offered(name, kwargs):
    net = pytest.importorskip("timm").create_model(name, num_classes=2, **kwargs)
    names = match_feature_layers(model("resnet18"), net, torch.randn(2, 3, 64, 64))["teacher"]
    assert all(name.startswith(("blocks.", "stages.")) for name in names)


def test_where_nothing_is_known_of_the_blocks_the_patch_embedding_is_not_offered_alone():
    net = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.Flatten(2), nn.Linear(16, 17), nn.Linear(17, 17))
    with pytest.raises(ValueError, match="the teacher's none"):
        match_feature_layers(model("resnet18"), net, X32)


# What may be given


def test_one_sample_without_a_batch_is_enough():
    assert chosen(model("resnet18"), torch.randn(3, 64, 64)) == STAGES


def test_images_of_fastai_work():
    assert chosen(model("resnet18"), TensorImage(torch.randn(1, 3, 64, 64))) == STAGES


def test_models_with_several_inputs_take_a_tuple():
    class Two(Run):
        def forward(self, x, n):
            return super().forward(x * n[:, None, None, None])

    assert chosen(Two("a b", a=conv(), b=nn.AvgPool2d(2)), (IMAGE, torch.ones(2))) == ["a", "b"]


def test_a_model_may_be_its_own_teacher_and_be_used_twice():
    net = Run("a b a", a=nn.AvgPool2d(2), b=conv())
    assert chosen(net) == chosen(net) == ["b", "a"]  # of a layer that runs twice the last map counts


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
    ],
)
def test_the_sample_goes_to_the_device_of_each_model(device):
    here, there = nn.Sequential(conv()), nn.Sequential(conv()).to(device)
    for models in ((here, there), (there, here), (there, there)):
        assert match_feature_layers(*models, IMAGE) == {"student": ["0"], "teacher": ["0"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sample_gets_the_precision_of_each_model(dtype):
    other = nn.Sequential(conv()).to(dtype)
    assert match_feature_layers(nn.Sequential(conv()), other, IMAGE) == {"student": ["0"], "teacher": ["0"]}


# The models


def test_models_run_in_evaluation_mode_without_a_graph():
    class Probe(nn.Module):
        def forward(self, x):
            self.seen = (self.training, torch.is_grad_enabled(), x.requires_grad)
            return x

    net = nn.Sequential(conv(), Probe()).train()
    chosen(net, IMAGE.clone().requires_grad_())
    assert net[1].seen == (False, False, False)


def test_a_batch_of_one_is_enough_for_batchnorm_of_vectors():
    net = nn.Sequential(conv(), nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    assert chosen(net, IMAGE[:1]) == ["0"]


@pytest.mark.parametrize("broken", [None, "student", "teacher"])
@pytest.mark.parametrize("training", [True, False])
def test_models_and_the_random_state_are_left_as_they_were_even_if_one_breaks(broken, training):
    nets = {}
    for who in ("student", "teacher"):
        layers = [conv(), nn.BatchNorm2d(3), nn.Dropout(), Broken() if who == broken else conv()]
        nets[who] = nn.Sequential(*layers).train(training)
        nets[who][1].train(not training)  # as with a frozen BatchNorm
        nets[who][0].requires_grad_(False).register_forward_hook(lambda *_: None)
    before = {who: snapshot(net) for who, net in nets.items()}
    random = torch.get_rng_state()
    if broken:
        with pytest.raises(RuntimeError, match="this layer is broken"):
            match_feature_layers(*nets.values(), IMAGE)
    else:
        assert match_feature_layers(*nets.values(), IMAGE) == {"student": ["3"], "teacher": ["3"]}
    assert {who: snapshot(net) for who, net in nets.items()} == before
    assert torch.equal(torch.get_rng_state(), random)


def snapshot(net):
    "Everything that a run in training mode, or hooks left behind, would change."
    modules = {
        name: (m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in net.named_modules()
    }
    params = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    return modules, params, {name: x.tolist() for name, x in net.state_dict().items()}


# Names


def nested():
    net = nn.Sequential(conv(), nn.Sequential(nn.ReLU(), nn.Dropout(0.25)))
    net.register_module("empty", None)
    return net


def test_get_model_layers_lists_all_layers_parents_first():
    assert get_model_layers(nested()) == ["0", "1", "1.0", "1.1"]


def test_get_model_layers_gives_representations_on_request():
    net = nested()
    layers = get_model_layers(net, get_layer_repr=True)
    assert list(layers) == get_model_layers(net)
    assert layers["1.1"] == "Dropout(p=0.25, inplace=False)"
    assert layers["1"] == repr(net[1])


def test_get_model_layers_lists_a_layer_under_each_of_its_names():
    net = nested()
    net.again = net[1]
    assert get_model_layers(net) == ["0", "1", "1.0", "1.1", "again", "again.0", "again.1"]


def test_get_module_by_name_finds_every_layer_that_get_model_layers_lists():
    net = model("resnet18")
    assert get_module_by_name(net, "layer1.0.conv1") is net.layer1[0].conv1
    found = [get_module_by_name(net, name) for name in get_model_layers(net)]
    assert found == [m for name, m in net.named_modules(remove_duplicate=False) if name]
    assert len(found) == 67


def test_get_module_by_name_looks_into_anything_that_holds_a_model():
    net = nested()
    assert get_module_by_name(SimpleNamespace(model=net), "model.1.0") is net[1][0]


@pytest.mark.parametrize("name", ["2", "1.2", "empty", "1.0.x.y", "", "."])
def test_get_module_by_name_gives_none_where_nothing_is(name):
    assert get_module_by_name(nested(), name) is None


def test_get_module_by_name_gives_what_is_there():
    net = Net()
    assert get_module_by_name(net, "layer1.0.weight") is net.layer1[0].weight
    assert get_module_by_name(net, "conv1.in_channels") == 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_have_pairs_that_the_callback_takes(make_learner, teacher, wrap):
    student = Net()
    x = torch.randn(1, 3, 16, 16)
    pairs = match_feature_layers(wrap(student), wrap(teacher), x)
    prefix = "module." if wrap is nn.DataParallel else "_orig_mod."
    assert pairs["student"] == [f"{prefix}{name}" for name in match_feature_layers(student, teacher, x)["student"]]
    for model in (student, wrap(student)):
        kd = KnowledgeDistillationCallback(wrap(teacher), Attention, pairs["student"], pairs["teacher"])
        learn = make_learner(model)
        if not isinstance(model, nn.DataParallel) or len(model.device_ids) < 2:
            learn.fit(1, 0.01, cbs=kd)
            assert all(k > 0 for k in kd.history["kd_loss"])


def test_representations_of_layers_come_in_an_ordered_dict():
    layers = get_model_layers(nested(), get_layer_repr=True)
    assert type(layers) is OrderedDict
    assert list(layers) == get_model_layers(nested())


def test_pairs_edited_on_one_side_still_show(pairs):
    edited = copy.deepcopy(pairs)
    edited["student"].pop()
    assert repr(edited) == repr(dict(edited))


def test_learners_may_stand_for_their_models(make_learner, dls):
    student, teacher = make_learner(), make_learner()
    assert match_feature_layers(student, teacher, dls.one_batch()[0]) == match_feature_layers(
        student.model, teacher.model, dls.one_batch()[0]
    )


def test_a_teacher_may_stand_for_its_model():
    nets = model("resnet18"), model("resnet34")
    x = torch.randn(1, 3, 64, 64)
    assert match_feature_layers(nets[0], Teacher(nets[1]), x) == match_feature_layers(*nets, x)


@pytest.mark.parametrize("kind", ["str", "Ensemble", "EMATeacher"])
def test_what_is_no_model_is_refused_by_its_type(kind):
    other = {"str": "resnet34", "Ensemble": Teacher([Net(), Net()]), "EMATeacher": EMATeacher()}[kind]
    with pytest.raises(TypeError, match=f"takes a model, a Learner or a Teacher of one model, got a {kind}"):
        match_feature_layers(Net(), other, IMAGE)


class OfDict(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(batch["image"])


def test_a_sample_may_be_a_dict():
    nets = model("resnet18"), model("resnet34")
    x = torch.randn(1, 3, 64, 64)
    expected = match_feature_layers(*nets, x)
    found = match_feature_layers(*map(OfDict, nets), {"image": x})
    assert found["student"] == ["net." * (name != "") + name for name in expected["student"]]


def test_a_whole_batch_with_labels_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"ResNet: .*sample_input is what the model is called with, without labels"):
        match_feature_layers(model("resnet18"), model("resnet34"), (torch.randn(1, 3, 64, 64), torch.tensor([0])))


@pytest.mark.parametrize(
    ("output", "is_feature"),
    [
        (torch.randn(2, 4, 16, 16), True),
        (torch.randn(8, 4, 16, 16), False),  # windows of both samples
        (torch.randn(2, 4, 16, 16).softmax(-1), False),
        (torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), False),
    ],
    ids=["a map", "windows", "attention weights", "a table"],
)
def test_only_what_differs_by_sample_and_has_one_entry_for_each_is_a_feature(output, is_feature):
    assert (_where(nn.Conv2d(4, 4, 1), output, (16, 16), nn.Identity()) is not None) == is_feature
