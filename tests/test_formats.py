"Tiny checkpoints in the formats K2 is published in: written here, opened, converted, and broken in many ways."

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file

from k2lab.lab.checkpoint import flaw
from k2lab.lab.config import LabError
from k2lab.models.load import (
    Loading,
    open_model,
    open_tokenizer,
    ready,
    register_kimi_k2,
    save_checkpoint,
    shipped,
)
from k2lab.models.quantized import (
    WEIGHT_INDEX,
    backbone,
    dequantised_fp8,
    dequantised_int4,
    fetched,
    model_names,
    scheme,
    to_bf16,
)

BLOCK, GROUP = 128, 32
REAL = Path(__file__).resolve().parents[2] / 'shared/kimi-tokenizer/config.json'
SHAPE = dict(
    hidden_size=160,
    num_hidden_layers=2,
    n_routed_experts=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    moe_intermediate_size=104,
    intermediate_size=288,
    q_lora_rank=96,
    kv_lora_rank=128,
    num_experts_per_tok=2,
    n_shared_experts=1,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    topk_method='noaux_tc',
    scoring_func='sigmoid',
)  # 144 rows of kv_a_proj_with_mqa: a block and a cut one; 104 columns of down_proj: three groups and a cut one
EIGHT = {
    'quant_method': 'fp8',
    'fmt': 'e4m3',
    'activation_scheme': 'dynamic',
    'weight_block_size': [BLOCK, BLOCK],
}
FOUR = {
    'quant_method': 'compressed-tensors',
    'format': 'pack-quantized',
    'quantization_status': 'compressed',
    'ignore': ['lm_head', 're:.*self_attn.*', 're:.*shared_experts.*'],
    'config_groups': {
        'group_0': {
            'targets': ['Linear'],
            'weights': {
                'num_bits': 4,
                'type': 'int',
                'symmetric': True,
                'strategy': 'group',
                'group_size': GROUP,
                'actorder': None,
                'dynamic': False,
            },
        }
    },
}
CODE = 'from pathlib import Path\nPath(__file__).with_name("ran").touch()\n'


# ---- the way back, for these tests only --------------------------------------------------------------------


def blocks(w, down: int, across: int):
    "Each block's rows and columns."
    for r in range(0, w.shape[0], down):
        for c in range(0, w.shape[1], across):
            yield r // down, c // across, slice(r, r + down), slice(c, c + across)


