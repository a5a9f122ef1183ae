"""Other tools at the work that `python -m k2lab.bench` measures, each as its own documents show it.

`python peers.py NAME corpus.jsonl [evaluation.json]`, in an environment that has the tool, prints one
line of JSON: CPU seconds (imports excluded) and the numbers of the rows kept. This file imports
nothing of the lab, so that it runs where only the peer is installed."""

import glob
import gzip
import json
import os
import resource
import sys
import tempfile
from typing import Any


def cpu() -> float:
    "CPU seconds of this process and its children so far."
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rows(path: str) -> list[dict]:
    "Rows of a JSONL file."
    with open(path, encoding='utf-8') as lines:
        return [json.loads(line) for line in lines]


def datatrove_kept(folder: str) -> list[int]:
    "Numbers of the rows that datatrove wrote; its writer leaves out an id that is 0."
    kept = []
    for path in glob.glob(f'{folder}/*.jsonl.gz'):
        with gzip.open(path, 'rt', encoding='utf-8') as lines:
            kept += [int(json.loads(line).get('id', 0)) for line in lines]
    return sorted(kept)


def datatrove_reader(path: str):
    "datatrove's reader of one JSONL file."
    from datatrove.pipeline.readers import JsonlReader

    return JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path))


def run_stages(stages: list[tuple[list, int]], folder: str) -> float:
    "CPU seconds of datatrove's local executor for (blocks, number of tasks), one after another."
    from datatrove.executor import LocalPipelineExecutor

    began = cpu()
    for i, (steps, tasks) in enumerate(stages):
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=1, logging_dir=f'{folder}/log{i}', skip_completed=False
        ).run()
    return cpu() - began


def minhash_stages(reader, writers: list, folder: str) -> list[tuple[list, int]]:
    "datatrove's near-deduplication in four stages, with its defaults: 5-grams, 14 x 8."
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    config, signatures, buckets = MinhashConfig(), f'{folder}/s', f'{folder}/b'
    MinhashDedupSignature(f'{folder}/warm').word_tokenizer.word_tokenize('loads the tokenizer')
    return [
        ([reader, MinhashDedupSignature(signatures, config)], 1),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], 14),
        ([MinhashDedupCluster(buckets, f'{folder}/r', config=config)], 1),
        ([reader, MinhashDedupFilter(f'{folder}/r'), *writers], 1),
    ]


def datatrove(path: str):
    "Near-deduplication with datatrove's defaults."
    from datatrove.pipeline.writers import JsonlWriter

    with tempfile.TemporaryDirectory() as at:
        stages = minhash_stages(datatrove_reader(path), [JsonlWriter(f'{at}/out')], at)
        return run_stages(stages, at), datatrove_kept(f'{at}/out')


def count_lines(pattern: str) -> int:
    "Lines of all files that match a pattern."
    count = 0
    for path in glob.glob(pattern):
        with open(path, 'rb') as lines:
            count += sum(1 for _ in lines)
    return count


def datatrove_copy(path: str):
    "JSON lines in, JSON lines out, without compression and with nothing in between."
    from datatrove.pipeline.writers import JsonlWriter

    with tempfile.TemporaryDirectory() as at:
        steps = [datatrove_reader(path), JsonlWriter(f'{at}/out', compression=None)]
        seconds = run_stages([(steps, 1)], at)
        return seconds, list(range(count_lines(f'{at}/out/*')))


def datatrove_pii(path: str):
    "datatrove's formatter for mail and IPv4 addresses, on texts in memory."
    from datatrove.pipeline.formatters import PIIFormatter

    step, texts = PIIFormatter(), [row['text'] for row in rows(path)]
    began = cpu()
    changed = [i for i, text in enumerate(texts) if step.format(text) != text]
    return cpu() - began, changed


