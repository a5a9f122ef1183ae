"""Corpora that do not fit into memory: broken files lose only what is broken.

No kill, full disk or other number of workers loses or doubles a row."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import psutil
import pytest

from k2lab.corpus import readers, units as units_
from k2lab.corpus.readers import LINE, Reader, as_table, find_files
from k2lab.corpus.units import Plan, plan_units, receipt_of, run_units, shard_files
from k2lab.corpus.writers import Shards, json_lines
from k2lab.lab.config import LabError
from k2lab.text.rows import Part, compress, read_rows, write_rows

HERE = Path(__file__).parent
ALL = dict(max_bad=1, allow_partial=True)


def line(i, **more) -> bytes:
    return json.dumps(dict(text=f'document {i} of a file', source='test', **more)).encode()


def good(n: int) -> list:
    return [line(i) for i in range(n)]


def joined(*lines) -> bytes:
    return b''.join(one + b'\n' for one in lines)


def rows_of(folder) -> list:
    "All rows of a sealed folder, in order."
    return [
        row
        for path in shard_files(folder)
        for table in Reader(path).tables()
        for row in table.to_pylist()
    ]


def rejected(folder) -> list:
    "All entries in rejects/."
    return [
        json.loads(l)
        for path in sorted((folder / 'rejects').iterdir())
        for l in path.read_text().splitlines()
    ]


# ---- operators, which workers import from here --------------------


def slow(table, seconds: float):
    time.sleep(seconds)
    return table, dict(removed={})


def noted(table, path: str):
    "Adds a line to a file for each table."
    with open(path, 'a') as f:
        f.write('table\n')
    return table, dict(removed={})


def dying(table, flag: str, word: str, once: bool):
    "Kills its process at the table that holds `word`, once or always."
    if any(word in text for text in table['text'].to_pylist()) and not (
        once and os.path.exists(flag)
    ):
        open(flag, 'a').write('died\n')
        os.kill(os.getpid(), signal.SIGKILL)
    return table, dict(removed={})


def gone(table, path: str, how: str):
    "Spoils the file that is being read."
    if how == 'removed':
        Path(path).unlink(missing_ok=True)
    else:
        os.truncate(path, 100)
    return table, dict(removed={})


def forgetful(table):
    return table.slice(1), dict(removed={})


def noisy(table):
    print('{"unread": "an operator that prints"}')
    return table, [dict(step='a', removed={'x': 0}), dict(step='b', removed={})]


# ---- seventeen kinds of broken file --------------------

HALF_GZ, HALF_ZST = (
    compress(
        joined(*(os.urandom(40).hex().encode().join([b'{"text": "', b'"}']) for _ in range(3000))),
        f'.{kind}',
    )
    for kind in ('gz', 'zst')
)
BROKEN = {  # name: (file, bytes, good rows, bad rows, words of the reason, not whole)
    'bad JSON': ('a.jsonl', joined(*good(5), b'{"text": "no end', *good(5)), 10, 1, 'not JSON', ''),
    'invalid UTF-8': (
        'a.jsonl',
        joined(*good(5), b'{"text": "caf\xe9", "source": "x"}', *good(5)),
        10,
        1,
        'not UTF-8: byte 14 of the line is 0xe9',
        '',
    ),
    'BOM': ('a.jsonl', b'\xef\xbb\xbf' + joined(*good(4)), 4, 0, '', ''),
    'NUL': (
        'a.jsonl',
        joined(
            *good(3), b'{"text": "a\x00b", "source": "x"}', b'{"text": "a\\u0000b", "source": "x"}'
        ),
        4,
        1,
        'control character',
        '',
    ),
    'list or number': (
        'a.jsonl',
        joined(*good(5), b'[1, 2]', b'7', b'null', *good(5)),
        10,
        3,
        'a row must be an object',
        '',
    ),
    'text is a number': (
        'a.jsonl',
        joined(*good(3), b'{"text": 5, "source": "x"}', *good(3)),
        6,
        1,
        "'text' must be text, this is int",
        '',
    ),
    'half a character': (
        'a.jsonl',
        joined(
            *good(2),
            b'{"text": "\\ud83d", "source": "x"}',
            *good(2),
            b'{"text": "a", "tag": "\\ud83d"}',
        ),
        4,
        2,
        'half a character',
        '',
    ),
    '20 MB line': ('a.jsonl', joined(*good(2), line('x' * 20_000_000), *good(2)), 5, 0, '', ''),
    'cut gz': (
        'a.jsonl.gz',
        HALF_GZ[: len(HALF_GZ) // 2],
        None,
        None,
        'cut off',
        'it is cut or damaged',
    ),
    'cut zst': (
        'a.jsonl.zst',
        HALF_ZST[: len(HALF_ZST) // 2],
        None,
        None,
        'cut off',
        'it is cut or damaged',
    ),
    'duplicate keys': (
        'a.jsonl',
        joined(b'{"text": "first", "text": "last", "source": "x"}', *good(2)),
        3,
        0,
        '',
        '',
    ),
    'CRLF': ('a.jsonl', joined(*good(4)).replace(b'\n', b'\r\n'), 4, 0, '', ''),
    'no last line end': ('a.jsonl', joined(*good(4))[:-1], 4, 0, '', ''),
    'mixed schemas': (
        'a.jsonl',
        joined(line(0, n=1), line(1, n='one'), line(2, m=[1]), line(3, n={'m': None})),
        4,
        0,
        '',
        '',
    ),
    'empty': ('a.jsonl', b'', 0, 0, 'no rows in this file', ''),
    'LFS pointer': (
        'a.jsonl',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n',
        0,
        0,
        'git lfs pull',
        'a Git LFS pointer',
    ),
    'damaged parquet': (
        'a.parquet',
        b'PAR1' + bytes(500) + b'PAR1',
        0,
        0,
        'not a whole parquet file',
        'not a whole parquet file',
    ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_file_loses_only_what_is_broken(tmp_path, name):
    file, data, rows, bad, reason, partial = BROKEN[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / 'whole.jsonl').write_bytes(joined(line('whole')))
    index = run_units(
        plan_units([f'{tmp_path}/{file}', f'{tmp_path}/whole.jsonl']),
        Plan(),
        tmp_path / 'out',
        **ALL,
    )
    told = [r for r in rejected(tmp_path / 'out')]
    if rows is None:  # the whole lines of what can still be unpacked
        assert 500 < index['rows'] - 1 < 2990 and index['rejected'] == 1
    else:
        assert (index['rows'] - 1, index['rejected']) == (rows, bad)
    assert [r['text'] for r in rows_of(tmp_path / 'out')][-1] == 'document whole of a file' and len(
        rows_of(tmp_path / 'out')
    ) == index['rows']
    assert len(told) == index['rejected'] + bool(partial) + bool(index['empty']) and all(
        r['file'].endswith(file) and r['offset'] >= 0 for r in told
    )
    assert not reason or reason in ' '.join(r['reason'] for r in told)
    assert bool(index['partial']) == bool(partial) and partial in ''.join(index['partial'])
    if partial:
        with pytest.raises(LabError, match='1 file not whole'):
            run_units(
                plan_units([f'{tmp_path}/{file}', f'{tmp_path}/whole.jsonl']),
                Plan(),
                tmp_path / 'out',
                max_bad=1,
            )
    elif bad:
        with pytest.raises(LabError, match=f'{bad} of {rows + 1 + bad} rows are bad'):
            run_units(
                plan_units([f'{tmp_path}/{file}', f'{tmp_path}/whole.jsonl']),
                Plan(),
                tmp_path / 'out',
            )


def test_offsets_lead_to_the_bad_lines(tmp_path):
    data = joined(*good(3), b'{"bad', *good(2), b'[]')
    (tmp_path / 'a.jsonl').write_bytes(data)
    told = []
    assert [t.num_rows for t in Reader(tmp_path / 'a.jsonl', on_bad=told.append).tables()] == [5]
    assert [(b['line'], data[b['offset'] :].split(b'\n')[0], b['bytes']) for b in told] == [
        (4, b'{"bad', 5),
        (7, b'[]', 2),
    ]


@pytest.mark.parametrize('how', ['removed', 'cut'])
def test_a_source_that_disappears_is_named_and_its_unit_is_not_done(tmp_path, monkeypatch, how):
    monkeypatch.setattr(
        readers, 'BATCH', 500
    )  # several tables a unit, so that it happens in the middle of one
    monkeypatch.setattr(units_, 'BATCH', 500)
    for name in 'ab':
        (tmp_path / f'{name}.jsonl').write_bytes(joined(*(line(f'{name}{i}') for i in range(50))))
    units = plan_units(f'{tmp_path}/?.jsonl', size=2000)
    victim, before = tmp_path / 'a.jsonl', (tmp_path / 'a.jsonl').read_bytes()
    plan = Plan('test_shards:gone', dict(path=str(victim), how=how))
    with pytest.raises(LabError, match=r'units could not be read, the others are done: .*a\.jsonl'):
        run_units(units, plan, tmp_path / 'out')
    assert [bool(receipt_of(u, plan, tmp_path / 'out')) for u in units] == [
        u[0].path.endswith('b.jsonl') for u in units
    ]
    assert not (tmp_path / 'out/shards.json').exists()
    victim.write_bytes(before)
    assert (
        run_units(plan_units(f'{tmp_path}/?.jsonl', size=2000), Plan(), tmp_path / 'out')['rows']
        == 100
    )


def test_a_line_longer_than_any_document_is_dropped_in_passing(tmp_path, monkeypatch):
    monkeypatch.setattr(readers.split_lines, '__defaults__', (1000,))
    (tmp_path / 'a.jsonl').write_bytes(joined(*good(2), line('x' * 500_000), *good(2)))
    told = []
    assert [t.num_rows for t in Reader(tmp_path / 'a.jsonl', on_bad=told.append).tables()] == [4]
    assert [(b['line'], b['bytes']) for b in told] == [
        (3, 500_000 + len(line('')) + 1)
    ] and LINE == 64 << 20


def test_what_a_fast_parser_would_change_or_refuse_is_kept(tmp_path):
    odd = (
        b'{"text": "a", "source": "x", "id": 123456789012345678901234567890, "loss": NaN, "deep": '
        + b'[' * 1100
        + b']' * 1100
        + b'}'
    )
    (tmp_path / 'a.jsonl').write_bytes(
        joined(
            odd.replace(b'NaN', b'1.5')
            .replace(b'[', b'')
            .replace(b']', b'')
            .replace(b', "deep": ', b''),
            odd.split(b', "deep"')[0] + b'}',
        )
    )
    index = run_units(plan_units(f'{tmp_path}/a.jsonl'), Plan(), tmp_path / 'out')
    assert shard_files(tmp_path / 'out')[0].read_bytes() == joined(
        b'{"text":"a","source":"x","id":123456789012345678901234567890,"loss":1.5}',
        b'{"text":"a","source":"x","id":123456789012345678901234567890,"loss":null}',
    )
    assert index['rejected'] == 0


def test_both_parsers_give_the_same_bytes(tmp_path, monkeypatch):
    file = tmp_path / 'a.jsonl'
    file.write_bytes(
        joined(
            *(
                data
                for name, (kind, data, *_) in BROKEN.items()
                if kind == 'a.jsonl' and name not in ('20 MB line', 'LFS pointer')
            ),
            line('ü\x7f\u2028\t"\\/\x01'),
            line(1, n=1.5, m=[1e-7, None, True]),
        )
    )

    def read():
        bad = []
        return b''.join(json_lines(t) for t in Reader(file, on_bad=bad.append).tables()), [
            (b['offset'], b['reason']) for b in bad
        ]

    fast = read()
    monkeypatch.setattr(readers, 'codec', lambda: (readers.loads_exactly, readers.dumps_exactly))
    assert read() == fast and len(fast[1]) == 9 + 1  # a BOM in the middle of a file is none


# ---- kinds, archives, places --------------------


@pytest.mark.parametrize('ending', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet'])
def test_written_and_read_again(tmp_path, ending):
    long = os.urandom(150_000).hex()  # enough to come out of a compressor at once
    table = as_table(
        dict(
            text=[long, 'zwei ü', ''],
            source=['a', 'b', 'c'],
            licence=['MIT', None, None],
            extra=['{"n":1,"licence":"old"}', '{"licence":["a","b"]}', '{"extra":{"x":null}}'],
        )
    )
    with Shards(tmp_path, 'x', ending, room=1) as out:
        for _ in range(3):
            out.write(table)
    assert [s['rows'] for s in out.done] == [3, 3, 3] and [s['name'] for s in out.done] == [
        f'x-00{i}{ending}' for i in range(3)
    ]
    back = [
        row
        for s in out.done
        for t in Reader(tmp_path / s['name'], columns=('licence',)).tables()
        for row in t.to_pylist()
    ]
    first = dict(text=long, source='a', licence='MIT', extra='{"n":1}')
    assert back == 3 * [
        first,
        dict(text='zwei ü', source='b', licence=None, extra='{"licence":["a","b"]}'),
        dict(text='', source='c', licence=None, extra='{"extra":{"x":null}}'),
    ]
    if ending != '.parquet':
        assert (
            len(read_rows(tmp_path / out.done[0]['name'])) == 3
        )  # the reader of 03_rows takes the same manifest


def test_csv_text_markdown_html_and_archives_of_several_members(tmp_path):
    (tmp_path / 'a.csv').write_bytes(
        b'\xef\xbb\xbftext,id\r\n"two\r\nlines, ""quoted""",1\r\n\r\nshort\r\nbad \xff,2\r\nlast,3'
    )
    (tmp_path / 'b.md').write_bytes(b'# Title\r\ntext')
    (tmp_path / 'c.txt').write_bytes('wide ü'.encode('utf-16'))
    (tmp_path / 'd.txt').write_bytes(b'latin \xfc')
    (tmp_path / 'e.html').write_bytes(
        (
            '<html><head><meta charset="iso-8859-1"></head><body>'
            '<p>A graph of cafés and of the roads between them.</p></body></html>'
        ).encode('latin-1')
    )
    (tmp_path / 'f.jsonl.gz').write_bytes(
        gzip.compress(line(1)[:9]) + gzip.compress(line(1)[9:] + b'\n') + bytes(7)
    )
    index = run_units(
        plan_units(f'{tmp_path}/*.*', licence='MIT'),
        Plan(columns=('licence',)),
        tmp_path / 'out',
        **ALL,
    )
    rows = rows_of(tmp_path / 'out')
    assert [r['text'] for r in rows] == [
        'two\r\nlines, "quoted"',
        'last',
        '# Title\r\ntext',
        'wide ü',
        'A graph of cafés and of the roads between them.',
        'document 1 of a file',
    ]
    assert [r['source'] for r in rows] == [
        'a.csv',
        'a.csv',
        'b.md',
        'c.txt',
        'e.html',
        'test',
    ] and json.loads(rows[0]['extra']) == {'id': '1', 'licence': 'MIT'}
    assert [
        (Path(r['file']).name, r['reason'].split(':')[0]) for r in rejected(tmp_path / 'out')
    ] == [('a.csv', '1 fields, the header has 2'), ('a.csv', 'not UTF-8'), ('d.txt', 'not UTF-8')]
    assert (index['units'], index['files']) == (1, 6)


