"""Where every model of every stage is: one function says which accelerator there is, and all phases follow.

There is no GPU in these tests. `accelerator` stands for one: models that are told to go there stay in main
memory and carry its name, which is what the record must show. What it cannot show is a tensor that was left
behind on the CPU; that takes a GPU (`k2lab selftest gpu`)."""

import os
import sys

import pytest

torch = pytest.importorskip('torch')
from transformers import PreTrainedModel

from k2lab.cli.looking import placed
from k2lab.lab.config import LabError
from k2lab.lab.job import stage_module, start
from k2lab.models import placement
from k2lab.models.load import (
    Loading,
    as_stored,
    open_model,
    open_tokenizer,
    shipped,
    smoke_model,
)
from k2lab.training import metrics

GPU = 'cuda:0'


def everywhere(patch, name: str, new):
    "Put `new` in the place of a function of the placement, in each module that imported it by name."
    old = getattr(placement, name)
    for module in [m for n, m in sys.modules.items() if n.startswith('k2lab')]:
        if getattr(module, name, None) is old:
            patch.setattr(module, name, new)


class Accelerator:
    "A GPU of `free` bytes that is not there; `opened` lists the device of each model that was opened."

    def __init__(self, patch, free: int = 2**40):
        self.opened, self.free = [], free
        patch.setattr(placement, 'device_here', lambda: GPU)
        patch.setattr(placement, 'free_bytes', lambda device: self.free)
        everywhere(patch, 'put', self.tag)
        everywhere(patch, 'where', lambda model: getattr(model, 'tag', 'cpu'))
        real = PreTrainedModel.from_pretrained.__func__

        def from_pretrained(kind, *args, device_map=None, **options):
            model, *info = real(kind, *args, **options)
            device = (device_map or {'': 'cpu'})['']
            self.opened.append(device)
            return self.tag(model, device), *info

        patch.setattr(PreTrainedModel, 'from_pretrained', classmethod(from_pretrained))

    def tag(self, model, device):
        model.tag = device
        return model


@pytest.fixture
def accelerator(monkeypatch, tmp_path):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    return Accelerator(monkeypatch)


FEW = {'trainer.max_steps': 2, 'trainer.bf16': False}
MEASURED = FEW | {'measures': ['domain_bits_per_byte']}
# stage -> (changes at smoke scale, the phases that open a model)
STAGES = {
    'prepare_corpus': ({}, []),
    'make_nano_models': (FEW | {'saves': 'tiny'}, ['train']),
    'train_continual_pretrain': (MEASURED, ['before', 'train', 'certificate', 'after']),
    'train_sft_domain': (
        MEASURED | {'measures': ['domain_questions'], 'control_from': 'Kimi-K2-Base'},
        ['before', 'few-shot', 'train', 'certificate', 'after', 'control', 'control, after'],
    ),
    'train_sft_reasoning': (
        MEASURED | {'load.lora_rank': 2},
        ['before', 'train', 'certificate', 'after'],
    ),
    'sample_teacher': ({'replay': '', 'mode': 'distill'}, ['sample']),
    'run_dpo_reasoning': (
        MEASURED,
        'before reference train certificate after control'.split() + ['control, after'],
    ),
    'distill_to_student': (
        FEW | {'measures': ['domain_questions']},
        ['before', 'train', 'certificate', 'after', 'teacher'],
    ),
    'evaluate': ({}, [f'evaluate {name}' for name in ('k2_domain_instruct', 'k2_student_7b')]),
    'agentic_demo': ({}, []),
    'report': ({}, []),
}


def phases(stage: str, changes: dict) -> dict:
    "The placement that a stage records at smoke scale."
    job = start(stage, 'smoke', None, changes)
    try:
        stage_module(stage).work(job)
    except LabError as why:  # random models answer nothing right
        assert 'nothing to keep' in str(why), why
    return job.record.get('placement', {})


SHORT = [stage for stage, (_, wanted) in STAGES.items() if wanted]
FULL = os.environ.get('K2LAB_FAULTS') == 'full'


@pytest.mark.parametrize('stage', STAGES if FULL else SHORT)
def test_every_phase_of_every_stage_follows_the_one_placement(stage, accelerator):
    changes, wanted = STAGES[stage]
    found = phases(stage, changes)
    assert [name for name in wanted if name not in found] == []
    assert bool(found) == bool(wanted)
    assert {name: p['device'] for name, p in found.items()} == dict.fromkeys(found, GPU)
    assert set(accelerator.opened) <= {GPU}


