"No evaluation item stays in what is trained on: layouts of benchmarks, hidden quotations, and the last look at files."

import gzip
import json
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k2lab import prepare_corpus
from k2lab.corpus import duplicates, kernels, quotations
from k2lab.corpus.readers import find_files
from k2lab.lab.config import LabError
from k2lab.lab.job import start
from k2lab.tasks import eval_sets, splits
from k2lab.text.rows import read_rows

# ---- text of random words --------------------

WORDS = (
    'near the under after before answer copper morning curtain valley letter surface signal drawer '
    'carpet kernel pressure question soldier summer machine silver window village forest desert is '
    'machines waited quickly into and because small over its résumé naïve first coffee office wolf'
).split()


def prose(rng, n):
    "n words in sentences, with commas, quotes and line breaks."
    out, left = [], 0
    for i in range(n):
        left = left or rng.randrange(6, 13)
        word, left = rng.choice(WORDS) + rng.choice(['', '', '', 's', 'ed']), left - 1
        end = '.' if not left or i == n - 1 else rng.choice(['', '', '', '', ',', ' -'])
        out.append(word + end)
    return ' '.join(out)


def wrapped(text, width=60):
    lines, line = [], ''
    for word in text.split():
        line, full = (f'{line} {word}'.strip(), '') if len(line) < width else (word, line)
        lines += [full] if full else []
    return [*lines, line]


# ---- what hides a quotation --------------------


def sprinkle(marks):
    def hide(text, rng):
        return ''.join(
            c + (rng.choice(marks) if c.isalpha() and rng.random() < 0.3 else '') for c in text
        )

    return hide


def full_width(text, rng):
    return ''.join(chr(ord(c) + 0xFEE0) if '!' <= c <= '~' else c for c in text)


def begun(form):
    return lambda text, rng: '\n'.join(form(i, line) for i, line in enumerate(wrapped(text), 1))


def marked_up(text, rng):
    ways = ['{}', '{}', '<b>{}</b>', '**{}**', '_{}_', '`{}`', '<i class="x">{}</i>']
    words = re.sub(r'\w+', lambda m: rng.choice(ways).format(m[0]), text.replace(' ', '\n'))
    return f'<p>{words}</p>'.replace('\n', rng.choice([' ', '&nbsp;', '<br/>']))


def decomposed(text, rng):
    import unicodedata

    return unicodedata.normalize(rng.choice(['NFD', 'NFKD', 'NFC']), text).replace(
        'fi', rng.choice(['ﬁ', 'fi'])
    )


def other_marks(text, rng):
    table = {
        '-': rng.choice('–—―−'),
        ',': rng.choice(['，', ' ,', '、']),
        '.': rng.choice(['…', '。', ' .']),
    }
    return (
        '“'
        + ''.join(table.get(c, c) for c in text).replace(' ', rng.choice([' ', '\u00a0', '\u2009']))
        + '”'
    )


HIDDEN = {
    'joiners': sprinkle(['\u200b', '\u200c', '\u200d', '\u2060', '\ufeff']),
    'directions': sprinkle(['\u200e', '\u200f', '\u202a', '\u202c', '\u2066', '\u2069']),
    'soft hyphens': sprinkle(['\u00ad']),
    'controls': sprinkle(['\x00', '\x08', '\x7f', '\U000e0041']),
    'accents on top': sprinkle(['\u0301', '\u0336', '\ufe0f']),
    'full width': full_width,
    'line numbers': begun(lambda i, line: f'{i:3} {line}'),
    'numbers and points': begun(lambda i, line: f'[{i}]: {line}'),
    'named lines': begun(lambda i, line: f'L{i} | {line}'),
    'times': begun(lambda i, line: f'00:{i:02}:07 {line}'),
    'quoted lines': begun(lambda i, line: f'> {line}'),
    'comments': begun(lambda i, line: f'    // {line}'),
    'markup': marked_up,
    'html characters': lambda text, rng: ''.join(
        f'&#{ord(c)};' if rng.random() < 0.3 else c for c in text
    ),
    'decomposed': decomposed,
    'other marks': other_marks,
    'upper case': lambda text, rng: text.upper(),
}


