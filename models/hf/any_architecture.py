"""Any architecture of Hugging Face transformers as a network of ours, by the name of its class."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.reading.parse import clip
from configs.sections.families.hf import (
    INFINITE,
    CausalLanguageModel,
    ImageClassifier,
    LanguageModel,
    MaskedLanguageModel,
    SequenceToSequenceModel,
    TextClassifier,
    TransformersConfig,
    is_random,
)
from models.batch import Batch, Texts
from models.init import generator
from models.loss import IGNORE, LossOutput, nan_if_infinite

from .any_keys import keys_of

NO_ID = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Special tokens in a config, by default ids of the tokenizer that the architecture was published with."""
OWN_WINDOW = ("sliding_window", "local_attention", "attention_window")
"""Keys of configs whose attention would lose its window if it were given a mask."""
PROBE = 12
"""Tokens that `_probe` passes through a new network."""


class AnyArchitecture(nn.Module):
    """A network of transformers. Its parameters have the names that they have there, after `network.`"""

    def __init__(self, config: TransformersConfig):
        super().__init__()
        self.config = config
        self.network = new_network(config)
        self.pad = getattr(self.network.config, "pad_token_id", None)
        self.arguments = inspect.signature(self.network.forward).parameters

    def init_weights(self, seed: int) -> None:
        """The architecture's own initial weights, each part's a function of (seed, name) only.

        Raises:
            ConfigError: the network does not do what a task may rely on, see `_probe`.
        """
        from transformers import initialization

        with torch.random.fork_rng(devices=[]), torch.no_grad(), initialization.guard_torch_init_functions():
            for name, part, model in _parts("", self.network, self.network):
                torch.manual_seed(generator(name, seed).initial_seed())
                model._init_weights(part)
            self.network.tie_weights()
            self._probe()

    def set_activation_checkpointing(self, every: int) -> None:
        """Keep only the input of every k-th layer and recompute that layer in the backward pass. Raises ConfigError."""
        if not self.network.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.activation_checkpointing: {self.config.architecture} does not support it: set it to none"
            )
        how = {"use_reentrant": False, "preserve_rng_state": False}
        self.network.activation_checkpointing_enable(how, every_n_layers=every)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AnyArchitecture":
        """Tables that no checkpoint holds, such as rotary frequencies, stay in fp32, as in a network that transformers
        loads in bf16: rounded, they would move every position."""
        tables = [
            (part, name, part._buffers[name]) for part in self.modules() for name in part._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for part, name, before in tables:
            after = part._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                part._buffers[name] = before.to(after.device)
        return self

    def check(self, config: Config) -> None:
        """Raise ConfigError for what the run's other sections ask of this architecture and it does not have."""
        length, longest = config.train.seq_len, getattr(self.network.config, "max_position_embeddings", None)
        if isinstance(self.config, LanguageModel) and longest and longest < length:
            names = self.network.config.attribute_map
            key = names.get("max_position_embeddings", "max_position_embeddings")
            raise ConfigError(
                f"train.seq_len ({length}) is longer than model.config.{key} ({longest}): set train.seq_len={longest}, "
                f"or model.config.{key}={length}"
            )

    def _probe(self) -> None:
        """Try a new network on a tiny input: its training pass may draw no random numbers, which would depend on the
        process. Raises ConfigError."""
        self.network.train()
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(self._probed())
        if not torch.equal(*found):
            raise ConfigError(
                f"model.architecture={self.config.architecture} draws random numbers during training, which would "
                "depend on the process that handles an example: set the keys of model.config that cause this to 0"
            )

    def _probed(self) -> Tensor:
        raise NotImplementedError

    def _marked(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Tokens whose padding has the id by which some classes find where a text ends."""
        return ids_BT if self.pad is None else ids_BT.where(mask_BT, self.pad)

    def _without_padding(self, error: Exception) -> ConfigError:
        """What to raise where a class fails on padded texts."""
        if isinstance(error, ConfigError):
            return error
        return ConfigError(
            f"model.architecture={self.config.architecture} cannot read padded texts ({clip(error, 100)}): set "
            "model.config.pad_token_id to a token that no text has, such as the last of a model.vocab_size that is "
            "larger than the tokenizer's"
        )

    def _probe_tokens(self) -> Tensor:
        device = next(self.parameters()).device
        vocabulary = getattr(self.config, "vocab_size", None) or 1
        return (torch.arange(PROBE, device=device) * 7919 + 1)[None] % vocabulary


class AnyLanguageModel(AnyArchitecture):
    """From a `Batch` to a `LossOutput`; of experts in training also their weighted balancing loss."""

    config: CausalLanguageModel

    def __init__(self, config: TransformersConfig):
        super().__init__(config)
        routed = "output_router_logits" in self.arguments
        self.aux_weight = getattr(self.network.config, "router_aux_loss_coef", 0.0) if routed else 0.0
        self.keeps_documents_apart = "position_ids" in self.arguments
        """Documents packed into a sequence do not see each other, if their positions start again."""

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        if batch.document_ids is not None and not self.keeps_documents_apart:
            raise ConfigError(self._mixes_documents())
        routed = bool(self.training and self.aux_weight and not batch.input_ids.is_meta)
        found = self._passed(batch.input_ids, self._positions(batch), routed)
        labels = batch.labels.flatten()
        loss = F.cross_entropy(found.logits.float().flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
        output = LossOutput(nan_if_infinite(loss), (labels != IGNORE).sum())
        return (*output, self.aux_weight * found.aux_loss) if routed else output

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V], of the last document of each sequence: the text that is to be continued, after its padding."""
        documents, rows = batch.document_ids, []
        if documents is None or bool((documents == documents[:, -1:]).all()):
            return self._passed(batch.input_ids, self._positions(batch)).logits
        for ids, own in zip(batch.input_ids, documents == documents[:, -1:], strict=True):
            found = self._passed(ids[own][None], None).logits[0]
            rows.append(F.pad(found, (0, 0, len(ids) - len(found), 0)))
        return torch.stack(rows)

    def check(self, config: Config) -> None:
        if config.data.document_mask and not self.keeps_documents_apart:
            raise ConfigError(self._mixes_documents())
        super().check(config)

    def _mixes_documents(self) -> str:
        name = self.config.architecture
        return f"data.document_mask=true: {name} cannot keep the documents of a sequence apart: set it to false"

    def _positions(self, batch: Batch) -> Tensor | None:
        """They tell transformers where a document begins."""
        return batch.position_ids if self.keeps_documents_apart else None

    def _passed(
        self, ids: Tensor, positions: Tensor | None, routed: bool = False, visible: Tensor | None = None
    ) -> Any:
        given: dict[str, Any] = {"position_ids": positions, "output_router_logits": routed, "use_cache": False}
        if ids.is_meta and "position_ids" in self.arguments:  # a mask that transformers need not read positions for
            visible = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], device=ids.device)
        given["attention_mask"] = visible
        return self.network(ids, **{key: value for key, value in given.items() if key in self.arguments})

    def _probe(self) -> None:
        """Besides, a token may not change what is predicted before it; and may it in other documents?"""
        super()._probe()
        if not self._is_unchanged(PROBE - 3, slice(0, PROBE - 3), PROBE):
            raise ConfigError(
                f"model.architecture={self.config.architecture} sees the tokens that it should predict: set "
                "model.config.is_decoder=true if its config has that key, or another architecture"
            )
        middle = PROBE // 2
        self.keeps_documents_apart &= self._is_unchanged(middle - 1, slice(middle, PROBE), middle)

    def _is_unchanged(self, token: int, part: slice, document: int) -> bool:
        """Whether another token leaves the logits of a part of the sequence as they are.

        Args:
            document: tokens of each document.
        """
        ids = self._probe_tokens()
        changed = ids.clone()
        changed[0, token] = (ids[0, token] + 1) % (self.config.vocab_size or 1)
        places = torch.arange(PROBE, device=ids.device)[None]
        documents = places // document if self.keeps_documents_apart else None
        batches = (Batch(each, each, places % document, documents, places[:, 0]) for each in (ids, changed))
        one, other = (self._tried(each)[:, part].float() for each in batches)
        return torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.std()))

    def _tried(self, batch: Batch) -> Tensor:
        return self._passed(batch.input_ids, self._positions(batch)).logits

    def _probed(self) -> Tensor:
        return self._passed(self._probe_tokens(), None).logits


