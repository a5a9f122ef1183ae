"""Compiled kernels over UTF-8 bytes that find duplicates and contamination, each with a twin in
plain Python that defines the result.

Texts come as Arrow keeps them: `data`, the bytes of all texts, and `ends`, n+1 offsets into it.
Results come in the same shape. All hashes are unsigned 64-bit integers
whose sums and products wrap around (in numba only unsigned ones may). Kernels are the functions
with an underscore; they are compiled at first use, and nothing heavy is imported before."""

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from html.entities import html5
from typing import Any

from k2lab.lab.config import LabError

# Thai, Lao, Burmese, Khmer, Kana, Han
UNSPACED = (
    '\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf'
    '\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff'
)
WORD = re.compile(rf'(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+')
CODE_POINTS = 0x40000  # no letter lies above
SEED, PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV-1a's
BASE, STIR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd
WRAP = 2**64
U: Any = None  # becomes numpy.uint64 when the first kernel is compiled


# ---- what a reader sees --------------------
# Texts are compared by the words that a reader sees: what stands unseen between or in letters, how
# the letters are spelled, markup of html and the numbers of lines make no difference. Only for
# comparing: what is published keeps every byte.

# elements of html: the first stand inside words, the others end them
INLINE = frozenset(
    'a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark nobr q s '
    'samp small span strike strong sub sup time tt u var wbr'.split()
)
BLOCK = frozenset(
    'address article aside audio blockquote body br button canvas caption center col colgroup dd '
    'details dialog dir div dl dt fieldset figcaption figure footer form frame frameset h1 h2 h3 '
    'h4 h5 h6 head header hr html iframe img input legend li link main map menu meta nav noscript '
    'object ol optgroup option p param picture pre script section select source style summary '
    'table tbody td template textarea tfoot th thead title tr track ul video'.split()
)
TAG, COMMENT = 400, 2000  # the longest attributes and comments of html, in characters
MARKS, GAPS = r'!-/:-@\[-^`{-~', r'!-/:-@\[-^`{-~ \t\r'  # ASCII's marks; with white space
# the number, with a short word before it, that a line begins with: '12: ', '> 12. ', '00:01 ', 'L12 '
NUMBER = re.compile(
    rf'(?>[{GAPS}]*)(?>(?:[A-Za-z]{{1,5}}[ ]?(?=[0-9]))?)(?>[0-9]+(?:[{MARKS}]+[0-9]+)*)'
    rf'(?![0-9A-Za-z_])(?=[{GAPS}]*[^{GAPS}\n])'
)
HIDING = re.compile(
    rf'(?P<line>\n)|(?P<comment><!--.{{0,{COMMENT}}}?-->)'
    rf'|</?(?P<tag>[A-Za-z][A-Za-z0-9]{{0,15}})(?:[ \t\r\n/][^<>]{{0,{TAG}}})?>'
    r'|&(?:amp;)*(?:#(?P<decimal>[0-9]{1,7})|#[xX](?P<hex>[0-9A-Fa-f]{1,6})'
    r'|(?P<name>[A-Za-z][A-Za-z0-9]{1,31}));|(?P<low>_+)',
    re.S,
)
LETTER_OR_DIGIT = re.compile('[0-9A-Za-z]')
WIDE_LINES = re.compile('[\ufe33\ufe34\ufe4d-\ufe4f\uff3f]')  # underscores of other widths
APOSTROPHES = '\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ee\ua78b\ua78c'
UNSEEN = '\u0640\u115f\u1160\u2065\u3164\uffa0'  # letters that only stretch or fill
TAGS = range(0xE0000, 0xE1000)  # code points of which none is ever seen
# letters of other scripts that look like one of ASCII in both cases, and the i without a dot
LOOK_ALIKE = str.maketrans('аеорсухіјѕԛԝı', 'aeopcyxijsqwi')


@cache
def respelled() -> dict[int, Any]:
    "{code point: what stands for it in `folded_letters`, None for nothing}."
    out: dict[int, Any] = dict.fromkeys(map(ord, APOSTROPHES), ' ') | LOOK_ALIKE
    for c in range(CODE_POINTS):
        kind = unicodedata.category(chr(c))
        if kind[0] == 'M' or kind == 'Cf' or (kind == 'Cc' and not chr(c).isspace()):
            out[c] = None
        elif kind == 'Nd':
            out[c] = str(unicodedata.decimal(chr(c)))
    return out | dict.fromkeys([*map(ord, UNSEEN), *TAGS])


