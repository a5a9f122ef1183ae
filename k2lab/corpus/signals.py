"""Compiled kernels that compute the counts of quality rules, each with a twin in plain Python
that defines the result.

Texts come as in `k2lab.corpus.kernels`: `data`, the bytes of all texts (valid UTF-8), and `ends`,
n+1 offsets. All counts are whole numbers, so that kernel and twin can be compared exactly;
`k2lab.corpus.quality` turns them into shares.
A word is what stands between white space: the definition of the Gopher paper, under which code and
formulas keep their words whole. A character of a script that is written without spaces is a word,
with the punctuation that follows it."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from k2lab.corpus.kernels import (
    BASE,
    CODE_POINTS,
    PRIME,
    SEED,
    STIR,
    UNSPACED,
    each,
    machine,
    word_hash,
)

SPACE, ALPHA, ALNUM, ALONE, TERMINAL, ENDER = 1, 2, 4, 8, 16, 32  # what a character is, as bits
ENDERS = '.!?…。！？．؟۔।'  # what ends a sentence
TERMINALS = ENDERS + '"\'”’»」』'  # what ends a line of prose
STOP_WORDS = ('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with')  # Gopher's
PIECE = re.compile(rf'[{UNSPACED}](?:[^\w{UNSPACED}]|_)*|[^{UNSPACED}]+')
SHORT = 30  # characters of a short line (FineWeb)
# words of a run whose most frequent one, and all of whose copies, are counted (Gopher)
TOPS, COPIES = (2, 3, 4), (5, 6, 7, 8, 9, 10)
WORD_COUNTS = (
    'characters',
    'words',
    'alone',
    'letters',
    'hashes',
    'ellipses',
    'alpha_words',
    'stop_words',
    'newlines',
    'curly',
)
LINE_COUNTS = (
    'lines',
    'bullets',
    'ellipsis_lines',
    'full_lines',
    'short_lines',
    'dup_lines',
    'dup_line_characters',
    'paragraphs',
    'dup_paragraphs',
    'dup_paragraph_characters',
)
RUN_COUNTS = (*(f'top_{n}' for n in TOPS), *(f'dup_{n}' for n in COPIES))
READ = 1 << 40  # a mark on the count of a run that was read and not passed over
U: Any = None  # numpy.uint64, when a kernel is compiled


# ---- plain Python: the definitions --------------------


def words(text: str) -> list:
    "The words of a text: what stands between white space, characters of unspaced scripts apart."
    return [piece for token in text.split() for piece in PIECE.findall(token)]


def is_alone(word: str) -> bool:
    "Whether a word is a character of a script that is written without spaces."
    return bool(re.match(f'[{UNSPACED}]', word))


def word_counts(text: str) -> list:
    "`WORD_COUNTS` of a text: `letters` are the characters of words that are not alone, an ellipsis is '...' or '…'."
    tokens, single = words(text), [is_alone(word) for word in words(text)]
    return [
        len(text),
        len(tokens),
        sum(single),
        sum(len(word) for word, alone in zip(tokens, single) if not alone),
        text.count('#'),
        text.count('...') + text.count('…'),
        sum(any(map(str.isalpha, word)) for word in tokens),
        len(set(STOP_WORDS) & set(tokens)),
        text.count('\n'),
        text.count('{'),
    ]


def copies(parts: list) -> tuple:
    "(number, characters) of the parts that have occurred before."
    seen = Counter(parts)
    return sum(n - 1 for n in seen.values()), sum((n - 1) * len(part) for part, n in seen.items())


def paragraph_lines(text: str) -> list:
    "The paragraphs of a text, each a list of its lines without white space at their ends; blank lines part them."
    paragraphs = [[]]
    for line in map(str.strip, text.split('\n')):
        if line:
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return [lines for lines in paragraphs if lines]


def line_counts(text: str) -> list:
    "`LINE_COUNTS` of a text; blank lines are not counted."
    paragraphs = paragraph_lines(text)
    lines = [line for part in paragraphs for line in part]
    return [
        len(lines),
        sum(line[0] in '-•' for line in lines),
        sum(line.endswith(('...', '…')) for line in lines),
        sum(line[-1] in TERMINALS for line in lines),
        sum(len(line) <= SHORT for line in lines),
        *copies(lines),
        len(paragraphs),
        *copies(['\n'.join(part) for part in paragraphs]),
    ]


def top_run(words: list, n: int) -> int:
    """Characters in all places of the most frequent run of n words, spaces between them counted.

    Of equally frequent ones the longest; 0 when none occurs twice."""
    seen = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(seen.values(), default=0)
    if most < 2:
        return 0
    return most * max(sum(map(len, run)) + n - 1 for run, k in seen.items() if k == most)


def copied_runs(words: list, n: int) -> int:
    """Characters of the runs of n words that have occurred before, read from left to right.

    A run that is counted is passed over."""
    seen, total, i = set(), 0, 0
    while i <= len(words) - n:
        run = tuple(words[i : i + n])
        if run in seen:
            total, i = total + sum(map(len, run)), i + n
        else:
            i = i + 1
        seen.add(run)
    return total


def run_counts(text: str) -> list:
    "`RUN_COUNTS` of a text."
    tokens = words(text)
    return [top_run(tokens, n) for n in TOPS] + [copied_runs(tokens, n) for n in COPIES]


def facts_of(line: str) -> tuple:
    "`line_facts` of one line."
    tokens = line.split()
    return (
        len(line),
        len(tokens),
        max(map(len, tokens)),
        1 + sum(token[-1] in ENDERS for token in tokens[:-1]),
        line[-1] in '.?!"\'',
        line.endswith('...'),
    )


def line_facts(text: str) -> list[tuple]:
    """Six facts of each line that is not blank.

    (characters, words, longest word, sentences, whether it ends like a sentence, whether it ends in
    '...'). A sentence ends where a word ends in one of `ENDERS`, and at the line's end."""
    return [facts_of(line) for part in paragraph_lines(text) for line in part]


