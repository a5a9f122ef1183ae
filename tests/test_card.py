"""The card of a corpus: what the hub and Croissant's own tools make of it, and what hostile text in it cannot do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from k2lab.corpus.card import (
    card_report,
    count_charts,
    front_matter,
    funnel_chart,
    histogram_charts,
    hub_licence,
    mixture_chart,
    write_card_pages,
)
from k2lab.lab.config import LabError

HOSTILE = '<script>alert(1)</script> | ``` \n---\n# Title {{x}} : & "quoted" \u4f60\u597d [a](b)'


def entry(name='domain', **more) -> dict:
    return dict(
        dict(
            name=name,
            documents=2,
            bytes=30,
            format='domain',
            licence='MIT',
            origin='notes',
            sha256='',
            file=f'{name}.jsonl',
            removed={},
            sources={},
            steps=[],
        ),
        **more,
    )


def step(name, rows_in, rows_out, **more):
    return dict(
        dict(
            step=name,
            rows_in=rows_in,
            rows_out=rows_out,
            removed={'why': rows_in - rows_out} if rows_in > rows_out else {},
        ),
        **more,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    "A run's folder with two files and a card full of hostile text."
    import hashlib

    rows = [dict(text=HOSTILE, source='notes'), dict(text='two', source='notes')]
    corpora = [
        entry(
            'domain',
            sources={HOSTILE: dict(documents=2, bytes=30, licence='MIT')},
            samples={'kept': [HOSTILE], HOSTILE: [HOSTILE]},
            steps=[step(HOSTILE, 5, 2, redacted={'EMAIL': 3})],
        ),
        entry('general', origin=HOSTILE),
    ]
    for e in corpora:
        data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
        (tmp_path / e['file']).write_bytes(data)
        e['sha256'] = hashlib.sha256(data).hexdigest()
    (tmp_path / 'card.json').write_text(json.dumps(dict(mode='domain', corpora=corpora)))
    (tmp_path / 'run.json').write_text(
        json.dumps(
            dict(
                campaign='c: "1"',
                stage='prepare_corpus',
                seed=0,
                started='2026-11-25T09:46:39+00:00',
                code=dict(commit='abc'),
            )
        )
    )
    write_card_pages(tmp_path)
    return tmp_path


def test_croissants_own_tool_finds_no_fault_and_reads_the_rows(folder, caplog):
    mlc = pytest.importorskip('mlcroissant', reason='mlcroissant is not installed')
    dataset = mlc.Dataset(str(folder / 'croissant.json'))
    told = str(dataset.metadata.issues.report()) if hasattr(dataset.metadata, 'issues') else ''
    assert dataset.metadata.ctx.is_v1_1() and not dataset.metadata.ctx.issues.errors, told
    assert not [w for w in dataset.metadata.ctx.issues.warnings if 'citeAs' not in w], (
        dataset.metadata.ctx.issues.warnings
    )  # nobody is to be cited for a run
    rows = list(dataset.records('domain'))
    assert len(rows) == 2 and rows[0]['domain/text'].decode() == HOSTILE


def test_the_hub_reads_the_front_matter(folder):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(folder / 'README.md')
    told = card.data.to_dict()
    assert (
        told['license'] == 'mit'
        and told['size_categories'] == ['n<1K']
        and told['configs']
        == [
            dict(config_name='domain', data_files='domain.jsonl'),
            dict(config_name='general', data_files='general.jsonl'),
        ]
    )
    assert (
        told['dataset_info'][0]['features']
        == [dict(name='text', dtype='string'), dict(name='source', dtype='string')]
        and told['pretty_name'] == 'domain corpus of c: "1"'
    )
    assert (folder / 'README.md').read_text().count('\n---\n') == 1


def test_text_from_documents_stays_text(folder):
    page = (folder / 'README.md').read_text().split('\n---\n')[1]
    assert '<script>' not in page and '```' not in page and '\n# Title' not in page
    for line in page.splitlines():
        if line.startswith('|'):
            assert len(re.findall(r'(?<!\\)\|', line)) in (3, 5, 7), line
    shown = card_report(json.loads((folder / 'card.json').read_text()))
    assert '<script>' not in shown and shown.count('<section>') == 1


def test_licences_by_hand():
    assert hub_licence(['MIT']) == dict(license='mit')
    assert hub_licence(['MIT AND CC-BY-4.0', 'MIT']) == dict(license=['cc-by-4.0', 'mit'])
    assert hub_licence(['MIT', 'BSD License']) == dict(
        license='other', license_name='BSD License AND MIT'
    )


@pytest.mark.parametrize(
    'n,label',
    [(0, 'n<1K'), (999, 'n<1K'), (1000, '1K<n<10K'), (10**6, '1M<n<10M'), (10**13, 'n>1T')],
)
def test_sizes_by_hand(n, label):
    assert front_matter(dict(corpora=[entry(documents=n)]), 'x')['size_categories'] == [label]


def test_what_is_unknown_is_not_drawn():
    old = entry(
        steps=[step('normalise', 3, 3)], sources={'a': dict(documents=2, bytes=30, licence='MIT')}
    )
    assert [
        draw(old) for draw in (funnel_chart, histogram_charts, count_charts, mixture_chart)
    ] == [None] * 4
    assert (
        '<figure' not in card_report(dict(corpora=[old]))
        and card_report(dict(corpora=[entry()])) == ''
    )


def test_pictures_say_what_they_show():
    one = entry(
        steps=[
            step('quality', 10, 8, bytes_in=90, bytes_out=50),
            step(
                'near dedup',
                8,
                5,
                bytes_in=50,
                bytes_out=40,
                clusters={str(n): 1 for n in range(2, 12)},
            ),
        ],
        sources={
            'a': dict(documents=3, bytes=30, licence='MIT', asked=0.5),
            'b': dict(documents=1, bytes=10, licence='MIT', asked=0.5),
        },
    )
    assert repr(funnel_chart(one)) == 'domain: all 10 -> quality 8 -> near dedup 5'
    assert repr(count_charts(one)) == (
        'domain: near dedup: clusters by size: 2 documents 1, 3 documents 1, 4 documents '
        '1, 5 documents 1, 6 documents 1, 7 documents 1, 8 to 11 4'
    )
    assert repr(mixture_chart(one)) == 'domain: a 75.0%, b 25.0% of the documents'


def test_a_card_without_its_file_is_refused(folder):
    (folder / 'general.jsonl').unlink()
    with pytest.raises(LabError, match='general.jsonl is not there'):
        write_card_pages(folder)


def test_a_stage_leaves_both_pages_and_they_hold(tmp_path, monkeypatch):
    from k2lab import prepare_corpus
    from k2lab.lab.job import start
    from k2lab.lab.launch import launch

    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    job = start('prepare_corpus', 'smoke')
    launch(prepare_corpus.work, job)
    run = job.finish().folder
    told = json.loads((run / 'croissant.json').read_text())
    assert {one['name'] for one in told['distribution']} == {
        f'{name}.jsonl' for name in job.record['saves']
    }
    assert all(
        one['contentSize'] == f"{(run / one['name']).stat().st_size} B"
        for one in told['distribution']
    )
    assert (
        yaml.safe_load((run / 'README.md').read_text().split('---')[1])['license'] == 'bsd-3-clause'
    )
    mlc = pytest.importorskip('mlcroissant', reason='mlcroissant is not installed')
    assert len(list(mlc.Dataset(str(run / 'croissant.json')).records('domain_questions'))) == 40
