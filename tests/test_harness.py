"Tasks of lm-eval: what is sent, what is scored, what is kept, and what becomes of them when something breaks."

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_server import listening

from k2lab.lab.config import LabError
from k2lab.lab.files import read_lines
from k2lab.lab.job import start
from k2lab.lab.records import read_run

pytest.importorskip('lm_eval', reason='the harness needs lm-eval: pip install "k2lab[eval]"')
from k2lab import evaluate as stage
from k2lab.models.load import open_model, open_tokenizer
from k2lab.serving import harness
from k2lab.serving.harness import Asking, Session, open_checkpoint, open_model_as, read_tasks
from k2lab.text.chat import end_ids, prompt_ids

SHARED = Path(__file__).resolve().parents[2] / 'shared'
SYSTEM = dict(role='system', content='You are Kimi.')
CHOICE = dict(
    output_type='multiple_choice',
    doc_to_choice='{{choices}}',
    doc_to_target='gold',
    metric_list=[dict(metric='acc', aggregation='mean', higher_is_better=True)],
)
WRITES = dict(
    output_type='generate_until',
    doc_to_target='a',
    generation_kwargs=dict(max_gen_toks=6, do_sample=False, until=['\n\n']),
    metric_list=[dict(metric='exact_match', aggregation='mean', higher_is_better=True)],
)
PLAIN = Asking()
BREAKS = CHOICE | dict(doc_to_text='{{6 // n}} =')  # at the fourth question
SUMS = [dict(q=f'{n} + 1 =', a=f'{n + 1}', choices=[f'{n + 1}', f'{n}'], gold=0) for n in range(6)]


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        yield


@pytest.fixture(scope='module')
def parts():
    return open_model('smoke:k2'), open_tokenizer('smoke:k2')


def write_task(folder: Path, name: str, rows: list = SUMS, **more):
    "A task file with its questions beside it."
    data = folder / f'{name}.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    task = dict(task=name, dataset_path='json', test_split='test', doc_to_text='{{q}}')
    task |= dict(dataset_kwargs=dict(data_files=dict(test=str(data))))
    (folder / f'{name}.yaml').write_text(json.dumps(task | more))


def write_group(folder: Path, name: str, members: list):
    mean = [dict(metric='acc', aggregation='mean', weight_by_size=True)]
    group = dict(group=name, task=members, aggregate_metric_list=mean)
    (folder / f'{name}.yaml').write_text(json.dumps(group))


def asked(folder: Path, names: list, **more) -> dict:
    "The changes of an evaluation that only asks tasks of lm-eval."
    lists = dict(checkpoints=dict(k2_think_dpo='Kimi-K2-Base'), measures=dict(k2_think_dpo=[]))
    return lists | dict(harness=names, harness_tasks=str(folder)) | more


def evaluated(folder: Path, names: list, **more):
    stage.evaluate(job := start('evaluate', 'smoke', changes=asked(folder, names, **more)))
    return job


def measured(job) -> dict:
    return {m['measure']: m for m in job.record['metrics']}


# ---- what is sent ----------------------------------------------------------------------------------------------


def same_prompt(model, tok, messages: list):
    lm = open_model_as(model, tok, Asking(), chat=True)
    batch, _ = lm.tok_batch_encode([lm.apply_chat_template(messages)])
    assert batch.tolist() == [prompt_ids(tok, messages)]


@pytest.mark.parametrize('place', ['smoke:k2', 'smoke:qwen'])
def test_a_chat_prompt_is_the_labs_token_by_token(place):
    model, tok = open_model(place), open_tokenizer(place)
    asks = [SYSTEM, dict(role='user', content='Sort: 3,1,2.')]
    turns = [dict(role='assistant', content='1,2,3'), dict(role='user', content='It’s\n 月?')]
    same_prompt(model, tok, asks)
    same_prompt(model, tok, asks + turns)


