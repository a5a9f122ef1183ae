"""Execute notebooks from top to bottom and compare what their cells show with the stored outputs.

    python tests/notebooks.py [NOTEBOOK ...]            fail if a cell raises, writes to stderr or shows something else
    python tests/notebooks.py --write [NOTEBOOK ...]    store what the cells show

The outputs of library notebooks, of guides and of the lesson half of stages are stored. The run half of
a stage is executed too; its outputs depend on the machine and are not stored. A cell tagged `varies` is
executed, but its output is neither stored nor compared.
"""

import argparse
import difflib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = re.compile(
    r'^#\| *(slow|gpu|hub|notest|eval: *false)\b', re.M
)  # tst_flags in pyproject.toml
HEAVY = [
    'torch',
    'transformers',
    'trl',
    'peft',
    'datasets',
    'matplotlib.figure',
    'pyarrow.parquet',
    'numba',
    'IPython',
]
# one thread: sums are added in one order, whatever the number of cores
ENVIRONMENT = {
    'OMP_NUM_THREADS': '1',
    'IN_TEST': '1',
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'COLUMNS': '80',
}


def source(cell: dict) -> str:
    "The text of a cell."
    return ''.join(cell['source'])


def tags(cell: dict) -> list:
    "The tags of a cell."
    return cell['metadata'].get('tags', [])


def lesson_length(cells: list) -> int:
    "How many cells come before the run half; all of them in a notebook without one."
    return next((i for i, cell in enumerate(cells) if 'parameters' in tags(cell)), len(cells))


def joined(value):
    "Text that a notebook keeps as a list of lines, whole."
    return ''.join(value) if isinstance(value, list) else value


def is_notice(out: dict) -> bool:
    "Whether an output is a notice for the terminal: standard error, or DeepSpeed's line about its accelerator."
    line = 'real_accelerator' in joined(out.get('text', ''))
    return out.get('name') == 'stderr' or (out['output_type'] == 'stream' and line)


def shown(outputs: list) -> list:
    "What is compared of a cell's outputs: its text and pictures, without counters and without standard error."
    kept = []
    for out in outputs:
        if is_notice(out):
            continue
        if out['output_type'] == 'stream':
            kept.append({'output_type': 'stream', 'text': joined(out['text'])})
        elif out['output_type'] in ('execute_result', 'display_data'):
            data = {kind: joined(value) for kind, value in out['data'].items()}
            kept.append({'output_type': 'display_data', 'data': data})
        else:
            kept.append({'output_type': 'error', 'text': f'{out["ename"]}: {out["evalue"]}'})
    return kept


def difference(stored: list, now: list) -> str:
    "The lines that differ between two outputs as `shown`, or an empty string."
    if stored == now:
        return ''
    sides = [
        json.dumps(side, indent=1, ensure_ascii=False).replace('\\n', '\n').splitlines()
        for side in (stored, now)
    ]
    return '\n'.join(list(difflib.unified_diff(*sides, 'stored', 'now', lineterm='', n=0))[2:14])


def run(path: Path) -> tuple[list, str]:
    "The cells of a notebook after executing it, and the error that stopped it or an empty string."
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb

    nb = read_nb(path)
    shell = CaptureShell(path, mpl_format='svg')
    os.chdir(path.parent)

    def skip(cell):
        return cell.cell_type != 'code' or SKIPPED.search(cell.source)

    try:
        shell.run_all(nb, exc_stop=True, preproc=skip, cell_timeout=600)
    except Exception:
        return nb.cells, shell.prettytb(fname=path) or 'it stopped'
    return nb.cells, ''


def faults(before: list, cells: list) -> list[str]:
    "What a reader would be surprised by: red output, and results that are not the stored ones."
    lesson, found = lesson_length(before), []
    for i, (old, new) in enumerate(zip(before, cells, strict=True)):
        if old['cell_type'] != 'code' or 'varies' in tags(old) or SKIPPED.search(source(old)):
            continue
        now = shown(new.get('outputs', []))
        red = [joined(out['text']) for out in new.get('outputs', []) if out.get('name') == 'stderr']
        if red and os.environ.get('K2LAB_STRICT'):
            found.append(f'cell {i} writes to stderr: {red[0].strip()[:300]}')
        elif i < lesson and (changed := difference(shown(old['outputs']), now)):
            found.append(f'cell {i} shows something else than what is stored:\n{changed}')
    return found


def store(path: Path, notebook: dict, cells: list):
    "Write what the lesson half shows into the notebook; the rest of it stays as it is."
    lesson = lesson_length(notebook['cells'])
    for i, (old, new) in enumerate(zip(notebook['cells'], cells, strict=True)):
        if old['cell_type'] == 'code':
            kept = i < lesson and 'varies' not in tags(old) and not SKIPPED.search(source(old))
            outputs = [cleaned(out) for out in new.get('outputs', []) if not is_notice(out)]
            old['outputs'] = outputs if kept else []
    path.write_text(
        json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
    )


def cleaned(out: dict) -> dict:
    "An output in the form in which notebooks are kept: lists of lines, no counter."
    lines = lambda value: value.splitlines(keepends=True) if isinstance(value, str) else value
    out = {key: value for key, value in dict(out).items() if key != 'execution_count'}
    if 'data' in out:
        out |= {
            'data': {kind: lines(joined(value)) for kind, value in out['data'].items()},
            'metadata': {},
        }
    if out['output_type'] == 'execute_result':
        out['execution_count'] = None
    if 'text' in out:
        out['text'] = lines(joined(out['text']))
    return out


def check(path: Path, write: bool) -> tuple[list[str], float]:
    "The faults of a notebook and the seconds it took."
    began, notebook = time.monotonic(), json.loads(path.read_text(encoding='utf-8'))
    sys.path.insert(0, str(ROOT))
    cells, error = run(path)
    if error:
        return [error], time.monotonic() - began
    if write:
        store(path, notebook, cells)
        notebook = json.loads(path.read_text(encoding='utf-8'))
    return faults(notebook['cells'], cells), time.monotonic() - began


def pool(workers: int) -> ProcessPoolExecutor:
    "Worker processes that each execute one notebook, forked from one that has imported the heavy packages."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(HEAVY)
    return ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1)


def notebooks(names: list) -> list[Path]:
    "The notebooks named, or all below nbs/, those of stages first because they take longest."
    if names:
        return [Path(name).resolve() for name in names]
    every = sorted(
        p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
    )
    return sorted(every, key=lambda p: (p.parent.name != 'nbs', p))


def main() -> int:
    "0 when every notebook runs and shows what is stored."
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument('notebooks', nargs='*')
    options.add_argument('--write', action='store_true', help='store what the cells show')
    options.add_argument('--workers', type=int, default=min(2, os.cpu_count() or 1))
    asked = options.parse_args()
    os.environ |= ENVIRONMENT
    failed, took = 0, {}
    with pool(asked.workers) as workers:
        running = {
            workers.submit(check, path, asked.write): path for path in notebooks(asked.notebooks)
        }
        for done in as_completed(running):
            path = running[done].relative_to(ROOT)
            wrong, took[str(path)] = done.result()
            failed += bool(wrong)
            print(
                '\n'.join([f'FAILED {path}', *wrong])
                if wrong
                else f'ok {path} {took[str(path)]:.1f} s',
                flush=True,
            )
    print(f'{len(took) - failed} passed, {failed} failed')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
