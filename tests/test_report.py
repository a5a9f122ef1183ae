"""The report: which runs and scores it takes, when a goal is reached, that it loses nothing of failed
or replaced runs, that its numbers come from items, and a README that is its notebook.
"""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from campaigns import add, campaign, metric, parent, record

from k2lab.lab.config import LabError, read_yaml
from k2lab.reports import gallery
from k2lab.reports.charts import el
from k2lab.reports.goals import (
    TESTS,
    alternatives,
    answer,
    check_goal,
    goal_sentence,
    judge_goal,
    judge_goals,
    over_seeds,
    point,
)
from k2lab.reports.matrix import matrix
from k2lab.reports.model_card import card, write_cards
from k2lab.reports.page import items_html, lead, make_report, report_html, report_json, warnings
from k2lab.reports.results import (
    MEASURES,
    Evidence,
    compare,
    gather,
    line_of,
    measures_of,
    newest_runs,
)
from k2lab.reports.sections import ancestors, run_name
from k2lab.tasks.items import read_items, score_of, write_items
from k2lab.tasks.stats import Estimate

ROOT = Path(__file__).resolve().parents[1]
GOALS = read_yaml(ROOT / 'configs/report.yaml')['goals']


@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    "Two campaigns of two seeds."
    home = tmp_path_factory.mktemp('runs')
    return [campaign(home / f'demo{seed}', seed) for seed in (0, 1)]


@pytest.fixture(scope='module')
def demo(seeds):
    return gather(seeds[0], 'nano')


@pytest.fixture(scope='module')
def report(demo):
    return make_report([demo], judge_goals(GOALS, [demo], 'nano'))


