"""The wheel also carries the files of a lab, for `k2lab new`: settings, configs and notebooks, as they lie here."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LEFT_OUT = ('configs/constraints.txt', 'nbs/index.ipynb')  # of the repository, not of a lab


def lab_files() -> list[Path]:
    "The files that a new lab begins with, relative to this folder."
    found = [Path('settings.ini'), *Path('configs').rglob('*'), *Path('nbs').rglob('*.ipynb')]
    hidden = lambda p: any(part.startswith(('.', '_')) for part in p.parts)
    return [p for p in found if p.is_file() and not hidden(p) and str(p) not in LEFT_OUT]


class BuildWithLab(build_py):
    "Copies the package, and the files of a lab into k2lab/new_lab."

    def run(self):
        "Build; an editable install reads the files where they lie."
        super().run()
        if self.editable_mode:
            return
        for path in lab_files():
            target = Path(self.build_lib, 'k2lab', 'new_lab', path)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(path), str(target))


setup(cmdclass={'build_py': BuildWithLab})
