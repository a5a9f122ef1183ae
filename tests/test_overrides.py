"A change of one value changes that value and nothing else, or is refused in one line."

import copy
import dataclasses
import functools
import itertools
import typing
from dataclasses import field

import pytest

from k2lab.cli import changes_of
from k2lab.lab import config
from k2lab.lab.config import SCALES, LabError, fill, resolve, stage_names
from k2lab.lab.job import config_of, stage_module

# values that are valid where one more or another letter is not
OTHER = {
    'dtype': {'bfloat16': 'float32', 'float32': 'bfloat16'},
    'lr_scheduler_type': {'cosine': 'linear', 'warmup_stable_decay': 'cosine'},
    'save_strategy': {'steps': 'epoch'},
}


parsed = functools.cache(config.read_yaml)


@pytest.fixture(autouse=True)
def files_read_once(monkeypatch):
    "Thousands of configurations are resolved here; each file is parsed once."
    monkeypatch.setattr(config, 'read_yaml', lambda path: copy.deepcopy(parsed(path)))


def resolved(stage: str, scale: str, changes: dict | None = None) -> dict:
    return config_of(resolve(stage_module(stage).Config, stage, scale, changes))


def leaves(block: dict, path: tuple = ()):
    "`(path, value)` of every value in a block that is no block itself."
    for key, value in block.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def another(key: str, value):
    "A valid value that is not `value`."
    if key in OTHER:
        return OTHER[key].get(value, 'cosine')
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return [*value, *value] if isinstance(value, list) else f'{value}2'


def changed_to(block: dict, path: tuple, value) -> dict:
    "The block with one value replaced."
    key, *deeper = path
    inner = changed_to(block[key], tuple(deeper), value) if deeper else value
    return {**block, key: inner}


def blocks():
    "`(stage, scale, field, path, value)` of every value in every block of every stage file at every scale."
    for stage, scale in itertools.product(stage_names(), SCALES):
        for name, value in resolved(stage, scale).items():
            if isinstance(value, dict):
                for path, leaf in leaves(value):
                    yield stage, scale, name, path, leaf


ALL = list(blocks())


def test_there_are_blocks_at_every_depth():
    fields = {(stage, name) for stage, _, name, _, _ in ALL}
    assert len(ALL) > 200 and len(fields) >= 16
    assert {len(path) for *_, path, _ in ALL} == {1, 2}


def test_every_dotted_change_changes_one_key():
    "100 %: the whole configuration with one leaf replaced, worked out without the code under test."
    for stage, scale, name, path, value in ALL:
        new = another(path[-1], value)
        key = '.'.join((name, *path))
        before = resolved(stage, scale)
        want = changed_to(before, (name, *path), new)
        assert resolved(stage, scale, {key: new}) == want, (stage, scale, key)
        text = str(new).lower() if isinstance(new, bool) else str(new)
        assert resolved(stage, scale, {key: text}) == want, (stage, scale, key, 'as text')
        nested = new
        for part in reversed(path):
            nested = {part: nested}
        assert resolved(stage, scale, {name: nested}) == want, (stage, scale, key, 'as a block')


def test_null_takes_one_key_out():
    for stage, scale, name, path, _ in ALL:
        key, before = '.'.join((name, *path)), resolved(stage, scale)
        try:
            after = resolved(stage, scale, {key: 'null'})
        except LabError:  # a mode that is asked for, or four_bit without a rank
            continue
        block, left = before[name], after[name]
        for part in path[:-1]:
            block, left = block[part], left[part]
        assert path[-1] in block and path[-1] not in left, (stage, scale, key)
        assert {**left, path[-1]: block[path[-1]]} == block
        assert {k: v for k, v in after.items() if k != name} == {
            k: v for k, v in before.items() if k != name
        }


# inputs of a trial of the lab: stage, scale, change, and the block that should come out
TRIAL = [
    (
        'train_sft_domain',
        'qlora',
        'load.lora_rank=64',
        {'dtype': 'bfloat16', 'four_bit': True, 'lora_rank': 64},
    ),
    (
        'train_sft_domain',
        'qlora',
        'load.four_bit=false',
        {'dtype': 'bfloat16', 'four_bit': False, 'lora_rank': 32},
    ),
    (
        'train_sft_domain',
        'nano',
        'mix.domain_sft=10',
        {'domain_sft': 10, 'domain': 300, 'general': 100},
    ),
    ('sample_teacher', 'nano', 'samples.preferences=2', {'preferences': 2, 'distill': 1}),
    (
        'launch_teacher_vllm',
        'full',
        'vllm.max_model_len=32768',
        {'tensor_parallel_size': 8, 'max_model_len': 32768},
    ),
    (
        'sample_teacher',
        'nano',
        'ask.preferences.reasoning_prompts=10',
        {
            'preferences': {'reasoning_prompts': 10},
            'distill': {'reasoning_prompts': 3500, 'domain_sft': 4000},
        },
    ),
    (
        'distill_to_student',
        'qlora',
        'load.backend=unsloth',
        {'dtype': 'bfloat16', 'four_bit': True, 'lora_rank': 32, 'backend': 'unsloth'},
    ),
]


