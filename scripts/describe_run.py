"""Print a summary of a run folder: `python scripts/describe_run.py runs/NAME`."""

import argparse
import json
from pathlib import Path

from metaformer.errors import UserError
from metaformer.program import run_program
from metaformer.training.pointers import follow

FILES = ("report.html", "metrics.jsonl", "summary.csv", "config.yaml", "log.txt", "mixed_images.png")


def main() -> None:
    """Print the last and best result, and the paths of the weights, metrics and wandb files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    manifest = follow(run_dir / "checkpoints" / "last") / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{run_dir}: not a run folder with a checkpoint")
    try:
        contents = json.loads(manifest.read_text())
    except ValueError as error:
        raise UserError(f"{manifest}: damaged ({error})") from error
    progress, best = contents["progress"], contents["progress"]["best"]
    last = progress["last_validation"]
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    print(f"model        {contents['model']}, {progress['step']} steps, {progress['samples']:,} images seen")
    if last:
        print(f"top-1        {last['top1']:.2f} % of {last['images']:,} held-out images in the last validation")
    if best["top1"] is not None:
        print(f"best         {best['top1']:.2f} %, after epoch {best['epoch']}")
    files = [name for name in FILES if (run_dir / name).is_file()]
    print(f"run folder   {run_dir}: {', '.join(files)}")
    weights = follow(run_dir / "checkpoints" / ("last" if best["top1"] is None else "best"))
    print(f"weights      {weights / (best['weights'] or 'model')}.safetensors")
    if offline:
        print(f"wandb        {offline[-1]}; to upload: wandb sync {offline[-1]}")
    print("next         docs/first-hour.md trains on images of your own")


if __name__ == "__main__":
    run_program(main)
