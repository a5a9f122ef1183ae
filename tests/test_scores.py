"""Scores keep their items: every number is computed again, and no score is reused for another thing."""

import dataclasses
import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2lab.evaluate import Config as Evaluate
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.lab.records import runs
from k2lab.models.load import open_model, open_tokenizer, smoke_model
from k2lab.tasks.items import compare, ratio_line, read_items, score_of
from k2lab.training import scores as scoring
from k2lab.training.scores import Asked, Opened, known, own_rows, own_set

STAGES = (
    'train_continual_pretrain',
    'train_sft_domain',
    'train_sft_reasoning',
    'run_dpo_reasoning',
    'distill_to_student',
    'evaluate',
)


def done(stage: str, campaign: str, **changes):
    "A complete smoke run of a stage."
    job = start(stage, 'smoke', campaign=campaign, changes=changes)
    importlib.import_module(f'k2lab.{stage}').work(job)
    return job.finish()


@pytest.fixture(scope='module')
def campaign(tmp_path_factory):
    "The records of a smoke campaign of all training stages and an evaluation."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        for stage in STAGES:
            gate = {'gate': {'keeps': {'cut': 1.0}}} if stage == 'train_sft_domain' else {}
            more = {'control_from': 'Kimi-K2-Base'} if stage == 'train_sft_domain' else {}
            done(stage, 'whole', **gate, **more)
        yield {record['stage']: record for record in runs('whole')}


# ---- every number again, from items alone -----------------------------------------------------------------


def test_each_score_of_each_record_is_computed_again_to_the_last_digit(campaign):
    again = 0
    for record in campaign.values():
        items = read_items(record['folder'])
        for line in (m for m in record['metrics'] if 'key' in m):
            mine, theirs = items[line['key']], items.get(line.get('before_key'), [])
            share = line['measure'].startswith('share_of_teacher')
            value = ratio_line(theirs, mine)['value'] if share else score_of(mine).value
            assert line['after'] == value, line['measure']
            if theirs and not share:
                assert line['before'] == score_of(theirs).value
            assert not (share and 'before' in line)  # an accuracy is no share
            if 'change' in line:
                assert line['change']['value'] == compare(theirs, mine).value
            if 'control_key' in line:
                assert line['control'] == score_of(items[line['control_key']]).value
            again += 1
    assert again >= 35
    whole = [m for record in campaign.values() for m in record['metrics'] if 'key' not in m]
    assert {m['measure'] for m in whole} == {'parameters', 'generate_tokens_s'}


def test_an_accuracy_is_a_plain_mean_of_the_items_of_the_file(campaign):
    record = campaign['evaluate']
    line = next(m for m in record['metrics'] if m['measure'] == 'domain_questions')
    path = Path(record['folder']) / 'items.jsonl'
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows = [row for row in rows if row['key'] == line['key']]
    assert line['after'] == sum(row['right'] for row in rows) / line['n'] and line['n'] == len(rows)
    assert line['cut'] == sum(row['cut'] for row in rows)
    assert (
        line['side'] == 'evaluation'
        and campaign['train_sft_domain']['metrics'][0]['side'] == 'development'
    )


def test_a_score_is_of_the_weights_that_were_saved(campaign):
    record = campaign['train_sft_domain']
    line = next(m for m in record['metrics'] if m['measure'] == 'domain_questions')
    keys, saved = record['score_keys'], record['saves']['k2_domain_instruct']['sha256']
    assert keys[line['key']]['weights'] == saved
    assert (
        keys[line['before_key']]['weights']
        == campaign['train_continual_pretrain']['saves']['k2_domain_pretrain']['sha256']
    )
    assert keys[line['control_key']]['weights'].startswith('control of ')
    assert (
        len(
            {
                line['key'],
                line['before_key'],
                line['control_key'],
                line['baselines']['few_shot']['key'],
            }
        )
        == 4
    )


def test_what_is_known_is_not_measured_again(campaign):
    "Bits per byte of the base and of the final teacher were measured by the stages already."
    reused = campaign['train_sft_domain']['reused'].values()
    assert set(reused) == {Path(campaign['train_continual_pretrain']['folder']).name}
    assert campaign['evaluate']['reused']


def test_the_gate_judges_and_the_control_is_paired(campaign):
    record = campaign['train_sft_domain']
    assert record['gate']['passed'] and record['gate']['lines'][0]['measure'] == 'cut'
    lines = campaign['run_dpo_reasoning']['metrics']
    over = next(m['over_control'] for m in lines if m['measure'] == 'reasoning_verified')
    assert set(over) == {'value', 'low', 'high'}


