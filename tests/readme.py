"""README.md from the index notebook. `--write` generates it; without, a stale README fails."""

import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)#]+)')


def from_root(cell: str) -> str:
    "A markdown cell whose relative links, outside fenced code, start at the root instead of `nbs/`."
    parts = cell.split('```')
    prose = [LINK.sub(lambda m: posixpath.normpath(f'nbs/{m[1]}'), part) for part in parts[::2]]
    parts[::2] = prose
    return '```'.join(parts)


def readme() -> str:
    "The text of README.md: the markdown cells of nbs/index.ipynb."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text())['cells']
    if any(cell['cell_type'] != 'markdown' for cell in cells):
        raise SystemExit('nbs/index.ipynb: only markdown cells can be part of README.md')
    return '\n\n'.join(from_root(''.join(cell['source']).strip()) for cell in cells) + '\n'


if __name__ == '__main__':
    if '--write' in sys.argv[1:]:
        (ROOT / 'README.md').write_text(readme())
    elif (ROOT / 'README.md').read_text() != readme():
        sys.exit('README.md is not the index notebook: python tests/readme.py --write')
