"""State dicts with the released keys of the paper's networks, and their function without this project's modules."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

# The slots of `network`, in order: blocks with pooling, attention, spatial FC or no mixer; downsampling; embedding.
RELEASED_SLOTS = {
    "poolformer_s12": ("pool", "down", "pool", "down", "pool", "down", "pool"),
    "metaformer_id_s12": ("none", "down", "none", "down", "none", "down", "none"),
    "metaformer_pppa_s12_224": ("pool", "down", "pool", "down", "pool", "down", "embedding", "attention"),
    "metaformer_ppaa_s12_224": ("pool", "down", "pool", "down", "embedding", "attention", "down", "attention"),
    "metaformer_pppf_s12_224": ("pool", "down", "pool", "down", "pool", "down", "fc"),
    "metaformer_ppff_s12_224": ("pool", "down", "pool", "down", "fc", "down", "fc"),
}
SMALL_DIMS, SMALL_DEPTHS = (32, 32, 64, 64), (1, 2, 3, 1)

State = dict[str, Tensor]


def released_state(
    name: str,
    dims: Sequence[int] = SMALL_DIMS,
    depths: Sequence[int] = SMALL_DEPTHS,
    image_size: int = 64,
    num_classes: int = 5,
) -> State:
    """Return random weights with the released keys, scaled so that every tensor affects the logits."""
    random = torch.Generator().manual_seed(len(name) + sum(dims))
    state: State = {}

    def add(key: str, *shape: int) -> None:
        scale = 0.3 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        state[key] = torch.randn(shape, generator=random) * scale

    def add_norm(key: str, dim: int) -> None:
        add(f"{key}.weight", dim)
        state[f"{key}.weight"] += 1
        add(f"{key}.bias", dim)

    def add_conv(key: str, out_dim: int, in_dim: int, kernel_size: int) -> None:
        add(f"{key}.weight", out_dim, in_dim, kernel_size, kernel_size)
        add(f"{key}.bias", out_dim)

    add_conv("patch_embed.proj", dims[0], 3, 7)
    stage, side = 0, image_size // 4
    for slot, kind in enumerate(RELEASED_SLOTS[name]):
        if kind == "down":
            stage, side = stage + 1, side // 2
            add_conv(f"network.{slot}.proj", dims[stage], dims[stage - 1], 3)
        elif kind == "embedding":
            add(f"network.{slot}.pos_embed", 1, dims[stage], side, side)
        else:
            for block in range(depths[stage]):
                key, dim = f"network.{slot}.{block}", dims[stage]
                add_norm(f"{key}.norm1", dim)
                add_norm(f"{key}.norm2", dim)
                if kind == "attention":
                    add(f"{key}.token_mixer.qkv.weight", 3 * dim, dim)
                    add(f"{key}.token_mixer.proj.weight", dim, dim)
                    add(f"{key}.token_mixer.proj.bias", dim)
                if kind == "fc":
                    add(f"{key}.token_mixer.fc.weight", side**2, side**2)
                add_conv(f"{key}.mlp.fc1", 4 * dim, dim, 1)
                add_conv(f"{key}.mlp.fc2", dim, 4 * dim, 1)
                add(f"{key}.layer_scale_1", dim)
                add(f"{key}.layer_scale_2", dim)
    add_norm("norm", dims[-1])
    add("head.weight", num_classes, dims[-1])
    add("head.bias", num_classes)
    return state


def released_logits(name: str, state: State, images: Tensor) -> Tensor:
    """Compute the released network, from images [B, 3, H, W] to logits [B, classes]."""
    slots = RELEASED_SLOTS[name]

    def norm(key: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        if "attention" in slots:
            mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
            return x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        return functional.group_norm(x, 1, weight, bias, eps=1e-5)

    def conv(key: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return functional.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], stride, padding)

    def pool(key: str, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x

    def attention(key: str, x: Tensor) -> Tensor:
        heads, (batch, dim, height, width) = x.shape[1] // 32, x.shape
        tokens = x.flatten(2).transpose(1, 2) @ state[f"{key}.qkv.weight"].T
        q, k, v = (part.reshape(batch, -1, heads, 32).transpose(1, 2) for part in torch.chunk(tokens, 3, dim=2))
        out: Tensor = (q @ k.transpose(2, 3) / 32**0.5).softmax(3) @ v
        out = out.transpose(1, 2).reshape(batch, -1, dim) @ state[f"{key}.proj.weight"].T + state[f"{key}.proj.bias"]
        return out.transpose(1, 2).reshape(batch, dim, height, width)

    def fc(key: str, x: Tensor) -> Tensor:
        return (x.flatten(2) @ state[f"{key}.fc.weight"].T).view(x.shape)

    mixers: dict[str, Callable[[str, Tensor], Tensor]] = {
        "pool": pool,
        "attention": attention,
        "fc": fc,
        "none": lambda key, x: x,
    }

    def block(key: str, kind: str, x: Tensor) -> Tensor:
        mixed = mixers[kind](f"{key}.token_mixer", norm(f"{key}.norm1", x))
        x = x + state[f"{key}.layer_scale_1"].view(-1, 1, 1) * mixed
        hidden = functional.gelu(conv(f"{key}.mlp.fc1", norm(f"{key}.norm2", x)))
        return x + state[f"{key}.layer_scale_2"].view(-1, 1, 1) * conv(f"{key}.mlp.fc2", hidden)

    x = conv("patch_embed.proj", images, stride=4, padding=2)
    for slot, kind in enumerate(slots):
        if kind == "down":
            x = conv(f"network.{slot}.proj", x, stride=2, padding=1)
        elif kind == "embedding":
            x = x + state[f"network.{slot}.pos_embed"]
        else:
            depth = sum(key.startswith(f"network.{slot}.") and key.endswith("layer_scale_1") for key in state)
            for number in range(depth):
                x = block(f"network.{slot}.{number}", kind, x)
    return functional.linear(norm("norm", x).mean((2, 3)), state["head.weight"], state["head.bias"])
