"""Names that collide are refused before the start, numbers that are none end a run, and records are strict JSON."""

import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_losses import Bench

from k2lab.lab.config import LabError, resolve
from k2lab.lab.files import as_json, check_output
from k2lab.lab.job import open_job, prepare, stage_module, start
from k2lab.lab.records import read_run, runs
from k2lab.lab.runner import execute
from k2lab.lab.show import Evidence

# ---- numbers that are none: training -------------------------------------------------------------


TEXT = 'the graph G has nodes and edges, the path from a to b'.split()


@pytest.fixture(scope='module')
def tok():
    from k2lab.text.tokenizer import build_tokenizer

    return build_tokenizer([' '.join(TEXT)] * 4, 340)


def texts(n: int, *lengths: int) -> list[list[str]]:
    "n rows of random words, as many texts of these lengths in each."
    rng = random.Random(0)
    return [[' '.join(rng.choices(TEXT, k=k)) for k in lengths] for _ in range(n)]


def fit(method: str, tok, trainer: dict, job: Bench, model, load=None):
    "Train a model by one of the ways that the lab's stages train."
    from k2lab.models.load import DEFAULT_LOADING, small_model
    from k2lab.text.masks import encode_row
    from k2lab.training.metrics import pair_ids
    from k2lab.training.trainer import fit_dpo, fit_sft

    load = load or DEFAULT_LOADING
    if method.startswith('dpo'):
        keys = ('prompt', 'chosen', 'rejected')
        pairs = pair_ids(tok, [dict(zip(keys, t)) for t in texts(24, 3, 5, 9)], 'S')
        reference = None if load.lora_rank else small_model('k2', 'smoke', tok)
        return fit_dpo(job, model, reference, tok, pairs, trainer, load)
    rows = [dict(prompt=p, response=r) for p, r in texts(24, 3, 9)]
    examples = [encode_row(tok, row, 'S') for row in rows]
    optimizer, room = 'muon' if method == 'muon' else 'adamw', 80 if method == 'packed' else 0
    return fit_sft(job, model, tok, examples, trainer, optimizer, load, room=room)


class Poison:
    "Makes a weight or a gradient of a model no number in its training step `k`; counts the steps."

    def __init__(self, model, what: str, k: int):
        self.what, self.k, self.steps = what, k, 0
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)

    def now(self, layer) -> bool:
        "Whether this is a pass of training, in the step that is poisoned."
        import torch

        return layer.training and torch.is_grad_enabled() and self.steps == self.k

    def before(self, layer, inputs):
        import torch

        self.steps += layer.training and torch.is_grad_enabled()
        if self.what == 'weight' and self.now(layer):
            with torch.no_grad():
                layer.self_attn.o_proj.weight[0, 0] = math.nan

    def after(self, layer, inputs, output):
        if self.what == 'gradient' and self.now(layer):
            output.register_hook(lambda g: g * math.nan)
        return output * math.inf if self.what == 'activation' and self.now(layer) else output


METHODS = ('sft', 'packed', 'lora', 'muon', 'dpo', 'dpo lora')


def seeded(seed: int) -> SimpleNamespace:
    "A way to train, what is poisoned, at which step, and how often is logged."
    rng = random.Random(seed)
    return SimpleNamespace(
        method=METHODS[seed % len(METHODS)],
        what=('weight', 'gradient', 'activation')[seed % 3 if seed < 12 else rng.randrange(3)],
        k=rng.randint(1, 6),
        every=rng.choice([1, 2, 3]),
    )


@pytest.mark.parametrize('seed', range(20))
def test_a_number_that_is_none_stops_a_training_within_one_logging_step(seed, tok, tmp_path):
    from k2lab.models.load import Loading, small_model

    case = seeded(seed)
    load = Loading(lora_rank=2, adapt=('attention',)) if 'lora' in case.method else Loading()
    job, model = Bench(tmp_path), small_model('k2', 'smoke', tok)
    poison = Poison(model, case.what, case.k)
    trainer = dict(
        per_device_train_batch_size=2,
        max_steps=12,
        logging_steps=case.every,
        max_grad_norm=seed % 2,
        bf16=False,
        save_steps=1 if seed % 5 == 0 else 500,
    )
    with pytest.raises(LabError, match='so the weights are ruined; ') as stopped:
        fit(case.method, tok, trainer, job, model, load)
    assert case.k <= poison.steps <= case.k + case.every
    assert all(math.isfinite(row['loss']) for row in job.lines)
    said = re.search(r'the last good loss was [\d.]+ at step (\d+)', str(stopped.value))
    first = case.every if seed % 5 else 1  # each checkpoint has a line, too
    assert int(said[1]) <= case.k if said else case.k <= first
    assert not job.lines or int(said[1]) >= job.lines[-1]['step']
    for sealed in tmp_path.rglob('checkpoint-*/MANIFEST.json'):  # none after the poison
        assert int(sealed.parent.name.rpartition('-')[2]) < case.k


