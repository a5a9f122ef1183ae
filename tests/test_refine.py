"""Documents on their way from files to a corpus: nothing lost, nothing counted twice, whoever does the work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2lab.corpus import operators
from k2lab.corpus.pipeline import (
    Refining,
    mix,
    refine,
    refining,
    tables_of,
    texts_of,
    unique,
    values_of,
    without_contaminated,
)
from k2lab.corpus.units import Plan, plan_units, run_units
from k2lab.lab.config import LabError
from k2lab.text import rows

WORDS = (
    'graph node edge path tree cycle weight degree matrix flow cut colour match '
    'order rank sort heap queue stack walk'
).split()


def page(rng, n: int = 60) -> str:
    return ' '.join(rng.choice(WORDS) + str(rng.randrange(200)) for _ in range(n))


def write(path: Path, made: list):
    path.write_text(''.join(json.dumps(row) + '\n' for row in made))


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    "Three files of 200 documents; 30 of them come again, word for word, shouted or with a line more."
    folder, rng = tmp_path_factory.mktemp('library'), random.Random(1)
    pages = [page(rng) for _ in range(600)]
    again = [
        (text, text.upper(), f'{text} That is all.')[i % 3] for i, text in enumerate(pages[:30])
    ]
    short = ['too short'] * 5 + [f'Write to {name}@kims-mail.org' for name in ('kim', 'lee')]
    everything = [dict(text=text, source='library') for text in pages + again + short]
    rng.shuffle(everything)
    for i in range(3):
        write(folder / f'{i}.jsonl', everything[i::3])
    return folder


@pytest.fixture(scope='module', autouse=True)
def without_ray():
    "Ray's processes, which work even when they have nothing to do, end with this file."
    yield
    if ray := sys.modules.get('ray'):
        ray.shutdown()


def refined(library, folder, **how):
    made = refine(
        [dict(files=f'{library}/*.jsonl', licence='MIT')], ['library'], Refining(), folder, **how
    )
    index, steps = unique(made, Refining())
    return made, index, made.steps + steps


def digest(folder) -> str:
    return json.loads((Path(folder) / '00' / 'units' / 'shards.json').read_text())['digest']


def test_every_step_accounts_for_rows_and_bytes(library, tmp_path):
    made, index, steps = refined(library, tmp_path)
    assert operators.conserved(steps) == '' and steps[0]['rows_in'] == 637 and len(index) == 600
    assert {step['step']: step['removed'] for step in steps if step['removed']} == {
        'length': {'shorter than 80': 7},
        'exact dedup': {'copy': 20},
        'near dedup': {'near copy': 10},
    }
    for step in steps:
        if 'bytes_in' in step and 'changed' not in step:
            assert step['bytes_in'] == step['bytes_out'] + sum(step['removed_bytes'].values()), step
    assert steps[-1]['bytes_out'] == sum(len(text.encode()) for text in texts_of(made, index))


def test_of_each_cluster_exactly_one_document_stays_and_it_is_the_longest(library, tmp_path):
    made, index, _ = refined(library, tmp_path)
    left = [' '.join(text.lower().split()[:60]) for text in texts_of(made, index)]
    assert len(left) == len(set(left)) == 600
    assert sum(text.endswith('That is all.') for text in texts_of(made, index)) == 10


def test_what_is_shown_of_removed_documents_holds_nothing_private(tmp_path):
    write(
        tmp_path / 'a.jsonl',
        [dict(text=page(random.Random(i)), source='x') for i in range(9)]
        + [dict(text='Write to kim@kims-mail.org', source='x')],
    )
    made = refine([dict(files=f'{tmp_path}/a.jsonl')], ['a'], Refining(), tmp_path / 'work')
    (shown,) = [step['samples'] for step in made.steps if step.get('samples')]
    assert [*shown] == ['shorter than 80'] and [*shown['shorter than 80'].values()] == [
        'Write to <EMAIL>'
    ]
    assert 'kims-mail' not in ''.join(
        path.read_text('utf-8', 'ignore')
        for path in (tmp_path / 'work').rglob('*')
        if path.is_file()
    )


def test_a_key_that_is_longer_than_what_is_shown_is_not_shown_in_part(tmp_path):
    key = (
        '-----BEGIN RSA PRIVATE KEY-----\n'
        + '\n'.join('MIIEpAIBAAKCAQEA1' + str(i).zfill(47) for i in range(30))
        + '\n-----END RSA PRIVATE KEY-----'
    )
    write(
        tmp_path / 'a.jsonl',
        [dict(text=page(random.Random(1)), source='x'), dict(text=f'{key} ' * 3, source='x')],
    )
    made = refine(
        [dict(files=f'{tmp_path}/a.jsonl')], ['a'], Refining(max_chars=1000), tmp_path / 'work'
    )
    assert ['<PRIVATE_KEY> <PRIVATE_KEY> <PRIVATE_KEY>'] == [
        text.strip()
        for step in made.steps
        for some in step.get('samples', {}).values()
        for text in some.values()
    ]


def test_signals_travel_as_columns_when_asked(tmp_path):
    write(
        tmp_path / 'a.jsonl', [dict(text='a node ' * 30 + page(random.Random(1)), source='x', n=1)]
    )
    made = refine(
        [dict(files=f'{tmp_path}/a.jsonl')],
        ['a'],
        Refining(signals=True, quality=dict(words=[1, 1000])),
        tmp_path / 'work',
    )
    (table,) = tables_of(made, made.index)
    from k2lab.corpus.writers import json_lines

    row = json.loads(json_lines(table))
    assert (
        row['signal_words'] == 120
        and row['n'] == 1
        and 'signal_alpha_words' in row
        and 'bands' not in row
    )


@pytest.mark.parametrize(
    'how', [dict(workers=2), dict(workers=2, engine='ray')], ids=['two processes', 'ray']
)
def test_another_engine_gives_the_same_bytes(library, tmp_path, how):
    if how.get('engine') == 'ray':
        pytest.importorskip('ray', reason='Ray is not installed')
    alone, many = refined(library, tmp_path / 'alone'), refined(library, tmp_path / 'many', **how)
    assert digest(tmp_path / 'alone') == digest(tmp_path / 'many')
    assert alone[1].equals(many[1]) and alone[2] == many[2]


def fatal(table, folder: str):
    "An operator that kills its process the first time that it meets the second file."
    print(os.getpid(), file=open(f'{folder}/calls', 'a'))
    if '1.jsonl' in table['source'][0].as_py() and not os.path.exists(f'{folder}/died'):
        open(f'{folder}/died', 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    return table, dict(removed={})


@pytest.mark.parametrize('engine', ['local', 'ray'])
def test_a_killed_unit_is_done_again_and_finished_ones_are_not(tmp_path, engine, monkeypatch):
    if engine == 'ray':
        pytest.importorskip('ray', reason='Ray is not installed')
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for i in range(3):
        write(tmp_path / f'{i}.jsonl', [dict(text=page(random.Random(i)), source=f'{i}.jsonl')])
    units, plan = (
        plan_units(f'{tmp_path}/*.jsonl', size=1),
        Plan('test_refine:fatal', dict(folder=str(tmp_path))),
    )
    assert run_units(units, plan, tmp_path / 'out', workers=2, engine=engine)['rows'] == 3
    assert (tmp_path / 'died').exists() and len(
        (tmp_path / 'calls').read_text().split()
    ) == 4  # three units, one of them twice
    assert run_units(units, plan, tmp_path / 'out', workers=1)['rows'] == 3
    assert len((tmp_path / 'calls').read_text().split()) == 4


def test_a_document_is_on_the_side_of_its_key_wherever_it_lies(library, tmp_path):
    made, index, _ = refined(library, tmp_path / 'work')
    write(
        tmp_path / 'one.jsonl',
        [
            json.loads(line)
            for i in (2, 0, 1)
            for line in (library / f'{i}.jsonl').read_text().splitlines()
        ],
    )
    again = refine([dict(files=f'{tmp_path}/one.jsonl')], ['one'], Refining(), tmp_path / 'again')
    keys = lambda made: dict(zip(texts_of(made, made.index), values_of(made, made.index, 'key')))
    assert keys(made) == keys(again) and all(key.startswith('text:') for key in keys(made).values())
    (tmp_path / 'note.md').write_text(page(random.Random(5)))
    note = refine([dict(files=f'{tmp_path}/note.md')], ['note'], Refining(), tmp_path / 'note')
    assert [*values_of(note, note.index, 'key')] == [f'{tmp_path}/note.md']
    assert [*values_of(note, note.index, 'licence')] == ['unknown']


def test_documents_that_quote_an_evaluation_set_go_and_it_is_named(library, tmp_path):
    made, index, _ = refined(library, tmp_path)
    quoted, other = texts_of(made, index)[7], page(random.Random(99))
    left, counts = without_contaminated(made, index, dict(mine=[quoted[:150]], theirs=[other]))
    assert (
        len(left) == len(index) - 1
        and quoted not in texts_of(made, left)
        and counts['contaminated'] == {'mine': 1}
    )


def test_a_mixture_has_the_numbers_asked_for(library, tmp_path):
    write(
        tmp_path / 'few.jsonl',
        [dict(text=page(random.Random(1000 + i)), source='few') for i in range(10)],
    )
    made = refine(
        [dict(files=f'{library}/*.jsonl'), dict(files=f'{tmp_path}/few.jsonl')],
        ['many', 'few'],
        Refining(),
        tmp_path / 'work',
    )
    index, _ = unique(made, Refining())
    with pytest.raises(
        LabError, match='few has 10 rows, its share is 25: lower its weight or the total'
    ):
        mix(made, index, [3, 1], 100)
    mixed, counts, told = mix(made, index, [3, 1], 100, epochs=3)
    assert (
        mixed['spec'].to_pylist().count(1) == 25
        and len(set(mixed['row'].to_pylist())) == 85
        and operators.conserved([counts]) == ''
    )
    assert (
        told == dict(many=dict(asked=0.75, epochs=1), few=dict(asked=0.25, epochs=3))
        and counts['repeated'] == 15
    )
    assert mix(made, index, [3, 1], 100, epochs=3)[0].equals(mixed) and not mix(
        made, index, [3, 1], 100, seed=1, epochs=3
    )[0].equals(mixed)
    assert [
        text for table in tables_of(made, mixed) for text in table['text'].to_pylist()
    ] == texts_of(made, mixed)


@pytest.mark.parametrize(
    'told,message',
    [
        (dict(qualty='gopher'), "did you mean 'quality'"),
        (dict(quality='best'), 'gopher'),
        (dict(near_duplicate_jaccard=7), 'Jaccard'),
        (dict(near=0.7), "'near' is now called 'near_duplicate_jaccard'"),
        (dict(least=5), "'least' is now called 'min_chars'"),
        (dict(languages='en'), 'are lists'),
        (dict(quality=dict(wrds=[1, 2])), "did you mean 'words'"),
        (dict(quality=dict(words=[9, 2])), 'a rule is'),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_read(told, message):
    with pytest.raises(LabError, match=message):
        refining(told)


def test_a_source_of_which_nothing_is_left_says_why(tmp_path):
    write(tmp_path / 'a.jsonl', [dict(text='short', source='x')] * 3)
    with pytest.raises(LabError, match='no document of a passes: {"shorter than 80": 3}'):
        refine([dict(files=f'{tmp_path}/a.jsonl')], ['a'], Refining(), tmp_path / 'work')


def stage(runs: Path, *words: str, **kw):
    return subprocess.Popen(
        [sys.executable, '-m', 'k2lab', *words],
        env={**os.environ, 'K2LAB_LAB_RUNS_PATH': str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def test_a_killed_preparation_goes_on_where_it_was_and_ends_the_same(library, tmp_path):
    write(
        tmp_path / 'own.jsonl',
        [dict(instruction=f'What is node {i}?', input='', output=f'Node {i}') for i in range(80)],
    )
    words = [
        'prepare_corpus',
        '--scale',
        'smoke',
        '--campaign',
        'c',
        f'sources=[{{files: "{library}/*.jsonl", licence: MIT}}]',
        f'own_rows=["{tmp_path}/own.jsonl"]',
        'heldout_percent=15',
        'limit=null',
        'workers=2',
        'general_sources=[{package: fsspec}]',
    ]
    one = stage(tmp_path / 'one', *words)
    assert one.wait() == 0, one.stdout.read()
    two = stage(tmp_path / 'two', *words, start_new_session=True)
    while two.poll() is None and not [*(tmp_path / 'two').rglob('receipts/*.json')]:
        time.sleep(0.005)
    if two.poll() is None:
        os.killpg(two.pid, signal.SIGKILL)
    two.wait()
    (run,) = (tmp_path / 'two').glob('c/*')
    assert not (run / 'card.json').exists()
    again = stage(tmp_path / 'two', 'resume', f'c/{run.name}')
    assert again.wait() == 0, again.stdout.read()
    (same,) = (tmp_path / 'one').glob('c/*')
    for name in ('domain', 'domain_heldout', 'general', 'domain_questions'):
        assert (run / f'{name}.jsonl').read_bytes() == (same / f'{name}.jsonl').read_bytes(), name
    assert not (run / 'work').exists() and rows.read_rows(run / 'domain.jsonl', 'domain')


def test_bad_rows_are_in_the_books(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        ''.join(json.dumps(dict(text=page(random.Random(i)), source='x')) + '\n' for i in range(9))
        + '{"text": 1}\n'
    )
    made = refine(
        [dict(files=f'{tmp_path}/a.jsonl')], ['a'], Refining(), tmp_path / 'work', max_bad=0.2
    )
    assert (
        made.steps[0] == dict(step='read', rows_in=10, rows_out=9, removed={'bad row': 1})
        and operators.conserved(made.steps) == ''
    )
