"""Reasoning sets of others: every published layout, every reason to drop a trace, and answers that only look right."""

import json

import pytest

from k2lab.corpus.operators import conserved
from k2lab.lab.config import LabError
from k2lab.tasks import verify
from k2lab.tasks.sandbox import run_python, why_not
from k2lab.tasks.traces import (
    Trace,
    fault_of,
    graded_row,
    gym_rows,
    layout_of,
    not_asked,
    one_each,
    parted,
    reasoning_set,
)
from k2lab.text import rows

LAYOUTS = {
    'gsm8k': (
        dict(question='6 times 7?', answer='6*7 = <<6*7=42>>42\n#### 42'),
        [('6 times 7?', '6*7 = 42', '42', '42')],
    ),
    'openr1': (
        dict(problem='6*7?', answer='42', generations=['<think>a</think>42', '<think>b</think>43']),
        [('6*7?', 'a', '42', '42'), ('6*7?', 'b', '43', '42')],
    ),
    'numina': (
        dict(problem='6*7?', solution='Count.\n\nSo 42.', answer='42'),
        [('6*7?', 'Count.', 'So 42.', '42')],
    ),
    'messages': (
        dict(
            messages=[
                dict(role='system', content='s'),
                dict(role='user', content='6*7?'),
                dict(role='assistant', content='<think>a</think>42'),
            ]
        ),
        [('6*7?', 'a', '42', None)],
    ),
    'sharegpt': (
        dict(
            conversations=[
                {'from': 'user', 'value': '6*7?'},
                {
                    'from': 'gpt',
                    'value': '<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>42<|end_of_solution|>',
                },
            ]
        ),
        [('6*7?', 'a', '42', None)],
    ),
    'ours': (
        dict(prompt='6*7?', reasoning='a', final='42', answer='42'),
        [('6*7?', 'a', '42', '42')],
    ),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_each_layout_gives_prompt_thoughts_answer(name):
    row, want = LAYOUTS[name]
    found = layout_of(row)(row)
    assert [(t.prompt, *parted(t.text)[:2], t.answer) for t in found] == want


def test_named_fields_and_unknown_layouts():
    row = dict(q='6*7?', cot='a\n\n42', gold=42, body='x')
    assert layout_of(row, dict(prompt='q', text='cot', answer='gold'))(row) == [
        Trace('6*7?', 'a\n\n42', '42')
    ]
    with pytest.raises(
        LabError, match='no known layout has the fields q, cot, gold, body; name them'
    ):
        layout_of(row)


@pytest.mark.parametrize(
    'text,why',
    [
        ('<think>a', 'cut off while thinking'),
        ('<think>a</think> ', 'no final answer'),
        ('<think></think>42', 'no thoughts'),
        ('42', 'no thoughts'),
        ('', 'no final answer'),
        ('<|begin_of_thought|>a 42', 'cut off while thinking'),
    ],
)
def test_a_text_without_both_parts_says_what_is_missing(text, why):
    assert parted(text) == ('', '', why)


def why(trace, final, judge=None):
    return fault_of(graded_row(trace, 'so', final, judge))


@pytest.mark.parametrize(
    'answer,final,right',
    [
        ('42', 'It is 42.', True),
        ('42', '$\\boxed{42}$', True),
        ('0.5', '\\frac{1}{2}', True),
        ('1/2', 'The probability is $\\frac12$', True),
        ('42', '24', False),
        ('\\sqrt{8}', '$2\\sqrt{2}$', True),
        ('1,000', '1000', True),
        ('x^2+2x+1', '$(x+1)^2$', True),
        ('7', 'seven', True),
        ('42', '\\frac{{{{', False),
        ('9' * 400, '9' * 400, True),
        ('3', '\U0001d7db', True),
        ('4', 'The answer is 3 or 4.', False),
        ('Paris', 'The capital is Paris.', True),
        ('Paris', 'Not Paris but London', False),
        ('a, b', 'a,b', True),
    ],
)
def test_a_final_answer_is_compared_by_its_kind(answer, final, right):
    assert (why(Trace('?', '', answer), final) == '') is right


@pytest.mark.parametrize(
    'answer,final,right',
    [
        ('B', 'The answer is (B).', True),
        ('B', 'A or B? It is A', False),
        ('(C)', 'C', True),
        ('B', 'Because', False),
    ],
)
def test_letters(answer, final, right):
    assert (why(Trace('? (A) x (B) y (C) z', '', answer), final) == '') is right


CODE = Trace('Add.', '', tests=('assert add(2, 3) == 5', 'assert add(-1, 1) == 0'))


@pytest.mark.skipif(bool(why_not()), reason=f'no sandbox: {why_not()}')
@pytest.mark.parametrize(
    'final,fault',
    [
        ('Here:\n```python\ndef add(a, b):\n    return a + b\n```', ''),
        ('def add(a, b): return 5', 'tests fail'),
        ('def add(a, b): return a + b\nprint("ok")', ''),
        ('import os\nos._exit(0)', 'tests fail'),
        ('def add(a, b):\n    while True: pass', 'tests ran out of time'),
        ('raise SystemExit', 'tests fail'),
        ('def add(', 'tests fail'),
        ('open("/etc/passwd")\ndef add(a, b): return a + b', 'tests fail'),
    ],
)
def test_code_must_pass_its_tests_and_reach_their_end(final, fault, monkeypatch):
    sooner = lambda text, timeout: run_python(text, timeout=timeout / 4)
    monkeypatch.setattr(verify, 'run_python', sooner)
    assert why(CODE, final) == fault


def test_a_set_may_name_its_kind_and_an_answer_that_is_none_is_counted(tmp_path):
    lines = [
        dict(problem='Which of both?', answer=answer, solution=f'<think>so</think>{final}')
        for answer, final in [('1, 2', '2 and 1'), ('1, 2', '3'), ('x', 'x')]
    ]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    spec = dict(files=f'{tmp_path}/a.jsonl', judge='number')
    _, steps = reasoning_set(spec)
    assert conserved(steps) == ''
    [step] = [step for step in steps if step['step'] == 'verify']
    assert step['removed'] == {'answer is no number': 2}  # x is a formula
    found, _ = reasoning_set(spec | dict(judge='set'))
    assert [(r['final'], r['judge']) for r in found] == [('2 and 1', 'set')]
    assert all(verify.verify(r, r['final']) for r in found)


def row(prompt, reasoning='r', verified=True):
    return dict(prompt=prompt, reasoning=reasoning, final='f', verified=verified)


ASK = (
    'A train leaves the station at {} in the morning and goes {} miles an hour to '
    'the next town, which is 120 miles away. When is it there?'
)


def test_problems_that_differ_in_a_number_are_two():
    same = [
        row(ASK.format(7, 60)),
        row(ASK.format(7, 60).replace('miles', 'MILES') + ' '),
        row(ASK.format(8, 60)),
        row(ASK.format(7, 40)),
        row('Hm, ' + ASK.format(7, 60), 'a longer trace'),
    ]
    kept, counts = one_each(same)
    assert [r['prompt'] for r in kept] == [same[0]['prompt'], same[2]['prompt'], same[3]['prompt']]
    assert (
        counts['removed'] == {'same prompt': 1, 'near-identical prompt': 1}
        and conserved([counts]) == ''
    )


def test_the_shortest_verified_trace_stays():
    kept, _ = one_each(
        [row('6*7?', 'long and right'), row('6*7?', 'x', verified=False), row('6*7?', 'right')]
    )
    assert [r['reasoning'] for r in kept] == ['right']
    assert len(one_each([row('6*7?', 'a'), row('6*7?', 'b'), row('6*7?', 'c')], keep=2)[0]) == 2


def test_no_evaluation_question_is_learned():
    long = ASK.format(7, 60)
    kept, counts = not_asked(
        [row('6*7?'), row(' 6*7? '.upper()), row(f'Well. {long} Think hard.'), row('7*8?')],
        ['6*7?', long],
    )
    assert [r['prompt'] for r in kept] == ['7*8?'] and counts['removed'] == {
        'is an evaluation question': 2,
        'quotes an evaluation question': 1,
    }


def test_only_what_was_checked_is_called_verified(tmp_path):
    rows = [
        dict(problem='6*7?', solution='Six sevens.\n\nSo \\boxed{42}.'),  # MATH
        dict(problem='5*7?', solution='Five sevens.\n\nSo 36.', answer='35'),
        dict(problem='4*7?', solution='Four sevens.\n\nSo 28.', answer='28'),
        dict(problem='3*7?', solution='Three sevens.\n\nSo 21.'),
    ]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    found, steps = reasoning_set(dict(files=f'{tmp_path}/a.jsonl'))
    assert [(r['answer'], r['verified']) for r in found] == [('42', False), ('28', True)]
    (verify,) = [step for step in steps if step['step'] == 'verify']
    assert verify['removed'] == {
        'wrong answer': 1,
        'nothing to check its answer by (judge: none takes it)': 1,
    }
    assert verify['notes'] == {'taken unchecked': 1}


def test_a_set_without_answers_is_refused_unless_that_is_asked_for(tmp_path):
    (tmp_path / 'a.jsonl').write_text(json.dumps(dict(problem='?', solution='a\n\nb')) + '\n')
    spec = dict(files=f'{tmp_path}/a.jsonl')
    with pytest.raises(LabError, match='1 rows, and nothing to check.*judge: none'):
        reasoning_set(spec)
    found, steps = reasoning_set(spec | dict(judge='none'))
    assert len(found) == 1 and steps[3]['notes'] == {'taken unchecked': 1}


def test_the_answer_of_gsm8k_stands_in_its_solution(tmp_path):
    row = dict(question='6*7?', answer='Six sevens.\n#### 42')
    (tmp_path / 'a.jsonl').write_text(json.dumps(row) + '\n')
    (found,), _ = reasoning_set(dict(files=f'{tmp_path}/a.jsonl'))
    assert found['answer'] == '42' and not found['verified']


def test_a_set_is_accounted_for_from_the_first_row_to_the_last(tmp_path):
    lines = [
        '{broken',
        json.dumps([1]),
        json.dumps(dict(problem='no answer')),
        *(
            json.dumps(
                dict(
                    problem=f'What is {i}*2?',
                    answer=str(2 * i),
                    generations=[
                        f'<think>{i}+{i}</think>{2 * i}',
                        f'<think>{i}+{i}</think>{2 * i + i % 3}',
                        '<think>',
                    ],
                )
            )
            for i in range(30)
        ),
    ]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines[3:] + lines[:3]) + '\n')
    found, steps = reasoning_set(
        dict(files=f'{tmp_path}/a.jsonl', licence='MIT', name='a set'), ['What is 7*2?']
    )
    assert (
        conserved(steps) == ''
        and len(found) == 29
        and {r['licence'] for r in found} == {'MIT'}
        and all(r['verified'] for r in found)
    )
    assert {s['step']: s['removed'] for s in steps if s['removed']} == {
        'read': {'bad row': 2, 'a field is missing': 1},
        'part': {'cut off while thinking': 30},
        'verify': {'wrong answer': 20},
        'one of each problem': {'same prompt': 10},
        'decontaminate': {'is an evaluation question': 1},
    }
    everything, _ = reasoning_set(dict(files=f'{tmp_path}/a.jsonl', judge='none'))
    assert len(everything) == 30 and not any(r['verified'] for r in everything)


