"""Generates options.md from the comments on the configuration's fields."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from metaformer.composing import option_text
from metaformer.config import TrainConfig, ValidateConfig
from metaformer.option_help import describe_options_in_markdown

HEADER = """# All options

Every field with its default, as `--help` of the programs explains it. `NAME=VALUE` sets a field, `GROUP=CHOICE` several
at once ([configuration.md](configuration.md)).

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    programs = (("train", TrainConfig), ("validate", ValidateConfig))
    sections = [option_text(name, kind, describe=describe_options_in_markdown) for name, kind in programs]
    files.append(File.generated(config, "options.md", content=HEADER + "\n".join(sections)))
    return files
