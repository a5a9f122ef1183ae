"Conformance: figures worked out by hand, a perfect reference, files that are refused, and the stage that measures it."

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from campaigns import campaign

from k2lab import evaluate as stage
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.reports.page import items_html, make_report, report_html, report_json
from k2lab.reports.results import gather
from k2lab.serving import conformance
from k2lab.serving.client import Teacher, scripted
from k2lab.serving.conformance import (
    ENDPOINT,
    MEASURES,
    ToolCalls,
    ask_endpoint,
    calling_of,
    checked_row,
    checked_rows,
    read_prompts,
    said_in,
    tool_prompts,
    verdicts,
)
from k2lab.tasks.items import read_items, score_of

SECTION, SECTION_END = '<|tool_calls_section_begin|>', '<|tool_calls_section_end|>'


def k2(number='functions.get_weather:0', arguments='{"city": "Rome"}') -> str:
    return f'<|tool_call_begin|>{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>'


def section(*calls: str) -> str:
    return SECTION + ''.join(calls or (k2(),)) + SECTION_END


CITY = dict(
    type='object',
    properties=dict(city=dict(type='string'), days=dict(type='integer')),
    required=['city'],
    additionalProperties=False,
)
TOOL = dict(type='function', function=dict(name='get_weather', parameters=CITY))
ASK = dict(messages=[dict(role='user', content='Weather in Rome?')], tools=[TOOL])
KINDS = ('called', 'schema', 'names', 'ids', 'sections')
NONE = (None, None, None, None)


# ---- one reply -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text,want',
    [
        (section(), (True, True, True, True, True)),
        ('It is warm.', (False, *NONE)),
        (section(k2(), k2('functions.get_weather:1')), (True, True, True, True, True)),
        (section(k2(arguments='{"town": "Rome"}')), (True, False, True, True, True)),
        (section(k2(arguments='{"city": 3}')), (True, False, True, True, True)),
        (section(k2(arguments='{"city": "Rome", "days": "2"}')), (True, False, True, True, True)),
        (section(k2(arguments='{}')), (True, False, True, True, True)),
        (section(k2(arguments='{"city": "Ro\nme"}')), (True, False, True, True, True)),
        (section(k2(arguments='Rome')), (True, False, True, True, True)),
        (section(k2('functions.get_tide:0')), (True, False, False, True, True)),
        (section(k2('get_weather:0')), (True, True, True, False, True)),
        (section(k2('call_a8f3')), (True, True, True, False, True)),
        (section(k2(), k2()), (True, True, True, False, True)),
        (section() + SECTION, (True, True, True, True, False)),
        (k2() + SECTION_END, (True, True, True, True, False)),
        (SECTION + k2(), (True, True, True, True, False)),
        (SECTION + ' so ' + k2() + SECTION_END, (True, True, True, True, False)),
        (SECTION + k2()[:-30], (False, None, None, None, False)),
        (section(k2(arguments=json.dumps(dict(city=SECTION)))), (True, True, True, True, True)),
    ],
)
def test_a_reply_is_judged(text, want):
    judged = verdicts(ASK, said_in(text, False, 9))
    assert tuple(judged[k] for k in KINDS) == want


def test_an_id_of_the_history_is_not_used_again():
    call = dict(id='functions.get_weather:0', type='function')
    call['function'] = dict(name='get_weather', arguments='{}')
    said = dict(role='assistant', content='', tool_calls=[call])
    result = dict(role='tool', tool_call_id=call['id'], content='dry')
    row = dict(ASK, messages=[*ASK['messages'], said, result])
    assert not verdicts(row, said_in(section(), False, 9))['ids']
    assert verdicts(row, said_in(section(k2('functions.get_weather:1')), False, 9))['ids']


def test_a_cut_reply_is_counted_as_cut_and_not_as_dangling():
    judged = verdicts(ASK, said_in(SECTION + k2()[:-30], True, 9))
    assert judged['cut'] and judged['sections'] is None and not judged['called']


