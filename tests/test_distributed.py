"""Several training processes: ZeRO-2, ZeRO-3, FSDP2 and plain data parallelism.

Each has two CPU ranks with gloo and trains the small K2-shaped mixture.
Each saves whole tensors that one process opens, has the loss curve of one process with the same
global batch, and resumes after a kill as if there had been none.
`make test` runs ZeRO-3 and FSDP2, `make test-faults` all of them."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

torch = pytest.importorskip('torch')
from k2lab.lab.files import read_lines
from k2lab.lab.records import read_run
from k2lab.models.load import open_model

ROOT = Path(__file__).parent.parent
TOLD = [
    '--scale',
    'smoke',
    'measures=[domain_bits_per_byte]',
    'mix={domain_sft: 60, domain: 4}',
    'trainer.max_steps=12',
    'trainer.num_train_epochs=9',
    'trainer.save_steps=4',
    'trainer.logging_steps=1',
    'trainer.learning_rate=3e-3',
]
LORA = 'load={lora_rank: 4, adapt: [attention, shared, dense, routed]}'
# On a CPU, accelerate silently runs FSDP as plain data parallelism; relabelled it is real (tests only)
SHIM = '''
import os
if os.environ.get('ACCELERATE_USE_FSDP'):
    import accelerate.state as s
    real = s.PartialState.__init__
    def init(self, *a, **k):
        real(self, *a, **k)
        if self.distributed_type == s.DistributedType.MULTI_CPU:
            self._shared_state['distributed_type'] = s.DistributedType.MULTI_XPU
    s.PartialState.__init__ = init
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Launch files as shipped, but for two CPU processes in full precision; torchrun's usual port is taken."
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    for path in (folder / 'configs' / 'accelerate').glob('*.yaml'):
        told = yaml.safe_load(path.read_text())
        told |= dict(mixed_precision='no', num_processes=2, use_cpu=True)
        if told['distributed_type'] == 'DEEPSPEED':
            told.pop('mixed_precision')
        if 'fsdp_config' in told:
            told['fsdp_config']['fsdp_cpu_ram_efficient_loading'] = (
                False  # copies to a device, and there is none
            )
        path.write_text(yaml.safe_dump(told))
    (folder / 'shim').mkdir()
    lean = (ROOT / 'tests/lean/sitecustomize.py').read_text()  # ours comes before it on the path
    (folder / 'shim' / 'sitecustomize.py').write_text(lean + SHIM)
    with socket.socket() as other:
        with contextlib.suppress(OSError):
            other.bind(('', 29500))
            other.listen()
        yield folder


def command(home: Path, *words) -> subprocess.Popen:
    "A started `k2lab` command, one thread a process."
    env = dict(
        os.environ,
        K2LAB_LAB_RUNS_PATH=str(home / 'runs'),
        K2LAB_LAB_CONFIGS_PATH=str(home / 'configs'),
        OMP_NUM_THREADS='1',
        K2LAB_TEST_WITHOUT='scipy sklearn bitsandbytes',
        PYTHONPATH=f"{home / 'shim'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    return subprocess.Popen(
        [sys.executable, '-m', 'k2lab', *words],
        env=env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def run_of(home: Path, campaign: str, *words) -> Path:
    "A finished run's folder."
    command(home, 'train_sft_domain', '--campaign', campaign, *TOLD, *words).wait(400)
    return next((home / 'runs' / campaign).iterdir())


def curve(folder: Path) -> list:
    return [r['loss'] for r in read_lines(folder / 'metrics.jsonl') if 'loss' in r]


def tensors(folder: Path) -> dict:
    return open_model(folder / 'k2_domain_instruct').state_dict()


def told(folder: Path) -> dict:
    record = read_run(folder)
    assert record['status'] == 'complete', (
        record['reason'] + (folder / 'log.txt').read_text()[-3000:]
    )
    return record


@pytest.fixture(scope='module')
def alone(home):
    "The same training in one process: batches of 4 instead of two times 2."
    made = {}

    def get(*words):
        if words not in made:
            made[words] = run_of(
                home, f'alone{len(made)}', 'trainer.per_device_train_batch_size=4', *words
            )
        return made[words]

    return get


WAYS = {
    'cpu': (),
    'zero2': (),
    'zero3': (),
    'fsdp2': (),
    'zero3 lora': (LORA,),
    'fsdp2 lora': (LORA,),
}
FULL = os.environ.get('K2LAB_FAULTS') == 'full'


@pytest.mark.parametrize('way', WAYS if FULL else ['zero3', 'fsdp2'])
def test_two_processes_train_what_one_trains(way, home, alone):
    name = way.split()[0]
    if 'zero' in name:
        pytest.importorskip(
            'deepspeed', reason='ZeRO needs deepspeed: pip install "k2lab[deepspeed]"'
        )
    one, two = (
        alone(*WAYS[way]),
        run_of(
            home,
            way.replace(' ', '-'),
            'processes=2',
            f'accelerate={name}',
            'trainer.per_device_train_batch_size=2',
            *WAYS[way],
        ),
    )
    a, b = told(one)['training']['train'], told(two)['training']['train']
    assert len(curve(two)) == 12 and curve(two) == pytest.approx(curve(one), rel=2e-5)
    assert {k: a[k] for k in ('rows', 'tokens', 'trained_tokens', 'ends_of_turn', 'steps')} == {
        k: b[k] for k in ('rows', 'tokens', 'trained_tokens', 'ends_of_turn', 'steps')
    }
    assert a['trained_parameters'] == b['trained_parameters']
    for here, there in zip(told(one)['metrics'], told(two)['metrics'], strict=True):
        assert there['n'] == here['n'] and there['before'] == pytest.approx(
            here['before'], rel=1e-5
        )
        assert there['after'] == pytest.approx(here['after'], rel=1e-4)
    phases = told(two)['placement']
    assert {phases[name]['processes'] for name in ('before', 'train', 'after')} == {2}
    export = read_run(two)['export']
    # else the weights were not split, and the test is one of plain data parallelism
    assert ('tensors' in export) == (name in ('zero3', 'fsdp2')) and not export.get('differing')
    start, end, got = (
        open_model(home / 'runs' / '.smoke' / 'k2').state_dict(),
        tensors(one),
        tensors(two),
    )
    moved = sum(float((end[n] - start[n]).norm() ** 2) for n in end) ** 0.5
    apart = sum(float((end[n] - got[n]).norm() ** 2) for n in end) ** 0.5
    differ = max(abs(x / y - 1) for x, y in zip(curve(one), curve(two)))
    print(
        f'\n{way}: two processes end {apart / moved:.1e} of the way away from where one does; '
        f'losses differ by at most {differ:.1e}'
    )
    assert apart < 0.01 * moved


def command_line(process: psutil.Process) -> str:
    "The words of a process's command line, or an empty string for one that has ended."
    try:
        return ' '.join(process.cmdline())
    except psutil.Error:
        return ''


def is_worker(line: str) -> bool:
    "Whether a command line is that of a training process, not of its launcher."
    return 'k2lab work' in line and 'accelerate' not in line


def killed(home: Path, campaign: str, *words) -> Path:
    "A run one of whose two training processes was killed after its first checkpoint."
    proc = command(home, 'train_sft_domain', '--campaign', campaign, *TOLD, *words)
    end = time.monotonic() + 200
    while time.monotonic() < end and not list(
        (home / 'runs' / campaign).glob('*/trainer/train/checkpoint-4/MANIFEST.json')
    ):
        time.sleep(0.02)
    children = psutil.Process(proc.pid).children(recursive=True)
    workers = [c for c in children if is_worker(command_line(c))]
    os.kill(workers[-1].pid, signal.SIGKILL)
    proc.wait(60)
    return next((home / 'runs' / campaign).iterdir())


@pytest.mark.parametrize('way', WAYS if FULL else ['zero3'])
def test_two_killed_processes_go_on(way, home):
    name = way.split()[0]
    if 'zero' in name:
        pytest.importorskip(
            'deepspeed', reason='ZeRO needs deepspeed: pip install "k2lab[deepspeed]"'
        )
    words = [
        'processes=2',
        f'accelerate={name}',
        'trainer.per_device_train_batch_size=2',
        *WAYS[way],
    ]
    whole = (
        next((home / 'runs' / way.replace(' ', '-')).iterdir(), None)
        if (home / 'runs' / way.replace(' ', '-')).exists()
        else run_of(home, way.replace(' ', '-'), *words)
    )
    folder = killed(home, 'killed-' + way.replace(' ', '-'), *words)
    assert read_run(folder)['status'] == 'failed'
    assert command(home, 'resume', str(folder)).wait(200) == 0
    record, want = told(folder), told(whole)
    assert (
        record['training']['train']['stream_sha256'] == want['training']['train']['stream_sha256']
    )
    assert curve(folder) == curve(whole)
    assert all(torch.equal(t, tensors(whole)[n]) for n, t in tensors(folder).items())
