"""Budgets of the Triton kernels and of a training step, stored in a file next to the kernels and compared exactly.

A figure that has become worse is a regression. A figure that has become better must be written to the file, so that
the improvement is kept.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu.compiling import KernelFacts
from benchmarks.gpu.recording import Launch, Setting
from benchmarks.harness import REPOSITORY

FILE = REPOSITORY / "src/metaformer/models/kernels/budgets.json"
ARCH = 90  # the architecture whose figures are kept
NETWORKS = ("poolformerv2_s12", "identityformer_s12", "caformer_s18")
SETTINGS = (Setting(batch=1024), Setting(batch=128), *(Setting(name, batch=1024) for name in NETWORKS))
Figures = dict[str, dict[str, float]]  # all of them are better if they are lower


def figures_of(steps: Mapping[Setting, list[Launch]], augmentation: list[Launch]) -> Figures:
    """Return the figures of the steps, of RandAugment on the first setting's batch, and of all Triton kernels."""
    figures: Figures = {f"step {setting}": _of_step(launches, setting) for setting, launches in steps.items()}
    figures["RandAugment"] = _of_step(augmentation, SETTINGS[0])
    kernels: dict[str, list[KernelFacts]] = {}
    for launch in (launch for launches in [*steps.values(), augmentation] for launch in launches):
        if launch.facts is not None:
            kernels.setdefault(" ".join([launch.name, *launch.facts.flags]), []).append(launch.facts)
    return figures | {f"kernel {name}": _of_kernel(kernels[name]) for name in sorted(kernels)}


def _of_step(launches: list[Launch], setting: Setting) -> dict[str, float]:
    megabytes = sum(launch.bytes for launch in launches) / setting.batch / 1e6
    return {"megabytes_per_image": round(megabytes, 2), "launches": len(launches)}


def _of_kernel(variants: Iterable[KernelFacts]) -> dict[str, float]:
    """Return the largest figures of the specialisations of a kernel for shapes and types, with the same flags."""
    rows = [
        {
            "instructions_per_element": round(facts.instructions_per_element, 1),
            "registers": facts.registers,
            "stack_bytes": facts.stack_bytes,
            "shared_bytes": facts.shared_bytes,
            "narrow_loads": facts.narrow_loads,
        }
        for facts in variants
    ]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def read() -> Figures:
    """Return the budgets in the file."""
    found: Figures = json.loads(FILE.read_text())["figures"]
    return found


def read_versions() -> dict[str, str]:
    """Return the versions of the packages that the budgets in the file depend on."""
    found: dict[str, str] = json.loads(FILE.read_text())["versions"]
    return found


def text_of(figures: Figures, versions: Mapping[str, str]) -> str:
    """Return the text of the file for these figures, and the versions of the compilers that gave them."""
    content: dict[str, Any] = {"arch": f"sm_{ARCH}", "versions": dict(versions), "figures": figures}
    return json.dumps(content, indent=2) + "\n"


def differences(budgets: Figures, found: Figures) -> list[str]:
    """Return a line for each figure that differs from its budget, with the difference and what to do about it."""
    lines = []
    for name in sorted({*budgets, *found}):
        if name not in found:
            lines.append(f"{name}: no longer exists; remove it from {FILE.name}")
        elif name not in budgets:
            lines.append(f"{name}: has no budget; add it to {FILE.name}")
        else:
            lines += [
                _difference(f"{name}: {key}", budgets[name].get(key), value) for key, value in found[name].items()
            ]
    return [line for line in lines if line]


def _difference(what: str, budget: float | None, found: float) -> str:
    if budget is None:
        return f"{what} has no budget; add it to {FILE.name}"
    if found == budget:
        return ""
    change = f"{what} is {found:g}, and its budget is {budget:g}"
    share = f" ({found / budget - 1:+.1%})" if budget else ""
    if found > budget:
        return f"{change}{share}: worse"
    return f"{change}{share}: better; lower the budget in {FILE.name}"
