"Data: rows, operators, questions, puzzles, grading and prepare_corpus, by hand and with broken input."

import dataclasses
import gzip
import json
import math
import random
import re
from collections import Counter
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from k2lab.corpus import operators
from k2lab.lab.config import LabError
from k2lab.prepare_corpus import Config as PrepareConfig
from k2lab.tasks import puzzles, questions, splits, stats, verify
from k2lab.text import rows

TEXT = dict(text='Graphs have nodes and edges.', source='notes')
SUM = dict(prompt='1+1?', reasoning='1+1=2', final='2')


# rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
def test_rows_survive_a_round_trip_and_the_manifest_counts_them(tmp_path, name):
    many = [dict(TEXT, text=f'caf\u00e9 \u2028 {i}\nline', n=i) for i in range(7)]
    manifest = rows.write_rows(
        tmp_path / name, iter(many), 'domain', licence='CC0-1.0', origin='here'
    )
    assert rows.read_rows(tmp_path / name, 'domain') == many
    assert (
        manifest['rows'] == 7
        and manifest['bytes'] == (tmp_path / name).stat().st_size
        and manifest['licence'] == 'CC0-1.0'
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f'{name}.manifest.json']
    again = rows.write_rows(tmp_path / 'b' / name, many, 'domain')
    assert again['sha256'] == manifest['sha256']


BAD = [
    (b'[1]', 'must be an object, this is list'),
    (b'{"text": "a"', 'not JSON'),
    (b'{"text": "a"}', "no field 'source'"),
    (b'{"text": null, "source": "a"}', "'text' must be text, this is NoneType"),
    (b'{"text": " ", "source": "a"}', "'text' is empty"),
    (b'{"text": "caf\xe9", "source": "a"}', 'not UTF-8'),
    (b'{"text": "\\ud800", "source": "a"}', 'half a character'),
    (b'[' * 100_000, 'not JSON'),
    (b'\x00', 'not JSON'),
]


@pytest.mark.parametrize('line,reason', BAD)
def test_a_malformed_row_is_named_by_file_line_and_reason(tmp_path, line, reason):
    good = json.dumps(TEXT).encode()
    (tmp_path / 'a.jsonl').write_bytes(b'\n'.join([good, line, good]))
    with pytest.raises(LabError) as e:
        rows.read_rows(tmp_path / 'a.jsonl', 'domain')
    assert str(e.value).startswith(f'{tmp_path}/a.jsonl:2: ') and reason in str(e.value)
    assert (
        len(rows.read_rows(tmp_path / 'a.jsonl', 'domain', allow_bad=1)) == 2
    )  # one bad line costs one row


def test_every_cut_of_a_published_file_is_noticed(tmp_path):
    path = tmp_path / 'a.jsonl'
    rows.write_rows(path, [dict(SUM, n=i) for i in range(20)], 'reasoning_sft')
    whole = path.read_bytes()
    lines = whole.splitlines(True)
    swapped = b''.join([lines[1], lines[0], *lines[2:]])
    for broken in (b''.join(lines[:5]), whole[:-1], whole + lines[0], swapped, b''):
        path.write_bytes(broken)
        with pytest.raises(LabError, match='manifest'):
            rows.read_rows(path, 'reasoning_sft')


def test_a_file_cut_at_200_offsets_never_loads_less_in_silence(tmp_path):
    path = tmp_path / 'a.jsonl'
    rows.write_rows(path, [dict(SUM, n=i) for i in range(100)], 'reasoning_sft')
    whole, rng = path.read_bytes(), random.Random(0)
    borders = [
        i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10
    ]  # where a cut file still parses
    noticed = 0
    for at in rng.sample(borders, 60) + rng.sample(range(len(whole)), 140):
        path.write_bytes(whole[:at])
        try:
            rows.read_rows(path, 'reasoning_sft')
        except LabError:
            noticed += 1
    assert noticed == 200


def test_row_count_of_the_manifest_is_checked(tmp_path):
    path = tmp_path / 'a.jsonl'
    manifest = rows.write_rows(path, [SUM], 'reasoning_sft')
    (tmp_path / 'a.jsonl.manifest.json').write_text(json.dumps({**manifest, 'rows': 2}))
    with pytest.raises(LabError, match='1 rows, its manifest says 2'):
        rows.read_rows(path)
    (tmp_path / 'a.jsonl.manifest.json').write_text('{')
    with pytest.raises(LabError, match='manifest.json: not JSON'):
        rows.read_rows(path)


def test_empty_missing_and_truncated_files(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'\n  \n')
    with pytest.raises(LabError, match='a.jsonl: no rows'):
        rows.read_rows(tmp_path / 'a.jsonl')
    with pytest.raises(LabError, match='no such file'):
        rows.read_rows(tmp_path / 'b.jsonl')
    with pytest.raises(LabError, match='no such file'):
        rows.read_rows('memory://nowhere/b.jsonl')
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(json.dumps(SUM).encode() * 50)[:-12])
    with pytest.raises(LabError, match='cut or damaged'):
        rows.read_rows(tmp_path / 'c.jsonl.gz')


