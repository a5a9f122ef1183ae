"Intervals hold the truth as often as they say, whatever the groups; small cases are worked out by hand."

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from k2lab.lab.config import LabError
from k2lab.tasks import stats

EFFECTS = (0, 0.5, 1, 1.5)  # standard deviation of the effect of a group, in log-odds
DEMO = Path(__file__).parents[2] / 'shared/cases/evaluation/items_demo.csv'


def held(groups, odds, effect, interval, rounds=1000, seed=1) -> float:
    "How often `interval(right)` holds the mean over all groups that could have been drawn."
    rng, hits, units = np.random.default_rng(seed), 0, max(groups) + 1
    chance = lambda effects: 1 / (1 + np.exp(-(odds + effects[..., groups])))
    truth = chance(rng.normal(0, effect, (4000, units))).mean()
    for _ in range(rounds):
        e = interval(rng.random(len(groups)) < chance(rng.normal(0, effect, units)))
        hits += e.low <= truth <= e.high
    return hits / rounds


def uneven(groups: int, items: int) -> np.ndarray:
    "The group of each item, some groups with many items and some with few."
    rng = np.random.default_rng(5)
    return stats.codes(rng.choice(groups, items, p=rng.dirichlet([1.5] * groups)))


@pytest.mark.parametrize('effect', EFFECTS)
def test_accuracy_of_five_families_about_122_functions(effect):
    functions, families = uneven(122, 450), np.arange(450) % 5
    odds = np.log([6.5, 2.1, 9.0, 1.3, 0.17])[families]
    clustered = lambda right: stats.mean_estimate(right, functions, families)
    assert 0.93 <= held(functions, odds, effect, clustered) <= 0.97


@pytest.mark.parametrize('share', [0.1, 0.6])
@pytest.mark.parametrize('groups,items', [(8, 60), (15, 150), (30, 300)])
def test_accuracy_of_few_groups(groups, items, share):
    of, odds = np.arange(items) % groups, np.full(items, math.log(share / (1 - share)))
    for effect in (0, 1):
        found = held(of, odds, effect, lambda right: stats.mean_estimate(right, of), 500)
        assert 0.93 <= found <= 0.985, effect


@pytest.mark.parametrize('share', [0.02, 0.98])
def test_accuracy_near_none_and_all(share):
    of, odds = np.arange(2000) % 500, np.full(2000, math.log(share / (1 - share)))
    for effect in (0, 1.5):
        found = held(of, odds, effect, lambda right: stats.mean_estimate(right, of), 500)
        assert 0.93 <= found <= 0.98, effect


@pytest.mark.parametrize('documents', [8, 20, 50, 192])
def test_bits_per_byte_of_few_documents(documents):
    rng = np.random.default_rng(2)

    def draw(n):
        size = np.round(rng.lognormal(6.8, 0.8, n))
        return size * 1.7 * np.exp(rng.normal(0, 0.3, n)) * (size / 1000) ** -0.15, size

    bits, size = draw(1_000_000)
    truth, hits = bits.sum() / size.sum(), 0
    for _ in range(1000):
        e = stats.ratio_estimate(*draw(documents))
        hits += e.low <= truth <= e.high
    assert 0.93 <= hits / 1000 <= 0.97


def two_models(rng, groups, effect, gain, items):
    "Right and wrong of two models whose answers are alike, with a random gain of each group."
    own = rng.normal(0, 1, items) + rng.normal(0, effect, groups.max() + 1)[groups] + 0.5
    better = own + gain + rng.normal(0, effect / 2, groups.max() + 1)[groups]
    draw = rng.random(items)
    return draw < 1 / (1 + np.exp(-own)), draw < 1 / (1 + np.exp(-better))


@pytest.mark.parametrize('gain', [0, 0.4])
@pytest.mark.parametrize('groups,items', [(15, 150), (122, 450)])
def test_paired_change_and_share_by_function(groups, items, gain):
    rng, of = np.random.default_rng(3), np.arange(items) % groups
    many = np.arange(400_000) % 100_000
    before, after = two_models(rng, many, 0.8, gain, len(many))
    change, share, hits = after.mean() - before.mean(), after.mean() / before.mean(), [0, 0]
    for _ in range(1000):
        pair = two_models(rng, of, 0.8, gain, items)
        e = stats.paired_change(*pair, of)
        hits[0] += e.low <= change <= e.high
        e = stats.paired_ratio(*pair, of)
        hits[1] += e.low <= share <= e.high
    assert all(0.93 <= h / 1000 <= (0.97 if groups > 100 else 0.98) for h in hits), hits