@pytest.mark.parametrize(
    'spec,message',
    [
        (dict(licens='MIT'), "did you mean 'licence'"),
        (dict(judge='numbr'), "did you mean 'number'"),
    ],
)
def test_bad_specs_are_named(tmp_path, spec, message):
    (tmp_path / 'a.jsonl').write_text(json.dumps(dict(problem='?', solution='a\n\nb')))
    with pytest.raises(LabError, match=message):
        reasoning_set(dict(files=f'{tmp_path}/a.jsonl', **spec))


def test_a_long_trace_is_no_trouble(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        json.dumps(
            dict(
                problem='6*7?',
                answer='42',
                solution='<think>' + 'six and ' * 130_000 + '</think>42',
            )
        )
    )
    found, _ = reasoning_set(dict(files=f'{tmp_path}/a.jsonl'))
    assert len(found[0]['reasoning']) > 10**6


def test_problems_of_a_generator_are_scored_by_it():
    pytest.importorskip('reasoning_gym', reason='reasoning-gym is not installed')
    asked = gym_rows(dict(chain_sum=5, spell_backward=5, gcd=5, basic_arithmetic=5), 10**7)
    assert (
        len(asked) == 20
        and asked == gym_rows(dict(chain_sum=5, spell_backward=5, gcd=5, basic_arithmetic=5), 10**7)
        and not {r['prompt'] for r in asked}
        & {r['prompt'] for r in gym_rows(dict(chain_sum=5), 2 * 10**7)}
    )
    assert all(
        verify.verify(r, f"<think>so</think>{r['answer']}")
        and not verify.verify(r, '<think>so</think>no idea')
        for r in asked
    )
    with pytest.raises(LabError, match="did you mean 'chain_sum'"):
        gym_rows(dict(chainsum=1))