def quantised_fp8(w) -> tuple:
    "`(e4m3 weights, factors, what they stand for)`."
    scale = torch.zeros(-(-w.shape[0] // BLOCK), -(-w.shape[1] // BLOCK))
    q, plain = (
        torch.zeros(w.shape, dtype=torch.float8_e4m3fn),
        torch.zeros(w.shape, dtype=torch.bfloat16),
    )
    for i, j, rows, cols in blocks(w, BLOCK, BLOCK):
        scale[i, j] = w[rows, cols].abs().max() / 448
        q[rows, cols] = (w[rows, cols] / scale[i, j]).to(q.dtype)
        plain[rows, cols] = (q[rows, cols].float() * scale[i, j]).bfloat16()
    return q, scale, plain


def quantised_int4(w) -> tuple:
    "`(packed int32, factors, what they stand for)`, row by row and nibble by nibble."
    scale, q = (
        torch.zeros(w.shape[0], -(-w.shape[1] // GROUP), dtype=torch.bfloat16),
        torch.zeros(w.shape, dtype=torch.long),
    )
    plain, packed = (
        torch.zeros(w.shape, dtype=torch.bfloat16),
        torch.zeros(w.shape[0], -(-w.shape[1] // 8), dtype=torch.long),
    )
    for i, j, rows, cols in blocks(w, 1, GROUP):
        scale[i, j] = w[rows, cols].abs().max() / 7
        q[rows, cols] = (w[rows, cols] / scale[i, j].float()).round().clamp(-8, 7).long()
        plain[rows, cols] = q[rows, cols].to(torch.bfloat16) * scale[i, j]
    for c in range(w.shape[1]):
        packed[:, c // 8] += (q[:, c] + 8) << 4 * (c % 8)
    return (packed - (packed >= 2**31).long() * 2**32).to(torch.int32), scale, plain


# ---- tiny checkpoints --------------------------------------------------------------------------------------


def write(folder: Path, config: dict, tensors: dict, files: int = 3):
    "A checkpoint in several files, pieces of one weight in different ones."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(config))
    names = [f'model-{i + 1}-of-{files}.safetensors' for i in range(files)]
    where = {n: names[i % files] for i, n in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: tensors[n].contiguous() for n in tensors if where[n] == file}, folder / file)
    (folder / WEIGHT_INDEX).write_text(json.dumps({'weight_map': where}))


def read(folder: Path) -> tuple:
    "`(config, tensors)` of a checkpoint."
    return json.loads((folder / 'config.json').read_text()), {
        n: t for f in folder.glob('*.safetensors') for n, t in load_file(f).items()
    }


def stored_as(name: str, plain: dict) -> tuple:
    "`(tensors as they lie in a file, what each weight must come out as)` in 8 or in 4 bits, as K2 is published."
    stored, want = {}, {}
    for n, t in plain.items():
        if not re.search(r'_proj' if name == 'eight' else r'\.mlp\.experts\.', n):
            stored[n] = want[n] = t
        elif name == 'eight':
            stored[n], stored[f'{n}_scale_inv'], want[n] = quantised_fp8(t.float())
        else:
            stored[f'{n}_packed'], stored[f'{n}_scale'], want[n] = quantised_int4(t.float())
            stored[f'{n}_shape'] = torch.tensor(t.shape, dtype=torch.int32)
    return stored, want


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> dict:
    "Folders by format, what each must come out as, and the tokenizer."
    home, tok = tmp_path_factory.mktemp('formats'), open_tokenizer(shipped('k2'))
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = ready(
        AutoModelForCausalLM.from_config(register_kimi_k2()(**SHAPE, vocab_size=len(tok)))
    ).bfloat16()
    save_checkpoint(model, tok, home / 'plain')
    config, plain = read(home / 'plain')
    bias = 'model.layers.1.mlp.gate.e_score_correction_bias'
    plain[bias] = torch.tensor([0.1, -0.2, 0.3001, 0.4])
    out = {'home': home, 'tok': tok, 'bias': bias}
    code = {
        'auto_map': {
            'AutoConfig': 'configuration_deepseek.DeepseekV3Config',
            'AutoModelForCausalLM': 'modeling_deepseek.DeepseekV3ForCausalLM',
        }
    }
    for name in ('eight', 'four'):
        stored, want = stored_as(name, plain)
        write(
            home / name,
            config | code | {'quantization_config': EIGHT if name == 'eight' else FOUR},
            stored,
        )
        out[name] = want
    eyes = {f'language_model.{n}': t for n, t in stored.items()} | {
        'vision_tower.patch_embed.proj.weight': torch.ones(3, 3),
        'mm_projector.proj.0.bias': torch.ones(3),
    }
    write(
        home / 'seeing',
        {
            'model_type': 'kimi_k25',
            'architectures': ['KimiK25ForConditionalGeneration'],
            'vision_config': {'patch_size': 14},
            'text_config': config
            | code
            | {'quantization_config': FOUR, 'temperature': 1.0, 'top_k': 50},
        }
        | code,
        eyes,
    )
    out['seeing'] = out['four']
    for name in ('eight', 'four', 'seeing'):
        tok.save_pretrained(home / name)
        for file in ('configuration_deepseek.py', 'modeling_deepseek.py', 'tokenization_kimi.py'):
            (home / name / file).write_text(CODE)
    return out


FORMATS = pytest.mark.parametrize('name', ['eight', 'four', 'seeing'])


def logits(model):
    "What a model says to ten tokens."
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


# ---- kernels -----------------------------------------------------------------------------------------------


def test_kernels_at_shapes_that_the_blocks_do_not_divide():
    torch.manual_seed(1)
    for rows, cols in ((576, 256), (160, 130), (1, 1), (128, 128), (129, 40)):
        q, scale, plain = quantised_fp8(torch.randn(rows, cols))
        assert torch.equal(dequantised_fp8(q, scale), plain)
        q, scale, plain = quantised_int4(torch.randn(rows, cols))
        assert torch.equal(dequantised_int4(q, scale, [rows, cols]), plain)


def test_the_names_of_a_k2_are_those_that_transformers_saves(made):
    from transformers import AutoModelForCausalLM

    config, tensors = read(made['home'] / 'plain')
    assert sorted(model_names(config)) == sorted(tensors)
    flat = register_kimi_k2()(**{**SHAPE, 'q_lora_rank': None}, vocab_size=16)
    AutoModelForCausalLM.from_config(flat).save_pretrained(made['home'] / 'flat')
    config, tensors = read(made['home'] / 'flat')
    assert (
        sorted(model_names(config)) == sorted(tensors)
        and 'model.layers.0.self_attn.q_proj.weight' in tensors
    )


@pytest.mark.skipif(not REAL.exists(), reason='the real config of K2.6 is not beside this checkout')
def test_the_real_config_of_k2_6():
    told = json.loads(REAL.read_text())
    config = register_kimi_k2().from_dict(backbone(told))
    assert scheme(told) == {'group': 32} and len(
        model_names(backbone(told))
    ) == 3 + 61 * 9 + 3 + 60 * (384 * 3 + 3 + 2)
    assert (
        config.num_hidden_layers,
        config.hidden_size,
        config.rope_parameters['factor'],
        config.rope_parameters['mscale_all_dim'],
    ) == (61, 7168, 64.0, 1.0)


# ---- opened and saved again --------------------------------------------------------------------------------


@FORMATS
def test_opened_is_the_reference_bit_for_bit_and_saves_as_engines_read_it(name, made, tmp_path):
    model = open_model(made['home'] / name, Loading(dtype='bfloat16'))
    assert (
        model.config.model_type == 'kimi_k2'
        and model.state_dict()[made['bias']].dtype == torch.float32
    )
    save_checkpoint(model, made['tok'], tmp_path / 'again')
    config, tensors = read(tmp_path / 'again')
    assert same(tensors, made[name])
    assert config['architectures'] == ['DeepseekV3ForCausalLM'] and (
        config['topk_method'],
        config['scoring_func'],
    ) == ('noaux_tc', 'sigmoid')
    assert not {'auto_map', 'quantization_config', 'text_config'} & set(config)
    assert torch.equal(
        logits(open_model(tmp_path / 'again', Loading(dtype='bfloat16'))), logits(model)
    )


@FORMATS
def test_converted_opens_with_the_same_logits(name, made, tmp_path):
    steps, out = [], tmp_path / 'plain'
    done = to_bf16(
        made['home'] / name, out, limit=100_000, on_shard=lambda *told: steps.append(told)
    )
    config, tensors = read(out)
    assert (
        same(tensors, made[name])
        and flaw(out) == ''
        and len(list(out.glob('*.safetensors'))) == len(steps) > 5
    )
    assert steps[-1][:2] == (len(tensors),) * 2 and [s[0] for s in steps] == sorted(
        s[0] for s in steps
    )
    assert (
        done['left_out'] == ({'vision': 2} if name == 'seeing' else {})
        and 'modeling_deepseek.py' in done['files_left_out']
    )
    assert (
        not list(out.glob('*.py'))
        and (out / 'tokenizer.json').exists()
        and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]
    )
    told = json.loads((out / 'MANIFEST.json').read_text())['state']
    assert told['tensors'][made['bias']][:2] == ['float32', [4]] and told['from'] == name
    for dtype in ('bfloat16', 'float32'):
        assert torch.equal(
            logits(open_model(out, Loading(dtype=dtype))),
            logits(open_model(made['home'] / name, Loading(dtype=dtype))),
        )
    assert open_tokenizer(out).get_vocab() == made['tok'].get_vocab()


def test_a_weight_that_was_changed_after_conversion_is_noticed(made, tmp_path):
    to_bf16(made['home'] / 'four', tmp_path / 'plain')
    file = next((tmp_path / 'plain').glob('*.safetensors'))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert file.name in flaw(tmp_path / 'plain')


def test_no_folder_is_written_over_and_a_plain_one_is_not_converted(made, tmp_path):
    (tmp_path / 'taken').mkdir()
    with pytest.raises(LabError, match='exists already'):
        to_bf16(made['home'] / 'four', tmp_path / 'taken')
    (tmp_path / '.next.part').mkdir()
    with pytest.raises(LabError, match='was interrupted'):
        to_bf16(made['home'] / 'four', tmp_path / 'next')
    with pytest.raises(LabError, match='nothing to convert'):
        to_bf16(made['home'] / 'plain', tmp_path / 'new')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.next.part', 'taken']


# ---- faults ------------------------------------------------------------------------------------------------

Q, EXPERT, KV = (
    'model.layers.0.self_attn.q_a_proj.weight',
    'model.layers.1.mlp.experts.2.down_proj.weight',
    'model.layers.0.self_attn.kv_a_proj_with_mqa.weight',
)


def drop(*names):
    def fault(config, tensors):
        for n in names:
            del tensors[n]

    return fault


def put(name, change):
    def fault(config, tensors):
        tensors[name] = change(tensors[name]) if callable(change) else change

    return fault


def tell(change):
    def fault(config, tensors):
        change(config)

    return fault


def swap(a, b):
    def fault(config, tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return fault


def weights_of(config):
    return config['quantization_config']['config_groups']['group_0']['weights']


IN_TENSORS = {  # the format, what is done to (config, tensors), what must be said
    'scale is missing': (
        'eight',
        drop(f'{Q}_scale_inv'),
        f'{Q} is F8_E4M3 without its weight_scale_inv',
    ),
    'weight is missing, scale is there': ('eight', drop(KV), 'is stored as weight_scale_inv'),
    'scale is transposed': (
        'eight',
        put(f'{KV}_scale_inv', torch.ones(2, 3)),
        f'{KV} has factors \\[2, 3\\], its blocks need \\[2, 2\\]',
    ),
    'scales of two weights changed places': (
        'eight',
        swap(f'{Q}_scale_inv', 'model.layers.0.mlp.up_proj.weight_scale_inv'),
        'its blocks need',
    ),
    'scale is its inverse': (
        'eight',
        put(f'{Q}_scale_inv', lambda t: 1 / t),
        f'{Q} has a root mean square of .* factors are misread',
    ),
    'scale is zero': ('eight', put(f'{Q}_scale_inv', lambda t: t * 0), 'root mean square of 0'),
    'scale is no number': (
        'eight',
        put(f'{Q}_scale_inv', lambda t: t * float('nan')),
        f'{Q} has factors that are negative or no numbers',
    ),
    'scale is negative': ('eight', put(f'{Q}_scale_inv', lambda t: -t), 'negative'),
    'weight is no number': (
        'eight',
        put('model.norm.weight', lambda t: t / 0 * 0),
        'model.norm.weight holds values that are no numbers',
    ),
    'weight of another type': ('eight', put(Q, lambda t: t.float()), 'is F32, expected F8_E4M3'),
    'bias of zeros': (
        'eight',
        put('model.layers.1.mlp.gate.e_score_correction_bias', lambda t: t * 0),
        "e_score_correction_bias is zero everywhere",
    ),
    'bias is missing': (
        'four',
        drop('model.layers.1.mlp.gate.e_score_correction_bias'),
        '1 missing \\(model.layers.1.mlp.gate.e_score_correction_bias\\)',
    ),
    'an expert is missing': (
        'four',
        drop(*(f'{EXPERT}_{p}' for p in ('packed', 'scale', 'shape'))),
        f'1 missing \\({EXPERT}\\)',
    ),
    'an expert too many': (
        'four',
        put('model.layers.1.mlp.experts.4.up_proj.weight', torch.ones(104, 160)),
        '1 unexpected \\(model.layers.1.mlp.experts.4',
    ),
    'an empty tensor': (
        'four',
        put('model.norm.weight', torch.ones(0)),
        'model.norm.weight is empty, its shape is \\[0\\]',
    ),
    'packed without scale': (
        'four',
        drop(f'{EXPERT}_scale'),
        f'{EXPERT} is stored as weight_packed \\+ weight_shape',
    ),
    'packed scale of another shape': (
        'four',
        put(f'{EXPERT}_scale', lambda t: t[:, :-1]),
        f'{EXPERT} has factors \\[160, 3\\], its blocks need \\[160, 4\\]',
    ),
    'packed shape of another weight': (
        'four',
        put(f'{EXPERT}_shape', torch.tensor([160, 160], dtype=torch.int32)),
        f'{EXPERT} packed weights',
    ),
    'packed with a zero point': (
        'four',
        put(f'{EXPERT}_zero_point', torch.ones(160, 1)),
        'weight_zero_point',
    ),
    'asymmetric': (
        'four',
        tell(lambda c: weights_of(c).update(symmetric=False)),
        'cannot read weights stored as compressed-tensors',
    ),
    'eight packed bits': ('four', tell(lambda c: weights_of(c).update(num_bits=8)), 'cannot read'),
    'sorted by activation': (
        'four',
        tell(lambda c: weights_of(c).update(actorder='group')),
        'without actorder',
    ),
    'unknown quantization': (
        'four',
        tell(lambda c: c.update(quantization_config={'quant_method': 'awq'})),
        'stored as awq',
    ),
    'config for the other format': (
        'four',
        tell(lambda c: c.update(quantization_config=EIGHT)),
        "config.json says {'block'",
    ),
    'quantized, but nothing is': (
        'plain',
        tell(lambda c: c.update(quantization_config=EIGHT)),
        'no weight is stored so',
    ),
    'a part nobody knows': (
        'seeing',
        put('audio_tower.weight', torch.ones(2)),
        'unknown part of the model: audio_tower.weight',
    ),
    'a type nobody knows': (
        'four',
        tell(lambda c: c.update(model_type='kimi_k9')),
        "does not know the model type 'kimi_k9', and code that comes with a checkpoint is never run",
    ),
}


@pytest.mark.parametrize('fault', IN_TENSORS)
def test_faults_in_what_is_stored(fault, made, tmp_path):
    name, change, said = IN_TENSORS[fault]
    config, tensors = read(made['home'] / name)
    if name == 'plain':
        tensors[made['bias']] = made['four'][made['bias']]
    change(config, tensors)
    write(tmp_path / 'bad', config, tensors)
    with pytest.raises(LabError, match=said):
        open_model(tmp_path / 'bad')
    if 'kimi_k9' in said:
        return
    with pytest.raises(LabError, match=said):
        to_bf16(tmp_path / 'bad', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['bad']


def edit_index(folder, change):
    "Write a checkpoint's index again after `change(weight_map)`."
    told = json.loads((folder / WEIGHT_INDEX).read_text())
    change(told['weight_map'])
    (folder / WEIGHT_INDEX).write_text(json.dumps(told))


FILE = 'model-2-of-3.safetensors'
IN_FILES = {
    'a shard is missing': (lambda d: (d / FILE).unlink(), f'names {FILE}, which is not there'),
    'a shard was cut short': (
        lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-9]),
        f'{FILE}: .* it was cut short',
    ),
    'a head was cut short': (
        lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:50]),
        f'{FILE}: no safetensors file',
    ),
    'a pointer instead of a shard': (
        lambda d: (d / FILE).write_text(
            'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
        ),
        f'{FILE}: no safetensors file',
    ),
    'the index knows a tensor too many': (
        lambda d: edit_index(d, lambda m: m.update({'model.extra.weight': FILE})),
        f'{FILE}: no tensor model.extra.weight',
    ),
    'the index knows a tensor too few': (
        lambda d: edit_index(d, lambda m: m.pop('lm_head.weight')),
        'lm_head.weight is there, but not in',
    ),
    'the index points at another shard': (
        lambda d: edit_index(
            d,
            lambda m: m.update(
                {'lm_head.weight': next(f for f in m.values() if f != m['lm_head.weight'])}
            ),
        ),
        'no tensor lm_head.weight',
    ),
    'the index leaves the folder': (
        lambda d: edit_index(d, lambda m: m.update({'lm_head.weight': f'../bad/{FILE}'})),
        'which is not there',
    ),
    'no weights': (
        lambda d: [p.unlink() for p in (d / WEIGHT_INDEX, *d.glob('*.safetensors'))],
        'no weights there',
    ),
    'no config': (lambda d: (d / 'config.json').unlink(), 'config.json is missing'),
    'a broken config': (lambda d: (d / 'config.json').write_text('{'), 'config.json: '),
}


@pytest.mark.parametrize('fault', IN_FILES)
def test_faults_in_files(fault, made, tmp_path):
    change, said = IN_FILES[fault]
    shutil.copytree(made['home'] / 'four', tmp_path / 'bad')
    change(tmp_path / 'bad')
    with pytest.raises(LabError, match=said):
        open_model(tmp_path / 'bad')
    with pytest.raises(LabError, match=said):
        to_bf16(tmp_path / 'bad', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['bad']


# ---- code, and where checkpoints come from -----------------------------------------------------------------


@FORMATS
def test_code_of_a_checkpoint_is_never_run(name, made):
    folder = made['home'] / name
    open_model(folder)
    open_tokenizer(folder)
    assert not (folder / 'ran').exists() and not [
        m for m in sys.modules if m.startswith('transformers_modules')
    ]
    package = Path(sys.modules['k2lab'].__file__).parent
    assert not [
        p.name
        for p in package.glob('*.py')
        if re.search(r'trust_remote_code(?!=False)', p.read_text())
    ]


COMMIT = 'c0ffee' * 6 + 'cafe'


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    "A hub's cache with one model at one commit, and no network."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    home = tmp_path / 'models--moon--K2-tiny'
    shutil.copytree(made['home'] / 'four', home / 'snapshots' / COMMIT)
    (home / 'refs').mkdir()
    (home / 'refs/main').write_text(COMMIT)
    return home / 'snapshots' / COMMIT


def test_hub_ids_and_revisions(hub, made):
    assert (
        fetched('moon/K2-tiny')
        == fetched('moon/K2-tiny@main')
        == fetched(f'moon/K2-tiny@{COMMIT}')
        == hub
    )
    with pytest.raises(LabError, match='moon/K2-tiny@other: no such folder'):
        fetched('moon/K2-tiny@other')
    with pytest.raises(LabError, match='moon/K3: no such folder'):
        fetched('moon/K3')
    assert torch.equal(
        logits(open_model(f'moon/K2-tiny@{COMMIT}')), logits(open_model(made['home'] / 'four'))
    )


def test_a_run_records_the_commit_that_a_hub_id_stood_for(hub, lab):
    from k2lab.lab.job import start
    from k2lab.lab.names import open_place

    lab.write(
        'configs/env.yaml',
        'models: {zero: ./zero.txt, tiny: moon/K2-tiny, pinned: moon/K2-tiny@%s, elsewhere: moon/K3@v1}\n'
        % COMMIT,
    )
    job = start('train_toy')
    assert job.find('tiny') == job.find('pinned') == f'moon/K2-tiny@{COMMIT}'
    assert [p['place'] for p in job.record['parents']] == [f'moon/K2-tiny@{COMMIT}'] * 2 and all(
        p['run'] is None for p in job.record['parents']
    )
    assert job.find('elsewhere') == 'moon/K3@v1'
    for wrong in ('moon/K2 tiny', 'tiny@v1', 'a/b/c', 'data/x.jsonl', './x/y'):
        with pytest.raises(LabError, match='there is nothing there'):
            open_place('x', wrong)


def test_vllm_is_told_the_revision():
    from k2lab.launch_teacher_vllm import Config, command

    words = command(Config(engine='vllm'), 'moon/K2-tiny@v1', 1)
    assert (
        words[words.index('--model') + 1] == 'moon/K2-tiny'
        and [words[words.index(f'--{k}revision') + 1] for k in ('', 'tokenizer-')] == ['v1'] * 2
        and '--code-revision' not in words
    )
    assert '--revision' not in command(Config(engine='vllm'), Path('a@b'), 1) and 'a@b' in command(
        Config(engine='vllm'), Path('a@b'), 1
    )


def test_the_command_converts(made, hub, tmp_path, capsys):
    from k2lab.cli import main

    assert main(['convert', str(made['home'] / 'seeing'), str(tmp_path / 'plain')]) == 0
    told = capsys.readouterr()
    assert (
        '41 weights, 12 of them dequantised' in told.out
        and 'left out: 2 tensors (vision)' in told.out
        and 'modeling_deepseek.py' in told.out
    )
    with pytest.raises(LabError, match='moonshotai/Kimi-K2-Base: no such folder'):
        main(['convert', 'Kimi-K2-Base', str(tmp_path / 'x')])
    with pytest.raises(LabError, match='convert needs'):
        main(['convert'])
