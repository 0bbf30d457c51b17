"""Masks, packing, formats and the Hugging Face interface of the language models."""

import pytest
import torch
from helpers import same
from reference_baselines import hydra_mixer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from decays import DECAY_INITS, decay_logits, start_exponents
from mlm.mixers import MIXERS, HydraAttention, SoftmaxAttention, context
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from models_lion import FEATURE_MAPS, LionAttention

RUNS = [("Attention", 1), ("RNN", 1), ("Chunk", 1), ("Chunk", 5), ("Chunk", 64)]
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
FORMS = {"paper": {}, "published": {"normalize": False, "feature_map": False},
         "pre-norm": {"norm": "pre"}}  # fmt: skip
# name -> for each sequence of a batch its runs: (document, tokens); document -1 is padding
LAYOUTS = {
    "one sequence": [[(0, 13)]],
    "right padding": [[(0, 13)], [(0, 6), (-1, 7)], [(0, 1), (-1, 12)]],
    "left padding": [[(-1, 5), (0, 8)], [(0, 13)], [(-1, 12), (0, 1)]],
    "both": [[(-1, 3), (0, 6), (-1, 4)]],
    "packed": [[(0, 5), (1, 1), (2, 7)], [(0, 6), (1, 7)]],
    "packed and padded": [[(-1, 2), (3, 4), (1, 5), (-1, 2)], [(7, 12), (-1, 1)]],
}


def masks(layout):
    """`valid` and `documents` of a layout, and the (row, slice) of every document."""
    rows = [[doc for doc, count in runs for _ in range(count)] for runs in layout]
    documents = torch.tensor(rows)
    places = []
    for row, runs in enumerate(layout):
        start = 0
        for doc, count in runs:
            if doc >= 0:
                places.append((row, slice(start, start + count)))
            start += count
    valid = None if (documents >= 0).all() else documents >= 0
    packed = any(len({doc for doc, _ in runs if doc >= 0}) > 1 for runs in layout)
    return valid, documents if packed else None, places


def small_model(mixer, **options):
    torch.manual_seed(0)
    model = LionBertForMaskedLM(LionBertConfig(mixer=mixer, **{**SMALL, **options})).eval()
    for parameter in model.parameters():  # gates, biases and norms away from their start
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def outputs_and_gradients(layer, x, places, dtype, together, **kwargs):
    """Outputs at the documents' tokens and gradients, from one call or one per document."""
    layer = layer.to(dtype)
    x = x.to(dtype).requires_grad_()
    if together:
        y = layer(x, **kwargs)
        outputs = [y[row, span] for row, span in places]
    else:
        outputs = [layer(x[row : row + 1, span])[0] for row, span in places]
    y = torch.cat(outputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", FEATURE_MAPS)
def test_formats_agree_under_masks(mask, layout, heads):
    valid, documents, places = masks(LAYOUTS[layout])
    torch.manual_seed(0)
    layer = LionAttention(8, heads, mask_type=mask, num_prefix_tokens=0).double()
    x = torch.randn(len(LAYOUTS[layout]), 13, 8, dtype=torch.float64)
    expected = outputs_and_gradients(layer, x, places, torch.float64, together=False)
    for format, size in RUNS:
        layer.set_format(format, size)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            actual = outputs_and_gradients(
                layer, x, places, dtype, together=True, valid=valid, documents=documents
            )
            for a, b in zip(actual, expected, strict=True):
                error = (a - b).abs().max() / b.abs().max().clamp(min=1)
                assert error < tolerance, f"{format} {size} {dtype}: {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hydra_keeps_padding_and_documents_apart(layout):
    """Outputs and gradients are those of the token-by-token definition, of each document alone."""
    valid, documents, places = masks(LAYOUTS[layout])
    torch.manual_seed(0)
    layer = HydraAttention(8, 2, state_size=4).double()
    x = torch.randn(len(LAYOUTS[layout]), 13, 8, dtype=torch.float64)
    expected = outputs_and_gradients(layer, x, places, torch.float64, together=False)
    defined = torch.cat([hydra_mixer(layer, x[row, span]) for row, span in places])
    assert torch.allclose(expected[0], defined, rtol=1e-10, atol=1e-10)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        actual = outputs_and_gradients(
            layer, x, places, dtype, together=True, valid=valid, documents=documents
        )
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).abs().max() / b.abs().max().clamp(min=1) < tolerance


