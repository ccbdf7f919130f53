"""The worst and the best images of a run's last validation, as its file has them; docs/runs.md describes it."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from metaformer.reporting.class_results import readable

MAX_IMAGES = 8  # of the worst, and of the best
MAX_PICTURE = 40_000  # characters of base64


class Example(NamedTuple):
    """An image, the names of its class and of the predicted one, and the probability of its class in percent."""

    image: str
    name: str
    predicted: str
    share: float
    picture: str | None  # JPEG in base64


class Examples(NamedTuple):
    """The worst images, worst first, and the best, best first, of the validation after a step."""

    step: int
    worst: list[Example]
    best: list[Example]

    @property
    def have_pictures(self) -> bool:
        """Return whether any image has a picture."""
        return any(example.picture for example in (*self.worst, *self.best))


def read_examples(file: Path) -> Examples:
    """Return the images of a list.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is damaged.
    """
    content = json.loads(file.read_text())
    worst, best = (_examples(content[kind]) for kind in ("worst", "best"))
    return Examples(int(content["step"]), worst, best)


def _examples(entries: list[dict[str, Any]]) -> list[Example]:
    names = readable([str(entry[name]) for entry in entries for name in ("class", "predicted")])
    pairs = zip(names[::2], names[1::2], strict=True)
    return [
        Example(str(entry["image"]), *pair, 100 * math.exp(-abs(float(entry["loss"]))), _picture(entry.get("picture")))
        for entry, pair in zip(entries, pairs, strict=True)
    ][:MAX_IMAGES]


def _picture(content: Any) -> str | None:
    if content is None:
        return None
    if not isinstance(content, str) or len(content) > MAX_PICTURE or not re.fullmatch(r"[A-Za-z0-9+/]+=*", content):
        raise ValueError("not a small picture in base64")
    return content
