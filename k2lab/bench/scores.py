"""The lab's own questions asked by lm-eval, beside the lab's own score: `python -m k2lab.bench scores`."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lab.bench.harness import median_and_range
from k2lab.lab.config import LabError, lab_path, load_env
from k2lab.lab.records import saved_by

SCALE, CHECKPOINT = 'nano', 'k2_think_dpo'
ROOM = 160  # longest reply in tokens, on both sides
SETS = ('domain_questions', 'reasoning_eval')


@dataclass(frozen=True)
class Side:
    "What one side made of a set of questions."

    right: list[bool]
    replies: list[str]
    seconds: float


def place_in(campaign: str, name: str, suffix: str = '') -> Path:
    "The path of what a campaign saved under a name; `LabError` if it has none."
    folder = saved_by(lab_path('runs') / campaign, name, SCALE)
    if folder is None:
        raise LabError(f'campaign {campaign} has no {name} at {SCALE}; run `make demo` first')
    return folder / f'{name}{suffix}'


def by_lab(model, tok, rows: list, system: str) -> Side:
    "Replies by the lab's `generate`, read by its grader; a reply that was cut is wrong."
    from k2lab.models.load import generate
    from k2lab.tasks.verify import verify
    from k2lab.training.metrics import prompts_of

    began = time.monotonic()
    replies = [r for (r,) in generate(model, tok, prompts_of(tok, rows, system), ROOM)]
    right = [not r.cut and verify(row, r.text) for row, r in zip(rows, replies)]
    return Side(right, [r.text for r in replies], time.monotonic() - began)


def graded(doc: dict, replies: list[str]) -> dict[str, float]:
    "A reply to a question of the lab, read by its grader."
    from k2lab.tasks.verify import verify

    return dict(verified=float(verify(json.loads(doc['row']), replies[0])))


def as_task(name: str, rows: list) -> dict:
    "Questions of the lab as a task of lm-eval."
    from datasets import Dataset

    from k2lab.tasks.verify import prompt_of

    docs = [dict(question=prompt_of(row), row=json.dumps(row)) for row in rows]
    return dict(
        task=name,
        custom_dataset=lambda **_: dict(test=Dataset.from_list(docs)),
        test_split='test',
        output_type='generate_until',
        doc_to_text='{{question}}',
        doc_to_target='',
        process_results=graded,
        generation_kwargs=dict(max_gen_toks=ROOM, do_sample=False, until=[]),
        metric_list=[dict(metric='verified', aggregation='mean', higher_is_better=True)],
    )


def by_lm_eval(model, tok, name: str, rows: list, system: str, home: Path) -> Side:
    "Replies by lm-eval in the chat format, read by the lab's grader."
    from k2lab.serving.harness import Asking, Session, Tasks, open_checkpoint, task_manager

    began = time.monotonic()
    tasks = Tasks(task_manager(str(home), own_only=True))
    tasks.add(tasks.manager.load([as_task(name, rows)]), None)
    session = Session(tasks, open_checkpoint(name, model, tok, Asking()), system=system, home=home)
    (result,) = session.results()
    if result.why:
        raise LabError(f'{name}: {result.why}')
    samples: list[Any] = sorted(session.samples(name), key=lambda s: s['doc_id'])
    right = [bool(s['verified']) for s in samples]
    return Side(right, [s['resps'][0][0] for s in samples], time.monotonic() - began)


def show(name: str, lab: list[Side], peer: list[Side]):
    "Print both scores of a set, how many replies are the same, and the time."
    ours, theirs = lab[0], peer[0]
    n = len(ours.right)
    shares = [100 * sum(side.right) / n for side in (ours, theirs)]
    same = sum(a == b for a, b in zip(ours.replies, theirs.replies))
    print(f'{name}: {n} questions, {same} replies the same')
    for who, share, sides in (('lab', shares[0], lab), ('lm-eval', shares[1], peer)):
        print(f'  {who:8} {share:5.1f} %   {median_and_range([s.seconds for s in sides], 1)} s')
    print(f'  {"":8} {shares[1] - shares[0]:+5.1f} points', flush=True)


def scores(campaign: str = 'demo', rounds: int = 1):
    "The measured sets of a campaign on its final teacher, by the lab and by lm-eval."
    import tempfile

    from k2lab.models.load import open_model, open_tokenizer
    from k2lab.text.rows import read_rows

    place, system = place_in(campaign, CHECKPOINT), load_env(SCALE)['system']
    model, tok = open_model(place), open_tokenizer(place)
    for name in SETS:
        rows, lab, peer = read_rows(place_in(campaign, name, '.jsonl')), [], []
        for _ in range(rounds):
            lab.append(by_lab(model, tok, rows, system))
            with tempfile.TemporaryDirectory() as home:
                peer.append(by_lm_eval(model, tok, name, rows, system, Path(home)))
        show(name, lab, peer)
