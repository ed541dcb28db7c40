"""LLaVA-OneVision: a SigLIP tower, a two-layer projector with bilinear pooling, a Qwen2 decoder.

Two formats are read, Hugging Face's (llava-hf) and lmms-lab's; the graphs are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tango_export.checkpoint import Checkpoint, Rename, read_json
from tango_export.families.base import Family, Model, Preset
from tango_export.families.llava_ov_reference import LlavaOvReference
from tango_export.graphs import Graph, Weights
from tango_export.modules.layers import Linear
from tango_export.modules.projector import Pool, Projector, pooled_side
from tango_export.modules.qwen2 import Decoder, Qwen2Config
from tango_export.modules.siglip import Salience, SiglipConfig, Tower, fold_probe
from tango_export.tokenizer import read_chat_template, read_tokenizer, stop_ids, vocabulary_size
from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import DecoderSpec, DType, TensorSpec
from tango_runtime.progress import note

_SIGLIP = "google/siglip-so400m-patch14-384"

#: SigLIP's: a pixel becomes (x / 255 − 0.5) / 0.5.
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5

#: llava-hf's template as it is on the hub, for a checkpoint that was saved without one.
HF_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: lmms-lab's conversation `qwen_1_5`; one <image> stands for the whole video.
QWEN_1_5_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for content in message['content'] if content['type'] == 'video' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: Names on disk, in any layout, → canonical names; the first rule that matches. None leaves a tensor out.
_LLAVA_RULES = [
    (r".*(\.inv_freq|\.position_ids)$", None),
    (r"(model\.)?(language_model\.)?lm_head\.", "head."),
    (r"(model\.)?language_model\.(model\.)?", "decoder."),
    (r"(model\.)?multi_modal_projector\.", "projector."),
    (r"model\.mm_projector\.0\.", "projector.linear_1."),
    (r"model\.mm_projector\.2\.", "projector.linear_2."),
    (r"(model\.)?image_newline$", "newline"),
    (r".*vision_tower\..*\bhead\.", None),  # a tower saved with a pooling head: the salience takes SigLIP's own
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "tower."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "decoder."),
]
_SIGLIP_RULES = [
    (r"(vision_model\.)?head\.", "head."),
    (r".*", None),
]


@dataclass(frozen=True)
class LlavaOvConfig:
    """What config.json says that matters here.

    Attributes:
        vision: The tower; ``num_hidden_layers`` counts the layers that LLaVA keeps.
        text: The decoder.
        tied: The head may be absent: it is then the embedding table.
        lmms_lab: The file is in lmms-lab's format.
        eos: ``eos_token_id``.
    """

    vision: SiglipConfig
    text: Qwen2Config
    tied: bool
    lmms_lab: bool
    eos: object


def read_config(checkpoint: Path, siglip: Path) -> LlavaOvConfig:
    """Reads config.json in either format.

    Args:
        checkpoint: The checkpoint's folder.
        siglip: SigLIP's folder; lmms-lab's format leaves the tower's dimensions to it.

    Raises:
        TangoError: The model is of another kind, or asks for something that the graphs do not do.
    """
    data = read_json(checkpoint / "config.json")
    if "mm_vision_tower" in data:
        return _lmms_lab_config(data, siglip)
    if data.get("model_type") == "llava_onevision":
        return _hf_config(data)
    raise TangoError(
        f"{checkpoint} is a {data.get('model_type', 'nameless')} model, not LLaVA-OneVision",
        "name a llava-hf or lmms-lab checkpoint of LLaVA-OneVision",
    )


def _hf_config(data: dict[str, Any]) -> LlavaOvConfig:
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
    _only(data, "vision_feature_layer", -1)
    _only(data, "vision_feature_select_strategy", "full")
    _only(data, "projector_hidden_act", "gelu")
    _only(data, "multimodal_projector_bias", True)
    tied = bool(data.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return LlavaOvConfig(_siglip_config(vision), _qwen2_config(text), tied, False, text.get("eos_token_id"))


def _lmms_lab_config(data: dict[str, Any], siglip: Path) -> LlavaOvConfig:
    _only(data, "mm_projector_type", "mlp2x_gelu")
    _only(data, "mm_spatial_pool_mode", "bilinear")
    _only(data, "mm_newline_position", "one_token")
    _only(data, "mm_spatial_pool_stride", 2)
    source = read_json(siglip / "config.json")
    tower = _siglip_config(source.get("vision_config", source), dropped_layers=1)
    # The head's absence is what ties it: some of these files lack tie_word_embeddings or deny it.
    return LlavaOvConfig(tower, _qwen2_config(data), True, True, data.get("eos_token_id"))


def _siglip_config(data: dict[str, Any], dropped_layers: int = 0) -> SiglipConfig:
    _only(data, "hidden_act", "gelu_pytorch_tanh")
    _only(data, "num_channels", 3)
    # What a file leaves out is transformers' SiglipVisionConfig default.
    defaults = SiglipConfig(768, 3072, 12, 12, image_size=224, patch_size=16)
    config = _filled(defaults, data)
    return _filled(config, {"num_hidden_layers": config.num_hidden_layers - dropped_layers})


def _qwen2_config(data: dict[str, Any]) -> Qwen2Config:
    _only(data, "hidden_act", "silu")
    _only(data, "use_sliding_window", False)
    _only(data, "rope_scaling", None)
    rope = data.get("rope_parameters") or {}  # transformers 5 writes this for rope_theta
    _only(rope, "rope_type", "default")
    # What a file leaves out is transformers' Qwen2Config default.
    defaults = Qwen2Config(4096, 22016, 32, 32, 32, 151936, rope_theta=10000.0)
    config = _filled(defaults, {**rope, **data})
    _only(data, "head_dim", config.head_dim)
    return config


_Config = TypeVar("_Config", SiglipConfig, Qwen2Config)


def _filled(defaults: _Config, data: dict[str, Any]) -> _Config:
    values = asdict(defaults)
    for name in (f.name for f in fields(defaults) if f.name in data):
        kind, value = type(values[name]), data[name]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise TangoError(f"config.json: {name} is {value!r}, not a positive {kind.__name__}", "mend config.json")
        values[name] = kind(value)
    return type(defaults)(**values)


def _only(data: dict[str, Any], key: str, value: object) -> None:
    """Refuses a setting that would need another graph."""
    if data.get(key, value) not in (value, None):
        raise TangoError(
            f"config.json: {key} is {data[key]!r}, and only {value!r} is supported",
            "LLaVA-OneVision's released checkpoints have it so; is this another model?",
        )


def renaming(rules: list[tuple[str, str | None]]) -> Rename:
    """A function that gives a stored name its canonical one: the first rule that matches its beginning wins."""
    compiled = [(re.compile(pattern), prefix) for pattern, prefix in rules]

    def rename(stored: str) -> str | None:
        for pattern, prefix in compiled:
            if match := pattern.match(stored):
                return None if prefix is None else prefix + stored[match.end() :]
        return stored

    return rename


def expected_shapes(config: LlavaOvConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, by canonical name, as it is stored."""
    vision, text = config.vision, config.text
    meta = torch.device("meta")
    with meta:
        tower, decoder = Tower(vision, torch.float32), Decoder(text, torch.float32, text.vocab_size)
        projector = Projector(vision.hidden_size, text.hidden_size, Pool(vision.side, torch.float32), torch.float32)
        salience = Salience(vision)
    shapes = {
        "decoder.embed_tokens.weight": (text.vocab_size, text.hidden_size),
        "newline": (text.hidden_size,),
    }
    prefixes = [("tower.", tower), ("tower.", salience), ("projector.", projector), ("decoder.", decoder)]
    for prefix, module in prefixes:
        shapes |= {_canonical(prefix, name): shape for name, shape in _stored_shapes(module).items()}
    return shapes