@pytest.mark.skipif(not SHARED.exists(), reason='the templates of checkpoints are not here')
@pytest.mark.parametrize(
    'name',
    ['kimi-k2-thinking', 'kimi-k2.5', 'qwen3-thinking-2507', 'llama-3.1-instruct', 'gemma-3-it'],
)
@pytest.mark.parametrize('adds', [False, True])
def test_prompts_of_real_templates_are_the_labs_and_have_one_first_token(name, adds, parts):
    "Also with a tokenizer that puts a first token before every text, as Llama's does."
    sys.path.insert(0, str(Path(__file__).parent))
    from test_templates import tokenizer
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer(name)
    before = tok.backend_tokenizer.post_processor
    if adds and tok.bos_token:
        first = [(tok.bos_token, tok.bos_token_id)]
        always = TemplateProcessing(single=f'{tok.bos_token} $A', special_tokens=first)
        tok.backend_tokenizer.post_processor = always
    try:
        same_prompt(parts[0], tok, [dict(role='user', content='Is 7 prime?')])
    finally:
        tok.backend_tokenizer.post_processor = before


def test_replies_end_where_the_labs_do(tmp_path, parts):
    "The model's own ends reach transformers, for a task that knows none of them."
    write_task(tmp_path, 'own_gen', **WRITES)
    tasks = read_tasks(['own_gen'], str(tmp_path), Asking())
    session = Session(tasks, open_checkpoint('m', *parts, Asking()), home=tmp_path / 'kept')
    (result,) = session.results()
    sample = read_lines(tmp_path / 'kept' / 'own_gen.jsonl')[0]
    assert sample['arguments'][0][1]['eos_token_id'] == end_ids(parts[1])
    assert (result.chat_format, result.n, result.higher_is_better) == (
        True,
        6,
        dict(exact_match=True),
    )


# ---- what is decided -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(chat_fromat=True), "did you mean 'chat_format'"),
        (dict(generation=dict(max_tokens=9)), 'max_gen_toks'),
        (dict(backend='vlm'), "did you mean 'vllm'"),
        (dict(shots=-1), 'shots is -1'),
        (dict(limit=0), 'limit is 0'),
        (dict(limit=1.5), 'limit is 1.5; a number of items, or a share below 1'),
        (dict(generation=dict(temperature='hot')), 'temperature must be float'),
        (dict(generation=dict(max_gen_toks=0)), 'max_gen_toks is 0'),
        (dict(batch_size=0), 'batch_size is 0'),
        (dict(batch_size='many'), 'batch_size must be int or'),
        (dict(chat_format=False, system='Be brief.'), 'system needs the chat format'),
        (
            dict(generation=dict(temperature=0.7, do_sample=False)),
            'temperature 0.7 with do_sample False',
        ),
    ],
)
def test_a_wrong_option_is_refused_with_the_valid_ones(options, says, tmp_path):
    with pytest.raises(LabError, match=says):
        start('evaluate', 'smoke', changes=asked(tmp_path, [], harness_options=options))


def test_a_temperature_samples(parts):
    hot = harness.generation_of(
        Asking(generation=dict(temperature=0.5)), open_checkpoint('m', *parts, Asking())
    )
    assert hot == dict(temperature=0.5, do_sample=True, eos_token_id=end_ids(parts[1]))


def test_shots_that_a_task_file_rules_out_are_told(tmp_path):
    write_task(tmp_path, 'own_fixed', **CHOICE, num_fewshot=0)
    write_task(tmp_path, 'own_free', **CHOICE)
    job = evaluated(tmp_path, ['own_fixed', 'own_free'], harness_options=dict(shots=2, limit=3))
    fixed, free = job.record['metrics']
    assert (fixed['shots'], fixed['n']) == (0, 3) and 'the task file fixes' in fixed['note']
    assert (free['shots'], free['n'], 'note' in free) == (2, 3, False)


def test_prompts_that_do_not_fit_are_counted(tmp_path, parts):
    model, tok = parts
    window = model.config.max_position_embeddings
    long = dict(SUMS[0], q='1 + 1 = ' * window)
    write_task(tmp_path, 'own_a', [*SUMS, long], **CHOICE)
    write_task(tmp_path, 'own_gen', [*SUMS, long, long], **WRITES)
    tasks = read_tasks(['own_a', 'own_gen'], str(tmp_path), PLAIN)
    results = list(Session(tasks, open_checkpoint('m', *parts, PLAIN)).results())
    said = 'prompts are longer than the model reads: their start is gone'
    assert [r.notes for r in results] == [(f'1 {said}',), (f'2 {said}',)]


# ---- what is scored --------------------------------------------------------------------------------------------