def test_without_a_gpu_all_is_on_the_cpu_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    found = phases('train_continual_pretrain', MEASURED)
    line = dict(model='Kimi-K2-Base', device='cpu', dtype='float32', attention='sdpa')
    assert found['before'] == found['train'] == line
    assert set(found) == {'before', 'train', 'certificate', 'after'}


def test_a_launch_file_or_a_trainer_that_says_cpu_is_obeyed(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert placement.device_for() == GPU
    assert placement.device_for({'use_cpu': True}) == 'cpu'
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert placement.device_for() == 'cuda:1'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)  # Slurm shows each task its own
    assert placement.device_for() == GPU
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    assert placement.device_for() == 'cpu'


def test_a_model_larger_than_the_gpu_is_refused_before_it_is_opened(accelerator):
    accelerator.free = 2**20
    with pytest.raises(
        LabError, match='its weights take .* and cuda:0 has 0.0 GiB free.*load.dtype'
    ):
        open_model(shipped('k2'))
    assert accelerator.opened == []
    assert open_model(shipped('k2'), device='cpu').device.type == 'cpu'


def test_evaluate_refuses_a_checkpoint_that_does_not_fit_before_it_opens_any(
    accelerator, monkeypatch
):
    from k2lab.models import load

    lacking = lambda place, *_: 'too large' if 'qwen' in str(place) else ''
    monkeypatch.setattr(load, 'lacks_room', lacking)
    job = start('evaluate', 'smoke')
    with pytest.raises(LabError, match='smoke:qwen: too large'):
        stage_module('evaluate').work(job)
    assert accelerator.opened == []


def test_a_served_model_is_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    line = dict(model='k2_think_dpo', device='cpu', dtype='float32', attention='sdpa')
    assert phases('launch_teacher_vllm', {}) == dict(serve=line)


def test_the_certificate_moves_to_the_cpu_where_a_copy_does_not_fit(accelerator):
    from k2lab.training.stage import probe_device

    job, model = start('train_sft_domain', 'smoke'), open_model('smoke:k2')
    assert probe_device(job, model) == GPU
    accelerator.free = 10
    assert probe_device(job, model) == 'cpu'
    assert 'GiB free' in job.record['checks'][-1]['detail']


def test_the_embedded_server_computes_on_the_gpu_in_the_dtype_of_the_files(
    accelerator, monkeypatch
):
    import uvicorn
    from fastapi.testclient import TestClient

    from k2lab.serving import server

    apps = []
    monkeypatch.setattr(uvicorn, 'run', lambda app, **options: apps.append(app))
    server.serve(shipped('k2'), 'tiny', key='secret')
    bearer = {'authorization': 'Bearer secret'}
    (model,) = TestClient(apps[0]).get('/v1/models', headers=bearer).json()['data']
    assert model['placement'] == dict(device=GPU, dtype='bfloat16', attention='sdpa')
    assert as_stored(shipped('k2'), 'cpu') == Loading()
    assert as_stored(smoke_model('k2'), GPU).dtype == 'float32'


def speed_of(job, teacher: Loading, student: Loading) -> dict:
    "The line of generated tokens per second for a teacher and a student opened like this."
    from k2lab.distill_to_student import compare_speed
    from k2lab.training.scores import Opened
    from k2lab.training.stage import Trained

    a, b = open_model('smoke:k2', teacher), open_model('smoke:qwen', student)
    tok, other = open_tokenizer('smoke:k2'), open_tokenizer('smoke:qwen')
    compare_speed(job, Opened(a, tok, '', ''), Trained(b, other, [], {}))
    return job.record['metrics'][-1]


def test_speed_is_compared_on_equal_terms_or_not_at_all(tmp_path, monkeypatch):
    from k2lab.reports.goals import ratio_of_points

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    job, half = start('distill_to_student', 'smoke'), Loading(dtype='bfloat16')
    line = speed_of(job, Loading(), half)
    assert line['before'] is None and line['after'] > 0
    assert line['note'] == 'not compared: the teacher on cpu float32 against cpu bfloat16'
    assert ratio_of_points(line, 'ratio_at_least') is None  # so the goal does not pass
    line = speed_of(job, Loading(), Loading())
    ratio = ratio_of_points(line, 'ratio_at_least')
    assert ratio and ratio.value > 0