def test_windows_files_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(
        b'\xef\xbb\xbf' + json.dumps(TEXT).encode() + b'\r\n' + json.dumps(TEXT).encode()
    )
    assert rows.read_rows(tmp_path / 'a.jsonl', 'domain') == [TEXT, TEXT]


def test_a_bad_row_leaves_the_old_file_alone(tmp_path):
    rows.write_rows(tmp_path / 'a.jsonl', [SUM], 'reasoning_sft')
    with pytest.raises(LabError, match='row 2 not written'):
        rows.write_rows(tmp_path / 'a.jsonl', [SUM, {}], 'reasoning_sft')
    assert rows.read_rows(tmp_path / 'a.jsonl') == [SUM]
    with pytest.raises(LabError, match="did you mean 'domain_sft'"):
        rows.write_rows(tmp_path / 'b.jsonl', [SUM], 'domain_stf')


# corpus ---------------------------------------------------------------------------------------------------------------


def test_the_held_out_side_never_changes():
    assert [
        k for k in 'abcdefghijklmnopqrst' if operators.held_out(k, 15)
    ] == HELD  # the base models were made with this hash
    keys = [f'k{i}' for i in range(5000)]
    small, large = ({k for k in keys if operators.held_out(k, p)} for p in (5, 15))
    assert small < large and 0.04 < len(small) / 5000 < 0.06 and 0.13 < len(large) / 5000 < 0.17
    assert not any(operators.held_out(k, 0) for k in keys) and all(
        operators.held_out(k, 100) for k in keys
    )


# The first eight hex digits of their SHA-256 (3e23e816, 18ac3e73, 252f10c8, de7d1b72, 62c66a7a),
# modulo 10,000: 566, 1363, 1480, 978, 554.
HELD = list('bdfim')


def test_normal_text():
    assert operators.normal('a\t \r\n\r\n\n\n  b\x0c\x00\ufeff ') == 'a\n\n  b'
    assert operators.normal('e\u0301') == '\u00e9' and operators.normal('\r') == ''
    for text in ('a \x00\nb', ' \n\n\x1f\n x', '\ud800a'):
        assert operators.normal(operators.normal(text)) == operators.normal(text)


def test_copies_and_the_law_of_conservation():
    kept, counts = operators.exact_dedup(
        [dict(text=t) for t in ('A b', 'a\nB', 'c', 'C ', 'd')], against=[dict(text='D')]
    )
    assert [r['text'] for r in kept] == ['A b', 'c'] and counts == dict(
        step='exact dedup', rows_in=5, rows_out=2, removed={'copy': 3}
    )
    assert operators.conserved([counts]) == ''
    assert 'exact dedup: 5 in, 1 out, 3 removed' in operators.conserved([dict(counts, rows_out=1)])
    assert 'gave 2' in operators.conserved(
        [counts, dict(step='next', rows_in=3, rows_out=3, removed={})]
    )


def words(start, n):
    return ' '.join(f'w{i}' for i in range(start, start + n))


def test_decontamination_by_hand():
    evaluated = words(0, 22)  # 10 runs of 13 words
    gone = lambda text, **kw: not operators.decontaminate([dict(text=text)], [evaluated], **kw)[0]
    assert gone(evaluated.upper()) and gone(f'x {words(0, 14)} y')  # 2 of 10 runs is a fifth
    assert (
        not gone(words(0, 13))
        and gone(words(0, 13), share=0.1)
        and not gone(words(0, 12), share=0.01)
    )
    assert gone(words(4, 18) + ', and so on') and not gone('nothing of it')


def test_decontamination_finds_what_is_quoted_often_and_short_questions():
    many = [dict(text=words(0, 13) + f' page {i}') for i in range(11)]
    for quoted in (many, many[:10]):
        assert not operators.decontaminate(quoted, [words(0, 13)])[0]
    short = 'what is the default of weight'
    assert (
        not operators.decontaminate([dict(text=f'Q: {short}?')], [short])[0]
        and operators.decontaminate([dict(text='a tree')], ['a tree'])[0]
    )


def test_decontamination_leaves_nothing_that_it_would_remove_again():
    rng = random.Random(0)
    pages = [
        dict(text=' '.join(words(rng.randrange(40), rng.randint(10, 30)) for _ in range(2)))
        for _ in range(80)
    ]
    evaluated = [words(i, 20) for i in range(0, 60, 7)]
    kept, counts = operators.decontaminate(pages, evaluated, common=4)
    assert (
        0 < len(kept) < 80
        and operators.decontaminate(kept, evaluated, common=4)[0] == kept
        and operators.conserved([counts]) == ''
    )


@pytest.mark.parametrize(
    'weights,n,want',
    [
        (dict(a=1, b=1), 5, [2, 3]),
        (dict(a=7, b=2, c=1), 10, [1, 2, 7]),
        (dict(a=0.3, b=0.7), 0, [0, 0]),
        (dict(a=1, b=0), 3, [0, 3]),
    ],
)
def test_mixture_shares(weights, n, want):
    assert sorted(operators.whole_shares(weights, n).values()) == want and sum(want) == n


