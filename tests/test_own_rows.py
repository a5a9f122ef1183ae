"Rows of the user's own join a corpus whatever their answers, families and number; what is left out is counted."

import json
from collections.abc import Callable

import pytest

from k2lab import prepare_corpus
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.tasks.sandbox import why_not
from k2lab.tasks.splits import check_unread, read_own
from k2lab.tasks.verify import verify
from k2lab.text.rows import read_rows

TEXT = dict(questions=0, general_sources=[], limit=None)
PUZZLES = dict(mode='reasoning', puzzles=4, prompts=4)


def question(text, answer, **more):
    "A row that is valid in both modes."
    domain = dict(instruction=text, input='', output=answer)
    return domain | dict(prompt=text, reasoning='so', final=answer) | more


def numbered(n, answer: Callable = str, **more):
    return [question(f'Question {i}?', answer(i), **more) for i in range(n)]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    "Runs prepare_corpus with own rows on 40 small documents, or on four puzzles in mode reasoning."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    for i in range(40):
        words = ' '.join(f'w{i}x{j}' for j in range(40))
        (tmp_path / f'note{i}.md').write_text(f'# Note {i}\n{words}')
    notes = [dict(files=f'{tmp_path}/note*.md', licence='CC0-1.0')]

    def run(rows, **changes):
        own = dict(own_rows=[write(tmp_path / 'own.jsonl', rows)])
        base = PUZZLES if changes.get('mode') == 'reasoning' else TEXT | dict(sources=notes)
        job = start('prepare_corpus', 'smoke', None, base | own | changes)
        prepare_corpus.prepare_corpora(job)
        return job.finish()

    return run


def read(job, name):
    "The rows of a file that a run published, none if it did not."
    path = job.folder / f'{name}.jsonl'
    return read_rows(path) if path.exists() else []


def sides_of(job):
    "The training, evaluation and development rows that a run published."
    names = ('domain_sft', 'domain_questions', 'domain_questions_dev')
    if job.cfg.mode == 'reasoning':
        names = ('reasoning_sft', 'reasoning_eval', 'reasoning_eval_dev')
    return [read(job, name) for name in names]


def files_of(job):
    "The training rows, and the rows of the two other sides."
    train, evaluation, development = sides_of(job)
    return [train, evaluation + development]


def card_of(job):
    return json.loads((job.folder / 'card.json').read_text())


MODES = pytest.mark.parametrize('mode', ['domain', 'reasoning'])


def majority_of(job):
    "The share of the most frequent answer among the own rows to evaluate on."
    [entry] = [
        c for c in card_of(job)['corpora'] if c['name'] in ('domain_questions', 'reasoning_eval')
    ]
    return entry['baselines']['majority']['own']


def step_of(job, name='own rows'):
    [step] = [step for step in card_of(job)['question_steps'] if step['step'] == name]
    return step


def own_of(rows):
    return [row for row in rows if row['family'] == 'own']


@MODES
def test_yes_no_questions_are_a_task_and_their_baseline_is_recorded(prepared, mode):
    rows = [question(f'Is {i} an even number?', 'no' if i % 2 else 'yes') for i in range(800)]
    job = prepared(rows, mode=mode)
    evaluated, development = map(own_of, sides_of(job)[1:])
    yes = sum(row['final'] == 'yes' for row in evaluated)
    assert (len(evaluated), len(development)) == (40, 20)
    assert majority_of(job) == max(yes, 40 - yes) / 40 >= 0.5


def test_rows_held_out_beyond_eval_items_are_counted(prepared):
    job = prepared(numbered(400))
    train, evaluated = files_of(job)
    step = step_of(job)
    assert (step['rows_in'], step['rows_out']) == (400, len(train) + len(evaluated))
    assert step['removed'] == {'held out beyond eval_items': 400 - len(train) - 60}
    assert f"{step['removed']['held out beyond eval_items']} held out beyond eval_items" in (
        job.folder / 'README.md'
    ).read_text(encoding='utf-8')