# ---- swaps ------------------------------------------------------------------------------------------------

ROWS = [dict(prompt=f'What is {n}+1?', answer=str(n + 1), family='sum') for n in range(6)]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A job whose campaign knows the score of a model, and what was asked."
    place = smoke_model('k2')
    tok, net = open_tokenizer(place), open_model(place)
    folder = tmp_path_factory.mktemp('run')
    record = dict(parents=[], metrics=[])
    job = SimpleNamespace(
        cfg=SimpleNamespace(answer_tokens=3, side='evaluation', test_sets={}),
        record=record,
        folder=folder,
        first=True,
        campaign='scratch',
        scale='smoke',
        env=dict(system='You are Kimi.'),
        log=lambda **kw: None,
    )
    model, asked = Opened(net, tok, 'weights A', 'cpu float32'), Asked('exam', ROWS)
    scoring.score(job, model, asked)
    return job, model, asked


def swapped(kind: str, rng, job, model, asked):
    "`(job, model, asked)` with one thing changed."
    if kind == 'data':
        rows, n = [dict(row) for row in asked.rows], rng.randrange(len(asked.rows))
        how = rng.choice(('answer', 'prompt', 'gone', 'order', 'twice'))
        if how in ('answer', 'prompt'):
            rows[n][how] += str(rng.randrange(10))
        elif how == 'gone':
            rows.pop(n)
        elif how == 'twice':
            rows.append(rows[n])
        else:
            rows = rows[1:] + rows[:1]
        return job, model, Asked(asked.measure, rows)
    if kind == 'weights':
        return job, dataclasses.replace(model, weights=f'weights {rng.random()}'), asked
    if kind == 'template':
        if rng.random() < 0.5:
            env = dict(system=f'You are Kimi {rng.randrange(10**6)}.')
            return SimpleNamespace(**{**vars(job), 'env': env}), model, asked
        tok = open_tokenizer(smoke_model('k2'))
        tok.chat_template += f'{{# {rng.random()} #}}'
        return job, dataclasses.replace(model, tok=tok), asked
    if kind == 'budget':
        cfg = SimpleNamespace(**{**vars(job.cfg), 'answer_tokens': rng.randrange(4, 10**5)})
        return SimpleNamespace(**{**vars(job), 'cfg': cfg}), model, asked
    return (
        job,
        dataclasses.replace(
            model, device=rng.choice(('cuda float32', 'cpu bfloat16', 'cpu 4 bits'))
        ),
        asked,
    )


def test_200_swaps_are_noticed_and_none_is_seen_where_nothing_changed(world, monkeypatch):
    rng, noticed, alarms = random.Random(18), 0, 0
    for n in range(200):
        kind = ('data', 'weights', 'grader', 'template', 'budget')[n % 5]
        alarms += known(*world) is None
        with pytest.MonkeyPatch.context() as patch:
            if kind == 'grader':
                patch.setattr(scoring, 'GRADER', f'{rng.random()}')
                scoring.grader.cache_clear()
            noticed += known(*swapped(kind, rng, *world)) is None
        scoring.grader.cache_clear()
    assert (noticed, alarms) == (200, 0)


def test_items_that_were_changed_are_not_reused(world):
    job, model, asked = world
    path = job.folder / 'items.jsonl'
    text = path.read_text()
    for old, new in (('"right": false', '"right": true'), ('"tokens": 3', '"tokens": 2')):
        path.write_text(text.replace(old, new, 1))
        assert known(*world) is None
    path.write_text(''.join(text.splitlines(True)[:-1]))
    assert known(*world) is None
    path.write_text(text)
    assert known(*world)


def test_weights_changed_behind_the_manifest_are_refused(campaign, monkeypatch):
    folder = Path(campaign['run_dpo_reasoning']['folder'])
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(folder.parent.parent))
    file = folder / 'k2_think_dpo' / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    whole = file.read_bytes()
    file.write_bytes(data)
    try:
        with pytest.raises(LabError, match='changed after it was published'):
            done('evaluate', 'whole')
    finally:
        file.write_bytes(whole)


# ---- what a label says ------------------------------------------------------------------------------------


