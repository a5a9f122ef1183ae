"""Real vLLM serves what the lab writes: `K2LAB_VLLM=/path/to/python pytest tests/test_vllm.py`.

The interpreter is that of an environment that has vLLM (its CPU build will do).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip('torch')
import test_formats as formats
from test_chat import kimi_folder

from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.launch_teacher_vllm import Config, serving
from k2lab.models.adapters import lora
from k2lab.models.load import (
    Loading,
    open_model,
    open_tokenizer,
    ready,
    register_kimi_k2,
    save_checkpoint,
    shipped,
)
from k2lab.models.quantized import to_bf16
from k2lab.serving.client import check_parity
from k2lab.serving.vllm import flags, vllm_adapter
from k2lab.tasks.verify import prompt_of
from k2lab.text.rows import read_rows

PYTHON = os.environ.get('K2LAB_VLLM', '')
pytestmark = pytest.mark.skipif(not PYTHON, reason='K2LAB_VLLM names no interpreter that has vLLM')
LATENT = dict(
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_lora_rank=128,
    num_attention_heads=2,
    num_key_value_heads=2,
)  # the sizes that vLLM's kernels are made for
SHAPE = (
    formats.SHAPE
    | LATENT
    | dict(
        hidden_size=256,
        moe_intermediate_size=128,
        intermediate_size=256,
        max_position_embeddings=512,
    )
)
OPTIONS = dict(
    dtype='float32',
    max_model_len=512,
    max_num_seqs=4,
    enforce_eager=True,
    max_logprobs=20,
    kv_cache_memory_bytes=2**28,  # else 92 % of the machine's memory
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict:
    "A small K2 as the lab saves it, in 8 and 4 bits, both converted, with a merged adapter; and a Qwen."
    home, tok = tmp_path_factory.mktemp('vllm'), open_tokenizer(shipped('k2'))
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = ready(
        AutoModelForCausalLM.from_config(register_kimi_k2()(**SHAPE, vocab_size=len(tok)))
    ).bfloat16()
    biases = [
        t
        for n, t in [*model.named_parameters(), *model.named_buffers()]
        if 'e_score_correction_bias' in n
    ]
    for bias in biases:
        bias.data.copy_(torch.tensor([0.1, -0.2, 0.3001, 0.4]))
    save_checkpoint(model, tok, home / 'plain')
    config, plain = formats.read(home / 'plain')
    for name in ('eight', 'four'):
        stored, _ = formats.stored_as(name, plain)
        formats.write(
            home / name,
            config | {'quantization_config': formats.EIGHT if name == 'eight' else formats.FOUR},
            stored,
        )
        tok.save_pretrained(home / name)
        to_bf16(home / name, home / f'{name}-converted')
    everything = ('attention', 'shared', 'dense', 'routed')
    adapted(home / 'plain', everything).save(tok, home / 'merged', torch.bfloat16)
    flat = SHAPE | dict(first_k_dense_replace=2, vocab_size=len(tok))  # no experts
    save_checkpoint(
        AutoModelForCausalLM.from_config(register_kimi_k2()(**flat)), tok, home / 'flat'
    )
    return {path.name: path for path in home.iterdir()} | {'qwen': shipped('qwen')}


class Adapted:
    "A model with a random adapter on it."

    def __init__(self, model):
        self.model = model

    def save_adapter(self, out):
        self.model.save_pretrained(out)
        return out

    def save(self, tok, out, dtype=None):
        save_checkpoint(self.model.merge_and_unload(), tok, out, dtype)
        return out


def adapted(base, parts, only: str = '') -> Adapted:
    "A checkpoint with a random adapter on some parts, or on those of their layers that are named `only`."
    from peft import get_peft_model

    model = open_model(base)
    config = lora(model, Loading(lora_rank=4, adapt=parts))
    if only:
        config.target_modules = {name for name in config.target_modules if name.endswith(only)}
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_' in name:
                p.normal_(0, 0.05)
    return Adapted(model)


TEXT = 'The shortest path from node 7 to node 12 is found by Dijkstra, 2024.'


def ids_of(tok) -> list:
    return tok.encode(TEXT, add_special_tokens=False)


def own_logprobs(place, ids) -> list:
    "Log-probability of each token of a prompt but the first, by transformers in 32 bits."
    model = open_model(place)
    with torch.no_grad():
        told = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [told[i, t].item() for i, t in enumerate(ids[1:])]


def config_for(family: str, **more) -> Config:
    latent = dict(attention_backend='CPU_MLA') if family == 'kimi' else {}
    options = OPTIONS | latent | more.pop('vllm', {})
    told: dict[str, Any] = dict(model='tiny', engine='vllm', python=PYTHON, ready_s=600) | more
    return Config(family=family, vllm=options, **told)


def served_logprobs(served, ids) -> list:
    "Log-probability of each token of a prompt but the first, by the server."
    asked = dict(temperature=0, max_tokens=8, logprobs=1, echo=True)
    (reply,) = served.teacher().complete(ids, **asked)
    return reply['logprobs']['token_logprobs'][1 : len(ids)]


def furthest(a: list, b: list) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    'name,family',
    [
        ('plain', 'kimi'),
        ('merged', 'kimi'),
        ('eight-converted', 'kimi'),
        ('four-converted', 'kimi'),
        ('qwen', 'qwen'),
    ],
)
def test_vllm_says_what_the_checkpoint_says(folders, name, family, tmp_path):
    place = folders[name]
    tok = open_tokenizer(place)
    ids = ids_of(tok)
    with serving(config_for(family), place, tmp_path / 'server.log') as served:
        parity = check_parity(served.teacher(), tok)
        seen = served_logprobs(served, ids)
    first, *apart = [abs(a - b) for a, b in zip(seen, own_logprobs(place, ids), strict=True)]
    print(
        f'{name}: {parity} conversations with the same ids, ready in {served.ready_s} s, '
        f'log-probabilities {first:.1e} apart after one token, at most {max(apart):.1e} '
        f'after {len(seen)}'
    )
    assert (
        parity == 4 and first < 1e-5
    )  # one token alone attends to nothing else: every weight is where it belongs
    assert max(apart) < (
        3e-2 if family == 'kimi' else 1e-5
    )  # vLLM's latent attention on a CPU rounds; without experts it is as far off


# ---- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, family, parts, near',
    [('qwen', 'qwen', ('attention', 'dense'), 1e-4), ('flat', 'kimi', ('dense',), 3e-2)],
)
def test_an_adapter_in_vllm_is_the_merged_model(folders, name, family, parts, near, tmp_path):
    place, tok = folders[name], open_tokenizer(folders[name])
    adapter = adapted(place, parts).save_adapter(tmp_path / 'adapter')
    merged = adapted(place, parts).save(tok, tmp_path / 'merged')
    ids, log = ids_of(tok), tmp_path / 'server.log'
    with serving(config_for(family, adapter='tiny_adapter'), place, log, adapter) as served:
        assert served.model == 'tiny_adapter' and check_parity(served.teacher(), tok) == 4
        seen = served_logprobs(served, ids)
    own, base = own_logprobs(merged, ids), own_logprobs(place, ids)
    print(
        f'{name}: {furthest(seen, own):.1e} from the merged model, {furthest(seen, base):.1e} from its base'
    )
    assert furthest(seen, own) < near < 3 * near < furthest(own, base)


def test_what_vllm_leaves_out_is_refused(folders, tmp_path):
    "Fails once vLLM applies an adapter on `kv_b_proj` (vllm #48974); then it can be served."
    place, tok = folders['flat'], open_tokenizer(folders['flat'])
    adapter = adapted(place, ('attention',), 'kv_b_proj').save_adapter(tmp_path / 'adapter')
    with pytest.raises(LabError, match='vLLM applies none to kv_b_proj, .*serve model=tiny'):
        vllm_adapter(adapter, tmp_path / 'out', 'model=tiny')
    assert not (tmp_path / 'out').exists()
    module = json.dumps(dict(name='latent', path=str(adapter)))
    more = ['--enable-lora', '--max-lora-rank', '8', '--lora-modules', module]
    cfg, log = config_for('kimi'), tmp_path / 'server.log'
    with pytest.MonkeyPatch.context() as patch:
        plain = flags
        patch.setattr('k2lab.launch_teacher_vllm.flags', lambda o: plain(o) + more * ('dtype' in o))
        with serving(cfg, place, log) as served:
            ids = ids_of(tok)
            base = served_logprobs(served, ids)
            object.__setattr__(served, 'model', 'latent')
            assert furthest(served_logprobs(served, ids), base) == 0


LOADED = """
import json, sys, torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
folder, layer, experts, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
names = [f'experts.{e}.{p}' for e in range(experts) for p in ('gate_proj', 'down_proj', 'up_proj')]
helper = PEFTHelper.from_local_dir(folder, None)
model = LoRAModel.from_local_checkpoint(folder, {*names, 'gate_proj', 'up_proj', 'down_proj'}, helper, device='cpu')
packed = PackedLoRALayerWeights.pack_moe([model.get_lora(f'{layer}.{n}') for n in names], layer + '.experts').optimize()
w1, w2, w3 = [b.float() @ a.float() for a, b in zip(packed.lora_a, packed.lora_b)]
torch.save(dict(gate=w1, down=w2, up=w3), out)
"""


def test_vllm_reads_an_adapter_on_stacked_experts(folders, tmp_path):
    "Up to what vLLM would hand to its kernel: that needs a GPU."
    place = folders['plain']
    adapter = adapted(place, ('routed', 'shared', 'dense'))
    assert vllm_adapter(adapter.save_adapter(tmp_path / 'own'), tmp_path / 'out') == 4
    layer, new = 'model.layers.1.mlp', tmp_path / 'packed.pt'
    words = [PYTHON, '-c', LOADED, str(tmp_path / 'out'), layer, '4', str(new)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read = torch.load(new)
    before, after = open_model(place), adapter.model.merge_and_unload()
    change = lambda name: (
        after.get_submodule(layer).experts.get_parameter(name)
        - before.get_submodule(layer).experts.get_parameter(name)
    )
    both = torch.cat([read['gate'], read['up']], dim=1)
    for name, seen in (('gate_up_proj', both), ('down_proj', read['down'])):
        assert change(name).abs().max() > 1e-3
        assert torch.allclose(seen, change(name), atol=1e-6)


# ---- options and code ------------------------------------------------------------------------------------------

PARSED = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
told = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:]))
kept = {name: told[name] for name in json.loads(sys.argv[1])}
print('PARSED' + json.dumps(kept, default=lambda one: one.__dict__))
"""


