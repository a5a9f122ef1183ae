"""The wheel also carries the files of a lab, for `k2lab new`: settings, configs and notebooks, as they lie here."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithLab(build_py):
    "Copies the package, and the files of a lab into k2lab/new_lab."

    def run(self):
        "Build; an editable install reads the files where they lie."
        super().run()
        if self.editable_mode:
            return
        home = Path(self.build_lib, 'k2lab', 'new_lab')
        shutil.rmtree(home, ignore_errors=True)
        for name in ('configs', 'nbs'):
            shutil.copytree(name, home / name, ignore=shutil.ignore_patterns('.*', '_*'))
        shutil.copy('settings.ini', home)


setup(cmdclass={'build_py': BuildWithLab})
