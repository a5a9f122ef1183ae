"The plan before a launch: its counts against transformers, its bytes against torch, its refusals."

import pytest

from k2lab.lab.config import LabError
from k2lab.scale.parts import KNOWN, adapter_weights, config_at, counted, known_shape, matrices_of

SMOL = dict(
    model_type='llama',
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
QWEN3 = SMOL | dict(model_type='qwen3', head_dim=128, tie_word_embeddings=False)


def on_meta(config: dict):
    "The model of a config as transformers builds it, without memory."
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from k2lab.models.load import register_kimi_k2
    from k2lab.models.quantized import backbone

    c = dict(backbone(config))
    kimi, kind = register_kimi_k2(), c.pop('model_type')
    made = (kimi if kind in ('kimi_k2', 'deepseek_v3') else CONFIG_MAPPING[kind]).from_dict(c)
    with torch.device('meta'):
        return AutoModelForCausalLM.from_config(made)


SHAPES = {**KNOWN, 'SmolLM2-135M': SMOL, 'qwen3': QWEN3, 'smoke:k2': None, 'smoke:qwen': None}


@pytest.mark.parametrize('name', SHAPES)
def test_the_counts_of_a_config_are_those_of_the_model(name):
    from k2lab.models.adapters import lora
    from k2lab.models.load import Loading, parameter_counts

    config = SHAPES[name] or config_at(name)
    model, ours = on_meta(config), counted(matrices_of(config))
    theirs = parameter_counts(model)
    assert ours == {k: n for k, n in theirs.items() if k not in ('total', 'active')}
    if name in ('Moonlight-16B-A3B', 'Qwen2.5-7B', 'smoke:k2'):
        from peft import get_peft_model

        load = Loading(lora_rank=8)
        want = adapter_weights(matrices_of(config), load)
        adapted = get_peft_model(model, lora(model, load))
        assert want == sum(p.numel() for n, p in adapted.named_parameters() if 'lora_' in n)


def test_a_shape_nobody_knows_is_refused_in_one_line():
    assert known_shape('moonshotai/Kimi-K2.5') and not known_shape('moonshotai/Kimi-Linear-48B')
    with pytest.raises(LabError, match=r'nobody here knows.*config\.json into a folder') as e:
        config_at('meta-llama/Llama-4-Scout')
    assert '\n' not in str(e.value)
    lacking = {k: v for k, v in KNOWN['Moonlight-16B-A3B'].items() if k != 'moe_intermediate_size'}
    with pytest.raises(LabError, match='no moe_intermediate_size'):
        matrices_of(lacking)


# ---- before a run ----------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "An empty folder of runs, a machine without GPUs."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path))
    monkeypatch.setattr('k2lab.scale.plan.gpus_here', lambda: [])
    return tmp_path


def test_k2_at_full_is_refused_in_one_line_and_leaves_nothing(runs):
    from k2lab.lab.job import prepare

    told = {'init_from': 'k2lab/data/k2-nano-base'}
    for changes in ({}, told):
        with pytest.raises(LabError, match='256 GPUs .* none.*--on slurm.*--anyway') as e:
            prepare('train_sft_domain', 'full', 'c', changes)
        assert '\n' not in str(e.value)
    assert not list(runs.iterdir())
    job = prepare('train_sft_domain', 'full', 'c', told, refuse=False)
    assert job.record['plan']['processes'] == 256 and job.record['plan']['refusal']


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'own_rows': '[./nowhere.jsonl]'}, 'nowhere.jsonl.*nothing matches'),
        ({'sources': '[{package: not_there}]'}, "'not_there' is not installed"),
        ({'sources': '[{files: nowhere/*.md}]'}, 'nothing matches'),
        ({'eval_sets': '{mine: nowhere.jsonl}'}, 'nothing matches'),
        ({'mode': 'reasoning', 'trace_sources': '[{files: no.jsonl, licence: MIT}]'}, 'nothing'),
    ],
)
def test_missing_inputs_of_a_corpus_leave_no_folder(runs, changes, words):
    from k2lab.lab.job import prepare

    with pytest.raises(LabError, match=words):
        prepare('prepare_corpus', 'smoke', 'c', changes)
    assert not list(runs.iterdir())


def test_a_stage_may_check_and_plan(lab):
    import sys

    from k2lab.lab.job import prepare, start

    import_toy = sys.modules.get('toylab.train_toy') or __import__('toylab.train_toy').train_toy
    seen = []
    import_toy.check = lambda cfg, env: seen.append((cfg.steps, env['scale']))
    import_toy.plan = lambda cfg, env, campaign, changes: {'refusal': 'too large', 'at': campaign}
    with pytest.raises(LabError, match='too large'):
        prepare('train_toy', campaign='c', changes={'steps': 4})
    assert seen == [(4, 'smoke')]
    assert start('train_toy', campaign='c', anyway=True).record['plan']['at'] == 'c'

    def refuse(cfg, env):
        raise LabError('an input is missing')

    import_toy.check = refuse
    with pytest.raises(LabError, match='missing'):
        prepare('train_toy', campaign='d', refuse=False)


