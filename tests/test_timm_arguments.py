"""Every argument and method of timm's VisionTransformer, on LION models and on timm's own.

Mixers that return zeros make both compute the same, so values can be compared.
"""

import copy
import inspect
import pickle
from functools import partial

import pytest
import timm
import torch
from timm.layers import GluMlp, PatchEmbed, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models_lion
from models_lion import LionAttention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3,
         "num_classes": 5}  # fmt: skip
LIONS_DEFAULTS = {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False,
                  "pos_embed": "none", "norm_layer": partial(nn.LayerNorm, eps=1e-6)}  # fmt: skip
LEARN = {"pos_embed": "learn"}


class ScaledPatches(PatchEmbed):
    def forward(self, x):
        return 2 * super().forward(x)


# What is tried, and who cannot have it
ARGUMENTS = [
    {},
    {"img_size": (24, 40)},
    {"img_size": (24, 40), **LEARN},
    {"patch_size": (8, 4)},
    {"in_chans": 1},
    {"num_classes": 0},
    {"num_classes": 0, "global_pool": ""},
    {"embed_dim": 48},
    {"depth": 1},
    {"num_heads": 2},
    {"mlp_ratio": 2.0},
    {"qkv_bias": False},
    {"proj_bias": False},
    {"scale_mlp_norm": True},
    {"init_values": 0.1},
    {"class_token": False},
    {"class_token": False, **LEARN},
    LEARN,
    {"pos_embed": "none"},
    {"no_embed_class": True},
    {"no_embed_class": True, **LEARN},
    {"no_embed_class": True, "img_size": (24, 40), "dynamic_img_size": True, **LEARN},
    {"reg_tokens": 3},
    {"reg_tokens": 2, "class_token": False, **LEARN},
    {"reg_tokens": 2, "no_embed_class": True, "global_pool": "token", **LEARN},
    {"pre_norm": True},
    {"final_norm": False},
    {"fc_norm": True},
    {"fc_norm": True, "global_pool": "token"},
    {"pool_include_prefix": False},
    {"pool_include_prefix": False, "reg_tokens": 2, "global_pool": "avgmax"},
    {"pool_include_prefix": False, "reg_tokens": 2, "global_pool": "map"},
    *({"global_pool": pool} for pool in ("avg", "avgmax", "max", "token", "map", "prr")),
    {"dynamic_img_size": True},
    {"dynamic_img_size": True, **LEARN},
    {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": (30, 35)},
    {"drop_rate": 0.3},
    {"pos_drop_rate": 0.3, **LEARN},
    {"patch_drop_rate": 0.5},
    {"patch_drop_rate": 0.5, "class_token": False, "reg_tokens": 1},
    {"proj_drop_rate": 0.3},
    {"drop_path_rate": 0.3},
    *({"weight_init": mode} for mode in ("skip", "reset", "jax", "jax_nlhb", "moco")),
    {"fix_init": True},
    {"embed_layer": ScaledPatches},
    {"embed_norm_layer": nn.LayerNorm},
    {"norm_layer": RmsNorm},
    {"norm_layer": "layernorm"},
    {"act_layer": "relu"},
    {"mlp_layer": GluMlp},
    {"device": "cpu"},
    {"dtype": torch.bfloat16},
]  # fmt: skip
REFUSED = [
    ({"qk_norm": True}, "LION has no qk_norm"),
    ({"scale_attn_norm": True}, "LION has no scale_attn_norm"),
    ({"attn_drop_rate": 0.1}, "LION has no attn_drop"),
    ({"attn_layer": "diff"}, "LION has no attn_layer"),
    ({"block_fn": nn.Identity}, "give no block_fn"),
    ({"pos_drop_rate": 0.1}, "add pos_emb=True"),
    ({"patch_drop_rate": 0.5, "order": "S"}, "leave patch_drop_rate at 0"),
    ({"patch_drop_rate": 1.0}, "give 0 or more, below 1"),
    ({"global_pool": "mean"}, "Unknown global_pool 'mean': choose one of avg, .*, ''"),
    ({"pos_embed": "sincos"}, "Unknown pos_embed 'sincos': choose one of learn, none"),
    ({"weight_init": "zeros"}, "Unknown weight_init 'zeros': choose one of '', skip"),
    ({"global_pool": "token", "class_token": False}, "There is no class token to read"),
    ({"cls_tok": True, "class_token": False}, "There is no class token to read"),
]
DISTILLED = pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])


def named(options):
    return " ".join(
        f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()
    )


def lion(distilled=False, **options):
    name = "lion_tiny_distilled_patch16_224" if distilled else "lion_tiny_patch16_224"
    return timm.create_model(name, **{**SMALL, "mask_type": "Selective", **options})


