"What vLLM is handed, without vLLM: adapters with experts apart, plain tokenizers, the base of an adapter."

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
from test_chat import kimi_folder

from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.launch_teacher_vllm import Config, command, find_adapter, hand_over
from k2lab.models.adapters import lora
from k2lab.models.load import Loading, open_model, open_tokenizer, save_checkpoint, smoke_model
from k2lab.serving.vllm import check_applied, experts_apart, plain_tokenizer, vllm_adapter


@pytest.fixture(scope='module', autouse=True)
def runs(tmp_path_factory):
    "Runs and smoke models of this file lie in a folder of their own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        yield


def adapted(parts):
    "A small K2 with a random adapter on some parts."
    from peft import get_peft_model

    model = open_model('smoke:k2')
    model = get_peft_model(model, lora(model, Loading(lora_rank=2, adapt=parts)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_' in name:
                p.normal_(0, 0.1)
    return model


def tensors_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / 'adapter_model.safetensors')


# ---- adapters --------------------------------------------------------------------------------------------------


def test_each_expert_gets_the_change_that_merging_gives_it(tmp_path):
    model = adapted(('routed', 'shared', 'dense'))
    model.save_pretrained(tmp_path / 'own')
    assert vllm_adapter(tmp_path / 'own', tmp_path / 'out') == 2
    tensors, config = tensors_of(tmp_path / 'out'), tmp_path / 'out/adapter_config.json'
    told = json.loads(config.read_text())
    scale = told['lora_alpha'] / told['r']
    before, after = open_model('smoke:k2').state_dict(), model.merge_and_unload().state_dict()
    stack = 'model.layers.1.mlp.experts.gate_up_proj'
    change = after[stack] - before[stack]
    assert change.abs().max() > 1e-3
    for e, whole in enumerate(change):
        at = f'base_model.model.model.layers.1.mlp.experts.{e}'
        gate, up = (
            scale * tensors[f'{at}.{p}.lora_B.weight'] @ tensors[f'{at}.{p}.lora_A.weight']
            for p in ('gate_proj', 'up_proj')
        )
        assert torch.allclose(torch.cat([gate, up]), whole, atol=1e-6)
    assert not [n for n in tensors if '.experts.lora' in n or 'base_layer' in n]
    assert (told['target_modules'], told['target_parameters']) == (
        ['down_proj', 'gate_proj', 'up_proj'],
        None,
    )


def test_an_adapter_without_experts_is_the_same_file(tmp_path):
    adapted(('shared', 'dense')).save_pretrained(tmp_path / 'own')
    vllm_adapter(tmp_path / 'own', tmp_path / 'out')
    own, out = tensors_of(tmp_path / 'own'), tensors_of(tmp_path / 'out')
    assert own.keys() == out.keys() and all(torch.equal(own[n], out[n]) for n in own)


@pytest.mark.parametrize('part, layer', [('attention', 'kv_b_proj'), ('router', 'gate')])
def test_what_vllm_would_leave_out_is_refused(part, layer, tmp_path):
    adapted(('dense', part)).save_pretrained(tmp_path / 'own')
    with pytest.raises(LabError, match=f'vLLM applies none to {layer}, .*serve model=k2') as e:
        vllm_adapter(tmp_path / 'own', tmp_path / 'out', 'model=k2')
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('text, line', [('{', 'Expecting'), ('{"peft_type": "LOHA"}', 'is LOHA')])
def test_what_is_no_lora_is_refused(text, line, tmp_path):
    "A merged checkpoint in its place, half a file, another kind of adapter."
    with pytest.raises(LabError, match=r'adapter: none in .*publishes one as <saves>_adapter'):
        vllm_adapter(smoke_model('k2'), tmp_path / 'out')
    (tmp_path / 'adapter_config.json').write_text(text)
    (tmp_path / 'adapter_model.safetensors').write_text('')
    with pytest.raises(LabError, match=line) as e:
        vllm_adapter(tmp_path, tmp_path / 'out')
    assert '\n' not in str(e.value) and not (tmp_path / 'out').exists()


def test_half_an_adapter_is_refused():
    at = 'base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight'
    half = {at.format('A'): torch.ones(4, 8), at.format('B'): torch.ones(12, 4)}
    with pytest.raises(LabError, match='layers.1.mlp.experts lacks the pair of a projection'):
        experts_apart(half, 2)
    with pytest.raises(LabError, match='vLLM applies none to lm_head'):
        check_applied(['base_model.model.lm_head.lora_A.weight'], 'it')


def test_an_adapter_is_served_on_the_base_that_it_was_trained_on(tmp_path):
    "By content, not by name."
    told = {'load.lora_rank': 2, 'load.adapt': ['shared', 'dense'], 'trainer.max_steps': 1}
    from k2lab.train_sft_domain import train

    trained = start('train_sft_domain', 'smoke', changes=told, campaign='c')
    train(trained)
    trained.finish()
    name = f'k2_domain_instruct_adapter@{trained.folder.name}'
    asked = dict(engine='vllm', adapter=name, model='k2_domain_pretrain')
    job = start('launch_teacher_vllm', 'smoke', changes=asked, campaign='c')
    job.find(job.cfg.model)
    adapter = find_adapter(job)
    handed = hand_over(job.cfg, 'smoke:k2', adapter, tmp_path / 'server')
    line = command(job.cfg, 'smoke:k2', 1, handed)
    at = line.index('--lora-modules')
    assert json.loads(line[at + 1])['name'] == 'k2_domain_instruct_adapter'
    assert line[at - 3 : at] == ['--enable-lora', '--max-lora-rank', '8']
    other = tmp_path / 'other'
    model, tok = open_model('smoke:k2'), open_tokenizer('smoke:k2')
    model.lm_head.weight.data += 1
    save_checkpoint(model, tok, other)
    job = start(
        'launch_teacher_vllm', 'smoke', changes=asked | dict(model=str(other)), campaign='c'
    )
    job.find(job.cfg.model)
    with pytest.raises(LabError, match='was trained on k2_domain_pretrain .*another checkpoint'):
        find_adapter(job)


# ---- tokenizers ------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_code_becomes_a_plain_one(tmp_path):
    place = tmp_path / 'own'
    shutil.copytree(smoke_model('k2'), place, ignore=shutil.ignore_patterns('tokenizer*'))
    path = kimi_folder(place) / 'tokenizer_config.json'
    assert plain_tokenizer(place, tmp_path / 'unused') is None
    config = json.loads(path.read_text())
    config |= dict(auto_map=dict(AutoTokenizer=['tokenization_kimi.TikTokenTokenizer', None]))
    path.write_text(json.dumps(config))
    (place / 'tokenization_kimi.py').write_text('raise SystemExit("code was run")')
    cfg = Config(engine='vllm')
    handed = hand_over(cfg, place, None, tmp_path / 'server')
    plain = Path(handed['tokenizer'])
    assert open_tokenizer(plain).get_vocab() == open_tokenizer(place).get_vocab()
    assert 'auto_map' not in json.loads((plain / 'tokenizer_config.json').read_text())
    assert not list(plain.glob('*.py'))
    own = replace(cfg, vllm=dict(tokenizer='of/mine'))
    assert hand_over(own, place, None, tmp_path / 'server') == {}
    assert command(own, place, 1).count('--tokenizer') == 1
    assert hand_over(Config(), place, None, tmp_path / 'server') == {}