def folded_letters(text: str) -> str:
    "The letters of a text in one spelling: small, of one width, without accents and what is not seen."
    text = WIDE_LINES.sub(' ', text)
    folded = unicodedata.normalize('NFKD', unicodedata.normalize('NFKD', text).casefold())
    return folded.translate(respelled())


def number_end(text: str, start: int) -> int:
    "Where the number of the line at `start` ends, if the line before or after has one, too; else `start`."
    number, at = NUMBER.match(text, start), start
    if not number:
        return at
    line = text.find('\n', start) + 1 or len(text)
    blank = re.compile(r'(?:[ \t\r]*\n)*').match(text, line)
    if NUMBER.match(text, blank.end() if blank else line):
        return number.end()
    while start and text[start - 1] in ' \t\r\n':
        start -= 1
    before = text.rfind('\n', 0, start) + 1
    return number.end() if start and NUMBER.match(text, before) else at


def unhidden(text: str, numbers: bool = True) -> str:
    "A text without markup of html, line numbers (if `numbers`), and underscores around words."
    out, at = [], number_end(text, 0) if numbers else 0
    while match := HIDING.search(text, at):
        out.append(text[at : match.start()])
        shown, at = shown_for(match)
        if match['line'] and numbers:
            at = number_end(text, at)
        out.append(shown)
    return ''.join([*out, text[at:]])


def shown_for(match) -> tuple[str, int]:
    "(what is read instead of a match of `HIDING`, where reading goes on)."
    start, end, one = match.start(), match.end(), match[0][0]
    if match['tag']:
        name = match['tag'].lower()
        return ('', end) if name in INLINE else (' ', end) if name in BLOCK else (one, start + 1)
    if match['decimal'] or match['hex']:
        c = int(match['decimal'] or match['hex'], 10 if match['decimal'] else 16)
        return (' ' if c > 0x10FFFF or 0xD800 <= c < 0xE000 or c == 95 else chr(c)), end
    if match['name']:
        known = html5.get(match['name'] + ';')
        return (known[0].replace('_', ' '), end) if known else (one, start + 1)
    if match['low']:
        around = match.string[max(start - 1, 0) : start], match.string[end : end + 1]
        return (match[0] if all(map(LETTER_OR_DIGIT.match, around)) else ' '), end
    return ('' if match['comment'] else one), end


def gram_words(text: str, numbers: bool = True) -> list[str]:
    """The words of a text as a reader sees them, small and without accents.

    In scripts without spaces each character is one. `numbers`: without the numbers of lines."""
    seen = folded_letters(unhidden(text, numbers))
    return WORD.findall(unicodedata.normalize('NFC', seen))


def stirred(x: int) -> int:
    "A one-to-one mix of the 64 bits of x, each of which depends on all."
    x = (x ^ x >> 29) * STIR % WRAP
    return x ^ x >> 32


def word_hash(word: str) -> int:
    "The 64-bit hash of a word of `gram_words`: FNV-1a over its decomposed code points, stirred."
    h = SEED
    for letter in unicodedata.normalize('NFD', word):
        h = (h ^ ord(letter)) * PRIME % WRAP
    return stirred(h)


def gram_hash(hashes: list[int]) -> int:
    "The 64-bit hash of a run of words: a polynomial of their hashes, stirred with its length."
    total = sum(h * pow(BASE, i, WRAP) for i, h in enumerate(reversed(hashes)))
    return stirred((total + len(hashes)) % WRAP)


def run_hashes(hashes: list[int], n: int) -> list[int]:
    "Hashes of all runs of n words; a shorter text has none."
    return [gram_hash(hashes[i : i + n]) for i in range(len(hashes) - n + 1)]


def jaccard(a, b) -> float:
    "The Jaccard similarity of two sets, 0 for two empty ones."
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a or b else 0.0


# ---- machinery --------------------


@cache
def numba() -> Any:
    "The compiler's module, or None where it is not installed; one warning then says that plain Python does the work."
    try:
        import numba
    except ImportError:
        warnings.warn(
            'numba is not installed: plain Python does the work of k2lab.corpus.kernels, '
            'about a hundred times as slowly; pip install numba',
            stacklevel=2,
        )
        return None
    from numba.extending import register_jitable

    parts = (_gap, _alpha, _digit, _number, _number_end, _place, _comment, _tag, _entity)
    for part in (*parts, _character, _line_end):
        register_jitable(part)  # kernels may call these
    return numba


@cache
def machine(kernel: Callable, small: str = '') -> Any:
    """A kernel as machine code, kept on disk for later processes; variables named in `small` have 32 bits.

    None without numba."""
    global U
    if not numba():
        return None
    from numpy import uint64 as U

    narrow = {name: numba().uint32 for name in small.split()}
    return numba().njit(cache=True, nogil=True, locals=narrow)(kernel)


