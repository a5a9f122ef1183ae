"""Sources as other people publish them: read with a line of config, kept as they are, or refused in one line."""

import gzip
import json
from pathlib import Path

import pytest

from k2lab.corpus import readers
from k2lab.corpus.operators import conserved, largest_mixture, mix_rows
from k2lab.corpus.pipeline import Refining, refine, refining, texts_of, values_of
from k2lab.corpus.quality import DOMAIN, drop_licences, drop_poor, is_allowed, is_code
from k2lab.corpus.readers import Reader, Reading, find_files, list_members
from k2lab.corpus.sources import PRESETS, documents, preset_of, source_of
from k2lab.lab.config import LabError
from k2lab.prepare_corpus import Config
from k2lab.tasks.traces import reasoning_set


def prose(i: int) -> str:
    words = 'river stone window garden letter silver harbour candle market'.split()
    return ' '.join(f'{word}{(i * 7 + k * k) % 97}' for k in range(3) for word in words) + '.'


def lines(rows) -> str:
    return ''.join(json.dumps(row) + '\n' for row in rows)


def packed(rows) -> bytes:
    return gzip.compress(lines(rows).encode())


def parquet(rows) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue().to_pybytes()


# ---- public layouts, after their published schemas --------------------

C4 = [
    dict(text=prose(i), timestamp='2019-04-25T12:57:54Z', url=f'http://a.org/{i}') for i in range(5)
]
DOLMA = [
    dict(id=f'd{i}', text=prose(i), source='common-crawl', added='2023-05-01', created='2020-01-01')
    | dict(metadata=dict(url=f'http://b.org/{i}'), version='v1')
    for i in range(5)
]
STACK = [
    dict(hexsha=f'{i:040x}', size=99, ext='py', lang='Python', alphanum_fraction=0.5)
    | dict(max_stars_repo_licenses=['MIT', 'Apache-2.0'])
    | dict(
        content=f'import os\n\n\ndef path{i}(name):\n    return os.path.join("{i}", name)\n\n\n'
        f'if os.path.exists(path{i}("x")):  \n    print("there", {i})\n'
    )
    for i in range(5)
]
FINEWEB = [
    dict(
        text=prose(i),
        id=f'<urn:uuid:{i}>',
        dump='CC-MAIN-2024-10',
        url='http://c.org',
        date='2024-03-01',
    )
    | dict(file_path='s3://c/w.warc.gz', language='en', language_score=0.93, token_count=40)
    for i in range(5)
]
GSM8K = [
    dict(
        question=f'{prose(i)} How many are {i} and {i}?',
        answer=f'{i}+{i} = <<{i}+{i}={2 * i}>>\n#### {2 * i}',
    )
    for i in range(5)
]
MMLU = [
    dict(
        question=prose(i), subject='algebra', choices=['one', 'two', 'three', 'four'], answer=i % 4
    )
    for i in range(5)
]
PUBLIC = {
    'c4': ('en/c4-train.00000-of-01024.json.gz', packed(C4), {}),
    'dolma': ('v1_6-0000.json.gz', packed(DOLMA), {}),
    'the stack': ('data/python/train-00000.parquet', parquet(STACK), dict(text='content')),
    'fineweb': ('000_00000.parquet', parquet(FINEWEB), {}),
    'gsm8k': ('train.jsonl', lines(GSM8K).encode(), dict(text=['question', 'answer'])),
    'mmlu': ('test.parquet', parquet(MMLU), dict(text=['question', 'choices', 'answer'])),
}