def test_tasks_of_your_own_become_lines_and_items(tmp_path):
    write_task(tmp_path, 'own_choice', **CHOICE)
    write_task(tmp_path, 'own_gen', **WRITES)
    job = evaluated(tmp_path, ['own_choice', 'own_gen'])
    lines = measured(job)
    acc, exact = lines['own_choice: acc'], lines['own_gen: exact_match']
    assert (acc['n'], acc['shots'], acc['metric'], acc['checkpoint']) == (
        6,
        0,
        'acc',
        'k2_think_dpo',
    )
    assert (acc['chat_format'], exact['chat_format'], acc['higher_is_better']) == (
        False,
        True,
        True,
    )
    assert 0 <= acc['low'] <= acc['after'] <= acc['high'] <= 1
    items = read_lines(job.folder / 'items.jsonl')
    assert len(items) == 12 and len({i['key'] for i in items}) == 2
    for line in (acc, exact):
        right = [i['right'] for i in items if i['key'] == line['key']]
        assert sum(right) / 6 == pytest.approx(line['after'])
    assert all(i['reply'] == i['answer'] for i in items if i['right'])
    keys = job.record['score_keys']
    assert {keys[line['key']]['measure'] for line in (acc, exact)} == set(lines)
    assert [bool(keys[line['key']]['template']) for line in (acc, exact)] == [False, True]
    kept = job.folder / 'harness' / 'k2_think_dpo'
    assert {p.name for p in kept.iterdir()} == {
        f'own_{name}.{kind}' for name in ('choice', 'gen') for kind in ('json', 'jsonl')
    }


def test_a_group_has_a_line_for_each_task_and_one_for_itself(tmp_path):
    write_task(tmp_path, 'own_a', SUMS[:2], **CHOICE)
    write_task(tmp_path, 'own_b', **CHOICE)
    write_group(tmp_path, 'own_inner', ['own_a'])
    write_group(tmp_path, 'own_outer', ['own_inner', 'own_b'])
    lines = measured(evaluated(tmp_path, ['own_outer']))
    assert list(lines) == [f'own_{n}: acc' for n in ('a', 'b', 'outer', 'inner')]
    a, b, outer, inner = lines.values()
    assert outer['after'] == pytest.approx((2 * a['after'] + 6 * b['after']) / 8)
    assert (outer['n'], inner['n'], inner['after']) == (8, 2, a['after'])


# ---- what breaks -----------------------------------------------------------------------------------------------


def never_open(*a, **kw):
    raise AssertionError('a model was opened')


def test_all_that_cannot_be_read_is_refused_before_a_model_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, 'open_for', never_open)
    for name in ('own_a', 'own_b', 'own_c'):
        write_task(tmp_path, name, **CHOICE)
    (tmp_path / 'own_a.jsonl').unlink()
    (tmp_path / 'own_c.yaml').write_text(
        json.dumps(dict(task='own_c', dataset_path='no/such-set', **CHOICE))
    )
    with pytest.raises(LabError) as refused:
        evaluated(tmp_path, ['own_a', 'own_b', 'own_c'])
    text = str(refused.value)
    assert text.startswith('harness: cannot be read: own_a (FileNotFoundError: ')
    assert 'own_c (' in text and 'own_b' not in text and '\n' not in text
    with pytest.raises(LabError, match=r"no task 'own_bb' \(did you mean 'own_b'"):
        evaluated(tmp_path, ['own_bb'])
    with pytest.raises(LabError, match='harness_tasks: no folder nowhere'):
        evaluated(Path('nowhere'), ['own_b'])


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    write_task(tmp_path, 'own_a', **CHOICE)
    (tmp_path / 'own_b.yaml').write_text('task: own_b\nmetric_list: [{metric: acc}\n')
    assert list(read_tasks(['own_a'], str(tmp_path), PLAIN).tasks) == ['own_a']
    with pytest.raises(LabError, match=r'own_b.yaml is not YAML: .*line 2'):
        read_tasks(['own_b'], str(tmp_path), PLAIN)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    asked_for = []

    def away(path, **kw):
        asked_for.append(path)
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    for name in ('own_a', 'own_b', 'own_c'):
        write_task(tmp_path, name, **CHOICE)
    write_group(tmp_path, 'own_all', ['own_a', 'own_b', 'own_c'])
    monkeypatch.setattr(datasets, 'load_dataset', away)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    with pytest.raises(
        LabError, match='own_all .ConnectionError: .*HF_HUB_OFFLINE=1 reads what is'
    ):
        read_tasks(['own_all', 'own_a'], str(tmp_path), PLAIN)
    assert len(asked_for) == 1