# ---- numbers that are none: measures, weights and lines ------------------------------------------


def ruined_text_model(tok):
    "A small model that computes no numbers for any text."
    import torch

    from k2lab.models.load import small_model

    model = small_model('k2', 'smoke', tok)
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    return model


def test_a_checkpoint_whose_weights_are_no_numbers_is_refused_when_it_is_opened(tok, tmp_path):
    from k2lab.models.load import save_checkpoint
    from k2lab.training.trainer import open_for

    save_checkpoint(ruined_text_model(tok), tok, tmp_path / 'k2')
    job: Any = SimpleNamespace(
        folder=tmp_path, find=lambda name: tmp_path / 'k2', env={}, record={}, cfg=None
    )
    with pytest.raises(LabError, match='mine: model.norm.weight holds a value that is no number'):
        open_for(job, 'mine')


def test_a_measure_that_is_no_number_is_a_failed_check_and_the_others_are_taken(tok, lab):
    from k2lab.training.scores import Asked, Opened, keep, key_of, take, tried

    job: Any = start('train_toy')
    job.env['system'], job.cfg = '', SimpleNamespace(answer_tokens=2)
    model = Opened(ruined_text_model(tok), tok, 'w', 'cpu')
    texts = Asked('domain_bits_per_byte', [dict(text=' '.join(TEXT))], 'texts')
    questions = Asked('domain_questions', [dict(prompt='2+2?', final='4')])
    measured = lambda one: keep(job, key_of(job, model, one), take(job, model, one))
    found = tried(job, 'k2_toy', measured, [texts, questions])
    assert [one.measure for one in found] == ['domain_questions']
    (check,) = job.record['checks']
    assert not check['ok'] and check['detail'].startswith(
        "domain_bits_per_byte: 1 of 1 items: bits is nan, which is no number, the first at 'the graph"
    )
    with pytest.raises(LabError, match='domain_bits_per_byte: 1 of 1 items'):  # before a training
        take(job, model, texts)


def test_a_result_that_is_no_number_fails_the_run_with_its_name(lab):
    module = (lab.root / 'toylab/train_toy.py').read_text()
    module = module.replace('after=value + step', "after=float('inf')")
    lab.stage(20, 'train_toy', 'saves: k2_toy\n', module=module)
    record = read_run(execute('train_toy'))
    assert record['status'] == 'failed'
    why = 'failed checks: value is measured (after is inf, which is no number)'
    assert record['reason'] == why
    assert record['metrics'][0]['after'] is None


def test_a_logged_loss_that_is_no_number_ends_any_stage_at_that_step(lab):
    module = (lab.root / 'toylab/train_toy.py').read_text()
    module = module.replace('loss=1/(value + step)', "loss=.5 if step < 4 else float('nan')")
    lab.stage(20, 'train_toy', 'saves: k2_toy\nsteps: 9\n', module=module)
    record = read_run(execute('train_toy'))
    why = 'step 4: loss is nan, which is no number; the last loss was 0.5 at step 3'
    assert (record['status'], record['reason'], record['saves']) == ('failed', why, {})
    lines = (Path(record['folder']) / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3]


def test_the_reason_of_a_training_process_is_the_reason_of_the_run(lab):
    from k2lab.lab.launch import refusal_in

    log = lab.root / 'log.txt'
    log.write_text('k2lab: of an earlier attempt\n')
    start = log.stat().st_size
    with open(log, 'a') as out:
        out.write(
            'W1126 torchrun\nk2lab: step 2: the loss is nan\nk2lab: step 2: the loss is nan\n'
        )
    assert refusal_in(log, start) == 'step 2: the loss is nan'


# ---- records are strict JSON ---------------------------------------------------------------------


def test_what_json_does_not_know_is_refused_with_its_place():
    import datetime
    import decimal

    import numpy as np
    import torch

    fine = {'a': np.float32(0.5), 'b': np.int64(3), 'c': np.bool_(True), 'd': Path('runs')}
    fine |= {'e': datetime.date(2026, 11, 26), 'f': (1, None)}
    want = {'a': 0.5, 'b': 3, 'c': True, 'd': 'runs', 'e': '2026-11-26', 'f': [1, None]}
    assert json.loads(as_json(fine)) == want
    odd = {
        'metrics[1].after is nan, which is no number': {'metrics': [{}, {'after': math.nan}]},
        'x is inf, which is no number': {'x': np.float32(math.inf)},
        'tags is a set': {'tags': {'a', 'b'}},
        'loss is a Tensor': {'loss': torch.tensor(0.5)},
        'rates[0] is a ndarray': {'rates': [np.zeros(2)]},
        'd is a Decimal': {'d': decimal.Decimal('1.5')},
        "it has the key (1, 2), which is no text": {(1, 2): 3},
        'cfg is a Poison': {'cfg': Poison.__new__(Poison)},
    }
    for why, value in odd.items():
        with pytest.raises(LabError, match='cannot be recorded') as e:
            as_json(value)
        assert str(e.value).endswith(why)


