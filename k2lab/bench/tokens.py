"""The encoder against other tokenizers: `python -m k2lab.bench tokens`."""

import os, statistics
from k2lab.bench.harness import cpu_seconds, installed_texts, median_and_range, print_peers


def kimi():
    "The tokenizer of the folder $K2LAB_KIMI, Kimi's own, or the one that ships with the lab."
    from k2lab.models.load import shipped
    from k2lab.text.tokenizer import tokenizer_in

    return tokenizer_in(os.environ.get('K2LAB_KIMI') or shipped('k2'))


def in_rows(ids, length: int = 4096) -> bytes:
    "SHA-256 of a stream of ids cut into rows; the last one is left out."
    import hashlib, numpy as np

    rows = np.asarray(ids, np.uint32)[: len(ids) // length * length].reshape(-1, length)
    return hashlib.sha256(rows.tobytes()).digest()


def encoders(tok, texts: list) -> dict:
    "{name: a call that makes a new engine and gives a call that encodes and chains the texts, to the hash of the rows}; each does what its documents show for many texts."
    from itertools import chain
    from unittest.mock import patch
    from k2lab.text.encoder import ENGINES, encoder, encode_stream
    from k2lab.text.tokenizer import plain_tokenizer

    chained = lambda lists: in_rows([i for ids in lists for i in chain(ids, (tok.eos_token_id,))])

    def ours():
        encoder.cache_clear()
        encoder(tok).left = 0  # compared already
        return lambda: in_rows(encode_stream(tok, texts, tok.eos_token_id))

    def by_tokenizers():
        plain_tokenizer.cache_clear()
        plain = plain_tokenizer(tok)
        return lambda: chained(
            one.ids for one in plain.encode_batch_fast(texts, add_special_tokens=False)
        )

    def by_tiktoken():
        with patch('k2lab.text.encoder.flat_ids', lambda lists: lists):
            encode = ENGINES['tiktoken'](plain_tokenizer(tok))

        def work():
            with patch('k2lab.text.encoder.flat_ids', lambda lists: lists):
                return chained(encode(texts))

        return work

    return dict(ours=ours, tokenizers=by_tokenizers, tiktoken=by_tiktoken)


def tokens(megabytes: str = '20', rounds: str = '3'):
    "Speed of `k2lab.text.encoder.encode_stream` on one core against Hugging Face's tokenizers and tiktoken, ids compared; Kimi's vocabulary if $K2LAB_KIMI names its folder."
    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')
    from k2lab.text.encoder import Encoder

    tok, texts = kimi(), installed_texts(float(megabytes))
    work, size = encoders(tok, texts), sum(len(text.encode()) for text in texts) / 1e6
    checked = cpu_seconds(lambda: Encoder(tok)(texts[:1000]))
    print(
        f'{size:.1f} MB, {len(texts)} texts, {len(tok)} tokens in the vocabulary; to open the engine and compare it on 1,000 texts takes {checked:.1f} s',
        flush=True,
    )
    times, hashes = [], set()
    for _ in range(int(rounds)):
        calls = {name: make() for name, make in work.items()}
        times.append(
            {name: cpu_seconds(lambda: hashes.add(call())) for name, call in calls.items()}
        )
    ours = [t['ours'] for t in times]
    print(
        f'encoded and chained: {median_and_range(ours)} s, {size / statistics.median(ours):.0f} MB/s; the same rows of ids from all: {len(hashes) == 1}'
    )
    print_peers(ours, {name: [(t[name], None) for t in times] for name in work if name != 'ours'})