def ragged(lists: list) -> tuple[Any, Any]:
    "(all numbers, ends) of lists of numbers."
    import numpy as np

    ends = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(x) for x in lists], out=ends[1:])
    return np.array([x for one in lists for x in one], np.uint64), ends


def each(data, ends) -> list:
    "The parts of flat data as lists, or as bytes if the data is bytes."
    cut = bytes if data.dtype == 'uint8' else lambda part: part.tolist()
    return [cut(data[a:b]) for a, b in zip(ends, ends[1:])]


BATCH_BYTES = 1 << 24  # bytes of text in a batch, about


def text_batches(column, room: int = BATCH_BYTES) -> Iterator[tuple[Any, Any]]:
    """Yields an Arrow column of texts as `(data, ends)`, without copying it, of about `room` bytes each or one text.

    `LabError` if a text is missing."""
    import pyarrow as pa

    first = 0
    for chunk in [column] if isinstance(column, pa.Array) else column.chunks:
        if chunk.null_count:
            row = first + chunk.is_null().index(True).as_py()
            raise LabError(f'row {row} has no text: drop or fill it first')
        first += len(chunk)
        if len(chunk):
            yield from chunk_batches(chunk.cast(pa.large_string()), room)


def chunk_batches(chunk, room: int) -> Iterator[tuple[Any, Any]]:
    "Yields `(data, ends)` of one Arrow array of large strings, about `room` bytes or one text each."
    import numpy as np

    _, ends, data = chunk.buffers()
    ends = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    data, at = np.frombuffer(data or b'', np.uint8), 0
    while at < len(chunk):
        stop = max(at + 1, int(np.searchsorted(ends, ends[at] + room, 'right')) - 1)
        yield data, ends[at : stop + 1]
        at = stop


def packed(texts: list) -> tuple[Any, Any]:
    "(data, ends) of texts."
    import numpy as np

    parts = [text.encode('utf-8', 'replace') for text in texts]
    return np.frombuffer(b''.join(parts), np.uint8), np.cumsum([0] + [len(part) for part in parts])


SKIPPED, SPELLED = -(1 << 30), -(1 << 29)  # classes below those of letters


@cache
def word_classes() -> tuple[Any, Any, Any]:
    """(what a first byte does, each code point, letters of those that stand for several), int32.

    0 separates, c > 0 continues a word as c, c < 0 is the word -c, `SKIPPED` is not seen, and
    `SPELLED` - i stands for the letters from i + 1 on, as many as number i says."""
    import numpy as np

    chars = [' ' if 0xD800 <= c < 0xE000 or c == 31 else chr(c) for c in range(CODE_POINTS)]
    spelled, classes = [], []
    for letters in folded_letters('\x1f'.join(chars)).split('\x1f'):
        several = list(map(letter_class, letters))
        if len(several) > 1 and any(several):
            classes.append(SPELLED - len(spelled))
            spelled += [len(several), *several]
        else:
            classes.append(several[0] if several else SKIPPED)
    begins = np.array(classes[:128] + [-1] * 128, np.int32)  # -1: more is to be looked at
    begins[[ord(c) for c in '\n<&_']] = -1
    return begins, np.array(classes, np.int32), np.array(spelled, np.int32)


OWN_WORD = re.compile(f'[{UNSPACED}]')


def letter_class(letter: str) -> int:
    "0 for what separates words, the code point of a letter, minus it for a word of its own."
    if not letter.isalnum():
        return 0
    return -ord(letter) if OWN_WORD.match(letter) else ord(letter)


@cache
def html_names() -> tuple[Any, Any, Any]:
    "(sorted hashes of names, of elements and entities; 1 for an inline element, 2 for a block; code points)."
    import numpy as np

    tags = {name.encode(): (kind, 0) for kind, names in ((1, INLINE), (2, BLOCK)) for name in names}
    entities = {
        f'&{name[:-1]}'.encode(): (0, ord(html5[name][0])) for name in html5 if name[-1] == ';'
    }
    rows = sorted((name_hash(name), *what) for name, what in (tags | entities).items())
    hashes, kinds, points = zip(*rows)
    return np.array(hashes, np.uint64), np.array(kinds, np.int64), np.array(points, np.int64)


def name_hash(name: bytes) -> int:
    "FNV-1a of a name."
    h = SEED
    for byte in name:
        h = (h ^ byte) * PRIME % WRAP
    return h


