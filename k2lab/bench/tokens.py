"""The encoder against other tokenizers: `python -m k2lab.bench tokens`."""

import os
from collections.abc import Callable
from unittest.mock import patch

from k2lab.bench.harness import cpu_seconds, installed_texts, megabytes_of, print_peers, speed


def kimi():
    "The tokenizer in the folder $K2LAB_KIMI, Kimi's own, or the one that ships with the lab."
    from k2lab.models.load import shipped
    from k2lab.text.tokenizer import tokenizer_in

    return tokenizer_in(os.environ.get('K2LAB_KIMI') or shipped('k2'))


def in_rows(ids, length: int = 4096) -> bytes:
    "SHA-256 of a stream of ids cut into rows; an incomplete last row is left out."
    import hashlib

    import numpy as np

    rows = np.asarray(ids, np.uint32)[: len(ids) // length * length].reshape(-1, length)
    return hashlib.sha256(rows.tobytes()).digest()


def chained(lists, end: int) -> bytes:
    "`in_rows` of lists of ids, each followed by the end token."
    return in_rows([i for ids in lists for i in (*ids, end)])


def our_encoder(tok, texts: list) -> Callable[[], bytes]:
    "A call that encodes the texts by a new engine of the lab."
    from k2lab.text.encoder import encode_stream, encoder

    encoder.cache_clear()
    encoder(tok).left = 0  # already compared
    return lambda: in_rows(encode_stream(tok, texts, tok.eos_token_id))


def by_tokenizers(tok, texts: list) -> Callable[[], bytes]:
    "The same by Hugging Face's tokenizers, in batches as its documents show."
    from k2lab.text.tokenizer import plain_tokenizer

    plain_tokenizer.cache_clear()
    plain = plain_tokenizer(tok)

    def work() -> bytes:
        encodings = plain.encode_batch_fast(texts, add_special_tokens=False)
        return chained((one.ids for one in encodings), tok.eos_token_id)

    return work


def by_tiktoken(tok, texts: list) -> Callable[[], bytes]:
    "The same by tiktoken, in batches as its documents show."
    from k2lab.text.encoder import ENGINES
    from k2lab.text.tokenizer import plain_tokenizer

    as_lists = patch('k2lab.text.encoder.flat_ids', lambda lists: lists)
    with as_lists:
        encode = ENGINES['tiktoken'](plain_tokenizer(tok))

    def work() -> bytes:
        with as_lists:
            return chained(encode(texts), tok.eos_token_id)

    return work


ENCODERS = {'ours': our_encoder, 'tokenizers': by_tokenizers, 'tiktoken': by_tiktoken}


def timed_round(tok, texts: list, hashes: set[bytes]) -> dict[str, float]:
    "CPU seconds of each encoder; adds the hash of its rows to `hashes`."
    calls = {name: make(tok, texts) for name, make in ENCODERS.items()}
    return {name: cpu_seconds(lambda call=call: hashes.add(call())) for name, call in calls.items()}


def tokens(megabytes: float = 20, rounds: int = 3):
    "Print the speed of `encode_stream` on one core against tokenizers and tiktoken; the ids are compared."
    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
    from k2lab.text.encoder import Encoder

    tok, texts = kimi(), installed_texts(megabytes)
    size = megabytes_of(texts)
    checked = cpu_seconds(lambda: Encoder(tok)(texts[:1000]))
    print(
        f'{size:.1f} MB, {len(texts)} texts, {len(tok)} tokens in the vocabulary; '
        f'opening the engine and comparing it on 1,000 texts takes {checked:.1f} s',
        flush=True,
    )
    hashes: set[bytes] = set()
    times = [timed_round(tok, texts, hashes) for _ in range(rounds)]
    ours = [one['ours'] for one in times]
    print(f'encoded and chained: {speed(size, ours)}; all rows the same: {len(hashes) == 1}')
    others = [name for name in ENCODERS if name != 'ours']
    print_peers(ours, {name: [(one[name], None) for one in times] for name in others})