@pytest.mark.parametrize('stage, scale, word, want', TRIAL, ids=[t[2] for t in TRIAL])
def test_changes_of_the_trial(stage, scale, word, want):
    got = resolved(stage, scale, changes_of([word]))[word.partition('.')[0]]
    assert {key: got[key] for key in want} == want


@dataclasses.dataclass(frozen=True)
class Inner:
    rank: int = 0
    near: float | None = 0.7
    names: typing.Literal['auto'] | list[str] = 'auto'

    renamed = {'size': 'rank'}


@dataclasses.dataclass(frozen=True)
class Toy:
    steps: int = 1
    free: dict = field(default_factory=dict)
    mix: dict[str, int] = field(default_factory=dict)
    modes: dict[typing.Literal['one', 'two'], dict[str, float]] = field(default_factory=dict)
    load: typing.Annotated[dict, Inner] = field(default_factory=dict)


def toy(*layers: dict) -> Toy:
    return fill(Toy, [(f'layer {i}', layer) for i, layer in enumerate(layers)])


def test_layers_are_laid_over_each_other_key_by_key():
    layers = (
        {'free': {'a': {'b': 1, 'c': 2}}, 'mix': {'x.v2': 3, 'y': 4}},
        {'free': {'a': {'c': 5}}, 'modes': {'one': {'p': 1}}},
        {'free.a.d': '6', 'mix.x.v2': '7', 'modes.one.p.v2': '0.5', 'load.rank': '1e1'},
    )
    assert toy(*layers) == Toy(
        free={'a': {'b': 1, 'c': 5, 'd': 6}},
        mix={'x.v2': 7, 'y': 4},
        modes={'one': {'p': 1.0, 'p.v2': 0.5}},
        load={'rank': 10},
    )


def test_null_takes_out_a_key_or_a_block_unless_it_is_a_value():
    below = {'mix': {'x': 1, 'y': 2}, 'load': {'rank': 3, 'near': 0.5}, 'free': {'a': {'b': 1}}}
    assert toy(below, {'mix.x': 'null'}).mix == {'y': 2}
    assert toy(below, {'mix': 'null'}).mix == {}
    assert toy(below, {'mix': None}, {'mix.z': 3}).mix == {'z': 3}
    assert toy(below, {'load.near': None}).load == {'rank': 3, 'near': None}
    assert toy(below, {'load.rank': None}).load == {'near': 0.5}
    assert toy(below, {'free.a.b': 'null'}).free == {'a': {}}
    assert toy(below, {'free': {'a': None}}).free == {}


REFUSED = [
    ({'mix': {'x': 1}, 'mix.x': '2'}, 'layer 1: mix.x is given twice'),
    ({'mix': '{x: 1}', 'mix.x': 2}, 'layer 1: mix.x is given twice'),
    ({'free.a': 1, 'free.a.b': 2}, 'layer 1: free.a.b is given twice'),
    ({'free': {'a': {'b': 1}}, 'free.a.b': 2}, 'layer 1: free.a.b is given twice'),
    ({'mix': {}}, 'layer 1: mix: {} changes none of its keys (x)'),
    ({'mix': '{}'}, 'null takes out a key, or all of them'),
    ({'mix.y': 'many'}, "layer 1: mix.y must be int, not 'many'"),
    ({'mix.y': '2.5'}, "mix.y must be int, not '2.5'"),
    ({'mix': '[x]'}, "layer 1: mix must be a block of keys and values, not '[x]'"),
    ({'mixx.y': '1'}, "unknown key 'mixx' (did you mean 'mix'?); valid: steps, free, mix"),
    ({'modes.three': '{}'}, "layer 1: modes: unknown key 'three'; valid: one, two"),
    ({'modes.one': '3'}, 'layer 1: modes.one must be a block'),
    ({'load.rnk': '3'}, "layer 1: load: unknown key 'rnk' (did you mean 'rank'?); valid: rank"),
    ({'load.size': '3'}, "layer 1: load: 'size' is now called 'rank'"),
    ({'load.rank.x': '3'}, "layer 1: load.rank is no block, so it has no key 'x'"),
    ({'steps.x': '3'}, "layer 1: steps is no block, so it has no key 'x'"),
    ({'mix.': '3'}, "layer 1: 'mix.' ends without a key"),
]


@pytest.mark.parametrize('changes, message', REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_refused_changes(changes, message):
    with pytest.raises(LabError) as e:
        toy({'mix': {'x': 1}}, changes)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_a_command_line_gives_each_key_once_and_keeps_the_names_in_a_block():
    assert changes_of(['--answer-tokens', '5', 'checkpoints.my-model.v2=base']) == {
        'answer_tokens': '5',
        'checkpoints.my-model.v2': 'base',
    }
    with pytest.raises(LabError, match='seed is given twice'):
        changes_of(['seed=1', '--seed=2'])
