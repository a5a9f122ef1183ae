"""Private data against plain `re` and datatrove: `python -m k2lab.bench privacy`."""

import random, statistics, sys, tempfile, warnings
from k2lab.bench.harness import (
    as_jsonl,
    by_peer,
    cpu_seconds,
    installed_texts,
    median_and_range,
    print_peers,
)


def drawn(
    rng, n: int, letters: str = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
) -> str:
    "n random letters."
    return ''.join(rng.choices(letters, k=n))


def digits(rng, n: int) -> str:
    "n random digits."
    return drawn(rng, n, '0123456789')


def with_check(head: str) -> str:
    "Digits with the check digit (Luhn) that makes them a card number."
    from k2lab.corpus.privacy import luhn

    return head + next(d for d in '0123456789' if luhn((head + d).encode()))


def iban_of(rng) -> str:
    "An IBAN, in fours or in one piece."
    from k2lab.corpus.privacy import mod97

    country, head = rng.choice(
        [
            ('DE', digits(rng, 18)),
            ('FR', digits(rng, 10) + rng.choice('AKZ') + digits(rng, 12)),
            ('GB', 'WEST' + digits(rng, 14)),
            ('NL', 'ABNA' + digits(rng, 10)),
            ('NO', digits(rng, 11)),
        ]
    )
    whole = next(
        f'{country}{i:02}{head}' for i in range(2, 99) if mod97(f'{country}{i:02}{head}'.encode())
    )
    return (
        whole if rng.random() < 0.5 else ' '.join(whole[i : i + 4] for i in range(0, len(whole), 4))
    )


def card_of(rng) -> str:
    "A card number, in one piece or in groups."
    head = rng.choice(['4', '51', '55', '2345', '37', '6011', '36'])
    whole = with_check(head + digits(rng, {'37': 14, '36': 13}.get(head, 15) - len(head)))
    mark = rng.choice(['', ' ', '-'])
    return (
        mark.join(whole[i : i + 4] for i in range(0, 16, 4))
        if len(whole) == 16
        else mark.join((whole[:4], whole[4:10], whole[10:]))
    )


def private_value(kind: str, rng) -> tuple:
    "(what stands before, the private part, what stands after) of a kind; a tenth of the telephone numbers has nothing to be known by."
    name, n = (
        rng.choice(['ada', 'j.müller', 'Chen_Wei', "o'neil", 'r2-d2+spam', 'K.Sato']),
        lambda k: digits(rng, k),
    )
    host = rng.choice(
        [
            'lovelace.org',
            'uni-ulm.de',
            'mail.keio.ac.jp',
            'proton.me',
            'straßen.de',
            'acme.technology',
        ]
    )
    area = f'{rng.randrange(2, 10)}{n(2)}'
    pick = dict(
        EMAIL=[
            ('', f'{name}@{host}', ''),
            ('<', f'{name}@{host}', '>'),
            ('mailto:', f'{name}@{host}', ''),
        ],
        PHONE=[
            ('', f'+49 {rng.randrange(150, 180)} {n(7)}', ''),
            ('', f'+1-{area}-{area}-{n(4)}', ''),
            ('', f'({area}) {area}-{n(4)}', ''),
            ('tel. ', f'0{rng.randrange(100, 999)} {n(6)}', ''),
            ('', f'+33 6 {n(2)} {n(2)} {n(2)} {n(2)}', ''),
            ('', f'+86{rng.randrange(10**10, 2 * 10**10)}', ''),
            ('', f'{area}-{area}-{n(4)}', ''),
            ('Phone: ', f'{area} {area} {n(4)}', ''),
            ('Fax ', f'(0{n(3)}) {n(3)} {n(3)}', ''),
            ('reach me at ', f'020 {rng.randrange(1000, 9999)} {n(4)}', ''),
        ],
        IP=[
            (
                '',
                '.'.join(
                    str(x)
                    for x in (rng.choice([23, 93, 141, 185, 217]), *rng.choices(range(256), k=3))
                ),
                after,
            )
            for after in ('', ':8080')
        ]
        + [
            (
                '[',
                f'2a0{rng.randrange(1, 9)}:{drawn(rng, 3, "abcdef123")}:{drawn(rng, 4, "abcdef123")}::{drawn(rng, 2, "abcdef123")}',
                ']',
            )
        ],
        IBAN=[('', iban_of(rng), '')],
        CARD=[('', card_of(rng), ''), ('number=', card_of(rng), '')],
        SSN=[
            (
                'SSN ',
                f'{rng.randrange(100, 600)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}',
                '',
            ),
            (
                '',
                f'{rng.randrange(100, 600)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}',
                '',
            ),
        ],
        TOKEN=[
            ('', f'ghp_{drawn(rng, 36)}', ''),
            ('', f'hf_{drawn(rng, 34)}', ''),
            ('key ', f'sk-proj-{drawn(rng, 48)}', ''),
            ('', f'AKIA{drawn(rng, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")}', ''),
            ('aws_secret_access_key = ', drawn(rng, 40), ''),
            ('"api_key": "', drawn(rng, 32, '0123456789abcdef'), '"'),
        ],
        CREDENTIALS=[('postgres://', f'{drawn(rng, 5)}:{drawn(rng, 12)}', '@db.host.org/x')],
    )
    return rng.choice(pick[kind])


