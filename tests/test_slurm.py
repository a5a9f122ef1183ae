"""Runs on a Slurm cluster: the requests to the scheduler, and a real cluster on this machine's loopback.

That cluster runs, requeues and spreads the jobs."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2lab.cli.running import needs_by_plan
from k2lab.lab.config import LabError, resolve
from k2lab.lab.job import stage_module
from k2lab.lab.records import read_run, runs
from k2lab.lab.slurm import (
    Cluster,
    Needs,
    across_nodes,
    cluster,
    fitted,
    job_of,
    sbatch_parameters,
    state,
    submit,
    submit_stage,
    waiting,
)

ROOT = Path(__file__).resolve().parents[1]
CONF = '''
ClusterName=k2lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# a requeued job waits until the credential of its first start has expired
AuthInfo=socket={home}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
KillWait=5
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=one Nodes={host} Default=YES State=UP
PartitionName=both Nodes={host},localhost State=UP
'''
ONCE = '''
from dataclasses import dataclass
@dataclass(frozen=True)
class Config:
    saves: str = 'k2_toy'
    seed: int = 0
def train(job):
    import os, time
    with open(job.folder/'starts', 'a') as f: f.write(os.environ['SLURM_JOB_ID'] + ' ')
    starts = len((job.folder/'starts').read_text().split())
    if starts == 1: time.sleep(60)
    job.measure('starts', after=starts)
    with job.publishing(job.cfg.saves, '.txt') as path: path.write_text('done')
work = train
'''
GLOO = '''
from dataclasses import dataclass
@dataclass(frozen=True)
class Config:
    saves: str = 'k2_toy'
    seed: int = 0
    processes: int = 2
    accelerate: str = 'cpu'
def work(job):
    import os, torch, torch.distributed as dist
    dist.init_process_group('gloo')
    total = torch.tensor([10.**dist.get_rank()])
    dist.all_reduce(total)
    names = [None]*dist.get_world_size()
    dist.all_gather_object(names, os.environ['SLURMD_NODENAME'])
    job.measure('sum', after=total.item(), note=' '.join(sorted(names)))
    with job.publishing(job.cfg.saves, '.txt') as path: path.write_text('done')
    dist.destroy_process_group()
train = work
'''


def absent() -> str:
    "Why no cluster can be started here, or an empty string."
    lacking = [
        name
        for name in ('munged', 'slurmctld', 'slurmd', 'sbatch')
        if not shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin')
    ]
    if lacking:
        return f"no {', '.join(lacking)} here (Debian: apt-get install slurm-wlm munge)"
    return '' if os.geteuid() == 0 else 'slurmd needs root'


def wait_for(found, seconds: float = 40):
    "The first true value of `found()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError('nothing came')


def free_ports(n: int) -> list:
    "`n` ports that nobody listens on."
    socks = [socket.socket() for _ in range(n)]
    for s in socks:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


def said(*command) -> str:
    "What a command prints."
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def k2lab(*words, **env) -> subprocess.CompletedProcess:
    "What `k2lab words` did."
    return subprocess.run(
        [sys.executable, '-m', 'k2lab', *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "A Slurm cluster of two nodes that are this machine, on ports of its own; all of it is gone afterwards."
    if why := absent():
        pytest.skip(why)
    home, host = tmp_path_factory.mktemp('slurm'), socket.gethostname().partition('.')[0]
    for name in ('state', f'spool-{host}', 'spool-localhost'):
        (home / name).mkdir()
    (home / 'munge.key').write_bytes(os.urandom(1024))
    (home / 'munge.key').chmod(0o400)
    (home / 'slurm.conf').write_text(CONF.format(home=home, host=host, ports=free_ports(3)))
    files = [
        f'--{what}={home}/munge.{what.partition("-")[0]}'
        for what in ('key-file', 'socket', 'pid-file', 'log-file', 'seed-file')
    ]
    daemons = [
        ['munged', '--foreground', '--force', *files],
        ['slurmctld', '-D', '-i', '-f', f'{home}/slurm.conf'],
        *(['slurmd', '-D', '-f', f'{home}/slurm.conf', '-N', node] for node in (host, 'localhost')),
    ]
    with pytest.MonkeyPatch.context() as patch, open(home / 'log', 'w') as log:
        patch.setenv('PATH', os.environ['PATH'] + ':/usr/sbin')
        patch.setenv('SLURM_CONF', f'{home}/slurm.conf')
        procs = []
        try:
            for command in daemons:
                procs.append(subprocess.Popen(command, stdout=log, stderr=log))
                if command[0] == 'munged':
                    wait_for((home / 'munge.socket').exists, 10)
            try:
                wait_for(lambda: said('sinfo', '-h', '-o', '%t', '-p', 'both') == 'idle', 20)
            except AssertionError:
                pytest.fail(f"the cluster did not come up:\n{(home / 'log').read_text()[-3000:]}")
            yield home
        finally:
            said('scancel', '--user=root')
            for _ in range(
                100
            ):  # the processes of a job end before the daemons that could end them
                if not said('squeue', '-h'):
                    break
                time.sleep(0.2)
            for proc in reversed(procs):
                proc.terminate()
                proc.wait(20)


@pytest.fixture
def asked(lab):
    "A function that writes configs/slurm.yaml for the toy lab."

    def write(text: str = ''):
        lab.write('configs/slurm.yaml', f'cpus_per_task: 1\nmem_gb: 0.5\nhours: 0.1\n{text}')

    write()
    return write


def ended(job: str, folder: Path) -> dict:
    "The record of a run once Slurm is done with its job."
    wait_for(lambda: not state(job), 60)
    return read_run(folder)


def log(folder: Path) -> str:
    return '\n'.join(p.read_text() for p in [*folder.glob('slurm/*.out'), *folder.glob('log.txt')])


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text, line',
    [
        (
            'partitoin: gpu',
            "slurm.yaml:4: unknown key 'partitoin' (did you mean 'partition'?); valid: "
            'partition, account, nodes, gpus_per_node, cpus_per_task',
        ),
        ('nodes: many', "slurm.yaml:4: nodes must be int or one of 'auto', not 'many'"),
        ('nodes: 0', 'slurm.yaml: nodes is 0; 1 or more, or auto'),
        (
            'nodes: 2',
            'processes: 1 cannot be spread over nodes: 2 (configs/slurm.yaml); take a multiple of 2',
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(lab, asked, monkeypatch, text, line):
    monkeypatch.setattr('shutil.which', lambda name: name)
    asked(text)
    with pytest.raises(LabError) as e:
        submit_stage('train_toy')
    assert line in str(e.value) and '\n' not in str(e.value) and not lab.runs.exists()


def test_the_command_line_tells_a_mistake_in_one_line(lab, asked):
    for words, line in (
        (['--on', 'slrum'], "--on: unknown place 'slrum' (did you mean 'slurm'?); valid: slurm"),
        (['--on', 'slurm'], 'no sbatch on this machine: submit from a login node of the cluster'),
    ):
        done = k2lab('train_toy', *words, PATH='/nowhere')
        assert (done.returncode, done.stderr) == (2, f'k2lab: {line}\n') and not lab.runs.exists()


def test_the_labs_own_file_is_valid(monkeypatch):
    monkeypatch.setenv('K2LAB_ROOT', str(ROOT))
    monkeypatch.setattr('shutil.which', lambda name: name)
    assert cluster() == Cluster()


RECORDER = """#!/bin/sh
cp "$1" "{folder}/asked.sh"
echo Submitted batch job 7
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    "A function that submits a stage of the lab to an sbatch that only records, and returns what was asked."
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/sbatch').write_text(RECORDER.format(folder=tmp_path))
    for name in ('squeue', 'srun'):  # submitit looks whether srun is there
        (tmp_path / 'bin' / name).write_text('#!/bin/sh\n')
    for tool in tmp_path.glob('bin/*'):
        tool.chmod(0o755)
    (tmp_path / 'configs').mkdir()
    for path in (ROOT / 'configs').rglob('*.yaml'):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'), prepend=os.pathsep)
    monkeypatch.setenv('K2LAB_ROOT', str(ROOT))
    monkeypatch.setenv('K2LAB_LAB_RUNS_PATH', str(tmp_path / 'runs'))
    monkeypatch.setenv('K2LAB_LAB_CONFIGS_PATH', str(tmp_path / 'configs'))

    def ask(stage: str, scale: str, changes: dict | None = None, request: str = '', **how) -> dict:
        (tmp_path / 'configs/slurm.yaml').write_text(request)
        submit_stage(stage, scale, 'c', changes, **how)
        script = (tmp_path / 'asked.sh').read_text().splitlines()
        flags = [line.removeprefix('#SBATCH --').partition('=') for line in script if '--' in line]
        kept = ('nodes', 'gpus-per-node', 'cpus-per-task', 'mem', 'gres')
        return {key: value for key, _, value in flags if key in kept}

    ask.runs = tmp_path / 'runs'
    return ask


