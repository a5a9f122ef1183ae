"""What the benchmarks share: installed texts, other tools in processes of their own, and lines of results."""

import json
import os
import random
import re
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# (CPU seconds, numbers of the rows kept) of one measurement, or (None, why it did not run)
Timing = tuple[float | None, Any]

DOCSTRING = re.compile(r'(?:"""|\'\'\')(.{200,}?)(?:"""|\'\'\')', re.S)


def median_and_range(values: list, digits: int = 2) -> str:
    "`median (lowest to highest)`."
    middle, low, high = statistics.median(values), min(values), max(values)
    return f'{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def speed(size: float, seconds: list, digits: int = 0) -> str:
    "Seconds and MB/s of the rounds, for `size` megabytes."
    rate = size / statistics.median(seconds)
    return f'{median_and_range(seconds)} s, {rate:.{digits}f} MB/s'


def megabytes_of(texts: list) -> float:
    "The size of texts in megabytes of UTF-8."
    return sum(len(text.encode()) for text in texts) / 1e6


def installed_files() -> Iterator[Path]:
    "Source files and documents of the installed packages and the standard library."
    for scheme in ('purelib', 'stdlib'):
        for path in sorted(Path(sysconfig.get_path(scheme)).rglob('*')):
            if path.suffix in ('.py', '.md', '.rst', '.txt') and path.is_file():
                yield path


def texts_in(path: Path, pages: bool) -> list[str]:
    "The docstrings of a source file, joined to one page if `pages`; a document as it is."
    text = path.read_text('utf-8', 'ignore')
    parts = DOCSTRING.findall(text) if path.suffix == '.py' else [text]
    return ['\n\n'.join(parts)] if pages and parts else parts


def installed_texts(megabytes: float, pages: bool = False) -> list[str]:
    "Different installed texts in a seeded order, up to `megabytes`; `pages` joins the docstrings of a file."
    texts = sorted({text for path in installed_files() for text in texts_in(path, pages)})
    random.Random(7).shuffle(texts)
    room = megabytes * 1e6
    return [text for text in texts if (room := room - len(text.encode())) > 0]


def write_lines(path: str, rows: list[dict]) -> str:
    "Write rows as JSON lines; returns the path."
    with open(path, 'w') as out:
        out.writelines(json.dumps(row) + '\n' for row in rows)
    return path


def as_jsonl(texts: list, folder: str) -> str:
    "The path of a new file with a row for each text, numbered from '0'."
    rows = [dict(id=str(i), text=text) for i, text in enumerate(texts)]
    return write_lines(f'{folder}/corpus.jsonl', rows)


def peer_python(module: str) -> str:
    "The interpreter in $K2LAB_PEERS (separated as in $PATH) that can import a module, or ''."
    for python in filter(None, os.environ.get('K2LAB_PEERS', '').split(os.pathsep)):
        if not subprocess.run([python, '-c', f'import {module}'], capture_output=True).returncode:
            return python
    return ''


def by_peer(name: str, *arguments: str) -> Timing:
    "The measurement of a function of peers.py in its own process; `(None, reason)` if it cannot run."
    module = 'datatrove' if name.startswith('datatrove') else name.removesuffix('_verified')
    python = peer_python(module)
    if not python:
        return None, 'not installed (K2LAB_PEERS names no Python that has it)'
    script = str(Path(__file__).with_name('peers.py'))
    done = subprocess.run(
        [python, script, name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    reply = json.loads(done.stdout.splitlines()[-1])
    return reply['seconds'], reply['kept']


def print_peers(ours: list[float], peers: dict[str, list[Timing]]):
    "Print how much longer each peer took than our seconds of each round."
    for name, timings in peers.items():
        seconds = [second for second, _ in timings if second is not None]
        if timings[0][0] is None:
            print(f'  {name}: did not run: {timings[0][1]}')
            continue
        ratio = statistics.median(seconds) / statistics.median(ours)
        print(f'  {name}: {median_and_range(seconds)} s, {ratio:.1f} times as long', flush=True)


def cpu_seconds(work: Callable) -> float:
    "CPU seconds that a call takes in this process."
    began = time.process_time()
    work()
    return time.process_time() - began


def in_new_process(work: Callable, *arguments):
    "What a call returns in a fresh process, whose peak memory is only its own."
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(work, *arguments).result()
