"""The records of all runs without their long parts; many are kept in a file, and read again if they changed."""

import contextlib
import json
import os
import re
from pathlib import Path

from k2lab.lab.config import LabError, lab_path
from k2lab.lab.files import as_json, write_text
from k2lab.lab.records import iso_time, read_or_mark, run_folders, started_at

INDEX, MANY = '.index.json', 200  # a lab with fewer runs keeps no index
LONG = ('inputs', 'inputs_changed', 'code', 'versions', 'hardware', 'owner', 'pins', 'score_keys')
VERSION = f'1 without {" ".join(LONG)}'  # of the index
SETTLED = ('complete', 'failed')  # nothing but its own file changes the state of such a run


def summaries(campaign: str | None = None) -> list[dict]:
    "The records of one campaign or of all, without what only `show` and `diff` need; oldest first."
    folders = [str(folder) for folder in run_folders(campaign)]
    known = read_index() if len(folders) > MANY else {}
    entries = {folder: entry_of(folder, known.get(folder)) for folder in folders}
    new = {folder: e for folder, e in entries.items() if e is not known.get(folder)}
    if len(folders) > MANY and any(map(keeps, new.values())):
        write_index(known | new)
    order = sorted(entries, key=lambda f: (os.path.dirname(f), *entries[f]['order']))
    return [entries[folder]['record'] | {'folder': folder} for folder in order]


def entry_of(folder: str, known: dict | None) -> dict:
    "`{'stat', 'order', 'record'}` of a run: the known entry if its file is still the same."
    stat = stat_of(f'{folder}/run.json')
    if known and known['stat'] == stat:
        return known
    record = read_or_mark(Path(folder))
    number = re.search(r'(?<=\.)\d+', os.path.basename(folder))
    order = [iso_time(started_at(record)), int(number[0]) if number else 0]
    short = {key: v for key, v in record.items() if key not in LONG}
    return {'stat': stat, 'order': order, 'record': short}


def stat_of(path: str) -> list[int]:
    "What changes whenever a file is written: its size, times and inode; empty if it is gone."
    with contextlib.suppress(OSError):
        s = os.stat(path)
        return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    return []


def keeps(entry: dict) -> bool:
    "Whether an entry can be kept: its run is over, so its state is what its record says."
    return bool(entry['stat']) and entry['record']['status'] in SETTLED


def read_index() -> dict:
    "What the index holds; nothing if it is missing, damaged, or of another version."
    try:
        index = json_of((lab_path('runs') / INDEX).read_bytes())
    except (OSError, ValueError):
        return {}
    return index['runs'] if isinstance(index, dict) and index.get('version') == VERSION else {}


def write_index(entries: dict):
    "Keep the entries of runs that are over; where nothing can be written, the next command reads again."
    there = {folder: e for folder, e in entries.items() if keeps(e) and os.path.isdir(folder)}
    with contextlib.suppress(OSError, LabError):
        write_text(lab_path('runs') / INDEX, json_text({'version': VERSION, 'runs': there}))


def json_of(text: bytes):
    "What is in JSON; `ValueError` if it is none."
    try:
        import orjson
    except ImportError:
        return json.loads(text)
    return orjson.loads(text)


def json_text(value) -> str:
    "Strict JSON of plain values, five times as fast as `as_json` for long lists."
    try:
        import orjson

        return orjson.dumps(value).decode()
    except (ImportError, TypeError):  # TypeError: an integer of more than 64 bits
        return as_json(value)