def test_gpus_and_memory_follow_from_the_stage(recorded):
    four = {'load.four_bit': True}
    assert recorded('train_sft_domain', 'qlora', four) == {
        'nodes': '1',
        'gpus-per-node': '1',
        'cpus-per-task': '4',
        'mem': '0M',  # the size of Moonlight is not known here
    }
    assert recorded('train_sft_domain', 'nano') == {
        'nodes': '1',
        'cpus-per-task': '4',
        'mem': '16384M',
    }
    many = recorded('train_sft_domain', 'full')
    assert (many['nodes'], many['gpus-per-node'], many['cpus-per-task']) == ('8', '8', '32')
    eight = recorded('launch_teacher_vllm', 'full')
    assert (eight['nodes'], eight['gpus-per-node']) == ('1', '8')
    two = {'processes': 2, 'accelerate': 'cpu'}
    assert 'gpus-per-node' not in recorded('train_sft_domain', 'nano', two)
    assert 'gpus-per-node' not in recorded('sample_teacher', 'full')  # another machine answers
    assert recorded('evaluate', 'qlora')['gpus-per-node'] == '1'
    own = recorded('train_sft_domain', 'qlora', four, 'extra: {gres: "gpu:h100:1"}\nmem_gb: 64')
    assert (own['gres'], own['mem'], 'gpus-per-node' in own) == ('gpu:h100:1', '65536M', False)


