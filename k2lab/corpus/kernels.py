"""Compiled kernels over UTF-8 bytes that find duplicates and contamination, each with a twin in
plain Python that defines the result.

Texts come as Arrow keeps them: `data`, the bytes of all texts, and `ends`, n+1 offsets into it.
Results come in the same shape. All hashes are unsigned 64-bit integers
whose sums and products wrap around (in numba only unsigned ones may). Kernels are the functions
with an underscore; they are compiled at first use, and nothing heavy is imported before."""

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
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


def gram_words(text: str) -> list[str]:
    "The words of a text in lower case, without punctuation; in scripts without spaces each character is one."
    # the two letters whose lower case is not one letter, always the same
    lower = text.replace('\u0130', 'i').lower().replace('\u03c2', '\u03c3')
    return WORD.findall(lower)


def stirred(x: int) -> int:
    "A one-to-one mix of the 64 bits of x, each of which depends on all."
    x = (x ^ x >> 29) * STIR % WRAP
    return x ^ x >> 32


def word_hash(word: str) -> int:
    "The 64-bit hash of a word: FNV-1a over its code points, stirred."
    h = SEED
    for letter in word:
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


@cache
def word_classes():
    "What each code point does in `words`, as int32: 0 separates, c > 0 continues a word as c, c < 0 is the word -c."
    import numpy as np

    return np.array([word_class(c) for c in range(CODE_POINTS)], np.int32)


def word_class(code_point: int) -> int:
    "0 for what separates words, the code point in lower case for a letter, minus it for a word of its own."
    words = [] if 0xD800 <= code_point < 0xE000 else gram_words(chr(code_point))
    if not words:
        return 0
    letter = words[0][0]
    return -ord(letter) if re.match(f'[{UNSPACED}]', letter) else ord(letter)


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


def plain_folded(text: bytes) -> bytes:
    "A text in lower case with one space for any white space, by Python's own rules."
    words = text.decode('utf-8', 'surrogatepass').lower().split()
    return ' '.join(words).encode('utf-8', 'surrogatepass')


def folded(data, ends) -> list[bytes]:
    "Each text in lower case with one space for any white space, as bytes: `' '.join(text.lower().split())`."
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


def _word_hashes(data, ends, table, out, out_ends):
    k = 0
    for d in range(len(out_ends) - 1):
        text, i, h, inside = data[ends[d] : ends[d + 1]], 0, U(SEED), False
        while i < len(text):
            c, width = int(text[i]), 1
            if c < 0x80 and table[c] > 0:  # nearly every byte of most texts
                h, inside, i = ((h if inside else U(SEED)) ^ U(table[c])) * U(PRIME), True, i + 1
                continue
            if c >= 0xC2:  # ill-formed bytes separate, as U+FFFD would
                width = 2 if c < 0xE0 else 3 if c < 0xF0 else 4
                good = i + width <= len(text) and c < 0xF5
                c = c & (0xFF >> (width + 1))
                for j in range(i + 1, min(i + width, len(text))):
                    good = good and text[j] & 0xC0 == 0x80
                    c = c << 6 | (text[j] & 0x3F)
                if (
                    not good
                    or (width == 3 and (c < 0x800 or 0xD800 <= c < 0xE000))
                    or (width == 4 and (c < 0x10000 or c > 0x10FFFF))
                ):
                    c, width = 0, 1
            elif c >= 0x80:
                c = 0
            c = int(table[c]) if c < len(table) else 0
            i += width
            if inside and c <= 0:
                out[k], k = h, k + 1
            if c != 0:
                h = ((h if inside and c > 0 else U(SEED)) ^ U(abs(c))) * U(PRIME)
            if c < 0:
                out[k], k = h, k + 1
            inside = c > 0
        if inside:
            out[k], k = h, k + 1
        out_ends[d + 1] = k
    for j in range(k):
        h = (out[j] ^ out[j] >> U(29)) * U(STIR)
        out[j] = h ^ h >> U(32)
    return k


def word_hashes(data, ends) -> tuple[Any, Any]:
    "(hashes, ends) of the words of texts: `word_hash` of `words`; ill-formed UTF-8 separates words."
    import numpy as np

    if not machine(_word_hashes):
        texts = [text.decode('utf-8', 'replace') for text in each(data, ends)]
        return ragged([[word_hash(word) for word in gram_words(text)] for text in texts])
    out = np.empty((int(ends[-1] - ends[0]) + len(ends)) // 2 + 1, np.uint64)
    out_ends = np.zeros(len(ends), np.int64)
    k = machine(_word_hashes)(data, ends, word_classes(), out, out_ends)
    return out[:k], out_ends


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