COST = """
import sys, time
from k2lab.lab.config import load_env, resolve
from k2lab.lab.job import stage_module
for stage in ('train_sft_domain', 'run_dpo_reasoning', 'distill_to_student', 'evaluate'):
    for scale in ('smoke', 'nano'):
        module, env = stage_module(stage), load_env(scale)
        cfg, began = resolve(module.Config, stage, scale), time.process_time()
        assert module.plan(cfg, env, 'c', {})['refusal'] == ''
        assert time.process_time() - began < 0.3, (stage, scale)
assert 'torch' not in sys.modules
"""


def test_the_plan_before_a_launch_costs_nothing(runs):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, '-c', COST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what fits -------------------------------------------------------------------------------------------


def asked(stage, scale='qlora', **changes):
    from k2lab.lab.config import load_env
    from k2lab.scale.plan import Question

    return Question(
        stage, scale, {k.replace('__', '.'): v for k, v in changes.items()}, load_env(scale)
    )


@pytest.mark.parametrize('text', ['H100', '0xH100-80', '1xH100', '1xH100-0', '-1xH100-80', '1x-80'])
def test_a_machine_that_cannot_be_is_refused(text):
    from k2lab.scale.plan import machine_named

    with pytest.raises(LabError, match='NUMBERxNAME-GB'):
        machine_named(text)


def test_the_remedy_was_tried_and_is_no_larger_than_needed():
    from k2lab.scale.plan import estimated, lacking, machine_named, remedy

    large = asked(
        'train_continual_pretrain', load__four_bit=False, load__lora_rank=32, load__dtype='bfloat16'
    )
    card = machine_named('1xL4-24')
    assert lacking(estimated(large.work(), card), card)
    change = remedy(large, card)
    assert change == {'load.four_bit': True}
    assert not lacking(estimated(large.work(change), card), card)
    assert remedy(large, machine_named('8xH200-141')) == {}
    assert remedy(large, machine_named('1xTiny-2')) is None


def test_each_thing_that_is_too_small_is_named():
    from k2lab.scale.plan import Machine, estimated, lacking

    work = asked('train_sft_domain').work()
    reasons = {
        name: lacking(estimated(work, machine), machine)
        for name, machine in {
            'gpu': Machine(1, 8.0),
            'host': Machine(1, 1000.0, host_gib=0.5),
            'disk': Machine(1, 1000.0, disk_gib=0.1),
            'cpu': Machine(0, 0.0, host_gib=4.0),
        }.items()
    }
    assert all(len(found) == 1 for found in reasons.values()), reasons
    assert 'on each GPU' in reasons['gpu'][0] and 'main memory' in reasons['host'][0]
    assert 'disk' in reasons['disk'][0] and 'there is no GPU' in reasons['cpu'][0]


def test_ranks_share_the_memory_of_a_machine_and_the_split_states():
    from k2lab.scale.plan import GIB, Machine, estimated, lacking

    one = asked('train_sft_domain', 'smoke').work()
    two = asked('train_sft_domain', 'smoke', processes=2, accelerate='cpu').work()
    here = Machine(host_gib=1.5 * estimated(one, Machine()).peak() / GIB)
    assert not lacking(estimated(one, here), here)
    assert 'each of 2 processes' in lacking(estimated(two, here), here)[0]
    split = asked('train_sft_domain', 'full').work()
    states = estimated(split, Machine(256, 80.0)).device['train']
    k2 = sum(counted(matrices_of(KNOWN['Kimi-K2'])).values())
    assert abs(states['optimizer'] - 12 * k2 / 256) < 1e6 or split.load.lora_rank