# ---- spelling --------------------


def _tidied(data, ends, out, out_ends, plain):
    w = 0
    for d in range(len(ends) - 1):
        # keep: after what ends no line in spaces; last: after the last visible byte
        first, keep, last = w, w, w
        lines, after_cr, ascii = 0, False, True
        for i in range(ends[d], ends[d + 1]):
            c = data[i]
            if c == 10 or c == 13:
                if c == 10 and after_cr:
                    after_cr = False
                    continue
                after_cr, lines, w = c == 13, lines + 1, keep
                if w > first and lines <= 2:
                    out[w] = 10
                    w += 1
                    keep = w
            elif c == 32 or c == 9:
                after_cr = False
                if w > first:
                    out[w] = c
                    w += 1
            elif c > 32 and c != 127:
                after_cr, lines, ascii = False, 0, ascii and c < 128
                out[w] = c
                w += 1
                keep = last = w
        w = last
        out_ends[d + 1], plain[d] = w, ascii


def tidied(data, ends):
    """(data, ends, which texts are ASCII) of texts spelled as `k2lab.corpus.operators.normal` does.

    Only for ASCII: line ends, control characters, spaces, blank lines. None without numba."""
    import numpy as np

    if not machine(_tidied):
        return None
    out, out_ends = np.empty(int(ends[-1] - ends[0]), np.uint8), np.zeros(len(ends), np.int64)
    plain = np.empty(len(ends) - 1, np.bool_)
    machine(_tidied)(data, ends, out, out_ends, plain)
    return out[: out_ends[-1]], out_ends, plain


def _folded(data, ends, out, out_ends, plain):
    w = 0
    for d in range(len(ends) - 1):
        first, gap, ascii = w, False, True
        for i in range(ends[d], ends[d + 1]):
            c = data[i]
            if c == 32 or 9 <= c <= 13 or 28 <= c <= 31:
                gap = True
            else:
                if gap and w > first:
                    out[w] = 32
                    w += 1
                out[w] = c + 32 if 65 <= c <= 90 else c
                gap, ascii, w = False, ascii and c < 128, w + 1
        out_ends[d + 1], plain[d] = w, ascii


@cache
def unseen() -> re.Pattern:
    "A pattern for the code points that are not seen; accents are."
    gone = [chr(c) for c, shown in respelled().items() if shown is None and c not in TAGS]
    some = ''.join(re.escape(c) for c in gone if unicodedata.category(c)[0] != 'M')
    return re.compile(f'[{some}{chr(TAGS[0])}-{chr(TAGS[-1])}]')


def one_spelling(text: str) -> str:
    "A text in lower case, of one width (NFKC), without what is not seen, with one space for any white space."
    if not text.isascii():
        text = unseen().sub('', unicodedata.normalize('NFKC', text))
    return ' '.join(text.lower().split())


def plain_folded(text: bytes) -> bytes:
    "`one_spelling` of a text in UTF-8."
    seen = one_spelling(text.decode('utf-8', 'surrogatepass'))
    return seen.encode('utf-8', 'surrogatepass')


def folded(data, ends) -> list[bytes]:
    "`one_spelling` of each text, as bytes."
    import numpy as np

    if not machine(_folded):
        return [plain_folded(text) for text in each(data, ends)]
    out, until = np.empty(int(ends[-1] - ends[0]), np.uint8), np.zeros(len(ends), np.int64)
    plain = np.empty(len(ends) - 1, np.bool_)
    machine(_folded)(data, ends, out, until, plain)
    whole, raw = out[: until[-1]].tobytes(), memoryview(data)
    return [
        whole[until[i] : until[i + 1]] if plain[i] else plain_folded(bytes(raw[a:b]))
        for i, (a, b) in enumerate(zip(ends, ends[1:]))
    ]


# ---- words and runs of words --------------------


def _gap(c):  # a mark or white space of ASCII, within a line
    return (
        33 <= c < 48
        or 58 <= c < 65
        or 91 <= c < 95
        or c == 96
        or 123 <= c < 127
        or c in (9, 13, 32)
    )


def _alpha(c):
    return 65 <= c < 91 or 97 <= c < 123


def _digit(c):
    return 48 <= c < 58