def test_mixture_is_seeded_and_uses_no_row_twice():
    pools = {name: [dict(text=f'{name}{i}') for i in range(30)] for name in 'ab'}
    mix = lambda seed: [r['text'] for r in operators.mix_rows(pools, dict(a=3, b=1), 40, seed)[0]]
    assert (
        mix(0) == mix(0) != mix(1)
        and len(set(mix(0))) == 40
        and Counter(t[0] for t in mix(0)) == dict(a=30, b=10)
    )


def test_data_card_counts_bytes_of_utf8():
    card = operators.data_card(
        'x',
        [
            dict(text='\u00e9', source='s', licence='L'),
            dict(prompt='ab', reasoning='', final='c', n=1),
        ],
    )
    assert card['bytes'] == 5 and card['sources'] == {
        's': dict(documents=1, bytes=2, licence='L'),
        'unknown': dict(documents=1, bytes=3, licence='unknown'),
    }


# puzzles and grading --------------------------------------------------------------------------------------------------


def steps_right(text: str) -> tuple[int, int]:
    "How many of the equations like `52+7=59` that a text states are true, and how many there are."
    stated = re.findall(rf'(?<![\d*+-])({verify.EXPRESSION})\s*=\s*(-?\d+)', text)
    return sum(verify.value(left) == int(right) for left, right in stated), len(stated)


@pytest.mark.parametrize('family', puzzles.PUZZLE_FAMILIES)
def test_there_are_enough_puzzles_and_all_are_right(family):
    evaluated = puzzles.make_puzzles(600, 10_000_000, (family,))
    train = puzzles.make_puzzles(20_000, 0, (family,), avoid={r['id'] for r in evaluated})
    assert len({r['prompt'] for r in train}) == 20_000 and not puzzles.prompts_overlap(
        train, evaluated
    )
    for row in evaluated + train[:400]:
        assert verify.verify(row, f"<think>{row['reasoning']}</think>{row['final']}<|im_end|>")
        true, stated = steps_right(row['reasoning'])
        assert true == stated and (stated > 0) == (family in ('chain', 'compare'))
    assert (
        stats.majority_baseline(train)['all'] < 0.25
        and stats.copy_baseline(evaluated)['all'] < 0.25
    )


@pytest.mark.parametrize('family', puzzles.PUZZLE_FAMILIES)
def test_both_styles_solve_the_same_problem(family):
    short, long = (puzzles.make_puzzles(300, 3, (family,), style=style) for style in puzzles.STYLES)
    for a, b in zip(short, long):
        assert (a['prompt'], a['final'], a['id']) == (b['prompt'], b['final'], b['id'])
        assert (
            len(b['reasoning']) >= 1.8 * len(a['reasoning'])
            and b['reasoning'].count(a['reasoning']) == 2
        )


def test_chain_stays_between_0_and_99():
    for row in puzzles.make_puzzles(2000, 1, ('chain',), style='short'):
        steps = row['reasoning'].splitlines()
        assert 2 <= len(steps) <= 4 and all(
            0 <= int(step.split('=')[1].split('|')[0]) <= 99 for step in steps
        )


def test_neighbouring_seeds_are_strangers():
    a, b = (puzzles.make_puzzles(2000, seed) for seed in (0, 1))
    shared = {r['prompt'] for r in a} & {r['prompt'] for r in b}
    assert len(shared) < 20 and [r['id'] for r in a[4:]] != [r['id'] for r in b[:-4]]


def test_puzzles_refuse_what_they_cannot_do(monkeypatch):
    with pytest.raises(
        LabError, match="unknown puzzle family 'sorting'.*valid are: chain, count, sort, compare"
    ):
        puzzles.make_puzzles(1, 0, ('sorting',))
    monkeypatch.setitem(puzzles.MAKERS, 'chain', lambda rng: puzzles.Item('1?', ['1'], '1', '1'))
    with pytest.raises(LabError, match='no new chain item'):
        puzzles.make_puzzles(2, 0, ('chain',))


@pytest.mark.parametrize(
    'expression,want',
    [('7', 7), ('10-3-4', 3), ('2*3*4', 24), ('1+2*3', 7), ('5*2-3*3+1', 2), ('12 + 3', 15)],
)
def test_value_by_hand(expression, want):
    assert verify.value(expression) == want


@pytest.mark.parametrize('bad', ['', '1+', '-1', '2**9', '1/2', 'a', '1+2;3', '(1)'])
def test_value_takes_nothing_else(bad):
    with pytest.raises(LabError):
        verify.value(bad)


@pytest.mark.parametrize(
    'prompt,family,want',
    [
        ('Compute 52+7-3.', 'chain', '56'),
        ('How many b in: b, ab, b?', 'count', '2'),
        ('Count node in: edge, edge.', 'count', '0'),
        ('Sort from small to large: 47,12.', 'sort', '12,47'),
        ('Give the larger value: 3*4 or 10+1.', 'compare', '12'),
    ],
)
def test_truth_comes_from_the_question(prompt, family, want):
    assert verify.truth(dict(prompt=prompt, family=family, answer='a wrong one')) == want


