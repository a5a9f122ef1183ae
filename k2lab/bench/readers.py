"""Reading and writing JSONL against datatrove: `python -m k2lab.bench shards`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from k2lab.bench.harness import by_peer, installed_texts, print_peers, speed


def copy_seconds(path: str) -> float:
    "CPU seconds from a JSONL file through Arrow tables to shards with manifests, imports excluded."
    from k2lab.corpus.units import Plan, plan_units, run_units

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'one.jsonl').write_text('{"text": "the first run imports what is needed"}')
        run_units(plan_units(f'{folder}/one.jsonl'), Plan(), f'{folder}/one')
        began = time.process_time()
        run_units(plan_units(path), Plan(), f'{folder}/all')
        return time.process_time() - began


def copied_by_us(path: str) -> float:
    "`copy_seconds` in a process of its own, as the peer has one: a heap full of texts would slow it down."
    code = f'from k2lab.bench.readers import copy_seconds; print(copy_seconds({path!r}))'
    command = [sys.executable, '-c', code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_joined(texts: list[str], each: int, path: str) -> str:
    "Write a JSONL file with `each` texts in a row; returns its path."
    joined = ['\n'.join(texts[i : i + each]) for i in range(0, len(texts), each)]
    with open(path, 'w', encoding='utf-8') as out:
        for text in joined:
            out.write(json.dumps(dict(text=text, source='installed'), ensure_ascii=False) + '\n')
    return path


def shards(megabytes: float = 60, rounds: int = 3):
    "Print the speed of reading and writing JSONL on one core, for installed texts and for rows of about 5 kB."
    texts = installed_texts(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        for name, each in (('as they are', 1), ('joined by threes', 3)):
            path = write_joined(texts, each, f'{folder}/{each}.jsonl')
            size = os.path.getsize(path) / 1e6
            times = [(copied_by_us(path), by_peer('datatrove_copy', path)) for _ in range(rounds)]
            ours = [seconds for seconds, _ in times]
            print(f'{name}, {len(texts) // each} texts, {size:.0f} MB: {speed(size, ours)}')
            print_peers(ours, {'datatrove': [timing for _, timing in times]})
