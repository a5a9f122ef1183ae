"""Private data against plain `re` and datatrove: `python -m k2lab.bench privacy`."""

import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable

from k2lab.bench.harness import (
    Timing,
    as_jsonl,
    by_peer,
    cpu_seconds,
    installed_texts,
    megabytes_of,
    print_peers,
    speed,
)

PLAIN_RE, DATATROVE = 'plain re, same patterns', "datatrove's formatter, mail and IPv4 only"
WORDS = (
    'please find the report of last week about the new release and send '
    'what you think of it to the others before we meet'
).split()
NAMES = ('ada', 'j.müller', 'Chen_Wei', "o'neil", 'r2-d2+spam', 'K.Sato')
HOSTS = (
    'lovelace.org',
    'uni-ulm.de',
    'mail.keio.ac.jp',
    'proton.me',
    'straßen.de',
    'acme.technology',
)
LETTERS = {
    'digit': '0123456789',
    'hex': '0123456789abcdef',
    'group': 'abcdef123',
    'base32': 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567',
    'any': 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789',
}
# (before, the private part, after) by kind; for the marks in `<>` see `filled`
PRIVATE = {
    'EMAIL': [('', '<address>', ''), ('<', '<address>', '>'), ('mailto:', '<address>', '')],
    'PHONE': [
        ('', '+49 <150:180> <digit*7>', ''),
        ('', '+1-<area>-<area>-<digit*4>', ''),
        ('', '(<area>) <area>-<digit*4>', ''),
        ('tel. ', '0<100:999> <digit*6>', ''),
        ('', '+33 6 <digit*2> <digit*2> <digit*2> <digit*2>', ''),
        ('', '+86<10000000000:20000000000>', ''),
        ('', '<area>-<area>-<digit*4>', ''),  # nothing says that it is a telephone number
        ('Phone: ', '<area> <area> <digit*4>', ''),
        ('Fax ', '(0<digit*3>) <digit*3> <digit*3>', ''),
        ('reach me at ', '020 <1000:9999> <digit*4>', ''),
    ],
    'IP': [
        ('', '<ipv4>', ''),
        ('', '<ipv4>', ':8080'),
        ('[', '2a0<1:9>:<group*3>:<group*4>::<group*2>', ']'),
    ],
    'IBAN': [('', '<iban>', '')],
    'CARD': [('', '<card>', ''), ('number=', '<card>', '')],
    'SSN': [
        ('SSN ', '<100:600>-<10:99>-<1000:9999>', ''),
        ('', '<100:600>-<10:99>-<1000:9999>', ''),
    ],
    'TOKEN': [
        ('', 'ghp_<any*36>', ''),
        ('', 'hf_<any*34>', ''),
        ('key ', 'sk-proj-<any*48>', ''),
        ('', 'AKIA<base32*16>', ''),
        ('aws_secret_access_key = ', '<any*40>', ''),
        ('"api_key": "', '<hex*32>', '"'),
    ],
    'CREDENTIALS': [('postgres://', '<any*5>:<any*12>', '@db.host.org/x')],
}
DECOYS = (
    'Version <octets>',
    'numpy==<octets>',
    'lib-<octets>.tar.gz',
    'OID 1.3.6.1.4.<octets>',
    '192.168.<0:256>.<0:256>',
    '10.0.<0:256>.1',
    'ISBN 978-<digit*1>-<digit*4>-<digit*4>-<digit*1>',
    'commit <hex*40>',
    'id <digit*16>',
    'the number <digit*16>',
    '<digit*4>-<10:13>-<10:29>',
    'user@example.com',
    'icon@2x.png',
    'git@github.com:a/b.git',
    'a@b.dot(c)',
    'π = 3.<digit*16>',
    'order no. <digit*10>',
    'AKIAIOSFODNN7EXAMPLE',
    'sk-your-key-goes-here-and-nowhere',
    'http://user:password@host/',
    '<digit*3>-<digit*3>-<digit*3>',
    '<digit*2>:<digit*2>:<digit*2>',
    '<digit*3> <digit*3> <digit*4>',
    '-<digit*10> to +2147483647',
    'part <digit*3>-<digit*2>-<digit*4>',
    'std::vector<<digit*2>>',
    '<1000000000000:10000000000000> ms',
    'GB<digit*2>WEST<digit*13>',
)
MARK = re.compile(r'<(\d+):(\d+)>|<(\w+)\*(\d+)>|<([a-z]\w+)>')