def test_a_quote_that_is_never_closed_is_no_silent_loss(tmp_path):
    (tmp_path / 'a.csv').write_text('text,id\none,1\n"two,2\nthree,3\nfour,4\n')
    with pytest.raises(LabError, match='the quote in line 3 is never closed'):
        run_units(plan_units(f'{tmp_path}/a.csv'), Plan(), tmp_path / 'out', max_bad=1)


def test_foreign_parquet_keeps_all_its_columns(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table(
            dict(
                text=['a', None, 'c'],
                day=[datetime.date(2026, 1, 2)] * 3,
                extra=['{"no": "spreading"}'] * 3,
                big=[2**63 - 1, 2, 3],
            )
        ),
        tmp_path / 'a.parquet',
    )
    told = []
    (table,) = Reader(tmp_path / 'a.parquet', on_bad=told.append).tables()
    assert table['text'].to_pylist() == ['a', 'c'] and [b['offset'] for b in told] == [2]
    assert json.loads(table['extra'][0].as_py()) == dict(
        day='2026-01-02', extra='{"no": "spreading"}', big=2**63 - 1
    )


def test_globs_and_remote_places(tmp_path):
    for name in ('x/a.jsonl', 'x/y/b.jsonl.gz'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, [json.loads(l) for l in good(30)], 'domain')
        with fsspec.open(f'memory://shards/{name}', 'wb') as f:
            f.write((tmp_path / name).read_bytes())
    assert [Path(p).name for p in find_files(f'{tmp_path}/**/*.json*')] == ['a.jsonl', 'b.jsonl.gz']
    near = run_units(plan_units(f'{tmp_path}/x/**/*.json*', size=500), Plan(), tmp_path / 'near')
    far = run_units(
        plan_units(['memory://shards/x/a.jsonl', 'memory://shards/x/**/*.jsonl*'], size=500),
        Plan(),
        tmp_path / 'far',
    )  # named twice, taken once
    assert (
        near['rows'] == far['rows'] == 60 and near['units'] == 4
    )  # the last range and the small file share one
    assert b''.join(p.read_bytes() for p in shard_files(tmp_path / 'near')) == b''.join(
        p.read_bytes() for p in shard_files(tmp_path / 'far')
    )
    (tmp_path / 'link').symlink_to(tmp_path / 'x')
    assert [
        len(unit)
        for unit in plan_units(
            [f'{tmp_path}/x/a.jsonl', f'{tmp_path}/link/*.jsonl', f'{tmp_path}/x/y/../a.jsonl']
        )
    ] == [1]
    with pytest.raises(LabError, match='nothing matches'):
        find_files(f'{tmp_path}/*.parquet')


