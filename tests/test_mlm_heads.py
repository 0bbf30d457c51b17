"""Heads of the language models: BERT's contract, losses, and what transformers does with them."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import same
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mlm.modeling import (
    AUTO_CLASSES,
    LionBertConfig,
    LionBertForMaskedLM,
    LionBertForMultipleChoice,
    LionBertForQuestionAnswering,
    LionBertForSequenceClassification,
    LionBertForTokenClassification,
    LionBertModel,
)
from mlm.vocabulary import WORDS, wordpiece

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "hidden_dropout_prob": 0.0}  # fmt: skip
IDS = torch.arange(24).view(4, 6) + 5
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 2 + [1] * 4, [1] * 6])
BERTS = {
    LionBertForSequenceClassification: BertForSequenceClassification,
    LionBertForTokenClassification: BertForTokenClassification,
    LionBertForQuestionAnswering: BertForQuestionAnswering,
    LionBertForMultipleChoice: BertForMultipleChoice,
}


def build(kind: type, **options: object):
    torch.manual_seed(0)
    return kind(LionBertConfig(**{**SIZES, **options})).eval()


def berts_loss(kind: type, logits: dict, labels: dict, **options: object) -> float:
    """What transformers' BERT says of these logits; its weights have no part in it."""
    model = BERTS[kind](BertConfig(**{**SIZES, **options}, attention_probs_dropout_prob=0.0)).eval()
    head = model.qa_outputs if kind is LionBertForQuestionAnswering else model.classifier
    output = torch.stack(tuple(logits.values()), -1) if len(logits) == 2 else logits["logits"]
    if kind is LionBertForMultipleChoice:
        output = output.reshape(-1, 1)
    head.forward = lambda _: output
    return model(**labels).loss.item()


# --------------------------------------------------------------------------------------- the loss

REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
PROBLEMS = {
    "multi-label": (3, MULTI, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0.0]])),
    "multi-label, untold": (3, None, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0.0]])),
    "three values": (3, REGRESSION, torch.linspace(-1, 2, 12).view(4, 3)),
    "one value": (1, None, torch.tensor([0.5, 1, -2, 3])),
    "one value, told": (1, REGRESSION, torch.tensor([0.5, 1, -2, 3])),
    "one value of integers": (1, None, torch.tensor([0, 1, 2, 3])),
    "classes": (3, None, torch.tensor([0, 2, 1, 1])),
    "classes, told": (3, SINGLE, torch.tensor([0, 2, 1, 1])),
    "classes, one ignored": (3, SINGLE, torch.tensor([0, -100, 1, 1])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_sequence_has_the_loss_of_its_problem(problem):
    count, kind, labels = PROBLEMS[problem]
    model = build(LionBertForSequenceClassification, num_labels=count, problem_type=kind)
    result = model(IDS, MASK, labels=labels)
    expected = berts_loss(type(model), {"logits": result.logits},
                          {"input_ids": IDS, "labels": labels}, num_labels=count,
                          problem_type=kind)  # fmt: skip
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert model.config.problem_type == kind


@pytest.mark.parametrize("problem", ["one value", "classes"])
def test_labels_in_a_column_are_no_other_labels(problem):
    count, kind, labels = PROBLEMS[problem]
    model = build(LionBertForSequenceClassification, num_labels=count, problem_type=kind)
    assert model(IDS, labels=labels[:, None]).loss.equal(model(IDS, labels=labels).loss)


@pytest.mark.parametrize(
    ("count", "kind", "labels", "message"),
    [
        (3, MULTI, torch.zeros(4), "of 3 labels needs labels of shape [4, 3], not [4]"),
        (3, MULTI, torch.zeros(3, 4), "needs labels of shape [4, 3], not [3, 4]"),
        (3, REGRESSION, torch.zeros(4, 1), "needs labels of shape [4, 3], not [4, 1]"),
        (3, SINGLE, torch.zeros(4, 3).long(), "needs labels of shape [4], not [4, 3]"),
        (1, None, torch.zeros(()), "regression of 1 labels needs labels of shape [4, 1], not []"),
        (1, None, torch.zeros(1), "needs labels of shape [4, 1], not [1]"),
    ],
    ids=str,
)
def test_labels_of_another_shape(count, kind, labels, message):
    model = build(LionBertForSequenceClassification, num_labels=count, problem_type=kind)
    pattern = f"{re.escape(message)}: check them, num_labels and problem_type"
    with pytest.raises(ValueError, match=pattern):
        model(IDS, labels=labels)


# ------------------------------------------------------------------------------------- the heads


def test_tokens_are_classified_as_bert_does():
    model = build(LionBertForTokenClassification, num_labels=3)
    labels = torch.where(MASK.bool(), IDS % 3, -100)
    result = model(IDS, MASK, labels=labels)
    assert result.logits.shape == (4, 6, 3)
    assert result.loss.item() == pytest.approx(
        F.cross_entropy(result.logits[MASK.bool()], labels[MASK.bool()]).item(), rel=1e-6
    )
    given = {"input_ids": IDS, "labels": labels}
    expected = berts_loss(type(model), {"logits": result.logits}, given, num_labels=3)
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)


