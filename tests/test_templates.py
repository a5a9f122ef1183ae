"Chat templates of real checkpoints: what the lab renders, and what of it is trained, is what the template says."

import json
import os
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest
from test_chat import KIMI_FILES, TEXTS, TOOLS, conversation, words

from k2lab.lab.config import LabError
from k2lab.text.audit import Audit
from k2lab.text.chat import Conversation, prompt_ids, rendered
from k2lab.text.masks import row_examples
from k2lab.text.tokenizer import build_tokenizer, is_kimi, load_kimi_tokenizer

SHARED = Path(__file__).parents[2] / 'shared'
pytestmark = pytest.mark.skipif(
    not (SHARED / 'templates').exists(),
    reason='the templates of checkpoints are not beside this checkout',
)
TOKEN = re.compile(
    r'<\|[^|<>\'"{}]+\|>|\[/?[A-Z_]+\]|</?s>|</?think>|</?tool_call>|<｜[^｜]+｜>|</?tool_response>'
    r'|<(?:start|end)_of_turn>|</?arg_(?:key|value)>|<(?:bos|eos|pad)>'
)


def cases() -> dict:
    "The conversations of each template."
    by = defaultdict(list)
    if (SHARED / 'templates').exists():
        for line in (SHARED / 'templates' / 'cases.jsonl').read_text().splitlines():
            case = json.loads(line)
            by[case['template']].append(case)
    return by


CASES = cases()
BUILT = {}


def tokenizer(name: str):
    "A small tokenizer with the template of a checkpoint and the control tokens that stand in it."
    if name in BUILT:
        return BUILT[name]
    from tokenizers import AddedToken

    template = (SHARED / 'templates' / f'{name}.jinja').read_text().removesuffix('\n')
    special = CASES[name][0]['special']
    tok = build_tokenizer(TEXTS, 420, 'kimi' if '<|im_middle|>' in template else 'qwen')
    new = sorted({*TOKEN.findall(template), *special.values()} - tok.get_added_vocab().keys())
    tok.add_tokens([AddedToken(t, normalized=False, special=True) for t in new])
    for key, text in special.items():
        setattr(tok, key, text)
    tok.chat_template = template
    BUILT[name] = tok
    return tok


def is_raw(case: dict, tok) -> bool:
    "Whether a case passes tools to a Kimi template otherwise than Kimi's own tokenizer does."
    return is_kimi(tok) and bool(case['tools']) and 'as the tokenizer passes' not in case['kind']


@pytest.mark.parametrize('name', CASES)
def test_cases_of_a_template(name):
    tok, compared = tokenizer(name), 0
    for case in CASES[name]:
        switches = {k: v for k, v in case.get('kwargs', {}).items() if k != 'tools_ts_str'}
        if is_raw(case, tok) or 'now' in case:
            continue
        ask = (case['messages'], case['tools'], case['add_generation_prompt'])
        compared += 1
        if case.get('error') in ('TemplateError', 'TypeError'):
            with pytest.raises(LabError, match='the chat template refuses this conversation'):
                rendered(tok, *ask, **switches)
        elif 'error' not in case:
            assert rendered(tok, *ask, **switches) == case['expected'], case['kind']
    assert compared > 2 or any('now' in case for case in CASES[name])


def calls_of(message: dict) -> list:
    "(id, name, arguments as text) of each call, objects printed as JSON."
    text = lambda a: a if isinstance(a, str) else json.dumps(a, ensure_ascii=False)
    return [
        (c['id'], c['function']['name'], text(c['function']['arguments']))
        for c in message.get('tool_calls') or []
    ]


def objects(message: dict) -> list:
    "(name, arguments as JSON with Python's spacing) of each call."
    return [
        (name, json.dumps(json.loads(text), ensure_ascii=False))
        for _, name, text in calls_of(message)
    ]


def kimi_calls(message: dict) -> str:
    each = ''.join(
        f'<|tool_call_begin|>{i}<|tool_call_argument_begin|>{a}<|tool_call_end|>'
        for i, _, a in calls_of(message)
    )
    return f'<|tool_calls_section_begin|>{each}<|tool_calls_section_end|>' if each else ''


def chatml_calls(message: dict, pairs: list, first: str) -> str:
    "Qwen's calls; `first` stands before the first one if something was said."
    said = [f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in pairs]
    return (first if said else '') + '\n'.join(said)


def instruct(m):
    return f'{m["content"] or ""}{kimi_calls(m)}<|im_end|>'