@pytest.mark.parametrize("mask", FEATURE_MAPS)
@pytest.mark.parametrize("options", [{}, {"normalise": False, "feature_map": False}])
def test_padding_in_the_middle_counts_as_nothing(mask, options):
    torch.manual_seed(0)
    layer = LionAttention(8, 2, mask_type=mask, num_prefix_tokens=0, **options).double()
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    valid = torch.ones(1, 13, dtype=torch.bool)
    valid[:, 4:7] = False
    expected = layer(x[valid][None])
    for format, size in RUNS:
        layer.set_format(format, size)
        assert torch.allclose(layer(x, valid=valid)[valid][None], expected, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_padded_packed_and_alone_are_the_same(mixer, form):
    model = small_model(mixer, **FORMS[form])
    model.config.pad_token_id = None
    generator = torch.Generator().manual_seed(1)
    for layout in LAYOUTS.values():
        valid, documents, places = masks(layout)
        ids = torch.randint(50, (len(layout), 13), generator=generator)
        with torch.inference_mode():
            alone = [model(ids[row : row + 1, span]).logits[0] for row, span in places]
            for format, size in RUNS if mixer.startswith("lion") else RUNS[:1]:
                model.set_format(format, size)
                together = model(ids, attention_mask=valid, document_ids=documents).logits
                for (row, span), expected in zip(places, alone, strict=True):
                    error = (together[row, span] - expected).abs().max() / expected.abs().max()
                    assert error < 1e-6, f"{format} {size}: {error:.1e}"


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_stands_at_padding_changes_nothing(mixer):
    model = small_model(mixer)
    valid, documents, _ = masks(LAYOUTS["packed and padded"])
    for format, size in RUNS if mixer.startswith("lion") else RUNS[:1]:
        model.set_format(format, size)
        ids = torch.randint(50, valid.shape, generator=torch.Generator().manual_seed(1))
        before = model(ids, attention_mask=valid, document_ids=documents).logits
        after = model(
            torch.where(valid, ids, (ids + 7) % 50), attention_mask=valid, document_ids=documents
        ).logits
        assert before[valid].equal(after[valid])
        assert before.isfinite().all()


@pytest.mark.parametrize(
    "mixer", ["lion-d", "lion-s", "softmax", "softmax-rope", "softmax-alibi", "hydra"]
)
def test_every_output_depends_on_both_sides(mixer):
    model = small_model(mixer)
    ids = torch.arange(9)[None]
    base = model(ids).logits[0]
    for place in (0, 8):
        changed = ids.clone()
        changed[0, place] = 40
        assert (model(changed).logits[0] - base).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_save_and_load_through_the_auto_classes_is_bit_equal(mixer, norm, tmp_path):
    model = small_model(mixer, norm=norm, format="Chunk", chunk_size=4)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.head.decoder.weight is loaded.lion.embeddings.words.weight
    ids = torch.arange(20)[None]
    assert loaded(ids).logits.equal(model(ids).logits)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert same(encoder.state_dict(), model.lion.state_dict())
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert same(classifier.lion.state_dict(), model.lion.state_dict())
    assert classifier(ids).logits.shape == (1, 3)


def test_loss_is_that_of_the_labelled_tokens_alone():
    model = small_model("lion-s")
    ids = torch.arange(24).view(2, 12)
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 0], labels[1, 11] = 7, 8, 9
    result = model(ids, labels=labels, targets_only=True)
    logits = model(ids).logits[labels != -100]
    assert result.logits.shape == (3, 50)
    assert torch.allclose(result.logits, logits, atol=1e-5)
    losses = -logits.log_softmax(1)[torch.arange(3), torch.tensor([7, 8, 9])]
    assert result.loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    for only in (False, True):
        summed = model(ids, labels=labels, num_items_in_batch=12, targets_only=only).loss
        assert summed.item() == pytest.approx(losses.sum().item() / 12, rel=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns_with_and_without_checkpointing(mixer):
    gradients = []
    for checkpointing in (False, True):
        model = small_model(mixer, hidden_dropout_prob=0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.arange(24).view(2, 12)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_reads_the_first_token_that_is_not_padding(side, tmp_path):
    small_model("lion-s").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    ids = torch.arange(1, 8)[None]
    alone = model(ids, labels=torch.tensor([0.5]))
    assert alone.loss.item() == pytest.approx((alone.logits.item() - 0.5) ** 2, rel=1e-5)
    pads = (3, 0) if side == "left" else (0, 3)
    padded, mask = (torch.nn.functional.pad(t, pads) for t in (ids, torch.ones_like(ids)))
    assert torch.allclose(model(padded, mask).logits, alone.logits, atol=1e-6)


@pytest.mark.parametrize("mask_type", FEATURE_MAPS)
def test_published_form_is_the_bare_masked_product(mask_type):
    torch.manual_seed(0)
    layer = LionAttention(
        8, 2, mask_type=mask_type, num_prefix_tokens=0, normalise=False, feature_map=False
    ).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x)[0].view(6, 3, 2, 4).permute(1, 2, 0, 3)
    decay = {
        "Lit": lambda: torch.ones(2, 6),
        "Decay": lambda: layer.a_i.sigmoid()[:, None].expand(2, 6),
        "Selective": lambda: (1 - layer.a_i(x[0]).sigmoid()).T,
    }[mask_type]()
    mask = torch.ones(2, 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            between = slice(j, i) if i >= j else slice(i + 1, j + 1)
            mask[:, i, j] = decay[:, between].prod(1)
    mixed = (((q @ k.mT) / 2 * mask) @ v).transpose(0, 1).reshape(1, 6, 8)
    if mask_type == "Lit":
        mixed = torch.nn.functional.layer_norm(mixed, (8,))
    assert torch.allclose(layer(x), layer.proj(mixed))


def test_the_gates_start_as_the_paper_has_them():
    torch.manual_seed(0)
    config = LionBertConfig(mixer="lion-d", **{**SMALL, "hidden_size": 128, "num_hidden_layers": 8,
                            "num_attention_heads": 128})  # fmt: skip
    gates = torch.cat([layer.attn.a_i for layer in LionBertForMaskedLM(config).lion.layers])
    assert abs(gates.mean()) < 0.1
    assert abs(gates.std() - 1) < 0.1


@pytest.mark.parametrize("init", sorted({*DECAY_INITS} - {"paper"}))
@pytest.mark.parametrize("mixer", ["lion-d", "lion-s"])
def test_decays_start_as_on_the_vision_side(mixer, init, tmp_path):
    config = LionBertConfig(mixer=mixer, decay_init=init, **SMALL)
    torch.manual_seed(0)
    model = LionBertForMaskedLM(config)
    for number, layer in enumerate(model.lion.layers):
        exponents = start_exponents(init, 2, number, len(model.lion.layers))
        gate = layer.attn.a_i if mixer == "lion-d" else -layer.attn.a_i.bias
        torch.testing.assert_close(gate, decay_logits(exponents))
    for parameter in model.parameters():
        parameter.data += 0.1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.decay_init == init
    assert same(loaded.lion.state_dict(), model.lion.state_dict())


def test_hydra_starts_as_on_the_vision_side():
    model = LionBertForMaskedLM(LionBertConfig(mixer="hydra", **SMALL))
    for layer in model.lion.layers:
        steps = torch.nn.functional.softplus(layer.attn.dt_bias)
        assert (steps >= 9e-5).all()
        assert (steps <= 0.11).all()
        assert not layer.attn.A_log.any()
        assert (layer.attn.D == 1).all()
        assert layer.attn.in_proj.weight.std() < 0.03


def test_mixers_are_what_they_are_called():
    kinds = {name: type(build(LionBertConfig(**SMALL))) for name, build in MIXERS.items()}
    for name, kind in kinds.items():
        expected = {"softmax": SoftmaxAttention, "hydra": HydraAttention}
        assert kind is expected.get(name.partition("-")[0], LionAttention)


@pytest.mark.parametrize("mixer", ["softmax", "softmax-rope", "softmax-alibi"])
def test_softmax_is_its_definition(mixer):
    """Rotary embedding turns pairs as complex numbers; ALiBi takes slope x distance off."""
    model = small_model(mixer, hidden_size=24, num_attention_heads=3).double()
    layer, places = model.lion.layers[0].attn, torch.tensor([[0, 1, 2, 5, 6]])
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    told = context(model.config, None, None, places, torch.float64)
    q, k, v = layer.qkv(x)[0].view(5, 3, 3, 8).permute(1, 2, 0, 3)
    if mixer == "softmax-rope":
        angles = places[0][:, None] * 10_000 ** -(torch.arange(4) / 4)
        turn = torch.polar(torch.ones(5, 4, dtype=torch.float64), angles.double())
        q, k = (
            torch.cat([(p := torch.complex(*t.chunk(2, -1)) * turn).real, p.imag], -1)
            for t in (q, k)
        )
    scores = q @ k.mT / 8**0.5
    if mixer == "softmax-alibi":
        distance = (places[0][:, None] - places[0]).abs()
        scores -= torch.tensor([2 ** (-8 / 3), 2 ** (-16 / 3), 2**-8])[:, None, None] * distance
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 5, 24)
    assert torch.allclose(layer(x, **told), layer.proj(mixed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mixer", ["softmax", "softmax-rope", "softmax-alibi"])
def test_softmax_has_the_positions_that_it_is_given(mixer):
    model, ids = small_model(mixer), torch.arange(6)[None]
    expected = model(ids).logits
    for places, equal in ((torch.arange(6), True), (torch.arange(6) * 2, False)):
        logits = model(ids, position_ids=places[None]).logits
        assert torch.allclose(logits, expected, atol=1e-6) is equal


def test_a_bias_is_made_once_and_no_larger_than_needed(monkeypatch):
    model, ids, made = small_model("softmax-alibi"), torch.zeros(3, 9, dtype=torch.long), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, attn_mask, **kwargs):
        made.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    model(ids, document_ids=torch.arange(9).expand(3, 9) // 4)
    assert [m.shape for m in made] == [(1, 2, 9, 9)] * 2 + [(3, 2, 9, 9)] * 2
    assert [m.dtype for m in made] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert made[0] is made[1]
    assert made[2] is made[3]


@pytest.mark.parametrize("mixer", ["softmax", "lion-s"])
def test_pre_norm_blocks_are_their_definition(mixer):
    model = small_model(mixer, norm="pre")
    encoder, ids = model.lion, torch.arange(6)[None]
    x = encoder.embeddings(encoder.embeddings.words(ids), None, torch.arange(6)[None])
    for layer in encoder.layers:
        x = x + layer.attn(layer.norm1(x))
        x = x + layer.mlp(layer.norm2(x))
    assert torch.allclose(encoder(ids).last_hidden_state, encoder.norm(x), atol=1e-6)
    names = set(small_model(mixer).state_dict())
    assert set(model.state_dict()) - names == {"lion.norm.weight", "lion.norm.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "lion"}, "Unknown mixer 'lion': choose one of softmax, softmax-rope"),
        ({"decay_init": "short"}, "Unknown decay_init 'short': choose one of paper, multiscale"),
        ({"norm": "middle"}, "Unknown norm 'middle': choose one of post, pre"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, not -1"),
        ({"initializer_range": -1.0}, "initializer_range and layer_norm_eps must not be negative"),
        ({"format": "rnn"}, "Unknown format 'rnn': choose one of Attention, RNN, Chunk"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        LionBertConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 15}, "The width 15 is not divisible by 2 heads"),
        ({"hidden_size": 14, "mixer": "softmax-rope"}, "needs heads of an even width, not 7"),
    ],
)
def test_widths_that_heads_cannot_share(options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**{"mixer": "softmax", **options})


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 1, 1, 5), (1, 5), (2, 6)])
def test_a_mask_is_of_tokens_not_of_pairs(shape):
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, N\], \[2, 5\], which tells"):
        small_model("lion-s")(torch.zeros(2, 5, dtype=torch.long), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_sequences_and_sequences_of_no_tokens(mixer):
    model = small_model(mixer)
    assert model(torch.zeros(0, 65, dtype=torch.long)).logits.shape == (0, 65, 50)
    for shape in ((2, 0), (0, 0), (5,), (1, 2, 5)):
        with pytest.raises(ValueError, match=r"must be \[B, N\] of at least one token, not \["):
            model(torch.zeros(shape, dtype=torch.long))


def test_too_long_for_the_positions():
    with pytest.raises(ValueError, match="65 tokens are more than the 64 positions"):
        small_model("softmax")(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("mixer", ["softmax", "lion-lit"])
@pytest.mark.parametrize("what", ["document_ids", "attention_mask"])
def test_positions_count_what_is_in_a_document_and_no_padding(mixer, what):
    model, ids = small_model(mixer), torch.arange(40)[None]
    second = {"document_ids": 1, "attention_mask": 0}[what]
    marks = torch.full((1, 80), 1 - second)
    marks[:, 40:] = second
    logits = model(ids.repeat(1, 2), **{what: marks}).logits
    assert torch.allclose(logits[:, :40], model(ids).logits, atol=1e-5)