def phrase_places(data: bytes, phrases: list) -> list:
    """(place, number of the phrase) of all places where a phrase begins.

    Phrases are in lower case; letters A-Z of the text match in either case."""
    low = data.lower()
    return sorted(
        (i, k)
        for k, phrase in enumerate(phrases)
        for i in (m.start() for m in re.finditer(b'(?=%s)' % re.escape(phrase), low))
    )


# ---- kernels --------------------


@cache
def char_classes():
    "The bits of `char_class` for each code point, as uint8."
    import numpy as np

    return np.array([char_class(chr(c)) for c in range(CODE_POINTS)], np.uint8)


def char_class(c: str) -> int:
    "The classes of a character, as bits."
    return (
        SPACE * c.isspace()
        | ALPHA * c.isalpha()
        | ALNUM * c.isalnum()
        | ALONE * is_alone(c)
        | TERMINAL * (c in TERMINALS)
        | ENDER * (c in ENDERS)
    )


def compiled(kernel: Callable) -> Any:
    "A kernel as machine code, or None without numba."
    global U
    fast = machine(kernel)
    if fast:
        from numpy import uint64 as U
    return fast


def _words(data, ends, table, stops, hashes, sizes, word_ends, out):
    k = 0
    for d in range(len(out)):
        i, stop, row = ends[d], ends[d + 1], out[d]
        size, alone, alpha, dots, seen, h = 0, 0, 0, 0, 0, U(0)
        while i <= stop:
            c, width = int(data[i]) if i < stop else 32, 1
            if c >= 0x80:
                width = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
                c = c & (0xFF >> (width + 1))
                for j in range(i + 1, min(i + width, stop)):
                    c = c << 6 | (data[j] & 0x3F)
            f = table[c] if c < len(table) else 0
            row[0] += i < stop
            # white space or a character of its own ends a word; a letter ends one that was alone
            if size and (f & 9 or (alone and f & 4)):
                h = (h ^ h >> U(29)) * U(STIR)
                hashes[k], sizes[k] = h ^ h >> U(32), size
                row[1] += 1
                row[2] += alone
                row[3] += 0 if alone else size
                row[6] += alpha
                if 2 <= size <= 4:
                    for s in range(len(stops)):
                        if stops[s] == hashes[k]:
                            seen |= 1 << s
                k, size = k + 1, 0
            if not f & 1:
                if size == 0:
                    h, alone, alpha = U(SEED), f >> 3 & 1, 0
                h = (h ^ U(c)) * U(PRIME)
                size, alpha = size + 1, alpha | (f >> 1 & 1)
            dots = dots + 1 if c == 46 else 0
            if dots == 3 or c == 0x2026:
                row[5], dots = row[5] + 1, 0
            row[4] += c == 35
            row[8] += c == 10
            row[9] += c == 123
            i += width
        while seen:
            row[7], seen = row[7] + (seen & 1), seen >> 1
        word_ends[d + 1] = k
    return k