class AnyMaskedLanguageModel(AnyLanguageModel):
    """From a `Batch` to logits [B, T, V], or [B, K, V] of K places of each sequence."""

    config: MaskedLanguageModel  # type: ignore[assignment]

    def __init__(self, config: TransformersConfig):
        super().__init__(config)
        own = any(getattr(self.network.config, key, None) for key in OWN_WINDOW)
        self.keeps_documents_apart = "attention_mask" in self.arguments and not own

    def forward(self, batch: Batch, keys: Tensor | None = None, places_BK: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if batch.document_ids is not None and not self.keeps_documents_apart:
            raise ConfigError(self._mixes_documents())
        logits = self._tried(batch)
        return logits if places_BK is None else logits.gather(1, places_BK[..., None].expand(-1, -1, logits.shape[-1]))

    def _tried(self, batch: Batch) -> Tensor:
        visible, documents = None, batch.document_ids
        if documents is not None:
            dtype = next(self.parameters()).dtype
            hidden = (documents[:, None, :, None] != documents[:, None, None]).to(dtype)
            visible = hidden * torch.finfo(dtype).min
        return self._passed(batch.input_ids, batch.position_ids, visible=visible).logits

    def _probe(self) -> None:
        AnyArchitecture._probe(self)
        middle = PROBE // 2
        self.keeps_documents_apart &= self._is_unchanged(middle - 1, slice(middle, PROBE), middle)


class AnyImageClassifier(AnyArchitecture):
    """From images [B, C, H, W] in [-1, 1] to logits [B, outputs]."""

    config: ImageClassifier

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.network(images.to(next(self.parameters()).dtype)).logits

    def _probed(self) -> Tensor:
        size = getattr(self.network.config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        device = next(self.parameters()).device
        return self(torch.linspace(-1, 1, 2 * self.config.channels * height * width, device=device).view(
            2, self.config.channels, height, width
        ))  # fmt: skip


class AnyTextClassifier(AnyArchitecture):
    """From `Texts` to [B, outputs]."""

    config: TextClassifier

    def forward(self, texts: Texts, keys: Tensor | None = None) -> Tensor:
        mask = None if texts.mask.is_meta else texts.mask.long()  # whose values transformers would read
        return self.network(self._marked(*texts), attention_mask=mask).logits

    def _probe(self) -> None:
        """Besides, padding may not change what a text is found to be."""
        name = self.config.architecture
        if "attention_mask" not in self.arguments or self.network.config.is_encoder_decoder:
            raise ConfigError(f"model.architecture={name} takes no padded texts: set it to an encoder, or a decoder")
        try:
            super()._probe()
            half, whole = (self(Texts(self._probe_tokens()[:, :length], mask)) for length, mask in self._padding())
        except (ValueError, IndexError, TypeError) as error:
            raise self._without_padding(error) from None
        if not torch.allclose(half, whole, rtol=0, atol=1e-4 * max(float(whole.abs().max()), 1e-3)):
            raise ConfigError(f"model.architecture={name} mixes a text with its padding, so it cannot be trained")

    def _padding(self) -> list[tuple[int, Tensor]]:
        """Length and mask of one text, without padding and with."""
        some = torch.arange(PROBE, device=next(self.parameters()).device)[None] < PROBE // 2
        return [(PROBE // 2, some[:, : PROBE // 2]), (PROBE, some)]

    def _probed(self) -> Tensor:
        ids = self._probe_tokens().expand(2, -1)
        return self(Texts(ids, torch.ones_like(ids, dtype=torch.bool)))


class AnySequenceToSequence(AnyArchitecture):
    """From pairs to logits, as `models.sequence.encoder_decoder.encoder_decoder` says; experts in training also give
    their weighted losses."""

    config: SequenceToSequenceModel

    def __init__(self, config: TransformersConfig):
        super().__init__(config)
        weights = (getattr(self.network.config, f"router_{kind}_loss_coef", 0.0) for kind in ("z", "aux"))
        self.router_weights = tuple(weights) if "output_router_logits" in self.arguments else ()

    def forward(
        self, source_BS: Tensor, mask_BS: Tensor, target_BT: Tensor, keys: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        source_BS = self._marked(source_BS, mask_BS)
        given: dict[str, Any] = {"attention_mask": None if mask_BS.is_meta else mask_BS.long(), "use_cache": False}
        if not (self.training and any(self.router_weights) and not source_BS.is_meta):
            return self.network(source_BS, decoder_input_ids=target_BT, **given).logits
        found = self.network(source_BS, decoder_input_ids=target_BT, output_router_logits=True, **given)
        losses = list(zip(("z", "aux"), self.router_weights, strict=True))
        own = [w * getattr(found, f"{side}_{kind}_loss") for kind, w in losses for side in ("encoder", "decoder")]
        # Every process has a gradient of every expert, also of those that none of its tokens chose.
        return found.logits, sum(own) + 0.0 * sum(parameter.sum() for parameter in self.parameters())

    def begin(self, source_BS: Tensor, mask_BS: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """(mask, source as the decoder sees it, tokens so far)."""
        source_BS = self._marked(source_BS, mask_BS)
        memory = self.network.get_encoder()(source_BS, attention_mask=mask_BS.long()).last_hidden_state
        return mask_BS, memory, source_BS[:, :0]

    def step(self, tokens_B: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        from transformers.modeling_outputs import BaseModelOutput

        mask_BS, memory, before = state
        tokens = torch.cat([before, tokens_B[:, None]], 1)
        source = BaseModelOutput(memory)
        source.router_logits = None  # which Switch Transformers look up
        given = {"encoder_outputs": source, "attention_mask": mask_BS.long(), "use_cache": False}
        logits = self.network(decoder_input_ids=tokens, **given).logits
        return logits[:, -1], (mask_BS, memory, tokens)

    def _probe(self) -> None:
        """Besides, a token may not change what is predicted before it."""
        ids = self._probe_tokens()
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % (self.config.vocab_size or 1)
        try:
            super()._probe()
            self.eval()
            one, other = (self(ids, torch.ones_like(ids, dtype=torch.bool), each)[:, :-1] for each in (ids, changed))
            self.train()
        except (ValueError, IndexError, TypeError) as error:
            raise self._without_padding(error) from None
        if not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.std())):
            raise ConfigError(f"model.architecture={self.config.architecture} sees the tokens that it should predict")

    def _probed(self) -> Tensor:
        ids = self._probe_tokens()
        found = self(ids, torch.ones_like(ids, dtype=torch.bool), ids)
        return found[0] if isinstance(found, tuple) else found


def build_any(config: TransformersConfig) -> AnyArchitecture:
    """The network on the default device. Raises ConfigError."""
    kinds = {
        CausalLanguageModel: AnyLanguageModel,
        MaskedLanguageModel: AnyMaskedLanguageModel,
        ImageClassifier: AnyImageClassifier,
        TextClassifier: AnyTextClassifier,
        SequenceToSequenceModel: AnySequenceToSequence,
    }
    return kinds[type(config)](config)  # type: ignore[index]


def new_network(config: TransformersConfig) -> Any:
    """A `transformers.PreTrainedModel`. What its initial weights leave out is the same in every process.

    Raises:
        ConfigError: no such class, or its config cannot be built.
    """
    found = class_of(config)
    hf_config = config_of(config, found)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = found(hf_config)
            if (
                torch.get_default_device().type == "meta"
            ):  # elsewhere experts are looped over, by how many tokens they get
                network.set_experts_implementation("batched_mm")
            return network
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        # On meta a RuntimeError is of sizes below 0; elsewhere memory may have run out.
        if isinstance(error, RuntimeError) and torch.get_default_device().type != "meta":
            raise
        raise ConfigError(
            f"model.config: {config.architecture} cannot be built with these keys: {clip(error, 300)}"
        ) from None


def class_of(config: TransformersConfig) -> Any:
    """The class of the architecture, one that transformers itself lists for the task. Raises ConfigError."""
    import transformers
    from transformers.models.auto import modeling_auto

    listed: Any = {
        CausalLanguageModel: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MaskedLanguageModel: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        ImageClassifier: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        TextClassifier: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        SequenceToSequenceModel: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }[type(config)]  # type: ignore[index]
    names = {name for each in listed.values() for name in ((each,) if isinstance(each, str) else each)}
    found = getattr(transformers, config.architecture, None) if config.architecture in names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        near = difflib.get_close_matches(config.architecture, names, n=1)
        hint = f": did you mean {near[0]}?" if near and near[0] != config.architecture else ""
        lacks = "has no such class"
        if hasattr(transformers, config.architecture):
            lacks, hint = f"has it, but not among its classes for task={config.default_task}", ""
        raise ConfigError(
            f"model.architecture={config.architecture}: transformers {transformers.__version__} {lacks}{hint}"
        )
    inputs, what = ("pixel_values", "images") if isinstance(config, ImageClassifier) else ("input_ids", "tokens")
    if found.main_input_name != inputs:
        raise ConfigError(f"model.architecture={config.architecture} takes {found.main_input_name}, not {what}")
    return found


def config_of(config: TransformersConfig, found: Any) -> Any:
    """The `transformers.PreTrainedConfig` of a class, without dropout. Raises ConfigError."""
    kind, keys = found.config_class, {key: _decoded(value) for key, value in config.config.items()}
    known = keys_of(kind)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key model.config.{key}: {kind.__name__} has none of that name{hint}")
    if isinstance(config, LanguageModel):
        keys = {key: None for key in NO_ID if key in known} | keys | {"vocab_size": config.vocab_size}
        keys |= {"num_labels": config.outputs} if isinstance(config, TextClassifier) else {}
    elif isinstance(config, ImageClassifier):
        keys |= {"num_labels": config.outputs}
        if "num_channels" in known:
            keys["num_channels"] = config.channels
        elif config.channels != 3:
            raise ConfigError(f"model.channels={config.channels}: {config.architecture} takes images of 3 channels")
        if "image_size" in known and "image_size" not in keys:
            raise ConfigError("model.config.image_size is not set: set it to the height and width of the images")
    try:
        made = kind(**keys)
        _without_noise(made)
    except Exception as error:  # its checks raise errors of many kinds, one of them huggingface_hub's own
        raise ConfigError(f"model.config: {kind.__name__} refuses it: {clip(error, 300)}") from None
    return made


def _decoded(value: Any) -> Any:
    """A value of config.json, in which {"__float__": "Infinity"} stands for infinity."""
    if isinstance(value, dict):
        plain = {key: _decoded(each) for key, each in value.items()}
        return float(plain[INFINITE]) if plain.keys() == {INFINITE} else plain
    return [_decoded(each) for each in value] if isinstance(value, list | tuple) else value


def _without_noise(config: Any) -> None:
    for field in fields(config):
        value = getattr(config, field.name, None)
        if hasattr(value, "to_dict"):
            _without_noise(value)
        elif is_random(field.name) and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, field.name, 0.0)
        elif is_random(field.name) and isinstance(value, list | tuple):
            setattr(config, field.name, [0.0] * len(value))


def _parts(name: str, part: nn.Module, model: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, part, the model within the network that initialises it), inner parts first, as transformers does."""
    for key, child in part.named_children():
        yield from _parts(f"{name}.{key}", child, child if hasattr(child, "_init_weights") else model)
    yield name, part, model
