"""The encoder: BERT's configuration, embeddings and blocks around a mixer."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from decays import DECAY_INITS
from mlm.card import LOADER, write_card
from mlm.fields import setting
from mlm.mixers import MIXERS, ORDER_BLIND, context, positions
from models_hydra import HydraMixer
from models_lion import FORMATS, LionAttention, check_choice
from state_space import draw_step_bias

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings", "type_vocab_size")  # fmt: skip


@strict
class LionBertConfig(PreTrainedConfig):
    """Sizes as in BERT, and the mixer.

    `position_embeddings` None is a learned one for the mixers that need it. `feature_map=False`
    and `normalize=False` is the form of the published models, True the paper's.
    """

    model_type = "lion"
    saved_classes = {"AutoConfig": "LionBertConfig"}  # by the Auto class that loads them

    mixer: str = setting(", ".join(MIXERS), "lion-s")
    format: str = setting("of LION: " + ", ".join(FORMATS), "Attention")
    chunk_size: int = setting("tokens of a chunk, in the format Chunk", 64)
    feature_map: bool = setting("of queries and keys; false in the published models", True)
    normalize: bool = setting("by the row sums; false in the published models", True)
    decay_init: str = setting("of LION's decays: " + ", ".join(DECAY_INITS), "paper")
    norm: str = setting("post (BERT's) or pre, where LayerNorm stands in a block", "post")
    position_embeddings: bool | None = setting("null: where the mixer needs them", None)
    vocab_size: int = setting("words; in mlm.pretrain those of the data", 30522)
    hidden_size: int = setting("width", 768)
    num_hidden_layers: int = setting("blocks", 12)
    num_attention_heads: int = setting("heads of the mixer", 12)
    intermediate_size: int = setting("width inside of an MLP", 3072)
    hidden_dropout_prob: float | int = setting("dropout of embeddings, mixers and MLPs", 0.1)
    max_position_embeddings: int = setting("tokens of a sequence, with position embeddings", 512)
    type_vocab_size: int = setting("segments that token_type_ids tell apart", 2)
    initializer_range: float = setting("standard deviation of new weights", 0.02)
    layer_norm_eps: float = setting("of every LayerNorm", 1e-12)
    pad_token_id: int | None = setting("in mlm.pretrain that of the data", 0)
    tie_word_embeddings: bool = setting("the decoder's weight is that of the words", True)

    def __post_init__(self, **kwargs: Any) -> None:
        for name, choices in (("mixer", MIXERS), ("format", FORMATS),
                              ("decay_init", DECAY_INITS), ("norm", BLOCKS)):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        for name in SIZES:
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {size}.")
        if self.initializer_range < 0 or self.layer_norm_eps < 0:
            raise ValueError("initializer_range and layer_norm_eps must not be negative.")
        if self.position_embeddings is None:
            self.position_embeddings = self.mixer in ORDER_BLIND
        super().__post_init__(**kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Adds what `from_pretrained(..., trust_remote_code=True)` needs, and a model card."""
        self.auto_map = {auto: f"{LOADER}.{name}" for auto, name in self.saved_classes.items()}
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        names = {name: auto for auto, name in self.saved_classes.items()}
        auto = names.get((self.architectures or [""])[0], "AutoModel")
        write_card(Path(save_directory), names, mixer=self.mixer, auto=auto)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the module that is saved imports the classes, no copy of them is saved."""


class LionBertEmbeddings(nn.Module):
    """Adds token types and, where the model has them, positions to words `[B, N, C]`."""

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

    def forward(self, words: Tensor, token_type_ids: Tensor | None, positions: Tensor) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(positions)
        x = words + self.types(token_type_ids)
        if self.positions is not None:
            known = self.positions.num_embeddings
            # Documents and padding may need fewer than there are tokens; to look makes a GPU wait.
            more = len(words) > 0 and words.shape[1] > known
            if more and (needed := int(positions.max()) + 1) > known:
                raise ValueError(
                    f"{needed} tokens are more than the {known} positions of the model: raise "
                    "max_position_embeddings."
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

    def forward(self, x: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
        """`[B, N, C]`, with what the `context` of the mixers is."""
        x = self.norm1(x + self.dropout(self.attn(x, **masks)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class PreNormLayer(LionBertLayer):
    """The same with LayerNorm before mixer and MLP, so that the residual path has none."""

    def forward(self, x: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), **masks))
        return x + self.dropout(self.mlp(self.norm2(x)))


BLOCKS = {"post": LionBertLayer, "pre": PreNormLayer}


class LionBertPreTrainedModel(PreTrainedModel):
    config_class = LionBertConfig
    base_model_prefix = "lion"
    supports_gradient_checkpointing = True
    _no_split_modules = [block.__name__ for block in BLOCKS.values()]

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
            bias, padding = getattr(module, "bias", None), getattr(module, "padding_idx", None)
            if bias is not None:
                initialization.zeros_(bias)
            if padding is not None:
                initialization.zeros_(module.weight[padding])
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, LionAttention) and module.mask_type == "Decay":
            initialization.normal_(cast(Tensor, module.a_i))
        elif isinstance(module, HydraMixer):
            initialization.copy_(module.dt_bias, draw_step_bias(module.heads))
            initialization.zeros_(module.A_log)
            initialization.ones_(module.D)


class LionBertModel(LionBertPreTrainedModel):
    """The encoder."""

    def __init__(self, config: LionBertConfig):
        super().__init__(config)
        self.embeddings = LionBertEmbeddings(config)
        block = BLOCKS[config.norm]
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        last = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm: nn.Module = last if config.norm == "pre" else nn.Identity()
        self.post_init()
        for number, layer in enumerate(self.layers):  # behind what _init_weights draws
            if isinstance(layer.attn, LionAttention):
                layer.attn.spread_decays(number, len(self.layers))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.words = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """`[B, N]` -> `last_hidden_state` `[B, N, C]`; with `output_hidden_states`, those of the
        embeddings and of every layer too, the last behind the final LayerNorm of pre-norm models.

        `inputs_embeds` `[B, N, C]` stand in the place of the words that `input_ids` number.
        `attention_mask` is 0 at padding; `document_ids` are integers, equal within a document.
        Positions count the tokens of a document, from 0, unless `position_ids` are given.
        Raises ValueError for both or none of ids and embeddings, for sequences without tokens, for
        a mask of another shape, and for `output_attentions`.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "These models have no attention weights to return: leave out output_attentions."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds: one of the two.")
        words = self.embeddings.words(input_ids) if inputs_embeds is None else inputs_embeds
        if words.dim() != 3 or words.shape[1] == 0:
            raise ValueError(
                f"Sequences must be [B, N] of at least one token, not {list(words.shape[:-1])}."
            )
        if attention_mask is not None and attention_mask.shape != words.shape[:2]:
            raise ValueError(
                f"attention_mask must be [B, N], {list(words.shape[:2])}, which tells padding, not "
                f"{list(attention_mask.shape)}: these models mask no pairs."
            )
        valid = None if attention_mask is None else attention_mask.bool()
        alike = valid is None and document_ids is None and position_ids is None
        if position_ids is None:
            counted = words.new_ones(words.shape[:2], dtype=torch.bool) if valid is None else valid
            position_ids = positions(counted, document_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(words, token_type_ids, position_ids)
        places = position_ids[:1] if alike else position_ids
        masks = context(self.config, valid, document_ids, places, _matrix_dtype(x))
        states = [x]
        for layer in self.layers:
            x = layer(x, masks)
            states = [*states, x] if output_hidden_states else [x]
        x = self.norm(x)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
        )


def _matrix_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of `x` are computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
