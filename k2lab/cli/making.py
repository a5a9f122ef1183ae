"""Commands that make something: a lab, a checkpoint in another format."""

import shutil
import sys
from importlib.resources import files
from pathlib import Path

from k2lab.cli.progress import Progress
from k2lab.lab.config import LabError, is_root, load_env

README = """# A lab of K2 Lab

| folder or file | what it holds |
| --- | --- |
| `settings.ini` | the defaults of this lab; it also marks the lab's root |
| `configs/` | a file for each stage, `env.yaml` (what each name means), `pipeline.yaml` |
| `nbs/` | the stages as notebooks; in the folders, the notebooks the package is made from, to read |
| `runs/` | a folder for each run: notebook, record, log and what it saved |

    k2lab train_sft_domain          one stage, with a random model, in half a minute
    k2lab pipeline                  all stages, each on what the ones before it left
    k2lab runs                      what has been run
    jupyter lab nbs                 the same stages by hand

The default scale is `smoke`, which runs anywhere in seconds. `--scale nano` trains small models that learn something;
`qlora` and `full` are for GPUs. `scale` in `settings.ini` changes the default.
The parameters cell of a notebook and everything below it is what `k2lab STAGE` executes.
The code that it imports is the installed package's.
"""
LEFT_OUT = ('constraints.txt', 'index.ipynb')  # of the package's repository, not of a lab


def lab_files() -> Path:
    "The folder with the files of a new lab: in the installed package, else in the checkout."
    package = Path(str(files('k2lab')))
    found = next((p for p in (package / 'new_lab', package.parent) if is_root(p)), None)
    if found is None:
        raise LabError(f'{package}: the files of a lab are missing; install k2lab again')
    return found


def new_lab(words: list, options: dict) -> int:
    "Make a lab in a new or empty folder."
    home, source = Path(words[0]).expanduser(), lab_files()
    if home.exists() and not home.is_dir():
        raise LabError(f'{home}: is a file; a lab is a new or an empty folder')
    if home.is_dir() and any(home.iterdir()):
        raise LabError(f'{home}: is not empty; a lab is a new or an empty folder')
    there = home.is_dir()
    try:
        fill_lab(home, source)
    except OSError:
        shutil.rmtree(home, ignore_errors=True)
        if there:
            home.mkdir(exist_ok=True)
        raise
    print(f'{home}: a lab with {len(list(home.glob("nbs/[0-9]*.ipynb")))} stages')
    print(f'  cd {words[0]} && k2lab train_sft_domain')
    return 0


def fill_lab(home: Path, source: Path):
    "Put settings, configs, notebooks, an empty runs folder and a README into a folder."
    hidden = shutil.ignore_patterns('.*', '_*', '*.pyc', *LEFT_OUT)
    for name in ('configs', 'nbs'):
        shutil.copytree(source / name, home / name, ignore=hidden)
    (home / 'runs').mkdir()
    settings = (source / 'settings.ini').read_text(encoding='utf-8')
    smoke = settings.replace('scale = nano', 'scale = smoke')
    (home / 'settings.ini').write_text(smoke, encoding='utf-8')
    (home / 'README.md').write_text(README, encoding='utf-8')
    (home / '.gitignore').write_text('runs/*\n.ipynb_checkpoints/\n', encoding='utf-8')


def convert(words: list, options: dict) -> int:
    "Write a published checkpoint again as bfloat16."
    from k2lab.models.quantized import fetched, to_bf16

    progress = Progress(f'convert {words[0]}')
    counts = to_bf16(
        fetched(place_of(words[0])),
        Path(words[1]),
        on_shard=lambda n, of, size: progress.say(
            f'{progress.head}  {n}/{of} weights · {size / 2**30:.1f} GiB written'
        ),
    )
    if progress.tty:
        print(file=sys.stderr)
    print(f"{words[1]}: {counts['weights']} weights, {counts['dequantised']} of them dequantised")
    for kind, count in counts['left_out'].items():
        print(f'  left out: {count} tensors ({kind})')
    if counts['files_left_out']:
        print(f"  left out: {', '.join(counts['files_left_out'])}")
    return 0


def export(words: list, options: dict) -> int:
    "Write a checkpoint and its training rows for a larger stack."
    from k2lab.scale.export import STACKS, export, source_of, with_data

    if not options['to']:
        raise LabError(f'export: for which stack? give --to {" or ".join(STACKS)}')
    source = with_data(source_of(words[0]), options['data'], options['length'])
    done = export(source, options['to'], Path(words[1]))
    print(
        f'{words[1]}: {done["tensors"]:,} tensors; {done["tokens"]:,} tokens in {done["rows"]:,} '
        f'packed rows, {done["learned"]:,} of them learned'
    )
    return 0


def place_of(name: str) -> str:
    "What a name of the lab around here means at full scale; outside a lab, a folder or hub id."
    from k2lab.lab.config import root

    try:
        root()
    except LabError:
        check_reachable(name)
        return name
    return load_env('full')['models'].get(name, name)


def check_reachable(place: str):
    "`LabError` if a place is no folder and the hub may not be asked for it."
    from huggingface_hub import is_offline_mode

    if not Path(place).is_dir() and is_offline_mode():
        raise LabError(
            f'{place}: no such folder, and HF_HUB_OFFLINE keeps the hub from being asked'
        )