class Page(HTMLParser):
    "Fails on an element that is closed in the wrong place, and collects names, links and anchors."

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links, self.ids = [], set(), [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.links += [v for k, v in attrs if k in ('href', 'src', 'xlink:href')]
        self.ids += [v for k, v in attrs if k == 'id']
        if tag not in ('br', 'meta', 'img'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ('br', 'meta', 'img'):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def numbers(records):
    return [int(re.search(r'\.(\d+)-', Path(r['folder']).name)[1]) for r in records]


def failed_gate(high=0.09):
    line = dict(measure='general_bits_per_byte', rule='keeps', limit=0.05, value=0.08)
    return dict(passed=False, lines=[line | dict(low=0.07, high=high, passed=False)])


# which runs and scores count


def test_the_newest_promoted_run_of_each_role_counts(tmp_path):
    sft = record('train_sft_domain', saves='k2_a')
    found = [
        sft,
        sft,
        record('train_sft_domain', saves='k2_a', status='failed'),
        record('prepare_corpus', mode='domain'),
        record('prepare_corpus', mode='reasoning'),
        record('train_sft_domain', saves='k2_a', scale='smoke'),
        record('report'),
        sft | dict(gate=failed_gate()),
    ]
    for n, r in enumerate(found, 1):
        add(tmp_path, n, r)
    used, aside = newest_runs(tmp_path, 'nano')
    assert sorted(numbers(used)) == [2, 4, 5] and sorted(numbers(aside)) == [1, 3, 8]
    because = dict(because='the domain counts more', at='2026-11-24')
    add(tmp_path, 8, found[-1] | dict(promoted=because))
    assert sorted(numbers(newest_runs(tmp_path, 'nano')[0])) == [4, 5, 8]


def test_the_order_is_that_of_the_pipeline_and_of_numbers_not_of_text(tmp_path):
    add(tmp_path, 10, record('train_continual_pretrain', saves='k2_p'))
    add(tmp_path, 9, record('train_sft_domain', saves='k2_d'))
    add(tmp_path, 2, record('train_continual_pretrain', saves='k2_p'))
    used, aside = newest_runs(tmp_path, 'nano')
    assert numbers(used) == [10, 9] and numbers(aside) == [2]


def test_failed_held_back_and_unreadable_runs_are_named_at_the_top_and_nothing_is_lost(tmp_path):
    add(tmp_path, 1, record('evaluate', [metric('evaluate', 'domain_questions', 0, 0.6)]))
    add(tmp_path, 2, record('evaluate', status='failed'))
    add(tmp_path, 3, record('train_sft_domain', saves='k2_a'))
    add(tmp_path, 4, record('train_sft_domain', saves='k2_a') | dict(gate=failed_gate()))
    folder = add(tmp_path, 5, record('sample_teacher', mode='distill'))
    (folder / 'run.json').write_text('{"stage": ')
    evidence = gather(tmp_path, 'nano')
    text = '\n'.join(warnings(evidence))
    for words in (
        '2026-11-23.2-evaluate: failed: it broke.',
        '2026-11-23.4-train_sft_domain: complete, not promoted (keeps general_bits_per_byte: +0.080 [',
        '2026-11-23.5-sample_teacher: unreadable: ',
        'No run that counts of: prepare_corpus (domain)',
    ):
        assert words in text, text
    page = report_html(make_report([evidence], []))
    assert page.index('failed: it broke') < page.index('<h2>')
    assert len(report_json(make_report([evidence], []))['campaigns'][0]['runs']) == 5


def evaluation(n, made_by, **values):
    lines = [
        metric('evaluate', k, None, v, checkpoint='k2_think_dpo', side='evaluation')
        for k, v in values.items()
    ]
    return n, record(
        'evaluate', lines, parents=[parent('k2_think_dpo', dict(k2_think_dpo=made_by))]
    )


def test_a_second_evaluation_replaces_only_what_it_measured_again(tmp_path):
    dpo = add(tmp_path, 1, record('run_dpo_reasoning', saves='k2_think_dpo')).name
    add(tmp_path, *evaluation(2, dpo, domain_questions=0.61, reasoning_verified=0.82))
    add(tmp_path, *evaluation(3, dpo, domain_questions=0.62, domain_recall=0.3))
    evidence = gather(tmp_path, 'nano')
    found = {
        m['measure']: (m['after'], m['run'][11]) for m in evidence.lines if m.get('checkpoint')
    }
    assert found == {
        'domain_questions': (0.62, '3'),
        'reasoning_verified': (0.82, '2'),
        'domain_recall': (0.3, '3'),
    }


def test_scores_of_a_replaced_checkpoint_are_left_out_and_said_to_be(tmp_path):
    old = add(tmp_path, 1, record('run_dpo_reasoning', saves='k2_think_dpo')).name
    add(tmp_path, *evaluation(2, old, domain_questions=0.9))
    add(tmp_path, 3, record('run_dpo_reasoning', saves='k2_think_dpo'))
    evidence = gather(tmp_path, 'nano')
    assert line_of(evidence, 'k2_think_dpo', 'domain_questions') == {}
    assert any(
        '1 scores of an older k2_think_dpo, in 2026-11-23.2' in w for w in warnings(evidence)
    )


# goals


@pytest.mark.parametrize(
    'test, limit, interval, verdict',
    [
        ('at_least', 0.6, (0.65, 0.61, 0.69), 'reached'),
        ('at_least', 0.6, (0.65, 0.59, 0.71), 'cannot be said'),
        ('at_least', 0.6, (0.55, 0.51, 0.59), 'not reached'),
        ('ratio_at_most', 0.92, (0.9, 0.89, 0.91), 'reached'),
        ('ratio_at_most', 0.92, (0.94, 0.93, 0.95), 'not reached'),
        ('gain', 0, (0.011, -0.011, 0.033), 'cannot be said'),
        ('keeps', -0.05, (-0.004, -0.053, 0.042), 'cannot be said'),
        ('at_most', 4, (1.5, 1.5, 1.5), 'reached'),
        ('at_most', 4, (4.1, 4.1, 4.1), 'not reached'),
        ('items', 2000, (1999, 1999, 1999), 'not reached'),
    ],
)
def test_a_verdict_against_intervals_worked_out_by_hand(test, limit, interval, verdict):
    value, low, high = interval
    e = Estimate(value, low, high, (high - low) / 3.92, 450, 450)
    assert answer('domain_questions', test, limit, e).verdict == verdict


def test_the_items_that_it_would_take():
    "The half width .022 must shrink to the distance .011: four times the items."
    e = Estimate(0.011, -0.011, 0.033, 0.0112, 450, 450)
    assert answer('reasoning_verified', 'gain', 0.0, e).needed == 1800


def line(measure, after, low, high, checkpoint='k2_x', **more):
    own = dict(stage='evaluate', measure=measure, after=after, low=low, high=high, n=450)
    return own | dict(checkpoint=checkpoint, side='evaluation') | more


def test_either_way_reaches_a_goal_and_a_gap_is_not_a_miss():
    goal = dict(
        checkpoint='k2_x',
        says='x',
        any=[
            [dict(measure='reasoning_verified', at_least=0.9)],
            [
                dict(measure='reasoning_tokens', at_most=30),
                dict(measure='domain_recall', at_least=0.5),
            ],
        ],
    )
    verdict = lambda *lines: judge_goal(goal, [Evidence('c', 'nano', lines=[*lines])]).verdict
    good, poor = (line('reasoning_verified', v, v - 0.02, v + 0.02) for v in (0.95, 0.8))
    short, recall = line('reasoning_tokens', 28, 27, 29), line('domain_recall', 0.6, 0.55, 0.65)
    assert verdict(good) == 'reached' and verdict(poor, short, recall) == 'reached'
    assert verdict(poor, short, line('domain_recall', 0.5, 0.45, 0.55)) == 'cannot be said'
    assert verdict(poor, short, line('domain_recall', 0.3, 0.25, 0.35)) == 'not reached'
    assert verdict(poor, short) == 'not measured' and verdict() == 'not measured'


def test_baselines_and_the_control_are_judged_too():
    own = dict(baselines=dict(few_shot=dict(value=0.05, n=150), copy=dict(value=0.3, n=450)))
    found = line('domain_questions', 0.32, 0.28, 0.36, **own)
    found['over_control'] = dict(value=-0.03, low=-0.05, high=-0.01)
    seen = [Evidence('c', 'nano', lines=[found])]
    judged = lambda **t: judge_goal(
        dict(says='x', checkpoint='k2_x', measure='domain_questions') | t, seen
    )
    assert judged(over_baseline='few_shot').verdict == 'reached'
    assert judged(over_baseline='copy').verdict == 'cannot be said'
    assert judged(over_baseline='prompt_only').verdict == 'not measured'
    assert judged(over_control=0).verdict == 'not reached'
    assert judged(at_least=0.2, items=451).verdict == 'not reached'


def test_scores_of_other_items_are_not_compared(tmp_path):
    "Replies cut off in 2 questions and in 3 others: neither a change nor an error."
    whole = dict(group='g', family='all', tokens=3, cut=False, right=True)
    for key, names in (('1' * 16, 'ab'), ('2' * 16, 'cde')):
        write_items(tmp_path, key, [whole | dict(item=name) for name in names])
    place = dict(folder=str(tmp_path), run='r')
    old = line('cut', 0, 0, 0, 'k2_x', key='1' * 16, **place) | dict(n=2)
    new = line('cut', 0, 0, 0, 'k2_y', key='2' * 16, **place) | dict(n=3)
    assert compare(Evidence('c', 'nano', lines=[old, new]), new, 'k2_x') == {}
    assert compare(Evidence('c', 'nano', lines=[old, new | dict(key='1' * 16, n=2)]), old, 'k2_y')


def test_a_share_of_the_teacher_is_no_row_of_the_matrix():
    "The teacher's own accuracy stood under that label, as what the student was compared with."
    found = line('share_of_teacher_domain_questions', 0.6, 0.5, 0.7, key='a' * 16)
    lines = [found, line('mine', 0.6, 0.5, 0.7, key='b' * 16)]
    assert measures_of(Evidence('c', 'nano', lines=lines)) == ['mine']


def test_a_score_of_one_item_says_nothing():
    found = line('domain_questions', 1.0, None, None, key='a' * 16) | dict(n=1)
    found['over_control'] = dict(value=1.0, low=None, high=None)
    seen = [Evidence('c', 'nano', lines=[found])]
    goal = dict(says='x', checkpoint='k2_x', measure='domain_questions')
    assert judge_goal(goal | dict(at_least=0.6), seen).verdict == 'cannot be said'
    assert judge_goal(goal | dict(over_control=0), seen).verdict == 'cannot be said'
    assert '[-∞, ∞]' in judge_goal(goal | dict(at_least=0.6), seen).reached


def test_seeds_are_joined_by_students_t():
    "t(.975, 2) = 4.302653; the standard deviation of .60, .62, .64 is .02."
    e = over_seeds([point(0.60, 2000), point(0.62, 2000), point(0.64, 2000)])
    half = 4.302653 * 0.02 / math.sqrt(3)
    assert e.value == pytest.approx(0.62) and e.high - e.value == pytest.approx(half, rel=1e-4)
    assert (e.n, e.groups) == (6000, 3)


def test_the_mean_of_small_shares_is_not_below_none():
    from k2lab.reports.matrix import Cell, mean_cell

    values = [point(v, 300) for v in (0.01, 0.02, 0.06)]
    recall = [Cell('k2', 'domain_recall', 'evaluation', v) for v in values]
    told = mean_cell(recall)
    assert over_seeds(values).low < 0 == told.value.low
    assert told.value.value == pytest.approx(0.03)
    tokens = [replace(cell, measure='reasoning_tokens') for cell in recall]
    assert mean_cell(tokens).value.low < 0


def test_a_seed_without_the_score_leaves_a_goal_unmeasured():
    goal = dict(says='x', checkpoint='k2_x', measure='domain_questions', at_least=0.6)
    seen = Evidence('a', 'nano', lines=[line('domain_questions', 0.7, 0.68, 0.72)])
    assert judge_goal(goal, [seen, seen]).verdict == 'reached'
    assert judge_goal(goal, [seen, Evidence('b', 'nano')]).verdict == 'not measured'


def test_a_difference_is_one_of_equal_items_never_of_a_name(demo):
    "`keeps` finds the best earlier checkpoint itself; the recorded change against another one is not used."
    found = line_of(demo, 'k2_think_dpo', 'domain_questions')
    assert found['compared_with'] == 'k2_reason_sft'
    base = compare(demo, found, 'Kimi-K2-Base')
    assert base['before'] < 0.1 and base['change']['value'] == pytest.approx(
        found['after'] - base['before']
    )
    goal = dict(says='x', checkpoint='k2_think_dpo', measure='domain_questions', keeps=0.05)
    assert judge_goal(goal, [demo]).answers[0].other == 'k2_domain_instruct'
    swapped = dict(found, key='gone', compared_with='x')
    assert 'change' not in compare(demo, swapped, 'k2_reason_sft')


@pytest.mark.parametrize(
    'change, said',
    [
        (dict(at_leats=0.6), "unknown key 'at_leats' (did you mean 'at_least'?)"),
        (dict(over_baseline='luck'), "unknown baseline 'luck'"),
        (dict(at_least='0.6'), "at_least is a number, not '0.6'"),
        (dict(checkpoint=None), "name a 'checkpoint'"),
        (dict(says=None), "no 'says'"),
        (dict(scales=['tiny']), "unknown scale 'tiny'"),
        (
            dict(any=[[dict(measure='cut')]], at_least=None, measure=None),
            'has a measure and one of',
        ),
        (dict(from_at_most=0.1), "unknown key 'from_at_most'"),
    ],
)
def test_a_goal_that_nothing_can_judge_is_refused(change, said):
    goal = dict(says='x', checkpoint='k2_x', measure='domain_questions', at_least=0.6) | change
    with pytest.raises(LabError, match=re.escape(said)):
        check_goal({k: v for k, v in goal.items() if v is not None})


def test_the_stage_file_has_17_goals_that_name_stages_measures_and_tests():
    stages = {re.sub(r'^\d+[a-z]?_', '', p.stem) for p in (ROOT / 'nbs').glob('[1-9]*.ipynb')}
    assert len(GOALS) == 17
    for goal in GOALS:
        check_goal(goal)
        for condition in (c for conditions in alternatives(goal) for c in conditions):
            assert condition['measure'] in MEASURES and set(condition) & set(TESTS)
            assert condition.get('stage', 'evaluate') in stages | {'pipeline'}


def test_every_goal_of_the_demo_is_judged(report):
    "The two goals that ask for 2000 and 1000 items and few-shot answers have neither here."
    missed = [g.says for g in report.goals if g.verdict == 'not reached']
    assert len(missed) == 2 and all('above few-shot (' in says for says in missed)
    assert [g.says for g in report.goals if g.verdict == 'not measured'] == []
    reached = {g.says: g.verdict for g in report.goals}
    general = 'final teacher at most 5 % more bits per byte on general text than the base'
    assert reached[general] == 'reached'
    assert goal_sentence(report.goals).startswith(f'{[*reached.values()].count("reached")} of 17')


# numbers from items


def test_every_score_of_report_json_is_computed_again_from_items_alone(report, seeds):
    lines = report_json(report)['campaigns'][0]['lines']
    keyed = [m for m in lines if m.get('key')]
    assert len(keyed) == 61
    for m in keyed:
        items = read_items(seeds[0] / m['run'])
        assert score_of(items[m['key']]).value == m['after'], m
        if m.get('before_key'):
            assert score_of(items[m['before_key']]).value == m['before'], m


def test_a_change_in_the_matrix_is_that_of_the_items_by_another_way(report, seeds):
    "The mean of after - before, counted by hand."
    cell = report.scores['reasoning_verified', 'k2_student_7b']
    items = read_items(seeds[0] / '2026-11-23.6-evaluate')
    side = lambda name: {
        i['item']: i['right'] for i in items[f'{name}.reasoning_verified.evaluation']
    }
    old, new = side('k2_think_dpo'), side('k2_student_7b')
    assert cell.change.value == pytest.approx(sum(new[i] - old[i] for i in old) / len(old))
    assert cell.other == 'k2_think_dpo' and cell.change.low < cell.change.value < cell.change.high


def test_report_json_holds_what_the_page_shows(report):
    found = report_json(report)
    json.dumps(found, allow_nan=False)
    assert {'lead', 'facts', 'scores', 'goals', 'campaigns'} <= set(found)
    one = found['campaigns'][0]
    assert {'models', 'lines', 'runs', 'flights', 'data', 'samples', 'warnings'} <= set(one)
    best = next(s for s in found['scores'] if s['measure'] == 'general_bits_per_byte')
    assert {'low', 'high', 'n'} <= set(best['value'])
    assert all(g['verdict'] and g['answers'] for g in found['goals'])
    assert any(m.get('families') for m in one['lines'])


# the pages


def test_the_lead_says_result_and_loss(report):
    said = lead(report)
    assert re.match(r"The student, a third of the teacher's size, keeps 9\d % \[\d+, \d+\]", said)
    assert re.search(r'its general text lost 3\.\d % \[', said) and said.count('.') < 8


def test_the_page_needs_nothing_from_outside_and_each_link_has_its_place(report, demo):
    page, items = Page(report_html(report)), Page(items_html(demo, 5))
    for p in (page, items):
        assert not {'script', 'img', 'link', 'iframe'} & p.seen
        assert [link for link in p.links if not link.startswith(('#', 'items.html#'))] == []
        assert [link for link in p.links if link[0] == '#' and link[1:] not in p.ids] == []
    to_items = [link.partition('#')[2] for link in page.links if link.startswith('items.html')]
    assert len(to_items) > 25 and set(to_items) <= set(items.ids)
    assert 'http' not in report_html(report)


def test_items_come_wrong_first_are_escaped_and_the_rest_is_counted(demo):
    text = items_html(demo, 5)
    section = text.partition('id="k2_student_7b.reasoning_verified.evaluation"')[2]
    section = section.partition('</section>')[0]
    marks = re.findall(r'[✗✓] (lost|wrong|gained|right)', section)
    assert marks == ['lost'] * 5
    assert '395 more items are in 2026-11-23.6-evaluate/items.jsonl' in section
    assert '&lt;reasoning_verified&gt; no.' in section and '<reasoning_verified>' not in text


def test_several_seeds_are_means_on_one_page(seeds):
    evidences = [gather(home, 'nano') for home in seeds]
    both = matrix(evidences)
    each = [matrix([e])['domain_questions', 'k2_think_dpo'].value.value for e in evidences]
    cell = both['domain_questions', 'k2_think_dpo']
    assert cell.value.value == pytest.approx(sum(each) / 2) and cell.seeds == 2
    report = make_report(evidences, judge_goals(GOALS, evidences, 'nano'))
    page = report_html(report)
    assert Page(page) and 'means over 2 campaigns (demo0, demo1)' in page
    assert {a.seeds for g in report.goals for a in g.answers} == {2}


def test_tasks_of_lm_eval_and_sets_of_ones_own_lead_to_their_items_too(tmp_path):
    dpo = add(tmp_path, 1, record('run_dpo_reasoning', saves='k2_think_dpo')).name
    keys = {'own_gen: exact_match': 'a' * 16, 'my_set': 'b' * 16}
    lines = [
        metric('evaluate', name, None, 0.5, checkpoint='k2_think_dpo', key=key, n=2)
        for name, key in keys.items()
    ]
    r = record('evaluate', lines, parents=[parent('k2_think_dpo', dict(k2_think_dpo=dpo))])
    folder = add(tmp_path, 2, r)
    for name, key in keys.items():
        own = dict(group='g', family='all', question=name, answer='1', reply='2')
        write_items(folder, key, [own | dict(item=str(i), right=bool(i)) for i in (0, 1)])
    evidence = gather(tmp_path, 'nano')
    page = report_html(report := make_report([evidence], []))
    assert '>own_gen: exact_match</td>' in page and '<b>my set</b>' in page
    assert {at[0] for at in report.scores} == {'my_set'} and '50.0 %' in page
    ids, links = Page(items_html(evidence, 5)).ids, Page(page).links
    assert len({x for x in links if x.partition('#')[2] in ids and x.startswith('items')}) == 2
    assert [m['measure'] for m in report_json(report)['campaigns'][0]['lines']][:2] == [*keys]


def test_nasty_text_is_escaped_everywhere(tmp_path):
    nasty = '</div><script>alert(1)</script> & "quoted"'
    corpus = dict(name='domain', documents=68, bytes=114503, licence=nasty, origin=nasty)
    card_ = dict(mode='domain', corpora=[corpus | dict(removed={nasty: 16})])
    add(tmp_path, 1, record('prepare_corpus', mode='domain'), card=card_)
    replies = [dict(when='after', prompt=nasty, text=nasty, ok=True)]
    for n, name in ((2, 'k2_p'), (3, 'k2_d')):
        r = record('train_sft_domain', saves=name, init_from='k2_p')
        r |= dict(status='complete', sampling=dict(prompts=12, answers=36, right=24, cut=0))
        add(tmp_path, n, r, samples=replies)
    add(tmp_path, 4, record('evaluate', status='failed') | dict(reason=nasty))
    evidence = gather(tmp_path, 'nano')
    page = Page(text := report_html(make_report([evidence], [])))
    assert 'script' not in page.seen and text.count('&lt;script&gt;') >= 5


def test_records_without_items_still_give_a_page_that_claims_no_change(tmp_path):
    "A line as it was before scores kept their items."
    old = metric('train_sft_domain', 'domain_questions', 0.1, 0.7, low=0.65, high=0.75)
    old |= dict(families=dict(arity=0.6), cut=3, baseline=dict(majority=0.1))
    r = record(
        'train_sft_domain', [old], 'k2_d', [parent('Kimi-K2-Base', {})], init_from='Kimi-K2-Base'
    )
    add(tmp_path, 1, r)
    evidence = gather(tmp_path, 'nano')
    report = make_report([evidence], judge_goals(GOALS, [evidence], 'nano'))
    assert Page(text := report_html(report)) and '70.0 %†' in text
    assert report.scores['domain_questions', 'k2_d'].change is None
    assert 'k2-nano-base' in text


def test_an_empty_campaign_is_said_not_crashed_on(tmp_path):
    report = make_report([gather(tmp_path, 'nano')], [])
    assert 'no complete runs' in report_html(report) and report_json(report)['scores'] == []
    add(tmp_path, 1, record('train_sft_domain', saves='k2_d', status='failed'))
    assert 'failed: it broke' in report_html(make_report([gather(tmp_path, 'nano')], []))


@pytest.mark.parametrize('damage', ['cut', 'broken line', 'gone'])
def test_scores_whose_items_are_not_whole_are_counted_at_the_top(tmp_path, damage):
    home = campaign(tmp_path / 'c', n=40)
    path = home / '2026-11-23.6-evaluate' / 'items.jsonl'
    lines = path.read_text().splitlines(keepends=True)
    if damage == 'gone':
        path.unlink()
    else:
        lines[7] = lines[7][:20] + '\n' if damage == 'broken line' else lines[7]
        path.write_text(''.join(lines[:-60] if damage == 'cut' else lines))
    evidence = gather(home, 'nano')
    report = make_report([evidence], [])
    n = 3 if damage == 'cut' else 30
    scores = f'2026-11-23.6-evaluate: items of {n} scores are missing or damaged'
    assert any(w.startswith(scores) for w in warnings(evidence)), warnings(evidence)
    assert report.scores['general_bits_per_byte', 'k2_student_7b'].place == ''
    assert Page(report_html(report)) and Page(items_html(evidence, 5))


def test_lineage_holds_replaced_ancestors(tmp_path):
    first = add(tmp_path, 1, record('train_continual_pretrain', saves='k2_p')).name
    add(tmp_path, 2, record('train_continual_pretrain', saves='k2_p'))
    add(
        tmp_path,
        3,
        record('train_sft_domain', saves='k2_d', parents=[parent('k2_p', dict(k2_p=first))]),
    )
    evidence = gather(tmp_path, 'nano')
    assert [run_name(r)[11] for r in ancestors(evidence.used)] == ['1', '2', '3']
    assert 'since replaced' in report_html(make_report([evidence], []))
    assert any('replaced since: train_sft_domain' in w for w in warnings(evidence))


def test_text_is_escaped_and_elements_are_not():
    text = el('p', el('b', '<i>'), ' & ', class_='x', stroke_width=2)
    assert text == '<p class="x" stroke-width="2"><b>&lt;i&gt;</b> &amp; </p>'


# what is published


def test_cards_name_lineage_data_scores_losses_and_the_duty(report, tmp_path):
    write_cards(report, tmp_path / 'cards')
    assert len([*(tmp_path / 'cards').iterdir()]) == 5
    text = (tmp_path / 'cards' / 'k2_think_dpo.md').read_text()
    head = text.split('---')[1]
    assert 'license: "apache-2.0"' in head and 'base_model: "k2-nano-base"' in head
    assert 'Kimi-K2-Base → k2_domain_pretrain → k2_domain_instruct' in text
    assert re.search(r'general text, bits per byte: ▲ \+3\.\d %', text)
    assert '100 million monthly active users' in text and 'does not arise here' in text
    assert 'trained on answers of k2_think_dpo' in card(report, 'k2_student_7b')


def test_the_gallery_holds_no_path_and_no_secret_and_keeps_its_limit(
    seeds, report, tmp_path, monkeypatch
):
    folder = seeds[0] / '2026-11-23.2-train_sft_domain'
    monkeypatch.setenv('HF_TOKEN', 'hf_' + 'a1B2' * 8)
    cell = dict(cell_type='code', source='x', outputs=[], metadata={}, execution_count=None)
    cell['source'] = f'see {folder}/x.jsonl with hf_' + 'a1B2' * 8
    (folder / 'notebook.ipynb').write_text(json.dumps(dict(cells=[cell], nbformat=4)))
    monkeypatch.setattr(gallery, 'take_picture', lambda *a: False)
    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano' / 'report.png').write_bytes(b'picture')
    gallery.keep_gallery(report, tmp_path / 'nano')
    kept = {p.name: p for p in (tmp_path / 'nano').rglob('*') if p.is_file()}
    names = {'01-train_sft_domain.ipynb', 'report.html', 'items.html', 'report.json', 'README.md'}
    assert set(kept) == names  # a picture of another report would be a false one
    for path in kept.values():
        text = path.read_text()
        assert str(seeds[0].parent) not in text and 'a1B2a1B2' not in text, path
    assert '…/x.jsonl' in kept['01-train_sft_domain.ipynb'].read_text()
    monkeypatch.setattr(gallery, 'LIMIT', 1000)
    with pytest.raises(LabError, match='MB, at most 0; the largest: items.html'):
        gallery.keep_gallery(report, tmp_path / 'nano')
    assert kept['report.html'].exists()


def test_readme_is_the_index_notebook():
    from readme import from_root, readme

    assert (ROOT / 'README.md').read_text() == readme()
    assert from_root('[a](lab/00.ipynb#x) [b](../LOG.md) [c](https://d.e) [f](#g)') == (
        '[a](nbs/lab/00.ipynb#x) [b](LOG.md) [c](https://d.e) [f](#g)'
    )
    assert from_root('[a](b)\n```\nc[0](d)\n```') == '[a](nbs/b)\n```\nc[0](d)\n```'


def test_measured_figures_of_the_readme_come_from_report_json(report, tmp_path):
    from readme import measured

    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano' / 'report.json').write_text(json.dumps(report_json(report)))
    text = measured(tmp_path)
    cell = report.scores['general_bits_per_byte', 'k2_think_dpo'].value
    assert f'{cell.value:.3f}' in text and 'general text, bits per byte' in text
    assert lead(report) in text
    for goal in report.goals:
        assert (f'{goal.says} ({goal.reached})' in text) == (goal.verdict != 'reached')
    assert 'No report' in measured(tmp_path / 'nano')


def test_readme_names_every_notebook_and_scale():
    from k2lab.lab.config import SCALES

    text = (ROOT / 'README.md').read_text()
    assert [p.stem for p in (ROOT / 'nbs').glob('[0-9]*.ipynb') if f'`{p.stem}`' not in text] == []
    assert all(f'`{s}`' in text for s in SCALES)
