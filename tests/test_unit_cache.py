"""Refined units of earlier runs: taken when all that decides them is the same, and never otherwise."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from k2lab.corpus import unit_cache
from k2lab.corpus.pipeline import Refining, refine
from k2lab.corpus.unit_cache import UnitCache
from k2lab.corpus.units import Plan, plan_units, run_units
from k2lab.lab.config import LabError

SHORTER = 'k2lab.corpus.units:shorter'


def write(path: Path, n: int, word: str = 'page'):
    rows = (dict(text=f'{word} {i} of {path.stem}', source='s', n=i) for i in range(n))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def place(tmp_path):
    for name in 'ab':
        write(tmp_path / f'{name}.jsonl', 60)
    return tmp_path


def run(place, out, cache, files='*.jsonl', **plan):
    units = plan_units(f'{place}/{files}', 1000)
    return run_units(units, Plan(ending='.arrow', **plan), place / out, cache=cache)


def files_of(folder) -> dict:
    "{name without the unit's key: bytes} of the shards."
    index = json.loads((folder / 'shards.json').read_text())
    return [(folder / shard['name']).read_bytes() for shard in index['shards']]


def test_a_second_run_takes_all_units_and_is_the_same_byte_for_byte(place):
    without = run(place, 'without', None)
    cache = UnitCache(place / 'cache')
    first, second = run(place, 'one', cache), run(place, 'two', UnitCache(place / 'cache'))
    assert first['cached'] == 0 and second['cached'] == second['units'] > 3
    assert files_of(place / 'one') == files_of(place / 'two') == files_of(place / 'without')
    timed = ('cached', 'cpu_seconds', 'plan')
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in second.items() if k not in timed
    }
    assert without['digest'] == second['digest']


def test_a_changed_byte_setting_or_code_is_new_work(place, monkeypatch):
    cache = UnitCache(place / 'cache')
    one = run(place, 'one', cache)
    assert run(place, 'two', cache, operator=SHORTER, config=dict(least=3))['cached'] == 0
    path, before = place / 'a.jsonl', os.stat(place / 'a.jsonl')
    path.write_text(path.read_text().replace('page 7 ', 'pagE 7 '))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time
    changed = run(place, 'three', UnitCache(place / 'cache'))
    assert changed['cached'] == one['units'] // 2 and changed['digest'] != one['digest']
    monkeypatch.setattr(unit_cache, 'code_of', lambda operator: 'newer')
    assert run(place, 'four', cache)['cached'] == 0
    monkeypatch.setattr(unit_cache, 'library_versions', lambda: ['newer'])
    assert run(place, 'five', cache)['cached'] == 0


def test_files_that_moved_are_found_and_rejects_name_the_new_place(place):
    cache = UnitCache(place / 'cache')
    bad = Plan(ending='.arrow')
    for folder in ('x', 'y'):
        write(place / folder / 'c.jsonl', 20)
        with open(place / folder / 'c.jsonl', 'a') as file:
            file.write('not a row\n')
    made = [
        run_units(
            plan_units(f'{place}/{folder}/c.jsonl'),
            bad,
            place / f'out{folder}',
            max_bad=1,
            cache=cache,
        )
        for folder in 'xy'
    ]
    assert made[1]['cached'] == 1 and made[1]['rejected'] == 1
    (rejects,) = (place / 'outy/rejects').iterdir()
    assert json.loads(rejects.read_text())['file'] == f'{place}/y/c.jsonl'


@pytest.mark.parametrize('how', ['cut', 'gone', 'no entry'])
def test_a_damaged_unit_is_worked_on_anew_and_replaced(place, how):
    cache = UnitCache(place / 'cache')
    one = run(place, 'one', cache)
    want = files_of(place / 'one')
    for folder in (place / 'cache').iterdir():
        (shard,) = folder.glob('*.arrow')
        damaged = folder / 'entry.json' if how == 'no entry' else shard
        data = damaged.read_bytes()
        damaged.unlink()
        if how != 'gone':
            damaged.write_bytes(data[: len(data) // 2])
    again = run(place, 'two', UnitCache(place / 'cache'))
    assert again['cached'] == 0 and again['digest'] == one['digest']
    assert files_of(place / 'two') == want


def test_the_room_is_kept_and_the_units_used_last_stay(place):
    cache = UnitCache(place / 'cache')
    run(place, 'one', cache)
    need = cache.bytes
    for _, _, folder in cache.entries():
        os.utime(folder / 'entry.json', (1, 1))
    run(place, 'b', cache, files='b.jsonl')  # used again
    small = UnitCache(place / 'cache', gigabytes=need * 0.6 / 1e9)
    small.trim()
    assert small.bytes <= small.room
    assert run(place, 'b2', small, files='b.jsonl')['cached'] > 0
    for wrong in (0, -1, True):
        with pytest.raises(LabError, match='a number above 0'):
            UnitCache(place / 'cache', gigabytes=wrong)
    tiny = UnitCache(place / 'tiny', gigabytes=1e-9)
    assert run(place, 'tiny_out', tiny)['rows'] == 120 and not tiny.entries()


def forever(place: str):
    cache = UnitCache(f'{place}/cache')
    for i in range(1000):
        run(Path(place), f'work{i}', cache, operator=SHORTER, config=dict(least=i % 20))


def test_a_killed_run_leaves_no_half_unit(place):
    context = multiprocessing.get_context('fork')
    for i in range(4):
        process = context.Process(target=forever, args=(str(place),))
        process.start()
        many = lambda least=3 * i: len([*place.glob("cache/*/entry.json")]) > least
        deadline = time.monotonic() + 60
        while not many() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.003 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cache = UnitCache(place / 'cache')
    entries = cache.entries()
    assert entries
    for _, _, folder in entries:
        entry = json.loads((folder / 'entry.json').read_text())
        for name, digest in entry['files'].items():
            assert unit_cache.digest_of(folder / name) == digest
    for least in range(0, 20, 3):
        plan = dict(operator=SHORTER, config=dict(least=least))
        want = run(place, f'want{least}', None, **plan)
        assert run(place, f'got{least}', cache, **plan)['digest'] == want['digest']


def test_another_tokenizer_under_the_same_path_is_new_work(place):
    folder = place / 'tokenizer'
    folder.mkdir()
    settings = Refining(min_chars=1, quality=None)
    from k2lab.corpus.pipeline import folder_sha256

    (folder / 'tokenizer.json').write_text('{}')
    one = folder_sha256(str(folder))
    (folder / 'tokenizer.json').write_text('{"a": 1}')
    assert folder_sha256(str(folder)) != one and folder_sha256('') == ''
    cache = UnitCache(place / 'cache')
    for out in ('one', 'two'):
        refine([dict(files=f'{place}/*.jsonl')], ['s'], settings, place / out, cache=cache)
    assert cache.taken == cache.added == 1