def test_text_that_is_no_unicode_is_escaped_and_read_again():
    text = as_json({'name': 'caf\udce9', 'ok': 'é'})
    assert text.encode() == b'{"name": "caf\\udce9", "ok": "\xc3\xa9"}'
    assert json.loads(text) == {'name': 'caf\udce9', 'ok': 'é'}


def test_an_infinite_option_is_recorded_as_yaml_spells_it_and_one_that_is_none_is_refused(lab):
    module = (lab.root / 'toylab/train_toy.py').read_text()
    lab.stage(
        20,
        'train_toy',
        module=module.replace('steps: int = 3 ', 'stay: float = 0; steps: int = 3 '),
    )
    job = prepare('train_toy', changes={'stay': math.inf})
    record = json.loads((job.folder / 'run.json').read_text(), parse_constant=pytest.fail)
    assert record['config']['stay'] == record['changes']['stay'] == '.inf'
    assert open_job(job.folder).cfg.stay == math.inf
    with pytest.raises(LabError, match='stay must be float'):
        prepare('train_toy', changes={'stay': '.nan'})
    with pytest.raises(LabError, match='trainer.lr is nan, which is no number'):
        prepare('train_toy', changes={'trainer.lr': '.nan'})
    assert len(runs()) == 1


def test_records_of_earlier_versions_are_read(lab):
    folder = execute('train_toy', campaign='c')
    record = json.loads((folder / 'run.json').read_text())
    record['metrics'][0]['after'] = math.nan
    for key in ('inputs', 'seals'):
        record.pop(key, None)
    (folder / 'run.json').write_text(json.dumps(record))
    (folder / 'metrics.jsonl').write_text('{"step": 1, "steps": 2, "loss": NaN}\n')
    assert [r['metrics'][0]['after'] for r in runs('c')] == [None]
    as_json(runs('c'))
    assert repr(Evidence(folder, {}).curve()) == 'loss nan -> nan in 1 points, 1 of them no numbers'


# ---- names and places ----------------------------------------------------------------------------

COLLIDE = """
    trainer notebook run metrics samples items log stage env report code rows card server answers checkpoint
    checkpoint-4 run.json metrics.jsonl Trainer NOTEBOOK
""".split()
ODD = [
    '',
    ' ',
    '.',
    '..',
    '.hidden',
    '../k2',
    '/tmp/k2',
    'a/b',
    'a b',
    'k2@run',
    'a:b',
    'k2\n',
    '-x',
]
ODD += ['~x', 'a*', 'k2\0', 'e\u0301t', 'k' * 101, '名' * 40]


@pytest.mark.parametrize('name', COLLIDE + ODD)
def test_a_name_that_collides_is_refused_before_there_is_a_folder(name, lab):
    with pytest.raises(LabError) as e:
        prepare('train_toy', campaign='c', changes={'saves': name})
    assert str(e.value).startswith('saves ') and not runs()


@pytest.mark.parametrize('name', ['k2', 'k2.5_sft', 'K2-Think', '実験', 'x' * 100, 'été'])
def test_a_name_that_can_be_a_file_is_taken(name, lab):
    assert prepare('train_toy', changes={'saves': name}).cfg.saves == name


def test_ligatures_and_cases_are_one_name():
    with pytest.raises(LabError, match="leaves 'ﬁne' as well"):
        check_output('FINE', 'saves', ['ﬁne'])
    with pytest.raises(LabError, match='files of its own'):
        check_output('ｔrainer', 'saves')  # a wide t


def test_a_checkpoint_does_not_take_the_name_of_data(lab):
    lab.write('configs/env.yaml', 'models: {zero: ./zero.txt}\ndata: {rows_of_mine: ./zero.txt}\n')
    with pytest.raises(LabError, match="saves 'rows_of_mine': this is the name of data"):
        prepare('train_toy', changes={'saves': 'rows_of_mine'})


def test_a_stage_may_leave_a_new_version_of_what_it_read(lab):
    first = execute('train_toy', campaign='c')
    second = execute('train_toy', campaign='c', changes={'init_from': 'k2_toy'})
    third = read_run(execute('train_toy', campaign='c', changes={'init_from': 'k2_toy'}))
    assert third['parents'][0]['run'] == second.name != first.name
    assert third['metrics'][0]['before'] == 4 and third['metrics'][0]['after'] == 6