def test_a_file_cut_at_a_line_end_differs_from_its_manifest(tmp_path):
    write_rows(tmp_path / 'a.jsonl', [json.loads(l) for l in good(30)], 'domain')
    (tmp_path / 'a.jsonl').write_bytes(
        joined(*(tmp_path / 'a.jsonl').read_bytes().splitlines()[:20])
    )
    with pytest.raises(LabError, match='the file was cut or changed'):
        run_units(plan_units(f'{tmp_path}/a.jsonl'), Plan(), tmp_path / 'out')


def test_wherever_a_file_is_cut_into_ranges_each_line_is_read_once(tmp_path):
    data = b'{"text": "a"}\n\n{"text": "longer than the rest of them"}\r\n{"text": "c"}\n\n\n{"text": "d"}'
    (tmp_path / 'a.jsonl').write_bytes(data)
    for size in range(1, len(data) + 1):
        parts = [
            Reader(tmp_path / 'a.jsonl', start=at, stop=min(at + size, len(data)))
            for at in range(0, len(data), size)
        ]
        assert [row['text'] for part in parts for t in part.tables() for row in t.to_pylist()] == [
            'a',
            'longer than the rest of them',
            'c',
            'd',
        ], size
        ends = [part.span for part in parts]
        assert (
            ends[0][0] == 0
            and ends[-1][1] == len(data)
            and all(a[1] == b[0] for a, b in zip(ends, ends[1:]))
        ), size


