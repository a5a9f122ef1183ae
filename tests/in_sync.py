"""Fail when the package is not what the notebooks export, or when a notebook is not clean. Tracked or not, dirty or not: only what the tools change counts."""
import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def contents() -> dict:
    "The bytes of every notebook and exported module."
    return {p: p.read_bytes() for folder, kind in (('nbs', '*.ipynb'), ('k2lab', '*.py')) for p in sorted((ROOT/folder).rglob(kind))}


def main() -> int:
    "0 when exporting and cleaning change nothing."
    before = contents()
    for tool in ('nbdev-export', 'nbdev-clean'): subprocess.run([Path(sys.executable).parent/tool], cwd=ROOT, check=True)
    after = contents()
    changed = [str(p.relative_to(ROOT)) for p in sorted({*before, *after}) if before.get(p) != after.get(p)]
    if changed: print('not in sync; `make export` and nbdev-clean changed: ' + ', '.join(changed), file=sys.stderr)
    return int(bool(changed))


if __name__ == '__main__': sys.exit(main())
