"""Other tools at the work that `python -m k2lab.bench.harness` measures, each as its own documents show it: `python peers.py NAME corpus.jsonl [evaluation.json]` in an environment that has the tool.

Prints one line of JSON: CPU seconds (imports excluded) and the numbers of the rows kept. This file imports nothing of the lab, so that it runs where only the peer is installed."""

import glob, gzip, json, os, resource, sys, tempfile


def cpu() -> float:
    "CPU seconds of this process and its children so far."
    told = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in told)


def rows(path: str) -> list:
    "Rows of a JSONL file."
    with open(path, encoding='utf-8') as lines:
        return [json.loads(line) for line in lines]


def datatrove_kept(folder: str) -> list:
    "Numbers of the rows that datatrove wrote."
    found = []
    for path in glob.glob(f'{folder}/*.jsonl.gz'):
        with gzip.open(path, 'rt', encoding='utf-8') as lines:
            found += [
                int(json.loads(line).get('id', 0)) for line in lines
            ]  # its writer leaves out an id that is 0
    return sorted(found)


def datatrove(path: str):
    "Near-deduplication in four stages, with datatrove's defaults: 5-grams, 14 x 8."
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    reader = JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path))
    with tempfile.TemporaryDirectory() as at:
        MinhashDedupSignature(f'{at}/warm').word_tokenizer.word_tokenize('loads the tokenizer')
        stages = [
            ([reader, MinhashDedupSignature(f'{at}/s', MinhashConfig())], 1),
            ([MinhashDedupBuckets(f'{at}/s', f'{at}/b', config=MinhashConfig())], 14),
            ([MinhashDedupCluster(f'{at}/b', f'{at}/r', config=MinhashConfig())], 1),
            ([reader, MinhashDedupFilter(f'{at}/r'), JsonlWriter(f'{at}/out')], 1),
        ]
        began = cpu()
        for i, (steps, tasks) in enumerate(stages):
            LocalPipelineExecutor(
                steps, tasks=tasks, workers=1, logging_dir=f'{at}/log{i}', skip_completed=False
            ).run()
        return cpu() - began, datatrove_kept(f'{at}/out')


def datatrove_copy(path: str):
    "JSON lines in, JSON lines out, nothing packed, nothing done in between."
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    with tempfile.TemporaryDirectory() as at:
        steps = [
            JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path)),
            JsonlWriter(f'{at}/out', compression=None),
        ]
        began = cpu()
        LocalPipelineExecutor(steps, logging_dir=f'{at}/log', skip_completed=False).run()
        taken = cpu() - began
        return taken, list(
            range(sum(len(open(out, 'rb').readlines()) for out in glob.glob(f'{at}/out/*')))
        )


def datatrove_pii(path: str):
    "datatrove's formatter for mail and IPv4 addresses, on texts in memory."
    from datatrove.pipeline.formatters import PIIFormatter

    step, texts = PIIFormatter(), [row['text'] for row in rows(path)]
    began = cpu()
    changed = [i for i, text in enumerate(texts) if step.format(text) != text]
    return cpu() - began, changed


def datatrove_quality(path: str, split: bool = False):
    "The filters of Gopher and FineWeb in FineWeb's order, on texts in memory; with `split`, by words that stand between white space."
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    if split:
        for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
            module.split_into_words = lambda text, language: text.split()
    steps, documents = (
        [
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            FineWebQualityFilter(char_duplicates_ratio=0.1),
        ],
        [Document(row['text'], row['id']) for row in rows(path)],
    )
    for step in steps:
        step.filter(Document('loads the tokenizer', ''))
    began = cpu()
    kept = [
        i
        for i, document in enumerate(documents)
        if all(step.filter(document) is True for step in steps)
    ]
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


def exam_index(at: str, exam: str, NGramsDecontFilter, NGramsDecontConfig):
    "datatrove's filter with an index of 13-grams of the evaluation texts. Its own indexer asks for lighteval, so the index is written here with the filter's tokenizer and hash."
    import numpy as np
    from datatrove.utils.text import ngrams, simplify_text

    os.mkdir(f'{at}/index')
    step = NGramsDecontFilter(f'{at}/index', NGramsDecontConfig(n_grams=13))
    split = lambda text: step.tokenizer.word_tokenize(simplify_text(text, step.config.norm_config))
    found = {
        step.hash_func(' '.join(run))
        for text in json.load(open(exam))
        for run in ngrams(split(text), 13)
    }
    np.array(list(found), step.config.hash_config.np_descr).tofile(f'{at}/index/exam.index.hashes')
    return step