@pytest.mark.parametrize(
    'text,want',
    [
        ('<think>a</think> 5 <|im_end|>junk', '5'),
        ('<think>5', None),
        ('5', '5'),
        ('<think>a</think>', None),
        ('', None),
        ('<think>a</think>4</think>5', '5'),
        ('<think>a</think>4<think>b', None),
    ],
)
def test_strict_reading(text, want):
    assert verify.extract(text) == want


def test_the_format_of_the_labs_families_is_strict():
    row = dict(instruction='q', input='', output="'km'", family='default')
    assert (
        verify.verify(row, "'km'.")
        and not verify.verify(row, 'km')
        and not verify.verify(row, "It is 'km'.")
        and verify.verify(verify.without_format(row), "The default is 'km'.")
    )
    row = dict(prompt='Compute 2+3.', family='chain', final='5')
    free = verify.without_format(row)
    assert not verify.verify(row, '<think>2+3=5') and not verify.verify(row, 'It is 5.')
    assert verify.verify(free, 'It is 5.') and not verify.verify(free, 'It is 4 or 5.')
    assert not verify.verify(free, '<think>2+3=5') and not verify.verify(free, '15')


def test_wilson_against_the_formula():
    # k = 5, n = 10, z = 1.96: (.5 + .19208 +- 1.96 sqrt(.025 + .009604)) / 1.38416
    low, high = stats.wilson(5, 10)
    assert math.isclose(
        low, (0.69208 - 1.96 * math.sqrt(0.034604)) / 1.38416, abs_tol=1e-6
    ) and math.isclose(low + high, 1)
    assert stats.wilson(0, 0) == (0, 1) and stats.wilson(10, 10)[1] == 1


# questions ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class F:
    name: str
    params: tuple
    summary: str = 'Do the thing well.'
    source: str = 'lib'
    module: str = 'lib'
    key = property(lambda self: f'lib.{self.name}')
    signature = property(
        lambda self: (
            f"{self.name}({', '.join(n if d is None else f'{n}={d}' for n, d in self.params)})"
        )
    )


LIB = [
    F(
        f'f{i}',
        (('a', None), *((f'p{j}', str(i + j)) for j in range(i % 7))),
        f'Compute part {i} of it.',
    )
    for i in range(200)
]


def test_questions_by_hand():
    f = F('walk', (('G', None), ('start', None), ('n', '3'), ('key', "'x'")))
    ask = lambda family: [
        (asked, answer, fact) for _, asked, _, answer, fact in questions.ASK[family]([f], None)
    ]
    assert ask('default') == [('n', 'n=3', '3'), ('key', "key='x'", "'x'")]
    assert ask('after') == [
        ('G', 'G, start', 'start'),
        ('start', 'start, n', 'n'),
        ('n', 'n=3, key', 'key'),
    ]
    assert ask('arity') == [('walk', 'G, start, n, key: 4', 4)]


def test_questions_are_unique_right_and_hard_to_guess():
    made = questions.make_questions(LIB, 1500, 0)
    assert len(
        {(r['instruction'], r['input']) for r in made}
    ) == 1500 and made == questions.make_questions(list(reversed(LIB)), 1500, 0)
    assert max(stats.majority_baseline(made).values()) <= 0.25 and set(
        Counter(r['family'] for r in made)
    ) == set(questions.QUESTION_FAMILIES)
    signatures = {f.signature: f for f in LIB}
    for r in made:
        if r['family'] == 'arity':
            assert (r['output'], r['fact']) == (
                ', '.join(p for p, _ in signatures[r['input']].params) + f": {r['fact']}",
                str(len(signatures[r['input']].params)),
            )
        elif r['family'] == 'summary':
            assert [l for l in r['input'].splitlines() if l.split(': ')[1] in r['instruction']] == [
                r['output']
            ] and r['output'].startswith(r['fact'] + ': ')
        elif r['family'] == 'describe':
            assert (
                r['output'] in r['input'].splitlines()
                and r['output'].split(':')[0] in r['instruction']
                and r['output'].endswith(f": {r['fact']}")
            )
        else:
            assert r['output'] in r['input'] and r['output'].endswith(r['fact'])


def test_questions_avoid_and_refuse():
    evaluated = questions.make_questions(LIB, 100, 1)
    avoid = {(r['instruction'], r['input']) for r in evaluated}
    assert not avoid & {
        (r['instruction'], r['input']) for r in questions.make_questions(LIB, 1000, 0, avoid=avoid)
    }
    with pytest.raises(LabError, match='0 functions give 0 questions'):
        questions.make_questions([], 5, 0)
    with pytest.raises(LabError, match="unknown question family 'count'"):
        questions.make_questions(LIB, 5, 0, ('count',))


def test_twins_of_held_out_functions_are_not_trained_on():
    held = [F('area', ()), F('size', (), 'Give the size.')]
    assert [
        f.name
        for f in questions.unlike(
            [F('area', (), 'x'), F('extent', (), 'give the SIZE. '), F('walk', (), 'Walk.')], held
        )
    ] == ['walk']


