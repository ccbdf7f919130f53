"""State dicts with the keys of the second paper's program, and their function without this project's modules."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]

DIMS, DEPTHS = (32, 32, 64, 64), (1, 2, 3, 1)
# The token mixers of each family's stages.
MIXERS = {
    "identityformer": ("none", "none", "none", "none"),
    "randformer": ("none", "none", "random", "random"),
    "poolformerv2": ("pool", "pool", "pool", "pool"),
    "convformer": ("conv", "conv", "conv", "conv"),
    "caformer": ("conv", "conv", "attention", "attention"),
}
SHAPES = {  # of a mixer's tensors, by channels and positions
    "none": lambda dim, tokens: {},
    "pool": lambda dim, tokens: {},
    "random": lambda dim, tokens: {"random_matrix": (tokens, tokens)},
    "conv": lambda dim, tokens: {
        "pwconv1.weight": (2 * dim, dim),
        "act1.scale": (1,),
        "act1.bias": (1,),
        "dwconv.weight": (2 * dim, 1, 7, 7),
        "pwconv2.weight": (dim, 2 * dim),
    },
    "attention": lambda dim, tokens: {"qkv.weight": (3 * dim, dim), "proj.weight": (dim, dim)},
}


def baseline_state(family: str, image_size: int = 64, num_classes: int = 5) -> State:
    """Return random weights with the authors' keys, scaled so that every tensor affects the logits."""
    shapes: dict[str, tuple[int, ...]] = {
        "downsample_layers.0.conv.weight": (DIMS[0], 3, 7, 7),
        "downsample_layers.0.conv.bias": (DIMS[0],),
        "downsample_layers.0.post_norm.weight": (DIMS[0],),
    }
    side = image_size // 4
    for stage, (dim, depth, mixer) in enumerate(zip(DIMS, DEPTHS, MIXERS[family], strict=True)):
        if stage:
            side //= 2
            shapes[f"downsample_layers.{stage}.pre_norm.weight"] = (DIMS[stage - 1],)
            shapes[f"downsample_layers.{stage}.conv.weight"] = (dim, DIMS[stage - 1], 3, 3)
            shapes[f"downsample_layers.{stage}.conv.bias"] = (dim,)
        for number in range(depth):
            block = f"stages.{stage}.{number}"
            shapes |= {f"{block}.norm1.weight": (dim,), f"{block}.norm2.weight": (dim,)}
            shapes |= {f"{block}.token_mixer.{key}": shape for key, shape in SHAPES[mixer](dim, side**2).items()}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * dim, dim), f"{block}.mlp.fc2.weight": (dim, 4 * dim)}
            shapes |= {f"{block}.mlp.act.scale": (1,), f"{block}.mlp.act.bias": (1,)}
            if stage > 1:
                shapes |= {f"{block}.res_scale1.scale": (dim,), f"{block}.res_scale2.scale": (dim,)}
    last = DIMS[-1]
    shapes |= {"norm.weight": (last,), "norm.bias": (last,)}
    if family in ("convformer", "caformer"):
        shapes |= {"head.fc1.weight": (4 * last, last), "head.fc1.bias": (4 * last,)}
        shapes |= {"head.norm.weight": (4 * last,), "head.norm.bias": (4 * last,)}
        shapes |= {"head.fc2.weight": (num_classes, 4 * last), "head.fc2.bias": (num_classes,)}
    else:
        shapes |= {"head.weight": (num_classes, last), "head.bias": (num_classes,)}
    random = torch.Generator().manual_seed(len(family))
    return {key: _values(key, shape, random) for key, shape in shapes.items()}


def _values(key: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=random)
    if key.endswith("random_matrix"):
        return values.softmax(-1)
    if len(shape) == 1:
        return values * 0.3 + key.endswith(("weight", "scale"))
    scale: float = torch.Size(shape[1:]).numel() ** -0.5
    return values * scale


def baseline_logits(family: str, state: State, images: Tensor) -> Tensor:
    """Compute the authors' network with operations on [B, H, W, C], from images [B, 3, H, W] to logits."""
    channels_only = family in ("convformer", "caformer")

    def norm(key: str, x: Tensor, over_space: bool) -> Tensor:
        axes = (1, 2, 3) if over_space else (3,)
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True) + 1e-6).sqrt() * state[f"{key}.weight"]

    def conv(key: str, x: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
        bias = state.get(f"{key}.bias")
        x = x.permute(0, 3, 1, 2)
        return functional.conv2d(x, state[f"{key}.weight"], bias, stride, padding, 1, groups).permute(0, 2, 3, 1)

    def star_relu(key: str, x: Tensor) -> Tensor:
        return state[f"{key}.scale"] * x.clamp(min=0) ** 2 + state[f"{key}.bias"]

    def pool(key: str, x: Tensor) -> Tensor:
        pooled = functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1) - x

    def random(key: str, x: Tensor) -> Tensor:
        return torch.einsum("mn,bnc->bmc", state[f"{key}.random_matrix"], x.flatten(1, 2)).view(x.shape)

    def separable(key: str, x: Tensor) -> Tensor:
        x = star_relu(f"{key}.act1", x @ state[f"{key}.pwconv1.weight"].T)
        return conv(f"{key}.dwconv", x, 1, 3, x.shape[3]) @ state[f"{key}.pwconv2.weight"].T

    def attention(key: str, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2) @ state[f"{key}.qkv.weight"].T
        heads = (part.unflatten(2, (-1, 32)).transpose(1, 2) for part in tokens.chunk(3, 2))
        query, key_heads, value = heads
        mixed = (query @ key_heads.transpose(2, 3) / 32**0.5).softmax(3) @ value
        out: Tensor = mixed.transpose(1, 2).flatten(2) @ state[f"{key}.proj.weight"].T
        return out.view(x.shape)

    mixers: dict[str, Callable[[str, Tensor], Tensor]] = {
        "none": lambda key, x: x, "pool": pool, "random": random, "conv": separable, "attention": attention,
    }  # fmt: skip
    x = norm("downsample_layers.0.post_norm", conv("downsample_layers.0.conv", images.permute(0, 2, 3, 1), 4, 2), False)
    for stage, (depth, mixer) in enumerate(zip(DEPTHS, MIXERS[family], strict=True)):
        if stage:
            x = norm(f"downsample_layers.{stage}.pre_norm", x, False)
            x = conv(f"downsample_layers.{stage}.conv", x, 2, 1)
        for number in range(depth):
            key = f"stages.{stage}.{number}"
            scales = [state.get(f"{key}.res_scale{branch}.scale", torch.ones(1)) for branch in (1, 2)]
            x = x * scales[0] + mixers[mixer](f"{key}.token_mixer", norm(f"{key}.norm1", x, not channels_only))
            hidden = norm(f"{key}.norm2", x, not channels_only) @ state[f"{key}.mlp.fc1.weight"].T
            x = x * scales[1] + star_relu(f"{key}.mlp.act", hidden) @ state[f"{key}.mlp.fc2.weight"].T
    x = functional.layer_norm(x.mean((1, 2)), (DIMS[-1],), state["norm.weight"], state["norm.bias"], 1e-6)
    if "head.weight" in state:
        return functional.linear(x, state["head.weight"], state["head.bias"])
    hidden = functional.linear(x, state["head.fc1.weight"], state["head.fc1.bias"]).clamp(min=0).square()
    hidden = functional.layer_norm(hidden, hidden.shape[1:], state["head.norm.weight"], state["head.norm.bias"], 1e-5)
    return functional.linear(hidden, state["head.fc2.weight"], state["head.fc2.bias"])
