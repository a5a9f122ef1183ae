"""The shape of the repository: one name in five places, small functions, cheap imports, minimum shares."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    'lab',
    'text',
    'corpus',
    'tasks',
    'models',
    'training',
    'serving',
    'scale',
    'reports',
]  # each imports only from those before it
STAGES = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
NOTEBOOKS = [*(p for room in ROOMS for p in sorted((ROOT / 'nbs' / room).glob('*.ipynb'))), *STAGES]
MODULES = sorted(p for p in (ROOT / 'k2lab').rglob('*.py') if p.name != '_modidx.py')
# written by hand; every other module is exported by a notebook
PLAIN = {
    '__main__',
    'corpus.kernels',
    'corpus.formulas',
    'corpus.signals',
    'tasks.jail',
    'tasks.sandbox',
    'lab.slurm',
    'models.mla',
    'models.packed',
    'serving.drafts',
    'serving.engine',
    'serving.protocol',
    'serving.responses',
    'serving.server',
    'text.typescript',
    'training.muon',
    *(f'cli.{p.stem}' for p in (ROOT / 'k2lab' / 'cli').glob('[!_]*.py')),
    *(
        f'bench.{name}'
        for name in (
            '__main__',
            'chain',
            'corpus',
            'harness',
            'peers',
            'plan',
            'privacy',
            'quality',
            'readers',
            'runner',
            'scores',
            'sharded',
            'tokens',
            'training',
            'volume',
        )
    ),
}


def name_of(path: Path) -> str:
    "`nbs/30_train_sft_domain.ipynb` -> `train_sft_domain`, `nbs/lab/00_config.ipynb` -> `lab.config`."
    name = re.sub(r'^\d+_', '', path.stem)
    return name if path.parent.name == 'nbs' else f'{path.parent.name}.{name}'


def module_of(path: Path) -> str:
    "`k2lab/lab/config.py` -> `lab.config`."
    return '.'.join(path.relative_to(ROOT / 'k2lab').with_suffix('').parts)


def cells(path: Path, kind: str = 'code') -> list:
    "The cells of a notebook."
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def source(cell: dict) -> str:
    return ''.join(cell['source'])


def by_name(paths):
    return pytest.mark.parametrize('path', paths, ids=lambda p: p.stem)


@by_name(STAGES)
def test_a_stage_has_its_five_places(path):
    stage = name_of(path)
    assert (ROOT / 'k2lab' / f'{stage}.py').exists() and (
        ROOT / 'configs' / f'{stage}.yaml'
    ).exists()
    text = (ROOT / 'k2lab' / f'{stage}.py').read_text()
    assert re.search(r'^class Config\b', text, re.M) and re.search(
        r'^(work\s*=|def work\()', text, re.M
    )
    assert any(f"start('{stage}', scale, run, changes" in source(c) for c in cells(path))


@by_name(STAGES)
def test_a_stage_notebook_has_one_parameters_cell_that_survives_cleaning(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    names = {
        t.id for node in ast.parse(source(tagged[0])).body for t in getattr(node, 'targets', [])
    }
    assert names == {'scale', 'run', 'changes'} and "scale = 'smoke'" in source(tagged[0])


@by_name(NOTEBOOKS)
def test_a_notebook_starts_with_its_title(path):
    title = next((source(c) for c in cells(path, 'markdown')), '')
    assert title.startswith('# ') and '\n>' in title


def rank(module: str) -> int:
    "The place of a module in the order of the rooms: stages after all rooms, the command and the benchmarks last."
    room, _, name = module.partition('.')
    if room in ROOMS and name:
        return ROOMS.index(room)
    return len(ROOMS) + (room in ('cli', 'bench', '__main__'))


def imports(path: Path) -> set:
    "The modules of the package that a module imports anywhere, or names in a string (`'k2lab.corpus.units:keep'`)."
    here, text, found = module_of(path).split('.'), path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith('k2lab.')}
        elif isinstance(node, ast.ImportFrom):
            start = ['k2lab', *here[: len(here) - node.level]] if node.level else []
            parent = '.'.join([*start, *([node.module] if node.module else [])])
            found |= {parent, *(f'{parent}.{a.name}' for a in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r'^(k2lab\.[a-z_.]+?)(?::\w+)?$', node.value))
    known = {f'k2lab.{module_of(p)}' for p in MODULES if p.name != '__init__.py'}
    return {name.removeprefix('k2lab.') for name in found & known} - {'.'.join(here)}


GRAPH = {module_of(p): imports(p) for p in MODULES if p.name != '__init__.py'}


def upward(graph: dict) -> list:
    "The imports that run against the order of the rooms."
    return sorted((a, b) for a, used in graph.items() for b in used if rank(b) > rank(a))


def circle(graph: dict) -> list:
    "Modules that import each other in a circle, or an empty list."
    left = dict(graph)
    while left:
        free = [m for m, used in left.items() if not used & left.keys()]
        if not free:
            return sorted(left)
        for m in free:
            del left[m]
    return []


def test_rooms_import_only_from_rooms_before_them():
    assert upward(GRAPH) == []
    assert upward({'lab.names': {'models.load'}, 'tasks.stats': {'lab.config'}}) == [
        ('lab.names', 'models.load')
    ]


def test_no_module_imports_itself_in_a_circle():
    assert circle(GRAPH) == []
    assert circle({'lab.job': {'lab.slurm'}, 'lab.slurm': {'lab.job'}, 'lab.config': set()}) == [
        'lab.job',
        'lab.slurm',
    ]


def test_imports_by_name_are_seen():
    assert 'corpus.units' in GRAPH['corpus.pipeline'] and 'lab.slurm' in GRAPH['lab.launch']
    assert 'serving.server' in GRAPH['launch_teacher_vllm']  # started by `python -m`


def test_the_front_door_and_the_size_of_rooms():
    top = {p.name for p in (ROOT / 'nbs').glob('*.ipynb')}
    assert top == {'index.ipynb', *(p.name for p in STAGES)} and len(STAGES) == 12
    assert {
        p.name for p in (ROOT / 'nbs').iterdir() if p.is_dir() and not p.name.startswith(('.', '_'))
    } <= {*ROOMS, 'guides'}
    for folder in (ROOT / 'k2lab').iterdir():
        if folder.is_dir():
            assert len([p for p in folder.glob('*.py') if p.name != '__init__.py']) <= 15, (
                folder.name
            )


def test_a_lower_number_never_imports_a_higher_one():
    number = {name_of(p): p.stem for p in NOTEBOOKS if p not in STAGES}
    assert not [
        (m, e)
        for m in number
        for e in GRAPH[m] & number.keys()
        if m.split('.')[0] == e.split('.')[0] and number[e] >= number[m]
    ]


def test_stage_files_resolve_at_every_scale():
    from k2lab.lab.config import SCALES, load_env, resolve
    from k2lab.lab.job import stage_module

    for scale in SCALES:
        assert load_env(scale)['models']
        for path in STAGES:
            resolve(stage_module(name_of(path)).Config, name_of(path), scale)


def test_the_pipeline_names_stages_that_exist():
    from k2lab.cli.running import resolved_config
    from k2lab.cli.steps import steps_of

    if {
        s['stage']
        for s in __import__('yaml').safe_load((ROOT / 'configs/pipeline.yaml').read_text())['steps']
    } - {name_of(p) for p in STAGES}:
        pytest.skip('not every stage is there yet')
    for scale in ('smoke', 'nano'):
        for step in steps_of(None, None):
            resolved_config(step.stage, scale, step.changes)


def test_every_config_belongs_to_something():
    known = {name_of(p) for p in STAGES} | {'env', 'pipeline', 'slurm'}
    assert {p.stem for p in (ROOT / 'configs').glob('*.yaml')} <= known


def exported() -> set:
    "The modules that notebooks say they export to."
    firsts = (
        re.search(r'^#\| *default_exp (\S+)', source(c), re.M)
        for p in NOTEBOOKS
        for c in cells(p)[:1]
    )
    return {m[1] for m in firsts if m}


def test_every_module_is_exported_or_plain():
    assert exported() == {name_of(p) for p in NOTEBOOKS}  # a notebook's name is its module's
    assert set(GRAPH) == exported() | PLAIN


def test_settings_ini_is_the_labs_own():
    from k2lab.lab.config import SETTINGS

    ini = configparser.ConfigParser()
    ini.read(ROOT / 'settings.ini')
    assert {(s, k) for s in ini.sections() for k in ini[s]} <= {
        (s, k) for s in SETTINGS for k in SETTINGS[s]
    }
    nbdev = {
        'lib_path',
        'lib_name',
        'doc_path',
        'tst_flags',
        'black_formatting',
        'jupyter_hooks',
        'repo',
        'user',
        'branch',
        'version',
        'recursive',
        'cell_timeout_min',
    }
    assert not nbdev & {k for s in ini.sections() for k in ini[s]}


@by_name(STAGES)
def test_help_tells_the_meaning_of_every_field(path):
    from k2lab.cli.help import stage_help

    lines = stage_help(name_of(path)).split('\n\n')[-1].splitlines()[1:]
    listed = [line for line in lines if re.match(r'  \S', line)]  # not the rest of a long cell
    assert listed and all(len(re.split('  +', line.strip())) >= 2 for line in listed)
    meaning = {
        re.split('  +', line.strip())[0]: re.split('  +', line.strip())[1] for line in listed
    }
    assert not [
        name for name, text in meaning.items() if len(text) < 6 or text.startswith(('{', '['))
    ], meaning


HEAVY = {
    'torch',
    'transformers',
    'trl',
    'datasets',
    'pandas',
    'matplotlib',
    'papermill',
    'peft',
    'accelerate',
    'numpy',
}
LIGHT = sorted(
    {f'k2lab.{m}' for m in GRAPH}
    - {
        'k2lab.__main__',
        'k2lab.bench.__main__',
        'k2lab.bench.peers',
        'k2lab.corpus.kernels',
        'k2lab.corpus.signals',
        'k2lab.models.packed',
        'k2lab.training.muon',
    }
)


def heavy_imports(statements: list) -> dict:
    "What each statement brings in of `HEAVY`, one after the other in one process; {} when nothing does."
    code = f"""import sys, contextlib, io, json