def thinking(m):
    return f'<think>{m.get("reasoning_content") or ""}</think>{instruct(m)}'


def k2_5(m):  # the prompt ends in <think>
    return thinking(m).removeprefix('<think>')


def qwen2_5(m):
    said = m['content'] or ''
    return said + chatml_calls(m, objects(m), '\n' if said else '') + '<|im_end|>'


def qwen3(m):
    thought = (m.get('reasoning_content') or '').strip('\n')
    said = (m['content'] or '').lstrip('\n')
    pairs = [(n, a) for _, n, a in calls_of(m)]
    return f'<think>\n{thought}\n</think>\n\n{said}{chatml_calls(m, pairs, chr(10) if m["content"] else "")}<|im_end|>'


def said_until(end: str, strip: bool = False, before: str = ''):
    "A reply of formats without calls."
    return lambda m: before + (m['content'].strip() if strip else m['content']) + end


FAMILIES = {  # template: (the reply by hand, tools, thoughts, system turns)
    'kimi-k2-instruct': (instruct, True, False, True),
    'kimi-k2-instruct-0905': (instruct, True, False, True),
    'kimi-k2-thinking': (thinking, True, True, True),
    'kimi-k2.5': (k2_5, True, True, True),
    'kimi-k2.5-preserve-gate': (k2_5, True, True, True),
    'moonlight-16b-a3b-instruct': (said_until('<|im_end|>'), False, False, True),
    'qwen2.5-instruct': (qwen2_5, True, False, True),
    'qwen3': (qwen3, True, True, True),
    'llama-3.1-instruct': (said_until('<|eot_id|>', True), False, False, True),
    'llama-3.2-instruct': (said_until('<|eot_id|>', True), False, False, True),
    'mistral-7b-instruct-v0.3': (said_until('</s>', False, ' '), False, False, False),
    'mistral-nemo-instruct-2407': (said_until('</s>'), False, False, False),
    'gemma-2-it': (said_until('<end_of_turn>', True), False, False, False),
    'gemma-3-it': (said_until('<end_of_turn>', True), False, False, False),
    'phi-3.5-mini-instruct': (said_until('<|end|>'), False, False, True),
    'phi-4': (said_until('<|im_end|>'), False, False, True),
    'phi-4-mini-instruct': (said_until('<|end|>'), False, False, True),
    'smollm2-instruct': (said_until('<|im_end|>'), False, False, True),
    'olmo-2-instruct': (said_until('<|endoftext|>'), False, False, True),
}


def plain_talk(rng, system: bool) -> list:
    "Turns of user and assistant in order, with a system text where the format has one."
    talk = [dict(role='system', content='S' + words(rng))] if system and rng.random() < 0.5 else []
    for _ in range(rng.choice([1, 1, 2, 3])):
        talk.append(dict(role='user', content='Q ' + words(rng)))
        talk.append(dict(role='assistant', content='A' + words(rng) + '.'))
    return talk


def said_something(m: dict) -> dict:
    "A message with some content, but for calls and results; no text spells a control token."
    m = json.loads(json.dumps(m).replace('<tool_response>', 'tool_response'))
    if m['role'] == 'tool' or m.get('tool_calls'):
        return m
    text = (
        m['content'] if isinstance(m['content'], str) else ''.join(p['text'] for p in m['content'])
    )
    return m if text.strip() else dict(m, content='Q')


def tool_talk(rng, thoughts: bool) -> tuple:
    "A conversation with tools that ends with a reply."
    messages, tools = conversation(rng)
    reply = dict(role='assistant', content='A' + words(rng) + '.')
    if thoughts and rng.random() < 0.7:
        reply['reasoning_content'] = 'R' + words(rng)
    drop = () if thoughts else ('reasoning_content',)
    whole = [{k: v for k, v in m.items() if k not in drop} for m in [*messages, reply]]
    return [said_something(m) for m in whole], tools


def template_ids(tok, messages, tools) -> list[int]:
    "The ids of a prompt by transformers alone, with tools as Kimi's tokenizer passes them."
    extra = {}
    if tools and is_kimi(tok):
        from k2lab.text.typescript import typescript_tools

        tools = json.loads(json.dumps(tools, sort_keys=True))
        extra = dict(tools_ts_str=typescript_tools(tools))
    text = tok.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **extra
    )
    return tok(text, add_special_tokens=False).input_ids