def test_hours_come_from_a_run_of_this_machine_or_are_unknown(monkeypatch, tmp_path):
    from k2lab.lab.config import resolve
    from k2lab.lab.job import stage_module
    from k2lab.lab.provenance import cpu_name
    from k2lab.scale import plan
    from k2lab.scale.parts import weight_bytes

    work = asked('train_sft_domain', 'nano').work()
    cfg = resolve(stage_module('train_sft_domain').Config, 'train_sft_domain', 'nano')
    run = dict(
        folder=str(tmp_path / 'RUN'),
        status='complete',
        config=dict(init_from='x', load={}),
        training=dict(train=dict(tokens_s=1000)),
        weights=dict(x=weight_bytes(matrices_of(work.config), work.load)),
        inputs=dict(host=dict(cpu=cpu_name())),
    )
    monkeypatch.setattr('k2lab.lab.provenance.accelerator', dict)
    here = plan.Machine()
    for known, words in [
        ([run], '1,000 tokens/s in RUN'),
        ([], 'unknown'),
        ([run | dict(status='failed')], 'unknown'),
        ([run | dict(inputs=dict(host=dict(cpu='another')))], 'unknown'),
        ([run | dict(config=dict(init_from='x', load=dict(lora_rank=4)))], 'unknown'),
        ([run | dict(weights=dict(x=dict(dense=5)))], 'unknown'),
    ]:
        monkeypatch.setattr(plan, 'runs', lambda known=known: known)
        assert words in plan.hours(work, cfg, here)
    assert 'not here' in plan.hours(work, cfg, plan.machine_named('1xH100-80'))


# ---- the trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('load', [{}, dict(lora_rank=8)], ids=['full', 'LoRA'])
def test_a_step_without_content_takes_what_trl_takes(load, runs):
    "The trace of a step on fake tensors, against the bytes alive while TRL trains on real ones."
    import torch

    from k2lab.lab.job import start
    from k2lab.models.load import Loading, open_model, open_tokenizer, smoke_model
    from k2lab.scale.trace import Alive, Step, traced
    from k2lab.training.trainer import fit_sft

    torch.manual_seed(0)
    place, alive = smoke_model('k2'), Alive()
    rows = [
        dict(input_ids=torch.randint(9, 2000, (128,)).tolist(), completion_mask=[0] + [1] * 127)
        for _ in range(16)
    ]
    job, tok = start('train_sft_domain', 'smoke', campaign='c'), open_tokenizer(place)
    with alive.counting():
        model = open_model(place, Loading(**load))
        alive.peak = alive.now
        trainer = dict(per_device_train_batch_size=8, max_steps=2, learning_rate=1e-3)
        fit_sft(job, model, tok, rows, trainer, load=Loading(**load))
    step = Step(config_at('smoke:k2'), Loading(**load), 8, 128, padded=False)
    assert abs(traced(step).peak / alive.peak - 1) < 0.03


def test_what_a_step_avoids_is_not_in_its_trace():
    from dataclasses import replace

    from k2lab.models.load import Loading
    from k2lab.scale.trace import Step, traced

    step = Step(config_at('smoke:k2'), Loading(), 8, 256)
    plain = traced(step)
    assert traced(replace(step, checkpointing=True)).kept < 0.6 * plain.kept
    assert traced(replace(step, whole_logits=True)).kept > plain.kept
    assert traced(replace(step, batch=16)).kept > 1.7 * plain.kept
    assert traced(replace(step, optimizer='muon')).averages < plain.averages
    pairs = traced(replace(step, method='DPO'))
    assert pairs.reference == pairs.weights and pairs.kept > plain.kept


# ---- the command -----------------------------------------------------------------------------------------


def test_the_page_fits_eighty_columns_and_says_what_helps(capsys, monkeypatch, runs):
    import json

    from k2lab.cli import main

    monkeypatch.setenv('COLUMNS', '80')
    assert main(['plan', 'train_sft_domain', '--scale', 'smoke']) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and 'fits this machine' in text
    assert main(['plan', 'train_sft_domain', '--scale', 'smoke', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['fits'] and found['gib']['train'].keys() > {'libraries', 'activations', 'logits'}
    assert (
        main(
            [
                'plan',
                'train_sft_domain',
                '--scale',
                'full',
                '--gpus',
                '1xH100-80',
                'init_from=k2lab/data/k2-nano-base',
            ]
        )
        == 1
    )
    text = capsys.readouterr().out
    assert '256 GPUs' in text and 'fits with' in text and max(map(len, text.splitlines())) <= 80
    for words, why in [
        (['prepare_corpus'], 'nothing to plan'),
        (['train_sft_domain', '--scale', 'qlora', 'init_from=a/unknown'], 'nobody here knows'),
        (['train_sft_domain', 'lenght=3'], 'lenght'),
        (['train_sft_domain', '--gpus', 'many'], 'NUMBERxNAME-GB'),
        (['nothing'], 'unknown stage'),
    ]:
        with pytest.raises(LabError, match=why):
            main(['plan', *words])


def test_completion_knows_the_plan():
    from k2lab.cli import COMMANDS
    from k2lab.cli.completion import candidates

    assert 'train_sft_domain' in candidates(['plan', ''], COMMANDS)
    found = candidates(['plan', 'train_sft_domain', ''], COMMANDS)
    assert 'length=' in found and '--gpus' in found