def _number(text, i):  # `NUMBER.match`: where it ends, or -1
    n = len(text)
    while i < n and _gap(text[i]):
        i += 1
    j = i
    while j < n and j - i < 5 and _alpha(text[j]):
        j += 1
    if j > i:
        j += j < n and text[j] == 32
        i = j if j < n and _digit(text[j]) else i
    if i >= n or not _digit(text[i]):
        return -1
    while True:
        while i < n and _digit(text[i]):
            i += 1
        j = i
        while j < n and _gap(text[j]) and text[j] not in (9, 13, 32):
            j += 1
        if j == i or j >= n or not _digit(text[j]):
            break
        i = j
    if i < n and (_alpha(text[i]) or text[i] == 95):
        return -1
    j = i
    while j < n and _gap(text[j]):
        j += 1
    return i if j < n and text[j] != 10 else -1


def _number_end(text, start):  # `number_end`
    end, n = _number(text, start), len(text)
    if end < 0:
        return start
    line = start
    while line < n and text[line] != 10:
        line += 1
    line += line < n
    j = line
    while j < n and text[j] in (9, 10, 13, 32):
        j += 1
        line = j if text[j - 1] == 10 else line
    if _number(text, line) >= 0:
        return end
    j = start
    while j and text[j - 1] in (9, 10, 13, 32):
        j -= 1
    if not j:
        return start
    while j and text[j - 1] != 10:
        j -= 1
    return end if _number(text, j) >= 0 else start


def _place(names, h):  # of a hash in the sorted names, or -1
    low, high = 0, len(names)
    while low < high:
        middle = (low + high) >> 1
        if names[middle] < h:
            low = middle + 1
        else:
            high = middle
    return low if low < len(names) and names[low] == h else -1


def _comment(text, i):  # where the comment of html at `i` ends, or 0
    n, left, j = len(text), COMMENT, i + 4
    while j + 2 < n:
        if text[j] == 45 and text[j + 1] == 45 and text[j + 2] == 62:
            return j + 3
        left -= text[j] & 0xC0 != 0x80
        if left < 0:
            return 0
        j += 1
    return 0


def _tag(text, i, names, kinds):  # (where the element of html at `i` ends, or 0; its kind)
    n, j, h = len(text), i + 1, U(SEED)
    if i + 4 <= n and text[j] == 33 and text[j + 1] == 45 and text[j + 2] == 45:
        return _comment(text, i), 1
    j += j < n and text[j] == 47
    first = j
    while j < n and j - first < 16 and (_alpha(text[j]) or (j > first and _digit(text[j]))):
        h = (h ^ U(text[j] | 32 if _alpha(text[j]) else text[j])) * U(PRIME)
        j += 1
    if j == first or j >= n or not (text[j] == 62 or text[j] in (9, 10, 13, 32, 47)):
        return 0, 0
    place, left = _place(names, h), TAG
    if place < 0 or kinds[place] == 0:
        return 0, 0
    j += text[j] != 62
    while j < n and left >= 0 and text[j] not in (60, 62):
        left -= text[j] & 0xC0 != 0x80
        j += 1
    return (j + 1 if j < n and text[j] == 62 and left >= 0 else 0), kinds[place]


def _entity(text, i, names, points):  # (where the entity of html at `i` ends, or 0; its code point)
    n, j = len(text), i + 1
    while (
        j + 4 <= n
        and text[j] == 97
        and text[j + 1] == 109
        and text[j + 2] == 112
        and text[j + 3] == 59
    ):
        j += 4
    after = j
    if j + 1 < n and text[j] == 35:
        j, c, base = j + 1, 0, 10
        if text[j] in (88, 120):
            j, base = j + 1, 16
        first = j
        while j < n and j - first < (7 if base == 10 else 6):
            x = int(text[j])
            low = x | 32
            if _digit(x):
                c = c * base + x - 48
            elif base == 16 and 97 <= low < 103:
                c = c * base + low - 87
            else:
                break
            j += 1
        if j > first and j < n and text[j] == 59:
            return j + 1, 32 if c > 0x10FFFF or 0xD800 <= c < 0xE000 or c == 95 else c
    else:
        h = (U(SEED) ^ U(38)) * U(PRIME)
        first = j
        while j < n and j - first < 32 and (_alpha(text[j]) or (j > first and _digit(text[j]))):
            h = (h ^ U(text[j])) * U(PRIME)
            j += 1
        if j - first > 1 and j < n and text[j] == 59:
            place = _place(names, h)
            if place >= 0:
                return j + 1, 32 if points[place] == 95 else points[place]
    return (after, 38) if after > i + 1 else (0, 0)