@pytest.mark.parametrize('kind', HIDDEN)
def test_a_hidden_quotation_is_found(kind):
    rng = random.Random(kind)
    items = [prose(rng, rng.randrange(18, 70)) for _ in range(100)]
    quoting = [
        f'{prose(rng, 60)}\n\n{HIDDEN[kind](item, rng)}\n\n{prose(rng, 60)}' for item in items
    ]
    clean = [prose(rng, 200) for _ in range(100)]
    kept, counts = duplicates.drop_contaminated(pa.table(dict(text=quoting + clean)), items)
    stays = kept['text'].to_pylist()
    assert not {*clean} - {*stays}
    assert len(stays) - len(clean) <= 5, f'{kind}: {105 - len(stays) + 95} of 100'


@pytest.mark.parametrize('kind', HIDDEN)
def test_a_hidden_copy_is_found(kind):
    rng = random.Random(kind)
    texts = [prose(rng, rng.randrange(60, 300)) for _ in range(60)]
    table = pa.table(dict(text=texts + [HIDDEN[kind](text, rng) for text in texts]))
    owner = duplicates.near_owners(table['text'], least=0.7)
    same = [owner[i] == owner[i + 60] for i in range(60)]
    assert sum(same) >= 57 and len({*owner.tolist()}) >= 60


SCRIPTS = [
    'می\u200cخواهم این کتاب\u200cها را برای دوستان\u200cام بخوانم و درباره\u200cی آن\u200cها بنویسم',
    'क्\u200dष और श्री में शब्दों के बीच जोड़ने वाले अक्षर आते हैं, उन्हें वैसे ही रहने दो',
    'A family 👩\u200d👩\u200d👧 and a flag 🏴\u200d☠\ufe0f went home after the long rain of that day',
]


@pytest.mark.parametrize('text', SCRIPTS)
def test_scripts_with_joiners_are_matched_and_published_as_they_came(text):
    table = pa.table(
        dict(text=[text, f'x {text} y', text.replace('\u200c', '').replace('\u200d', '')])
    )
    assert not duplicates.drop_contaminated(table, [text])[0].num_rows
    other = pa.table(dict(text=[text, 'something else that is long enough to stay here']))
    assert duplicates.drop_contaminated(other, ['one two three four five six'])[0].equals(other)


def test_exact_copies_do_not_hide_behind_joiners_and_width():
    table = pa.table(
        dict(text=['Café au lait', 'CAFE\u0301 au\u200b lait', 'Ｃafé au lait', 'Café au thé'])
    )
    assert duplicates.drop_copies(table)[0]['text'].to_pylist() == ['Café au lait', 'Café au thé']


# ---- layouts --------------------

