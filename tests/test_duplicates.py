"Duplicates and contamination: kernels against twins, operators against definitions and labelled corpora."

import hashlib
import json
import random
import subprocess
import sys
from functools import partial
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from k2lab.corpus import duplicates, kernels, operators
from k2lab.corpus.operators import conserved
from k2lab.lab.config import LabError

ALPHABETS = [
    'abcdeABCDE  \n.,_-019',
    'äöüßÄÉñŁłıİKΣσςΑΒЖжǅ ',
    '图书馆 使用。、カタカナひらがなｱｲ々〇',
    'ภาษาไทย ກຂ မြန် ខ្មែរ ',
    '한국어 हिन्दी עברית العربية ',
    '\x00\x7f\x80\xa0\u2028\ufeff\u0301\u200d\U0001f600\U00020000\U0003ffff\U000e0100\U0010ffff',
    '²½①Ⅷ٣ªʰ𝒜𝟘',
]


def random_texts(n, seed=0):
    "Texts of mixed scripts as bytes; a third cut or spoilt somewhere."
    rng = random.Random(seed)
    for i in range(n):
        text = ''.join(
            rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.choice([0, 1, 5, 60, 400]))
        ).encode()
        if i % 3 == 0 and text:
            text = (
                text[: rng.randrange(len(text))]
                + bytes([rng.randrange(256)])
                + text[rng.randrange(len(text)) :]
            )
        yield text


def laid(parts):
    "Bytes as kernels take them."
    return np.frombuffer(b''.join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts])


def both(monkeypatch, work):
    "What a function gives with machine code, and what with plain Python."
    fast = work()
    with monkeypatch.context() as m:
        m.setattr(kernels, 'machine', lambda *told: None)
        plain = work()
    return fast, plain


def same(a, b):
    "Whether two results are equal in every array and type."
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and np.array_equal(a, b)


def digest(table):
    return hashlib.sha256(json.dumps(table['text'].to_pylist()).encode()).hexdigest()


def sentence(rng, n):
    return ' '.join(
        ''.join(rng.choices('abcdefghijklmnop', k=rng.randrange(2, 8))) for _ in range(n)
    )


# kernels and twins ----------------------------------------------------------------------------------------------------


def test_words_by_hand():
    assert kernels.gram_words('Hello, WORLD a_b 12!') == ['hello', 'world', 'a_b', '12']
    assert kernels.gram_words('用Python写 3行') == ['用', 'python', '写', '3', '行']
    assert kernels.gram_words('กราฟ') == list('กราฟ') and kernels.gram_words('한국어 단어') == [
        '한국어',
        '단어',
    ]
    assert (
        kernels.gram_words('ΟΔΟΣ οδος') == ['οδοσ', 'οδοσ']
        and kernels.gram_words('İzmir') == ['izmir']
        and kernels.gram_words(' .,\n') == []
    )


def test_hashes_by_hand():
    assert kernels.stirred(0) == 0 and kernels.stirred(1) == (0xBF58476D1CE4E5B9 ^ 0xBF58476D)
    fnv = ((0xCBF29CE484222325 ^ 97) * 0x100000001B3) % 2**64
    assert kernels.word_hash('a') == kernels.stirred(fnv)
    assert kernels.gram_hash([3, 5]) == kernels.stirred((3 * kernels.BASE + 5 + 2) % 2**64)
    assert kernels.jaccard([1, 1, 2], [2, 3]) == 1 / 3 and kernels.jaccard([], []) == 0


def test_a_letter_is_what_python_takes_for_one():
    _, table, spelled = kernels.word_classes()
    for c in range(kernels.CODE_POINTS):
        if 0xD800 <= c < 0xE000 or c == 0x5F:
            continue
        letters, what = kernels.folded_letters(chr(c)), int(table[c])
        if what <= kernels.SPELLED and what != kernels.SKIPPED:
            first = kernels.SPELLED - what + 1
            assert spelled[first - 1] == len(letters) > 1, hex(c)
            seen = spelled[first : first + len(letters)].tolist()
        else:
            seen = [] if what == kernels.SKIPPED else [what]
        if any(map(str.isalnum, letters)):
            assert [abs(x) for x in seen] == [ord(x) if x.isalnum() else 0 for x in letters], hex(c)
        else:
            assert not any(seen) and bool(seen) == bool(letters), hex(c)
    assert not any(
        chr(c).isalnum() for c in range(kernels.CODE_POINTS, 0x110000)
    )  # nothing above is a letter
    assert table[ord('Q')] == ord('q') and table[ord('图')] == -ord('图') and table[ord(' ')] == 0


