"""The same rows in one batch or in many make the same update, whatever the loss; a loss that is no number stops."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from k2lab.lab.config import LabError
from k2lab.models.load import DEFAULT_LOADING, Loading

CUTS = [(4, 2), (2, 4), (1, 8)]  # rows in a batch, batches in an update
TEXTS = ['the graph G has nodes and edges, the path from a to b'] * 4
WORDS = 'the graph G has nodes and edges, the path from a to b'.split()
# prompt, chosen and rejected reply in words
SIZES = [
    (1, 11, 14),
    (1, 6, 24),
    (6, 24, 40),
    (3, 1, 2),
    (9, 17, 3),
    (2, 33, 1),
    (5, 2, 19),
    (4, 9, 9),
]
SIZES += [(2, 3, 5), (7, 28, 4), (1, 1, 30)]  # three rows are left for a last update


@dataclass
class Bench:
    "What a training needs of a job, in a folder."

    folder: Path
    seed: int = 0
    record: dict = field(default_factory=dict)
    cfg: Any = None
    lines: list = field(default_factory=list)

    def log(self, **row):
        self.lines.append(row)

    def check(self, name, ok, detail=''):
        assert ok


def words(n: int, at: int) -> str:
    "`n` words, other ones at each place."
    return ' '.join(WORDS[(at + 5 * i) % len(WORDS)] for i in range(n))


@pytest.fixture(scope='module')
def tok():
    from k2lab.text.tokenizer import build_tokenizer

    return build_tokenizer(TEXTS, 340)


def ids_of(tok) -> list:
    "Preference pairs of very different lengths, as ids."
    from k2lab.training.metrics import pair_ids

    keys = ('prompt', 'chosen', 'rejected')
    rows = [
        dict(zip(keys, (words(n, i + j) for j, n in enumerate(s)))) for i, s in enumerate(SIZES)
    ]
    return pair_ids(tok, rows, 'S')


@pytest.fixture(scope='module')
def pairs(tok) -> list:
    return ids_of(tok)


def options(batch: int, accumulate: int, **more) -> dict:
    """Trainer options for a comparison: rows in order, a constant rate, every loss logged.

    Adam divides by the size of a gradient, so with a tiny epsilon the rounding of gradients near zero shows whole."""
    return dict(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy='sequential',
        lr_scheduler_type='constant',
        num_train_epochs=1,
        learning_rate=1e-3,
        adam_epsilon=1e-6,
        logging_steps=1,
        bf16=False,
        **more,
    )


@dataclass
class Moved:
    "A trained model's weights, where they started, and the losses on the way."

    start: Any  # tensors
    end: Any
    losses: list


def weights_of(model):
    import torch

    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def apart(one: Moved, two: Moved) -> float:
    "The distance of two results over the way that the first moved."
    return float((one.end - two.end).norm() / (one.end - one.start).norm())


def prefer(folder: Path, tok, pairs: list, trainer: dict, load: Loading = DEFAULT_LOADING) -> Moved:
    "DPO of a small random K2 on pairs."
    from k2lab.models.load import small_model
    from k2lab.training.trainer import fit_dpo

    job, model = Bench(folder), small_model('k2', 'smoke', tok)
    start = weights_of(model)
    reference = None if load.lora_rank else small_model('k2', 'smoke', tok)
    trained: Any = fit_dpo(job, model, reference, tok, pairs, trainer, load)
    model = trained.merge_and_unload() if load.lora_rank else trained
    return Moved(start, weights_of(model), [row['loss'] for row in job.lines])


# every loss of TRL 1.14 that does not sort the pairs of a batch
OTHERS = [
    'sigmoid',
    'hinge',
    'ipo',
    'exo_pair',
    'nca_pair',
    'robust',
    'bco_pair',
    'sppo_hard',
    'apo_zero',
]
OTHERS += ['apo_down', 'discopop', 'sigmoid_norm', 'sft']
LOSSES = {
    'shipped': dict(loss_type=['sigmoid_norm', 'sft'], loss_weights=[1.0, 1.0], beta=2.0),
    'sft': dict(loss_type=['sft']),
    'all': dict(loss_type=OTHERS, beta=1.0, label_smoothing=0.1),
}


@pytest.mark.parametrize('loss', LOSSES)
def test_a_preference_update_is_the_same_however_its_batch_is_cut(loss, tok, pairs, tmp_path):
    more = LOSSES[loss]
    whole = prefer(tmp_path / 'whole', tok, pairs, options(8, 1, **more))
    for batch, accumulate in CUTS:
        cut = prefer(tmp_path / f'{batch}', tok, pairs, options(batch, accumulate, **more))
        assert apart(whole, cut) < 1e-4
        assert cut.losses == pytest.approx(whole.losses, rel=1e-6)


def test_an_adapter_too(tok, pairs, tmp_path):
    load = Loading(lora_rank=4, adapt=('attention',))
    whole, cut = (
        prefer(tmp_path / f'{b}', tok, pairs, options(b, 8 // b, **LOSSES['shipped']), load)
        for b in (8, 1)
    )
    assert apart(whole, cut) < 1e-4


def examples(tok) -> list:
    "Conversations of very different lengths."
    from k2lab.text.masks import encode_row

    rows = [dict(prompt=words(p, i), response=words(c, i)) for i, (p, c, _) in enumerate(SIZES)]
    return [encode_row(tok, row, 'S') for row in rows]


def supervise(folder: Path, tok, trainer: dict, room: int) -> Moved:
    "SFT of a small random K2."
    from k2lab.models.load import small_model
    from k2lab.training.trainer import fit_sft

    job, model = Bench(folder), small_model('k2', 'smoke', tok)
    start = weights_of(model)
    model = fit_sft(job, model, tok, examples(tok), trainer, room=room)
    return Moved(start, weights_of(model), [row['loss'] for row in job.lines])


@pytest.mark.parametrize(
    'loss, room', [('chunked_nll', 0), ('chunked_nll', 80), ('nll', 0), ('dft', 80)]
)
def test_a_supervised_update_is_the_same_too(loss, room, tok, tmp_path):
    whole, cut = (
        supervise(tmp_path / f'{b}', tok, options(b, 4 // b, loss_type=loss), room) for b in (4, 1)
    )
    assert len(whole.losses) > 1
    assert apart(whole, cut) < 1e-4
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)


def ruin(model):
    "Make one weight of a model no number."
    import torch

    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = float('nan')


@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('kind', ['sft', 'dpo'])
def test_a_loss_that_is_no_number_stops_the_training(kind, accumulate, tok, pairs, tmp_path):
    from k2lab.models.load import small_model
    from k2lab.training.trainer import fit_dpo, fit_sft

    job, model = Bench(tmp_path), small_model('k2', 'smoke', tok)
    ruin(model)
    trainer = options(4 // accumulate, accumulate) | dict(logging_steps=2, num_train_epochs=9)
    with pytest.raises(LabError, match='step 2: the loss is nan'):
        if kind == 'sft':
            fit_sft(job, model, tok, examples(tok), trainer)
        else:
            fit_dpo(job, model, small_model('k2', 'smoke', tok), tok, pairs, trainer)
    assert not job.lines
    assert not list(tmp_path.rglob('checkpoint-*'))


def test_a_rate_that_ruins_the_weights_stops_the_training(tok, tmp_path):
    trainer = options(4, 1) | dict(learning_rate=1e30, num_train_epochs=9, max_grad_norm=0.0)
    with pytest.raises(LabError, match='at step 1. Lower trainer.learning_rate'):
        supervise(tmp_path, tok, trainer, 0)


def test_the_filter_that_would_hide_it_is_refused(tok, tmp_path):
    with pytest.raises(LabError, match='logging_nan_inf_filter'):
        supervise(tmp_path, tok, options(4, 1, logging_nan_inf_filter=True), 0)


@pytest.fixture
def own(tmp_path, monkeypatch):
    "Runs a stage at smoke scale on rows of one's own: `own(stage, {name: rows, or None for no file}, **changes)`."
    import yaml

    from k2lab.lab.job import stage_module, start

    configs = tmp_path / 'configs'
    shutil.copytree(Path(__file__).parent.parent / 'configs', configs)
    monkeypatch.setenv('K2LAB_LAB_CONFIGS_PATH', str(configs))
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))

    def run(stage: str, files: dict, **changes):
        env = yaml.safe_load((configs / 'env.yaml').read_text())
        for name, rows in files.items():
            if rows is None:
                del env['scales']['smoke']['data'][name]
                continue
            path = tmp_path / f'{name}.jsonl'
            path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
            env['scales']['smoke']['data'][name] = str(path)
        (configs / 'env.yaml').write_text(yaml.safe_dump(env))
        job = start(stage, 'smoke', None, changes)
        stage_module(stage).train(job)
        return job

    return run


def sums(n: int, more: int = 1) -> list:
    "Questions and answers without a family, as a user would write them; `more` answers to each."
    return [
        dict(instruction=f'What is {i} plus {k}?', input='', output=str(i + k))
        for i in range(n)
        for k in range(more)
    ]


def shown(job) -> dict:
    return {c['name']: c['detail'] for c in job.record['checks']}


def test_own_rows_without_a_family_complete(own):
    files = dict(domain_sft=sums(40), domain_questions_dev=sums(12))
    measures = ['domain_questions']
    job = own(
        'train_sft_domain',
        files,
        mix=dict(domain_sft='all', domain=None, general=None),
        measures=measures,
    )
    assert job.record['data'] == {'domain_sft': job.record['data']['domain_sft']}
    data = job.record['data']['domain_sft']
    assert (data['read'], data['epochs'], data['examples'], data['asked']) == (40, 1.0, 40, 'all')
    line = next(m for m in job.record['metrics'] if m['measure'] == 'domain_questions')
    assert (line['n'], line['baselines']['few_shot']['n']) == (12, 12)


def test_a_baseline_without_examples_is_left_out_and_said(own):
    questions = [dict(row, family='sums') for row in sums(12)]
    files = dict(domain_sft=sums(40), domain_questions_dev=questions)
    job = own('train_sft_domain', files, measures=['domain_questions'])
    assert shown(job)['few-shot baseline left out'].startswith('0 solved examples of family sums')
    assert 'few_shot' not in job.record['metrics'][0]['baselines']


def test_a_small_file_is_not_repeated_unasked(own):
    files, mix = dict(domain_sft=sums(40)), dict(domain_sft=5000)
    with pytest.raises(LabError, match='has 40 rows, so this is 125 passes .* raise max_epochs'):
        own('train_sft_domain', files, mix=mix, measures=[])
    job = own('train_sft_domain', files, mix=dict(domain_sft=100), measures=[], max_epochs=3)
    assert job.record['data']['domain_sft']['read'] == 40
    assert job.record['data']['domain_sft']['epochs'] == 2.5
    assert shown(job)['domain_sft: rows trained more than once'] == '40 rows, 2.5 passes'


def test_a_held_out_loss_is_measured_and_its_rows_are_not_trained(own):
    rows = [
        dict(r, instruction=f'{r["instruction"][:12]}?') for r in sums(20, 2)
    ]  # two answers to a question
    job = own(
        'train_sft_domain',
        dict(domain_sft=rows),
        mix=dict(domain_sft='all'),
        heldout=0.2,
        measures=[],
    )
    line = next(m for m in job.record['metrics'] if m['measure'] == 'heldout_loss')
    data = job.record['data']
    assert data['domain_sft']['held_out'] == data['held out']['read'] == line['n']
    assert data['domain_sft']['examples'] + line['n'] == 40
    assert line['low'] < line['after'] < line['high']
    assert line['after'] < line['before']


def test_rows_of_a_held_out_file_are_taken_out_of_training(own):
    files = dict(domain_sft=sums(40), own_eval=sums(6))
    job = own(
        'train_sft_domain', files, mix=dict(domain_sft='all'), heldout='own_eval', measures=[]
    )
    assert job.record['data']['domain_sft']['held_out'] == 6
    assert job.record['data']['own_eval']['read'] == 6
    with pytest.raises(LabError, match='all of its 40 rows are held out'):
        own(
            'train_sft_domain', files, mix=dict(domain_sft='all'), heldout='domain_sft', measures=[]
        )


def test_rows_that_are_too_long_are_said_or_refused(own):
    rows = [*sums(39), dict(instruction='Count.', input='', output='1 ' * 600)]
    job = own('train_sft_domain', dict(domain_sft=rows), mix=dict(domain_sft='all'), measures=[])
    assert shown(job)['domain_sft: rows left out'].startswith('1 of 40: 1 longer than 256 tokens')
    with pytest.raises(LabError, match='at most max_dropped=0.05 of them'):
        own('train_sft_domain', dict(domain_sft=rows[30:]), mix=dict(domain_sft='all'), measures=[])


def test_missing_data_of_a_measure_are_said_at_once(own):
    with pytest.raises(LabError, match='or leave domain_questions out of measures'):
        own('train_sft_domain', dict(domain_questions_dev=None))


def preferences(n: int) -> list:
    return [
        dict(prompt=words(3, i), chosen=words(5, i), rejected=words(8, i + 1)) for i in range(n)
    ]


def test_length_holds_for_pairs_and_their_control(own):
    rows = preferences(20)
    rows[3] = dict(rows[3], rejected=words(400, 0))
    job = own('run_dpo_reasoning', dict(dpo_pairs=rows), measures=[])
    data = job.record['data']['dpo_pairs']
    assert (data['read'], data['rows'], data['dropped'], data['equal']) == (20, 19, 1, 0)
    assert shown(job)['dpo_pairs: rows left out'].startswith('1 of 20: 1 longer than 256 tokens')
    assert data['longest'] > 400
    with pytest.raises(LabError, match='1 of 20 rows would be left out'):
        own('run_dpo_reasoning', dict(dpo_pairs=rows), measures=[], max_dropped=0.01)


def test_a_pair_of_equal_replies_is_refused(own):
    rows = preferences(20)
    rows[5] = dict(rows[5], rejected=rows[5]['chosen'])
    with pytest.raises(LabError, match='nothing to learn'):
        own('run_dpo_reasoning', dict(dpo_pairs=rows), measures=[])


TWO = """
import sys
sys.path.insert(0, {tests!r})
import test_losses as t
import torch
from pathlib import Path
from k2lab.text.tokenizer import build_tokenizer