def _lines(data, ends, table, hashes, spans, line_ends, facts):
    k = 0
    for d in range(len(ends) - 1):
        i, stop, start, size, known, h = ends[d], ends[d + 1], -1, 0, 0, U(SEED)
        word, last, dots, pending = 0, 0, 0, 0
        while i <= stop:
            c, width = int(data[i]) if i < stop else 10, 1
            if c >= 0x80:
                width = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
                c = c & (0xFF >> (width + 1))
                for j in range(i + 1, min(i + width, stop)):
                    c = c << 6 | (data[j] & 0x3F)
            f = table[c] if c < len(table) else 0
            if f & 1:
                if word:
                    facts[k, 2], word = max(facts[k, 2], word), 0
                    pending = table[last] >> 5 & 1 if last < len(table) else 0
                if c == 10:
                    spans[k, 0], spans[k, 1] = start, known
                    facts[k, 6] = last
                    k, start, size, h, last, pending = k + 1, -1, 0, U(SEED), 0, 0
                    for q in range(7):
                        facts[k, q] = 0
            else:
                if start < 0:
                    start, spans[k, 2] = i, c
                if word == 0:
                    facts[k, 1] += 1
                    facts[k, 3] += int(pending or facts[k, 1] == 1)
                dots = dots + 1 if c == 46 and last == 46 and word else int(c == 46)
                word, last, known = word + 1, c, i + width
            if start >= 0:
                h, size = (h ^ U(c)) * U(PRIME), size + 1
                if not f & 1:
                    facts[k, 0], facts[k, 5], hashes[k] = size, dots >= 3, h
            i += width
        line_ends[d + 1] = k
    return k


def _copies(hashes, sizes, ends, keys, marks, out):
    stamp = 0
    for d in range(len(ends) - 1):
        mask, stamp = 15, stamp + 1
        while mask < 2 * (ends[d + 1] - ends[d]):
            mask = 2 * mask + 1
        for k in range(ends[d], ends[d + 1]):
            if sizes[k] == 0:
                continue  # a blank line
            j = (hashes[k] ^ hashes[k] >> U(31)) & U(mask)
            while marks[j] == stamp and keys[j] != hashes[k]:
                j = (j + U(1)) & U(mask)
            if marks[j] == stamp:
                out[d, 0], out[d, 1] = out[d, 0] + 1, out[d, 1] + sizes[k]
            marks[j], keys[j] = stamp, hashes[k]


def _runs(hashes, sizes, ends, keys, marks, counts, places, slots, grams, out):
    stamp = 0
    for d in range(len(ends) - 1):
        first, stop = ends[d], ends[d + 1]
        words, size, n, mask = hashes[first:stop], sizes[first:stop], stop - first, 15
        while mask < 2 * n:
            mask = 2 * mask + 1
        for p in range(n):
            places[p], grams[p] = p, (words[p] ^ words[p] >> U(29)) * U(BASE)
        left = n
        for g in range(2, 11):  # a run occurs twice only if the shorter run that begins it does
            stamp, kept, most, longest, total, free = stamp + 1, 0, 1, 0, 0, 0
            for q in range(left):
                p = places[q]
                if p + g > n:
                    continue
                h = (grams[p] + words[p + g - 1]) * U(BASE)
                grams[p] = h ^ h >> U(29)
                j = (grams[p] ^ grams[p] >> U(31)) & U(mask)
                while marks[j] == stamp and keys[j] != grams[p]:
                    j = (j + U(1)) & U(mask)
                if marks[j] != stamp:
                    marks[j], keys[j], counts[j] = stamp, grams[p], 0
                if g >= 5 and p >= free:
                    if counts[j] >= READ:
                        for e in range(p, p + g):
                            total += size[e]
                        free = p + g
                    counts[j] |= READ
                counts[j] += 1
                places[kept], slots[kept], kept = p, j, kept + 1
            left = 0
            for q in range(kept):
                many, p = counts[slots[q]] & (READ - 1), places[q]
                if many < 2:
                    continue
                if g < 5 and many >= most:
                    length = g - 1
                    for e in range(p, p + g):
                        length += size[e]
                    most, longest = many, max(longest, length) if many == most else length
                places[left], left = p, left + 1
            out[d, g - 2] = (most * longest if most > 1 else 0) if g < 5 else total
            if left == 0:
                break