def split_words_at_spaces():
    "Make datatrove's filters take what stands between white space as words."
    from datatrove.pipeline.filters import (
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language: text.split()


def datatrove_quality(path: str, split: bool = False):
    "The filters of Gopher and FineWeb in FineWeb's order, on texts in memory; `split` splits words at white space."
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    if split:
        split_words_at_spaces()
    fineweb = FineWebQualityFilter(char_duplicates_ratio=0.1)
    steps = [GopherRepetitionFilter(), GopherQualityFilter(), fineweb]
    documents = [Document(row['text'], row['id']) for row in rows(path)]
    for step in steps:
        step.filter(Document('loads the tokenizer', ''))
    passes = lambda document: all(step.filter(document) is True for step in steps)
    began = cpu()
    kept = [i for i, document in enumerate(documents) if passes(document)]
    return cpu() - began, kept


def datatrove_c4(path: str):
    "The filter of C4, on texts in memory."
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter

    step, documents = C4QualityFilter(), [Document(row['text'], row['id']) for row in rows(path)]
    step.filter(Document('He loads the tokenizer.', ''))
    began = cpu()
    kept = [i for i, document in enumerate(documents) if step.filter(document) is True]
    return cpu() - began, kept


def exam_filter(at: str, exam: str):
    "datatrove's filter by 13-grams of evaluation texts; its index is written here: the indexer needs lighteval."
    import numpy as np
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.text import ngrams, simplify_text

    os.mkdir(f'{at}/index')
    step = NGramsDecontFilter(f'{at}/index', NGramsDecontConfig(n_grams=13))
    split = lambda text: step.tokenizer.word_tokenize(simplify_text(text, step.config.norm_config))
    with open(exam) as file:
        runs = [' '.join(run) for text in json.load(file) for run in ngrams(split(text), 13)]
    hashes = list({step.hash_func(run) for run in runs})
    np.array(hashes, step.config.hash_config.np_descr).tofile(f'{at}/index/exam.index.hashes')
    return step


def datatrove_decontaminate(path: str, exam: str):
    "Decontamination by 13-grams."
    from datatrove.pipeline.writers import JsonlWriter

    with tempfile.TemporaryDirectory() as at:
        steps = [datatrove_reader(path), exam_filter(at, exam), JsonlWriter(f'{at}/out')]
        return run_stages([(steps, 1)], at), datatrove_kept(f'{at}/out')


def split_at_spaces():
    "Make all of datatrove split words at white space; its own tokenizer takes most of its time."
    from datatrove.utils import word_tokenizers

    split_words_at_spaces()
    word_tokenizers.SpaCyTokenizer.word_tokenize = lambda self, text: text.split()


def cleaning_steps(path: str, exam: str, at: str) -> list:
    "datatrove's blocks before deduplication: Gopher's filters, private data, decontamination."
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.writers import JsonlWriter

    exam_filter(at, exam)
    return [
        datatrove_reader(path),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        PIIFormatter(),
        NGramsDecontFilter(f'{at}/index', NGramsDecontConfig(n_grams=13)),
        JsonlWriter(f'{at}/clean', compression=None),
    ]


def datatrove_chain(path: str, exam: str, tokenizer: str, split: bool = False):
    "From JSON lines to a corpus and its tokens, with datatrove's defaults; `split`: words are split at white space."
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    if split:
        split_at_spaces()
    with tempfile.TemporaryDirectory() as at:
        clean = cleaning_steps(path, exam, at)
        writers = [
            JsonlWriter(f'{at}/out', compression=None),
            DocumentTokenizer(f'{at}/tokens', tokenizer, shuffle_documents=False),
        ]
        stages = [(clean, 1), *minhash_stages(JsonlReader(f'{at}/clean'), writers, at)]
        seconds = run_stages(stages, at)
        outputs = glob.glob(f'{at}/out/*.jsonl')
        return seconds, [row.get('id') for out in outputs for row in rows(out)]


def datasketch(path: str):
    "MinHash and LSH with 112 permutations in 14 x 8; the rows of a bucket are joined, the first stays."
    import re

    from datasketch import MinHash, MinHashLSH

    began, lsh, kept = cpu(), MinHashLSH(num_perm=112, params=(14, 8)), []
    for i, row in enumerate(rows(path)):
        words, sketch = re.findall(r'\w+', row['text'].lower()), MinHash(112)
        sketch.update_batch([' '.join(words[j : j + 5]).encode() for j in range(len(words) - 4)])
        if len(words) < 5 or not lsh.query(sketch):
            kept.append(i)
        if len(words) >= 5:
            lsh.insert(i, sketch)
    return cpu() - began, kept


def text_dedup_config(path: str, folder: str, verified: bool):
    "text-dedup's configuration with the same numbers as the others, in one process."
    from text_dedup.config.algorithms.minhash import MinHashAlgorithmConfig
    from text_dedup.config.base import Config
    from text_dedup.config.debug import DebugConfig
    from text_dedup.config.io import LocalInputConfig, OutputConfig

    algorithm = MinHashAlgorithmConfig(
        algorithm_name='minhash',
        text_column='text',
        num_perm=112,
        bands=14,
        rows=8,
        ngram_size=5,
        threshold=0.7,
        check_false_positive=verified,
        num_proc=1,
    )
    arguments = dict(path='json', data_files=path, split='train', cache_dir=f'{folder}/cache')
    return Config.model_construct(
        input=LocalInputConfig(file_type='json', read_arguments=arguments),
        algorithm=algorithm,
        output=OutputConfig(output_dir=f'{folder}/out'),
        debug=DebugConfig(),
    )


def text_dedup(path: str, verified: bool = False):
    "text-dedup's minhash.main."
    import datasets
    from text_dedup.minhash import main

    with tempfile.TemporaryDirectory() as at:
        config = text_dedup_config(path, at, verified)
        began = cpu()
        main(config)
        kept: Any = datasets.load_from_disk(f'{at}/out')['id']
        return cpu() - began, sorted(int(i) for i in kept)


PEERS = {
    'datatrove': datatrove,
    'datatrove_copy': datatrove_copy,
    'datatrove_pii': datatrove_pii,
    'datatrove_quality': datatrove_quality,
    'datatrove_quality_split': lambda path: datatrove_quality(path, split=True),
    'datatrove_c4': datatrove_c4,
    'datatrove_decontaminate': datatrove_decontaminate,
    'datatrove_chain': datatrove_chain,
    'datatrove_chain_split': lambda *arguments: datatrove_chain(*arguments, split=True),
    'datasketch': datasketch,
    'text_dedup': text_dedup,
    'text_dedup_verified': lambda path: text_dedup(path, verified=True),
}

if __name__ == '__main__':
    name, *arguments = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr
    seconds, kept = PEERS[name](*arguments)
    json.dump(dict(seconds=seconds, kept=kept), out)
