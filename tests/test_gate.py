"A gate refuses true drops, seldom by chance; a run that fails it does not take over a name until someone says why."

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODULE

from k2lab.cli import main
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.lab.records import promote, read_run, runs, saved_by
from k2lab.lab.runner import execute
from k2lab.tasks.stats import paired_change, paired_ratio, paired_ratio_change
from k2lab.training.gate import check_gate, gate_lines, passed

# ---- the decision --------------------------------------------------------------------------------


def accuracy_line(rng, drop: float, groups=None, n: int = 2000, differ: float = 0.12) -> dict:
    "The line of a checkpoint that differs on 12 % of the items and truly lost `drop`."
    draw = rng.random(n)
    lost, gained = draw < (differ + drop) / 2, draw > 1 - (differ - drop) / 2
    change = paired_change(~gained, ~lost, groups)
    return dict(measure='recall', n=n, groups=change.groups, change=vars(change))


def text_line(rng, rise: float, n: int = 192) -> dict:
    "The line of bits per byte that truly became `1 + rise` times as large, by document more or less."
    size = rng.lognormal(6.8, 0.8, n)
    before = size * rng.normal(1.7, 0.2, n)
    after = before * (1 + rise) * rng.normal(1, 0.06, n)
    change = paired_ratio_change(before, after, size)
    ratio = paired_ratio(before, after, None, size, size)
    line = dict(measure='general_bits_per_byte', n=n, groups=change.groups)
    return line | dict(change=vars(change), ratio=vars(ratio))


def refusals(gate: dict, line_of, trials: int = 200) -> float:
    "The share of trials that the gate refuses."
    lines = [line_of(np.random.default_rng(i)) for i in range(trials)]
    return sum(not passed(gate_lines(gate, [line])) for line in lines) / trials


def test_drops_of_accuracy_are_refused_and_chance_is_not():
    gate, error = {'keeps': {'recall': 0.0}}, (0.12 / 2000) ** 0.5
    assert refusals(gate, lambda rng: accuracy_line(rng, 3.3 * error)) >= 0.95
    assert refusals(gate, lambda rng: accuracy_line(rng, 0)) <= 0.05
    assert 0.55 <= refusals(gate, lambda rng: accuracy_line(rng, 2 * error)) <= 0.72
    margin = {'keeps': {'recall': 0.02}}
    beyond = refusals(margin, lambda rng: accuracy_line(rng, 0.02 + 3.3 * error), 1000)
    assert 0.935 <= beyond <= 0.97  # 95.1 % in theory
    assert refusals(margin, lambda rng: accuracy_line(rng, 0)) == 0


def test_a_rise_of_bits_is_judged_as_a_share_of_what_they_were():
    # by document the share varies by .06; long documents count for more, so 192 are as good as 105
    gate, error = {'keeps': {'general_bits_per_byte': 0.05}}, 1.05 * 0.06 / 105**0.5
    assert refusals(gate, lambda rng: text_line(rng, 0.05 + 3.3 * error)) >= 0.95
    assert refusals(gate, lambda rng: text_line(rng, 0.05)) <= 0.08  # on the limit itself
    assert refusals(gate, lambda rng: text_line(rng, 0.02)) == 0
    improved = {'improves': ['general_bits_per_byte']}
    assert refusals(improved, lambda rng: text_line(rng, -0.03)) <= 0.05
    assert refusals(improved, lambda rng: text_line(rng, 0.03)) == 1