@MODES
def test_a_task_with_one_answer_has_a_baseline_of_one(prepared, mode):
    job = prepared(numbered(300, lambda i: 'yes'), mode=mode)
    assert majority_of(job) == 1


@MODES
def test_a_question_asked_twice_is_evaluated_once(prepared, mode):
    job = prepared(numbered(100) * 2, mode=mode)
    train, evaluated = files_of(job)
    asked = [row['prompt'] for row in own_of(evaluated)]
    assert len(asked) == len({*asked}) > 10
    assert not {*asked} & {row['prompt'] for row in train}
    assert step_of(job)['removed'] == {'evaluation questions asked before': len(asked)}


@MODES
def test_questions_that_differ_in_case_are_evaluated_once(prepared, mode):
    rows = [question(f'{word} {i}?', str(i)) for i in range(100) for word in ('What', 'WHAT')]
    train, evaluated = files_of(prepared(rows, mode=mode))
    asked = [row['prompt'].lower() for row in own_of(evaluated)]
    assert len(asked) == len({*asked})
    assert not {*asked} & {row['prompt'].lower() for row in own_of(train)}


def test_rows_of_an_earlier_run_join_a_run_with_the_same_puzzles(prepared):
    first = prepared(numbered(20), mode='reasoning', puzzles=120)
    rows = read_rows(first.folder / 'reasoning_sft.jsonl')
    job = prepared(rows, mode='reasoning', puzzles=120)
    train, evaluated = files_of(job)
    given_up = step_of(job, 'puzzles')['removed']['asked by your evaluation']
    assert given_up == len({r['prompt'] for r in rows if r['family'] != 'own'} & asked(evaluated))
    assert not asked(train) & asked(evaluated)


def asked(rows):
    return {row['prompt'] for row in rows}


@MODES
@pytest.mark.parametrize('n', [2, 3, 7])
def test_few_rows(prepared, mode, n):
    train, evaluated = files_of(prepared(numbered(n), mode=mode))
    assert len(own_of(train)) + len(own_of(evaluated)) == n


def test_one_row_has_nothing_to_evaluate_on(prepared, monkeypatch):
    monkeypatch.setattr(prepare_corpus, 'refine', lambda *a, **kw: pytest.fail('work was done'))
    with pytest.raises(LabError, match='nothing to evaluate on: 0 of 1 own rows'):
        prepared(numbered(1))


@MODES
def test_rows_with_one_question_leave_none_to_train_on(prepared, mode):
    with pytest.raises(LabError, match='9 own rows leave none to train on'):
        prepared([question('Tell a story.', str(i)) for i in range(9)], mode=mode, **HOLD_OUT[mode])


HOLD_OUT = dict(
    domain=dict(heldout_percent=99.99, development_percent=0), reasoning=dict(heldout_percent=100)
)


def test_own_rows_alone_are_a_reasoning_task(prepared):
    job = prepared(
        numbered(60), mode='reasoning', puzzles=0, prompts=0, eval_puzzles=0, dev_items=0
    )
    assert set(job.record['saves']) == {'reasoning', 'reasoning_sft'}
    job = prepared(numbered(60), mode='reasoning', puzzles=0, prompts=0)
    asked = {'reasoning_eval', 'reasoning_eval_dev'}
    assert set(job.record['saves']) == {'reasoning', 'reasoning_sft'} | asked


@MODES
@pytest.mark.parametrize(
    'more',
    [
        dict(family=None),
        dict(family=''),
        dict(family='all'),
        dict(family='default'),
        dict(licence=None),
        dict(source=None),
        dict(entry='x'),
        dict(id=4),
        dict(fact=None),
        dict(text='hello'),
        dict(key='a'),
    ],
    ids=str,
)
def test_other_fields_break_nothing(prepared, mode, more):
    rows = numbered(60) + [{**row, **more} for row in numbered(120)[60:]]
    job = prepared(rows, mode=mode)
    train, evaluated = files_of(job)
    replies = [row.get('final') or row.get('output') for row in evaluated]
    assert all(verify(row, reply) for row, reply in zip(evaluated, replies, strict=True))
    assert {row['source'] for row in own_of(train)} == {job.cfg.own_rows[0]}