def pair(distilled, **options):
    """A LION model and timm's with the same weights and without mixing.

    timm's has the distillation token as its first register.
    """
    torch.manual_seed(0)
    model = lion(distilled, **options)
    registers = options.get("reg_tokens", 0) + distilled
    reference = VisionTransformer(**{**SMALL, **LIONS_DEFAULTS, **options, "reg_tokens": registers})
    with torch.no_grad():
        for parameter in reference.parameters():  # unlike those that are drawn so small or zero
            parameter.normal_(std=0.2)
        for block in reference.blocks:
            block.attn.proj.weight.zero_()
            if block.attn.proj.bias is not None:
                block.attn.proj.bias.zero_()
    state = reference.state_dict()
    if distilled:
        tokens = state.pop("reg_token").split((1, registers - 1), dim=1)
        state["dist_token"] = tokens[0]
        state |= {"reg_token": tokens[1]} if registers > 1 else {}
        state |= {name.replace("head", "head_dist", 1): -2 * weight
                  for name, weight in state.items() if name.startswith("head.")}  # fmt: skip
    gates = {name: p for name, p in model.state_dict().items() if ".a_i." in name}
    model.load_state_dict(state | gates)
    return model, reference


def expected_output(reference, x, distilled):
    tokens = reference.forward_features(x)
    if not distilled or not reference.global_pool:
        return reference.forward_head(tokens)
    place = int(reference.has_class_token)
    others = torch.cat([tokens[:, :place], tokens[:, place + 1 :]], dim=1)
    headless = copy.deepcopy(reference)
    headless.num_prefix_tokens -= 1
    distillation = reference.head_drop(reference.fc_norm(tokens[:, place]))
    if reference.num_classes:
        head = copy.deepcopy(reference.head)
        distillation = nn.functional.linear(distillation, -2 * head.weight, -2 * head.bias)
    return (headless.forward_head(others) + distillation) / 2


def images(model, batch=2, size=None):
    size = size or model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_chans, *size, generator=generator)
    return x.to(next(model.parameters()).dtype)


@DISTILLED
@pytest.mark.parametrize("options", ARGUMENTS, ids=named)
def test_arguments_mean_what_they_mean_in_timm(options, distilled):
    model, reference = (m.eval() for m in pair(distilled, **options))
    x = images(model)
    assert torch.equal(model.forward_features(x), reference.forward_features(x))
    assert torch.allclose(model(x), expected_output(reference, x, distilled), atol=1e-6)
    assert {name: getattr(model, name) for name in ("num_prefix_tokens", "num_features")} == {
        name: getattr(reference, name) for name in ("num_prefix_tokens", "num_features")
    }


@pytest.mark.parametrize(
    "options", [options for options in ARGUMENTS if any("drop" in name for name in options)],
    ids=named,
)  # fmt: skip
def test_dropping_in_training_is_that_of_timm(options):
    model, reference = (m.train() for m in pair(False, **options))
    outputs = []
    for m in (model, reference):
        torch.manual_seed(2)
        outputs.append(m(images(model)))
    assert torch.allclose(*outputs, atol=1e-6)
    assert not torch.allclose(outputs[0], model.eval()(images(model)), atol=1e-3)


def test_every_argument_is_tried():
    tried = {name for options in ARGUMENTS for name in options}
    tried |= {name for options, _ in REFUSED for name in options}
    assert set(inspect.signature(VisionTransformer).parameters) <= tried


@DISTILLED
@pytest.mark.parametrize("options, message", REFUSED)
def test_what_has_no_meaning_is_refused(options, message, distilled):
    with pytest.raises(ValueError, match=message):
        lion(distilled, **options)


def test_arguments_by_position_and_defaults_by_none():
    model = models_lion.LionVisionTransformer(32, 8, 1, 7, "max", 24, 1, 3, fc_norm=None)
    assert model.head.out_features == 7
    assert model.global_pool == "max"
    assert isinstance(model.fc_norm, nn.Identity)


@pytest.mark.parametrize("options", [{}, LEARN], ids=named)
def test_distilled_logits_are_of_pooled_tokens(options):
    with pytest.raises(ValueError, match="ask for num_classes=0"):
        lion(True, global_pool="", **options)
    model = lion(True, **options)
    with pytest.raises(ValueError, match="ask for num_classes=0"):
        model.reset_classifier(3, "")
    assert model(images(model)).shape == (2, 5)


def test_plain_logits_of_every_token():
    model, reference = pair(False, global_pool="")
    assert torch.allclose(model(images(model)), reference(images(model)), atol=1e-6)


# What can be asked of a model

OPTIONS = [
    {},
    {"class_token": False, "reg_tokens": 2, **LEARN},
    {"no_embed_class": True, "reg_tokens": 1, "fc_norm": True, **LEARN},
]  # fmt: skip