def test_answers_are_found_as_bert_does():
    model = build(LionBertForQuestionAnswering)
    result = model(IDS, MASK)
    assert result.loss is None
    assert result.start_logits.shape == result.end_logits.shape == (4, 6)
    ends = {"start_positions": torch.tensor([1, 0, 6, 2]),
            "end_positions": torch.tensor([[3], [1], [9], [5]])}  # fmt: skip
    result = model(IDS, MASK, **ends)
    logits = {"start": result.start_logits, "end": result.end_logits}
    expected = berts_loss(type(model), logits, {"input_ids": IDS, **ends})
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)


def test_choices_without_any_input_are_refused():
    with pytest.raises(ValueError, match="Give input_ids or inputs_embeds: one of the two"):
        build(LionBertForMultipleChoice)(attention_mask=MASK.view(2, 2, 6))


def test_choices_are_sequences_of_their_own():
    model = build(LionBertForMultipleChoice)
    ids, mask = IDS.view(2, 2, 6), MASK.view(2, 2, 6)
    labels = torch.tensor([1, 0])
    result = model(ids, mask, labels=labels)
    assert result.logits.shape == (2, 2)
    assert torch.allclose(model(ids[:, :1], mask[:, :1]).logits, result.logits[:, :1], atol=1e-6)
    given = {"input_ids": ids, "labels": labels}
    expected = berts_loss(type(model), {"logits": result.logits}, given)
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForMultipleChoice,
                                  AutoModelForQuestionAnswering, AutoModelForTokenClassification,
                                  AutoModelForSequenceClassification])  # fmt: skip
def test_every_head_starts_from_an_encoder_and_learns(auto, tmp_path):
    build(LionBertForMaskedLM).save_pretrained(tmp_path / "encoder")
    model = auto.from_pretrained(tmp_path / "encoder")
    assert type(model) is AUTO_CLASSES[auto]
    assert same(model.lion.state_dict(), build(LionBertForMaskedLM).lion.state_dict())
    labels = torch.zeros(4).long()
    given = {AutoModelForMaskedLM: {"labels": IDS},
             AutoModelForTokenClassification: {"labels": IDS % 2},
             AutoModelForQuestionAnswering: {"start_positions": labels, "end_positions": labels},
             }.get(auto, {"labels": labels})  # fmt: skip
    ids = IDS.view(4, 2, 3) if auto is AutoModelForMultipleChoice else IDS
    model(ids, **given).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.save_pretrained(tmp_path / "head")
    assert same(auto.from_pretrained(tmp_path / "head").state_dict(), model.state_dict())