def test_a_list_or_a_line_under_another_name_is_found():
    signature = dict(family='default', group='a.f', instruction='?', input='f(G, k=2)', fact='2')
    line = dict(family='describe', group='a.g', instruction='?', fact='Draw it')
    line['input'] = 'g: Draw it\nh: Save it'
    leaks = [
        signature | dict(group='b.other', input='other(G, k=2)'),
        signature | dict(input='f(x, k=2)'),  # the same function
        line | dict(group='b.x', input='x: SAVE IT\ny: Show it', fact='Show it'),
    ]
    clean = [
        signature | dict(group='b.other', input='other(G, k=2)', family='arity'),
        signature | dict(group='b.other', input='other(G, k=3)', fact='3'),
        dict(family='own', instruction='?', input='f(G, k=2)', fact='2'),
    ]
    found = []
    job = SimpleNamespace(check=lambda name, ok, detail: found.append(ok))
    for trained in [*([row] for row in leaks), clean]:
        splits.check_facts(job, [signature, line], dict(train=trained))
    assert found == [False, False, False, True]


@pytest.mark.parametrize('percent,development', [(15, 5), (15, 10), (30, 5)])
def test_seeds_are_evaluated_on_other_keys_and_developed_on_the_same(percent, development):
    keys = [f'k{i}' for i in range(3000)]
    of = lambda seed, side: {*splits.Sides(percent, development, seed).part(keys, side, str)}
    apart = int((100 - development) // percent)
    windows = [of(seed, 'evaluation') for seed in range(apart)]
    assert sum(map(len, windows)) == len(set.union(*windows))
    assert all(abs(len(w) / 30 - percent) < 3 for w in windows)
    assert of(0, 'development') == of(7, 'development') and len(of(0, 'development')) > 100
    assert not of(0, 'development') & set.union(*windows)
    parts = [of(3, side) for side in ('training', 'development', 'evaluation')]
    assert sum(map(len, parts)) == 3000 == len(set.union(*parts))


@pytest.mark.parametrize(
    'family,a,b',
    [
        ('chain', 'What is 12+3-4?', 'Compute 12-4+3.'),
        ('count', 'How many a in: a, b, a, c?', 'Count a in: c, a, a, b.'),
        ('sort', 'Sort ascending: 30,10,20.', 'Sort ascending: 10,20,30.'),
        ('compare', 'Give the larger value: 3*4 or 2*9.', 'Give the larger value: 9*2 or 4*3.'),
    ],
)
def test_no_evaluated_puzzle_is_trained_on_in_another_order(family, a, b):
    # a rule of its own: the numbers and words of a prompt, sorted; the first of a chain or count stays
    def mark(prompt):
        if sides := re.findall(r'(\d+)([*+])(\d+)', prompt) * (family == 'compare'):
            return sorted([op, *sorted((x, y))] for x, op, y in sides)
        pieces = re.findall(r'[-+]?\w+', prompt.split(': ')[-1])
        pieces = [p.lstrip('+') for p in pieces if p not in ('What', 'is', 'Compute', 'or')]
        first = pieces[:1] if family == 'chain' else re.findall(r'(\S+) in:', prompt)
        return tuple(first), tuple(sorted(pieces))

    assert mark(a) == mark(b)
    evaluated = puzzles.make_puzzles(300, 10_000_000, (family,), share=0.2)
    train = puzzles.make_puzzles(8000, 0, (family,), avoid={r['id'] for r in evaluated})
    marks = lambda made: {str(mark(r['prompt'])) for r in made}
    assert not marks(evaluated) & marks(train)


def test_a_question_that_nothing_answers_and_a_rule_that_reads_signatures():
    f = F('walk', (('G', None), ('n', '3'), ('sep', "','"), ('box', '(1, 2)')), 'Walk on a path.')
    asked = {family: list(questions.ASK[family]([f], None)) for family in questions.RECALL_FAMILIES}
    assert [answer for *_, answer, _ in asked['recall_default']] == ['n=3', "sep=','", 'box=(1, 2)']
    assert [answer for *_, answer, _ in asked['recall_after']] == ['n', 'sep', 'box']
    assert [answer for *_, answer, _ in asked['recall_parameters']] == ['G, n, sep, box']
    assert [answer for *_, answer, _ in asked['recall_describe']] == ['Walk on a path']
    assert all(page == '' for rows in asked.values() for _, _, page, *_ in rows)
    rows = [
        dict(family='default', instruction='What is the default of sep?', output="sep=','"),
        dict(
            family='after', instruction='What follows sep in the signature?', output="sep=',', box"
        ),
        dict(
            family='after', instruction='What follows box in the signature?', output='box=(1, 2), x'
        ),
        dict(
            family='arity', instruction='Count the parameters of walk.', output='G, n, sep, box: 4'
        ),
    ]
    rows = [row | dict(input=f.signature) for row in rows] + [
        dict(family='recall_after', output='')
    ]
    read = questions.prompt_only_baseline(rows[:4])
    assert read == dict(all=0.75, default=1, after=0.5, arity=1)
    assert questions.prompt_only_baseline([]) == {}


def test_weights_and_packages_share_the_rows():
    weights = dict(arity=1, describe=3)
    made = questions.make_questions(LIB, 200, 0, weights)
    assert Counter(r['family'] for r in made) == dict(arity=50, describe=150)
    kinds = questions.in_turn('aaaabbc', lambda letter: letter)
    assert ''.join(kinds) == 'abcabaa'


# the stage ------------------------------------------------------------------------------------------------------------


def prepare(runs, **changes):
    "A finished run of prepare_corpus at smoke, in the given runs folder."
    from k2lab import prepare_corpus
    from k2lab.lab.job import start
    from k2lab.lab.launch import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('K2LAB_LAB_RUNS_PATH', str(runs))
        job = start('prepare_corpus', 'smoke', None, changes)
        launch(prepare_corpus.work, job)
        return job.finish()


@pytest.fixture
def prepared(tmp_path):
    "Runs prepare_corpus at smoke into a temporary runs folder."
    return partial(prepare, tmp_path / 'runs')


@pytest.fixture(scope='module')
def domain_job(tmp_path_factory):
    "The domain mode as it is; made once, only to be read."
    return prepare(tmp_path_factory.mktemp('domain'))


@pytest.fixture(scope='module')
def reasoning_job(tmp_path_factory):
    "The reasoning mode as it is; made once, only to be read."
    return prepare(tmp_path_factory.mktemp('reasoning'), mode='reasoning')


def rows_of(job, name):
    return rows.read_rows(job.folder / f'{name}.jsonl')


def keys(job, name):
    return {r['key'] for r in rows_of(job, name)}


def prompts(job, name):
    return {verify.prompt_of(r) for r in rows_of(job, name)}


def test_domain_mode_leaves_its_files_and_passes_its_checks(domain_job):
    assert set(domain_job.record['saves']) == {
        'domain',
        'domain_heldout',
        'domain_heldout_rest',
        'general',
        'general_heldout',
        'domain_sft',
        'domain_questions',
        'domain_questions_dev',
        'domain_recall',
        'domain_recall_dev',
    }
    assert all(c['ok'] for c in domain_job.record['checks'])


def test_training_and_heldout_pages_do_not_meet(domain_job):
    train, heldout = keys(domain_job, 'domain'), keys(domain_job, 'domain_heldout')
    assert train and heldout and not train & heldout
    assert all(operators.held_out(k, 15) for k in heldout)
    assert not any(operators.held_out(k, 15) for k in train)


def test_questions_are_about_heldout_functions_and_in_no_training_file(domain_job):
    questions_asked = prompts(domain_job, 'domain_questions')
    assert len(questions_asked) == 40
    assert not prompts(domain_job, 'domain_sft') & questions_asked
    of_domain = lambda name: [
        r['group'] for r in rows_of(domain_job, name) if r['package'] == 'networkx'
    ]
    assert all(operators.held_out(key, 15) for key in of_domain('domain_questions'))
    developed = of_domain('domain_questions_dev')
    assert developed and not any(operators.held_out(key, 95) for key in developed)
    assert not {*developed} & keys(domain_job, 'domain')


def test_recall_questions_are_about_pages_that_are_read_and_nothing_else_asks(domain_job):
    pages, trained = keys(domain_job, 'domain'), rows_of(domain_job, 'domain_sft')
    for name in ('domain_recall', 'domain_recall_dev'):
        asked = {r['group'] for r in rows_of(domain_job, name)}
        assert asked and asked <= pages
        assert not asked & {r['group'] for r in trained}
    assert {r['family'] for r in trained} >= {*questions.RECALL_FAMILIES}


def test_every_corpus_has_a_card_with_licence_and_origin(domain_job):
    corpora = json.loads((domain_job.folder / 'card.json').read_text())['corpora']
    assert [c['name'] for c in corpora] == list(domain_job.record['saves'])
    assert all(c['licence'] != 'unknown' and c['origin'] for c in corpora)


def test_reasoning_mode_leaves_five_files_that_do_not_meet(reasoning_job):
    assert set(reasoning_job.record['saves']) == {
        'reasoning',
        'reasoning_sft',
        'reasoning_prompts',
        'reasoning_eval',
        'reasoning_eval_dev',
    }
    names = ('reasoning_sft', 'reasoning_prompts', 'reasoning_eval', 'reasoning_eval_dev')
    sets = [prompts(reasoning_job, name) for name in names]
    assert [len(s) for s in sets] == [80, 24, 40, 20] and len(set.union(*sets)) == 164
    assert rows_of(reasoning_job, 'reasoning')[0]['source'] == 'puzzles/chain'


def test_without_training_questions_a_package_is_still_asked_about(prepared):
    job = prepared(questions=0)
    assert 'domain_sft' not in job.record['saves']
    assert len(rows_of(job, 'domain_questions')) == 40
    assert len(rows_of(job, 'domain_questions_dev')) == 20
    other = prepared(questions=0, seed=1)
    of = lambda job: {r['group'] for r in rows_of(job, 'domain_questions')}
    assert not of(job) & of(other)


def test_the_same_seed_gives_the_same_bytes(prepared, reasoning_job):
    sha = lambda job: job.record['saves']['reasoning_sft']['sha256']
    same, other = (prepared(mode='reasoning', seed=seed) for seed in (0, 1))
    assert sha(reasoning_job) == sha(same) != sha(other)


def test_rows_of_your_own_join_and_a_copied_test_question_does_not(
    prepared, reasoning_job, tmp_path
):
    evaluated = rows_of(reasoning_job, 'reasoning_eval')
    mine = [dict(prompt=f'My problem {i}?', reasoning='so', final=str(i)) for i in range(20)] + [
        dict(evaluated[0], reasoning='stolen')
    ]
    (tmp_path / 'mine.jsonl').write_text('\n'.join(map(json.dumps, mine)))
    job = prepared(mode='reasoning', own_rows=[str(tmp_path / 'mine.jsonl')])
    train = prompts(job, 'reasoning_sft')
    test = prompts(job, 'reasoning_eval') | prompts(job, 'reasoning_eval_dev')
    own = {r['prompt'] for r in mine[:20]}
    assert own <= train | test and own & train and own & test and not train & test


MISSING = dict(package='no_such_package')
NETWORKX = f'networkx {version("networkx")}'


@pytest.mark.parametrize(
    'changes,message',
    [
        (dict(sources=[]), 'no documents in an empty list of sources'),
        (dict(sources=[MISSING]), "'no_such_package' is not installed"),
        (dict(general_sources=[MISSING]), "'no_such_package' is not installed"),
        (dict(question_sources=[MISSING]), "'no_such_package' is not installed"),
        (dict(refine=dict(min_chars=10**6)), f'no document of {NETWORKX} passes'),
        (dict(refine=dict(min_char=5)), "did you mean 'min_chars'"),
        (dict(refine=dict(near_duplicate_jaccard=2)), 'a Jaccard similarity'),
        (dict(heldout_percent=100, limit=20), 'leave 0 to train on'),
        (dict(own_rows=['nowhere.jsonl']), "'nowhere.jsonl': nothing matches"),
        (dict(eval_items=4000), 'questions, but the functions give only'),
        (dict(evaluation_sources=[], dev_items=4000), 'dev_items: 4000 questions, but'),
        (dict(evaluation_sources=[dict(package='fsspec')]), "'fsspec' is also in general_sources"),
        (dict(evaluation_sources=[dict(files='a.md')]), 'has no functions'),
        (dict(question_weights=dict(sumary=2)), "did you mean 'summary'"),
        (dict(question_weights=dict(summary=-1)), 'a number from 0 on'),
        (dict(mode='reasoning', families=['sums']), "unknown puzzle family 'sums'"),
        (dict(mode='resoning'), 'mode must be'),
        (dict(puzles=3), "did you mean 'puzzles'"),
    ],
)
def test_bad_input_is_one_clear_line(prepared, changes, message):
    with pytest.raises(LabError) as e:
        prepared(**changes)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_an_empty_or_broken_file_source_is_refused(prepared, tmp_path):
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"text": 1}\n')
    for limit, file, message in (
        (5, 'empty', 'no rows in .*empty.jsonl'),
        (None, 'empty', 'no rows in .*empty.jsonl'),
        (5, 'bad', "1 of 2 rows are bad .*bad.jsonl, line 2: 'text' must be text"),
        (None, 'bad', "1 of 2 rows are bad .*bad.jsonl, line 2: 'text' must be text"),
    ):
        with pytest.raises(LabError, match=message):
            prepared(
                limit=limit, questions=0, sources=[dict(files=str(tmp_path / f'{file}.jsonl'))]
            )