def _paragraphs(hashes, sizes, line_ends, out, out_sizes, out_ends):
    k = 0
    for d in range(len(line_ends) - 1):
        inside = False
        for q in range(line_ends[d], line_ends[d + 1]):
            if sizes[q] and not inside:
                out[k], out_sizes[k] = U(SEED), -1
            if sizes[q]:
                out[k], out_sizes[k] = (out[k] ^ hashes[q]) * U(BASE), out_sizes[k] + 1 + sizes[q]
            k += inside and sizes[q] == 0
            inside = sizes[q] > 0
        k += inside
        out_ends[d + 1] = k
    return k


def _phrases(data, phrases, starts, first, places, which):
    k = 0
    for i in range(len(data)):
        if not first[data[i]]:
            continue
        for p in range(len(starts) - 1):
            n, j = starts[p + 1] - starts[p], 0
            while j < n and i + j < len(data):
                c = data[i + j]
                if (c + 32 if 65 <= c <= 90 else c) != phrases[starts[p] + j]:
                    break
                j += 1
            if j == n and k < len(places):
                places[k], which[k] = i, p
            k += j == n
    return k


# ---- tables of counts --------------------


def table_size(ends) -> int:
    "Slots of a hash table that holds the parts of any one text, at most half full."
    import numpy as np

    return max(16, 1 << int(2 * np.diff(ends).max(initial=1)).bit_length())


def word_arrays(data, ends) -> tuple:
    "(hashes, lengths, ends of the words of texts, counts (texts, 10) as `WORD_COUNTS`)."
    import numpy as np

    room = (int(ends[-1] - ends[0]) + len(ends)) // 2 + 2
    hashes, sizes = np.empty(room, np.uint64), np.empty(room, np.int32)
    word_ends = np.zeros(len(ends), np.int64)
    out = np.zeros((len(ends) - 1, len(WORD_COUNTS)), np.int64)
    stops = np.array([word_hash(word) for word in STOP_WORDS], np.uint64)
    k = compiled(_words)(data, ends, char_classes(), stops, hashes, sizes, word_ends, out)
    return hashes[:k], sizes[:k], word_ends, out


def line_arrays(data, ends) -> tuple:
    """(hashes, spans, ends, facts) of all lines of texts.

    Spans are (first byte, end, first character), facts are those of `line_facts` with the last
    character; 0 characters for a blank line."""
    import numpy as np

    room = int((data[ends[0] : ends[-1]] == 10).sum()) + len(ends)
    hashes, spans = np.zeros(room, np.uint64), np.empty((room, 3), np.int64)
    line_ends, facts = np.zeros(len(ends), np.int64), np.zeros((room, 7), np.int32)
    k = compiled(_lines)(data, ends, char_classes(), hashes, spans, line_ends, facts)
    return hashes[:k], spans[:k], line_ends, facts[:k]


def counted_copies(hashes, sizes, ends):
    "`copies` of the parts of each text, (texts, 2)."
    import numpy as np

    room, out = table_size(ends), np.zeros((len(ends) - 1, 2), np.int64)
    compiled(_copies)(hashes, sizes, ends, np.empty(room, np.uint64), np.zeros(room, np.int32), out)
    return out


def line_marks(spans, facts):
    "Whether each line is not blank, a bullet, cut by an ellipsis, ended like prose, short: booleans (lines, 5)."
    import numpy as np

    size, first, last = facts[:, 0], spans[:, 2], facts[:, 6]
    terminal = char_classes()[np.minimum(last, CODE_POINTS - 1)] & TERMINAL > 0
    bullet = np.isin(first, [ord(c) for c in '-•'])
    dotted = (facts[:, 5] > 0) | (last == ord('…'))
    every = np.ones(len(size), bool)
    marks = np.stack([every, bullet, dotted, terminal, size <= SHORT], 1)
    return marks & (size > 0)[:, None]


def paragraph_arrays(hashes, sizes, line_ends) -> tuple:
    "(hashes, characters, ends) of the paragraphs of texts, from their lines."
    import numpy as np

    room = len(hashes) + 1
    parts, part_sizes = np.empty(room, np.uint64), np.empty(room, np.int32)
    part_ends = np.zeros(len(line_ends), np.int64)
    compiled(_paragraphs)(hashes, sizes, line_ends, parts, part_sizes, part_ends)
    return parts, part_sizes, part_ends


