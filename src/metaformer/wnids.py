"""Descriptions of ImageNet's class names, which are wnids such as n01440764."""

import re
from collections.abc import Sequence

_WNID = re.compile(r"n\d{8}")


def describe_wnids(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return a description of each class; None if any name is not a wnid of ImageNet."""
    if not names or not all(map(_WNID.fullmatch, names)):
        return None
    from timm.data import ImageNetInfo  # takes seconds, because timm imports torch

    for subset in ("imagenet-1k", "imagenet-22k"):
        info = ImageNetInfo(subset)
        if set(names) <= set(info.label_names()):
            return tuple(info.label_name_to_description(name) for name in names)
    return None