def _character(text, i):  # (code point at `i`, not of ASCII, its bytes); a space if ill-formed
    n, c = len(text), int(text[i])
    if c < 0xC2:
        return 32, 1
    width = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
    good = i + width <= n and c < 0xF5
    c = c & (0xFF >> (width + 1))
    for j in range(i + 1, min(i + width, n)):
        good = good and text[j] & 0xC0 == 0x80
        c = c << 6 | (text[j] & 0x3F)
    if (
        not good
        or (width == 3 and (c < 0x800 or 0xD800 <= c < 0xE000))
        or (width == 4 and (c < 0x10000 or c > 0x10FFFF))
    ):
        return 32, 1
    return c, width


def _line_end(text, i):  # (bytes of a line end at `i` and a number after it, if one is there)
    n, j = len(text), i + 1
    while j < n and text[j] == 32:
        j += 1
    near = j < n and not _alpha(text[j])  # a number stands within seven bytes, or after marks
    for at in range(j, min(j + 7, n)):
        near |= 48 <= text[at] < 58
    if not near:
        return j - i, False
    until = _number_end(text, i + 1)
    return max(j, until) - i, until > i + 1


def _word_hashes(
    data, ends, numbers, bytes_, table, spelled, names, kinds, points, out, out_ends, numbered
):
    k = 0
    for d in range(len(out_ends) - 1):
        text, i, h, inside = data[ends[d] : ends[d + 1]], 0, U(SEED), False
        n = len(text)
        if numbers:
            i = _number_end(text, 0)
        numbered[d] = i > 0
        while i < n:
            what = bytes_[text[i]]
            if what > 0:  # nearly every byte of most texts
                h, inside, i = (h ^ U(what)) * U(PRIME), True, i + 1
                continue
            if what == 0:
                if inside:
                    out[k], k, h, inside = h, k + 1, U(SEED), False
                i += 1
                continue
            c, width = int(text[i]), 1
            if c >= 0x80:
                c, width = _character(text, i)
            elif c == 10 and numbers:
                width, at_number = _line_end(text, i)
                numbered[d] = numbered[d] or at_number
            elif c == 60:
                until, kind = _tag(text, i, names, kinds)
                if until:
                    c, width = 0 if kind == 1 else 32, until - i  # 0 is not seen
            elif c == 38:
                until, point = _entity(text, i, names, points)
                if until:
                    c, width = point, until - i
            elif c == 95:
                j = i
                while j < n and text[j] == 95:
                    j += 1
                inner = i > 0 and j < n
                inner = inner and (_alpha(text[i - 1]) or _digit(text[i - 1]))
                inner = inner and (_alpha(text[j]) or _digit(text[j]))
                for _ in range(j - i if inner else 0):
                    h = (h ^ U(95)) * U(PRIME)
                if inner:
                    i = j
                    continue
                c, width = 32, j - i
            what = int(table[c]) if c < len(table) else SKIPPED if 0xE0000 <= c < 0xE1000 else 0
            i += width
            if what == SKIPPED:
                continue
            first, last = 0, 1
            if what <= SPELLED:
                first = SPELLED - what + 1
                last = first + spelled[first - 1]
            for at in range(first, last):
                c = int(spelled[at]) if what <= SPELLED else what
                if c > 0:
                    h, inside = (h ^ U(c)) * U(PRIME), True
                    continue
                if inside:
                    out[k], k = h, k + 1
                if c < 0:
                    out[k], k = (U(SEED) ^ U(-c)) * U(PRIME), k + 1
                h, inside = U(SEED), False
        if inside:
            out[k], k = h, k + 1
        out_ends[d + 1] = k
    for j in range(k):
        h = (out[j] ^ out[j] >> U(29)) * U(STIR)
        out[j] = h ^ h >> U(32)
    return k


def word_hashes(data, ends, numbers: bool = True) -> tuple[Any, Any]:
    "(hashes, ends) of the words of texts: `word_hash` of `gram_words`; ill-formed UTF-8 separates words."
    return numbered_hashes(data, ends, numbers)[:2]


def numbered_hashes(data, ends, numbers: bool = True) -> tuple[Any, Any, Any]:
    "`word_hashes`, and for each text whether its lines have numbers that were left out."
    import numpy as np

    if not machine(_word_hashes):
        texts = [text.decode('utf-8', 'replace') for text in each(data, ends)]
        words = [gram_words(text, numbers) for text in texts]
        numbered = [numbers and a != gram_words(text, False) for a, text in zip(words, texts)]
        return *ragged([list(map(word_hash, some)) for some in words]), np.array(numbered, bool)
    wide = np.count_nonzero(
        data[ends[0] : ends[-1]] >> 7
    )  # one of these can stand for several words
    room = (int(ends[-1] - ends[0]) + len(ends)) // 2 + 2 * wide + 1
    out, out_ends = np.empty(room, np.uint64), np.zeros(len(ends), np.int64)
    numbered = np.zeros(len(ends) - 1, bool)
    tables = (*word_classes(), *html_names())
    k = machine(_word_hashes)(data, ends, numbers, *tables, out, out_ends, numbered)
    return out[:k], out_ends, numbered