def test_what_a_server_leaves_in_its_text_is_its_fault():
    def answer(**message):
        choice = dict(message=dict(role='assistant', **message), finish_reason='stop')
        return conformance.said_by(dict(choices=[choice]))

    call = dict(id='functions.get_weather:0', type='function')
    call['function'] = dict(name='get_weather', arguments='{"city": "Rome"}')
    assert not answer(content=None, tool_calls=[call]).left
    assert answer(content=section()).left and answer(content=SECTION, tool_calls=[call]).left
    assert answer(content='', reasoning=f'So {SECTION}').left


# ---- scores by hand ------------------------------------------------------------------------------


def stand_in(**spec):
    "A job that keeps its record in memory, with eight prompts."
    record = dict(metrics=[], checks=[])
    job = SimpleNamespace(
        cfg=SimpleNamespace(answer_tokens=64, side='evaluation', conformance=spec),
        seed=0,
        record=record,
        first=False,
        folder=Path('run'),
        env=dict(system=''),
        measure=lambda name, **line: record['metrics'].append(dict(line, measure=name)),
        check=lambda name, ok, why='': record['checks'].append((name, ok, why)),
    )
    calls = ToolCalls(job, calling_of(spec))
    calls.rows = [dict(ASK, group=str(n)) for n in range(8)]
    return job, calls


def says(*texts: str):
    "An `ask` that gives these texts; one that begins with ! is cut."
    left = iter(texts)

    def ask(rows, **options):
        told = [next(left) for _ in rows]
        return [said_in(t.removeprefix('!'), t.startswith('!'), 9) for t in told]

    return ask


KEY = dict(weights='', template='', device='')
YES, NO = section(), 'No.'


def lines_of(job) -> dict:
    return {line['measure']: line for line in job.record['metrics']}


def test_known_faults_give_the_figures_worked_out_by_hand():
    job, calls = stand_in(reference='untuned', prompts=8)
    # the reference calls in 5 of 8; its second sample in 4 of these and in one more: F1 = 8/10
    calls.take('untuned', KEY, says(*[YES] * 5, *[NO] * 3, *[YES] * 4, NO, YES, NO, NO))
    # the model calls in 6, of which 4 are the reference's: F1 = 2*4/(5+6) = 8/11
    told = [
        YES,
        section(k2(arguments='{"town": 1}')),
        section(k2('get_weather:0')),
        section(k2('functions.get_tide:0')),
        NO,
        YES + SECTION,
        YES,
        '!' + SECTION + k2()[:-30],
    ]
    calls.take('tuned', KEY, says(*told))
    calls.report('tuned', ['untuned'])
    lines = lines_of(job)
    assert set(lines) == set(MEASURES)
    trigger = lines['tool_trigger']
    assert trigger['after'] == 8 / 11 and trigger['n'] == 8 and trigger['ceiling'] == 8 / 10
    assert trigger['trigger'] == dict(both=4, only_model=2, only_reference=1)
    assert trigger['of_ceiling']['value'] == pytest.approx(8 / 11 / 0.8)
    assert trigger['low'] < trigger['after'] < trigger['high']
    assert trigger['change']['value'] == pytest.approx(8 / 11 - 0.8)
    got = {name: (lines[name]['after'], lines[name]['n']) for name in MEASURES[1:]}
    assert got == dict(
        tool_called=(6 / 8, 8),
        tool_schema=(4 / 6, 6),
        tool_names=(5 / 6, 6),
        tool_ids=(5 / 6, 6),
        tool_sections=(5 / 6, 6),
        tool_cut=(1 / 8, 8),
    )
    # four prompts are called in by both: two of the model's calls are invalid there
    change = lines['tool_schema']['change']
    assert (change['value'], change['lost'], change['n']) == (-0.5, 2, 4)
    assert {line['key'] for line in lines.values()} <= set(job.record['scores'])