def test_pipelines_show_the_names_of_classes(tmp_path):
    words = {word: i for i, word in enumerate([*WORDS, "a", "b", "c"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=wordpiece(words), pad_token="[PAD]", mask_token="[MASK]",
        cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    )  # fmt: skip
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    for kind, task, key in (
        (LionBertForSequenceClassification, "text-classification", "label"),
        (LionBertForTokenClassification, "token-classification", "entity"),
    ):
        build(kind, **names).save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
        found = pipeline(task, model=str(tmp_path / task), device="cpu")("a b c")
        assert {entry[key] for entry in found} <= {"good", "bad"}
        assert found


# ----------------------------------------------------------------------- arguments of the encoder

KINDS = [kind for kind in AUTO_CLASSES.values() if kind is not LionBertForMultipleChoice]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_every_layer(kind):
    model = build(kind)
    assert model(IDS, MASK).hidden_states is None
    result = model(IDS, MASK, output_hidden_states=True)
    states = result.hidden_states
    assert [state.shape for state in states] == [(4, 6, 16)] * 3
    encoder = model if kind is LionBertModel else model.lion
    x, words = states[0], encoder.embeddings.words(IDS)
    place = torch.arange(6).expand(4, 6)
    assert x.equal(encoder.embeddings(words, None, place))
    told = {"valid": MASK.bool(), "documents": None}
    for layer, state in zip(encoder.layers, states[1:], strict=True):
        x = layer(x, told)
        assert torch.allclose(x, state, atol=1e-6)
    assert states[-1].equal(encoder(IDS, MASK).last_hidden_state)
    model.config.output_hidden_states = True
    assert len(model(IDS, MASK).hidden_states) == 3
    model.config.return_dict = False
    assert len(model(IDS, MASK)[-1]) == 3


def test_the_last_hidden_state_of_a_pre_norm_model_is_normed():
    model = build(LionBertModel, norm="pre")
    model.norm.weight.data += 1
    result = model(IDS, MASK, output_hidden_states=True)
    states = result.hidden_states
    assert len(states) == 3
    assert states[-1].equal(result.last_hidden_state)
    last = model.layers[-1](states[-2], {"valid": MASK.bool(), "documents": None})
    assert torch.allclose(model.norm(last), states[-1], atol=1e-6)
    assert not torch.allclose(last, states[-1], atol=0.1)


@pytest.mark.parametrize("mixer", ["softmax", "lion-s"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_stand_in_the_place_of_words(kind, mixer):
    model = build(kind, mixer=mixer)
    words = model.get_input_embeddings()(IDS)
    expected = model(IDS, MASK, return_dict=False)
    assert same(model(attention_mask=MASK, inputs_embeds=words, return_dict=False), expected)
    other = model(attention_mask=MASK, inputs_embeds=words + 0.1, return_dict=False)
    assert not same(other, expected)
    for given in ({}, {"input_ids": IDS, "inputs_embeds": words}):
        with pytest.raises(ValueError, match="Give input_ids or inputs_embeds: one of the two"):
            model(**given)


@pytest.mark.parametrize("kind", [*KINDS, LionBertForMultipleChoice])
def test_what_a_model_does_not_know_is_told(kind):
    model, ids = build(kind), IDS.view(2, 2, 6) if kind is LionBertForMultipleChoice else IDS
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        model(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="have no attention weights to return: leave out output_a"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_mask'"):
        model(ids, head_mask=None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not LionBertModel])
def test_heads_take_what_the_encoder_takes(kind):
    model = build(kind, mixer="softmax")
    expected = model(IDS, return_dict=False)
    documents = (torch.arange(6) > 2).long().expand(4, 6)
    for given in (
        {"document_ids": documents},
        {"position_ids": torch.arange(6).flip(0).expand(4, 6)},
        {"token_type_ids": documents},
    ):
        assert not same(model(IDS, **given, return_dict=False), expected)


# ------------------------------------------------------------------------------------ the Trainer


class Rows(Dataset):
    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def trainer(model, rows: Dataset, folder, compute_metrics=None, **options: object) -> Trainer:
    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, **options}
    arguments = TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_steps=1, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows,
                   compute_metrics=compute_metrics)  # fmt: skip


def a_step(model, rows: Dataset, folder, monkeypatch, **options: object) -> tuple[float, list]:
    """The loss that the Trainer logs, and the gradients that its optimiser is handed."""
    gradients = []
    step = torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        gradients.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        run = trainer(model, rows, folder, **options)
        run.train()
    return next(entry["loss"] for entry in run.state.log_history if "loss" in entry), gradients


LABELS = {
    "classes": (LionBertForSequenceClassification, 3, None, torch.arange(8) % 3),
    "multi-label": (LionBertForSequenceClassification, 3, None, torch.arange(24).view(8, 3) % 2.0),
    "three values": (LionBertForSequenceClassification, 3, REGRESSION, torch.randn(8, 3)),
    "value": (LionBertForSequenceClassification, 1, None, torch.randn(8)),
    "tokens": (LionBertForTokenClassification, 3, None,
               torch.arange(48).view(8, 6) % 3 - 100 * (torch.arange(48).view(8, 6) % 5 == 0)),
}  # fmt: skip
LABELS["tokens"][3][LABELS["tokens"][3] < 0] = -100


@pytest.mark.parametrize("name", LABELS)
def test_parts_of_a_batch_are_one_batch_for_the_trainer(name, tmp_path, monkeypatch):
    kind, count, problem, labels = LABELS[name]
    rows = Rows(input_ids=torch.arange(48).view(8, 6), labels=labels)
    results = []
    for size, parts in ((8, 1), (2, 4)):
        model = build(kind, num_labels=count, problem_type=problem)
        results.append(a_step(
            model, rows, tmp_path, monkeypatch, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        ))  # fmt: skip
    (loss, gradients), (other_loss, others) = results
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert max(g.abs().max() for g in gradients) > 1e-4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))
    expected = build(kind, num_labels=count, problem_type=problem).train()
    assert loss == pytest.approx(
        expected(rows.columns["input_ids"], labels=labels).loss.item(), rel=1e-4
    )


