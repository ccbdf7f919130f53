"""Copies conf/ into the wheel, where the installed package finds it; pyproject.toml says everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Build the package with a copy of conf/; an editable install reads conf/ itself."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "metaformer" / "conf"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build, whose files may be gone
            shutil.copytree("conf", target)


setup(cmdclass={"build_py": BuildWithConf})