def resized(model):
    model.set_input_size((24, 40))
    return model(images(model))


def repatched(model):
    model.set_input_size((32, 64), patch_size=16)
    return model(images(model))


def pruned(model):
    kept = model.prune_intermediate_layers([0], prune_norm=True)
    return model.forward_intermediates(images(model), kept, intermediates_only=True)


def without_classes(model):
    model.reset_classifier(0, "max")
    return model(images(model))


def all_tokens(model):
    model.reset_classifier(0, "")
    return model(images(model))


METHODS = {
    "forward_intermediates": lambda m: m.forward_intermediates(images(m))[1],
    "with prefix": lambda m: m.forward_intermediates(
        images(m), [1], True, norm=True, output_fmt="NLC", intermediates_only=True
    ),
    "as a dict": lambda m: m.forward_intermediates(
        images(m), output_dict=True, return_prefix_tokens=True, stop_early=True
    ),
    "get_intermediate_layers": lambda m: m.get_intermediate_layers(images(m), 2, reshape=True),
    "set_input_size": resized,
    "patch_size": repatched,
    "prune_intermediate_layers": pruned,
    "reset_classifier": without_classes,
    "all_tokens": all_tokens,
    "deepcopy": lambda m: copy.deepcopy(m).forward_features(images(m)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).forward_features(images(m)),
}  # fmt: skip


@DISTILLED
@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_those_of_timm(method, options, distilled):
    model, reference = (m.eval() for m in pair(distilled, **options))
    if distilled and method in ("set_input_size", "patch_size", "reset_classifier"):
        for m in (model, reference):
            METHODS[method](m)
        actual, expected = model(images(model)), expected_output(reference, images(model), True)
    else:
        actual, expected = METHODS[method](model), METHODS[method](reference)
    assert torch.utils._pytree.tree_structure(actual) == torch.utils._pytree.tree_structure(
        expected
    )
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@DISTILLED
def test_features_only(distilled):
    features = lion(distilled, order="S", features_only=True, out_indices=(0, 1))
    assert [f.shape for f in features(torch.randn(2, 3, 32, 32))] == [(2, 24, 4, 4)] * 2
    compiled = torch.compile(features, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), features(x))


@DISTILLED
def test_checkpointed_blocks_with_tokens_of_every_kind(distilled):
    model = lion(distilled, order="S", reg_tokens=2, class_token=False)
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    for m in (model, saving):
        m(images(model)).square().sum().backward()
    for plain, saved in zip(model.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(plain.grad, saved.grad, atol=1e-6)


@DISTILLED
@pytest.mark.parametrize("class_token, registers", [(True, 0), (False, 0), (True, 3), (False, 2)])
def test_the_decay_of_prefix_tokens_alone_is_one(class_token, registers, distilled):
    model = lion(distilled, class_token=class_token, reg_tokens=registers, order="S")
    prefix = class_token + registers + distilled
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(model))
    attn = model.blocks[1].attn
    decay = attn.log_decay(model.blocks[1].norm1(seen[0]))
    assert decay.shape[-1] == prefix + 16 == model.curves.shape[1]
    assert not decay[..., :prefix].any()
    assert (decay[..., prefix:] < 0).all()
    assert model.curves[:, :prefix].tolist() == [list(range(prefix))] * 2


@pytest.mark.parametrize("mask", models_lion.FEATURE_MAPS)
def test_patches_that_are_kept_keep_their_order(mask):
    model = lion(mask_type=mask, patch_drop_rate=0.5, class_token=False, depth=1).train()
    dropped = []
    model.patch_drop.register_forward_hook(
        lambda _, inputs, output: dropped.append((inputs, output))
    )
    model(images(model, 8))
    (((tokens,), kept),) = dropped
    positions = (kept[:, :, None] == tokens[:, None]).all(-1).int().argmax(-1)
    assert kept.shape == (8, 8, 24)
    assert (positions.diff() > 0).all()


@DISTILLED
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m(x, attn_mask=torch.ones(17, 17, dtype=torch.bool)),
        lambda m, x: m(x, is_causal=True),
        lambda m, x: m.forward_features(x, torch.zeros(17, 17)),
        lambda m, x: m.forward_intermediates(x, is_causal=True),
        lambda m, x: m.get_intermediate_layers(x, attn_mask=torch.zeros(17, 17)),
    ],
)
def test_masks_of_attention_are_refused(call, distilled):
    model = lion(distilled)
    with pytest.raises(ValueError, match="give no attn_mask and no is_causal"):
        call(model, images(model))


def test_a_causal_mixer_is_refused():
    with pytest.raises(ValueError, match="leave is_causal at False"):
        LionAttention(8, 2)(torch.zeros(1, 3, 8), is_causal=True)