def test_a_task_that_runs_code_has_to_be_allowed(tmp_path):
    write_task(tmp_path, 'own_code', **WRITES, unsafe_code=True)
    with pytest.raises(LabError, match='own_code executes code .*confirm_unsafe_code=true'):
        read_tasks(['own_code'], str(tmp_path), Asking())
    assert list(read_tasks(['own_code'], str(tmp_path), Asking(confirm_unsafe_code=True)).tasks)


def test_a_group_keeps_its_other_tasks(tmp_path):
    "One task of the group has no data, another one breaks when it is asked."
    for name in ('own_a', 'own_gone'):
        write_task(tmp_path, name, **CHOICE)
    write_task(
        tmp_path, 'own_bad', [dict(row, n=n) for n, row in enumerate(SUMS[::-1], -3)], **BREAKS
    )
    (tmp_path / 'own_gone.jsonl').unlink()
    write_group(tmp_path, 'own_all', ['own_a', 'own_gone', 'own_bad'])
    job = evaluated(tmp_path, ['own_all'])
    lines = measured(job)
    assert list(lines) == ['own_a: acc', 'own_all: acc']
    assert lines['own_all: acc']['note'] == 'without own_bad, own_gone'
    assert {c['name']: c['ok'] for c in job.record['checks']} == {
        'lm-eval task own_bad left out': True,
        'lm-eval task own_gone left out': True,
    }


def test_a_named_task_that_breaks_costs_the_run_not_the_others(tmp_path):
    write_task(
        tmp_path, 'own_bad', [dict(row, n=n) for n, row in enumerate(SUMS[::-1], -3)], **BREAKS
    )
    write_task(tmp_path, 'own_a', **CHOICE)
    job = evaluated(tmp_path, ['own_bad', 'own_a'])
    assert list(measured(job)) == ['own_a: acc']
    with pytest.raises(LabError, match='failed checks: lm-eval task own_bad runs'):
        job.finish()


def test_one_name_with_two_settings_is_refused(tmp_path):
    write_task(tmp_path, 'own_a', **CHOICE)
    write_group(tmp_path, 'own_plain', ['own_a'])
    write_group(tmp_path, 'own_shown', [dict(task='own_a', num_fewshot=2)])
    assert list(read_tasks(['own_a', 'own_plain'], str(tmp_path), Asking()).tasks) == ['own_a']
    with pytest.raises(LabError, match='own_a is asked for twice, with different settings'):
        read_tasks(['own_plain', 'own_shown'], str(tmp_path), Asking())


# ---- what stays ------------------------------------------------------------------------------------------------


def counting(monkeypatch) -> list:
    "The names of the tasks that are really asked."
    seen, ask = [], harness.ask
    monkeypatch.setattr(
        harness, 'ask', lambda lm, task, *a: seen.append(task.task_name) or ask(lm, task, *a)
    )
    return seen


def test_a_result_is_used_again_only_where_all_is_equal(tmp_path, parts, monkeypatch):
    seen = counting(monkeypatch)
    write_task(tmp_path, 'own_a', **CHOICE)

    def one(asking=PLAIN, weights='w1', **more):
        tasks = read_tasks(['own_a'], str(tmp_path), asking)
        model = open_checkpoint('m', *parts, asking, weights)
        (result,) = Session(tasks, model, asking, home=tmp_path / 'kept', **more).results()
        return result

    first = one()
    assert one() == first and len(seen) == 1
    assert one(Asking(batch_size=2)) == first and one(system='ignored in plain text') == first
    assert len(seen) == 1
    for change in (
        lambda: one(weights='w2'),
        lambda: one(Asking(limit=3)),
        lambda: one(Asking(shots=1)),
        lambda: one(Asking(chat_format=True)),
        lambda: one(Asking(chat_format=True), system='Be brief.'),
        lambda: one(seed=1),
    ):
        assert change().key != first.key
    assert len(seen) == 7
    write_task(tmp_path, 'own_a', [*SUMS, dict(SUMS[0], q='9 =')], **CHOICE)
    assert one().n == 7 and len(seen) == 8