def as_printed(name: str, messages: list) -> list:
    "Messages as the template takes them: Qwen2.5 quotes arguments that are text a second time."
    joined = [
        dict(m, content=''.join(p['text'] for p in m['content']))
        if isinstance(m['content'], list)
        else dict(m, content=m['content'] or '')
        for m in messages
    ]
    if name != 'qwen2.5-instruct' or not any(
        isinstance(c['function']['arguments'], str)
        for m in joined
        for c in m.get('tool_calls') or []
    ):
        return joined
    loads = lambda a: json.loads(a) if isinstance(a, str) else a
    return [
        dict(
            m,
            tool_calls=[
                dict(c, function=dict(c['function'], arguments=loads(c['function']['arguments'])))
                for c in m['tool_calls']
            ],
        )
        if m.get('tool_calls')
        else m
        for m in joined
    ]


COUNT = 500 if os.environ.get('K2LAB_FAULTS') == 'full' else 60


@pytest.mark.parametrize('name', FAMILIES)
def test_conversations_of_a_template(name):
    "Each prompt has the template's ids, each reply those of the text by hand, and the audit passes every example."
    (by_hand, tools_too, thoughts, system), tok = FAMILIES[name], tokenizer(name)
    rng, audit, replies = random.Random(name), Audit(tok), 0
    for _ in range(COUNT):
        messages, tools = tool_talk(rng, thoughts) if tools_too else (plain_talk(rng, system), None)
        talk = Conversation(tok, messages, tools)
        printed = as_printed(name, messages)
        for i, m in enumerate(printed):
            if m['role'] != 'assistant':
                continue
            prompt, reply = talk.turn_ids(i)
            assert prompt == template_ids(tok, printed[:i], tools)
            assert reply == tok(by_hand(m), add_special_tokens=False).input_ids
            replies += 1
        examples = row_examples(tok, dict(messages=messages, **({'tools': tools} if tools else {})))
        assert sum(len(e['completion_mask']) for e in examples) > 0
        for e in examples:
            batch = dict(input_ids=[e['input_ids']], completion_mask=[e['completion_mask']])
            assert audit.wrong(batch) is None
    assert replies > 1.4 * COUNT


@pytest.mark.skipif(
    not KIMI_FILES.exists(), reason='the real Kimi tokenizer is not beside this checkout'
)
def test_conversations_that_had_the_wrong_format(tmp_path):
    "50 prompts of K2.5, K2.6 and K2-Instruct, opened from Kimi's files with the release's template beside them."
    releases = {'K2.5/K2.6': 'kimi-k2.5', 'K2-Instruct': 'kimi-k2-instruct'}
    opened = {}
    for release, template in releases.items():
        folder = tmp_path / template
        folder.mkdir()
        for file in ('tiktoken.model', 'tokenizer_config.json', 'config.json'):
            (folder / file).symlink_to(KIMI_FILES / file)
        source = (SHARED / 'templates' / f'{template}.jinja').read_text()
        (folder / 'chat_template.jinja').write_text(source)
        opened[release] = load_kimi_tokenizer(folder)
    path = SHARED / 'cases' / 'training' / 'template_cases.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        tok = opened[row['release']]
        ids = prompt_ids(tok, row['messages'], row['tools'])
        assert tok.decode(ids) == row['expected'], row['kind']
    assert len(rows) == 50
    with pytest.raises(LabError, match='has no chat template'):
        prompt_ids(load_kimi_tokenizer(KIMI_FILES), [dict(role='user', content='?')])


@pytest.mark.parametrize(
    'name,messages,reason',
    [
        ('moonlight-16b-a3b-instruct', [dict(role='user', content='?')], "the tool 'get_weather'"),
        (
            'gemma-2-it',
            [dict(role='system', content='S'), dict(role='user', content='?')],
            'System role',
        ),
        (
            'gemma-2-it',
            [dict(role='user', content='a'), dict(role='user', content='b')],
            'alternate',
        ),
        ('phi-4', [dict(role='user', content='?')], "the tool 'get_weather'"),
    ],
)
def test_what_a_template_drops_is_refused(name, messages, reason):
    tools = TOOLS if 'tool' in reason else None
    with pytest.raises(LabError, match=f'cannot print the conversation: .*{reason}'):
        prompt_ids(tokenizer(name), messages, tools)