def picked(values, ends, rows) -> tuple[Any, Any]:
    "(values, ends) of some rows of ragged values."
    import numpy as np

    sizes = np.diff(ends)[rows]
    until = np.insert(np.cumsum(sizes), 0, 0)
    at = np.arange(until[-1]) + np.repeat(ends[:-1][rows] - until[:-1], sizes)
    return values[at], until


def reading_hashes(data, ends) -> Iterator[tuple[Any, Any, Any]]:
    "Yields (hashes, ends, numbers of texts): words without the numbers of lines, and with them where there are any."
    import numpy as np

    hashes, until, numbered = numbered_hashes(data, ends)
    yield hashes, until, np.arange(len(ends) - 1)
    if numbered.any():
        rows = np.flatnonzero(numbered)
        parts = [data[ends[row] : ends[row + 1]] for row in rows]
        until = np.insert(np.cumsum(list(map(len, parts))), 0, 0)
        yield *word_hashes(np.concatenate(parts), until, False), rows


def _gram_hashes(words, ends, n, top, out, out_ends):
    k = 0
    for d in range(len(ends) - 1):
        text, g = words[ends[d] : ends[d + 1]], U(0)
        for i in range(len(text)):
            g = g * U(BASE) + text[i]
            if i >= n:
                g -= text[i - n] * top
            if i >= n - 1:
                h = g + U(n)
                h = (h ^ h >> U(29)) * U(STIR)
                out[k] = h ^ h >> U(32)
                k += 1
        out_ends[d + 1] = k
    return k


def gram_hashes(hashes, ends, n: int) -> tuple[Any, Any]:
    "(hashes, ends) of the runs of n words of texts: `grams` of each text's word hashes."
    import numpy as np

    if not machine(_gram_hashes):
        return ragged([run_hashes(text, n) for text in each(hashes, ends)])
    out, out_ends = np.empty(len(hashes), np.uint64), np.zeros(len(ends), np.int64)
    top = np.uint64(pow(BASE, n, WRAP))
    k = machine(_gram_hashes)(hashes, ends, n, top, out, out_ends)
    return out[:k], out_ends


# ---- MinHash --------------------


def factors(k: int) -> list:
    "k pairs (odd factor, summand) of 32 bits: the hash functions of MinHash, always the same."
    drawn = [stirred(i * BASE % WRAP) >> 32 for i in range(1, 2 * k + 1)]
    return [(a | 1, b) for a, b in zip(drawn[::2], drawn[1::2])]


def least(hashes: list, k: int) -> list:
    "For each of k functions x -> a*x + b modulo 2**32, the least value over the low halves of the hashes."
    return [min((a * x + b) % 2**32 for x in hashes) for a, b in factors(k)]


def bands_of(signature: list, rows: int) -> list:
    "A signature as one 64-bit key for every `rows` values in turn."
    return [gram_hash(signature[i : i + rows]) for i in range(0, len(signature), rows)]


def _band_keys(grams, ends, a, b, seen, rows, keys):
    for d in range(len(ends) - 1):
        text = grams[ends[d] : ends[d + 1]]
        for p in range(len(seen)):
            seen[p] = 0xFFFFFFFF
        for i in range(0, len(text), 2):  # two at a time halve the reading and writing of `seen`
            x, y = text[i], text[min(i + 1, len(text) - 1)]
            for p in range(len(seen)):
                v = a[p] * x + b[p]
                w = a[p] * y + b[p]
                m = min(v, w)
                seen[p] = min(seen[p], m)
        for j in range(keys.shape[1]):
            g = U(0)
            for p in range(rows):
                g = g * U(BASE) + U(seen[j * rows + p])
            g += U(rows)
            g = (g ^ g >> U(29)) * U(STIR)
            keys[d, j] = g ^ g >> U(32)


def band_keys(grams, ends, bands: int = 14, rows: int = 8):
    """Keys (texts, bands) of texts that are not empty, by their runs of words: `bands_of` the `least`.

    Texts of Jaccard similarity s share a key of a band with probability s**rows."""
    import numpy as np

    if not machine(_band_keys):
        signatures = [least(text, bands * rows) for text in each(grams, ends)]
        plain = [bands_of(signature, rows) for signature in signatures]
        return np.array(plain, np.uint64).reshape(-1, bands)
    a, b = np.array(factors(bands * rows), np.uint32).T.copy()
    keys = np.empty((len(ends) - 1, bands), np.uint64)
    low = grams.astype(np.uint32)
    machine(_band_keys, 'x y v w m')(low, ends, a, b, np.empty_like(a), rows, keys)
    return keys


