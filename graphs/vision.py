"""The PyTorch reference of Llama 4's vision tower, adapter and projector.

Legend: n tiles, c channels, p patch side, G patches per tile side, W vision width, A adapter width, H text hidden.
Source of every formula: the Llama 4 model code. Names are those of the Hugging Face checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arriero.graphs.config import VisionConfig

NORM_EPS = 1e-5


class Affine(nn.Module):
    """Linear layer [out, in], with a bias unless told otherwise, that widens its stored weight to the activations."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return F.layer_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), NORM_EPS)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches through one linear layer, as unfold orders them: channel, row, column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = Affine(config.channels * config.patch_size**2, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, c, G*p, G*p] -> [n, G*G, W]."""
        config = self.config
        grid = pixel_values.unflatten(2, (config.grid, config.patch_size)).unflatten(4, (config.grid, -1))
        return self.linear(grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))


class VisionAttention(nn.Module):
    """Full multi-head attention within a tile, with two-dimensional rotary embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Affine(width, width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[n, G*G+1, W] -> [n, G*G+1, W]."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate_tile(q, cos, sin), rotate_tile(k, cos, sin)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = Affine(config.hidden_size, config.ffn), Affine(config.ffn, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(config), VisionMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size)
        self.post_attention_layernorm = LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[n, G*G+1, W] -> [n, G*G+1, W]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config) for _ in range(config.layers)])


class AdapterMLP(nn.Module):
    """gelu(fc2(gelu(fc1(x)))), no biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Affine(config.ffn, config.adapter_in, bias=False)
        self.fc2 = Affine(config.adapter_out, config.adapter_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W/r^2] -> [..., A]."""
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Pixel shuffle, then the adapter MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ratio, self.grid = config.shuffle, config.grid
        self.mlp = AdapterMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """[n, G*G, W] -> [n, (rG)^2, A]."""
        return self.mlp(shuffle_pixels(x, self.grid, self.ratio))


class VisionModel(nn.Module):
    """The tower with its adapter."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.grid**2 + 1, config.hidden_size))
        self.layernorm_pre, self.layernorm_post = LayerNorm(config.hidden_size), LayerNorm(config.hidden_size)
        self.model = VisionEncoder(config)
        self.vision_adapter = VisionAdapter(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tiles [n, c, h, w] -> [n, tokens per tile, A]. The class token goes last and is dropped before shuffling."""
        x = self.patch_embedding(pixel_values)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([x, class_token], dim=1) + self.positional_embedding_vlm.to(x.dtype)
        x = self.layernorm_pre(x)
        cos, sin = tile_rotation(self.config)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.vision_adapter(self.layernorm_post(x)[:, :-1])


class Projector(nn.Module):
    """Adapter width -> text hidden."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = Affine(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., A] -> [..., H]."""
        return self.linear_1(x)


def tile_rotation(config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [G*G+1, D/2]: column angles then row angles of each patch; the class token is not rotated."""
    size = config.hidden_size // config.heads // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float) / size)
    side = torch.arange(1, config.grid + 1, dtype=torch.float)
    columns = side.repeat(config.grid)[:, None] * frequency
    rows = side.repeat_interleave(config.grid)[:, None] * frequency
    angles = torch.cat([torch.cat([columns, rows], dim=-1), torch.zeros(1, size)])
    return angles.cos(), angles.sin()


def rotate_tile(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of `x` [n, patches, heads, D] by angles given as cos, sin [patches, D/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def shuffle_pixels(x: Tensor, grid: int, ratio: float) -> Tensor:
    """Fold neighbouring patches into channels: [n, G*G, W] -> [n, (rG)^2, W/r^2] (Llama 4's pixel shuffle)."""
    tiles, _, width = x.shape
    small, wide = int(grid * ratio), int(width / ratio)
    x = x.reshape(tiles, grid, small, wide).permute(0, 2, 1, 3)
    x = x.reshape(tiles, small, small, int(wide / ratio)).permute(0, 2, 1, 3)
    return x.reshape(tiles, small * small, -1)
