"""Tensors of a LLaVA-OneVision checkpoint: their names in any layout, their shapes, and whose parameters they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tango_export.checkpoint import Checkpoint, Rename
from tango_export.families.llava_ov.config import LlavaOvConfig
from tango_export.modules.layers import Linear, PackedLinear
from tango_export.modules.projector import Pool, Projector
from tango_export.modules.qwen2 import Decoder
from tango_export.modules.siglip import Salience, Tower

#: Names on disk, in any layout, → canonical names; the first rule that matches. None leaves a tensor out.
LLAVA_RULES = [
    (r".*(\.inv_freq|\.position_ids)$", None),
    (r"(model\.)?(language_model\.)?lm_head\.", "lm_head."),
    (r"(model\.)?language_model\.(model\.)?", "decoder."),
    (r"(model\.)?multi_modal_projector\.", "projector."),
    (r"model\.mm_projector\.0\.", "projector.linear_1."),
    (r"model\.mm_projector\.2\.", "projector.linear_2."),
    (r"(model\.)?image_newline$", "newline"),
    (r".*vision_tower\..*\bhead\.", None),  # a tower saved with a pooling head: the salience takes SigLIP's own
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?", "tower."),
    (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "decoder."),
]
SIGLIP_RULES = [
    (r"(vision_model\.)?head\.", "head."),
    (r".*", None),
]


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
        for stored in _stored_shapes(module).values():
            shapes |= {_canonical(prefix, name): shape for name, shape in stored.items()}
    return shapes


def _canonical(prefix: str, name: str) -> str:
    return name if name.startswith("lm_head.") else prefix + name


#: Parameters that no checkpoint holds: they are computed.
_COMPUTED = ("pool.weight", "probe", "rotary.inv_freq")


def _stored_shapes(module: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of a checkpoint that each parameter is made of, side by side, and their shapes."""
    stored = {name: {name: tuple(p.shape)} for name, p in module.named_parameters() if not name.endswith(_COMPUTED)}
    for weight, owner in _turned(module).items():
        stored[weight] = {weight: owner.stored_shape}
        if isinstance(owner, PackedLinear):
            path, (_, fan_in) = weight.removesuffix(".weight"), owner.stored_shape
            parts = {f"{path.rpartition('.')[0]}.{name}": width for name, width in owner.parts.items()}
            stored[weight] = {f"{part}.weight": (width, fan_in) for part, width in parts.items()}
            stored[f"{path}.bias"] = {f"{part}.bias": (width,) for part, width in parts.items()}
    return stored


def _turned(module: nn.Module) -> dict[str, Linear]:
    """The weights that are written the other way round than a checkpoint stores them, and whose they are."""
    return {f"{path}.weight": owner for path, owner in module.named_modules() if isinstance(owner, Linear)}


def bound(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> dict[str, Callable[[], Tensor]]:
    """Where the values of a module's parameters come from: the tensors of the same name behind a prefix.

    A parameter of several layers comes from the tensors of each; they are read when it is, and joined.
    """
    linear = _turned(module)

    def source(parameter: str, stored: Iterable[str]) -> Callable[[], Tensor]:
        names = [_canonical(prefix, name) for name in stored]

        def read(name: str) -> Tensor:
            tensor = checkpoint.tensor(name)
            return tensor.flatten(1).T if parameter in linear else tensor

        return lambda: read(*names) if len(names) == 1 else torch.cat([read(name) for name in names], -1)

    return {parameter: source(parameter, stored) for parameter, stored in _stored_shapes(module).items()}
