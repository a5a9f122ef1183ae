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
    entry['sha256'] = ''
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


# files of files, tokens


def corpus_files(tmp_path, n: int = 80) -> list:
    "Two sources, the second a quarter as large as the first."
    a = [dict(text=words(i), source='a', n=i) for i in range(n)]
    b = [dict(text=words(1000 + i), source='b', extra='x') for i in range(n // 4)]
    return [
        dict(files=write(tmp_path / 'a.jsonl', a), licence='MIT'),
        dict(files=write(tmp_path / 'b.jsonl', b), licence='CC0-1.0'),
    ]


@pytest.mark.parametrize('ending', ['.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet'])
@pytest.mark.parametrize('shard_mb', [None, 0.005])
def test_documents_in_other_files_are_the_same_documents(prepared, tmp_path, ending, shard_mb):
    import datasets

    sources = corpus_files(tmp_path)
    job = prepared(**SMALL, sources=sources, heldout_percent=10, output=ending, shard_mb=shard_mb)
    plain = prepared(**SMALL, sources=sources, heldout_percent=10)
    want = read_rows(plain.folder / 'domain.jsonl')
    shown = datasets.load_dataset(str(job.folder), 'domain', cache_dir=str(tmp_path / 'hub'))
    shown = list(shown['train'])
    assert [row['text'] for row in shown] == [row['text'] for row in want]
    assert job.folder.joinpath('croissant.json').is_file()
    (entry,) = [
        e
        for e in json.loads((job.folder / 'card.json').read_text())['corpora']
        if e['name'] == 'domain'
    ]
    if shard_mb:
        # a packer holds back what it has not packed
        assert len(entry['files']) > (not ending.endswith(('gz', 'zst'))) and sum(
            f['rows'] for f in entry['files']
        ) == len(want)
    if ending != '.parquet':
        path = job.folder / ('domain' if shard_mb else f'domain{ending}')
        assert read_rows(path, 'domain') == want
        assert all(same(row, other) for row, other in zip(want, shown))


def test_a_cut_shard_and_an_empty_folder_are_noticed(prepared, tmp_path):
    job = prepared(**SMALL, sources=corpus_files(tmp_path), heldout_percent=10, shard_mb=0.005)
    shard = sorted((job.folder / 'domain').glob('*.jsonl'))[1]
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(LabError, match='the file was cut or changed'):
        read_rows(job.folder / 'domain')
    (tmp_path / 'none').mkdir()
    with pytest.raises(LabError, match='no rows; a folder of rows has .jsonl'):
        read_rows(tmp_path / 'none')


@pytest.mark.parametrize(
    'changes,reason',
    [
        (dict(output='.csv'), "'.csv'"),
        (dict(shard_mb=0), 'shard_mb is 0'),
        (dict(token_shards=True, tokenizer=None), 'set `tokenizer`, too'),
        (dict(domain_tokens=1000, tokenizer=None), 'set `tokenizer`, too'),
        (dict(domain_tokens=1000, domain_rows=5), 'of documents or of tokens'),
        (dict(domain_tokens=-1), 'a number above 0'),
        (dict(keep_refined_gb=-1), 'a number from 0 on'),
    ],
)
def test_wrong_output_is_refused_before_the_work(changes, reason):
    with pytest.raises(LabError, match=reason):
        prepare_corpus.Config(**{'tokenizer': 'x'} | changes)


def test_a_mixture_by_tokens_has_the_tokens_and_repeats_a_small_source(prepared, tmp_path):
    sources = [spec | dict(weight=weight) for spec, weight in zip(corpus_files(tmp_path), (1, 3))]
    options = SMALL | dict(tokenizer='Kimi-K2-Base', heldout_percent=10, sources=sources)
    with pytest.raises(LabError, match='b.jsonl has .* tokens, its share is .* 1 epoch'):
        prepared(**options, domain_tokens=20_000)
    job = prepared(**options, domain_tokens=20_000, epochs=5, token_shards=True)
    card = json.loads((job.folder / 'card.json').read_text())
    entry = next(e for e in card['corpora'] if e['name'] == 'domain')
    tokens = [source['tokens'] for source in entry['sources'].values()]
    assert abs(sum(tokens) - 20_000) < 400 and abs(tokens[1] / sum(tokens) - 0.75) < 0.02
    epochs = [source['epochs'] for source in entry['sources'].values()]
    assert epochs[0] == 1 and epochs[1] > 2
    # the end of each document is one more
    assert entry['token_shards']['tokens'] == sum(tokens) + entry['documents']


def test_training_rows_from_token_shards_are_those_from_text(tmp_path):
    from types import SimpleNamespace

    from k2lab.text.token_shards import MANIFEST, TokenShards, TokenWriter
    from k2lab.text.tokenizer import build_tokenizer
    from k2lab.train_continual_pretrain import documents_of, training_rows

    domain, general = ([words(i + s, 5 + i % 40) for i in range(150)] for s in (0, 500))
    tok = build_tokenizer(domain, 500)
    for name, texts in dict(domain=domain, general=general).items():
        writer = TokenWriter(tmp_path / name, tok, room=1000)
        for at in range(0, 150, 10):
            writer.write(texts[at : at + 10])
        assert len(writer.close()['shards']) > 3
        write_rows(tmp_path / f'{name}.jsonl', [dict(text=t, source='s') for t in texts], 'domain')
    for passes, share, length in ((1, 0.3, 64), (0.4, 0, 33), (2.5, 0.5, 1000)):
        cfg = SimpleNamespace(seed=3, passes=passes, replay_share=share, length=length)
        texts = [documents_of(tmp_path / f'{name}.jsonl', tok) for name in ('domain', 'general')]
        shards = [documents_of(tmp_path / name, tok) for name in ('domain', 'general')]
        rows = training_rows(tok, cfg, *texts)
        assert isinstance(rows, list) and isinstance(shards[0], TokenShards)
        assert list(training_rows(tok, cfg, *shards)) == rows
        assert list(training_rows(tok, cfg, shards[0], texts[1])) == rows
    (tmp_path / 'domain/ids-001.npy').write_bytes(b'\x93NUMPY')
    with pytest.raises(LabError, match='ids-001.npy: cannot be read'):
        documents_of(tmp_path / 'domain', tok)
    (tmp_path / 'general' / MANIFEST).write_text('{}')
    with pytest.raises(LabError, match='no token shards'):
        documents_of(tmp_path / 'general', tok)


def test_a_lazy_list_of_rows_is_the_dataset_that_a_list_is(tmp_path):
    from k2lab.text.token_shards import Chosen
    from k2lab.training.trainer import dataset_of, with_labels

    rows = [dict(input_ids=[i, i + 1, 70_000], completion_mask=[1, 0, 1]) for i in range(30)]
    numbers = [3, 7, 29, 3]
    lazy = dataset_of(Chosen([rows[:10], rows[10:]], numbers), tmp_path)
    assert list(lazy) == list(dataset_of([with_labels(rows[i]) for i in numbers], tmp_path))


# before the work


def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    from k2lab.scale import estimate

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    monkeypatch.setattr(estimate, 'LARGE', 1)
    options = SMALL | dict(sources=corpus_files(tmp_path), heldout_percent=10)
    for free, reason in (((100, 1e-6), 'GB of disk are free'), ((1e-6, 100), 'take fewer workers')):
        monkeypatch.setattr(estimate, 'free_here', lambda folder, free=free: free)
        with pytest.raises(LabError, match=reason) as error:
            start('prepare_corpus', 'smoke', None, options)
        assert '--anyway' in str(error.value) and not (tmp_path / 'runs').exists()
    record = start('prepare_corpus', 'smoke', None, options, anyway=True).record
    assert record['plan']['estimate']['cpu_s'] > 0 and 'GB' in record['plan']['refusal']


def test_an_estimate_grows_with_the_files_and_the_workers(tmp_path):
    from k2lab.corpus.pipeline import Refining
    from k2lab.scale.estimate import estimated, misfit
    from k2lab.text.rows import compress

    rows = ''.join(json.dumps(dict(text=words(i, 200), source='s')) + '\n' for i in range(400))
    (tmp_path / 'a.jsonl').write_text(rows)
    (tmp_path / 'a.jsonl.gz').write_bytes(compress(rows.encode(), 'a.gz'))
    one, packed = (
        estimated([([str(tmp_path / name)], {})], Refining()) for name in ('a.jsonl', 'a.jsonl.gz')
    )
    four = estimated([([str(tmp_path / 'a.jsonl')] * 4, {})], Refining(), workers=4)
    assert abs(four.disk_gb / one.disk_gb - 4) < 0.01 and four.memory_gb > 4 * one.memory_gb
    assert 0.5 < packed.disk_gb / one.disk_gb < 2
    assert misfit(one, 10, 10) == '' and 'disk' in misfit(one, 10, 0)