# ---- units: workers, kills, changes --------------------


@pytest.fixture
def files(tmp_path):
    "Three files, 12 units of one 2 kB range each."
    for i in range(3):
        (tmp_path / f'{i}.jsonl').write_bytes(joined(*(line(f'{i}-{j}') for j in range(140))))
    return f'{tmp_path}/?.jsonl'


def test_any_number_of_workers_gives_the_same_corpus(files, tmp_path):
    units = plan_units(files, size=2000)
    digests = {run_units(units, Plan(), tmp_path / f'w{n}', workers=n)['digest'] for n in (1, 2, 3)}
    assert len(units) == 12 and len(digests) == 1
    assert [r['text'] for r in rows_of(tmp_path / 'w3')] == [
        f'document {i}-{j} of a file' for i in range(3) for j in range(140)
    ]


def test_a_killed_worker_is_noticed_and_only_its_unit_is_redone(files, tmp_path):
    units, flag = plan_units(files, size=2000), tmp_path / 'flag'
    index = run_units(
        units,
        Plan('test_shards:dying', dict(flag=str(flag), word='1-70', once=True)),
        tmp_path / 'out',
        workers=2,
    )
    assert (
        index['digest'] == run_units(units, Plan(), tmp_path / 'plain')['digest']
        and flag.read_text() == 'died\n'
    )
    with pytest.raises(LabError, match=r'1\.jsonl\[2000:4000\]: 3 workers died at this unit'):
        run_units(
            units,
            Plan('test_shards:dying', dict(flag=str(flag), word='1-70', once=False)),
            tmp_path / 'out',
            workers=2,
        )
    assert (
        not list((tmp_path / 'out').glob('.*.owner'))
        and not (tmp_path / 'out/shards.json').exists()
    )