@pytest.mark.skipif(
    not KIMI_FILES.exists(), reason='the real Kimi tokenizer is not beside this checkout'
)
def test_calls_in_a_reply_are_control_tokens_and_letters_of_a_user_are_not(tmp_path):
    "A reply as a completion endpoint returns it, with Moonshot's own ids."
    for file in ('tiktoken.model', 'tokenizer_config.json'):
        (tmp_path / file).symlink_to(KIMI_FILES / file)
    template = (SHARED / 'templates' / 'kimi-k2-thinking.jinja').read_text()
    (tmp_path / 'chat_template.jinja').write_text(template)
    tok = load_kimi_tokenizer(tmp_path)
    (line,) = (SHARED / 'cases' / 'training' / 'tool_response.jsonl').read_text().splitlines()
    row = json.loads(line)
    row['prompt'] += ' <|tool_call_begin|>'
    (example,) = row_examples(tok, row)
    tags = range(163595, 163600)
    learned = [i for i, m in zip(*example.values()) if m]
    read = [i for i, m in zip(*example.values()) if not m]
    assert {i for i in learned if i in tags} == set(tags)
    assert not any(i in tags for i in read)
    assert '<|tool_call_begin|>' in tok.decode(read)


def test_a_model_like_qwen3_keeps_its_own_format(tmp_path):
    from tokenizers import AddedToken

    from k2lab.models.load import open_tokenizer, shipped

    tok = open_tokenizer(shipped('qwen'))
    tok.add_tokens([AddedToken(t, normalized=False) for t in ('<think>', '</think>')])
    path = SHARED / 'cases' / 'training' / 'qwen3_like.jinja'
    tok.chat_template = path.read_text().rstrip('\n')
    tok.save_pretrained(tmp_path)
    tok = open_tokenizer(tmp_path)
    (example,) = row_examples(tok, dict(prompt='2+2?', reasoning='two and two', final='4'))
    talk = [
        dict(role='user', content='2+2?'),
        dict(role='assistant', content='4', reasoning_content='two and two'),
    ]
    whole = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False).input_ids
    assert whole[: len(example['input_ids'])] == example['input_ids']
    assert 'created by Alibaba' not in tok.decode(whole)
    learned = [i for i, m in zip(*example.values()) if m]
    assert tok.convert_tokens_to_ids('<think>') in learned
    assert tok.convert_tokens_to_ids('<|im_end|>') == learned[-1]


def one_call(rng, number: str, one_more: bool) -> list:
    "A question, one call with its result, and an answer; once or twice."
    talk = []
    for n in range(2 if one_more else 1):
        call = dict(id=f'{number}{n}', type='function')
        call['function'] = dict(name='get_weather', arguments=json.dumps({'city': words(rng)}))
        talk += [
            dict(role='user', content='Q ' + words(rng)),
            dict(role='assistant', content='', tool_calls=[call]),
            dict(
                role='tool', name='get_weather', tool_call_id=call['id'], content='R' + words(rng)
            ),
            dict(role='assistant', content='A' + words(rng) + '.'),
        ]
    return talk


def llama_reply(m):
    if calls := objects(m):
        ((name, arguments),) = calls
        return f'{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>'
    return m['content'].strip() + '<|eot_id|>'


def mistral_reply(m):
    if m.get('tool_calls'):
        (number, name, _), (_, arguments) = calls_of(m)[0], objects(m)[0]
        call = f'{{"name": "{name}", "arguments": {arguments}, "id": "{number}"}}'
        return f'[TOOL_CALLS] [{call}]</s>'
    return f' {m["content"]}</s>'


CALLING = {
    'llama-3.1-instruct': llama_reply,
    'llama-3.2-instruct': llama_reply,
    'mistral-7b-instruct-v0.3': mistral_reply,
}


@pytest.mark.parametrize('name', CALLING)
def test_calls_in_formats_with_rules_of_their_own(name):
    "Llama takes one call a message, Mistral ids of nine characters; both print arguments as objects."
    tok, rng, kept = tokenizer(name), random.Random(name), 0
    for i in range(COUNT):
        messages = one_call(rng, f'call{i:04}', rng.random() < 0.5)
        talk = Conversation(tok, messages, TOOLS)
        printed = as_printed('qwen2.5-instruct', messages)  # arguments as objects
        for at, m in enumerate(printed):
            if m['role'] == 'assistant':
                prompt, reply = talk.turn_ids(at)
                assert prompt == template_ids(tok, printed[:at], TOOLS)
                assert reply == tok(CALLING[name](m), add_special_tokens=False).input_ids
                kept += 1
    assert kept >= 2 * COUNT