def test_files_without_functions_ask_for_rows_of_your_own(prepared, tmp_path):
    for i in range(40):
        (tmp_path / f'note{i}.md').write_text(
            f'# Note {i}\n' + ' '.join(f'w{i}x{j}' for j in range(40))
        )
    source = [dict(files=f'{tmp_path}/*.md', licence='CC0-1.0')]
    with pytest.raises(LabError, match='domain questions need a package'):
        prepared(sources=source)
    mine = [dict(instruction=f'What is note {i}?', input='', output=f'Note {i}') for i in range(60)]
    (tmp_path / 'mine.jsonl').write_text('\n'.join(map(json.dumps, mine)))
    job = prepared(sources=source, own_rows=[str(tmp_path / 'mine.jsonl')])
    names = ('domain_sft', 'domain_questions', 'domain_questions_dev')
    assert sum(len(prompts(job, name)) for name in names) == 60


def test_text_alone_needs_no_questions(prepared, tmp_path):
    (tmp_path / 'notes.jsonl').write_text(
        ''.join(
            json.dumps(
                dict(text=f'# Note {i} ' + ' '.join(f'w{i}x{j}' for j in range(40)), key=f'note{i}')
            )
            + '\n'
            for i in range(40)
        )
    )
    alone = partial(
        prepared,
        sources=[dict(files=f'{tmp_path}/notes.jsonl', licence='CC0-1.0')],
        questions=0,
        general_sources=[],
        limit=None,
        heldout_rows=3,
    )
    job = alone()
    assert set(job.record['saves']) == {'domain'} and len(keys(job, 'domain')) == 40
    job = alone(heldout_percent=15)
    assert set(job.record['saves']) == {'domain', 'domain_heldout', 'domain_heldout_rest'}
    assert all(c['ok'] for c in job.record['checks']) and len(keys(job, 'domain_heldout')) == 3
    train = keys(job, 'domain')
    heldout = keys(job, 'domain_heldout') | keys(job, 'domain_heldout_rest')
    everything = {f'note{i}' for i in range(40)}
    assert heldout == {k for k in everything if operators.held_out(k, 15)}
    assert train | heldout == everything and not train & heldout