@pytest.mark.parametrize(
    'stage, changes, request_, line',
    [
        (
            'train_sft_domain',
            {'load.four_bit': True},
            'gpus_per_node: 0\nmem_gb: 16',
            'slurm.yaml: gpus_per_node is 0, needed 1 for train_sft_domain at qlora '
            '(k2_domain_pretrain in 4 bits); write auto, or more',
        ),
        (
            'train_sft_domain',
            {'processes': 16, 'accelerate': 'zero2'},
            'nodes: 2\ngpus_per_node: 4',
            'gpus_per_node is 4, needed 8 for train_sft_domain at qlora (processes: 16 of '
            'accelerate/zero2.yaml)',
        ),
        (
            'launch_teacher_vllm',
            {'vllm.tensor_parallel_size': 4},
            'extra: {gres: "gpu:2"}',
            'gpus_per_node is 2, needed 4 for launch_teacher_vllm at qlora (vLLM)',
        ),
    ],
)
def test_a_request_that_is_too_small_is_refused_before_anything_is_submitted(
    recorded, stage, changes, request_, line
):
    with pytest.raises(LabError) as e:
        recorded(stage, 'qlora', changes, request_)
    assert line in str(e.value) and '\n' not in str(e.value)
    assert not recorded.runs.exists() and not (recorded.runs.parent / 'asked.sh').exists()


def test_the_size_of_a_model_that_is_here_is_asked_for(recorded, tmp_path):
    model = tmp_path / 'model'
    model.mkdir()
    with open(model / 'a.safetensors', 'wb') as f:
        f.truncate(20 * 10**9)  # takes no room on the disk
    (model / 'config.json').write_text('{}')
    told = {'init_from': str(model), 'load.four_bit': True}
    assert recorded('train_sft_domain', 'qlora', told)['mem'] == '56320M'
    with pytest.raises(LabError, match='mem_gb is 16, needed 44 for train_sft_domain at qlora'):
        recorded('train_sft_domain', 'qlora', told, 'mem_gb: 16')