def test_the_stage_takes_sets_and_generators(tmp_path, monkeypatch):
    pytest.importorskip('reasoning_gym', reason='reasoning-gym is not installed')
    from k2lab import prepare_corpus
    from k2lab.lab.job import start
    from k2lab.lab.launch import launch

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    (tmp_path / 'a.jsonl').write_text(
        ''.join(
            json.dumps(
                dict(
                    problem=f'What is {i}*2?',
                    answer=str(2 * i),
                    solution=f'<think>{i}+{i}</think>{2 * i + i % 2}',
                )
            )
            + '\n'
            for i in range(20)
        )
    )
    job = start(
        'prepare_corpus',
        'smoke',
        None,
        dict(
            mode='reasoning',
            trace_sources=[dict(files=f'{tmp_path}/a.jsonl', licence='MIT', name='doubles')],
            gym=dict(chain_sum=6),
        ),
    )
    launch(prepare_corpus.work, job)
    run = job.finish().folder
    learned = [
        r
        for r in rows.read_rows(run / 'reasoning_sft.jsonl', 'reasoning_sft')
        if r.get('source') == 'doubles'
    ]
    assert [r['prompt'] for r in learned] == [f'What is {i}*2?' for i in range(0, 20, 2)]
    assert (
        sum(
            r['family'] == 'gym/chain_sum'
            for r in rows.read_rows(run / 'reasoning_prompts.jsonl', 'prompts')
        )
        == 6
    )
    card = {c['name']: c for c in json.loads((run / 'card.json').read_text())['corpora']}
    assert (
        card['reasoning_sft']['removed'] == {'wrong answer': 10}
        and 'doubles' in card['reasoning_sft']['origin']
    )


@pytest.mark.parametrize('final', ['$9^{9^{9^{9}}}$', '99999999!', '$2^{99999999}$', '1e999999999'])
def test_an_answer_that_takes_for_ever_is_given_up(final):
    import time

    began = time.monotonic()
    assert why(Trace('?', '', '2'), final) == 'wrong answer'
    assert time.monotonic() - began < 10