def datatrove_decontaminate(path: str, exam: str):
    "Decontamination by 13-grams."
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    with tempfile.TemporaryDirectory() as at:
        step = exam_index(at, exam, NGramsDecontFilter, NGramsDecontConfig)
        began = cpu()
        LocalPipelineExecutor(
            [
                JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path)),
                step,
                JsonlWriter(f'{at}/out'),
            ],
            logging_dir=f'{at}/log',
            skip_completed=False,
        ).run()
        return cpu() - began, datatrove_kept(f'{at}/out')


def split_at_spaces():
    "Makes datatrove take what stands between white space for words; its own tokenizer takes most of its time."
    from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter
    from datatrove.utils import word_tokenizers

    for module in (gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, language: text.split()
    word_tokenizers.SpaCyTokenizer.word_tokenize = lambda self, text: text.split()


def datatrove_chain(path: str, exam: str, tokenizer: str, split: bool = False):
    "From JSON lines to a corpus and its tokens: Gopher's filters, private data, decontamination, near-deduplication, tokens; all with datatrove's defaults."
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    if split:
        split_at_spaces()
    with tempfile.TemporaryDirectory() as at:
        exam_index(at, exam, NGramsDecontFilter, NGramsDecontConfig)
        MinhashDedupSignature(f'{at}/warm').word_tokenizer.word_tokenize('loads the tokenizer')
        clean = [
            JsonlReader(os.path.dirname(path), glob_pattern=os.path.basename(path)),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            PIIFormatter(),
            NGramsDecontFilter(f'{at}/index', NGramsDecontConfig(n_grams=13)),
            JsonlWriter(f'{at}/clean', compression=None),
        ]
        reader = JsonlReader(f'{at}/clean')
        stages = [
            (clean, 1),
            ([reader, MinhashDedupSignature(f'{at}/s', MinhashConfig())], 1),
            ([MinhashDedupBuckets(f'{at}/s', f'{at}/b', config=MinhashConfig())], 14),
            ([MinhashDedupCluster(f'{at}/b', f'{at}/r', config=MinhashConfig())], 1),
            (
                [
                    reader,
                    MinhashDedupFilter(f'{at}/r'),
                    JsonlWriter(f'{at}/out', compression=None),
                    DocumentTokenizer(f'{at}/tokens', tokenizer, shuffle_documents=False),
                ],
                1,
            ),
        ]
        began = cpu()
        for i, (steps, tasks) in enumerate(stages):
            LocalPipelineExecutor(
                steps, tasks=tasks, workers=1, logging_dir=f'{at}/log{i}', skip_completed=False
            ).run()
        taken = cpu() - began
        return taken, [row.get('id') for out in glob.glob(f'{at}/out/*.jsonl') for row in rows(out)]


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


def text_dedup(path: str, verified: bool = False):
    "text-dedup's minhash.main with the same numbers, in one process."
    from text_dedup.config.algorithms.minhash import MinHashAlgorithmConfig
    from text_dedup.config.base import Config
    from text_dedup.config.debug import DebugConfig
    from text_dedup.config.io import LocalInputConfig, OutputConfig
    from text_dedup.minhash import main
    import datasets

    with tempfile.TemporaryDirectory() as at:
        told = MinHashAlgorithmConfig(
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
        config = Config.model_construct(
            input=LocalInputConfig(
                file_type='json',
                read_arguments=dict(
                    path='json', data_files=path, split='train', cache_dir=f'{at}/cache'
                ),
            ),
            algorithm=told,
            output=OutputConfig(output_dir=f'{at}/out'),
            debug=DebugConfig(),
        )
        began = cpu()
        main(config)
        return cpu() - began, sorted(int(i) for i in datasets.load_from_disk(f'{at}/out')['id'])


PEERS = {
    'datatrove': datatrove,
    'datatrove_copy': datatrove_copy,
    'datatrove_pii': datatrove_pii,
    'datatrove_quality': datatrove_quality,
    'datatrove_quality_split': lambda path: datatrove_quality(path, split=True),
    'datatrove_c4': datatrove_c4,
    'datatrove_decontaminate': datatrove_decontaminate,
    'datatrove_chain': datatrove_chain,
    'datatrove_chain_split': lambda *told: datatrove_chain(*told, split=True),
    'datasketch': datasketch,
    'text_dedup': text_dedup,
    'text_dedup_verified': lambda path: text_dedup(path, verified=True),
}

if __name__ == '__main__':
    name, *told = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr
    seconds, kept = PEERS[name](*told)
    json.dump(dict(seconds=seconds, kept=kept), out)
