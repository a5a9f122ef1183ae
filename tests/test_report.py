"""The report: which runs it takes, what it says when runs are missing or goals are missed,
and a README that is its notebook.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from k2lab.lab.config import read_yaml
from k2lab.reports.charts import el
from k2lab.reports.page import ancestors, headline, report_html, student_lines
from k2lab.reports.results import (
    KEYS,
    MEASURES,
    TESTS,
    alternatives,
    change,
    for_machines,
    goal_reached,
    goal_results,
    holds,
    line_of,
    measured,
    newest_runs,
)

ROOT = Path(__file__).resolve().parents[1]


def metric(stage, measure, before, after, **more):
    return (
        dict(
            stage=stage,
            measure=measure,
            before=before,
            after=after,
            low=None,
            high=None,
            n=400,
            seed=0,
        )
        | more
    )


def record(stage, metrics=(), saves=None, parents=(), status='complete', scale='nano', **config):
    "A run's record, as the lab writes it."
    return dict(
        stage=stage,
        scale=scale,
        campaign='c',
        seed=0,
        status=status,
        reason='' if status == 'complete' else 'it broke',
        started='2026-11-23T10:00:00+00:00',
        closed='2026-11-23T10:01:00+00:00',
        owner={},
        config=config | ({'saves': saves} if saves else {}),
        code={'commit': 'a' * 40, 'dirty': False},
        hardware={'cpu': 'a cpu', 'cores': 2, 'memory_gib': 8},
        parents=list(parents),
        saves={saves: {'path': saves}} if saves else {},
        metrics=list(metrics),
        checks=[{'name': 'x', 'ok': True, 'detail': ''}],
        timings={},
        wall_s=60.0,
        peak_gib=1.5,
    )


@pytest.fixture
def home(tmp_path):
    "An empty campaign's folder."
    return tmp_path


def add(home, n, r, samples=(), steps=(), card=None):
    "Leave a run in a campaign's folder."
    folder = home / f"2026-11-23.{n}-{r['stage']}"
    folder.mkdir()
    for name, rows in (('samples', samples), ('metrics', steps)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in rows))
    if card:
        (folder / 'card.json').write_text(json.dumps(card))
    (folder / 'run.json').write_text(json.dumps(r))


class Balanced(HTMLParser):
    "Fails on an element that is closed in the wrong place, and collects names."

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ('br', 'meta'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_newest_complete_run_of_each_role_counts(home):
    for n, r in enumerate(
        [
            record('train_sft_domain', saves='k2_a'),
            record('train_sft_domain', saves='k2_a'),
            record('train_sft_domain', saves='k2_a', status='failed'),
            record('prepare_corpus', mode='domain'),
            record('prepare_corpus', mode='reasoning'),
            record('train_sft_domain', saves='k2_a', scale='smoke'),
            record('report'),
        ],
        1,
    ):
        add(home, n, r)
    used, aside = newest_runs(home, 'nano')
    assert sorted(int(Path(r['folder']).name.split('.')[1].split('-')[0]) for r in used) == [
        2,
        4,
        5,
    ]
    assert [(Path(r['folder']).name[11], r['status']) for r in aside] == [
        ('1', 'complete'),
        ('3', 'failed'),
    ]


def test_the_order_is_that_of_the_pipeline_and_of_numbers_not_of_text(home):
    add(home, 10, record('train_continual_pretrain', saves='k2_p'))
    add(home, 9, record('train_sft_domain', saves='k2_d'))
    add(home, 2, record('train_continual_pretrain', saves='k2_p'))
    used, aside = newest_runs(home, 'nano')
    assert [Path(r['folder']).name for r in used] == [
        '2026-11-23.10-train_continual_pretrain',
        '2026-11-23.9-train_sft_domain',
    ] and len(aside) == 1


def test_report_json_has_the_eight_keys_and_one_line_for_the_pipeline(home):
    add(
        home,
        1,
        record(
            'train_sft_domain',
            [
                metric('train_sft_domain', 'domain_questions', 0.1, 0.7),
                metric('train_sft_domain', 'something_else', 1, 2),
            ],
            saves='k2_a',
        ),
    )
    add(
        home,
        2,
        record(
            'evaluate',
            [metric('evaluate', 'domain_questions', 0.1, 0.7, checkpoint='k2_think_dpo')],
        ),
    )
    lines = for_machines(newest_runs(home, 'nano')[0])
    assert all(list(m)[:8] == list(KEYS) and m['measure'] in MEASURES for m in lines)
    assert [(m['measure'], m['after'], m['n']) for m in lines if m['stage'] == 'pipeline'] == [
        ('wall_s', 120.0, 2),
        ('peak_gib', 1.5, 2),
    ]
    assert [m.get('checkpoint') for m in lines if m['measure'] == 'domain_questions'] == [
        None,
        'k2_think_dpo',
    ]
    json.loads(json.dumps(lines, allow_nan=False))


@pytest.mark.parametrize(
    'test, limit, line, answer',
    [
        ('at_least', 0.6, dict(after=0.6), True),
        ('at_least', 0.6, dict(after=0.59), False),
        ('at_least', 0.6, dict(after=None), None),
        ('at_most', 4, dict(after=4.1), False),
        ('from_at_most', 0.1, dict(before=0.1), True),
        ('gain', 0.03, dict(before=0.9, after=0.93), True),
        ('gain', -0.05, dict(before=0.7, after=0.64), False),
        ('gain', 0, dict(after=0.64), None),
        ('ratio_at_most', 0.92, dict(before=2.0, after=1.84), True),
        ('ratio_at_most', 0.92, dict(before=2.0, after=1.85), False),
        ('ratio_at_least', 0.9, dict(before=0, after=0), False),
        ('over_control', 0, dict(after=0.9, control=0.9), True),
        ('over_control', 0, dict(after=0.9), None),
        ('keeps', 0.05, dict(after=0.85, best=0.9), True),
        ('keeps', 0.05, dict(after=0.84, best=0.9), False),
        ('items', 400, dict(n=399), False),
    ],
)
def test_a_test_against_values_worked_out_by_hand(test, limit, line, answer):
    assert holds(line, test, limit) is answer


def test_either_way_reaches_a_goal_and_a_gap_is_not_a_miss():
    goal = dict(
        stage='s',
        any=[
            [dict(measure='reasoning_verified', gain=0.03)],
            [
                dict(measure='reasoning_tokens', ratio_at_most=0.9),
                dict(measure='reasoning_verified', gain=-0.01),
            ],
        ],
    )
    acc = lambda a, b: metric('s', 'reasoning_verified', a, b)
    length = lambda a, b: metric('s', 'reasoning_tokens', a, b)
    assert goal_reached(goal, [acc(0.9, 0.94), length(50, 60)]) is True
    assert goal_reached(goal, [acc(0.9, 0.9), length(50, 45)]) is True
    assert goal_reached(goal, [acc(0.9, 0.85), length(50, 20)]) is False
    assert goal_reached(goal, [acc(0.9, 0.9), length(None, 20)]) is None
    assert goal_reached(goal, []) is None


def test_the_best_earlier_value_is_a_teachers():
    lines = [
        metric('train_sft_domain', 'domain_questions', 0.1, 0.7),
        metric('distill_to_student', 'domain_questions', 0.1, 0.9),
        metric('evaluate', 'domain_questions', 0.1, 0.66, checkpoint='k2_think_dpo'),
    ]
    assert line_of(lines, 'evaluate', 'domain_questions', 'k2_think_dpo')['best'] == 0.7
    assert line_of(lines, 'evaluate', 'domain_questions', 'k2_student_7b') == {}


def test_goals_that_do_not_apply_are_neither_reached_nor_missed():
    goals, lines = (
        [
            dict(stage='pipeline', measure='wall_s', at_most=1, scales=['nano'], says='fast'),
            dict(stage='s', measure='domain_questions', at_least=0.5, says='good'),
        ],
        [metric('s', 'domain_questions', 0.1, 0.4)],
    )
    assert [g['mark'] for g in goal_results(goals, lines, 'smoke', False)] == ['na', 'na']
    assert [g['mark'] for g in goal_results(goals, lines, 'qlora', True)] == ['na', 'missed']
    assert [g['mark'] for g in goal_results(goals, lines, 'nano', True)] == ['open', 'missed']
    assert (
        headline(goal_results(goals, lines, 'qlora', True), [1], 'qlora')
        == '0 of 1 goals reached, 1 not reached, 0 not measured.'
    )


def test_the_stage_file_names_measures_and_tests_that_exist():
    stages = {re.sub(r'^\d+[a-z]?_', '', p.stem) for p in (ROOT / 'nbs').glob('[1-9]*.ipynb')} | {
        'pipeline'
    }
    for goal in read_yaml(ROOT / 'configs/report.yaml')['goals']:
        assert goal['stage'] in stages and goal['says']
        for condition in (c for conditions in alternatives(goal) for c in conditions):
            assert (
                condition['measure'] in MEASURES
                and set(condition) - {'measure'}
                and set(condition) - {'measure'} <= set(TESTS)
            )


def test_differences_are_points_for_shares_and_per_cent_otherwise():
    assert change(metric('s', 'domain_questions', 0.1, 0.7)) == '10.0 % → 70.0 % (+60.0 points)'
    assert change(metric('s', 'domain_bits_per_byte', 2.0, 1.8)) == '2.000 → 1.800 (-10.0 %)'
    assert (
        change(metric('s', 'reasoning_tokens', 0, 5)) == '0.0 → 5.0'
        and change(metric('s', 'wall_s', None, 90)) == '90 s'
    )


def test_a_full_page_is_well_formed_and_needs_nothing_from_outside(home):
    nasty = '</div><script>alert(1)</script> & "quoted"'
    card = dict(
        mode='domain',
        corpora=[
            dict(
                name='domain',
                documents=68,
                bytes=114503,
                licence='BSD-3-Clause',
                origin=nasty,
                removed={'shorter than 80': 16},
            )
        ],
        majority={'all': 0.1, 'default': 0.12},
        copy={'all': 0.3},
    )
    training = dict(
        train=dict(
            steps=4,
            rows=20,
            tokens=1280,
            trained_tokens=1260,
            trained_by_kind=dict(answer=1260),
            ends_of_turn=0,
            padding_share=0.0,
            tokens_s=2570,
            stream_sha256='ab' * 32,
        )
    )
    add(home, 1, record('prepare_corpus', mode='domain'), card=card)
    old = record(
        'train_continual_pretrain',
        [metric('train_continual_pretrain', 'domain_bits_per_byte', 2.0, 1.8, low=1.7, high=1.9)],
        saves='k2_p',
    )
    add(home, 2, old), add(home, 3, old)
    line = metric(
        'train_sft_domain',
        'domain_questions',
        0.1,
        0.7,
        low=0.65,
        high=0.75,
        baseline=dict(majority=0.1, copy=0.3, few_shot=0.2, few_shot_n=150),
        control=0.6,
    )
    sft = record(
        'train_sft_domain',
        [line],
        saves='k2_d',
        parents=[
            dict(name='k2_p', run='2026-11-23.2-train_continual_pretrain', place=None),
            dict(name='Kimi-K2-Base', run=None, place='x'),
        ],
    ) | dict(training=training)
    replies = [dict(when=w, prompt=nasty, text=nasty, ok=w == 'after') for w in ('before', 'after')]
    add(
        home,
        4,
        sft,
        samples=replies,
        steps=[dict(step=i, loss=8 / i, phase='train') for i in (1, 2, 3)],
    )
    add(
        home,
        5,
        record('sample_teacher', saves='dpo_pairs', mode='preferences')
        | dict(sampling=dict(prompts=12, answers=36, right=24, cut=0, dpo_pairs=22)),
    )
    used, aside = newest_runs(home, 'nano')
    text = report_html(used, aside, goal_results([], measured(used), 'nano', True), 'c<1>', 'nano')
    tags = Balanced(text).seen
    assert (
        'script' not in tags
        and 'img' not in tags
        and 'link' not in tags
        and not re.search(r'\b(src|href)=|https?:', text)
    )
    for words in (
        'c&lt;1&gt;',
        '10.0 % → ',
        '70.0 %',
        'since replaced',
        'replaced by a newer run',
        'majority 10.0 %',
        '✓ right',
        '✗ wrong',
        '16 shorter than 80',
        'BSD-3-Clause',
        '22 dpo_pairs',
        'answer 100 %',
        'No complete run of: prepare_corpus (reasoning)',
        'replaced since: train_sft_domain.',
    ):
        assert words in text, words
    assert [Path(r['folder']).name[11] for r in ancestors(used)] == ['1', '2', '3', '4', '5']


def test_an_empty_campaign_is_said_not_crashed_on(home):
    text = report_html(
        *newest_runs(home, 'nano'),
        goal_results(
            [dict(stage='s', measure='domain_questions', at_least=0.5, says='good')],
            [],
            'nano',
            True,
        ),
        'none',
        'nano',
    )
    assert 'no complete runs' in text and Balanced(text) and for_machines([]) == []
    add(home, 1, record('train_sft_domain', saves='k2_d', status='failed'))
    assert 'failed: it broke' in report_html(*newest_runs(home, 'nano'), [], 'none', 'nano')


def test_the_student_is_compared_by_its_evaluation_or_by_its_own_run():
    own = [
        metric('distill_to_student', 'parameters', 10, 4),
        metric('distill_to_student', 'share_of_teacher_domain_questions', 0.8, 0.9),
        metric('distill_to_student', 'domain_questions', 0.0, 0.72),
    ]
    assert [(m['measure'], round(m['after'], 3)) for m in student_lines(own)] == [
        ('domain_questions', 0.72),
        ('parameters', 4),
    ]
    final = own + [metric('evaluate', 'domain_questions', 0.79, 0.71, checkpoint='k2_student_7b')]
    assert [(m['measure'], m['before']) for m in student_lines(final)] == [
        ('parameters', 10),
        ('domain_questions', 0.79),
    ]


def test_text_is_escaped_and_elements_are_not():
    assert (
        el('p', el('b', '<i>'), ' & ', class_='x', stroke_width=2)
        == '<p class="x" stroke-width="2"><b>&lt;i&gt;</b> &amp; </p>'
    )


def test_readme_is_the_index_notebook():
    from readme import from_root, readme

    assert (ROOT / 'README.md').read_text() == readme()
    assert from_root('[a](lab/00.ipynb#x) [b](../LOG.md) [c](https://d.e) [f](#g)') == (
        '[a](nbs/lab/00.ipynb#x) [b](LOG.md) [c](https://d.e) [f](#g)'
    )
    assert from_root('[a](b)\n```\nc[0](d)\n```') == '[a](nbs/b)\n```\nc[0](d)\n```'


def test_readme_names_every_notebook_and_scale():
    from k2lab.lab.config import SCALES

    text = (ROOT / 'README.md').read_text()
    assert [p.stem for p in (ROOT / 'nbs').glob('[0-9]*.ipynb') if f'`{p.stem}`' not in text] == []
    assert all(f'`{s}`' in text for s in SCALES)
