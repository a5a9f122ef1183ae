"""Memory and time of prepare_corpus on a corpus of any size: `python -m k2lab.bench volume --megabytes 200`."""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from k2lab.bench.harness import in_new_process, installed_texts

FILE_MB = 100  # of a file of the corpus
CHANGES = dict(general_sources=[], questions=0, tokenizer=None, limit=None)
HELD_MB = 0.2  # of what is held out, whatever the size


def turned(text: str, places: int) -> str:
    "A text with its small letters turned by some places of the alphabet: as long, but no near copy."
    letters = 'abcdefghijklmnopqrstuvwxyz'
    return text.translate(str.maketrans(letters, letters[places:] + letters[:places]))


def varied_texts(texts: list) -> Iterator[str]:
    "Texts without end: all of them with turned letters, again and again; every 20th again with a word changed."
    rng = random.Random(0)
    for places in count():
        for i, text in enumerate(texts):
            new = turned(text, places % 26)
            if places > 25:  # the alphabet is used up: nothing but the numbers differs
                new = f'{places} {new}'
            yield new
            if i % 20 == 0:
                words = new.split(' ')
                words[rng.randrange(len(words))] = 'something'
                yield ' '.join(words)


def write_corpus(folder: Path, megabytes: float) -> float:
    "Write JSONL files of about the size from the texts of the installed packages; returns the megabytes."
    texts, room, written = varied_texts(installed_texts(200, pages=True)), megabytes * 1e6, 0
    numbers = count()
    while written < room:
        number = next(numbers)
        with open(folder / f'{number:04}.jsonl', 'wb') as file:
            while file.tell() < FILE_MB * 1e6 and written + file.tell() < room:
                file.write(json.dumps(dict(text=next(texts), source='bench')).encode() + b'\n')
            written += file.tell()
    return written / 1e6


def one_run(files: str, runs: str, changes: dict) -> dict:
    "A run of the stage: CPU seconds, peak memory of the largest process in MB, and what was published."
    import resource

    os.environ['K2LAB_LAB_RUNS_PATH'] = runs
    from k2lab.lab.job import start
    from k2lab.prepare_corpus import prepare_corpora

    sources = [dict(files=files, licence='unknown')]
    job = start('prepare_corpus', 'nano', None, CHANGES | dict(sources=sources) | changes, 'bench')
    began = time.process_time()
    prepare_corpora(job)
    seconds = time.process_time() - began
    job.finish()
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    card = json.loads((job.folder / 'card.json').read_text())
    return dict(
        cpu_s=round(seconds + usage[1].ru_utime + usage[1].ru_stime, 1),
        peak_mb=round(max(one.ru_maxrss for one in usage) / 1024),
        sha256={entry['name']: entry['sha256'] for entry in card['corpora']},
        documents=card['corpora'][0]['documents'],
    )


def volume(megabytes: float = 200, rounds: int = 2):
    "Print CPU seconds and peak memory of the stage on a corpus of this size, made from installed packages."
    with tempfile.TemporaryDirectory() as folder:
        corpus, runs = Path(folder, 'corpus'), str(Path(folder, 'runs'))
        corpus.mkdir()
        size = in_new_process(write_corpus, corpus, megabytes)
        print(f'{size:.0f} MB in {len([*corpus.iterdir()])} files')
        for _ in range(rounds):
            held = dict(heldout_percent=100 * HELD_MB / size)
            one = in_new_process(one_run, f'{corpus}/*.jsonl', runs, held)
            print(
                f'{one["cpu_s"]} CPU s, {size / one["cpu_s"]:.1f} MB/s, peak {one["peak_mb"]} MB',
                one,
            )