def test_by_hand():
    # groups (3 of 4), (1 of 2), (0 of 2): leaving one out gives 1/4, 3/6, 4/6
    e = stats.mean_estimate([1, 1, 1, 0, 1, 0, 0, 0], list('aaaabbcc'))
    left = [1 / 4, 3 / 6, 4 / 6]
    mean = sum(left) / 3
    assert (e.value, e.n, e.groups) == (0.5, 8, 3)
    assert math.isclose(e.se, math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in left)))
    # n gains of 2, none, and -1: mean .5, sd of (2, 0, 0, 0), se 1/2, t of 3 degrees 3.1824
    e = stats.paired_change([5, 5, 5, 5], [7, 5, 5, 5])
    assert (e.value, e.se) == (0.5, 0.5) and math.isclose(e.high, 0.5 + 3.182446 / 2, rel_tol=1e-5)
    # change of bits per byte, leaving out each document: -10/200, 0, -10/100
    e = stats.paired_ratio_change([110, 300], [100, 300], [100, 200])
    assert math.isclose(e.value, -10 / 300) and math.isclose(e.se, math.sqrt(0.5 * 2 * 0.05**2))
    # twice as long in one group, equally long in the other: ln of 1 and of 2
    e = stats.paired_ratio([10, 10], [20, 10])
    assert math.isclose(e.value, 1.5) and math.isclose(e.se, 1.5 * math.log(2) / 2)


def test_a_family_that_is_its_own_group_was_not_drawn():
    right, family = [1, 1, 1, 0] * 10 + [0, 0, 1, 0] * 10, ['sort'] * 40 + ['chain'] * 40
    as_items = stats.mean_estimate(right, None, family)
    assert stats.mean_estimate(right, family, family) == as_items
    assert stats.mean_estimate(right, family).groups == 2
    assert stats.mean_estimate(right, ['one'] * 80).groups == 80


def test_the_smallest_sets_say_nothing_and_do_not_break():
    assert stats.mean_estimate([1]).low > 0 - 1e-9 and stats.mean_estimate([1]).high == 1
    lone = stats.ratio_estimate([3.0], [2])
    assert (lone.low, lone.high) == (-math.inf, math.inf)
    assert stats.verdict(lone, 1.0) == 'cannot be said' and not stats.refused(lone)
    assert stats.items_needed(lone, 1.0) is None
    e = stats.mean_estimate([1, 0, 1], None, ['a', 'b', 'b'])
    assert e.groups == 3 and e.low < e.value < e.high


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: stats.mean_estimate([]), 'no items'),
        (lambda: stats.mean_estimate([1, 0], None, ['a']), '2 and 1 entries'),
        (lambda: stats.paired_change([1], [1, 2]), '2 and 1 entries'),
        (lambda: stats.ratio_estimate([1, 2], [1]), '2 and 1 entries'),
        (lambda: stats.ratio_estimate([1], [0]), 'the lower sum is zero'),
        (lambda: stats.paired_ratio([0, 0], [1, 1]), 'a share of nothing'),
    ],
)
def test_refused_input(call, message):
    with pytest.raises(LabError, match=message):
        call()


def demo_items(checkpoint: str, measure: str) -> list[dict]:
    with open(DEMO, newline='') as f:
        rows = [r for r in csv.DictReader(f)]
    rows = [r for r in rows if (r['checkpoint'], r['measure']) == (checkpoint, measure)]
    return sorted(rows, key=lambda r: int(r['item']))


def demo_pair(before: str, after: str, measure: str) -> tuple[list, list, list]:
    a, b = demo_items(before, measure), demo_items(after, measure)
    right = lambda rows: [int(r['right']) for r in rows]
    return right(a), right(b), [r['function'] or i for i, r in enumerate(a)]


@pytest.mark.skipif(not DEMO.exists(), reason='the verdicts of a demo run are not here')
def test_a_demo_as_the_bootstrap_had_it():
    "Within .004 of 95 % intervals from resampling, which were made by another program."
    close = lambda e, *want: np.allclose((e.value, e.low, e.high), want, atol=0.004)
    before, after, _ = demo_pair('k2_reason_sft', 'k2_think_dpo', 'reasoning_verified')
    assert close(stats.paired_change(before, after), 0.011, -0.011, 0.033)
    before, after, function = demo_pair('k2_domain_instruct', 'k2_reason_sft', 'domain_questions')
    assert close(stats.paired_change(before, after, function), -0.004, -0.053, 0.042)
    teacher, student, _ = demo_pair('k2_think_dpo', 'k2_student_7b', 'domain_questions')
    assert close(stats.paired_ratio(teacher, student), 0.890, 0.833, 0.949)
    assert close(stats.mean_estimate(teacher, function), 0.629, 0.572, 0.686)
