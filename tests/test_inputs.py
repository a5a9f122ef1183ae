"prepare_corpus refuses a missing input of its mode before it reads the first document."

import pytest

from k2lab import prepare_corpus
from k2lab.lab.config import LabError
from k2lab.lab.job import start

NOWHERE = dict(files='nowhere/*.jsonl')
MISSING = dict(package='no_such_package')
DOMAIN = [
    (dict(own_rows=['nowhere.jsonl']), 'nowhere.jsonl: no such file'),
    (dict(eval_sets=dict(mine='nowhere.jsonl')), 'nowhere.jsonl: no such file'),
    (dict(tokenizer='no_such_model'), 'no_such_model'),
    (dict(sources=[]), 'no documents in an empty list of sources'),
    *(
        ({key: [source]}, message)
        for key in ('sources', 'general_sources', 'question_sources')
        for source, message in (
            (MISSING, "'no_such_package' is not installed"),
            (NOWHERE, 'nothing matches'),
            (dict(files='s3.xyz'), 'nothing matches'),
            (dict(stdlib=True, wieght=2), 'wieght'),
        )
    ),
]
REASONING = [
    (dict(own_rows=['nowhere.jsonl']), 'nowhere.jsonl: no such file'),
    (dict(eval_sets=dict(mine='nowhere.jsonl')), 'nowhere.jsonl: no such file'),
    (dict(trace_sources=[NOWHERE]), 'nothing matches'),
    (dict(trace_sources=[dict(licence='MIT')]), 'names no files'),
    (dict(trace_sources=[dict(files='a', judge='numbr')]), "did you mean 'number'"),
]


@pytest.mark.parametrize(
    'changes,message',
    [(dict(mode='domain', **changes), message) for changes, message in DOMAIN]
    + [(dict(mode='reasoning', **changes), message) for changes, message in REASONING],
)
def test_a_missing_input_is_refused_before_any_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    for name in ('refine', 'make_puzzles', 'split_functions', 'reasoning_set'):
        monkeypatch.setattr(prepare_corpus, name, lambda *a, **kw: pytest.fail('work was done'))
    job = start('prepare_corpus', 'smoke', None, changes)
    with pytest.raises(LabError) as e:
        prepare_corpus.prepare_corpora(job)
    assert message in str(e.value) and '\n' not in str(e.value)
    assert not (job.folder / 'work').exists()