def _canonical(prefix: str, name: str) -> str:
    return name.replace("lm_head.", "head.") if name.startswith("lm_head.") else prefix + name


#: Parameters that no checkpoint holds: they are computed.
_COMPUTED = ("pool.weight", "probe", "rotary.inv_freq")


def _stored_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if not name.endswith(_COMPUTED)}
    return shapes | {name: owner.stored_shape for name, owner in _turned(module).items()}


def _turned(module: nn.Module) -> dict[str, Linear]:
    """The weights that are written the other way round than a checkpoint stores them, and whose they are."""
    return {f"{path}.weight": owner for path, owner in module.named_modules() if isinstance(owner, Linear)}


def _bound(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """Where the values of a module's parameters come from: the tensors of the same name behind a prefix."""

    def as_stored(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.tensor(name)

    def turned(name: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.tensor(name).flatten(1).T

    linear = _turned(module)
    return {
        name: (turned if name in linear else as_stored)(_canonical(prefix, name)) for name in _stored_shapes(module)
    }


class Vision(nn.Module):
    """The vision graph: frames → features and salience."""

    def __init__(self, config: LlavaOvConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tower = Tower(config.vision, dtype)
        self.salience = Salience(config.vision)
        pool = Pool(config.vision.side, dtype)
        self.projector = Projector(config.vision.hidden_size, config.text.hidden_size, pool, dtype)
        self.pool = Pool(config.vision.side, torch.float32)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Uint8 [F, size, size, 3] → features [F, L, D] and salience [F, L] fp32."""
        pixels = (frames.float() / 255 - PIXEL_MEAN) / PIXEL_STD
        patches = self.tower(pixels.to(self.dtype))
        salience = self.pool(self.salience(patches).unsqueeze(-1)).squeeze(-1)
        return self.projector(patches), salience


class Embed(nn.Module):
    """The embedding graph: token ids → rows of the table; the newline follows the vocabulary."""

    def __init__(self, config: LlavaOvConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.text.vocab_size + 1, config.text.hidden_size, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """[N] int64 → [N, D]."""
        return nn.functional.embedding(ids, self.table)


def load(checkpoint_folder: Path, siglip_folder: Path, dtype: torch.dtype, context: int) -> Model:
    """Opens a checkpoint; reads names and shapes, not yet the weights.

    Args:
        checkpoint_folder: LLaVA-OneVision, in either format.
        siglip_folder: The SigLIP that its tower was made from; it holds the pooling head.
        dtype: Of the graphs' weights and features.
        context: Most positions.

    Raises:
        TangoError: Something is missing, misshapen, unknown or not supported; the message names it.
    """
    config = read_config(checkpoint_folder, siglip_folder)
    if not 1 <= context <= config.text.max_position_embeddings:
        raise TangoError(
            f"--context is {context}, the decoder was made for 1 to {config.text.max_position_embeddings} positions",
            f"give at most --context {config.text.max_position_embeddings}",
        )
    checkpoint = Checkpoint(checkpoint_folder, renaming(_LLAVA_RULES))
    checkpoint.check(expected_shapes(config), optional=["head.weight"] if config.tied else [])
    head = _pooling_head(siglip_folder, config.vision)
    tokenizer_json, tokenizer = read_tokenizer(checkpoint_folder)
    vocabulary = vocabulary_size(tokenizer)
    if vocabulary > config.text.vocab_size:
        raise TangoError(
            f"{checkpoint_folder}: the tokenizer has {vocabulary} ids, the table {config.text.vocab_size} rows",
            "tokenizer and weights are not of the same checkpoint; download it again",
        )
    text, side = config.text, pooled_side(config.vision.side)
    with torch.device("meta"):
        modules = Vision(config, dtype), Embed(config, dtype), Decoder(text, dtype, vocabulary)
    return Model(
        graphs=_graphs(modules, config, checkpoint, head, _DTYPE_NAMES[dtype], vocabulary),
        params=PruneParams(grid=(side, side)),
        size=config.vision.image_size,
        tokens_per_frame=side**2,
        placeholder="<image>" if config.lmms_lab else "<video>",
        after_video=(text.vocab_size,),
        chat_template=QWEN_1_5_TEMPLATE if config.lmms_lab else _hf_template(checkpoint_folder),
        tokenizer=tokenizer_json,
        stop=stop_ids(checkpoint_folder, tokenizer, config.eos),
        vocabulary=vocabulary,
        decoder=DecoderSpec(text.num_hidden_layers, text.hidden_size, text.num_key_value_heads, text.head_dim, context),
        reference=lambda: LlavaOvReference(config.vision, config.text, checkpoint, head),
    )


def _pooling_head(folder: Path, vision: SiglipConfig) -> Checkpoint:
    head = Checkpoint(folder, renaming(_SIGLIP_RULES))
    width = vision.hidden_size
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
    }
    for name, shape in shapes.items():
        if f"head.{name}" not in head:
            raise TangoError(
                f"{folder} has no SigLIP pooling head (vision_model.head.{name}), which the salience comes from",
                f"LLaVA checkpoints do not hold it: give the original SigLIP checkpoint, --siglip {_SIGLIP}",
            )
        if head.shape(f"head.{name}") != shape:
            raise TangoError(
                f"{folder}: head.{name} has shape {list(head.shape(f'head.{name}'))}, the tower asks for {list(shape)}",
                "give the SigLIP that this checkpoint's tower was made from",
            )
    return head


def _hf_template(folder: Path) -> str:
    template = read_chat_template(folder)
    if template is None:
        note(f"{folder} has no chat template; llava-hf's is used")
    return template or HF_TEMPLATE


_DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float16: "float16", torch.float32: "float32"}


def _graphs(
    modules: tuple[Vision, Embed, Decoder],
    config: LlavaOvConfig,
    checkpoint: Checkpoint,
    head: Checkpoint,
    dtype: DType,
    vocabulary: int,
) -> tuple[Graph, ...]:
    vision, embed, decoder = modules
    size, tokens, width = config.vision.image_size, vision.pool.tokens, config.text.hidden_size
    features = TensorSpec("features", dtype, ("F", tokens, width))
    embeddings = TensorSpec("embeddings", dtype, ("N", width))
    past, new = _cache_specs(config.text, dtype)
    return (
        Graph(
            "vision",
            vision,
            (TensorSpec("frames", "uint8", ("F", size, size, 3)),),
            (features, TensorSpec("salience", "float32", ("F", tokens))),
            _vision_weights(vision, config, checkpoint, head),
        ),
        Graph(
            "embed",
            embed,
            (TensorSpec("ids", "int64", ("N",)),),
            (embeddings,),
            {
                "table": lambda: torch.cat(
                    (checkpoint.tensor("decoder.embed_tokens.weight"), checkpoint.tensor("newline")[None])
                )
            },
        ),
        Graph(
            "decoder",
            decoder,
            (embeddings, TensorSpec("positions", "int64", ("N",)), *past),
            (TensorSpec("logits", "float32", (vocabulary,)), *new),
            _decoder_weights(decoder, checkpoint),
        ),
    )


def _cache_specs(text: Qwen2Config, dtype: DType) -> tuple[list[TensorSpec], list[TensorSpec]]:
    def specs(when: str, tokens: str) -> list[TensorSpec]:
        shape = (text.num_key_value_heads, tokens, text.head_dim)
        names = [f"{when}_{kind}.{i}" for i in range(text.num_hidden_layers) for kind in ("key", "value")]
        return [TensorSpec(name, dtype, shape) for name in names]

    return specs("past", "P"), specs("new", "N")


def _vision_weights(vision: Vision, config: LlavaOvConfig, checkpoint: Checkpoint, head: Checkpoint) -> Weights:
    def probe() -> Tensor:
        weight, bias = head.tensor("head.attention.in_proj_weight"), head.tensor("head.attention.in_proj_bias")
        return fold_probe(head.tensor("head.probe"), weight, bias, config.vision.num_attention_heads)

    parts = [
        ("tower", vision.tower, "tower."),
        ("salience", vision.salience, "tower."),
        ("projector", vision.projector, "projector."),
    ]
    weights = {
        f"{attribute}.{name}": source
        for attribute, module, prefix in parts
        for name, source in _bound(module, prefix, checkpoint).items()
    }
    return weights | {
        "salience.probe": probe,
        "pool.weight": vision.pool.matrix,
        "projector.pool.weight": vision.pool.matrix,
    }


def _decoder_weights(decoder: Decoder, checkpoint: Checkpoint) -> Weights:
    weights = _bound(decoder, "decoder.", checkpoint)
    if "head.weight" not in checkpoint:
        weights["lm_head.weight"] = lambda: checkpoint.tensor("decoder.embed_tokens.weight").T
    return weights | {"rotary.inv_freq": decoder.rotary.frequencies}


FAMILY = Family(
    name="llava-ov",
    presets={
        "llava-ov": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-0.5b": Preset("llava-ov-0.5b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", _SIGLIP),
        "llava-ov-7b": Preset("llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP),
    },
    load=load,
)