def test_later_stages_read_no_held_out_documents_of_others(tmp_path, monkeypatch):
    "Nothing is held out of your files: neither the lab's own documents nor an older run's stand in for them."
    from k2lab import prepare_corpus, train_continual_pretrain
    from k2lab.lab.job import start
    from k2lab.lab.launch import launch

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    (tmp_path / 'notes.jsonl').write_text(
        ''.join(
            json.dumps(dict(text=f'# {i} ' + ' '.join(f'w{i}x{j}' for j in range(80)))) + '\n'
            for i in range(40)
        )
    )
    source = dict(files=f'{tmp_path}/notes.jsonl', licence='CC0-1.0')

    def run(stage, module, **changes):
        job = start(stage, 'smoke', None, changes, campaign='mine')
        launch(module.work, job)
        return job.finish()

    for percent in (15, None):
        run(
            'prepare_corpus',
            prepare_corpus,
            sources=[source],
            questions=0,
            limit=None,
            heldout_percent=percent,
        )
    job = run('train_continual_pretrain', train_continual_pretrain)
    checks = {c['name']: c for c in job.record['checks']}
    why = checks['domain_bits_per_byte left out']['detail']
    assert "prepare_corpus saved none: no document is held out; `heldout_percent: 5` holds" in why
    assert 'domain_heldout' not in {p['name'] for p in job.record['parents']}
    assert {m['measure'] for m in job.record['metrics']} == {'general_bits_per_byte'}
    job = start('train_continual_pretrain', 'smoke', None, {}, campaign='mine')
    job.env['data']['domain_heldout'] = str(tmp_path / 'notes.jsonl')  # a place of one's own
    assert str(job.find('domain_heldout')) == str(tmp_path / 'notes.jsonl')
    gate = dict(improves=['domain_bits_per_byte'])
    with pytest.raises(LabError, match='or take domain_bits_per_byte out of the gate'):
        run('train_continual_pretrain', train_continual_pretrain, gate=gate)
    run(
        'prepare_corpus',
        prepare_corpus,
        sources=[source],
        questions=0,
        limit=None,
        heldout_percent=30,
    )
    job = run('train_continual_pretrain', train_continual_pretrain)
    assert 'domain_bits_per_byte' in {m['measure'] for m in job.record['metrics']}