# ---- sets of runs --------------------


def _distinct(grams, ends, out_ends):
    k = 0
    for d in range(len(ends) - 1):
        text = grams[ends[d] : ends[d + 1]]
        text.sort()
        for i in range(len(text)):
            if i == 0 or text[i] != text[i - 1]:
                grams[k] = text[i]
                k += 1
        out_ends[d + 1] = k
    return k


def distinct_grams(grams, ends) -> tuple[Any, Any]:
    "(hashes, ends): each text's runs as a sorted set. The array that is passed is used up."
    import numpy as np

    if not machine(_distinct):
        return ragged([sorted(set(text)) for text in each(grams, ends)])
    out_ends = np.zeros(len(ends), np.int64)
    k = machine(_distinct)(grams, ends, out_ends)
    return grams[:k], out_ends


def _jaccards(sets, ends, left, right, out):
    for q in range(len(left)):
        a, b = sets[ends[left[q]] : ends[left[q] + 1]], sets[ends[right[q]] : ends[right[q] + 1]]
        i, j, both = 0, 0, 0
        while i < len(a) and j < len(b):
            both += a[i] == b[j]
            i, j = i + (a[i] <= b[j]), j + (b[j] <= a[i])
        out[q] = both / max(len(a) + len(b) - both, 1)


def jaccards(sets, ends, left, right):
    "The Jaccard similarity of each pair of texts left[i], right[i], from sorted sets (as `distinct_grams` gives them)."
    import numpy as np

    if not machine(_jaccards):
        lists = each(sets, ends)
        return np.array([jaccard(lists[i], lists[j]) for i, j in zip(left, right)])
    out = np.empty(len(left))
    machine(_jaccards)(sets, ends, left, right, out)
    return out


def _unite(left, right, parent):
    for q in range(len(left)):
        a, b = left[q], right[q]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        parent[max(a, b)] = min(a, b)
        parent[left[q]] = parent[right[q]] = min(a, b)
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]


def united(parent, left, right):
    """The components after left[i] and right[i] are joined.

    For each member the lowest of its component, as `parent` holds it before."""
    if not machine(_unite):
        return plain_united(parent, left, right)
    parent = parent.copy()
    machine(_unite)(left, right, parent)
    return parent


def plain_united(parent, left, right):
    "`united` by renaming, one pair after another."
    parent = parent.copy()
    for a, b in zip(left, right):
        low, high = sorted((parent[a], parent[b]))
        parent[parent == high] = low
    return parent


# ---- finding known runs --------------------

SLOTS = 22  # bits of the filter's address: half a megabyte, which stays in the cache


def sieve(index):
    "A bit for each value of the upper bits of a hash: 1 where the index (sorted hashes) has one."
    import numpy as np

    marks = np.zeros(1 << SLOTS, bool)
    marks[index >> np.uint64(64 - SLOTS)] = True
    return np.packbits(marks, bitorder='little')


def _known_grams(grams, ends, bits, index, rows, places):
    k = 0
    for d in range(len(ends) - 1):
        for x in grams[ends[d] : ends[d + 1]]:
            slot = int(x >> U(64 - SLOTS))
            if bits[slot >> 3] >> (slot & 7) & 1 == 0:
                continue
            low, high = 0, len(index)
            while low < high:
                middle = (low + high) >> 1
                if index[middle] < x:
                    low = middle + 1
                else:
                    high = middle
            if low < len(index) and index[low] == x:
                rows[k], places[k] = d, low
                k += 1
    return k


def known_grams(grams, ends, index, bits) -> tuple[Any, Any]:
    """(numbers of texts, places in the index) of the runs that an index of sorted hashes holds.

    `bits` is the sieve of the index."""
    import numpy as np

    if not machine(_known_grams):
        place = {x: i for i, x in enumerate(index.tolist())}
        texts = enumerate(each(grams, ends))
        matches = [(d, place[x]) for d, text in texts for x in text if x in place]
        rows, places = np.array(matches, np.int64).reshape(-1, 2).T
        return rows, places
    rows, places = np.empty(len(grams), np.int64), np.empty(len(grams), np.int64)
    k = machine(_known_grams)(grams, ends, bits, index, rows, places)
    return rows[:k], places[:k]