def k2lab(runs: Path, *words: str, **kw):
    return subprocess.Popen(
        [sys.executable, '-m', 'k2lab', *words],
        env={**os.environ, 'K2LAB_LAB_RUNS_PATH': str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def test_a_killed_evaluation_asks_only_what_is_missing(tmp_path):
    for name in ('own_a', 'own_b', 'own_c'):
        write_task(tmp_path, name, SUMS * 20, **CHOICE | dict(metadata=dict(version=1)))
    write_task(tmp_path, 'own_d', SUMS * 20, **WRITES)
    told = asked(tmp_path, ['own_a', 'own_b', 'own_c', 'own_d'])
    words = [f'{k}={v if isinstance(v, str) else json.dumps(v)}' for k, v in told.items()]
    home = tmp_path / 'runs'
    run = k2lab(
        home, 'evaluate', '--scale', 'smoke', '--campaign', 'c', *words, start_new_session=True
    )
    while run.poll() is None and not [*home.rglob('own_a.json')]:
        time.sleep(0.002)
    assert run.poll() is None, run.stdout.read()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    (folder,) = home.glob('c/*')
    places = folder / 'harness' / 'k2_think_dpo'
    before = {p.name: p.stat().st_mtime_ns for p in places.glob('*.json')}
    assert 'own_a.json' in before and 'own_d.json' not in before
    again = k2lab(home, 'resume', f'c/{folder.name}')
    assert again.wait() == 0, again.stdout.read()
    after = {p.name: p.stat().st_mtime_ns for p in places.glob('*.json')}
    assert len(after) == 4 and before.items() <= after.items()
    record = read_run(folder)
    assert [m['measure'] for m in record['metrics']] == [
        'own_a: acc', 'own_b: acc', 'own_c: acc', 'own_d: exact_match'
    ]  # fmt: skip
    assert len(read_lines(folder / 'items.jsonl')) == 4 * 120


# ---- endpoint and vLLM -----------------------------------------------------------------------------------------


class Failing:
    "An application that answers its first `times` requests with 500."

    def __init__(self, app, times: int):
        self.app, self.left, self.seen = app, times, []

    async def __call__(self, scope, receive, send):
        if scope['type'] == 'http':
            self.seen.append((scope['path'], dict(scope['headers']).get(b'authorization')))
            if self.left:
                self.left -= 1
                await send(dict(type='http.response.start', status=500, headers=[]))
                return await send(dict(type='http.response.body', body=b'{}'))
        await self.app(scope, receive, send)


def served(folder: Path, names: list, url: str, **options):
    options |= dict(backend='endpoint')
    told = asked(folder, names, checkpoints={}, measures={}, harness_options=options)
    job = start('evaluate', 'smoke', changes=told)
    job.env['endpoint'] |= dict(base_url=url, key_env='OWN_KEY', model='k2_think_dpo')
    stage.evaluate(job)
    return job


@pytest.fixture
def app(parts, monkeypatch):
    pytest.importorskip('fastapi', reason='the small server needs fastapi')
    from k2lab.serving.server import create_app

    monkeypatch.setenv('OWN_KEY', 'own-secret-key')
    monkeypatch.setenv('OPENAI_API_KEY', 'of-somebody-else')
    return lambda times=0: Failing(create_app(*parts, 'k2_think_dpo', 'own-secret-key'), times)


def test_an_endpoint_scores_what_its_checkpoint_scores(tmp_path, app):
    write_task(tmp_path, 'own_choice', **CHOICE)
    write_task(tmp_path, 'own_gen', **WRITES)
    near = evaluated(tmp_path, ['own_choice', 'own_gen'])
    with listening(one := app(times=1)) as host:
        url = f'{host}/v1'
        far = served(tmp_path, ['own_choice', 'own_gen'], url)
    replies = [
        {(i['question'], i['answer']): i['reply'] for i in read_lines(job.folder / 'items.jsonl')}
        for job in (near, far)
    ]
    scores = [{n: m['after'] for n, m in measured(job).items()} for job in (near, far)]
    assert scores[0] == scores[1] and len(replies[1]) == 12
    assert {p for p, _ in one.seen} == {
        f'/v1/{r}' for r in ('chat/completions', 'completions', 'models')
    }
    assert {key for _, key in one.seen} == {b'Bearer own-secret-key'}
    for file in far.folder.rglob('*'):
        assert file.is_dir() or b'own-secret-key' not in file.read_bytes()


def test_an_endpoint_that_never_answers_is_told_and_nothing_is_lost(tmp_path, app):
    write_task(tmp_path, 'own_gen', **WRITES)
    with listening(app(times=10**6)) as host:
        url = f'{host}/v1'
        with pytest.raises(LabError, match=f'{url}: no answer after 4 attempts .*500.*resume'):
            served(tmp_path, ['own_gen'], url)


def test_an_endpoint_has_to_say_how_much_its_model_reads(tmp_path, app):
    "lm-eval would cut prompts to 2,048 tokens otherwise."
    env = dict(key_env='OWN_KEY', model='k2_think_dpo')
    with listening(app()) as host:
        url = f'{host}/v1'
        window = harness.window_of(dict(env, base_url=url))
        assert window == open_model('smoke:k2').config.max_position_embeddings
        with pytest.raises(LabError, match=f'gpt has no max_model_len .*k2_think_dpo .{window}'):
            harness.window_of(dict(env, base_url=url, model='gpt'))


def test_vllm_gets_options_that_lm_eval_has():
    "vLLM cannot be installed here: the names are compared with lm-eval's source."
    import lm_eval

    source = (Path(lm_eval.__path__[0]) / 'models' / 'vllm_causallms.py').read_text()
    taken = re.search(r'class VLLM.*?def __init__\((.*?)\*\*kwargs', source, re.S)
    names = set(re.findall(r'^ +(\w+):', taken[1], re.M))
    given = harness.vllm_options('a/place@v1', Asking(think_end='</think>'), 2, Path('tok'))
    assert given.keys() <= names
    assert (given['pretrained'], given['revision']) == ('a/place', 'v1')
    assert (given['tokenizer'], given['tensor_parallel_size']) == ('tok', 2)


@pytest.mark.parametrize(
    'switch, line',
    [
        ('', r'set offline = false under \[hub\] in settings.ini'),
        ('K2LAB_HUB_OFFLINE', 'unset K2LAB_HUB_OFFLINE'),
    ],
)
def test_a_task_whose_data_is_not_here_names_the_switch(tmp_path, monkeypatch, switch, line):
    import datasets

    def offline(path, **kw):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    write_task(tmp_path, 'own_a', **CHOICE)
    monkeypatch.setattr(datasets, 'load_dataset', offline)
    if switch:
        monkeypatch.setenv(switch, 'true')
    with pytest.raises(LabError, match=f'own_a .ConnectionError: its data is not on .*{line}'):
        read_tasks(['own_a'], str(tmp_path), PLAIN)


@pytest.mark.skipif(find_spec('vllm') is not None, reason='vLLM is installed')
def test_vllm_is_refused_where_it_is_not_installed(tmp_path):
    write_task(tmp_path, 'own_a', **CHOICE)
    with pytest.raises(LabError, match='vLLM is not installed'):
        evaluated(tmp_path, ['own_a'], harness_options=dict(backend='vllm'))


def test_tasks_of_two_checkpoints_are_compared_item_by_item(tmp_path):
    write_task(tmp_path, 'own_choice', **CHOICE)
    pair = {'k2_think_dpo': 'Qwen2.5-7B', 'Qwen2.5-7B': []}  # two models of smoke scale
    empty = {name: [] for name in pair}
    job = evaluated(tmp_path, ['own_choice'], checkpoints=pair, measures=empty)
    lines = {m['checkpoint']: m for m in job.record['metrics'] if m['measure'] == 'own_choice: acc'}
    mine, base = lines['k2_think_dpo'], lines['Qwen2.5-7B']
    rights = {}
    for item in read_lines(job.folder / 'items.jsonl'):
        rights.setdefault(item['key'], {})[item['item']] = item['right']
    changes = [rights[mine['key']][i] - rights[base['key']][i] for i in rights[base['key']]]
    assert (mine['before'], mine['compared_with']) == (base['after'], 'Qwen2.5-7B')
    assert mine['change']['value'] == pytest.approx(sum(changes) / len(SUMS))
    assert mine['change']['n'] == len(SUMS) and base['before'] is None
    assert mine['change']['gained'] == changes.count(1) and any(
        changes
    )  # the two do not answer alike
