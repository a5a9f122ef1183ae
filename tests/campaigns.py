"""Campaigns of made-up runs for the tests of the report: records and items as the stages leave them,
with abilities that are set here, so that what the report says can be checked against them.
"""

import json
import random
from pathlib import Path

from k2lab.tasks.items import compared_line, own_line, read_items, write_items

# checkpoint: stage, what it started from, shares of right answers (domain, reasoning), bits per byte
CHECKPOINTS = {
    'Kimi-K2-Base': ('', '', 0.02, 0.01, 1.69, 1.36),
    'k2_domain_pretrain': ('train_continual_pretrain', 'Kimi-K2-Base', 0.03, 0.02, 1.47, 1.36),
    'k2_domain_instruct': ('train_sft_domain', 'k2_domain_pretrain', 0.72, 0.03, 1.49, 1.38),
    'k2_reason_sft': ('train_sft_reasoning', 'k2_domain_instruct', 0.70, 0.86, 1.55, 1.40),
    'k2_think_dpo': ('run_dpo_reasoning', 'k2_reason_sft', 0.71, 0.88, 1.55, 1.40),
    'k2_student_7b': ('distill_to_student', 'Qwen2.5-7B', 0.66, 0.82, 1.70, 1.50),
}
FAMILIES = ('after', 'arity', 'default', 'describe', 'summary')
PUZZLES = ('chain', 'compare', 'count', 'sort')


def answered(measure: str, n: int, share: float, seed: int, name: str) -> list[dict]:
    "Items of questions: the same luck for each item and seed, so that checkpoints are paired."
    domain, rng, own = measure == 'domain_questions', random.Random(seed), random.Random(name)
    families = FAMILIES if domain else PUZZLES
    items = []
    for i in range(n):
        luck = 0.9 * rng.random() + 0.1 * own.random()
        family = families[i % len(families)]
        item = dict(
            item=f'{measure[:3]}{seed}{i:012d}',
            group=f'networkx.f{i // 4}' if domain else family,
            family=family,
            prompt=f'{i:016d}',
            question=f'<{measure}> no. {i} & more?',
            answer=str(i),
            reply=f'<think>{i}</think>{i if luck < share else -i}',
            right=luck < share,
            tokens=20 + rng.randrange(30) - (6 if name == 'k2_think_dpo' else 0),
            cut=own.random() < 0.004,
        )
        items.append(item)
    return items


def texts(measure: str, n: int, bits: float, seed: int, name: str) -> list[dict]:
    "Items of documents."
    rng, own = random.Random(seed), random.Random(name)
    out = []
    for i in range(n):
        size, hard = rng.randrange(400, 3000), rng.gauss(0, 0.15)
        item = dict(item=f'{measure[:3]}{seed}{i:012d}', group=f'doc{i}', family='all')
        out.append(item | dict(bits=size * (bits + hard + own.gauss(0, 0.03)), bytes=size))
    return out


def counts(items: list[dict], what: str) -> list[dict]:
    "The items of the length of replies (`tokens`) or of what was cut off (`cut`), from an accuracy's."
    return [{k: i[k] for k in ('item', 'group', 'family', what)} for i in items]