def test_compared_with_names_what_before_was_measured_of(campaign, monkeypatch):
    "Section 2.1: the base's value was printed beside the name of another checkpoint."
    monkeypatch.setenv(
        'K2LAB_LAB_RUNS_PATH', str(Path(campaign['evaluate']['folder']).parent.parent)
    )
    both = ['k2_reason_sft', 'Kimi-K2-Base']
    job = done(
        'evaluate',
        'whole',
        checkpoints={'k2_think_dpo': both},
        measures={'k2_think_dpo': ['domain_bits_per_byte']},
    )
    lines = {m['compared_with']: m for m in job.record['metrics']}
    keys = job.record['score_keys']
    saved = campaign['train_sft_reasoning']['saves']['k2_reason_sft']['sha256']
    assert keys[lines['k2_reason_sft']['before_key']]['weights'] == saved
    stage = next(
        m
        for m in campaign['train_sft_reasoning']['metrics']
        if m['measure'] == 'domain_bits_per_byte'
    )
    assert lines['k2_reason_sft']['before'] == stage['after']
    assert lines['Kimi-K2-Base']['before'] != lines['k2_reason_sft']['before']


@pytest.mark.parametrize('stage', ['train_sft_reasoning', 'evaluate'])
def test_the_answer_budget_reaches_generation(stage, tmp_path, monkeypatch):
    "Section 2.3: a random model never stops, so its replies are as long as the budget."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    measures, more = ['reasoning_verified'], {}
    if stage == 'evaluate':
        measures, more = {'k2_think_dpo': measures}, {'checkpoints': {'k2_think_dpo': []}}
    job = done(stage, 't', answer_tokens=200, measures=measures, **more)
    line = next(m for m in job.record['metrics'] if m['measure'] == 'reasoning_tokens')
    assert line['after'] > 190


# ---- a test set of one's own ------------------------------------------------------------------------------


def test_a_test_set_is_one_line_of_config(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    file = tmp_path / 'exam.jsonl'
    file.write_text('{"q": "2+2?", "a": 4}\n{"q": "Half of 1?", "a": "1/2"}\n')
    exam = {'exam': dict(file=str(file), judge='number', prompt='q', answer='a')}
    job = done('train_sft_domain', 't', test_sets=exam, measures=[])
    line = next(m for m in job.record['metrics'] if m['measure'] == 'exam')
    assert (line['n'], line['change']['n'], line['after']) == (2, 2, 0.0)


BAD_ROWS = {
    'rows 1 and 2 ask the same': [dict(prompt='2+2?', answer='4')] * 2,
    "'answer' is empty": [dict(prompt='2+2?', answer='')],
    "no column 'answer'": [dict(prompt='2+2?')],
    "column 'choices' is not used": [dict(prompt='Pick one.', answer='4', choices=['3', '4'])],
    "unknown judge 'gut'": [dict(prompt='2+2?', answer='4', judge='gut')],
    'must be text or a number': [dict(prompt='2+2?', answer=None)],
    'cannot be read as a number': [dict(prompt='Solve.', answer='several')],
}


@pytest.mark.parametrize('why', BAD_ROWS)
def test_a_bad_test_set_is_told_in_one_line(why):
    with pytest.raises(LabError, match=why) as told:
        own_rows('exam', own_set('exam', dict(file='f', judge='number')), BAD_ROWS[why])
    assert '\n' not in str(told.value)


def test_bad_configs_are_told_before_a_run_folder_exists(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    for change, why in (
        ({'measures.k2_think_dpo': ['domain_question']}, 'domain_questions'),
        ({'test_sets': {'exam': {'file': 'f', 'judge': 'gut'}}}, 'yesno'),
        ({'side': 'train'}, 'development'),
        ({'answer_tokens': 0}, 'at least 1 token'),
    ):
        with pytest.raises(LabError, match=why):
            start('evaluate', 'smoke', campaign='t', changes=change)
    assert not list((tmp_path / 'runs').glob('t/*'))


def test_missing_data_are_told_before_a_model_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    monkeypatch.setattr('k2lab.evaluate.open_for', lambda *a: pytest.fail('a model was opened'))
    job = start(
        'evaluate', 'smoke', campaign='t', changes={'test_sets': {'exam': {'file': 'no.jsonl'}}}
    )
    with pytest.raises(LabError, match='no such file'):
        importlib.import_module('k2lab.evaluate').work(job)


def test_evaluate_has_no_gate_of_its_own():
    assert not {'gate', 'may_lose'} & {f.name for f in dataclasses.fields(Evaluate)}