def test_a_perfect_reference_gives_one():
    job, calls = stand_in(reference='untuned', prompts=8)
    both = [YES, NO] * 4
    calls.take('untuned', KEY, says(*both, *both))
    calls.take('tuned', KEY, says(*both))
    for name in ('untuned', 'tuned'):
        calls.report(name, [])
        lines = lines_of(job)
        assert [lines[m]['after'] for m in MEASURES] == [1, 0.5, 1, 1, 1, 1, 0]
        assert lines['tool_trigger']['of_ceiling'] == dict(value=1, low=1, high=1)


def test_a_model_that_never_calls_has_no_share_of_calls():
    job, calls = stand_in(reference='untuned', prompts=8)
    calls.take('untuned', KEY, says(*[NO] * 16))
    calls.take('tuned', KEY, says(*[NO] * 8))
    calls.report('tuned', ['untuned'])
    lines = lines_of(job)
    assert set(lines) == {'tool_called', 'tool_cut'}
    assert (lines['tool_called']['after'], lines['tool_cut']['after']) == (0, 0)
    none = dict.fromkeys(MEASURES[2:6], 'no reply calls a tool')
    neither = dict(tool_trigger='neither the model nor the reference calls a tool')
    assert lines['tool_called']['without_value'] == none | neither


def test_a_model_that_cannot_be_asked_is_a_failed_check():
    job, calls = stand_in(prompts=8)

    def refuse(rows, **options):
        raise LabError('the template leaves out the tool')

    calls.take('plain', KEY, refuse)
    calls.report('plain', [])
    why = 'the template leaves out the tool'
    assert job.record['checks'] == [('plain is asked about tools', False, why)]
    assert not job.record['metrics']


# ---- prompts -------------------------------------------------------------------------------------


def test_own_prompts_are_different_valid_and_the_same_for_a_seed():
    rows = checked_rows(tool_prompts(120, 3), 'own')
    assert len(rows) == 120 and rows == checked_rows(tool_prompts(120, 3), 'own')
    assert rows != checked_rows(tool_prompts(120, 4), 'own')
    families = [row['family'] for row in rows]
    assert {f: families.count(f) for f in families} == {
        'call': 60,
        'after a result': 30,
        'plain': 30,
    }


REFUSED = {
    "'stream' is not used; list it under conformance.ignore": dict(ASK, stream=True),
    'messages must be a list': dict(ASK, messages='Hi'),
    'not to be answered': dict(
        ASK, messages=[*ASK['messages'], dict(role='assistant', content='')]
    ),
    "role 'robot'": dict(ASK, messages=[dict(role='robot', content='')]),
    'tools must be a list': dict(messages=ASK['messages']),
    'declared twice': dict(ASK, tools=[TOOL, TOOL]),
    "tool 'f': its parameters are no JSON schema": dict(
        ASK, tools=[dict(function=dict(name='f', parameters=dict(type='text')))]
    ),
    "tool 'g': its parameters are no JSON schema": dict(
        ASK, tools=[dict(function=dict(name='g', parameters={'$ref': 'http://127.0.0.1:9/x'}))]
    ),
    "tool 'h': its parameters are no JSON object": dict(
        ASK, tools=[dict(function=dict(name='h', parameters=[1]))]
    ),
}


@pytest.mark.parametrize('why', REFUSED)
def test_a_bad_row_is_refused_before_the_work(why):
    with pytest.raises(LabError) as refused:
        checked_row(REFUSED[why], 'own.jsonl: row 3')
    assert str(refused.value).startswith('own.jsonl: row 3: ') and why in str(refused.value)


def test_a_row_of_the_vendor_verifier_is_read(tmp_path):
    row = dict(ASK, model='kimi-k2', stream=True, temperature=0.6)
    row['messages'] = [dict(role='_input', content='Be brief.'), *ASK['messages']]
    (tmp_path / 'samples.jsonl').write_text(json.dumps(row) + '\n')
    job = SimpleNamespace(find=lambda name: tmp_path / name.split('/')[-1], seed=0)
    calling = calling_of(dict(file='samples.jsonl', ignore=['model', 'stream', 'temperature']))
    [read] = read_prompts(job, calling)
    assert read['messages'][0]['role'] == 'system' and set(read) == {'messages', 'tools'}