HIDING = [
    *'aBxQL_.<>&123',
    *('<b>', '</b>', '<div class="x">', '<br/>', '<foo>', '<!-- x -->', '<!--', '-->', 'a</'),
    *('&amp;', '&lt;', '&nbsp;', '&#233;', '&#xE9;', '&#xZ;', '&bogus;', '&UnderBar;', '&#95;'),
    *('&#10;', '&#0;', '&#1114112;', '__', '12', '\n', '\n\n', '\r\n', ' ', ': ', '> ', 'Line '),
    *('ﬁ', '½', 'é', 'e\u0301', '\u200d', '\u00ad', '한', '\u0e01', '图', '㌀', 'ﷺ', '\U000e0101'),
    *(
        'ß',
        'İ',
        'ı',
        '\u02bc',
        '\t',
        '\x00',
        '\x1f',
        '\x7f',
        '٣',
        '\u0640',
        '＿',
        '𝐀',
        '\ufe33',
        'а',
    ),
]


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('numbers', [True, False])
def test_what_hides_words_is_seen_through_as_by_the_twin(monkeypatch, seed, numbers):
    rng = random.Random(seed)
    texts = [''.join(rng.choices(HIDING, k=rng.randrange(1, 40))).encode() for _ in range(300)]
    fast, plain = both(monkeypatch, lambda: kernels.word_hashes(*laid(texts), numbers))
    assert same(fast, plain)


PLAIN = 'ten nodes of the graph were closed before the first edge was relaxed'


@pytest.mark.parametrize(
    'written',
    [
        'ten\u00a0nodes of the gr\u00adaph were clo\u200bsed before the \u202efirst\u202c edge was rel\u2060axed',
        'ｔｅｎ nodes 𝐨𝐟 the graph were closed before the ﬁrst edge was RELAXED',
        'te\u0301n nódes of the graph wëre closed befo\u0308re the fırst edge was relaxed',
        '> ten nodes of\n>> the graph were\n> closed before the first edge was relaxed',
        '12 ten nodes of\n13 the graph were\n14 closed before the first\n15 edge was relaxed',
        'L1: ten nodes of the graph\n\nL2: were closed before the first\nL3: edge was relaxed',
        '[00:01] ten nodes of the graph\n[00:07] were closed before the first edge was relaxed',
        '<p>ten <b>no</b>des of&nbsp;the <a href="x">graph</a> were</p><li>closed before the '
        '<!-- here -->first&#32;edge was re<wbr>laxed',
        '**ten nodes** of the _graph_ were `closed` before — the “first” edge ‘was’ ~~relaxed~~',
        'ten nоdеs оf the grарh were closed before the first edge wаs relaxed',
        'ten nodes of &amp;quot;the graph&amp;quot; were closed before the first edge was relaxed',
    ],
)
def test_one_text_however_it_is_written(written):
    assert kernels.gram_words(written) == PLAIN.split()


def test_numbers_of_a_text_stay():
    assert kernels.gram_words('There are\n3 apples and\nfour pears') == (
        'there are 3 apples and four pears'.split()
    )
    assert kernels.gram_words('1. a\n2. b', numbers=False) == ['1', 'a', '2', 'b']
    assert kernels.gram_words('12\n13\n14') == ['12', '13', '14']  # lines of numbers alone


@pytest.mark.parametrize('seed', range(4))
def test_words_are_hashed_as_the_twin_does(monkeypatch, seed):
    data, ends = laid([*random_texts(300, seed)])
    fast, plain = both(monkeypatch, lambda: kernels.word_hashes(data, ends))
    assert same(fast, plain) and len(fast[0]) > 1000
    part = ends[100:201]  # a slice that does not begin at 0
    assert same(*both(monkeypatch, lambda: kernels.word_hashes(data, part)))