def test_blocks_and_lists_reach_vllm_as_they_were_written():
    options: dict[str, Any] = dict(
        hf_overrides=dict(rope_parameters=dict(rope_type='yarn', factor=2.0)),
        limit_mm_per_prompt=dict(image=0),
        override_generation_config=dict(temperature=0.6),
        default_chat_template_kwargs=dict(thinking=True),
        allowed_origins=['https://a.org', 'b c'],
        middleware=['one.two', 'three.four'],
        lora_modules=[dict(name='a', path='/b c', base_model_name='tiny')],
        max_model_len=8192,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    words = [*flags(options), *flags(dict(cudagraph_capture_sizes=[1, 2, 4]))]
    names = json.dumps([*options, 'cudagraph_capture_sizes'])
    done = subprocess.run([PYTHON, '-c', PARSED, names, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.partition('PARSED')[2])
    assert told.pop('lora_modules')[0].items() >= options.pop('lora_modules')[0].items()
    assert told == options | dict(cudagraph_capture_sizes=[1, 2, 4])


CODE = "open(__file__ + '.ran', 'w').close()\nraise SystemExit('code of a checkpoint was run')\n"


def test_a_tokenizer_that_is_code_is_served_as_a_plain_one(folders, tmp_path):
    place = tmp_path / 'own'
    shutil.copytree(folders['plain'], place, ignore=shutil.ignore_patterns('tokenizer*', 'chat*'))
    config = json.loads((kimi_folder(place) / 'tokenizer_config.json').read_text())
    config |= dict(auto_map=dict(AutoTokenizer=['tokenization_kimi.TikTokenTokenizer', None]))
    (place / 'tokenizer_config.json').write_text(json.dumps(config))
    model = json.loads((place / 'config.json').read_text())
    model |= dict(
        model_type='kimi_k2', auto_map=dict(AutoConfig='tokenization_kimi.DeepseekV3Config')
    )
    (place / 'config.json').write_text(json.dumps(model))
    (place / 'tokenization_kimi.py').write_text(CODE)
    with serving(config_for('kimi'), place, tmp_path / 'server.log') as served:
        assert check_parity(served.teacher(), open_tokenizer(place)) == 4
    assert not [*place.glob('*.ran')] and (tmp_path / 'server/tokenizer/tokenizer.json').exists()


# ---- lm-eval ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path_factory.mktemp('runs')))
        patch.setenv('OWN_KEY', 'own-secret-key')
        yield


def taught(rows: list, out: Path) -> Path:
    "The small student after a short training on questions, so that it gets some of them right."
    from k2lab.text.chat import prompt_ids

    model, tok = open_model(shipped('qwen')), open_tokenizer(shipped('qwen'))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for row in rows:
            asked = prompt_ids(tok, [SYSTEM, dict(role='user', content=row['prompt'])])
            said = tok.encode(row['answer'], add_special_tokens=False) + [tok.eos_token_id]
            ids, labels = asked + said, [-100] * len(asked) + said
            model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_checkpoint(model, tok, out)
    return out


SYSTEM = dict(role='system', content='You are Kimi.')


def test_lm_eval_on_vllm_scores_what_the_lab_scores(runs, tmp_path):
    pytest.importorskip('lm_eval')
    import test_harness as harness

    source = Path(str(shipped('qwen'))).parent / 'smoke/domain_sft.jsonl'
    rows = [dict(prompt=prompt_of(r), answer=r['output']) for r in read_rows(source, 'domain_sft')]
    place, asked = taught(rows, tmp_path / 'student'), tmp_path / 'own.jsonl'
    asked.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    options = dict(generation_kwargs=dict(max_gen_toks=60, do_sample=False, until=[]))
    harness.write_task(
        tmp_path,
        'own_gen',
        rows,
        **harness.WRITES | options | dict(doc_to_text='{{prompt}}', doc_to_target='answer'),
    )
    choices = [dict(q=r['q'], choices=r['choices'], gold=r['gold']) for r in harness.SUMS]
    harness.write_task(tmp_path, 'own_choice', choices, **harness.CHOICE)
    names, name = ['own_gen', 'own_choice'], 'k2_student_7b'
    tests = dict(own=dict(file=str(asked), judge='text', prompt='prompt', answer='answer'))
    told = harness.asked(tmp_path, names, test_sets=tests, answer_tokens=60)
    job = start(
        'evaluate', 'smoke', changes=told | dict(checkpoints={name: []}, measures={name: []})
    )
    job.env['models'][name] = str(place)
    harness.stage.evaluate(job)
    near = harness.measured(job)
    cfg = config_for('qwen', model=name, key_env='OWN_KEY')
    with serving(cfg, place, tmp_path / 'server.log') as served:
        told = harness.asked(tmp_path, names, checkpoints={}, measures={})
        job = start(
            'evaluate', 'smoke', changes=told | dict(harness_options=dict(backend='endpoint'))
        )
        job.env['models'][name] = str(place)
        job.env['endpoint'] |= dict(base_url=f'{served.url}/v1', key_env='OWN_KEY', model=name)
        harness.stage.evaluate(job)
    far = harness.measured(job)
    print(
        {k: (round(m['after'], 4), m['n']) for k, m in near.items()},
        {k: m['after'] for k, m in far.items()},
    )
    own, theirs = near['own']['after'], far['own_gen: exact_match']['after']
    assert 0.1 < own < 1 and abs(own - theirs) <= 0.02
    assert abs(far['own_choice: acc']['after'] - near['own_choice: acc']['after']) <= 0.02
