"""What a corpus run leaves can be used by others, whatever its size: loaders, memory, shards and kept units."""

import json
import math

import pytest

from k2lab import prepare_corpus
from k2lab.corpus.card import feature, front_matter, write_card_pages
from k2lab.corpus.writers import Columns, column_kinds
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.text.rows import read_rows, write_rows

SMALL = dict(questions=0, general_sources=[], limit=None, tokenizer=None)


def words(i: int, n: int = 60) -> str:
    return ' '.join(f'w{i}x{j}' for j in range(n))


def write(path, rows) -> str:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    "Runs prepare_corpus at smoke and returns its finished job."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))

    def run(**changes):
        job = start('prepare_corpus', 'smoke', None, changes)
        prepare_corpus.prepare_corpora(job)
        return job.finish()

    return run


def loaded(job, tmp_path) -> dict:
    "{name: rows} of a run as `datasets` opens them."
    import datasets

    card = json.loads((job.folder / 'card.json').read_text())
    opened = {
        entry['name']: datasets.load_dataset(
            str(job.folder), entry['name'], cache_dir=str(tmp_path / 'hub')
        )['train']
        for entry in card['corpora']
    }
    assert opened
    return {name: list(rows) for name, rows in opened.items()}


def same(row: dict, shown: dict) -> bool:
    "Whether a loader shows a row as it was written; a column that the row lacks is null."
    return {k: v for k, v in shown.items() if v is not None} == {
        k: v for k, v in row.items() if v is not None
    }


def check_loaded(job, tmp_path):
    for name, shown in loaded(job, tmp_path).items():
        written = read_rows(job.folder / f'{name}.jsonl')
        assert len(written) == len(shown), name
        for row, other in zip(written, shown):
            assert same(row, other), (name, row, other)


@pytest.mark.parametrize('mode', ['domain', 'reasoning'])
def test_every_file_of_the_smoke_run_opens_in_datasets(prepared, tmp_path, mode):
    check_loaded(prepared(mode=mode), tmp_path)


ODD = [
    dict(day='2026-11-27', meta=dict(page=3, tags=['a']), mixed=1, score=1, tags=['a', 'b']),
    dict(day='2024-01-01 10:00:00', meta=dict(url='x'), mixed='two', score=0.5, tags=[]),
    dict(day='2024-01-01', meta=None, mixed=[1], score=None, flag=True, deep=[dict(a=1)]),
    dict(day='2024-01-01', late='only here', nothing=None, big=2**63 - 1, flag=False),
]


def test_rows_with_columns_of_any_kind_open_in_datasets(prepared, tmp_path):
    rows = [dict(text=words(i), source=f's{i % 3}', **ODD[i % 4]) for i in range(60)]
    files = write(tmp_path / 'odd.jsonl', rows)
    job = prepared(**SMALL, sources=[dict(files=files, licence='MIT')], heldout_percent=10)
    check_loaded(job, tmp_path)


def test_columns_that_appear_late_and_in_other_files_are_declared(prepared, tmp_path):
    rows = [
        dict(text=words(i), source='s', **(dict(late=[i]) if i > 35 else {})) for i in range(40)
    ]
    notes = tmp_path / 'notes'
    notes.mkdir()
    for i in range(20):
        (notes / f'{i}.md').write_text(f'# Note {i}\n{words(100 + i)}\n')
    sources = [
        dict(files=write(tmp_path / 'late.jsonl', rows), licence='MIT'),
        dict(files=f'{notes}/*.md', licence='CC0-1.0'),
    ]
    job = prepared(**SMALL, sources=sources, heldout_percent=10)
    check_loaded(job, tmp_path)


def test_what_is_published_is_json_for_a_strict_reader(prepared, tmp_path):
    rows = [
        f'{{"text": "{words(i)}", "source": "s", "a": NaN, "b": [-Infinity, 1], "c": "NaN"}}\n'
        for i in range(40)
    ]
    (tmp_path / 'nan.jsonl').write_text(''.join(rows))
    sources = [dict(files=str(tmp_path / 'nan.jsonl'), licence='MIT')]
    try:
        job = prepared(**SMALL, sources=sources, heldout_percent=10, max_bad=1)
    except LabError as error:
        assert 'NaN' in str(error) or 'bad' in str(error)
        return
    refuse = lambda word: pytest.fail(f'{word} was published')
    for path in job.folder.glob('*.jsonl'):
        for line in path.read_text().splitlines():
            row = json.loads(line, parse_constant=refuse)
            assert row.get('c') in ('NaN', None)
    check_loaded(job, tmp_path)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, [math.nan], dict(a=math.inf)])