def test_the_command_asks_for_what_the_plan_says(recorded):
    "And goes by the stage's file where nobody knows the shape of the model."
    needs = needs_by_plan('c')
    asked = recorded('train_sft_domain', 'qlora', needs=needs)
    assert asked['gpus-per-node'] == '1' and int(asked['mem'].removesuffix('M')) > 30_000
    with pytest.raises(LabError, match='mem_gb is 16, needed .* for train_sft_domain at qlora'):
        recorded('train_sft_domain', 'qlora', request='mem_gb: 16', needs=needs)
    assert recorded('train_sft_domain', 'nano', needs=needs)['mem'] == '16384M'
    env = dict(models={}, data={}, scale='qlora')
    config = resolve(stage_module('train_sft_domain').Config, 'train_sft_domain', 'qlora')
    unknown = dataclasses.replace(config, init_from='nobody/none')
    found = needs('train_sft_domain', unknown, env)
    assert (found.gpus, found.why) == (1, 'nobody/none in 4 bits')


def test_what_is_needed_is_spread_over_nodes():
    spread = lambda processes, **asked: fitted(
        Cluster(**asked), Needs(processes, processes, 100), processes
    )
    twelve = spread(12)
    assert (twelve.nodes, twelve.gpus_per_node, twelve.mem_gb) == (2, 6, 62.5)
    assert (spread(8, gpus_per_node=4).nodes, spread(13).nodes) == (2, 13)
    assert spread(16, extra={'gres': 'gpu:a100:4,nvme:1'}).nodes == 4
    assert spread(16, nodes=2, extra={'gpus': 16}).gpus_per_node == 0
    assert fitted(Cluster(mem_gb=0), Needs(mem_gb=999)).mem_gb == 0
    other = fitted(Cluster(extra={'gpus-per-node': 'h100:8', 'mem-per-gpu': '64G'}), Needs(8, 8), 8)
    told = sbatch_parameters(other, 'train_toy')
    assert (told['gpus_per_node'], told['mem'], told['nodes']) == (None, None, 1)
    with pytest.raises(LabError, match='cannot be spread over nodes: 3'):
        spread(16, nodes=3)
    with pytest.raises(LabError, match='cpus_per_task is 2, needed 8'):
        spread(8, cpus_per_task=2)


def test_what_submitit_is_told(lab):
    told = sbatch_parameters(
        Cluster(
            partition='gpu',
            nodes=2,
            gpus_per_node=8,
            cpus_per_task=4,
            mem_gb=0,
            hours=1.5,
            extra={'qos': 'low', 'signal': 'B:USR2@300'},
        ),
        'train_toy',
    )
    assert told == {
        'job_name': 'train_toy',
        'partition': 'gpu',
        'account': None,
        'nodes': 2,
        'ntasks_per_node': 1,
        'gpus_per_node': 8,
        'cpus_per_task': 4,
        'mem': '0M',
        'time': 90,
        'setup': None,
        'stderr_to_stdout': True,
        'use_srun': False,
        'additional_parameters': {
            'signal': 'B:USR2@300',
            'requeue': True,
            'chdir': str(lab.root),
            'qos': 'low',
        },
    }


def test_one_node_gets_a_free_port_and_several_get_srun():
    command = [
        'python',
        '-m',
        'accelerate.commands.launch',
        '--config_file',
        'a b.yaml',
        '--num_processes',
        '16',
        '-m',
        'k2lab',
        'work',
        'runs/c/1',
    ]
    alone = [*command[:5], '--main_process_port', '0', *command[5:]]
    assert across_nodes(command, {}) == across_nodes(command, {'SLURM_JOB_NUM_NODES': '1'}) == alone
    job = {
        'SLURM_JOB_NUM_NODES': '2',
        'SLURM_JOB_ID': '10012',
        'SLURMD_NODENAME': 'n1',
        'SLURM_CPUS_PER_TASK': '32',
    }
    assert across_nodes(command, job) == [
        'srun',
        '--nodes=2',
        '--ntasks=2',
        '--ntasks-per-node=1',
        '--cpus-per-task=32',
        '--kill-on-bad-exit=1',
        'sh',
        '-c',
        'exec python -m accelerate.commands.launch --machine_rank $SLURM_NODEID --num_machines 2 '
        '--main_process_ip n1 --main_process_port 20012 '
        "--config_file 'a b.yaml' --num_processes 16 -m k2lab work runs/c/1",
    ]
    with pytest.raises(LabError, match='processes: 16 cannot be spread over nodes: 3'):
        across_nodes(command, job | {'SLURM_JOB_NUM_NODES': '3'})
    del job['SLURMD_NODENAME']
    with pytest.raises(LabError, match='of 2 nodes, and this is none of them'):
        across_nodes(command, job)