REFUSED = [
    (dict(family=3), "row 3: 'family' must be text, this is int"),
    (dict(licence=['MIT']), "row 3: 'licence' must be text, this is list"),
    (dict(source=['a']), "row 3: 'source' must be text, this is list"),
    (dict(answer='other'), "replies would be graded by 'other' as text"),
    (dict(answer='other'), "mend the row, remove 'answer', or name the kind of answer in 'judge'"),
    (dict(answer=None), 'row 3: the answer must be text or a number, this is None; mend the row'),
    (dict(answer='yes'), "'no', but replies would be graded by 'yes' as yesno"),
    (dict(judge='numbr'), "did you mean 'number'"),
    (dict(judge='number'), "'no' cannot be read as a number"),
    (dict(judge='interval', answer='[0, 1)'), "graded by '[0, 1)' as interval"),
    (dict(family='sort'), "'sort' is a puzzle family with computed answers"),
    (dict(family='compare'), 'row 3: not a compare question'),
]


@MODES
@pytest.mark.parametrize('more,message', REFUSED, ids=str)
def test_a_row_that_cannot_be_graded_is_refused_before_any_work(
    prepared, monkeypatch, mode, more, message
):
    for name in ('refine', 'make_puzzles', 'split_functions'):
        monkeypatch.setattr(prepare_corpus, name, lambda *a, **kw: pytest.fail('work was done'))
    rows = [
        {**row, **(more if i > 1 else {})} for i, row in enumerate(numbered(60, lambda i: 'no'))
    ]
    with pytest.raises(LabError) as e:
        prepared(rows, mode=mode)
    assert message in str(e.value) and '\n' not in str(e.value)


KINDS = [  # a right row and its answer, and a text that is wrong by it
    (dict(answer='1/2'), 'The result is 0.5.', 'The result is 0.5 or 0.6.'),
    (dict(answer=12), 'It is twelve.', 'It is thirteen.'),
    (dict(answer='5 km'), '5000 m', '5 m'),
    (dict(answer='2, 5'), 'x = 2 or x = 5', '5'),
    (dict(answer='[0, 1)'), '0 <= x < 1', '(0, 1)'),
    (dict(answer='B', judge='choice'), 'The answer is (B).', 'A or B'),
    (dict(answer='yes'), 'Yes, because it is.', 'No.'),
    (dict(answer='Lima'), 'The capital is `Lima`.', 'It is Lima or Cusco.'),
    (dict(answer='f = lambda x: x'), '```python\ndef f(x): return x\n```', 'f = lambda y: 1'),
    (dict(answer='\\frac{1}{\\sqrt{2}}'), '\\boxed{\\frac{\\sqrt{2}}{2}}', '\\boxed{\\sqrt{2}}'),
    (dict(answer='x', judge='exact'), 'x.', 'It is x.'),
    (dict(), 'A text of its own, with 3 or 4 numbers.', '<think>'),
]


def graded_own(path, mode):
    return read_own([path], dict(domain='domain_sft', reasoning='reasoning_sft')[mode])


@MODES
@pytest.mark.parametrize('more,right,wrong', KINDS, ids=lambda value: str(value)[:20])
def test_a_row_of_each_kind_is_right_by_its_own_answer_or_refused(
    tmp_path, mode, more, right, wrong
):
    good = write(
        tmp_path / 'good.jsonl', [question(f'What is f({i})?', right) | more for i in 'ab']
    )
    rows = graded_own(good, mode)
    assert sum(verify(row, row['final']) for row in rows) == 2
    assert not any(verify(row, wrong) for row in rows)
    bad = write(
        tmp_path / 'bad.jsonl', [question('a?', right) | more, question('b?', wrong) | more]
    )
    with pytest.raises(LabError, match=r'bad\.jsonl: row 2: .*(graded by|graded as)'):
        graded_own(bad, mode)