def counted_lines(data, ends):
    "`line_counts` of texts, (texts, 10)."
    import numpy as np

    hashes, spans, line_ends, facts = line_arrays(data, ends)
    sizes, marks = facts[:, 0].copy(), line_marks(spans, facts).astype(np.int64)
    parts, part_sizes, part_ends = paragraph_arrays(hashes, sizes, line_ends)
    columns = [
        np.add.reduceat(marks, line_ends[:-1]),
        counted_copies(hashes, sizes, line_ends),
        np.diff(part_ends)[:, None],
        counted_copies(parts, part_sizes, part_ends),
    ]
    return np.concatenate(columns, 1)


def counted_runs(hashes, sizes, ends):
    "`run_counts` of texts by their words, (texts, 9)."
    import numpy as np

    room, most = table_size(ends), int(np.diff(ends).max(initial=1))
    keys, marks = np.empty(room, np.uint64), np.zeros(room, np.int32)
    counts, grams = np.empty(room, np.int64), np.empty(most, np.uint64)
    places, slots = np.empty(most, np.int64), np.empty(most, np.int64)
    out = np.zeros((len(ends) - 1, len(RUN_COUNTS)), np.int64)
    compiled(_runs)(hashes, sizes, ends, keys, marks, counts, places, slots, grams, out)
    return out


def count_table(data, ends):
    "All counts of at least one text, (texts, 29); by the kernels, or in plain Python without numba."
    import numpy as np

    if not compiled(_words):
        texts = map(bytes.decode, each(data, ends))
        rows = [word_counts(text) + line_counts(text) + run_counts(text) for text in texts]
        return np.array(rows, np.int64)
    hashes, sizes, word_ends, by_words = word_arrays(data, ends)
    by_runs = counted_runs(hashes, sizes, word_ends)
    return np.concatenate([by_words, counted_lines(data, ends), by_runs], 1)


def counts(data, ends) -> dict:
    "{name: int64 of each text} of all `WORD_COUNTS`, `LINE_COUNTS` and `RUN_COUNTS`."
    import numpy as np

    names = WORD_COUNTS + LINE_COUNTS + RUN_COUNTS
    empty = len(ends) == 1
    table = np.zeros((0, len(names)), np.int64) if empty else count_table(data, ends)
    return dict(zip(names, table.T))


def phrases_in(data, phrases: list) -> tuple:
    "(places, numbers of the phrases) where a phrase begins: `phrase_places`."
    import numpy as np

    if not compiled(_phrases):
        return tuple(np.array(phrase_places(bytes(data), phrases), np.int64).reshape(-1, 2).T)
    first = np.zeros(256, bool)
    for phrase in phrases:
        first[[phrase[0], ord(chr(phrase[0]).upper())]] = True
    starts = np.cumsum([0] + [len(phrase) for phrase in phrases])
    flat, room = np.frombuffer(b''.join(phrases), np.uint8), 1024
    while True:
        places, which = np.empty(room, np.int64), np.empty(room, np.int64)
        k = compiled(_phrases)(data, flat, starts, first, places, which)
        if k <= room:
            return places[:k], which[:k]
        room = k


def line_spans(text: bytes) -> list:
    "(first byte, end) of the lines that are not blank, without white space at their ends."
    out, at = [], 0
    for line in text.split(b'\n'):
        start = at + len(line) - len(line.decode().lstrip().encode())
        if size := len(line.decode().strip().encode()):
            out.append((start, start + size))
        at += len(line) + 1
    return out


def line_table(data, ends) -> tuple:
    "(number of the text, first byte, end, `line_facts`) of all lines of texts that are not blank."
    import numpy as np

    if not compiled(_lines):
        return plain_line_table(data, ends)
    _, spans, line_ends, facts = line_arrays(data, ends)
    there = facts[:, 0] > 0
    facts, last = facts[there].astype(np.int64), facts[there, 6]
    facts[:, 4] = np.isin(last, [ord(c) for c in '.?!"\''])
    texts = np.repeat(np.arange(len(ends) - 1), np.diff(line_ends))[there]
    return texts, spans[there, 0], spans[there, 1], facts[:, :6]


def plain_line_table(data, ends) -> tuple:
    "`line_table` in plain Python."
    import numpy as np

    rows = [
        (d, a + ends[d], b + ends[d], *facts)
        for d, text in enumerate(each(data, ends))
        for (a, b), facts in zip(line_spans(text), line_facts(text.decode()))
    ]
    table = np.array(rows, np.int64).reshape(-1, 9)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3:]