def drawn(rng: random.Random, n: int, letters: str) -> str:
    "n random letters."
    return ''.join(rng.choices(letters, k=n))


def digits(rng: random.Random, n: int) -> str:
    "n random digits."
    return drawn(rng, n, LETTERS['digit'])


def filled(template: str, rng: random.Random, **fixed: str) -> str:
    "A template with its marks replaced: `<low:high>`, `<letters*n>`, a name in `fixed` or in `MADE`."

    def value(mark: re.Match) -> str:
        low, high, letters, n, name = mark.groups()
        if low:
            return str(rng.randrange(int(low), int(high)))
        if letters:
            return drawn(rng, int(n), LETTERS[letters])
        return fixed[name] if name in fixed else MADE[name](rng)

    return MARK.sub(value, template)


def with_check(head: str) -> str:
    "Digits with the check digit (Luhn) that makes them a card number."
    from k2lab.corpus.privacy import luhn

    return head + next(d for d in LETTERS['digit'] if luhn((head + d).encode()))


def in_fours(text: str, mark: str = ' ') -> str:
    "A text in groups of four characters."
    return mark.join(text[i : i + 4] for i in range(0, len(text), 4))


def iban_of(rng: random.Random) -> str:
    "An IBAN, in fours or in one piece."
    from k2lab.corpus.privacy import mod97

    accounts = [
        ('DE', digits(rng, 18)),
        ('FR', digits(rng, 10) + rng.choice('AKZ') + digits(rng, 12)),
        ('GB', 'WEST' + digits(rng, 14)),
        ('NL', 'ABNA' + digits(rng, 10)),
        ('NO', digits(rng, 11)),
    ]
    country, account = rng.choice(accounts)
    candidates = (f'{country}{check:02}{account}' for check in range(2, 99))
    whole = next(iban for iban in candidates if mod97(iban.encode()))
    return whole if rng.random() < 0.5 else in_fours(whole)


def card_of(rng: random.Random) -> str:
    "A card number, in one piece or in groups."
    head = rng.choice(['4', '51', '55', '2345', '37', '6011', '36'])
    whole = with_check(head + digits(rng, {'37': 14, '36': 13}.get(head, 15) - len(head)))
    mark = rng.choice(['', ' ', '-'])
    if len(whole) == 16:
        return in_fours(whole, mark)
    return mark.join((whole[:4], whole[4:10], whole[10:]))


def ipv4_of(rng: random.Random) -> str:
    "A public IPv4 address."
    first = rng.choice([23, 93, 141, 185, 217])
    return '.'.join(map(str, (first, *rng.choices(range(256), k=3))))


MADE = {'iban': iban_of, 'card': card_of, 'ipv4': ipv4_of}


def private_value(kind: str, rng: random.Random) -> tuple[str, str, str]:
    "(before, private part, after) of a kind; all kinds are drawn, so that a seed gives the same texts."
    address = f'{rng.choice(NAMES)}@{rng.choice(HOSTS)}'
    area = filled('<2:10><digit*2>', rng)
    values = {
        name: [(a, filled(template, rng, address=address, area=area), b) for a, template, b in rows]
        for name, rows in PRIVATE.items()
    }
    return rng.choice(values[kind])


def decoy(rng: random.Random) -> str:
    "A text that looks private and is not."
    octets = filled('<1:99>.<1:99>.<1:99>.<1:99>', rng)
    return rng.choice([filled(template, rng, octets=octets) for template in DECOYS])