@pytest.mark.parametrize('name', PUBLIC)
def test_a_public_layout_is_read_with_a_line_of_config(tmp_path, name):
    file, data, keys = PUBLIC[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(data)
    made = refine([dict(files=str(tmp_path), **keys)], [name], Refining(), tmp_path / 'work')
    texts = texts_of(made, made.index)
    assert len(texts) == 5 and made.steps[0]['rows_in'] == 5 and conserved(made.steps) == ''
    if name == 'the stack':
        assert texts == [row['content'] for row in STACK]
        assert {*values_of(made, made.index, 'licence')} == {'MIT AND Apache-2.0'}
    elif name in ('c4', 'dolma', 'fineweb'):
        rows = dict(c4=C4, dolma=DOLMA, fineweb=FINEWEB)[name]
        assert texts == [row['text'] for row in rows]
        extra = json.loads(made.texts['extra'][0].as_py())
        assert extra == {k: v for k, v in rows[0].items() if k not in ('text', 'source')}
    else:
        want = '<<0+0=0>>' if name == 'gsm8k' else 'one\ntwo\nthree\nfour\n\n0'
        assert want in texts[0]


OPENTHOUGHTS = [
    dict(system='Think first.')
    | dict(
        conversations=[
            {'from': 'user', 'value': f'What is {i} and {i}?'},
            {
                'from': 'assistant',
                'value': f'<|begin_of_thought|>{i}+{i}<|end_of_thought|>'
                f'<|begin_of_solution|>{2 * i}<|end_of_solution|>',
            },
        ]
    )
    for i in range(3)
]
SHAREGPT = [
    dict(id=f's{i}')
    | dict(
        conversations=[
            {'from': 'human', 'value': f'Name number {i}.'},
            {'from': 'gpt', 'value': f'It is {i}.'},
            {'from': 'human', 'value': f'And twice {i}?'},
            {'from': 'gpt', 'value': f'Two times {i} is the sum.\n\n{2 * i}'},
        ]
    )
    for i in range(3)
]


def test_conversations_of_open_thoughts_and_share_gpt(tmp_path):
    (tmp_path / 'open.parquet').write_bytes(parquet(OPENTHOUGHTS))
    (tmp_path / 'share.json').write_text(json.dumps(SHAREGPT))
    found, steps = reasoning_set(dict(files=f'{tmp_path}/open.parquet', judge='none'))
    assert [r['final'] for r in found] == ['0', '2', '4'] and conserved(steps) == ''
    assert {r['system'] for r in found} == {'Think first.'}
    found, steps = reasoning_set(dict(files=f'{tmp_path}/share.json', judge='none'))
    assert [r['history'] for r in found] == [
        [[f'Name number {i}.', f'It is {i}.']] for i in range(3)
    ]
    assert steps[0]['notes'] == {'column id not used': 3}
    read = [*documents(dict(files=f'{tmp_path}/share.json', text='conversations', id='id'))]
    assert read[1]['text'].startswith('human: Name number 1.\n\ngpt: It is 1.\n\nhuman: And')
    assert [row['key'] for row in read] == ['s0', 's1', 's2']


# ---- what is said about a source --------------------


@pytest.mark.parametrize(
    'spec,message',
    [
        (dict(files='a.jsonl', txt='content'), "unknown key 'txt' (did you mean 'text'?)"),
        (
            dict(files='a.jsonl', txt='x'),
            'package, stdlib, files, text, id, licence, columns, weight',
        ),
        (dict(files='a.jsonl', weight=-1), 'a number above 0'),
        (dict(files='a.jsonl', weight='many'), 'weight must be float or null'),
        (dict(files='a.jsonl', preset='poems'), "unknown preset 'poems'"),
        (dict(files='a.jsonl', licence=['MIT']), 'licence must be'),
        (dict(files='a.jsonl', licence=dict(colum='x')), 'or {column: NAME}'),
        (dict(files=[]), 'a source is'),
        (dict(files='a.jsonl', package='numpy'), 'a source is'),
        (dict(package='networkx', text='content'), 'a key of sources of files'),
        ('a.jsonl', 'a source is'),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(spec, message):
    with pytest.raises(LabError) as e:
        source_of(spec)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_a_missing_text_names_the_fields_and_the_remedy(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines(dict(content='x', path='y') for _ in range(3)))
    with pytest.raises(
        LabError, match=r"no field 'text'; the row has content, path: .* text: FIELD"
    ):
        refine([dict(files=f'{tmp_path}/a.jsonl')], ['a'], Refining(), tmp_path / 'work')


def test_every_column_is_kept_or_left_out_and_counted(tmp_path):
    row = dict(content=prose(1), text='not it', key='old', sha='k1', n=1, url='u')
    (tmp_path / 'a.jsonl').write_text(lines([row]))
    spec = dict(files=f'{tmp_path}/a.jsonl', text='content', id='sha', columns=['url'])
    made = refine([spec], ['a'], Refining(), tmp_path / 'work')
    assert [*values_of(made, made.index, 'key')] == ['k1'] and texts_of(made, made.index) == [
        row['content']
    ]
    assert json.loads(made.texts['extra'][0].as_py()) == dict(url='u')
    assert made.steps[0]['notes'] == {
        'column text moved to text_column': 1,
        'column key moved to key_column': 1,
        'column text_column left out': 1,
        'column key_column left out': 1,
        'column sha left out': 1,
        'column n left out': 1,
    }


# ---- licences and weights --------------------


def test_the_licence_of_a_row_wins_and_is_filtered_by(tmp_path):
    named = ['mit', ['MIT', 'Apache-2.0'], None, [], '', 'cc-by-nc-4.0']
    (tmp_path / 'a.jsonl').write_text(
        lines(dict(text=prose(i), license=one) for i, one in enumerate(named))
    )
    spec = dict(files=f'{tmp_path}/a.jsonl', licence='CC0-1.0')
    made = refine([spec], ['a'], Refining(), tmp_path / 'work')
    assert [*values_of(made, made.index, 'licence')] == [
        'mit', 'MIT AND Apache-2.0', 'CC0-1.0', 'CC0-1.0', 'CC0-1.0', 'cc-by-nc-4.0',
    ]  # fmt: skip
    assert json.loads(made.texts['extra'][1].as_py()) == dict(license=['MIT', 'Apache-2.0'])
    few = refine([spec], ['a'], refining(dict(licences=['MIT', 'cc0-1.0'])), tmp_path / 'few')
    assert [*values_of(few, few.index, 'licence')] == ['mit', 'CC0-1.0', 'CC0-1.0', 'CC0-1.0']
    (tmp_path / 'b.jsonl').write_text(lines([dict(text=prose(1), license=dict(name='MIT'))]))
    with pytest.raises(LabError, match="'license' must be text or a list of texts, this is dict"):
        refine([dict(files=f'{tmp_path}/b.jsonl')], ['b'], Refining(), tmp_path / 'other')


@pytest.mark.parametrize(
    'licence,allowed',
    [('mit', True), ('MIT OR GPL-3.0', True), ('MIT AND GPL-3.0', False), ('GPL-3.0', False)],
)
def test_joined_licences(licence, allowed):
    assert is_allowed(licence, ['MIT']) is allowed


@pytest.mark.parametrize(
    'sizes,weights,want',
    [
        (dict(a=60, b=60), dict(a=9, b=1), dict(a=54, b=6)),
        (dict(a=200, b=200), dict(a=0.9, b=0.1), dict(a=198, b=22)),
        (dict(a=5, b=9, c=9), dict(a=1, b=2, c=1), dict(a=4, b=8, c=4)),
        (dict(a=3, b=100), dict(a=9, b=1), None),
    ],
)
def test_the_largest_mixture_keeps_the_weights_exactly(sizes, weights, want):
    most = largest_mixture(sizes, weights)
    if want is None:
        assert most == 0
        return
    pools = {name: [(name, i) for i in range(n)] for name, n in sizes.items()}
    rows, counts = mix_rows(pools, weights, most)
    assert {name: sum(one == name for one, _ in rows) for name in sizes} == want
    assert conserved([counts]) == ''


def test_a_weight_for_some_sources_alone_is_refused():
    with pytest.raises(LabError, match='b.jsonl has no weight and others have one'):
        Config(sources=[dict(files='a.jsonl', weight=9), dict(files='b.jsonl')])


# ---- faithful --------------------

MODULE = '"""M."""\n\nimport os\n\n\ndef f(x):  \n\treturn x\r\n\n\n\n# -- \n\n'


@pytest.mark.parametrize('name', ['a.py', 'b.md', 'c.tex', 'd.txt', 'Makefile', 'e.log', 'f.sql'])
def test_the_bytes_of_a_file_stay(tmp_path, name):
    (tmp_path / name).write_bytes(MODULE.encode())
    spec = dict(files=str(tmp_path / name))
    settings = refining(preset_of(spec) | dict(min_chars=1))
    made = refine([spec], ['a'], [settings], tmp_path / 'work')
    assert texts_of(made, made.index)[0].encode() == MODULE.encode()
    step = next(step for step in made.steps if step['step'] == 'normalise')
    assert (step['changed'], step['would_change']) == (0, 1) and step['changes']['line ends'] == 1


def test_prose_is_rewritten_where_it_is_asked_for(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'One line.  \r\n\r\n\r\n\r\nAnother.\n')
    spec = dict(files=f'{tmp_path}/a.txt', preset='prose')
    settings = refining(preset_of(spec) | dict(min_chars=1, quality=None))
    made = refine([spec], ['a'], [settings], tmp_path / 'work')
    assert texts_of(made, made.index) == ['One line.\n\nAnother.']


def test_presets_follow_the_kind_of_file_and_name_valid_settings(tmp_path):
    for name in ('a.py', 'b.tex', 'c.log', 'd.jsonl', 'e.png'):
        (tmp_path / name).write_text('x')
    of = lambda *names: preset_of(dict(files=[str(tmp_path / name) for name in names]))
    assert [of('a.py'), of('b.tex'), of('c.log')] == [
        PRESETS['code'], PRESETS['mathematics'], PRESETS['logs'],
    ]  # fmt: skip
    assert of('a.py', 'd.jsonl') == of('d.jsonl') == PRESETS['plain']
    assert all(refining(preset) for preset in PRESETS.values())


def test_sources_with_different_steps_share_one_account(tmp_path):
    (tmp_path / 'a.jsonl').write_text(lines(dict(text=prose(i)) for i in range(5)))
    (tmp_path / 'b.log').write_text('\n'.join(f'12:0{i} started' for i in range(9)))
    specs = [dict(files=f'{tmp_path}/a.jsonl'), dict(files=f'{tmp_path}/b.log')]
    settings = [refining(preset_of(spec)) for spec in specs]
    made = refine(specs, ['a', 'b'], settings, tmp_path / 'work')
    assert conserved(made.steps) == '' and len(made.index) == 6
    assert [s['rows_in'] for s in made.steps if s['step'] == 'quality'] == [6]


# ---- kinds of files --------------------


def test_a_folder_with_pictures_is_read_and_they_are_counted(tmp_path):
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'a.md').write_text(prose(1))
    (tmp_path / 'notes' / 'b.png').write_bytes(b'\x89PNG')
    made = refine([dict(files=f'{tmp_path}/notes')], ['a'], Refining(), tmp_path / 'work')
    assert made.steps[0]['notes'] == {'files of kind .png skipped': 1} and len(made.index) == 1
    with pytest.raises(LabError, match='no file of a kind that is read, only 1 .png'):
        find_files(f'{tmp_path}/notes/*.png')
    with pytest.raises(LabError, match="kind '.png' is not one of .jsonl"):
        [*documents(dict(files=f'{tmp_path}/notes/b.png'))]


@pytest.mark.parametrize(
    'name,data,want',
    [
        ('a.ndjson', '{"text": "one"}\n{"text": "two"}\n', ['one', 'two']),
        ('a.json', '[{"text": "one"},\n {"text": "two"}]', ['one', 'two']),
        ('a.json', '{"text": "one"}\n{"text": "two"}\n', ['one', 'two']),
        ('a.json', '{\n "text": "one"\n}\n', ['one']),
        ('a.json', '\ufeff[ ]', []),
        ('a.tsv', 'text\tn\none\t1\ntwo\t2\n', ['one', 'two']),
    ],
)
def test_kinds_of_rows(tmp_path, name, data, want):
    (tmp_path / name).write_text(data)
    reader = Reader(tmp_path / name, reading=Reading())
    assert [row['text'] for _, row in reader.records()] == want and not reader.partial


@pytest.mark.parametrize(
    'data,rows',
    [('[{"text": "one"}, {"text": "tw', 1), ('[{"text": "one"}, {"text" 2}]', 1), ('[', 0)],
)
def test_a_broken_list_tells_and_keeps_what_came_before(tmp_path, data, rows):
    (tmp_path / 'a.json').write_text(data)
    reader = Reader(tmp_path / 'a.json', reading=Reading(), on_bad=lambda bad: None)
    assert len([*reader.records()]) == rows and 'not a whole list of JSON' in reader.partial


def test_a_long_list_is_read_piece_by_piece(monkeypatch):
    data = json.dumps([dict(text='x' * 700 + 'ü\\"', n=i) for i in range(300)]).encode()
    for size in (1, 7, 64, 5000):
        some = data[: 60_000 if size < 60 else len(data)]
        pieces = [some[i : i + size] for i in range(0, len(some), size)]
        found = []
        try:
            found += [value for _, value in list_members(iter(pieces))]
        except ValueError:
            assert len(some) < len(data)
        assert found == json.loads(data)[: len(found)] and len(found) >= (
            300 if some == data else 0
        )


def test_not_a_number_becomes_null_and_bytes_become_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        dict(
            text=pa.array([b'one', b'\xff\xfe', b'three'], pa.binary()),
            blob=pa.array([b'\xff', b'ok', None], pa.binary()),
            loss=[float('nan'), 1.5, float('inf')],
        )
    )
    pq.write_table(table, tmp_path / 'a.parquet')
    bad = []
    reader = Reader(tmp_path / 'a.parquet', reading=Reading(), on_bad=bad.append)
    (found,) = reader.tables()
    assert found['text'].to_pylist() == ['one', 'three'] and 'this is bytes' in bad[0]['reason']
    assert [json.loads(one) for one in found['extra'].to_pylist()] == [
        dict(blob='/w==', loss=None),
        dict(blob=None, loss=None),
    ]
    assert reader.notes == {readers.NO_NUMBER: 2, readers.NO_TEXT: 1}
    (tmp_path / 'b.jsonl').write_text('{"text": "a", "x": [NaN, -Infinity, {"y": Infinity}]}\n')
    reader = Reader(tmp_path / 'b.jsonl', reading=Reading())
    assert [row for _, row in reader.records()][0]['x'] == [None, None, dict(y=None)]
    assert reader.notes == {readers.NO_NUMBER: 3}


def test_cut_files_are_taken_where_that_is_asked_for(tmp_path):
    data = gzip.compress(lines(dict(text=prose(i)) for i in range(400)).encode())
    (tmp_path / 'a.jsonl.gz').write_bytes(data[: len(data) // 2])
    spec = dict(files=f'{tmp_path}/a.jsonl.gz')
    with pytest.raises(LabError, match='allow_partial: true takes what there is'):
        refine([spec], ['a'], Refining(near_duplicate_jaccard=None), tmp_path / 'one')
    made = refine([spec | dict(allow_partial=True)], ['a'], Refining(), tmp_path / 'two')
    assert 20 < len(made.index) < 400 and 'it is cut or damaged' in str(made.steps[0]['notes'])
    (tmp_path / 'b.jsonl.gz').write_bytes(data + b'trailing bytes')
    made = refine(
        [dict(files=f'{tmp_path}/b.jsonl.gz')],
        ['b'],
        Refining(),
        tmp_path / 'c',
        allow_partial=True,
    )
    assert len(made.index) == 400


def test_a_limit_takes_several_patterns_and_counts_bad_rows(tmp_path):
    for name in 'ab':
        rows = lines(dict(text=prose(i + 50 * (name == 'b'))) for i in range(40))
        (tmp_path / f'{name}.jsonl').write_text(rows + '{"text": 1}\n')
    spec = dict(files=[f'{tmp_path}/a.jsonl', f'{tmp_path}/b.jsonl'])
    made = refine([spec], ['a'], Refining(), tmp_path / 'work', limit=60, max_bad=0.1)
    assert made.steps[0] == dict(step='read', rows_in=61, rows_out=60, removed={'bad row': 1})
    with pytest.raises(LabError, match='1 of 61 rows are bad .*a.jsonl, line 41'):
        refine([spec], ['a'], Refining(), tmp_path / 'strict', limit=60)


@pytest.mark.parametrize('scheme,extra', [('s3', 's3'), ('gs', 'gs'), ('abfs', 'azure')])
def test_a_store_that_needs_a_package_names_it(monkeypatch, scheme, extra):
    import fsspec

    def missing(url, **options):
        raise ImportError(f'Install something to access {scheme}')

    monkeypatch.setattr(fsspec.core, 'url_to_fs', missing)
    with pytest.raises(LabError, match=rf"{scheme}:// needs .* pip install 'k2lab\[{extra}\]'"):
        find_files(f'{scheme}://bucket/*.jsonl')


def warc_record(kind: str, url: str, body: bytes) -> bytes:
    sort = 'text/plain' if kind == 'conversion' else 'application/http; msgtype=response'
    head = f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Length: {len(body)}\r\n'
    return f'{head}Content-Type: {sort}\r\n\r\n'.encode() + body + b'\r\n\r\n'


def test_web_archives(tmp_path):
    answer = lambda status, sort, body: (
        f'HTTP/1.1 {status}\r\nContent-Type: {sort}\r\n\r\n{body}'.encode()
    )
    page = f'<html><body><main><p>{prose(1)}</p></main></body></html>'
    records = [
        warc_record('request', 'http://a.org', b'GET / HTTP/1.1\r\n\r\n'),
        warc_record('response', 'http://a.org', answer('200 OK', 'text/html', page)),
        warc_record('response', 'http://a.org/x', answer('404 Not Found', 'text/html', 'no')),
        warc_record('response', 'http://a.org/y', answer('200 OK', 'image/png', 'no')),
        warc_record('conversion', 'http://b.org', prose(2).encode()),
    ]
    (tmp_path / 'a.warc.gz').write_bytes(b''.join(map(gzip.compress, records)))
    spec = dict(files=f'{tmp_path}/a.warc.gz')
    try:
        import warcio  # noqa: F401
    except ImportError:
        with pytest.raises(LabError, match=r"pip install 'k2lab\[warc\]'"):
            [*documents(spec)]
        return
    rows = [*documents(spec)]
    assert [row['text'].strip() for row in rows] == [prose(1), prose(2)]
    assert [row['url'] for row in rows] == ['http://a.org', 'http://b.org']
    reader = Reader(tmp_path / 'a.warc.gz', reading=Reading())
    assert len([*reader.records()]) == 2 and reader.notes == {
        'request records': 1,
        'responses with status 404': 1,
        'responses of type image/png': 1,
    }


# ---- rules that leave code, proofs and tables alone --------------------

ALONE = json.loads((Path(__file__).parent / 'data' / 'not_prose.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', ALONE)
def test_the_domain_rules_leave_code_proofs_and_tables_alone(name):
    import pyarrow as pa

    kept, counts = drop_poor(pa.table(dict(text=[ALONE[name]])), 'domain')
    assert len(kept) == 1, counts['removed']


def test_the_language_rule_leaves_code_alone():
    prose_like = {'german', 'thai', 'chinese', 'finnish', 'greek', 'poem', 'fasta'}
    assert {name for name, text in ALONE.items() if not is_code(text)} == prose_like
    assert DOMAIN['words'][0] == 5 and drop_licences


@pytest.mark.parametrize('rules', ['domain', 'prose'])
def test_encoded_data_and_symbols_are_removed(rules):
    import base64
    import random

    import pyarrow as pa

    rng = random.Random(3)
    junk = [
        base64.encodebytes(rng.randbytes(2000)).decode(),
        ' '.join(rng.choice('!@#$%^&*') * 3 for _ in range(200)),
        ''.join(rng.choice('!@#$%^&*()_+{}|:<>?') for _ in range(900)),
        'click here to read more\n' * 40,
    ]
    assert len(drop_poor(pa.table(dict(text=junk)), rules)[0]) == 0