def test_one_process_with_two_gpus_uses_one_and_says_so(accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    job = start('train_continual_pretrain', 'smoke', None, FEW | {'measures': []})
    stage_module('train_continual_pretrain').work(job)
    (told,) = [c for c in job.record['checks'] if c['name'] == 'train: one GPU of several']
    assert 'processes=2 uses all 2' in told['detail']
    rows = job.record['training']['train']['rows']
    assert rows == 2 * job.cfg.trainer['per_device_train_batch_size']  # not twice as many


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    "Keeps the number of entries of the largest tensor that was computed in the block."

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
        self.entries = max([self.entries, *(t.numel() for t in tensors)])
        return out


def tiny(kind: str = 'Qwen2', vocabulary: int = 163_840, **more):
    "A model of one narrow layer with K2's vocabulary."
    import transformers

    size = dict(hidden_size=16, num_hidden_layers=1, intermediate_size=16, head_dim=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    config = getattr(transformers, f'{kind}Config')(**size, **heads, vocab_size=vocabulary, **more)
    return getattr(transformers, f'{kind}ForCausalLM')(config).eval()


def whole_table(model, row: list) -> list:
    "The log-probabilities of a row from all its logits at once, as a reference."
    ids = torch.tensor([row])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def test_a_table_of_logits_is_never_whole_when_measuring():
    from k2lab.models.adapters import probe_logits
    from k2lab.training.metrics import TABLE, row_logps

    model, row = tiny(), [7 * i for i in range(300)]
    assert len(row) * model.config.vocab_size > TABLE
    with Largest() as seen:
        (logps,) = row_logps(model, [row], 0)
    assert model.config.vocab_size < seen.entries <= TABLE
    assert logps == pytest.approx(whole_table(model, row), abs=1e-5)
    with Largest() as seen:
        probe_logits(model)  # of the certificate: one position of each prompt
    assert seen.entries <= 64 * model.config.vocab_size < TABLE
    assert 'forward' not in vars(model.lm_head)


def test_the_server_keeps_no_table_of_its_prompt_and_none_of_its_answer():
    from k2lab.serving.engine import Engine, Run
    from k2lab.serving.protocol import ChatAsk, CompletionAsk

    model, tok, row = tiny(), open_tokenizer('smoke:qwen'), [7 * i for i in range(300)]
    engine = Engine(model, tok, 'tiny')
    with Largest() as seen:
        kept = engine.prompt_odds(row, 2)
    assert seen.entries <= metrics.TABLE < len(row) * model.config.vocab_size
    assert [one.own for one in kept] == pytest.approx(whole_table(model, row), abs=1e-5)
    assert all(len(one.best) == 2 and max(one.best.values()) >= one.own for one in kept)
    talk, asked = dict(messages=[dict(role='user', content='x')]), dict(prompt='x', logprobs=1)
    asks = (ChatAsk.model_validate(talk), CompletionAsk.model_validate(asked))
    runs = [engine.submit(Run(row[:4], ask, 3)) for ask in asks]
    (chat,), (plain,) = (run.done.result(60) for run in runs)
    assert chat.odds == [] and [len(one.best) for one in plain.odds] == [1, 1, 1]


def test_a_table_in_parts_gives_the_same_numbers(monkeypatch):
    model = open_model(shipped('k2'))
    rows = [[(7 * i + n) % 2000 for i in range(40 + n)] for n in range(8)]
    whole = metrics.row_logps(model, rows, 0)
    monkeypatch.setattr(metrics, 'TABLE', 2**15)
    assert metrics.row_logps(model, rows, 0) == whole


def test_a_model_that_caps_its_logits_is_measured_on_what_it_caps():
    from k2lab.training.metrics import row_logps

    model, row = tiny('Gemma2', 320, final_logit_softcapping=0.1), [3 * i for i in range(40)]
    (logps,) = row_logps(model, [row], 0)
    assert logps == pytest.approx(whole_table(model, row), abs=1e-5)
    assert max(logps) - min(logps) < 0.21


@pytest.mark.parametrize('checkpointing', [False, True])
def test_packing_reads_the_positions_of_a_batch_once(checkpointing, monkeypatch):
    from k2lab.text import packing

    model, read = open_model(shipped('k2')).train(), []  # four layers
    if checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    real = packing.borders
    monkeypatch.setattr(packing, 'borders', lambda row: read.append(len(row)) or real(row))
    rows = [dict(input_ids=[5] * 9, labels=[5] * 9, seq_lengths=[4, 5]) for _ in range(3)]
    with packing.samples_apart(model):
        for step in (1, 2):
            model(**packing.packed_batch(rows, 0), use_cache=False).loss.backward()
            assert len(read) == 3 * step  # three rows, whatever the layers


def test_an_attention_that_is_unknown_or_not_there_is_refused_before_the_model_is_opened(
    accelerator,
):
    with pytest.raises(
        LabError, match="load: unknown attention 'flash_attention2'.*flash_attention_2"
    ):
        Loading(attention='flash_attention2')
    with pytest.raises(
        LabError, match='flash_attention_2 needs flash_attn, which is not installed'
    ):
        open_model('smoke:k2', Loading(attention='flash_attention_2', dtype='bfloat16'))
    with pytest.raises(LabError, match='computes in 16 bits; write dtype=bfloat16'):
        Loading(attention='flash_attention_2')
    with pytest.raises(LabError, match='backend unsloth brings its own attention'):
        Loading(attention='sdpa', backend='unsloth', lora_rank=4)
    assert accelerator.opened == []
    assert open_model('smoke:k2', Loading(attention='eager')).config._attn_implementation == 'eager'


def test_flash_attention_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr(placement, 'find_spec', lambda name: True)
    with pytest.raises(LabError, match='runs on a GPU, and this model is on the CPU'):
        open_model('smoke:k2', Loading(attention='flash_attention_2', dtype='bfloat16'))


def test_the_certificate_does_without_flash_attention(monkeypatch):
    model = open_model('smoke:k2')
    model.config._attn_implementation = 'flash_attention_2'
    with placement.exact_attention(model):
        assert model.config._attn_implementation == 'sdpa'
    assert model.config._attn_implementation == 'flash_attention_2'


def test_no_process_publishes_a_whole_model_twice(tmp_path, monkeypatch):
    "One that is not the first knows nothing of what was published; if it came by again it would wait for ever."
    from k2lab.training import stage

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    job, model = start('train_sft_domain', 'smoke'), open_model('smoke:k2')
    job.first, published = False, []
    monkeypatch.setattr(stage, 'publish_model', lambda *args: published.append(args))
    stage.scores_after(job, model, open_tokenizer('smoke:k2'), [])
    assert published == [] and 'saves' in job.record
    monkeypatch.setattr(stage, 'is_split', lambda model: True)
    stage.scores_after(job, model, open_tokenizer('smoke:k2'), [])
    assert len(published) == 1


RANK = """
import json, os, sys
from k2lab.lab.job import start
from k2lab.models import placement
from k2lab.models.load import open_model, open_tokenizer
from k2lab.training import metrics
split, rank = sys.argv[1] == 'split', int(os.environ['RANK'])
model, tok = open_model('smoke:k2'), open_tokenizer('smoke:k2')
metrics.is_split = lambda model: split
seen = []
for name in ('batched_logps', 'generate'):
    def counted(*args, real=getattr(metrics, name), at=1 if name == 'batched_logps' else 2):
        seen.append(len(args[at]))
        return real(*args)
    setattr(metrics, name, counted)
texts = [dict(text='def f(x): return x' * n) for n in range(1, 6)]
asked = [dict(prompt=f'{n} + 1?', final=str(n + 1)) for n in range(5)]
bits = [i['bits'] for i in metrics.bits_per_byte(model, tok, texts)]
replies = [i['reply'] for i in metrics.answers(model, tok, asked, '', 4)]
first = placement.agreed(f'from {rank}')
placement.together()
print(json.dumps(dict(seen=seen, bits=bits, replies=replies, first=first)))
"""


def in_ranks(count: int, way: str) -> list[dict]:
    "What each of `count` processes printed at the end of `RANK`."
    import json
    import socket
    import subprocess

    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    told = dict(WORLD_SIZE=count, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, OMP_NUM_THREADS=1)
    ranks = []
    for rank in range(count):
        env = {k: str(v) for k, v in (told | dict(RANK=rank, LOCAL_RANK=rank)).items()}
        words = [sys.executable, '-c', RANK, way]
        ranks.append(
            subprocess.Popen(words, env=os.environ | env, stdout=subprocess.PIPE, text=True)
        )
    return [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in ranks]


def test_two_processes_share_what_they_measure_and_of_a_split_model_take_all():
    model, tok = open_model('smoke:k2'), open_tokenizer('smoke:k2')
    texts = [dict(text='def f(x): return x' * n) for n in range(1, 6)]
    asked = [dict(prompt=f'{n} + 1?', final=str(n + 1)) for n in range(5)]
    bits = [i['bits'] for i in metrics.bits_per_byte(model, tok, texts)]
    replies = [i['reply'] for i in metrics.answers(model, tok, asked, '', 4)]
    shared = in_ranks(2, 'whole')
    assert [one['seen'] for one in shared] == [[3, 3], [2, 2]]
    step = in_ranks(2, 'split')
    assert [one['seen'] for one in step] == [[5, 5], [5, 5]]
    for one in (*shared, *step):
        assert one['bits'] == pytest.approx(bits, rel=1e-5)
        assert one['replies'] == replies and one['first'] == 'from 0'


def test_the_gpus_peak_is_counted_for_each_phase_and_is_not_the_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    held, model = [], open_model('smoke:qwen')
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: max(held, default=0))
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', held.clear)
    job = start('train_sft_domain', 'smoke')
    for phase, peaks in {'before': [2**30], 'train': [2**30, 3 * 2**30], 'after': [2**29]}.items():
        with placement.phase_of(job, phase, 'a student', model):
            held.extend(peaks)
    found = {name: p['gpu_peak_gib'] for name, p in job.record['placement'].items()}
    assert found == dict(before=1, train=3, after=0.5)
    assert job.gpu_peak() == dict(gpu_peak_gib=3)
    assert placed(job.record['placement']['train']).endswith(
        'on cpu in float32, sdpa, at most 3.0 GiB'
    )
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    job.record.pop('placement')
    assert job.gpu_peak() == {}


def test_a_trainer_on_the_cpu_takes_all_phases_along(accelerator):
    changes = MEASURED | {'trainer.use_cpu': True}
    found = phases('train_continual_pretrain', changes)
    assert {p['device'] for p in found.values()} == {'cpu'} and len(found) == 4


def test_evaluate_opens_all_checkpoints_in_one_dtype_and_refuses_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    few = {'measures': {'k2_think_dpo': ['domain_bits_per_byte']}, 'load.dtype': 'bfloat16'}
    pair = {'checkpoints': {'k2_think_dpo': ['Kimi-K2-Base']}}
    with pytest.raises(LabError, match='lora_rank is for training'):
        start('evaluate', 'smoke', None, {'load.lora_rank': 4})
    cfg = stage_module('evaluate').Config(
        **pair, measures=few['measures'], load={'dtype': 'bfloat16'}
    )
    job = start('evaluate', 'smoke')
    job.cfg = cfg
    stage_module('evaluate').work(job)
    assert {p['dtype'] for p in job.record['placement'].values()} == {'bfloat16'}
    assert len(job.record['placement']) == 2
    assert {key['device'] for key in job.record['score_keys'].values()} == {'cpu bfloat16'}


@pytest.mark.parametrize('way', ['an adapter on the head', 'a forward that passes the head by'])
def test_a_head_is_measured_as_it_is_called(way):
    from peft import LoraConfig, get_peft_model
    from transformers.modeling_outputs import CausalLMOutput

    model, row = tiny(vocabulary=320), [3 * i for i in range(60)]
    if way.startswith('an adapter'):
        model = get_peft_model(
            model, LoraConfig(target_modules=['lm_head'], init_lora_weights=False)
        )
    else:  # as Unsloth's does
        body, weight = model.model, model.lm_head.weight
        model.forward = lambda input_ids, **options: CausalLMOutput(
            logits=body(input_ids=input_ids).last_hidden_state @ weight.T
        )
    (logps,) = metrics.row_logps(model, [row], 0)
    assert logps == pytest.approx(whole_table(model, row), abs=1e-5)
