"""Sampling over an endpoint gives what sampling in this process gives, and its record can be replayed by name."""

import json

import pytest
from test_server import listening

from k2lab.lab.config import LabError
from k2lab.lab.files import read_lines
from k2lab.lab.job import start

KEY = 'sesame-k'
CHANGES = {
    'mode': 'distill',
    'replay': '',
    'ask': '{distill: {reasoning_prompts: 6, recorded_prompts: null}}',
    'samples': '{distill: 2}',
    'max_new_tokens': '12',
}


@pytest.fixture
def served():
    "The address of the smoke model behind the embedded server."
    from k2lab.models.load import open_model, open_tokenizer
    from k2lab.serving.server import create_app

    app = create_app(open_model('smoke:k2'), open_tokenizer('smoke:k2'), 'k2', KEY)
    with listening(app) as url:
        yield f'{url}/v1'


def job_of(tmp_path, monkeypatch, url: str, **changes):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    monkeypatch.setenv('K2LAB_API_KEY', KEY)
    job = start('sample_teacher', 'smoke', None, CHANGES | changes, campaign='c')
    job.env['endpoint'] |= dict(base_url=url, model='k2')
    return job


def test_an_endpoint_answers_as_the_checkpoint_does_and_is_replayed_by_name(
    served, tmp_path, monkeypatch
):
    from k2lab.sample_teacher import asked_rows, get_replies

    job = job_of(tmp_path, monkeypatch, served, endpoint='true')
    rows = asked_rows(job)
    over = get_replies(job, rows)
    here = get_replies(job_of(tmp_path, monkeypatch, served), rows)
    assert over == here and len(over) == 6 and all(len(part) == 2 for part in over)
    kept = {r['prompt']: r['replies'] for r in read_lines(job.folder / 'teacher_answers.jsonl')}
    assert {p: [(r['text'], r['tokens']) for r in part] for p, part in kept.items()} == {
        row['prompt']: [(r.text, r.tokens) for r in part] for row, part in zip(rows, over)
    }
    name = str(job.folder / 'teacher_answers.jsonl')
    assert get_replies(job_of(tmp_path, monkeypatch, served, replay=name), rows) == over


def test_no_question_of_an_evaluation_set_is_asked(tmp_path, monkeypatch):
    from k2lab.sample_teacher import asked_rows

    rows = asked_rows(job_of(tmp_path, monkeypatch, 'http://127.0.0.1:1/v1'))
    exam = tmp_path / 'exam.jsonl'
    exam.write_text(json.dumps(dict(question=rows[1]['prompt'].upper(), answer='1')) + '\n')
    job = job_of(tmp_path, monkeypatch, 'http://127.0.0.1:1/v1', eval_sets=f'{{exam: {exam}}}')
    left = asked_rows(job)
    assert rows[1] not in left and len(left) < len(rows)
    (check,) = [
        c for c in job.record['checks'] if c['name'] == 'prompts of eval_sets are not asked'
    ]
    assert f'{len(rows) - len(left)} of {len(rows)}' in check['detail']
    exam.write_text(''.join(json.dumps(dict(question=r['prompt'])) + '\n' for r in rows))
    again = job_of(tmp_path, monkeypatch, 'http://127.0.0.1:1/v1', eval_sets=f'{{exam: {exam}}}')
    with pytest.raises(LabError, match='6 of 6 prompts ask what eval_sets hold'):
        asked_rows(again)


def test_prompts_that_an_endpoint_refuses_are_counted(served, tmp_path, monkeypatch):
    from k2lab.sample_teacher import answered, asked_rows, get_replies

    job = job_of(tmp_path, monkeypatch, served, endpoint='true')
    rows = asked_rows(job)
    rows[2] = {'prompt': 'too long ' * 2000, 'final': '1'}
    replies = get_replies(job, rows)
    kept, parts = answered(job, rows, replies)
    assert [len(part) for part in replies] == [2, 2, 0, 2, 2, 2] and len(kept) == len(parts) == 5
    assert 'prompts without an answer are left out' in [c['name'] for c in job.record['checks']]
    (reject,) = read_lines(job.folder / 'answers.rejects.jsonl')
    assert reject['final'] and '400' in reject['reason']
    with pytest.raises(LabError, match='1 of 1 prompts got no answer; the reasons are in'):
        answered(job, rows[2:3], [[]])


def test_sampled_answers_have_a_seed_that_is_sent(served, tmp_path, monkeypatch):
    from k2lab.sample_teacher import asked_rows, get_replies

    warm = dict(endpoint='true', temperature='{distill: 1.0}')
    first = job_of(tmp_path, monkeypatch, served, **warm)
    rows = asked_rows(first)[:3]
    one = get_replies(first, rows)
    again = get_replies(job_of(tmp_path, monkeypatch, served, **warm), rows)
    other = get_replies(job_of(tmp_path, monkeypatch, served, seed='5', **warm), rows)
    assert one == again != other
    assert any(a != b for a, b in one)  # each of the two has its own seed


NESTED = '<think>time0 list0 map<think>0 list0 map1</think>1'  # the demo's teacher, seed 0


@pytest.mark.parametrize(
    'reply,right',
    [
        (NESTED, False),
        ('<think>map0 map1</think>1', True),
        ('1', True),
        ('<think>one</think>1<think>', False),
        ('<|tool_calls_section_begin|>1', False),
    ],
)
def test_a_right_answer_that_training_would_refuse_is_not_right(reply, right, tmp_path):
    from k2lab.models.load import open_tokenizer
    from k2lab.sample_teacher import Reply, is_right, is_whole, sampling_counts
    from k2lab.text.masks import encode_rows

    row = dict(prompt='How many map in: time, list, map?', answer='1', family='count')
    one = Reply(reply, 9, False)
    assert is_right(row, one) is right
    assert sampling_counts([[one]], [[right]])['not_whole'] == (not is_whole(reply))
    learnt = dict(
        messages=[dict(role='user', content=row['prompt']), dict(role='assistant', content=reply)]
    )
    if is_whole(reply):
        assert encode_rows(open_tokenizer('smoke:k2'), [learnt])[1]['rows'] == 1
    else:
        with pytest.raises(LabError, match="the row that begins 'How many map in: .*message 1"):
            encode_rows(open_tokenizer('smoke:k2'), [learnt])