def test_rows_that_json_cannot_hold_are_not_written(tmp_path, value):
    rows = [dict(prompt='p', extra=1), dict(prompt='p', extra=value)]
    with pytest.raises(LabError, match='row 2 not written: it holds NaN'):
        write_rows(tmp_path / 'a.jsonl', rows, 'prompts')
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    'values,kind',
    [
        ([1, 2], 'int64'),
        ([1, 0.5], 'float64'),
        ([True], 'bool'),
        ([True, 1], 'json'),
        (['2026-01-01'], 'date'),
        (['2026-01-01', 'later'], 'string'),
        (['1-2'], 'string'),
        ([None], 'null'),
        ([None, 'a'], 'string'),
        ([[]], 'list null'),
        ([[], ['a']], 'list string'),
        ([[None, 1]], 'json'),
        ([['a'], [1]], 'json'),
        ([[[1]]], 'json'),
        ([dict(a=1)], 'json'),
        ([2**63], 'json'),
        (['a', 1], 'json'),
    ],
)
def test_kinds_of_columns_by_hand(values, kind):
    assert column_kinds([dict(a=value) for value in values]) == dict(a=kind)
    assert column_kinds([dict(a=value) for value in reversed(values)]) == dict(a=kind)


def test_a_card_without_columns_still_has_its_fields(tmp_path):
    "Cards of earlier versions."
    entry = dict(name='d', file='d.jsonl', format='domain', documents=1, bytes=1, licence='MIT')
    (info,) = front_matter(dict(corpora=[entry]), 'x')['dataset_info']
    assert info['features'] == [feature('text', 'string'), feature('source', 'string')]
    with pytest.raises(LabError, match='d.jsonl is not there'):
        (tmp_path / 'card.json').write_text(json.dumps(dict(corpora=[entry])))
        write_card_pages(tmp_path)


def test_tables_and_rows_give_the_same_columns():
    from k2lab.corpus.readers import as_table

    texts = dict(text=['a', 'b'], key=['k', None], extra=['{"n":1,"text":"old"}', '{"n":2.5}'])
    columns = Columns()
    columns.add_table(as_table(texts))
    assert columns.kinds == dict(text='string', key='string', n='float64')


# beyond memory


@pytest.fixture(scope='module')
def family():
    "400 texts: copies, near copies of several degrees, chains of versions, and texts that share nothing."
    import random

    rng, texts = random.Random(3), []
    for i in range(100):
        tokens = words(i, 80).split()
        texts.append(' '.join(tokens))
        for _ in range(i % 5):
            for _ in range(rng.choice((0, 1, 3, 12))):
                tokens[rng.randrange(len(tokens))] = f'x{rng.randrange(10**6)}'
            texts.append(' '.join(tokens).upper() if rng.random() < 0.2 else ' '.join(tokens))
    rng.shuffle(texts)
    return texts


def test_the_size_of_parts_on_disk_does_not_change_what_is_kept(family, monkeypatch, tmp_path):
    import pyarrow as pa

    from k2lab.corpus import duplicates

    column = pa.chunked_array([family[:130], family[130:131], family[131:]], pa.string())
    want = duplicates.near_owners(column).tolist()
    assert len(set(want)) < len(want) - 60
    monkeypatch.setattr(duplicates, 'PART_BYTES', 100)
    monkeypatch.setattr(duplicates, 'TAKEN_BYTES', 3000)
    monkeypatch.setattr(duplicates, 'TAKEN_ROWS', 7)
    cut = [duplicates.sketch(column[a:b]) for a, b in ((0, 50), (50, 51), (51, None))]
    parts = [(rows + start, keys) for (rows, keys), start in zip(cut, (0, 50, 51))]
    assert duplicates.near_owners(column, sketches=parts, folder=tmp_path).tolist() == want
    assert not [*tmp_path.iterdir()]
    marks = duplicates.mark_array(duplicates.fingerprints(pa.table(dict(text=family))))
    first, sizes = duplicates.first_of_each(marks)
    again, others = duplicates.first_of_each(marks, room=3)
    assert first.tolist() == again.tolist() and sorted(sizes) == sorted(others)
    seen = set()
    plain = [not (mark in seen or seen.add(mark)) for mark in map(bytes, marks)]
    assert first.tolist() == plain and sum(sizes) == len(family)


@pytest.fixture
def stored(tmp_path):
    "`Documents` in three files of several batches, and the same rows as a list."
    import pyarrow as pa

    from k2lab.corpus.pipeline import Documents

    rows, paths = [], []
    for i, sizes in enumerate(([5, 1, 7], [3], [2, 9])):
        paths.append(tmp_path / f'{i}.arrow')
        schema = pa.schema(dict(text=pa.string(), n=pa.int64()))
        with pa.OSFile(str(paths[-1]), 'wb') as file, pa.ipc.new_file(file, schema) as out:
            for size in sizes:
                new = [dict(text=f't{len(rows) + j}', n=len(rows) + j) for j in range(size)]
                out.write_table(pa.Table.from_pylist(new, schema))
                rows += new
    return Documents(paths), rows


def test_stored_documents_are_read_like_a_table(stored):
    import random

    documents, rows = stored
    assert len(documents) == len(rows) == 27
    got = [(start, batch.to_pylist()) for start, batch in documents.batches()]
    assert [row for _, part in got for row in part] == rows
    assert all(part[0] == rows[start] for start, part in got)
    for seed in range(20):
        rng = random.Random(seed)
        some = [rng.randrange(27) for _ in range(rng.choice((0, 1, 5, 40)))]
        assert documents.take(some).to_pylist() == [rows[i] for i in some]
        assert documents['n'].take(some).to_pylist() == some
        some.sort()
        assert documents.take(some, ['n'])['n'].to_pylist() == some
    assert documents['text'][26].as_py() == 't26' and len(documents['text']) == 27
