"""BERT-shaped encoders with LION or Hydra in place of attention, as Hugging Face models.

Importing this module registers them with the Auto classes. Shapes: `B` batch, `N` tokens, `C`
width. Every model takes padding (`attention_mask`, on either side) and packed documents
(`document_ids`): a sequence padded, packed with others or alone gives the same result.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from mlm.encoder import LionBertConfig, LionBertModel, LionBertPreTrainedModel
from mlm.mixers import MIXERS, HydraAttention, SoftmaxAttention  # noqa: F401


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str | None = "single_label_classification",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean loss of logits `[..., K]`, in float32, as the kind of problem has it.

    Cross-entropy of classes `[...]`, -100 for none; binary cross-entropy of K labels, or squared
    error of K values, `[..., K]`. Type None follows from the labels: one logit is a regression,
    integers are classes. The sum over labels is divided by their number, or by
    `num_items_in_batch`. Raises ValueError for labels of another shape.
    """
    logits, size = logits.float(), logits.shape[-1]
    if problem_type is None:
        several = "multi_label" if labels.is_floating_point() else "single_label"
        problem_type = "regression" if size == 1 else f"{several}_classification"
    single = problem_type == "single_label_classification"
    wanted = logits.shape[:-1] if single else logits.shape
    other = (*wanted, 1) if single else logits.shape[:-1] if size == 1 else wanted
    if labels.shape not in (wanted, other):
        raise ValueError(
            f"{problem_type} of {size} labels needs labels of shape {list(wanted)}, not "
            f"{list(labels.shape)}: check them, num_labels and problem_type."
        )
    labels = labels.reshape(wanted)
    if single:
        total = F.cross_entropy(logits.reshape(-1, size), labels.reshape(-1), reduction="sum")
        count: Tensor | int = (labels != -100).sum().clamp(min=1)
    else:
        regression = problem_type == "regression"
        loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits
        total, count = loss(logits, labels.float(), reduction="sum"), labels.numel()
    return total / (count if num_items_in_batch is None else num_items_in_batch)


def _num_labels(config: LionBertConfig) -> int:
    return cast(int, config.num_labels)  # transformers declares None, too, but sets it


class LionBertHead(LionBertPreTrainedModel):
    """An encoder with a head; a loss is the mean over labels, or over `num_items_in_batch`."""

    accepts_loss_kwargs = True  # tells the Trainer to hand over num_items_in_batch

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.lion = LionBertModel(config)


class LionBertMLMHead(nn.Module):
    """`[..., C]` -> logits `[..., V]`; the decoder's weight is that of the word embedding."""

    def __init__(self, config: LionBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class LionBertForMaskedLM(LionBertHead):
    _tied_weights_keys = {"head.decoder.weight": "lion.embeddings.words.weight"}

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.head = LionBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        targets_only: bool = False,  # no "label" in the name, by which the Trainer finds labels
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits `[B, N, V]`, and with `labels` `[B, N]`, -100 for none, the loss of the others.

        `targets_only` computes the logits `[M, V]` of the M labelled tokens alone.
        """
        encoded = self.lion(
            input_ids, attention_mask, token_type_ids, document_ids, position_ids, inputs_embeds,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        x = encoded.last_hidden_state
        if targets_only:
            if labels is None:
                raise ValueError("targets_only needs labels.")
            labelled = (labels != -100).nonzero(as_tuple=True)  # once, as the host waits for it
            x, labels = x[labelled], labels[labelled]
        logits, loss = self.head(x), None
        if labels is not None:
            loss = classification_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class LionBertForSequenceClassification(LionBertHead):
    """Reads the first token of a sequence."""

    def __init__(self, config: LionBertConfig, num_logits: int | None = None):
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_logits or _num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `[B, K]` of sequences `[B, N]`; `labels` as the problem_type has them."""
        encoded = self.lion(
            input_ids, attention_mask, token_type_ids, document_ids, position_ids, inputs_embeds,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        logits, loss = self._logits(encoded.last_hidden_state, attention_mask), None
        if labels is not None:
            kind = self.config.problem_type
            loss = classification_loss(logits, labels, kind, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )

    def _logits(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Of the first token that is no padding."""
        if attention_mask is None:
            x = x[:, 0]
        else:
            x = x[torch.arange(len(x), device=x.device), attention_mask.int().argmax(1)]
        return self.classifier(self.dropout(torch.tanh(self.pooler(x))))


class LionBertForMultipleChoice(LionBertForSequenceClassification):
    """Gives each choice, a sequence of its own, one logit."""

    def __init__(self, config: LionBertConfig):
        super().__init__(config, num_logits=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> MultipleChoiceModelOutput:
        """Logits `[B, K]` of the K choices `[B, K, N]`; `labels` `[B]` number the right ones."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("Give input_ids or inputs_embeds: one of the two.")
        choices = given.shape[1]
        flat = [
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, document_ids, position_ids,
                           inputs_embeds)
        ]  # fmt: skip
        encoded = self.lion(*flat, output_hidden_states, output_attentions, return_dict=True)
        logits, loss = self._logits(encoded.last_hidden_state, flat[1]).view(-1, choices), None
        if labels is not None:
            loss = classification_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states
        )


class LionBertForTokenClassification(LionBertHead):
    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, _num_labels(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput:
        """Logits `[B, N, K]`; `labels` `[B, N]` are -100 for none."""
        encoded = self.lion(
            input_ids, attention_mask, token_type_ids, document_ids, position_ids, inputs_embeds,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        logits, loss = self.classifier(self.dropout(encoded.last_hidden_state)), None
        if labels is not None:
            loss = classification_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class LionBertForQuestionAnswering(LionBertHead):
    """Finds the first and the last token of an answer."""

    accepts_loss_kwargs = False

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Logits `[B, N]` of both ends; with both positions `[B]`, the mean of their losses.

        Positions outside of the tokens are those of answers that were cut off: they do not count.
        """
        encoded = self.lion(
            input_ids, attention_mask, token_type_ids, document_ids, position_ids, inputs_embeds,
            output_hidden_states, output_attentions, return_dict=True,
        )  # fmt: skip
        start, end = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            count, losses = start.shape[1], []
            for logits, place in ((start, start_positions), (end, end_positions)):
                place = torch.where((place >= 0) & (place < count), place, -100)
                losses.append(classification_loss(logits, place))
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=encoded.hidden_states
        )


AUTO_CLASSES = {
    AutoModel: LionBertModel,
    AutoModelForMaskedLM: LionBertForMaskedLM,
    AutoModelForSequenceClassification: LionBertForSequenceClassification,
    AutoModelForTokenClassification: LionBertForTokenClassification,
    AutoModelForQuestionAnswering: LionBertForQuestionAnswering,
    AutoModelForMultipleChoice: LionBertForMultipleChoice,
}

AutoConfig.register(LionBertConfig.model_type, LionBertConfig)
for auto_class, model_class in AUTO_CLASSES.items():
    auto_class.register(LionBertConfig, model_class)
    LionBertConfig.saved_classes[auto_class.__name__] = model_class.__name__