found, seen = {{}}, set()
for one in {statements!r}:
    with contextlib.redirect_stdout(io.StringIO()): exec(one)
    new = {HEAVY!r} & set(sys.modules) - seen
    if new: found[one] = sorted(new)
    seen |= new
print(json.dumps(found))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout.splitlines()[-1])


def test_imports_cost_nothing():
    assert (
        heavy_imports(
            [
                'import k2lab',
                *(f'import {m}' for m in LIGHT),
                "from k2lab.cli import main; main(['--help'])",
            ]
        )
        == {}
    )
    assert heavy_imports(['import json', 'import numpy']) == {'import numpy': ['numpy']}


def functions():
    "Every function of the package as `(where, lines)`."
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f'{path.stem}.{node.name}', node.end_lineno - node.lineno + 1


def test_functions_stay_small():
    "At the width of `ruff format`, 100; lines are not saved by making them long."
    found = dict(functions())
    lengths = sorted(found.values())
    assert median(lengths) <= 10 and lengths[int(0.9 * len(lengths))] <= 24
    assert {name: n for name, n in found.items() if n > 78} == {}


def test_public_functions_say_what_they_return():
    silent = [
        f'{p.stem}.{node.name}'
        for p in MODULES
        for node in ast.parse(p.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith('_')
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_path_of_one_machine_and_no_unsafe_yaml():
    kept = [
        p
        for d in ('nbs', 'k2lab', 'configs', 'tests', '.')
        for p in (ROOT / d).glob('*' if d == '.' else '**/*')
        if p.suffix in ('.py', '.ipynb', '.yaml', '.md', '.toml', '.ini')
        and p.is_file()
        and p != Path(__file__).resolve()
    ]
    assert len(kept) > 10
    for path in kept:
        text = path.read_text()
        assert not re.search(
            rf'(/home/\w+/|/Users/\w+/|/tmp/\w+/|{re.escape(str(Path.home()))}/|{re.escape(str(ROOT))}\b)',
            text,
        ), path
        assert not re.search(
            r'yaml\.(unsafe_load|full_load)|Loader=yaml\.(Unsafe|Full)?Loader', text
        ), path


@pytest.mark.parametrize('path', STAGES, ids=lambda path: path.stem)
def test_a_run_needs_nothing_from_the_cells_above_it(path, tmp_path):
    "papermill executes the cells from `parameters` on; a name defined above them is not there."
    cells = json.loads(path.read_text())['cells']
    first = next(i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', []))
    code = [''.join(c['source']) for c in cells[first:] if c['cell_type'] == 'code']
    (tmp_path / 'tail.py').write_text('\n'.join(code))
    ruff = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'F821', 'tail.py']
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