def slow_script(files, out, seconds: float, workers: int) -> str:
    "A program that works on the files with an operator that sleeps."
    return (
        'from k2lab.corpus.units import *; '
        f"plan = Plan('test_shards:slow', dict(seconds={seconds})); "
        f'run_units(plan_units({files!r}, size=2000), plan, {str(out)!r}, workers={workers})'
    )


def test_a_killed_parent_leaves_no_worker_and_another_number_of_workers_ends_the_work(
    files, tmp_path
):
    script = slow_script(files, tmp_path / 'out', seconds=0.15, workers=3)
    parent = subprocess.Popen(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), *sys.path])},
    )
    receipts, end = tmp_path / 'out/receipts', time.monotonic() + 30
    while (
        time.monotonic() < end
        and len(list(receipts.glob('*.json')) if receipts.exists() else []) < 4
    ):
        time.sleep(0.01)
    workers = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert len(workers) == 3 and not psutil.wait_procs(workers, timeout=5)[1]
    before = {p.name: p.stat().st_mtime_ns for p in receipts.glob('*.json')}
    assert 4 <= len(before) < 12
    index = run_units(
        plan_units(files, size=2000),
        Plan('test_shards:slow', dict(seconds=0.15)),
        tmp_path / 'out',
        workers=2,
    )
    after = {p.name: p.stat().st_mtime_ns for p in receipts.glob('*.json')}
    assert (
        index['rows'] == 420
        and before.items() <= after.items()
        and not list((tmp_path / 'out').rglob('.*.part'))
    )
    assert (
        index['digest']
        == run_units(plan_units(files, size=2000), Plan(), tmp_path / 'plain')['digest']
    )