tok = build_tokenizer(t.TEXTS, 340)
moved = t.prefer(Path({folder!r}), tok, t.ids_of(tok)[:8], t.options(2, 2, **t.LOSSES['shipped']))
torch.save(moved, {folder!r} + '/' + __import__('os').environ['RANK'])
"""


def test_two_processes_make_the_update_of_one(tok, pairs, tmp_path):
    import torch

    root = Path(__file__).parent.parent
    script = tmp_path / 'two.py'
    script.write_text(TWO.format(tests=str(root / 'tests'), folder=str(tmp_path)))
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file']
    launch += [str(root / 'configs/accelerate/cpu.yaml'), str(script)]
    done = subprocess.run(launch, cwd=root, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    one = prefer(tmp_path / 'one', tok, pairs[:8], options(8, 1, **LOSSES['shipped']))
    for rank in '01':
        two = torch.load(tmp_path / rank, weights_only=False)
        assert apart(one, two) < 1e-4


def test_conversations_are_held_out_by_their_first_question(own):
    talk = lambda n, k: dict(
        messages=[
            dict(role='user', content=f'What is {n}?'),
            dict(role='assistant', content=f'{n}, {k}'),
            dict(role='user', content='And one more?'),
            dict(role='assistant', content=str(n + 1)),
        ]
    )
    rows = [talk(n, k) for n in range(10) for k in range(2)]
    job = own('train_sft_domain', dict(domain_sft=rows), mix=dict(domain_sft='all'), heldout=0.1)
    assert job.record['data']['held out']['read'] == 2
    assert shown(job)['few-shot baseline left out'].startswith('0 solved examples')