Part = tuple[int, int, str]  # start and end in bytes, kind
Letter = tuple[str, list[Part]]


def sample_letter(rng: random.Random) -> Letter:
    "One text of up to four phrases, each followed by a private value or a decoy."
    text, parts = '', []
    for _ in range(rng.randrange(1, 5)):
        text += ' '.join(rng.sample(WORDS, rng.randrange(3, 9))) + ' '
        kind = rng.choice(list(PRIVATE))
        private = rng.random() < 0.5
        before, value, after = private_value(kind, rng) if private else (decoy(rng), '', '')
        start = len((text + before).encode())
        if value:
            parts.append((start, start + len(value.encode()), kind))
        text += before + value + after + rng.choice(['. ', ', ', '\n', ' '])
    return text, parts


def sample_letters(n: int, seed: int = 0) -> list[Letter]:
    "n texts with their private parts; about half of the values in them are decoys."
    rng = random.Random(seed)
    return [sample_letter(rng) for _ in range(n)]


def found_and_missed(labelled: list[Letter], find: Callable) -> tuple[int, int, int]:
    "(right, wrong, missed) of a function from bytes to private parts, by exact places and kinds."
    pairs = [(set(parts), set(find(text.encode()))) for text, parts in labelled]
    right = sum(len(expected & parts) for expected, parts in pairs)
    wrong = sum(len(parts - expected) for expected, parts in pairs)
    missed = sum(len(expected - parts) for expected, parts in pairs)
    return right, wrong, missed


def by_re(work: Callable):
    "What a call returns with re2 hidden, so that `re` looks for the same patterns."
    from k2lab.corpus import privacy

    real = sys.modules.get('re2')
    sys.modules['re2'] = None  # pyright: ignore[reportArgumentType]  # an import of it fails
    privacy.engine.cache_clear()
    try:
        with warnings.catch_warnings(action='ignore'):
            return work()
    finally:
        sys.modules.pop('re2')
        if real:
            sys.modules['re2'] = real
        privacy.engine.cache_clear()


def redact_seconds(table) -> float:
    "CPU seconds to redact a table, after a first call on a part of it."
    from k2lab.corpus.privacy import redact

    redact(table.slice(0, 1000))
    return cpu_seconds(lambda: redact(table))


def print_scores(labelled: list[Letter]):
    "Print precision and recall on the letters."
    from k2lab.corpus.privacy import private

    right, wrong, missed = found_and_missed(labelled, private)
    precision, recall = right / (right + wrong), right / (right + missed)
    f1 = 2 * right / (2 * right + wrong + missed)
    print(
        f'{len(labelled)} letters: precision {precision:.4f}, recall {recall:.4f}, F1 {f1:.4f} '
        '(letters and patterns have one author)'
    )


def privacy(megabytes: float = 20, rounds: int = 3):
    "Print the speed of `k2lab.corpus.privacy` on one core against `re` and datatrove; precision and recall."
    import pyarrow as pa

    from k2lab.corpus.privacy import redact

    labelled = sample_letters(4000, 1)
    texts = installed_texts(megabytes) + [text for text, _ in labelled[:600]]
    random.Random(2).shuffle(texts)
    table, size = pa.table(dict(text=texts)), megabytes_of(texts)
    counts = redact(table)[1]
    summary = f'{counts["changed"]} with private parts: {counts["redacted"]}'
    print(f'{size:.1f} MB, {len(texts)} texts, {summary}', flush=True)
    ours: list[float] = []
    peers: dict[str, list[Timing]] = {PLAIN_RE: [], DATATROVE: []}
    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        for _ in range(rounds):
            ours.append(redact_seconds(table))
            peers[PLAIN_RE].append((by_re(lambda: redact_seconds(table)), None))
            peers[DATATROVE].append(by_peer('datatrove_pii', path))
    print(f'redact: {speed(size, ours)}')
    print_peers(ours, peers)
    print_scores(labelled)