def test_workers_end_with_their_parent_in_the_middle_of_a_unit(files, tmp_path):
    script = slow_script(files, tmp_path / 'out', seconds=60, workers=2)
    parent = subprocess.Popen(
        [sys.executable, '-c', script],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE), *sys.path])},
    )
    end = time.monotonic() + 30
    while time.monotonic() < end and len(list((tmp_path / 'out/rejects').glob('.*.part'))) < 2:
        time.sleep(0.01)  # both are at a unit
    workers = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=5)[1]


def test_only_what_changed_is_done_again(files, tmp_path):
    said = tmp_path / 'said'

    def work(**more):
        said.write_text('')
        index = run_units(
            plan_units(files, size=2000),
            Plan('test_shards:noted', dict(path=str(said)), **more),
            tmp_path / 'out',
        )
        return (
            len(said.read_text().splitlines()),
            index['rows'],
            len(list((tmp_path / 'out').glob('*.jsonl*'))) - 2 * index['units'],
        )

    assert work() == (12, 420, 0) and work() == (0, 420, 0)
    with open(tmp_path / '1.jsonl', 'ab') as f:
        f.write(joined(line('new')))
    assert work() == (4, 421, 0)  # the size of a file is in the name of all its ranges
    next((tmp_path / 'out').glob('*.jsonl')).unlink()
    assert work() == (1, 421, 0)
    os.truncate(next((tmp_path / 'out').glob('*.jsonl')), 100)
    assert work() == (1, 421, 0)
    assert work(licence='MIT') == (12, 421, 0)