# ---- on a cluster --------------------------------------------------------------------------------


def test_a_run_waits_completes_and_keeps_no_secret(slurm, lab, asked, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_environmentsecret0000')
    asked('extra: {hold: true}')
    monkeypatch.setenv('TOY_SECRET', 'plain-text-key')
    asked('setup: [export API_KEY=aB3dE5fG7hJ9kL1mN3pQ5rS7tU9]')
    refused = k2lab('train_toy', '--on', 'slurm', '--campaign', 'c')
    assert (refused.returncode, runs('c')) == (2, []) and 'a secret in plain text' in refused.stderr
    asked('extra: {hold: true}')
    done = k2lab('train_toy', '--on', 'slurm', '--campaign', 'c', 'api_key=env:TOY_SECRET')
    folder = Path(runs('c')[0]['folder'])
    first = job_of(folder)
    assert done.returncode == 0 and f'c/{folder.name}: Slurm job {first}\n' in done.stdout, (
        done.stderr
    )
    assert f'Slurm job {first} is pending' in k2lab('runs', 'c').stdout
    subprocess.run(['scancel', first], check=True)
    wait_for(lambda: not state(first), 20)
    assert 'prepared: Slurm does not have it any more' in k2lab('runs', 'c').stdout
    asked('setup: [export FROM_SETUP=1]')
    done = k2lab('resume', folder.name, '--on', 'slurm')
    assert (
        done.returncode == 0
        and job_of(folder) != first
        and done.stdout.endswith(f'Slurm job {job_of(folder)}\n')
    ), done.stderr
    record = ended(job_of(folder), folder)
    assert (record['status'], record['metrics'][0]['after']) == ('complete', 2), log(folder)
    assert (
        record['slurm']['hours'] == 0.1
        and record['slurm']['setup'] == ['export FROM_SETUP=1']
        and not waiting(folder)
    )
    assert {p.suffix for p in folder.glob('slurm/*')} == {'.sh', '.pkl', '.out'}
    assert not [
        p
        for p in folder.rglob('*')
        if p.is_file()
        and (b'environmentsecret' in p.read_bytes() or b'plain-text-key' in p.read_bytes())
    ]
    with pytest.raises(LabError, match='complete; nothing to submit'):
        submit(folder)


@pytest.mark.parametrize('how', ['scontrol requeue', 'scancel --signal=USR2 --batch'])
def test_a_requeued_job_goes_on_in_its_folder(slurm, lab, asked, how):
    lab.stage(20, 'train_toy', module=ONCE)
    folder, job = submit_stage('train_toy', campaign='c')
    wait_for((folder / 'starts').exists)
    with pytest.raises(LabError, match=f'Slurm job {job} is running already'):
        submit(folder)
    subprocess.run([*how.split(), job], check=True)
    wait_for(lambda: state(job) == 'pending', 20)
    assert read_run(folder)['status'] == 'interrupted', log(folder)
    record = ended(job, folder)
    assert (record['status'], record['metrics'][0]['after']) == ('complete', 2), log(folder)
    assert [Path(r['folder']) for r in runs('c')] == [folder] and (
        folder / 'starts'
    ).read_text().split() == [job, job]


def test_what_sbatch_refuses_is_one_line_and_leaves_no_folder(slurm, lab, asked, capfd):
    asked('partition: nowhere')
    with pytest.raises(LabError) as e:
        submit_stage('train_toy', campaign='c')
    assert 'slurm.yaml: invalid partition specified: nowhere; Batch job submission failed' in str(
        e.value
    ) and '\n' not in str(e.value)
    assert not runs('c') and capfd.readouterr().err == ''


def test_processes_on_two_nodes_work_on_one_run(slurm, lab, asked):
    asked('partition: both\nnodes: 2')
    lab.stage(20, 'train_toy', module=GLOO)
    lab.write('configs/accelerate/cpu.yaml', (ROOT / 'configs/accelerate/cpu.yaml').read_text())
    folder, job = submit_stage('train_toy', campaign='c')
    record = ended(job, folder)
    assert record['status'] == 'complete', log(folder)
    assert [(m['after'], m['note'].split()) for m in record['metrics']] == [
        (11, sorted([socket.gethostname().partition('.')[0], 'localhost']))
    ]