def test_prepare_corpus_is_not_run_again_on_files_that_did_not_change(tmp_path, monkeypatch):
    "Found by running a pipeline twice on notes of one's own: its first steps ran again, for the same files."
    from k2lab import prepare_corpus
    from k2lab.lab.job import start
    from k2lab.lab.launch import launch
    from k2lab.lab.records import read_run
    from k2lab.lab.reproduce import stale

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    for i in range(40):
        (tmp_path / f'{i}.md').write_text(' '.join(f'w{i}x{j}' for j in range(80)))
    files = dict(sources=[dict(files=f'{tmp_path}/*.md', licence='MIT')])
    records = []
    for mode in (dict(mode='domain', questions=0), dict(mode='reasoning')):
        job = start('prepare_corpus', 'smoke', None, mode | files, campaign='c')
        launch(prepare_corpus.work, job)
        records.append(read_run(job.finish().folder))
    data = lambda: [[w for w in stale(r) if w.startswith('data')] for r in records]
    assert data() == [[], []]
    (tmp_path / '7.md').write_text('another one')
    assert data() == [[f'data {tmp_path}/*.md'], []]


def test_the_names_of_a_mode_are_those_of_the_pipeline():
    from k2lab.lab.config import lab_path, read_yaml
    from k2lab.prepare_corpus import SAVED

    steps = read_yaml(lab_path('configs') / 'pipeline.yaml')['steps'][:2]
    assert {s['changes']['mode']: s['saves'] for s in steps} == {k: [*v] for k, v in SAVED.items()}


@pytest.mark.parametrize('mode', ['domain', 'reasoning'])
def test_an_unknown_family_is_refused_in_either_mode(mode):
    with pytest.raises(LabError, match="'chian' .did you mean 'chain'"):
        PrepareConfig(mode=mode, families=['chian'])