@pytest.mark.parametrize(
    'spec,why',
    [
        (dict(rows='x'), "unknown key 'rows'"),
        (dict(prompts=1), '2 or more'),
        (dict(temperature=3), 'between 0 and 2'),
    ],
)
def test_a_bad_block_is_refused(spec, why):
    with pytest.raises(LabError, match=why):
        stage.Config(conformance=spec)


# ---- an endpoint and the stage -------------------------------------------------------------------


def test_an_endpoint_is_asked_with_tools_and_seed():
    seen: list = []
    teacher = Teacher('http://x/v1', 'k2', transport=scripted([YES, NO], seen))
    said = ask_endpoint(teacher, [ASK, ASK], 64, 0.6, 5, 'Be brief.', workers=1)
    assert [bool(s.reply['tool_calls']) for s in said] == [True, False]
    assert all(body['tools'] == [TOOL] and body['seed'] == 5 for body in seen)
    assert seen[0]['messages'][0] == dict(role='system', content='Be brief.')


def test_the_stage_measures_a_checkpoint_and_an_endpoint(monkeypatch):
    told = [YES, NO] * 8
    ask = lambda *args, **given: Teacher(*args, **given, transport=scripted(told))
    monkeypatch.setattr(conformance, 'Teacher', ask)
    spec = dict(prompts=4, reference='Kimi-K2-Instruct', endpoint=True)
    changes = dict(checkpoints=dict(k2_think_dpo=[]), measures={}, conformance=spec)
    job = start('evaluate', 'smoke', changes=changes)
    stage.evaluate(job)
    lines = {(m['checkpoint'], m['measure']): m for m in job.record['metrics']}
    assert {name for name, _ in lines} == {'k2_think_dpo', ENDPOINT}
    assert {m for name, m in lines if name == ENDPOINT} == set(MEASURES)
    assert not [c for c in job.record['checks'] if not c['ok']]
    items = read_items(job.folder)
    for line in lines.values():
        if line.get('after') is not None:
            own = items[line['key']]
            assert score_of(own).value == line['after']
            assert all(i['prompt'] and 'reply' in i for i in own)
    assert lines[ENDPOINT, 'tool_cut']['n'] == 4


# ---- the report ----------------------------------------------------------------------------------


def test_a_report_shows_the_measures_also_of_a_model_that_never_calls(tmp_path):
    home = campaign(tmp_path / 'demo', n=40)
    [folder] = home.glob('*-evaluate')
    job, calls = stand_in(reference='k2_domain_instruct', prompts=8)
    job.folder, job.first = folder, True
    calls.take('k2_domain_instruct', KEY, says(*[YES, NO] * 8))
    calls.take('k2_reason_sft', KEY, says(*[YES, YES, NO, NO] * 2))
    calls.take('k2_think_dpo', KEY, says(*[NO] * 8))
    for name, other in (('k2_reason_sft', 'k2_domain_instruct'), ('k2_think_dpo', 'k2_reason_sft')):
        calls.report(name, [other])
    record = json.loads((folder / 'run.json').read_text())
    empty = dict.fromkeys(('before', 'after', 'low', 'high', 'n'))
    lines = [empty | dict(stage='evaluate', seed=0) | line for line in job.record['metrics']]
    (folder / 'run.json').write_text(json.dumps(record | dict(metrics=record['metrics'] + lines)))
    evidence = gather(home, 'nano')
    page = report_html(make_report([evidence], []))
    assert 'tool calls valid by schema' in page and 'calls a tool when the reference does' in page
    assert 'tool calls valid by schema' in items_html(evidence, 20)
    report_json(make_report([evidence], []))
