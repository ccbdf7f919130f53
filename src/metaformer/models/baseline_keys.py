"""State-dict keys of the second paper's program, and their conversion to this project's keys, which are timm's.

That program has lists `downsample_layers` (the stem first) and `stages`. All its layers over channels are linear, with
weights [out, in]. This project and timm have 1x1 convolutions instead, with weights [out, in, 1, 1], except in stages
with attention.
"""

import re

from torch import Tensor

StateDict = dict[str, Tensor]

# Patterns of keys and their replacements; the first pattern that matches the whole key is used.
_TO_METAFORMER = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"downsample_layers\.0\.conv\.(weight|bias)", r"stem.conv.\1"),
        (r"downsample_layers\.0\.post_norm\.weight", r"stem.norm.weight"),
        (r"downsample_layers\.([1-9]\d*)\.conv\.(weight|bias)", r"stages.\1.downsample.conv.\2"),
        (r"downsample_layers\.([1-9]\d*)\.pre_norm\.weight", r"stages.\1.downsample.norm.weight"),
        (r"stages\.(\d+)\.(\d+)\.token_mixer\.random_matrix", r"stages.\1.blocks.\2.token_mixer.matrix"),
        (r"stages\.(\d+)\.(\d+)\.(.+)", r"stages.\1.blocks.\2.\3"),
        (r"norm\.(weight|bias)", r"head.norm.\1"),
        (r"head\.(.+)", r"head.fc.\1"),
    )
]
_TO_OFFICIAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"stem\.conv\.(weight|bias)", r"downsample_layers.0.conv.\1"),
        (r"stem\.norm\.weight", r"downsample_layers.0.post_norm.weight"),
        (r"stages\.(\d+)\.downsample\.conv\.(weight|bias)", r"downsample_layers.\1.conv.\2"),
        (r"stages\.(\d+)\.downsample\.norm\.weight", r"downsample_layers.\1.pre_norm.weight"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.token_mixer\.matrix", r"stages.\1.\2.token_mixer.random_matrix"),
        (r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", r"stages.\1.\2.\3"),
        (r"head\.norm\.(weight|bias)", r"norm.\1"),
        (r"head\.fc\.(.+)", r"head.\1"),
    )
]
_MLP_WEIGHT = re.compile(r"(stages\.\d+\.blocks\.\d+\.)mlp\.fc[12]\.weight")
_POINTWISE_WEIGHT = re.compile(r"stages\.\d+\.blocks\.\d+\.(mlp\.fc[12]|token_mixer\.pwconv[12])\.weight")
# Keys of every block, of the network, and of the two kinds of classifiers.
_BLOCK = ("norm1.weight", "norm2.weight", "mlp.fc1.weight", "mlp.act.scale", "mlp.act.bias", "mlp.fc2.weight")
_NETWORK = ("stem.conv.weight", "stem.conv.bias", "stem.norm.weight", "head.norm.weight", "head.norm.bias")
_CLASSIFIERS = (
    ("head.fc.weight", "head.fc.bias"),
    tuple(f"head.fc.{layer}.{kind}" for layer in ("fc1", "norm", "fc2") for kind in ("weight", "bias")),
)
_KNOWN_KEY = re.compile(
    r"stem\.(conv|norm)\.\w+|stages\.\d+\.downsample\.(conv|norm)\.\w+|head\.(norm|fc)(\.\w+){1,2}"
    r"|stages\.\d+\.blocks\.\d+\.(norm[12]|res_scale[12]|token_mixer|mlp)(\.\w+){1,2}"
)


def has_official_keys(state: StateDict) -> bool:
    """Return whether the keys are those of the second paper's program."""
    return any(key.startswith("downsample_layers.") for key in state)


def has_baseline_keys(state: StateDict) -> bool:
    """Return whether the keys are this project's and those of a network of the second paper, judging by its stem."""
    return "stem.norm.weight" in state


def official_to_metaformer(state: StateDict) -> StateDict:
    """Rename the keys of the second paper's program to this project's, and give weights the shapes of convolutions.

    Raises:
        ValueError: a key does not belong to that program's networks.
    """
    renamed = _rename(state, _TO_METAFORMER)
    for key, tensor in renamed.items():
        mlp = _MLP_WEIGHT.fullmatch(key)
        linear = mlp is not None and f"{mlp[1]}token_mixer.qkv.weight" in renamed
        if _POINTWISE_WEIGHT.fullmatch(key) and tensor.ndim == 2 and not linear:
            renamed[key] = tensor[:, :, None, None]
    return renamed


def metaformer_to_official(state: StateDict) -> StateDict:
    """Rename this project's keys to those of the second paper's program, the inverse of `official_to_metaformer`.

    Raises:
        ValueError: a key does not belong to this project's networks.
    """
    flat = {
        key: tensor.flatten(1) if _POINTWISE_WEIGHT.fullmatch(key) and tensor.ndim == 4 else tensor
        for key, tensor in state.items()
    }
    return _rename(flat, _TO_OFFICIAL)


def required_keys(state: StateDict) -> set[str]:
    """Return the keys that a complete network of the second paper must have, given the keys that are present.

    Raises:
        ValueError: a key does not belong to the second paper's networks.
    """
    for key in state:
        if not _KNOWN_KEY.fullmatch(key):
            raise ValueError(f"{key}: not a key of a known network")
    classifier = _CLASSIFIERS[any(key.startswith("head.fc.fc") for key in state)]
    required = {*_NETWORK, *classifier}
    blocks = {match[1] for key in state if (match := re.match(r"(stages\.\d+\.blocks\.\d+\.)", key))}
    required |= {block + name for block in (blocks or {"stages.0.blocks.0."}) for name in _BLOCK}
    later_stages = {block.split(".")[1] for block in blocks} - {"0"}
    kinds = ("conv.weight", "conv.bias", "norm.weight")
    return required | {f"stages.{stage}.downsample.{kind}" for stage in later_stages for kind in kinds}


def _rename(state: StateDict, patterns: list[tuple[re.Pattern[str], str]]) -> StateDict:
    return {_renamed(key, patterns): tensor for key, tensor in state.items()}


def _renamed(key: str, patterns: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in patterns:
        if pattern.fullmatch(key):
            return pattern.sub(replacement, key)
    raise ValueError(f"{key}: not a key of a known network")