ITEM = 'Near engine near candle in soldier the summer that machine with silver that copper that'
LAYOUTS = {
    'gsm8k': {'question': ITEM, 'answer': '1 + 1 = <<1+1=2>>2\n#### 2'},
    'math': {'problem': ITEM, 'level': 'Level 5', 'type': 'Algebra', 'solution': '$2$'},
    'mmlu': {'question': ITEM, 'subject': 'x', 'choices': ['a', 'b'], 'answer': 1},
    'hellaswag': {
        'ind': 1,
        'ctx_a': 'Near',
        'ctx_b': 'engine',
        'ctx': ITEM,
        'endings': ['a'],
        'label': '1',
    },
    'arc': {
        'id': 'Mercury_1',
        'question': ITEM,
        'choices': {'text': ['a'], 'label': ['A']},
        'answerKey': 'A',
    },
    'arc_stem': {'id': 'M', 'question': {'stem': ITEM, 'choices': [{'text': 'a', 'label': 'A'}]}},
    'arc_flat': {'question.stem': ITEM, 'answerKey': 'A'},
    'human_eval': {
        'task_id': 'HumanEval/0',
        'prompt': ITEM,
        'canonical_solution': 'x',
        'test': 't',
    },
    'mbpp': {'task_id': 1, 'text': ITEM, 'code': 'x', 'test_list': ['assert 1']},
    'mbpp_sanitized': {'task_id': 1, 'prompt': ITEM, 'code': 'x', 'test_list': ['assert 1']},
    'if_eval': {'key': 1000, 'prompt': ITEM, 'instruction_id_list': ['x'], 'kwargs': [{'n': 1}]},
    'messages': {
        'messages': [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': ITEM}]
    },
    'parts': {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': ITEM}]}]},
    'sharegpt': {
        'conversations': [{'from': 'human', 'value': ITEM}, {'from': 'gpt', 'value': 'x'}]
    },
    'text': {'text': ITEM},
    'instruction': {'instruction': ITEM, 'input': '', 'output': 'x'},
    'gpqa': {'Question': ITEM, 'Correct Answer': 'x'},
}


def jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_benchmark_is_read_in_its_own_layout_from_any_file(tmp_path, layout):
    row = LAYOUTS[layout]
    paths = [jsonl(tmp_path / 'a.jsonl', [row])]
    for name, value in (('b.json', [row]), ('c.json', {'version': 1, 'data': [row]})):
        (tmp_path / name).write_text(json.dumps(value, indent=1))
        paths.append(str(tmp_path / name))
    (tmp_path / 'd.json').write_text(json.dumps(row) + '\n' + json.dumps(row) + '\n')
    with gzip.open(tmp_path / 'e.json.gz', 'wt') as out:
        out.write(json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / 'f.parquet')
    paths += [str(tmp_path / name) for name in ('d.json', 'e.json.gz', 'f.parquet')]
    for path in paths:
        assert {item.question for item in eval_sets.eval_items(path)} == {ITEM}, path
        assert all(item.text == ITEM for item in eval_sets.eval_items(path)), path
    assert len(eval_sets.eval_items(str(tmp_path / '*'))) == 7


def test_paragraphs_and_lines_of_text_are_items(tmp_path):
    (tmp_path / 'a.txt').write_text(f'{ITEM}\nand more\n\nSecond item here.\n')
    (tmp_path / 'b.txt').write_text(f'{ITEM}\nSecond item here.\n')
    read = lambda name: [item.text for item in eval_sets.eval_items(str(tmp_path / name))]
    assert read('a.txt') == [f'{ITEM}\nand more', 'Second item here.']
    assert read('b.txt') == [ITEM, 'Second item here.']


def test_a_short_question_is_searched_for_with_its_choices():
    row = dict(question='Which of these is true?', choices=['No wolf is a fox.', 'All are.'])
    item = eval_sets.item_of(row)
    assert item == (
        'Which of these is true?',
        'Which of these is true?\nNo wolf is a fox.\nAll are.',
    )


@pytest.mark.parametrize(
    'row, says',
    [
        ({'id': 1, 'label': 'x'}, 'its fields are id, label'),
        ({'text': ''}, 'its fields are text'),
        ({'question': ' \n'}, 'its fields are question'),
        ({'question': 7, 'answer': 'x'}, 'its fields are question, answer'),
        ({'messages': [{'role': 'assistant', 'content': ITEM}]}, 'its fields are messages'),
        ({}, 'its fields are none'),
    ],
)
def test_an_item_without_text_is_an_error_that_names_the_fields(tmp_path, row, says):
    path = jsonl(tmp_path / 'x.jsonl', [{'text': ITEM}, row])
    with pytest.raises(LabError) as e:
        eval_sets.eval_items(path)
    assert f'{path}: row 2 has no text' in str(e.value) and says in str(e.value)
    assert '\n' not in str(e.value) and 'problem' in str(e.value)


@pytest.mark.parametrize(
    'name, data',
    [
        ('a.jsonl', b'{"text": "x"\n'),
        ('a.json', b'[{"text": "x"}'),
        ('a.json', b'[]'),
        ('a.json', b'7'),
        ('a.json', b'[7]'),
        ('a.json', b'\xff\xfe'),
        ('a.jsonl', b''),
        ('a.parquet', b'PAR1 not really'),
        ('a.json.gz', b'\x1f\x8b\x08cut'),
        ('a.png', b'x'),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LabError) as e:
        eval_sets.eval_items(str(tmp_path / name))
    assert name in str(e.value) and '\n' not in str(e.value)


def test_the_hub_when_it_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for pattern in ('hf://nobody/nothing', 'hf://datasets/nobody/nothing/*.parquet'):
        with pytest.raises(LabError) as e:
            eval_sets.eval_items(pattern)
        assert pattern in str(e.value) and 'the lab is offline' in str(e.value)
        assert '\n' not in str(e.value)


def test_files_of_a_hub_repository(monkeypatch):
    import fsspec

    names = ['main/train-0.parquet', 'main/test-0.parquet', 'socratic/test-0.parquet', 'README.md']
    hub = fsspec.filesystem('memory')
    fake = type('Hub', (), {})()
    fake.find = lambda path: [f'datasets/a/b/{name}' for name in names]
    fake.unstrip_protocol = lambda path: f'hf://{path}'
    monkeypatch.setattr(fsspec, 'filesystem', lambda kind: fake if kind == 'hf' else hub)
    assert eval_sets.eval_files('hf://a/b') == [f'hf://datasets/a/b/{n}' for n in names[1:3]]
    names[:] = ['dev.csv', 'all.csv']
    assert len(eval_sets.eval_files('hf://datasets/a/b')) == 2
    names[:] = ['README.md']
    with pytest.raises(LabError, match='no file that ends in parquet'):
        eval_sets.eval_files('hf://a/b')


# ---- the last look --------------------


def found(texts, items, share=0.8):
    return {
        (q.row, q.item)
        for q in quotations.quotations(texts, quotations.wanted_items(dict(x=items)), share)
    }


@pytest.mark.parametrize('seed', range(4))
def test_whole_items_are_found_and_nothing_else(seed):
    rng = random.Random(seed)
    items = [prose(rng, rng.randrange(8, 120)) for _ in range(80)]
    hosts, truth = [], set()
    for i in range(300):
        text = prose(rng, rng.randrange(10, 200))
        if i % 3 == 0:
            k = rng.randrange(80)
            text = f'{text} {rng.choice([*HIDDEN.values()][:4])(items[k], rng)} {prose(rng, 9)}'
            truth.add((i + 1, k + 1))
        hosts.append(text)
    assert found(hosts, items) == truth


def test_parts_and_torn_words():
    rng = random.Random(9)
    item = prose(rng, 60)
    words, letters = item.split(), quotations.letters_of(item)
    torn = ''.join(c + ' ' * (rng.random() < 0.2) for c in item)
    assert duplicates.drop_contaminated(pa.table(dict(text=[torn])), [item])[0].num_rows == 1
    assert found([torn], [item]) == {(1, 1)}  # what the step cannot see, the check does
    for part, holds in ((0.85, True), (0.7, False)):
        cut = round(part * len(words) / 2)
        text = ' '.join([*words[:cut], prose(rng, 30), *words[-cut:]])
        assert bool(found([text], [item])) == holds, part
    assert quotations.share_held(letters, letters, [(0, 0)]) == 1


def test_numbers_are_told_apart():
    texts = [
        f'Sort these numbers from small to large: {n}' for n in ('1, 23, 4 and 5', '12, 3, 45')
    ]
    assert found(texts, ['Sort these numbers from small to large: 12, 3, 4 and 5'], 1) == set()
    assert found(texts, texts, 1) == {(1, 1), (2, 2)}


def test_what_is_too_short_is_counted():
    wanted = quotations.wanted_items(
        dict(a=['Why?', 'one two three', prose(random.Random(1), 9)], b=[''])
    )
    assert len(wanted.letters) == 1 and dict(wanted.short) == dict(a=2, b=1)
    assert not found(['Why?'], ['Why?']) and not found([], [ITEM]) and not found([ITEM], [])


# ---- the stage --------------------


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    "Runs prepare_corpus on texts, with an evaluation set of items."
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))

    def run(texts, items, **changes):
        rows = [dict(text=text, source='s', licence='MIT') for text in texts]
        base = dict(
            questions=0,
            general_sources=[],
            limit=None,
            tokenizer=None,
            sources=[dict(files=jsonl(tmp_path / 'texts.jsonl', rows))],
            eval_sets=dict(mine=jsonl(tmp_path / 'items.jsonl', items)),
            heldout_rows=1000,
            heldout_percent=15,
        )
        job = start('prepare_corpus', 'smoke', None, base | changes)
        prepare_corpus.prepare_corpora(job)
        return job

    return run


def texts_in(job, name):
    return [row['text'] for row in read_rows(job.folder / f'{name}.jsonl')]


def checks_of(job):
    return {check['name']: check for check in job.record['checks']}


def corpus_with(rng, item, quoting, clean=60):
    host = lambda: f'{prose(rng, 80)}\n\n{item}\n\n{prose(rng, 40)}'
    return [host() for _ in range(quoting)] + [prose(rng, 120) for _ in range(clean)]


@pytest.mark.parametrize('quoting', [1, 11, 80])
def test_no_published_file_holds_an_item(prepared, quoting):
    rng = random.Random(quoting)
    items = [prose(rng, 50) for _ in range(5)]
    texts = corpus_with(rng, items[2], quoting)
    job = prepared(texts, [dict(question=item, answer='7') for item in items])
    left = texts_in(job, 'domain') + texts_in(job, 'domain_heldout')
    assert {*left} == {*texts[quoting:]}
    checks = checks_of(job)
    for name in ('domain', 'domain_heldout'):
        check = checks[f'no evaluation item occurs in {name}']
        assert check['ok'] and '5 texts searched for' in check['detail']
    step = [s for s in json.loads((job.folder / 'card.json').read_text())['corpora'][0]['steps']][
        -1
    ]
    gone = step['removed_from_heldout'].get('quotes an evaluation set', 0)
    assert sum(step['removed'].values()) + gone == quoting
    job.finish()


@pytest.fixture
def blind(monkeypatch):
    "The steps see no quotation."
    seen = lambda corpus, index, sets: (
        index,
        dict(step='decontaminate', rows_in=len(index), rows_out=len(index), removed={}),
    )
    monkeypatch.setattr(splits, 'without_contaminated', seen)


def test_many_planted_leaks_fail_the_run(prepared, blind):
    rng = random.Random(5)
    items = [prose(rng, 50) for _ in range(3)]
    texts = corpus_with(rng, items[1], 16)
    job = prepared(texts, [dict(problem=item) for item in items], heldout_percent=20)
    check = checks_of(job)['no evaluation item occurs in domain']
    assert (
        not check['ok'] and 'holds 100% of mine, number 2: leave such rows out' in check['detail']
    )
    with pytest.raises(LabError, match='no evaluation item occurs in domain'):
        job.finish()


@pytest.mark.parametrize('shard_mb', [None, 0.01])
def test_a_few_planted_leaks_are_taken_out_and_counted(prepared, blind, shard_mb):
    rng = random.Random(5)
    items = [prose(rng, 50) for _ in range(3)]
    texts = corpus_with(rng, items[1], 4)
    questions = [dict(problem=item) for item in items]
    job = prepared(texts, questions, heldout_percent=20, shard_mb=shard_mb, output='.jsonl.zst')
    job.finish()
    card = json.loads((job.folder / 'card.json').read_text())['corpora']
    rows = [r for c in card for f in find_files(str(job.folder / c['file'])) for r in read_rows(f)]
    assert {row['text'] for row in rows} == {*texts[4:]}
    taken = [
        s['rows_in'] - s['rows_out'] for c in card for s in c['steps'] if s['step'] == 'last search'
    ]
    assert sum(taken) in (3, 4) and sum(c['documents'] for c in card) == len(rows) == 60
    detail = checks_of(job)['no evaluation item occurs in domain']['detail']
    assert f'{taken[0]} rows that no step had found were taken out: row' in detail
    assert 'holds 100% of mine, number 2' in detail and '0 quotations' in detail


def test_a_short_page_with_a_word_more_is_not_trained_on(prepared):
    "Found in a corpus of 1 GB: the runs of a short page end at the word, which is 95 % of its letters."
    rng = random.Random(6)
    page = (
        'Cancel the scheduled jump due to timeout before end."""\n    milter waitinghandler\n\n'
        '    waitinghandler.cancel_jump_scheduled_waiting()\n\n\n@testing.hookimpl(trylast=True)\n'
        'def testing_exceptions_interact() -> None:\n    '
    )
    for seed in range(6):
        texts = [page, page.replace('waitinghandler\n', 'waitinghandler\n\n something ', 1)]
        texts += [prose(rng, 120) for _ in range(60)]
        job = prepared(texts, [dict(text=ITEM)], heldout_percent=40, seed=seed)
        job.finish()
        train = texts_in(job, 'domain')
        assert not any(t in train for t in texts[:2]) or not any(
            t in texts_in(job, 'domain_heldout') for t in texts[:2]
        )


def test_a_page_that_many_documents_hold_is_not_held_out(prepared):
    rng = random.Random(8)
    page = prose(rng, 40)
    texts = [page, *(f'{prose(rng, 90)} {page} {prose(rng, 90)}' for _ in range(30))]
    texts += [prose(rng, 120) for _ in range(40)]
    for seed in range(8):  # another part is held out for each
        job = prepared(texts, [dict(text=ITEM)], heldout_percent=15, seed=seed)
        assert all(check['ok'] for check in job.record['checks'])
        held, train = texts_in(job, 'domain_heldout'), texts_in(job, 'domain')
        assert len(train) > 40 and not any(text in other for text in held for other in train)


@pytest.mark.parametrize('mode', ['domain', 'reasoning'])
def test_own_rows_that_quote_an_item_are_left_out(prepared, tmp_path, mode):
    rng = random.Random(3)
    items = [prose(rng, 40) for _ in range(4)]
    ask = lambda text: dict(
        instruction=text, input='', output='so', prompt=text, reasoning='so', final='so'
    )
    own = [ask(f'Question {i}: {prose(rng, 9)}') for i in range(60)]
    own += [ask(f'Solve this, please:\n{item.upper()}\nThink well.') for item in items]
    path = jsonl(tmp_path / 'own.jsonl', own)
    changes = dict(mode=mode, own_rows=[path], puzzles=4, prompts=4, heldout_percent=20)
    job = prepared(
        [prose(rng, 120) for _ in range(60)], [dict(ctx=item) for item in items], **changes
    )
    steps = json.loads((job.folder / 'card.json').read_text())['question_steps']
    [step] = [s for s in steps if s['step'] == 'own rows to train on']
    assert 0 < step['removed']['quotes your evaluation sets'] <= 4
    name = 'domain_sft' if mode == 'domain' else 'reasoning_sft'
    assert not any(
        'Solve this' in json.dumps(row) for row in read_rows(job.folder / f'{name}.jsonl')
    )
    assert checks_of(job)[f'no item of eval_sets occurs in {name}']['ok']


# ---- memory --------------------


def test_the_index_takes_ten_bytes_for_each_byte_of_text():
    import tracemalloc

    rng = random.Random(2)
    texts = [
        ' '.join(f'{rng.choice(WORDS)}{rng.randrange(999)}' for _ in range(200))
        for _ in range(1500)
    ]
    size = sum(map(len, texts))
    duplicates.run_index(texts[:3])
    kernels.word_classes()
    tracemalloc.start()
    index = duplicates.run_index(texts)
    steady, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 2_000_000 and len(np.unique(index.hashes)) > 200_000
    assert steady < 5 * size and peak < 10 * size + (24 << 20)