def test_answers_through_the_trainer_are_averaged_too(tmp_path, monkeypatch):
    ends = torch.arange(8) % 6
    rows = Rows(input_ids=torch.arange(48).view(8, 6), start_positions=ends, end_positions=ends)
    results = [
        a_step(build(LionBertForQuestionAnswering), rows, tmp_path, monkeypatch,
               per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        for size in (8, 2)
    ]  # fmt: skip
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)


def test_masked_models_are_evaluated_with_metrics(tmp_path):
    """Batches with other numbers of labelled tokens, of which the last one is smaller."""
    ids = torch.arange(30).view(5, 6)
    labels = torch.where(ids % 4 == 0, ids, -100)
    model = build(LionBertForMaskedLM)

    def metrics(predicted) -> dict[str, float]:
        assert predicted.predictions.shape == (5, 6, 50)
        asked = predicted.label_ids != -100
        hits = predicted.predictions.argmax(-1)[asked] == predicted.label_ids[asked]
        return {"accuracy": hits.mean()}

    rows = Rows(input_ids=ids, labels=labels)
    found = trainer(model, rows, tmp_path, metrics, per_device_eval_batch_size=2).evaluate()
    logits = model(ids).logits[labels != -100]
    expected = (logits.argmax(-1) == labels[labels != -100]).double().mean().item()
    assert found["eval_accuracy"] == pytest.approx(expected)


def test_masked_models_without_labelled_tokens():
    model = build(LionBertForMaskedLM)
    assert model(IDS, labels=torch.full_like(IDS, -100)).loss.item() == 0
    with pytest.raises(ValueError, match="targets_only needs labels"):
        model(IDS, targets_only=True)