@pytest.mark.parametrize(
    'raw',
    [
        b'\xe4\xb8A',
        b'a\xff\xc0\x80b',
        b'a\xed\xa0\x80b',
        b'\xf4\x90\x80\x80x',
        b'a\xf0\x9f\x98',
        b'\xc1\xbf',
        b'\xe0\x80\x80k',
        b'\xf0\x80\x80\x80k',
        b'\xe0\x81\xa1',
        b'\xe0\x83\xa9',
        b'\xf0\x80\x83\xa9',
        b'\xf0\x8e\x81\x88',
        b'\xc3',
        b'x\xf5\x80\x80\x80y',
    ],
)
def test_ill_formed_bytes_separate_words_and_swallow_nothing(monkeypatch, raw):
    parts = [raw, b'tail', raw + b'\xa9']  # what follows must not be read into a cut character
    data, ends = laid(parts)
    fast, plain = both(monkeypatch, lambda: kernels.word_hashes(data, ends))
    assert same(fast, plain) and fast[0][fast[1][1] : fast[1][2]].tolist() == [
        kernels.word_hash('tail')
    ]


def test_room_for_words_is_enough(monkeypatch):
    for text in ['a b c d e f g h', 'a', '图图图', 'a图b图c', 'ก a ข b', 'ｱaｲb']:
        data, ends = laid([text.encode()])
        assert kernels.word_hashes(data, ends)[0].tolist() == [
            kernels.word_hash(word) for word in kernels.gram_words(text)
        ]


@pytest.mark.parametrize('n', [1, 2, 5, 13])
def test_runs_keys_sets_and_similarities_are_the_twins(monkeypatch, n):
    words = kernels.word_hashes(*laid([*random_texts(120, n)]))
    fast, plain = both(monkeypatch, lambda: kernels.gram_hashes(*words, n))
    assert same(fast, plain)
    full = np.flatnonzero(np.diff(fast[1]))
    starts = np.append(fast[1][full], fast[1][-1])
    assert same(*both(monkeypatch, lambda: kernels.band_keys(fast[0], starts, 3, 2)))
    sets, plain = both(monkeypatch, lambda: kernels.distinct_grams(fast[0].copy(), fast[1]))
    assert same(sets, plain)
    left, right = np.array([*combinations(range(40), 2)]).T
    assert same(*both(monkeypatch, lambda: kernels.jaccards(*sets, left, right)))
    index = np.unique(fast[0][::3])
    found, plain = both(
        monkeypatch, lambda: kernels.known_grams(*fast, index, kernels.sieve(index))
    )
    assert same(found, plain) and len(found[0]) >= len(index) > 0