def decoy(rng) -> str:
    "Something that looks private and is not."
    n = lambda k: digits(rng, k)
    octets = '.'.join(str(rng.randrange(1, 99)) for _ in range(4))
    return rng.choice(
        [
            f'Version {octets}',
            f'numpy=={octets}',
            f'lib-{octets}.tar.gz',
            f'OID 1.3.6.1.4.{octets}',
            f'192.168.{rng.randrange(256)}.{rng.randrange(256)}',
            f'10.0.{rng.randrange(256)}.1',
            f'ISBN 978-{n(1)}-{n(4)}-{n(4)}-{n(1)}',
            f'commit {drawn(rng, 40, "0123456789abcdef")}',
            f'id {n(16)}',
            f'the number {n(16)}',
            f'{n(4)}-{rng.randrange(10, 13)}-{rng.randrange(10, 29)}',
            'user@example.com',
            'icon@2x.png',
            'git@github.com:a/b.git',
            'a@b.dot(c)',
            f'π = 3.{n(16)}',
            f'order no. {n(10)}',
            'AKIAIOSFODNN7EXAMPLE',
            'sk-your-key-goes-here-and-nowhere',
            'http://user:password@host/',
            f'{n(3)}-{n(3)}-{n(3)}',
            f'{n(2)}:{n(2)}:{n(2)}',
            f'{n(3)} {n(3)} {n(4)}',
            f'-{n(10)} to +2147483647',
            f'part {n(3)}-{n(2)}-{n(4)}',
            f'std::vector<{n(2)}>',
            f'{rng.randrange(10**12, 10**13)} ms',
            f'GB{n(2)}WEST{n(13)}',
        ]
    )


def sample_letters(n: int, seed: int = 0) -> list:
    "n texts with what is private in them: [(text, [(start, end, kind)])], in bytes; half of the numbers in them are decoys."
    rng, out = random.Random(seed), []
    fill = 'please find the report of last week about the new release and send what you think of it to the others before we meet'.split()
    for _ in range(n):
        text, parts = '', []
        for _ in range(rng.randrange(1, 5)):
            text += ' '.join(rng.sample(fill, rng.randrange(3, 9))) + ' '
            kind = rng.choice(
                ['EMAIL', 'PHONE', 'IP', 'IBAN', 'CARD', 'SSN', 'TOKEN', 'CREDENTIALS']
            )
            before, value, after = (
                private_value(kind, rng) if rng.random() < 0.5 else (decoy(rng), '', '')
            )
            start = len((text + before).encode())
            if value:
                parts.append((start, start + len(value.encode()), kind))
            text += before + value + after + rng.choice(['. ', ', ', '\n', ' '])
        out.append((text, parts))
    return out


def found_and_missed(labelled: list, find) -> tuple:
    "(right, wrong, missed) of a function from bytes to private parts, by exact places and kinds."
    pairs = [(set(parts), set(find(text.encode()))) for text, parts in labelled]
    return (
        sum(len(a & b) for a, b in pairs),
        sum(len(b - a) for a, b in pairs),
        sum(len(a - b) for a, b in pairs),
    )


def by_re(work):
    "A call with re2 hidden, so that `re` looks for the same patterns."
    from k2lab.corpus import privacy

    real = sys.modules.get('re2')
    sys.modules['re2'] = None
    privacy.engine.cache_clear()
    try:
        with warnings.catch_warnings(action='ignore'):
            return work()
    finally:
        sys.modules.pop('re2')
        if real:
            sys.modules['re2'] = real
        privacy.engine.cache_clear()


def privacy(megabytes: str = '20', rounds: str = '3'):
    "Speed of `k2lab.corpus.privacy` on one core against plain `re` and datatrove's formatter, on installed texts with letters among them; precision and recall on the letters."
    import pyarrow as pa
    from k2lab.corpus.privacy import private, redact

    labelled = sample_letters(4000, 1)
    texts = installed_texts(float(megabytes)) + [text for text, _ in labelled[:600]]
    random.Random(2).shuffle(texts)
    table, size = pa.table(dict(text=texts)), sum(len(text.encode()) for text in texts) / 1e6
    counts = redact(table)[1]
    print(
        f'{size:.1f} MB, {len(texts)} texts, {counts["changed"]} with private parts: {counts["redacted"]}',
        flush=True,
    )

    def ours_warm():
        redact(table.slice(0, 1000))
        return cpu_seconds(lambda: redact(table))

    with tempfile.TemporaryDirectory() as folder:
        path = as_jsonl(texts, folder)
        times = [
            (ours_warm(), by_re(ours_warm), by_peer('datatrove_pii', path))
            for _ in range(int(rounds))
        ]
    ours = [t[0] for t in times]
    print(f'redact: {median_and_range(ours)} s, {size / statistics.median(ours):.0f} MB/s')
    print_peers(
        ours,
        {
            'plain re, same patterns': [(t[1], None) for t in times],
            "datatrove's formatter, mail and IPv4 only": [t[2] for t in times],
        },
    )
    right, wrong, missed = found_and_missed(labelled, private)
    print(
        f'{len(labelled)} letters: precision {right / (right + wrong):.4f}, recall {right / (right + missed):.4f}, F1 {2 * right / (2 * right + wrong + missed):.4f} (letters and patterns have one author)'
    )