def test_what_a_stage_publishes_replaces_nothing_of_its_run(lab):
    job = start('train_toy')
    for name in ('trainer', 'Metrics', '../x', 'a/b'):
        with pytest.raises(LabError), job.publishing(name):
            pytest.fail('the work had begun')
    with job.publishing('k2', '.txt') as path:
        path.write_text('1')
    with pytest.raises(LabError, match="leaves 'k2' as well"), job.publishing('K2', '.txt'):
        pytest.fail('the work had begun')
    for beside in ('run.json', 'k2.txt'):
        with pytest.raises(LabError, match='would replace a file of the run'):
            with job.publishing('other', '.txt') as path:
                path.write_text('2')
                (path.parent / beside).write_text('3')
    assert (job.folder / 'k2.txt').read_text() == '1' and job.record['saves'].keys() == {'k2'}


@pytest.mark.parametrize(
    'run', ['nbs/x', '../x', '/tmp/x', 'runs/x', 'runs/c/.x', 'runs/c/a/b', 'runs']
)
def test_a_run_lies_in_a_campaign(run, lab):
    with pytest.raises(LabError):
        start('train_toy', run=run)
    assert start('train_toy', run='runs/c/mine').folder == lab.root / 'runs/c/mine'


PLACES = [
    ('train_sft_domain', {'trainer.output_dir': 'CK'}, 'a run has a folder of its own'),
    ('run_dpo_reasoning', {'control_trainer.output_dir': 'CK'}, 'a run has a folder of its own'),
    ('make_nano_models', {'repeat_trainer.output_dir': 'CK'}, 'a run has a folder of its own'),
    ('train_continual_pretrain', {'trainer.logging_dir': 'L'}, "no option 'logging_dir'"),
    ('train_sft_domain', {'trainer.logging_strategy': 'no'}, 'hides a loss that is no number'),
    ('train_sft_domain', {'saves': 'domain_sft'}, "saves 'domain_sft': this stage reads that name"),
    ('run_dpo_reasoning', {'saves': 'dpo_pairs'}, "saves 'dpo_pairs': this stage reads that name"),
    ('distill_to_student', {'saves': 'k2_think_dpo'}, 'this stage reads that name'),
    ('report', {'keep': 'nbs'}, 'which no report has left there'),
    ('report', {'keep': '.'}, 'which no report has left there'),
    ('report', {'keep': 'settings.ini'}, 'is a file; name a folder'),
]


@pytest.mark.parametrize('stage, changes, why', PLACES)
def test_a_place_outside_the_run_is_refused(stage, changes, why):
    with pytest.raises(LabError, match=re.escape(why)):
        resolve(stage_module(stage).Config, stage, 'smoke', changes)


@pytest.mark.parametrize('key', ['output', 'error', 'chdir'])
def test_the_files_of_a_job_lie_in_its_run(key, lab):
    from k2lab.lab.slurm import cluster

    lab.write('configs/slurm.yaml', f'extra: {{{key}: /scratch/all.log}}\n')
    with pytest.raises(LabError, match=f'extra: {key} cannot be set'):
        cluster()


def test_a_port_that_another_server_has_is_refused():
    import socket

    from k2lab.launch_teacher_vllm import Config, serving

    with socket.create_server(('127.0.0.1', 0)) as other:
        cfg = Config(port=other.getsockname()[1])
        with pytest.raises(LabError, match='write port=0'), serving(cfg, 'x', Path('unused')):
            pytest.fail('it started')


def test_a_report_keeps_its_copy_in_a_folder_of_its_own(tmp_path):
    from k2lab.reports.gallery import check_gallery

    check_gallery(tmp_path / 'new')
    (tmp_path / 'notebooks').mkdir()
    (tmp_path / 'README.md').write_text('# Campaign demo, scale nano\n')
    check_gallery(tmp_path)
    (tmp_path / 'run.json').touch()
    with pytest.raises(LabError, match='holds run.json, which no report has left there'):
        check_gallery(tmp_path)


def test_kinds_of_mistakes_are_shown_as_mistakes():
    "A notebook's error is known by the name of its class alone: kinds of `LabError` have the same."
    import pickle

    from k2lab.lab.names import NothingSaved
    from k2lab.lab.runner import ending

    shown = SimpleNamespace(ename=NothingSaved.__name__, evalue='no rows')
    failed = type('PapermillExecutionError', (Exception,), vars(shown))('no rows')
    assert ending(failed) == 'no rows'
    assert type(pickle.loads(pickle.dumps(NothingSaved('no rows')))) is NothingSaved