def measured(name: str, n: int, seed: int) -> dict[str, list]:
    "`{measure: items}` of a checkpoint."
    domain, reasoning, own_bits, general_bits = CHECKPOINTS[name][2:]
    reasoned = answered('reasoning_verified', n, reasoning, seed, name)
    return {
        'domain_questions': answered('domain_questions', n, domain, seed, name),
        'reasoning_verified': reasoned,
        'reasoning_tokens': counts(reasoned, 'tokens'),
        'cut': counts(reasoned, 'cut'),
        'domain_bits_per_byte': texts('domain_bits_per_byte', n // 4, own_bits, seed, name),
        'general_bits_per_byte': texts('general_bits_per_byte', n // 4, general_bits, seed, name),
    }


def metric(stage: str, measure: str, before, after, **more) -> dict:
    "A line of metrics that has no items."
    line = dict(stage=stage, measure=measure, before=before, after=after)
    return line | dict(low=None, high=None, n=400, seed=0) | more


def once(folder: Path, key: str, items: list[dict]):
    "Leave items in a run's folder, unless they are there."
    if key not in read_items(folder):
        write_items(folder, key, items)


def scores(folder: Path, stage: str, name: str, other: str, n: int, seed: int, side: str) -> list:
    "The lines of a checkpoint against another, with their items in the run's folder."
    mine = measured(name, n, seed)
    theirs = measured(other, n, seed) if other in CHECKPOINTS else {}
    lines = []
    for measure, items in mine.items():
        key, before_key = f'{name}.{measure}.{side}', f'{other}.{measure}.{side}'
        line = dict(stage=stage, measure=measure, seed=seed, checkpoint=name, side=side, key=key)
        once(folder, key, items)
        line |= own_line(items)
        if theirs:
            once(folder, before_key, theirs[measure])
            line |= compared_line(theirs[measure], items)
            line |= dict(compared_with=other, before_key=before_key)
        lines.append(line)
    return lines


def record(stage, metrics=(), saves=None, parents=(), status='complete', scale='nano', **config):
    "A run's record, as the lab writes it."
    return dict(
        stage=stage,
        scale=scale,
        campaign='c',
        seed=config.pop('seed', 0),
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


def add(home: Path, n: int, r: dict, samples=(), steps=(), card=None) -> Path:
    "Leave a run in a campaign's folder."
    folder = home / f"2026-11-23.{n}-{r['stage']}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (('samples', samples), ('metrics', steps)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in rows))
    if card:
        (folder / 'card.json').write_text(json.dumps(card))
    (folder / 'run.json').write_text(json.dumps(r))
    return folder


def parent(name: str, runs: dict[str, str]) -> dict:
    "A parent as a record names it."
    place = None if name in runs else 'builtin:k2-nano-base'
    return dict(name=name, campaign='c', run=runs.get(name), place=place, sha256='0' * 64)


def logged(steps: int) -> list[dict]:
    "Lines of metrics.jsonl."
    return [
        dict(
            phase='train', step=s, loss=3 / s + 0.3, lr=1e-3 / s, grad_norm=1 + 1 / s, tokens_s=9000
        )
        for s in range(1, steps + 1)
    ]


def train(home: Path, at: int, name: str, runs: dict[str, str], n: int, seed: int):
    "Leave the run of a training stage, with its scores on the development side."
    stage, start = CHECKPOINTS[name][:2]
    folder = home / f'2026-11-23.{at}-{stage}'
    folder.mkdir(parents=True)
    lines = scores(folder, stage, name, start, n, seed + 100, 'development')
    config: dict = dict(init_from=start, seed=seed)
    if stage == 'distill_to_student':
        config |= dict(teacher='k2_think_dpo')
        own = dict(checkpoint=name, side='development')
        lines.append(metric(stage, 'parameters', 2_560_768, 854_144, n=None, **own))
        lines.append(metric(stage, 'generate_tokens_s', 2796.0, 5415.0, n=3, **own))
    if stage == 'run_dpo_reasoning':
        over = dict(value=0.02, low=0.005, high=0.035)
        lines[1] |= dict(control=lines[1]['after'] - 0.02, over_control=over)
        pairs = [answered('preference_accuracy', n, share, seed, name) for share in (0.8, 0.9)]
        plain = ('item', 'group', 'family', 'question', 'right')
        pairs = [[{k: i[k] for k in plain} for i in items] for items in pairs]
        for key, items in zip(('before', 'now'), pairs):
            write_items(folder, key, items)
        line = metric(stage, 'preference_accuracy', 0, 0, checkpoint=name, side='development')
        line |= own_line(pairs[1]) | compared_line(*pairs)
        lines.append(line | dict(key='now', before_key='before', compared_with=start))
    r = record(stage, lines, name, [parent(start, runs)], **config)
    r['training'] = {
        'train': dict(steps=9, rows=90, tokens=9000, trained_tokens=4000, tokens_s=9000)
    }
    add(home, at, r, steps=logged(9))
    runs[name] = folder.name


def campaign(home: Path, seed: int = 0, n: int = 400) -> Path:
    "A whole campaign: a run of each training stage, then one evaluation of all checkpoints."
    runs = {}
    for at, name in enumerate(list(CHECKPOINTS)[1:], 1):
        train(home, at, name, runs, n, seed)
    folder = home / '2026-11-23.6-evaluate'
    folder.mkdir()
    lines = []
    for name, (_, start, *_) in list(CHECKPOINTS.items())[1:]:
        other = 'k2_think_dpo' if name == 'k2_student_7b' else start
        lines += scores(folder, 'evaluate', name, other, n, seed, 'evaluation')
    parents = [parent(name, runs) for name in CHECKPOINTS]
    add(home, 6, record('evaluate', lines, parents=parents, seed=seed))
    return home
