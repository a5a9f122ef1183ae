"""The shape of the repository: one name in five places, floors that are kept, functions that stay small, imports that cost nothing."""
import ast, configparser, json, re, subprocess, sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
STAGES = [p for p in NOTEBOOKS if int(p.name[:2]) >= 10]
MODULES = sorted(p for p in (ROOT/'k2lab').rglob('*.py') if p.name != '_modidx.py')
PLAIN = {'__init__', '__main__', 'bench', 'cli', 'kernels', 'mla', 'muon', 'peers', 'sandbox', 'server', 'signals', 'slurm', '_modidx'}      # written by hand; everything else is exported


def name_of(path:Path) -> str:
    "`30_train_sft_domain.ipynb` -> `train_sft_domain`."
    return re.sub(r'^\d+[a-z]?_', '', path.stem)


def cells(path:Path, kind:str='code') -> list:
    "The cells of a notebook."
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def source(cell:dict) -> str: return ''.join(cell['source'])


def by_name(paths): return pytest.mark.parametrize('path', paths, ids=lambda p: p.stem)


@by_name(STAGES)
def test_a_stage_has_its_five_places(path):
    stage = name_of(path)
    assert (ROOT/'k2lab'/f'{stage}.py').exists() and (ROOT/'configs'/f'{stage}.yaml').exists()
    text = (ROOT/'k2lab'/f'{stage}.py').read_text()
    assert re.search(r'^class Config\b', text, re.M) and re.search(r'^(work\s*=|def work\()', text, re.M)
    assert any(f"start('{stage}', scale, run, changes" in source(c) for c in cells(path))


@by_name(STAGES)
def test_a_stage_notebook_has_one_parameters_cell_that_survives_cleaning(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    names = {t.id for node in ast.parse(source(tagged[0])).body for t in getattr(node, 'targets', [])}
    assert names == {'scale', 'run', 'changes'} and "scale = 'smoke'" in source(tagged[0])


@by_name(NOTEBOOKS)
def test_a_notebook_starts_with_its_title(path):
    title = next((source(c) for c in cells(path, 'markdown')), '')
    assert title.startswith('# ') and '\n>' in title


@by_name(NOTEBOOKS)
def test_a_lower_number_never_imports_a_higher_one(path):
    order = {name_of(p): p.stem for p in NOTEBOOKS}
    exported = '\n'.join(source(c) for c in cells(path) if re.search(r'^#\| *export', source(c), re.M))
    used = set(re.findall(r'(?:from|import) k2lab\.(\w+)', exported)) | set(re.findall(r"import_module\('k2lab\.(\w+)'\)", exported))
    late = {m for m in used if m in order and order[m] >= path.stem}
    assert late <= {'model'} if path.stem == '01_job' else not late      # smoke:k2 is opened lazily, by name


def test_stage_files_resolve_at_every_scale():
    from k2lab.core import SCALES, load_env, resolve
    from k2lab.run import stage_module
    for scale in SCALES:
        assert load_env(scale)['models']
        for path in STAGES: resolve(stage_module(name_of(path)).Config, name_of(path), scale)


def test_the_pipeline_names_stages_that_exist():
    from k2lab.cli import steps_of, told
    if {s['stage'] for s in __import__('yaml').safe_load((ROOT/'configs/pipeline.yaml').read_text())['steps']} - {name_of(p) for p in STAGES}:
        pytest.skip('not every stage is there yet')
    for scale in ('smoke', 'nano'):
        for step in steps_of(None, None): told(step['stage'], scale, step['changes'])


def test_every_config_belongs_to_something():
    known = {name_of(p) for p in STAGES} | {'env', 'pipeline', 'slurm'}
    assert {p.stem for p in (ROOT/'configs').glob('*.yaml')} <= known


def test_every_module_is_exported_or_plain():
    assert {p.stem for p in (ROOT/'k2lab').glob('*.py')} <= {name_of(p) for p in NOTEBOOKS} | PLAIN


def test_settings_ini_is_the_labs_own():
    from k2lab.core import SETTINGS
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    assert {(s, k) for s in ini.sections() for k in ini[s]} <= {(s, k) for s in SETTINGS for k in SETTINGS[s]}
    nbdev = {'lib_path', 'lib_name', 'doc_path', 'tst_flags', 'black_formatting', 'jupyter_hooks', 'repo', 'user', 'branch', 'version', 'recursive', 'cell_timeout_min'}
    assert not nbdev & {k for s in ini.sections() for k in ini[s]}


@by_name(STAGES)
def test_help_tells_the_meaning_of_every_field(path):
    from k2lab.cli import stage_help
    listed = stage_help(name_of(path)).split('\n\n')[-1].splitlines()[1:]
    assert listed and all(len(re.split('  +', line.strip())) >= 2 for line in listed)
    meaning = {re.split('  +', line.strip())[0]: re.split('  +', line.strip())[1] for line in listed}
    assert not [name for name, text in meaning.items() if len(text) < 6 or text.startswith(('{', '['))], meaning


@pytest.mark.parametrize('what', ['import k2lab', 'import k2lab.core, k2lab.run, k2lab.cli', "from k2lab.cli import main; main(['--help'])",
                                  *(f'import k2lab.{name_of(p)}' for p in NOTEBOOKS)])
def test_imports_cost_nothing(what):
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'pandas', 'matplotlib', 'papermill', 'peft', 'accelerate', 'numpy'}"
    done = subprocess.run([sys.executable, '-c', f'import sys; {what}; print(sorted({heavy} & set(sys.modules)))'], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith('[]'), done.stdout[-300:] + done.stderr[-300:]


def functions():
    "Every function of the package as `(where, lines)`."
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef|ast.AsyncFunctionDef): yield f'{path.stem}.{node.name}', node.end_lineno - node.lineno + 1


def test_functions_stay_small():
    found = dict(functions())
    assert median(found.values()) <= 8
    assert {name: n for name, n in found.items() if n > 40} == {}


def test_public_functions_say_what_they_return():
    silent = [f'{p.stem}.{node.name}' for p in MODULES for node in ast.parse(p.read_text()).body
              if isinstance(node, ast.FunctionDef|ast.ClassDef) and not node.name.startswith('_') and not ast.get_docstring(node)]
    assert silent == []


def test_no_path_of_one_machine_and_no_unsafe_yaml():
    kept = [p for d in ('nbs', 'k2lab', 'configs', 'tests', '.') for p in (ROOT/d).glob('*' if d == '.' else '**/*')
            if p.suffix in ('.py', '.ipynb', '.yaml', '.md', '.toml', '.ini') and p.is_file() and p != Path(__file__).resolve()]
    assert len(kept) > 10
    for path in kept:
        text = path.read_text()
        assert not re.search(rf'(/home/\w+/|/Users/\w+/|/tmp/\w+/|{re.escape(str(Path.home()))}/|{re.escape(str(ROOT))}\b)', text), path
        assert not re.search(r'yaml\.(unsafe_load|full_load)|Loader=yaml\.(Unsafe|Full)?Loader', text), path