def test_rows_that_are_unaccounted_for_are_an_error(files, tmp_path):
    with pytest.raises(
        LabError,
        match='forgetful: .* rows in, .* out, 0 removed: the difference is unaccounted for',
    ):
        run_units(
            plan_units(files, size=2000), Plan('test_shards:forgetful'), tmp_path / 'out', workers=2
        )


def test_a_receipt_that_lies_is_found_at_the_end(files, tmp_path):
    units = plan_units(files, size=2000)
    run_units(units, Plan(), tmp_path / 'out')
    path = sorted((tmp_path / 'out/receipts').iterdir())[0]
    for field, message in (('rows', 'rows read, '), ('kept', 'rows read, ')):
        before, receipt = path.read_text(), json.loads(path.read_text())
        receipt[field] += 1
        path.write_text(json.dumps(receipt))
        with pytest.raises(LabError, match=message):
            run_units(units, Plan(), tmp_path / 'out')
        path.write_text(before)
    receipt = json.loads(before)
    receipt['pieces'][0]['span'][1] += 1
    path.write_text(json.dumps(receipt))
    with pytest.raises(LabError, match='read by nobody, or twice|read up to byte'):
        run_units(units, Plan(), tmp_path / 'out')


def test_what_an_operator_prints_is_no_answer_and_steps_are_counted_apart(files, tmp_path):
    assert run_units(
        plan_units(files, size=2000), Plan('test_shards:noisy'), tmp_path / 'out', workers=2
    )['counts'] == [dict(step='a', removed={'x': 0}), dict(step='b', removed={})]


def test_a_full_disk_says_how_much_is_missing_and_leaves_no_half_file(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(joined(*(line(os.urandom(400).hex()) for _ in range(3000))))
    script = (
        'from k2lab.corpus.units import *; '
        f"run_units(plan_units('{tmp_path}/a.jsonl', size=900_000), Plan(room=10**9), '{tmp_path}/out')"
    )
    cap = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, preexec_fn=cap
    )
    assert (
        done.returncode == 1
        and 'disk full while writing' in done.stderr
        and 'more bytes is needed' in done.stderr
    )
    assert not list((tmp_path / 'out').glob('*.jsonl')) and not list(
        (tmp_path / 'out').rglob('.*.part')
    )
    assert (
        run_units(
            plan_units(f'{tmp_path}/a.jsonl', size=900_000), Plan(room=10**9), tmp_path / 'out'
        )['rows']
        == 3000
    )


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(tmp_path):
    taken = []

    class Slow:
        def write(self, data):
            taken.append(bytes(data[:7]))
            return len(taken[-1])

    part = Part(Slow(), 'a')
    assert (
        part.write(b'more than seven bytes') == 21
        and b''.join(taken) == b'more than seven bytes'
        and part.bytes == 21
    )


def test_memory_is_flat_whatever_the_size_of_a_file(tmp_path):
    block = joined(*(line(os.urandom(1000).hex()) for _ in range(1000)))
    peak = []
    for n in (10, 100):
        with open(tmp_path / 'a.jsonl', 'wb') as f:
            for _ in range(n):
                f.write(block)
        script = (
            'from k2lab.corpus.units import *; '
            f"i = run_units(plan_units('{tmp_path}/a.jsonl', size=1 << 40), Plan(), '{tmp_path}/out'); "
            "peak = re.search('VmHWM: *\\s*(\\d+)', open('/proc/self/status').read())[1]; "
            "print(i['rows'], peak)"
        )
        rows, kb = map(
            int,
            subprocess.run(
                [sys.executable, '-c', 'import re; ' + script],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split(),
        )
        assert rows == 1000 * n
        peak.append(kb / 1024)
    print(f'\npeak of 20 and 200 MB: {peak[0]:.0f} and {peak[1]:.0f} MB')
    assert peak[1] - peak[0] < 20