@MODES
def test_what_is_trained_is_what_is_graded(tmp_path, mode):
    one = question('a?', 'Lima')
    field = dict(domain='output', reasoning='final')[mode]
    with pytest.raises(LabError, match=f'row 1: {field!r} is .Cusco., but replies would be graded'):
        graded_own(write(tmp_path / 'a.jsonl', [one | {field: 'Cusco', 'answer': 'Lima'}]), mode)


@pytest.mark.skipif(bool(why_not()), reason=f'no sandbox: {why_not()}')
@MODES
def test_rows_with_tests_are_graded_by_them(tmp_path, mode):
    adds = dict(tests=['assert add(2, 3) == 5'])
    good, bad = 'def add(a, b): return a + b', 'def add(a, b): return a - b'
    [row] = graded_own(write(tmp_path / 'a.jsonl', [question('Add.', good, **adds)]), mode)
    assert verify(row, 'def add(x, y): return y + x')
    with pytest.raises(LabError, match='tests fail'):
        graded_own(write(tmp_path / 'a.jsonl', [question('Add.', bad, **adds)]), mode)


@MODES
def test_own_rows_keep_their_licence_and_their_file_is_the_origin(prepared, mode):
    rows = numbered(60, licence='CC-BY-4.0') + [question('Why?', 'so')]
    job = prepared(rows, mode=mode)
    entries = [c for c in card_of(job)['corpora'] if c['format'].endswith('_sft')]
    licence = {'domain': 'CC-BY-4.0', 'reasoning': 'Apache-2.0 AND CC-BY-4.0'}[mode]
    assert {c['licence'] for c in entries} <= {licence, f'{licence} AND unknown'}
    assert any('unknown' in c['licence'] for c in entries)
    assert all('own.jsonl' in c['origin'] for c in entries)


@MODES
def test_no_row_asks_a_question_of_your_evaluation_sets(prepared, tmp_path, mode):
    asked_there = numbered(30)
    eval_sets = dict(mine=write(tmp_path / 'mine.jsonl', asked_there))
    job = prepared(numbered(100), mode=mode, eval_sets=eval_sets)
    train, evaluated = files_of(job)
    left = asked(own_of(train)) | asked(own_of(evaluated))
    assert left == {f'Question {i}?' for i in range(30, 100)}
    assert sum(step_of(job)['removed'].values()) == 30
    [check] = [c for c in job.record['checks'] if c['name'].startswith('no question of eval_sets')][
        :1
    ]
    assert check['ok'] and check['detail'] == '0 of 30'


def test_no_puzzle_asks_a_question_of_your_evaluation_sets(prepared, tmp_path):
    first = prepared(numbered(20), mode='reasoning', puzzles=40)
    puzzles = [r for r in read_rows(first.folder / 'reasoning_sft.jsonl') if r['family'] != 'own']
    prompts = read_rows(first.folder / 'reasoning_prompts.jsonl')
    eval_sets = dict(mine=write(tmp_path / 'mine.jsonl', puzzles[:7] + prompts[:3]))
    job = prepared(numbered(20), mode='reasoning', puzzles=40, eval_sets=eval_sets)
    assert step_of(job, 'puzzles')['removed'] == {'asked by your evaluation': 7}
    assert step_of(job, 'problems to sample on')['removed'] == {'asked by your evaluation': 3}
    assert not asked(files_of(job)[0]) & asked(puzzles[:7])


def test_a_row_in_both_lists_fails_the_check():
    checks = []
    job = type('Job', (), dict(check=lambda self, name, ok, detail='': checks.append((name, ok))))()
    check_unread(job, [question('A?', 'b')], dict(train=[question('a?', 'b')]), 'question')
    assert checks == [('no question occurs in train', False)]
