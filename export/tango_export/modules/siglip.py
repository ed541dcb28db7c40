"""SigLIP's vision tower and the attention of its pooling head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tango_export.modules.layers import LayerNorm, Linear, attention


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of a SigLIP vision tower, in the words of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along one edge of a frame."""
        return self.image_size // self.patch_size


class PatchEmbedding(Linear):
    """The convolution of patches that do not overlap, as the matrix product that it is.

    Rows and columns of pixels past the last whole patch are left out, as a convolution leaves them out.
    """

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        self.patch, self.side = config.patch_size, config.side
        super().__init__(3 * self.patch**2, config.hidden_size, dtype)
        self.stored_shape = (config.hidden_size, 3, self.patch, self.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """[F, size, size, 3] → [F, patches, width]."""
        whole, side, patch = self.side * self.patch, self.side, self.patch
        patches = pixels[:, :whole, :whole].reshape(-1, side, patch, side, patch, 3)
        return super().forward(patches.permute(0, 1, 3, 5, 2, 4).reshape(-1, side**2, 3 * patch**2))


class Embeddings(nn.Module):
    """Patches and their positions."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config, dtype)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """[F, size, size, 3] → [F, patches, width]."""
        return self.patch_embedding(pixels) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Attention among the patches of one frame."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.q_proj = Linear(width, width, dtype)
        self.k_proj = Linear(width, width, dtype)
        self.v_proj = Linear(width, width, dtype)
        self.out_proj = Linear(width, width, dtype)
        self.head_dim = width // config.num_attention_heads
        self.whole = (-1, config.side**2, width)
        self.split = (-1, config.side**2, config.num_attention_heads, self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, width] → the same."""
        query, key, value = (
            project(x).reshape(self.split).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attention(query, key, value, self.head_dim)
        return self.out_proj(mixed.transpose(1, 2).reshape(self.whole))


class MLP(nn.Module):
    """Two linear layers around a GELU (tanh form)."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → the same."""
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, width] → the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, dtype) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, width] → the same."""
        for layer in self.layers:
            x = layer(x)
        return x


class Tower(nn.Module):
    """The vision tower up to its last layer, before any final norm: what LLaVA's projector takes."""

    def __init__(self, config: SiglipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, dtype)
        self.encoder = Encoder(config, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """[F, size, size, 3] → [F, patches, width]."""
        return self.encoder(self.embeddings(pixels))


class Salience(nn.Module):
    """Attention that each patch receives from the pooling head's probe, averaged over heads.

    The probe is a constant, so query and key projection fold into one matrix; what the key bias adds is the same for
    every patch and leaves the softmax as it is.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.probe = nn.Parameter(torch.empty(config.hidden_size, config.num_attention_heads, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[F, patches, width] → [F, patches] fp32; each row sums to 1."""
        return (self.post_layernorm(x).float() @ self.probe).softmax(1).mean(-1)


def fold_probe(probe: Tensor, in_proj_weight: Tensor, in_proj_bias: Tensor, heads: int) -> Tensor:
    """Folds the pooling head's probe with its query and key projections.

    score[h, patch] = <W_q,h·probe + b_q,h , W_k,h·x + b_k,h> / √d; the b_k term is constant over patches and dropped.

    Args:
        probe: [1, 1, width].
        in_proj_weight: [3·width, width], query, key and value stacked in that order.
        in_proj_bias: [3·width].
        heads: Attention heads.

    Returns:
        [width, heads] fp32.
    """
    width = probe.shape[-1]
    weight, bias = in_proj_weight.double(), in_proj_bias.double()
    query = weight[:width] @ probe.double().flatten() + bias[:width]
    key = weight[width : 2 * width].reshape(heads, -1, width)
    folded = torch.einsum("hd,hdw->wh", query.reshape(heads, -1), key) * (width // heads) ** -0.5
    return folded.float()