def test_components_are_the_twins(monkeypatch):
    rng = np.random.default_rng(0)
    for n in (1, 5, 200):
        parent = np.arange(n)
        for _ in range(3):
            left, right = rng.integers(0, n, (2, max(1, n // 4)))
            fast, plain = both(monkeypatch, partial(kernels.united, parent, left, right))
            assert same(fast, plain) and (parent[fast] == fast).all() or (fast[fast] == fast).all()
            parent = fast


def test_the_share_of_equal_least_hashes_is_the_jaccard_similarity():
    rng = np.random.default_rng(1)
    for size, shared in ((12, 4), (40, 20), (300, 200)):
        off = []
        for _ in range(150):
            runs = rng.integers(0, 2**63, 2 * size - shared, dtype=np.uint64)
            keys = kernels.band_keys(
                np.concatenate([runs[:size], runs[size - shared :]]),
                np.array([0, size, 2 * size]),
                112,
                1,
            )
            off.append((keys[0] == keys[1]).mean() - shared / (2 * size - shared))
        assert abs(np.mean(off)) < 0.015 and np.std(off) < 0.075, (
            size,
            np.mean(off),
            np.std(off),
        )  # 112 fair coins: a deviation of 0.047 at most for one pair


def test_no_two_hash_functions_of_minhash_are_related():
    a, b = zip(*kernels.factors(112))
    assert (
        len(set(a)) == len(set(b)) == 112
        and all(x % 2 for x in a)
        and max(a + b) < 2**32
        and abs(np.corrcoef(a, b)[0, 1]) < 0.3
    )


def test_a_huge_text_of_one_word_and_of_many(monkeypatch):
    for text in (b'a' * 3_000_000, b'ab ' * 400_000):
        data, ends = laid([text])
        words = kernels.word_hashes(data, ends)
        assert words[0][0] == kernels.word_hash(text.split()[0].decode()) and len(words[0]) == len(
            text.split()
        )
        if len(words[0]) > 1:
            assert len(set(kernels.gram_hashes(*words, 5)[0].tolist())) == 1


def test_batches_cover_a_column_once_however_it_is_made():
    texts = ['', 'one', 'zwei ü', 'x' * 50, '', '五']
    for column in (
        pa.chunked_array([texts]),
        pa.chunked_array([texts[:2], [], texts[2:]], pa.string()),
        pa.chunked_array([pa.array(['no'] + texts + ['no'], pa.large_string())[1:-1]]),
        pa.array(['no'] + texts)[1:],
    ):
        for room in (1, 20, 1000):
            got = [
                bytes(data[a:b]).decode()
                for data, ends in kernels.text_batches(column, room)
                for a, b in zip(ends, ends[1:])
            ]
            assert got == texts
    assert len([*kernels.text_batches(pa.array(['x' * 9] * 10), 30)]) == 4
    with pytest.raises(LabError, match='row 3 has no text'):
        [*kernels.text_batches(pa.chunked_array([['a', 'b'], ['c', None]]))]


def test_without_numba_plain_python_works_and_says_so_once():
    code = (
        "import sys, warnings; sys.modules['numba'] = None\n"
        'import pyarrow as pa\n'
        'from k2lab.corpus.duplicates import drop_near\n'
        "texts = ['one two three four five six', 'One, two three four five SIX',\n"
        " 'other words than those that were']\n"
        'with warnings.catch_warnings(record=True) as caught:\n'
        " warnings.simplefilter('always')\n"
        ' kept = [drop_near(pa.table(dict(text=texts)))[0].num_rows for _ in range(2)]\n'
        'print(kept, [str(w.message)[:23] for w in caught])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == "[2, 2] ['numba is not installed:']", done.stderr


# operators ------------------------------------------------------------------------------------------------------------


def labelled(seed=0, n=300):
    "(texts, {row: row it is a near-copy of}, rows that are changed too much)."
    rng = random.Random(seed)
    texts, near, far = [sentence(rng, rng.randrange(60, 160)) for _ in range(n)], {}, []
    for i in range(0, n, 3):
        words = texts[i].split(' ')
        if i % 2:
            words[len(words) // 2] = 'changedbyus'  # longer than any word here
        else:
            words = words[:-3]
        near[len(texts)] = i
        texts.append(' '.join(words))
    for i in range(1, n, 10):
        words = texts[i].split(' ')
        for j in range(0, len(words), 8):
            words[j] = 'other'
        far.append(len(texts))
        texts.append(' '.join(words))
    return texts, near, far


def runs(text, n=5):
    "The definition: runs of words as Python tuples."
    words = kernels.gram_words(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_exact_copies_are_those_of_the_plain_operator():
    texts = [
        'A graph.',
        'a  GRAPH.',
        '',
        ' ',
        'x',
        'Straße',
        'STRASSE',
        'a\u00a0graph.',
        'x ',
        'A graph',
    ]
    kept, counts = duplicates.drop_copies(pa.table(dict(text=texts, n=range(len(texts)))))
    assert (
        kept.to_pylist()
        == operators.exact_dedup([dict(text=t, n=i) for i, t in enumerate(texts)])[0]
    )
    assert conserved([counts]) == '' and counts['clusters'] == {'2': 2, '3': 1}


def test_exact_copies_without_xxhash(monkeypatch):
    table = pa.table(dict(text=['a', 'A ', 'b']))
    want = duplicates.drop_copies(table)
    monkeypatch.setitem(sys.modules, 'xxhash', None)
    duplicates.digest16.cache_clear()
    try:
        assert (
            duplicates.drop_copies(table) == want
            and next(duplicates.fingerprints(table)) == hashlib.sha256(b'a').digest()[:16]
        )
    finally:
        duplicates.digest16.cache_clear()


def test_labelled_near_copies_go_and_what_is_changed_too_much_stays():
    texts, near, far = labelled()
    table = pa.table(dict(text=texts))
    owner = duplicates.near_owners(table['text'])
    true = {
        row
        for row, source in near.items()
        if kernels.jaccard(runs(texts[row]), runs(texts[source])) >= 0.8
    }
    assert len(true) > 90 and len(
        {row for row in true if owner[row] == owner[near[row]]}
    ) >= 0.95 * len(true)  # 14 x 8 finds .92 of those at .8, all from .9 on
    assert all(owner[row] == row for row in far)
    for row, stays in enumerate(owner):
        assert owner[stays] == stays  # each cluster has one survivor
        assert row == stays or kernels.jaccard(runs(texts[row]), runs(texts[stays])) >= 0.7
        assert len(texts[row].encode()) <= len(texts[stays].encode())  # and it is the longest
    kept, counts = duplicates.drop_near(table)
    assert conserved([counts]) == '' and kept.num_rows == len(set(owner.tolist()))
    assert sum(int(size) * k for size, k in counts['clusters'].items()) == sum(
        (owner == stays).sum() for stays in set(owner.tolist()) if (owner == stays).sum() > 1
    )


def test_of_equally_long_copies_the_first_stays_and_of_others_the_longest():
    text = sentence(random.Random(1), 40)
    assert duplicates.near_owners(
        pa.chunked_array([[text, text.upper(), text + ' x', 'else', text.title()]])
    ).tolist() == [2, 2, 2, 3, 2]
    assert duplicates.near_owners(
        pa.chunked_array([['else', text.upper(), text, text.title()]])
    ).tolist() == [0, 1, 1, 1]


def test_a_chain_is_not_one_cluster():
    rng = random.Random(2)
    parts = [sentence(rng, 12) for _ in range(60)]
    chain = pa.table(dict(text=[' '.join(parts[i : i + 30]) for i in range(31)]))
    assert duplicates.drop_near(chain, least=0)[0].num_rows == 1
    owner = duplicates.near_owners(chain['text'])
    assert 3 <= len(set(owner.tolist())) <= 12
    assert all(
        kernels.jaccard(runs(chain['text'][i].as_py()), runs(chain['text'][int(j)].as_py())) >= 0.7
        for i, j in enumerate(owner)
    )


def test_strangers_that_share_a_key_are_not_joined(monkeypatch):
    texts = pa.chunked_array([[sentence(random.Random(i), 30) for i in range(5)]])
    monkeypatch.setattr(
        duplicates,
        'band_keys',
        lambda hashes, ends, bands, rows: np.zeros((len(ends) - 1, bands), np.uint64),
    )
    assert duplicates.near_owners(texts).tolist() == [0, 1, 2, 3, 4]
    assert len(set(duplicates.near_owners(texts, least=0).tolist())) == 1


def test_a_bucket_larger_than_the_reach_is_joined_through_neighbours():
    text = sentence(random.Random(3), 50)
    copies = [text + f' end{i}' for i in range(3 * duplicates.REACH)]
    assert len(set(duplicates.near_owners(pa.chunked_array([copies])).tolist())) == 1


def test_texts_too_short_for_a_run_are_left_to_exact_deduplication():
    table = pa.table(dict(text=['2 + 3 = 5', '2 - 3 = 5', '...', '...', '']))
    assert duplicates.drop_near(table)[0].num_rows == 5


def test_a_cluster_that_is_too_large_is_named():
    rng = random.Random(4)
    page = 'Calendar of the month ' + sentence(rng, 60)
    texts = [f'{page} {i}' for i in range(9)] + [sentence(rng, 30) for _ in range(391)]
    with pytest.raises(LabError) as e:
        duplicates.drop_near(pa.table(dict(text=texts)), floor=400)
    assert (
        "the cluster of row 0 ('Calendar of the month" in str(e.value)
        and 'holds 9 of 400 rows' in str(e.value)
        and 'max_cluster_share=' in str(e.value)
    )
    allowed = float(str(e.value).rsplit('max_cluster_share=', 1)[1])
    assert (
        duplicates.drop_near(pa.table(dict(text=texts)), floor=400, max_share=allowed)[0].num_rows
        == 392
    )  # what the message says works
    assert duplicates.drop_near(pa.table(dict(text=texts)))[1]['clusters'] == {
        '9': 1
    }  # a small corpus is not judged


@pytest.mark.parametrize(
    'script',
    [
        '最短路径是图论中的一个经典问题它要求找出两个节点之间权重之和最小的路径并给出算法',
        'เส้นทางที่สั้นที่สุดในกราฟคือเส้นทางที่มีน้ำหนักรวมน้อยที่สุดระหว่างสองจุดยอดของกราฟนั้น',
        'グラフ理論における最短経路問題とは重みの和が最小となる経路を求める問題である',
    ],
)
def test_scripts_without_spaces(script):
    other = ''.join(reversed(script))
    table = pa.table(dict(text=[script, script + '。', script[:4] + '、' + script[4:], other]))
    assert (
        duplicates.near_owners(table['text'])[3] == 3
        and duplicates.drop_near(table)[0].num_rows == 2
    )
    kept, counts = duplicates.drop_contaminated(
        pa.table(dict(text=['x y z ' + script + ' end', other, script[: len(script) // 2]])),
        [script],
    )
    assert kept['text'].to_pylist() == [other]


@pytest.mark.parametrize('texts', [[], [''], ['', 'a'], ['...']])
def test_tables_with_nothing_in_them(texts):
    table = pa.table(dict(text=pa.array(texts, pa.string())))
    for operator in (
        duplicates.drop_copies,
        duplicates.drop_near,
        lambda t: duplicates.drop_contaminated(t, ['one two three four five six']),
        lambda t: duplicates.drop_contaminated(t, []),
        lambda t: duplicates.drop_contaminated(t, ['', '?']),
    ):
        kept, counts = operator(table)
        assert kept.equals(table) and conserved([counts]) == '' and counts['rows_in'] == len(texts)
    kept, _ = duplicates.drop_near(pa.table(dict(text=pa.chunked_array([], pa.string()))))
    assert kept.num_rows == 0


def test_one_digest_for_a_table_in_one_piece_in_parts_and_in_another_order(monkeypatch):
    texts, _, _ = labelled(5)
    texts = list(dict.fromkeys(texts + [t + ' ' + t.upper() for t in texts[:20]]))
    table = pa.table(dict(text=texts, n=range(len(texts))))
    exam = [' '.join(t.split()[:40]) for t in texts[:9]]
    for operator in (
        duplicates.drop_copies,
        duplicates.drop_near,
        lambda t: duplicates.drop_contaminated(t, exam),
    ):
        want = operator(table)
        for step in (1, 7, 100):
            got = operator(
                pa.concat_tables([table.slice(i, step) for i in range(0, len(table), step)])
            )
            assert digest(got[0]) == digest(want[0]) and got[1] == want[1]
        with monkeypatch.context() as m:
            m.setattr(kernels.text_batches, '__defaults__', (500,))  # batches of a text or two
            assert digest(operator(table)[0]) == digest(want[0])
        order = list(range(len(texts)))
        random.Random(6).shuffle(order)
        shuffled = operator(table.take(order))
        assert shuffled[1]['rows_out'] == want[1]['rows_out']
        assert digest(shuffled[0].sort_by('text')) == digest(
            want[0].sort_by('text')
        )  # no two near-copies are equally long here


# contamination --------------------------------------------------------------------------------------------------------

ITEM = ' '.join(f'word{i}' for i in range(40))


@pytest.mark.parametrize(
    'leak,gone',
    [
        (ITEM, True),
        (ITEM.upper(), True),
        (ITEM.replace(' ', ',\n'), True),
        (' '.join(ITEM.split()[5:31]), True),
        (' '.join(ITEM.split()[5:18]), False),
        (' '.join(ITEM.split()[::-1]), False),
    ],
)
def test_an_evaluation_text_is_found_verbatim_upper_cased_spaced_and_in_part(leak, gone):
    texts = [f'before it {leak} after it', 'an innocent page with other words in it']
    kept, counts = duplicates.drop_contaminated(
        pa.table(dict(text=texts)),
        {'mmlu': ['something else that nobody has ever read'], 'gsm': [ITEM]},
    )
    assert kept['text'].to_pylist() == texts[gone:] and conserved([counts]) == ''
    assert counts['contaminated'] == ({'gsm': 1} if gone else {})


def test_how_much_was_covered_is_told():
    texts = [ITEM, ' '.join(ITEM.split()[:26])]  # 28 runs, and 14 of them
    assert duplicates.drop_contaminated(pa.table(dict(text=texts)), [ITEM])[1]['covered'] == {
        '0.5': 1,
        '1.0': 1,
    }


@pytest.mark.parametrize('seed', range(6))
def test_decisions_are_those_of_the_plain_operator(seed):
    rng = random.Random(seed)
    vocabulary = [w.decode('utf-8', 'replace') for w in random_texts(60, seed) if w][:25] + [
        'the',
        'graph',
        'has',
        'nodes',
        '图',
        'ΟΔΟΣ',
    ]
    boil = ' '.join(rng.choices(vocabulary, k=15))
    exam = [
        ' '.join(rng.choices(vocabulary, k=rng.choice([1, 4, 5, 9, 13, 14, 40]))) for _ in range(25)
    ] + [boil, f'{sentence(rng, 20)} {boil}']
    texts = []
    for _ in range(200):
        words = rng.choices(vocabulary, k=rng.randrange(2, 30))
        if rng.random() < 0.4:
            words[1:1] = rng.choice(exam).split(' ')[: rng.randrange(1, 45)]
        if rng.random() < 0.1:
            words.append(boil)
        texts.append(' '.join(words))
    n = rng.choice([5, 8, 13])
    for common, share in ((10, 0.2), (2, 0.5), (1000, 0.01)):
        plain, counts = operators.decontaminate(
            [dict(text=t, n=i) for i, t in enumerate(texts)], exam, n, common, share
        )
        kept, ours = duplicates.drop_contaminated(
            pa.table(dict(text=texts, n=range(200))), exam, n, common, share
        )
        assert (
            kept['n'].to_pylist() == [row['n'] for row in plain]
            and ours['removed'] == counts['removed']
        ), (n, common, share)
    assert 0 < len(plain) < 200


NOTICE = 'This file is part of the library and may be copied under the terms of the three clause BSD licence.'


def test_boilerplate_is_common_and_stays():
    texts = [f'Page {i}. {NOTICE}' for i in range(12)] + [ITEM]
    exam = [f'{NOTICE} {" ".join(ITEM.split()[:20])[::-1]}', ITEM]  # half of it is the notice
    assert duplicates.drop_contaminated(pa.table(dict(text=texts)), exam)[0].num_rows == 12


def numbered_words(prefix, n):
    return ' '.join(f'{prefix}{i}' for i in range(n))


@pytest.mark.parametrize('quoted', [1, 2, 10, 11, 12, 100, 500, 10_000])
@pytest.mark.parametrize('part', [1.0, 0.8])
def test_an_item_is_removed_however_often_it_is_quoted(quoted, part):
    items = [numbered_words(f'w{k}x', 60) for k in range(3)]
    words = items[1].split()
    quote = ' '.join(words[: round(part * len(words))])
    texts = [f'Page {i} begins so. {quote} And so on, {i}.' for i in range(quoted)]
    clean = [f'{numbered_words(f"c{i}y", 30)} {NOTICE}' for i in range(200)]
    exam = [*items, f'{items[2]} {NOTICE}']  # the notice is a quarter of the last one
    kept, counts = duplicates.drop_contaminated(pa.table(dict(text=texts + clean)), dict(exam=exam))
    assert kept['text'].to_pylist() == clean and counts['contaminated'] == {'exam': quoted}


def test_26_words_of_a_long_item_are_enough_and_25_are_not():
    long = numbered_words('w', 300)
    texts = [
        ' '.join(['before', *long.split()[k : k + n], 'after']) for k, n in ((70, 26), (9, 25))
    ]
    assert duplicates.drop_contaminated(pa.table(dict(text=texts)), [long])[0].num_rows == 1
    page = duplicates.run_index(dict(pages=[long]), pages=['pages'])
    assert duplicates.drop_contaminated(pa.table(dict(text=texts)), page)[0].num_rows == 2


@pytest.mark.parametrize('words', range(5, 20))
def test_four_fifths_of_a_short_item_are_enough(words):
    item = numbered_words('w', words)
    part = ' '.join(item.split()[: words if words < 10 else -(-4 * words // 5)])
    texts = [f'{i} says: {part}. It is so.' for i in range(30)] + ['something else']
    kept, _ = duplicates.drop_contaminated(pa.table(dict(text=texts)), [item])
    assert kept['text'].to_pylist() == ['something else']


def test_a_held_out_page_in_many_rows_gives_way_and_a_question_does_not():
    page = numbered_words('w', 60)
    for quoted, left in ((10, 1), (11, 12)):
        table = pa.table(dict(text=[f'{i}: {page}' for i in range(quoted)] + ['else']))
        sets = dict(q=['a b c d e f'], pages=[page])
        index = duplicates.run_index(sets, pages=['pages'], yielding=['pages'])
        kept, counts = duplicates.drop_contaminated(table, index)
        assert kept.num_rows == left and counts.get('crowded', []) == ([1] if left > 1 else [])
        assert duplicates.drop_contaminated(table, [page])[0].num_rows == 1


def test_line_numbers_of_the_item_and_of_the_page():
    lines = [numbered_words(f'l{i}x', 9) for i in range(6)]
    numbered = '\n'.join(f'{i}. {line}' for i, line in enumerate(lines, 1))
    forms = ['\n'.join(lines), numbered, numbered.replace('\n', ' '), f'> {numbered}']
    for item, hosts in ((0, (0, 1, 3)), (1, (0, 1, 2, 3)), (2, (1, 2, 3))):
        for host in hosts:
            table = pa.table(dict(text=[f'So it says:\n\n{forms[host]}\n\nand ends.']))
            kept, _ = duplicates.drop_contaminated(table, [forms[item]])
            assert not kept.num_rows, (item, host)


def test_texts_too_short_to_search_for_are_counted():
    index = duplicates.run_index(dict(a=['', 'one two', 'one two three four five'], b=['?']))
    assert index.short == 3 and [index.set_of(i) for i in range(4)] == ['a', 'a', 'a', 'b']


def test_removing_what_is_removed_removes_nothing_more():
    texts, near, _ = labelled(7)
    table = pa.table(dict(text=texts))
    for operator in (
        duplicates.drop_copies,
        duplicates.drop_near,
        lambda t: duplicates.drop_contaminated(t, [texts[0], texts[9]]),
    ):
        once, _ = operator(table)
        assert operator(once)[0].equals(once)


# ---- spelling --------------------

ODD = [
    'a',
    'b',
    ' ',
    '  ',
    '\t',
    '\n',
    '\r',
    '\r\n',
    '\x00',
    '\x0c',
    '\x1f',
    '\x7f',
    '\ufeff',
    '\u00a0',
    '\u3000',
    '\u2028',
    '\x85',
    'e\u0301',
    '\u0301',
    '\u00e9',
    '\u4f60',
    '\U0001f469',
    '\n\n\n',
    ' \n',
    '\u212a',
    '\u2000',
    'x y',
]


def test_the_column_is_spelled_as_each_text_is(monkeypatch):
    rng = random.Random(3)
    texts = [''.join(rng.choice(ODD) for _ in range(rng.randrange(14))) for _ in range(30_000)]
    column = pa.chunked_array([texts[:7000], texts[7000:]])
    fast, plain = both(monkeypatch, lambda: operators.normal_column(column).to_pylist())
    wrong = [
        (text, got, want)
        for text, got, want in zip(texts, fast, map(operators.normal, texts))
        if got != want
    ]
    assert not wrong and fast == plain


def test_normal_by_hand():
    assert operators.normal('\ufeffa \t\r\n\x00b\r\rc \n \n\n\n d\u00a0') == 'a\nb\n\nc\n\n d'
    long = 'x' + ' ' * 300_000 + 'y'  # the time for this must not grow with the square of it
    assert operators.normal(long) == long and operators.normal(long + ' ' * 300_000 + '\n') == long


def test_the_kernel_folds_as_the_definition_does(monkeypatch):
    rng = random.Random(4)
    pool = [*ODD, *'ABCxyz', '\u00c4', '\u03a3', '\x1c', '\x1d', '\x0b', '\u0130']
    texts = [''.join(rng.choice(pool) for _ in range(rng.randrange(20))) for _ in range(20_000)] + [
        '',
        ' ',
        'A',
    ]
    fast, plain = both(monkeypatch, lambda: kernels.folded(*kernels.packed(texts)))
    wrong = [
        (text, got) for text, got in zip(texts, fast) if got != kernels.one_spelling(text).encode()
    ]
    assert not wrong and fast == plain
