"""The records of all runs without their long parts; many are kept in a file, and read again if they changed."""

import contextlib
import json
import os
from pathlib import Path

from k2lab.lab.config import lab_path
from k2lab.lab.files import as_json, write_text
from k2lab.lab.records import read_or_mark, run_folders, run_order

INDEX, MANY = '.index.json', 200  # a lab with fewer runs keeps no index
LONG = ('inputs', 'inputs_changed', 'code', 'versions', 'hardware', 'owner', 'pins', 'score_keys')
SETTLED = ('complete', 'failed')  # nothing but its own file changes the state of such a run


def summaries(campaign: str | None = None) -> list[dict]:
    "The records of one campaign or of all, without what only `show` and `diff` need; oldest first."
    folders = run_folders(campaign)
    known = read_index() if len(folders) > MANY else {}
    entries = {folder: entry_of(folder, known) for folder in folders}
    new = {str(f): e for f, e in entries.items() if e is not known.get(str(f))}
    if len(folders) > MANY and any(keeps(entry) for entry in new.values()):
        write_index(known | new)
    found = (entry['record'] | {'folder': str(f)} for f, entry in entries.items())
    return sorted(found, key=run_order)


def entry_of(folder: Path, known: dict) -> dict:
    "`{'stat', 'record'}` of a run: the known one if its file is still the same."
    entry, stat = known.get(str(folder)), stat_of(folder)
    if entry and entry['stat'] == stat:
        return entry
    record = read_or_mark(folder)
    return {'stat': stat, 'record': {k: v for k, v in record.items() if k not in LONG}}


def stat_of(folder: Path) -> list[int]:
    "What changes whenever a record is written: size, times and inode of its file."
    with contextlib.suppress(OSError):
        s = os.stat(folder / 'run.json')
        return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    return []


def keeps(entry: dict) -> bool:
    "Whether an entry can be kept: its run is over, so its state is what its record says."
    return bool(entry['stat']) and entry['record']['status'] in SETTLED


def read_index() -> dict:
    "What the index holds; nothing if it is missing, damaged, or of another version."
    try:
        text = (lab_path('runs') / INDEX).read_bytes()
        index = json_of(text)
    except (OSError, ValueError):
        return {}
    return (
        index.get('runs', {}) if isinstance(index, dict) and index.get('long') == LONG_KEY else {}
    )


LONG_KEY = ' '.join(LONG)  # an index that left out other parts is of another version


def json_of(text: bytes):
    "What is in JSON; `ValueError` if it is none."
    try:
        import orjson
    except ImportError:
        return json.loads(text)
    return orjson.loads(text)


def write_index(entries: dict):
    "Keep the entries of runs that are over; where nothing can be written, the next command reads again."
    home = lab_path('runs')
    there = {folder: e for folder, e in entries.items() if keeps(e) and os.path.isdir(folder)}
    with contextlib.suppress(OSError):
        write_text(home / INDEX, as_json({'long': LONG_KEY, 'runs': there}))
