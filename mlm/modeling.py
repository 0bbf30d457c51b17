"""BERT-shaped encoders with LION or Hydra in place of attention, as Hugging Face models.

Importing this module registers them with the Auto classes. Shapes: `B` batch, `N` tokens, `C`
width. Every model takes padding (`attention_mask`, on either side) and packed documents
(`document_ids`): a sequence padded, packed with others or alone gives the same result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from models_hydra import HydraMixer
from models_lion import FORMATS, LionAttention
from state_space import draw_step_bias


class SoftmaxAttention(nn.Module):
    """BERT's mixer, through PyTorch's fused attention; same interface as `LionAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        mask = self._mask(valid, documents)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))

    @staticmethod
    def _mask(valid: Tensor | None, documents: Tensor | None) -> Tensor | None:
        """Which keys `[B, 1, N or 1, N]` each query sees; None is all."""
        mask = None if valid is None else valid[:, None, None]
        if documents is None:
            return mask
        together = (documents[:, :, None] == documents[:, None])[:, None]
        if mask is None:
            return together
        itself = torch.eye(documents.shape[1], dtype=torch.bool, device=documents.device)
        return together & mask | itself  # no softmax over nothing, even at padding


class HydraAttention(HydraMixer):
    """Hydra's mixer, to which every document is handed alone, in a row of its own."""

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        if valid is None and documents is None:
            return super().forward(x)
        if valid is None:
            valid = torch.ones_like(documents, dtype=torch.bool)
        column = positions(valid, documents)[valid]
        row = (column == 0).cumsum(0) - 1
        filled = valid.new_zeros(int((column == 0).sum()), x.shape[1])
        filled[row, column] = True
        rows = x.new_zeros(*filled.shape, x.shape[2])
        rows[row, column] = x[valid]
        mixed = super().forward(rows, valid=filled)
        y = mixed.new_zeros(x.shape)
        y[valid] = mixed[row, column]
        return y


def _lion(mask_type: str, config: "LionBertConfig") -> LionAttention:
    return LionAttention(
        config.hidden_size,
        config.num_attention_heads,
        mask_type=mask_type,
        format=config.format,
        chunk_size=config.chunk_size,
        num_prefix_tokens=0,
        normalise=config.normalize,
        feature_map=config.feature_map,
    )


# A mixer takes `(x, valid=, documents=)`, `[B, N, C]` with bool and integer `[B, N]`, or None.
MIXERS: dict[str, Callable[["LionBertConfig"], nn.Module]] = {
    "softmax": lambda config: SoftmaxAttention(config.hidden_size, config.num_attention_heads),
    "lion-lit": partial(_lion, "Lit"),
    "lion-d": partial(_lion, "Decay"),
    "lion-s": partial(_lion, "Selective"),
    "hydra": lambda config: HydraAttention(config.hidden_size, config.num_attention_heads),
}
ORDER_BLIND = ("softmax", "lion-lit")  # mixers that tell no position from another by themselves


@strict
class LionBertConfig(PreTrainedConfig):
    """Sizes as in BERT, and the mixer.

    `position_embeddings` None is a learned one for the mixers that need it. `feature_map=False`
    and `normalize=False` is the form of the published models, True the paper's.
    """

    model_type = "lion"

    mixer: str = "lion-s"
    format: str = "Attention"
    chunk_size: int = 64
    feature_map: bool = True
    normalize: bool = True
    position_embeddings: bool | None = None
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"Unknown mixer {self.mixer!r}: choose one of {', '.join(MIXERS)}.")
        if self.format not in FORMATS:
            raise ValueError(f"Unknown format {self.format!r}: choose one of {', '.join(FORMATS)}.")
        if self.position_embeddings is None:
            self.position_embeddings = self.mixer in ORDER_BLIND
        super().__post_init__(**kwargs)


class LionBertEmbeddings(nn.Module):
    """Words, token types and, where the model has them, positions: `[B, N]` -> `[B, N, C]`."""

    def __init__(self, config: LionBertConfig):
        super().__init__()
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.positions = None
        if config.position_embeddings:
            self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Tensor):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.words(input_ids) + self.types(token_type_ids)
        if self.positions is not None:
            if input_ids.shape[1] > self.positions.num_embeddings:
                raise ValueError(
                    f"{input_ids.shape[1]} tokens are more than the {self.positions.num_embeddings}"
                    " positions of the model: raise max_position_embeddings."
                )
            x = x + self.positions(positions)
        return self.dropout(self.norm(x))


class LionBertLayer(GradientCheckpointingLayer):
    """Post-norm block: mixer and MLP, each with dropout, residual and LayerNorm."""

    def __init__(self, config: LionBertConfig):
        super().__init__()
        self.attn = MIXERS[config.mixer](config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, valid: Tensor | None, documents: Tensor | None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, valid=valid, documents=documents)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class LionBertPreTrainedModel(PreTrainedModel):
    config_class = LionBertConfig
    base_model_prefix = "lion"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LionBertLayer"]

    def set_format(self, format: str, chunk_size: int | None = None) -> None:
        """Computes LION's function as `Attention`, `RNN` or `Chunk`; the others have one format."""
        for module in self.modules():
            if isinstance(module, LionAttention):
                module.set_format(format, chunk_size)
        self.config.format = format
        self.config.chunk_size = chunk_size or self.config.chunk_size

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            initialization.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                initialization.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, LionAttention) and module.mask_type == "Decay":
            initialization.normal_(module.a_i)
        elif isinstance(module, HydraMixer):
            initialization.copy_(module.dt_bias, draw_step_bias(module.heads))
            initialization.zeros_(module.A_log)
            initialization.ones_(module.D)


class LionBertModel(LionBertPreTrainedModel):
    """The encoder."""

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.embeddings = LionBertEmbeddings(config)
        self.layers = nn.ModuleList(LionBertLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.words = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """`[B, N]` -> `last_hidden_state` `[B, N, C]`.

        `attention_mask` is 0 at padding; `document_ids` are integers, equal within a document.
        Positions count the tokens of a document, from 0, unless `position_ids` are given.
        """
        valid = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            counted = torch.ones_like(input_ids) if valid is None else valid
            position_ids = positions(counted, document_ids)
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        for layer in self.layers:
            x = layer(x, valid, document_ids)
        return BaseModelOutput(last_hidden_state=x)


class LionBertMLMHead(nn.Module):
    """`[..., C]` -> logits `[..., V]`; the decoder's weight is that of the word embedding."""

    def __init__(self, config: LionBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class LionBertForMaskedLM(LionBertPreTrainedModel):
    _tied_weights_keys = {"head.decoder.weight": "lion.embeddings.words.weight"}

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.lion = LionBertModel(config)
        self.head = LionBertMLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits `[B, N, V]`; with `labels`, a loss and logits `[M, V]` of the M labelled tokens.

        `labels` `[B, N]` are -100 where nothing is to be predicted. The loss is the mean over the
        M tokens, or their sum divided by `num_items_in_batch`.
        """
        x = self.lion(
            input_ids, attention_mask, token_type_ids, document_ids, position_ids
        ).last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.head(x))
        asked = labels != -100
        logits = self.head(x[asked])
        loss = F.cross_entropy(logits.float(), labels[asked], reduction="sum")
        count = len(logits) if num_items_in_batch is None else num_items_in_batch
        return MaskedLMOutput(loss=loss / count, logits=logits)


class LionBertForSequenceClassification(LionBertPreTrainedModel):
    """Reads the first token; one label is a regression."""

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.lion = LionBertModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits `[B, K]` of sequences `[B, N]`; with `labels` `[B]`, the mean loss too."""
        x = self.lion(input_ids, attention_mask, token_type_ids).last_hidden_state
        if attention_mask is None:
            x = x[:, 0]
        else:
            x = x[torch.arange(len(x), device=x.device), attention_mask.int().argmax(1)]
        logits = self.classifier(self.dropout(torch.tanh(self.pooler(x))))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.float().squeeze(1), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def positions(valid: Tensor, documents: Tensor | None) -> Tensor:
    """Number of each token `[B, N]` in its document, padding not counted."""
    count = valid.cumsum(1) - valid.long()  # tokens before
    if documents is None:
        return count
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return count - (count * starts).cummax(1).values


AutoConfig.register("lion", LionBertConfig)
AutoModel.register(LionBertConfig, LionBertModel)
AutoModelForMaskedLM.register(LionBertConfig, LionBertForMaskedLM)
AutoModelForSequenceClassification.register(LionBertConfig, LionBertForSequenceClassification)