def test_items_of_one_function_count_once():
    "A drop that single items would prove is no proof if ten functions make all of it."
    before = [1] * 200
    after = [0] * 20 + [1] * 180
    line = lambda groups: dict(
        measure='recall', n=200, groups=10, change=vars(paired_change(before, after, groups))
    )
    gate = {'keeps': {'recall': 0.05}}
    assert not passed(gate_lines(gate, [line(None)]))
    assert passed(gate_lines(gate, [line([i // 20 for i in range(200)])]))


@pytest.mark.parametrize(
    'gate, message',
    [
        ({'keep': {}}, "did you mean 'keeps'?"),
        ({'improves': {'recall': 1}}, 'is no list'),
        ({'keeps': 'recall'}, 'has no margins'),
        ({'keeps': {'recal': 0.1}}, "'recal' would not be measured; measured are: recall, cut"),
        ({'improves': ['reasoning_tokens']}, 'would not be measured'),
        ({'keeps': {'recall': True}}, 'recall: True is no margin'),
        ({'keeps': {'cut': float('nan')}}, 'cut: nan is no margin'),
        ({'keeps': {'cut': None}}, 'cut: None is no margin'),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused(gate, message):
    with pytest.raises(LabError) as e:
        check_gate(gate, ['recall', 'cut'])
    assert message in str(e.value) and '\n' not in str(e.value)


# ---- promotion -----------------------------------------------------------------------------------

GATED = MODULE.replace(
    "    with job.publishing",
    """    line = dict(measure='value', rule='keeps', limit=-1.0, value=-3.0, low=-4.0, high=-2.0)
    bad = job.cfg.how == 'worse'
    job.record['gate'] = dict(passed=not bad, lines=[dict(line, passed=not bad)])
    with job.publishing""",
    1,
)


@pytest.fixture
def gated(lab):
    "The toy lab: `train_toy` has a gate, and `train_more` starts from what it saved."
    lab.stage(20, 'train_toy', 'saves: k2_toy\nscales:\n  smoke: {steps: 2}\n', module=GATED)
    lab.stage(30, 'train_more', 'init_from: k2_toy\nsaves: k2_more\n')
    lab.write('configs/pipeline.yaml', 'steps: [{stage: train_toy}, {stage: train_more}]')
    return lab


def run(stage: str, **changes) -> dict:
    return read_run(execute(stage, campaign='c', changes=changes))


def name(record: dict) -> str:
    return Path(record['folder']).name


def test_a_name_means_the_newest_promoted_run(gated, capsys):
    good, bad = run('train_toy'), run('train_toy', how='worse')
    assert (bad['status'], bad['reason'], bad['gate']['passed']) == ('complete', '', False)
    assert saved_by(gated.runs / 'c', 'k2_toy', 'smoke') == Path(good['folder'])
    more = run('train_more')
    assert more['parents'][0]['run'] == name(good)
    check = next(c for c in more['checks'] if 'passed over' in c['name'])
    assert f'{name(bad)}: not promoted: keeps value: -3.000 [-4.000, -2.000]' in check['detail']
    pinned = run('train_more', init_from=f'k2_toy@{name(bad)}')
    assert pinned['parents'][0]['run'] == name(bad)
    assert not [c for c in pinned['checks'] if 'passed over' in c['name']]
    assert main(['runs', 'c']) == 0
    assert capsys.readouterr().out.count('complete, not promoted') == 1
    assert main(['show', name(bad)]) == 0
    shown = capsys.readouterr().out
    assert f'{name(bad)}: complete, not promoted' in shown
    assert '✗  keeps  value    -3.000  -4.000 to -2.000  -1.000' in shown
    assert f'`k2lab promote {name(bad)} --because "..."` lets it take over k2_toy' in shown


def test_promotion_by_hand_keeps_its_reason(gated, capsys):
    run('train_toy')
    bad = run('train_toy', how='worse')
    assert main(['promote', name(bad), '--because', 'the old grader\nwas wrong']) == 0
    assert f'k2_toy means {name(bad)}' in capsys.readouterr().out
    record = json.loads((Path(bad['folder']) / 'run.json').read_text())
    assert record['promoted']['because'] == 'the old grader was wrong'
    assert [seal['why'] for seal in record['seals']] == ['closed', 'promoted']
    assert record['seals'][0] == bad['seals'][0]
    assert {k: v for k, v in record.items() if k not in ('promoted', 'seals')} == {
        k: v for k, v in bad.items() if k not in ('folder', 'seals')
    }
    assert run('train_more')['parents'][0]['run'] == name(bad)
    assert main(['show', name(bad)]) == 0
    assert 'complete, promoted by hand: the old grader was wrong' in capsys.readouterr().out
    newest = run('train_toy', steps=5)
    assert run('train_more')['parents'][0]['run'] == name(newest)


def test_a_damaged_run_is_told_and_nothing_stands_in_for_the_only_one(gated):
    first, second = (Path(run('train_toy')['folder']) for _ in range(2))
    (second / 'k2_toy.txt').unlink()
    more = run('train_more')
    check = next(c for c in more['checks'] if 'passed over' in c['name'])
    assert more['parents'][0]['run'] == first.name
    assert check['detail'].startswith(f'{second.name}: k2_toy: k2_toy.txt is missing')
    (first / 'k2_toy.txt').write_text('')  # now env.yaml's place of that name would be left
    gated.write('configs/env.yaml', 'scales: {smoke: {models: {k2_toy: zero.txt}}}')
    failed = run('train_more')
    assert failed['status'] == 'failed'
    assert (
        f"'k2_toy': {second.name} saved it, and k2_toy: k2_toy.txt is missing" in failed['reason']
    )


def test_what_cannot_be_promoted(gated):
    good, failed = run('train_toy'), run('train_toy', how='fail')
    bad, spoiled = run('train_toy', how='worse'), run('train_toy', how='worse')
    (Path(spoiled['folder']) / 'k2_toy.txt').write_text('7')
    for record, why, message in (
        (good, 'x', 'it passed its gate'),
        (failed, 'x', 'failed; only a complete run can be promoted'),
        (bad, ' ', 'say why: --because'),
        (spoiled, 'x', 'k2_toy.txt was changed'),
        (run('train_more'), 'x', 'it has no gate'),
    ):
        with pytest.raises(LabError, match=message):
            promote(record['folder'], why)
    for words in (['promote'], ['promote', name(bad)], ['promote', name(bad), '--because', '']):
        with pytest.raises(LabError):
            main(words)
    assert 'promoted' not in read_run(bad['folder'])


def test_nothing_promoted_is_an_error_with_the_way_out(gated):
    bad = run('train_toy', how='worse')
    failed = run('train_more')
    assert failed['status'] == 'failed'
    assert failed['reason'].startswith(f"'k2_toy': {name(bad)} is complete, not promoted (keeps")
    assert f'`k2lab promote {name(bad)} --because "..."`' in failed['reason']
    promote(bad['folder'], 'good enough')
    assert main(['resume', failed['folder']]) == 0


def test_a_pipeline_stops_at_a_gate_and_goes_on_after_promotion(gated, capsys):
    gated.write(
        'configs/pipeline.yaml',
        'steps: [{stage: train_toy, changes: {how: worse}}, {stage: train_more}]',
    )
    assert main(['pipeline', '--campaign', 'c']) == 1
    shown = capsys.readouterr()
    assert [r['stage'] for r in runs('c')] == ['train_toy']
    assert 'complete, not promoted' in shown.out and 'complete, not promoted' in shown.err
    bad = name(runs('c')[0])
    assert f'`k2lab promote {bad} --because "..."`' in shown.out
    assert main(['pipeline', '--campaign', 'c']) == 1  # nothing is trained again
    assert [r['stage'] for r in runs('c')] == ['train_toy']
    promote(bad, 'a try')
    assert main(['pipeline', '--campaign', 'c']) == 0
    assert [r['stage'] for r in runs('c')] == ['train_toy', 'train_more']
    capsys.readouterr()
    assert main(['pipeline', '--campaign', 'c']) == 0 and len(runs('c')) == 2
    assert capsys.readouterr().err.count('complete: already, in') == 2


def test_a_pipeline_step_with_a_pinned_parent_is_done_once(gated):
    bad = name(run('train_toy', how='worse'))
    step = f'{{stage: train_more, changes: {{init_from: k2_toy@{bad}}}}}'
    gated.write('configs/pipeline.yaml', f'steps: [{step}]')
    for _ in range(2):
        assert main(['pipeline', '--campaign', 'c']) == 0 and len(runs('c')) == 2


def test_commands_tell_a_script_that_the_gate_failed(gated):
    assert main(['train_toy', '--campaign', 'c']) == 0
    assert main(['train_toy', '--campaign', 'c', 'how=worse']) == 1
    bad = name(runs('c')[-1])
    assert main(['watch', bad]) == 1
    promote(bad, 'a try')
    assert main(['watch', bad]) == 0


def test_a_false_line_of_a_gate_does_not_fail_a_run_without_a_runner(gated):
    job = start('train_toy', campaign='c')
    job.record['gate'] = dict(passed=False, lines=[])
    job.finish()
    assert job.record['status'] == 'complete' and 'complete, not promoted' in repr(job)
