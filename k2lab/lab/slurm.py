"""Runs on a Slurm cluster, submitted through submitit.

A job that was preempted or ran out of time continues in the same folder.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k2lab.lab.config import (
    SCALES,
    LabError,
    fill,
    lab_path,
    load_env,
    one_of,
    read_yaml,
    resolve,
    root,
    setting,
)
from k2lab.lab.files import mask
from k2lab.lab.job import open_job, prepare, stage_module
from k2lab.lab.names import HUB_ID, snapshot
from k2lab.lab.records import amend, read_run

# parameters of sbatch that name a place of the run
DECIDED = {
    'chdir': "a job works in the lab's root",
    'output': 'a job writes into its run folder, where no other run does',
    'error': 'a job writes into its run folder, where no other run does',
}
NOTICE = 120  # seconds between the signal and the time limit; Slurm may send it a minute early


@dataclass(frozen=True)
class Cluster:
    "What a job asks the scheduler for: configs/slurm.yaml."

    partition: str = ''  # queue; empty: the cluster's default
    account: str = ''  # who pays; empty: the user's default
    # auto: what the stage needs at its scale
    nodes: int | Literal['auto'] = 'auto'  # machines
    gpus_per_node: int | Literal['auto'] = 'auto'  # GPUs on each of them
    cpus_per_task: int | Literal['auto'] = 'auto'  # cores on each, where one task runs
    mem_gb: float | Literal['auto'] = 'auto'  # memory on each, GB; 0: all it has
    hours: float = 4  # time limit of one start
    timeouts: int = 20  # how often the time limit may stop a run before it is given up
    setup: list[str] = field(default_factory=list)  # shell lines before the command
    extra: dict = field(default_factory=dict)  # further sbatch parameters by their long names


# ---- what a stage needs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    "What a run cannot do without, on all its nodes together."

    gpus: int = 0
    cores: int = 1
    mem_gb: float = 0  # main memory, GB; 0: not known
    why: str = ''  # what asks for it, in a few words


def needed(stage: str, cfg, env: dict) -> Needs:
    "What the stage's own file says: its processes, how it opens which model, and vLLM's parallelism."
    told = dataclasses.asdict(cfg)
    gpus, why = gpus_needed(told, env)
    processes = told.get('processes', 1)
    return Needs(gpus, max(processes, gpus), memory_needed(told, env), why)


def gpus_needed(told: dict, env: dict) -> tuple[int, str]:
    "`(GPUs, why)` of a stage's configuration."
    processes, load = told.get('processes', 1), told.get('load', {})
    if told.get('engine') == 'vllm':
        kinds = ('tensor_parallel_size', 'pipeline_parallel_size', 'data_parallel_size')
        return math.prod(told['vllm'].get(kind) or 1 for kind in kinds), 'vLLM'
    if processes > 1:
        name = f"{told['accelerate']}.yaml"
        path = lab_path('configs') / 'accelerate' / name
        on_cpu = path.exists() and read_yaml(path).get('use_cpu')
        return (0, '') if on_cpu else (processes, f'processes: {processes} of accelerate/{name}')
    large = [name for name in models_of(told) if not is_small(name, env)]
    dtype = '4 bits' if load.get('four_bit') else load.get('dtype', 'float32')
    on_gpu = dtype != 'float32' or ('checkpoints' in told and env['scale'] in ('qlora', 'full'))
    return (1, f'{", ".join(large)} in {dtype}') if large and on_gpu else (0, '')


def models_of(told: dict) -> list[str]:
    "The names of the models that a stage opens by itself."
    if told.get('endpoint') is True or told.get('replay'):
        return []  # another machine answers, or nobody has to
    teacher = told.get('teacher') or ''
    if isinstance(teacher, dict):
        teacher = teacher[told['mode']]
    names = [told.get('init_from'), teacher, *told.get('checkpoints', ())]
    return list(dict.fromkeys(name for name in names if name))


def is_small(name: str, env: dict) -> bool:
    "Whether a name means a model of the package."
    return str(env['models'].get(name, '')).partition(':')[0] in ('builtin', 'smoke')


def memory_needed(told: dict, env: dict) -> float:
    "GB of main memory for a model that is here: its weights when it is opened, and again when published; 0: not known."
    places = [str(env['models'].get(name, name)) for name in models_of(told)]
    sizes = [weights_gb(place) for place in places]
    return 2 * max(sizes) + 4 if sizes and all(sizes) else 0


def weights_gb(place: str) -> float:
    "GB of the weights in a folder or in the hub's cache; 0 if they are not here, or come with the package."
    if place.partition(':')[0] in ('builtin', 'smoke'):
        return 0
    folder = root() / Path(place).expanduser()
    if not folder.is_dir():
        folder = snapshot(place) if HUB_ID.fullmatch(place) else None
    files = folder.glob('*.safetensors') if folder else ()
    return sum(path.stat().st_size for path in files) / 1e9


# ---- what is asked for ---------------------------------------------------------------------------

NODE_GPUS = 8  # of a node, as most are built
CORES = 4  # for each process or GPU
LEAST_GB = 16  # for a run without a GPU whose needs are not known
GPU_WORDS = ('gres', 'gpus', 'gpus_per_node', 'gpus_per_task')  # sbatch's other ways to say it
CPU_WORDS = ('cpus_per_task', 'cpus_per_gpu', 'exclusive')
MEMORY_WORDS = ('mem', 'mem_per_cpu', 'mem_per_gpu')


def from_extra(asked: Cluster, words: tuple) -> dict:
    "Those sbatch parameters in `extra` that are among `words`."
    named = {key.replace('-', '_'): value for key, value in asked.extra.items()}
    return {key: value for key, value in named.items() if key in words}


def gpus_in_extra(asked: Cluster, nodes: int) -> int:
    "GPUs on each node that `extra` asks for: `gres: gpu:h100:2`, `gpus: 8`."
    found = 0
    for word, value in from_extra(asked, GPU_WORDS).items():
        for one in str(value).split(','):
            kind, _, rest = one.partition(':') if word == 'gres' else ('gpu', '', one)
            if kind.removeprefix('gres/') == 'gpu':
                last = rest.rpartition(':')[2]
                count = int(last) if last.isdigit() else 1
                found += count // nodes if word == 'gpus' else count
    return found


def nodes_for(asked: Cluster, gpus: int, processes: int) -> int:
    "The fewest nodes that have the GPUs, each with the same number of processes."
    if asked.nodes != 'auto':
        return asked.nodes
    if processes == 1 or not gpus:
        return 1
    given = asked.gpus_per_node if asked.gpus_per_node != 'auto' else gpus_in_extra(asked, 1)
    most = given or NODE_GPUS
    return next(n for n in range(1, processes + 1) if processes % n == 0 and processes // n <= most)


def fitted(asked: Cluster, need: Needs, processes: int = 1) -> Cluster:
    "The request with each `auto` decided: what is needed, with room; `LabError` if it asks for less."
    nodes = nodes_for(asked, need.gpus, processes)
    check_spread(processes, nodes)
    gpus, cores, memory = (-(-n // nodes) for n in (need.gpus, need.cores, need.mem_gb))
    extra = gpus_in_extra(asked, nodes)
    room = max(LEAST_GB, 1.25 * memory) if memory or not gpus else 0  # 0: all of the node
    auto = dict(
        nodes=nodes,
        gpus_per_node=0 if extra else gpus,
        cpus_per_task=CORES * max(cores, 1),
        mem_gb=room,
    )
    full = dataclasses.replace(
        asked, **{key: value for key, value in auto.items() if getattr(asked, key) == 'auto'}
    )
    least = dict(gpus_per_node=gpus, cpus_per_task=cores, mem_gb=memory)
    check_enough(full, extra, least, need.why)
    return full


def check_enough(asked: Cluster, extra: int, least: dict, why: str):
    """`LabError` for a request that has less than `least` on each node; `extra` are GPUs that its `extra` names.

    Memory and cores that `extra` asks for are the user's own words, and count as enough."""
    has = dict(
        gpus_per_node=max(asked.gpus_per_node, extra),
        cpus_per_task=math.inf if from_extra(asked, CPU_WORDS) else asked.cpus_per_task,
        mem_gb=math.inf if from_extra(asked, MEMORY_WORDS) else asked.mem_gb or math.inf,
    )
    short = [f'{key} is {has[key]:g}, needed {n:g}' for key, n in least.items() if has[key] < n]
    if short:
        raise LabError(
            f"{lab_path('configs') / 'slurm.yaml'}: {'; '.join(short)}{why and f' for {why}'}; "
            'write auto, or more'
        )


def request(stage: str, cfg, env: dict, needs: Callable[[str, Any, dict], Needs]) -> Cluster:
    "What is asked for a stage: configs/slurm.yaml, filled up with what it `needs`."
    need = needs(stage, cfg, env)
    named = dataclasses.replace(
        need, why=f'{stage} at {env["scale"]}{need.why and f" ({need.why})"}'
    )
    return fitted(cluster(), named, dataclasses.asdict(cfg).get('processes', 1))


# ---- submitting ----------------------------------------------------------------------------------


def cluster() -> Cluster:
    "The lab's configs/slurm.yaml; `LabError` if it has a mistake, or if this machine cannot submit."
    path = lab_path('configs') / 'slurm.yaml'
    config = fill(Cluster, [(path, read_yaml(path))])
    for key in config.extra.keys() & DECIDED.keys():
        raise LabError(f'{path}: extra: {key} cannot be set: {DECIDED[key]}')
    told = {'setup': config.setup, 'extra': config.extra}
    if mask(told) != told:
        raise LabError(
            f'{path}: a secret in plain text, and the script stays in the run folder; export it '
            'where you submit: Slurm hands the environment on'
        )
    if not shutil.which('sbatch'):
        raise LabError('no sbatch on this machine: submit from a login node of the cluster')
    check_numbers(path, config)
    return config


def check_numbers(path: Path, config: Cluster):
    "`LabError` for a number of configs/slurm.yaml that nothing can be asked with."
    least = dict(nodes=1, gpus_per_node=0, cpus_per_task=1, mem_gb=0)
    for key, low in least.items():
        value = getattr(config, key)
        if value != 'auto' and value < low:
            raise LabError(f'{path}: {key} is {value:g}; {low} or more, or auto')


def check_spread(processes: int, nodes: int):
    "`LabError` unless every node gets the same number of processes."
    if processes % nodes:
        raise LabError(
            f'processes: {processes} cannot be spread over nodes: {nodes} (configs/slurm.yaml); '
            f'take a multiple of {nodes}'
        )


def submit_stage(
    stage: str,
    scale: str | None = None,
    campaign: str | None = None,
    changes: dict | None = None,
    needs: Callable[[str, Any, dict], Needs] = needed,
) -> tuple[Path, str]:
    "Prepare a run of a stage and submit it: its folder and the Slurm job's id; a refusal leaves no folder."
    from k2lab.lab.runner import checked_notebook

    scale = one_of('scale', scale or setting('lab', 'scale'), SCALES)
    config = resolve(stage_module(stage).Config, stage, scale, changes)
    checked_notebook(stage)
    request(stage, config, load_env(scale), needs)
    folder = prepare(stage, scale, campaign, changes, refuse=False).folder
    try:
        return folder, submit(folder, needs)
    except LabError:
        shutil.rmtree(folder)
        raise


def check_free(folder: Path, status: str):
    "`LabError` if the run is in the queue, running or complete."
    busy = waiting(folder)
    if busy:
        raise LabError(f'{folder}: {busy} already')
    if status in ('running', 'complete', 'unknown'):
        raise LabError(f'{folder}: {status}; nothing to submit')


def submit(folder: Path, needs: Callable[[str, Any, dict], Needs] = needed) -> str:
    """Submit a prepared folder, or an interrupted or failed one to be continued; the Slurm job's id.

    submitit's files are in `slurm/` of the folder."""
    cluster()  # before the run is opened
    job = open_job(folder)
    check_free(folder, job.record['status'])
    asked = request(job.stage, job.cfg, job.env, needs)
    # written now: once submitted, the job can start and write the record itself
    if job.record['status'] == 'prepared':
        job.record['slurm'] = dataclasses.asdict(asked)
        job.write()
    else:
        amend(folder, slurm=dataclasses.asdict(asked))
    return send(job.folder, asked, job.stage)


def send(folder: Path, asked: Cluster, stage: str) -> str:
    "Hand the work to submitit; the Slurm job's id. `LabError` if sbatch refuses it."
    import submitit
    from submitit.core.utils import FailedJobError

    # `exec`: the batch shell becomes Python, and gets the signals that Slurm sends to the batch shell
    python = f'exec {shlex.quote(sys.executable)}'
    executor = submitit.SlurmExecutor(
        folder / 'slurm', max_num_timeout=asked.timeouts, python=python
    )
    executor.update_parameters(**sbatch_parameters(asked, stage))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return executor.submit(Resume(folder)).job_id
    except FailedJobError as e:
        raise LabError(f"{lab_path('configs') / 'slurm.yaml'}: {sbatch_error(e)}") from None


def sbatch_error(error: Exception) -> str:
    "The message of sbatch in one line."
    lines = [line.removeprefix('sbatch: error: ') for line in str(error).splitlines() if line]
    return '; '.join(lines) or 'sbatch refused the job'


def sbatch_parameters(asked: Cluster, name: str) -> dict:
    "Parameters for submitit's SlurmExecutor: the job runs once, on the first node, and spreads from there."
    from submitit.slurm.slurm import SlurmJobEnvironment

    own = {
        'signal': f'B:{SlurmJobEnvironment.USR_SIG}@{NOTICE}',
        'requeue': True,
        'chdir': str(root()),
    }
    return {
        'job_name': name,
        'partition': asked.partition or None,
        'account': asked.account or None,
        'nodes': asked.nodes,
        'ntasks_per_node': 1,
        'gpus_per_node': asked.gpus_per_node or None,
        'cpus_per_task': None if from_extra(asked, CPU_WORDS[:2]) else asked.cpus_per_task,
        'mem': None if from_extra(asked, MEMORY_WORDS) else f'{int(asked.mem_gb * 1024)}M',
        'time': max(1, round(asked.hours * 60)),
        'setup': asked.setup or None,
        'stderr_to_stdout': True,
        'use_srun': False,
        'additional_parameters': own | asked.extra,
    }


# ---- on the node ---------------------------------------------------------------------------------


class Resume:
    """The work of a job: `k2lab resume FOLDER`, at the first start and at every later one.

    It is pickled, so it holds a path and nothing else."""

    def __init__(self, folder: Path | str):
        self.folder = str(folder)
        self.child: subprocess.Popen | None = None

    def __call__(self):
        "Run the folder and exit with the command's code, which makes the job COMPLETED or FAILED."
        if read_run(Path(self.folder))['status'] == 'complete':
            return  # the node was lost after the run had ended
        child = subprocess.Popen([sys.executable, '-m', 'k2lab', 'resume', self.folder])
        self.child = child
        # many clusters signal only the job's first process
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        code = child.wait()
        if code:
            sys.exit(code)

    def checkpoint(self):
        """The work to submit again; submitit calls this before the time limit or at a preemption.

        It returns once the run has ended and its record says so."""
        from submitit.helpers import DelayedSubmission

        if self.child:
            self.child.terminate()
            with contextlib.suppress(ChildProcessError):  # not `wait`: `__call__` holds its lock
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Resume(self.folder))


def across_nodes(command: list, environ: dict) -> list:
    "An `accelerate launch` command; in a Slurm job of several nodes, the `srun` that starts it on each."
    nodes = int(environ.get('SLURM_JOB_NUM_NODES', 1))
    at = command.index('--num_processes')
    if nodes == 1:  # a free port: its default, 29500, may be another run's
        return [*command[:at], '--main_process_port', '0', *command[at:]]
    check_spread(int(command[at + 1]), nodes)
    if 'SLURMD_NODENAME' not in environ:
        raise LabError(
            f'a Slurm job of {nodes} nodes, and this is none of them: submit with --on slurm'
        )
    srun = ['srun', f'--nodes={nodes}', f'--ntasks={nodes}', '--ntasks-per-node=1']
    if 'SLURM_CPUS_PER_TASK' in environ:  # since Slurm 22.05 srun does not inherit --cpus-per-task
        srun.append(f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}")
    return [*srun, '--kill-on-bad-exit=1', 'sh', '-c', on_each_node(command, environ, nodes)]


def on_each_node(command: list, environ: dict, nodes: int) -> str:
    "The shell line of every node: the command with the shared address, and the node's own rank."
    at = command.index('accelerate.commands.launch') + 1
    port = 20000 + int(environ['SLURM_JOB_ID']) % 10000  # below the range of ephemeral ports
    machines = ['--num_machines', str(nodes)]
    machines += ['--main_process_ip', environ['SLURMD_NODENAME'], '--main_process_port', str(port)]
    arguments = shlex.join(machines + command[at:])
    return f'exec {shlex.join(command[:at])} --machine_rank $SLURM_NODEID {arguments}'


# ---- the queue -----------------------------------------------------------------------------------


def job_of(folder: Path) -> str:
    "The id of the last Slurm job that was submitted for a run folder, or an empty string."
    names = (p.name for p in Path(folder).glob('slurm/*_submission.sh'))
    matches = [re.fullmatch(r'(\d+)_submission\.sh', name) for name in names]
    return max((m[1] for m in matches if m), key=int, default='')


def state(job_id: str) -> str:
    "A job's state in squeue: `pending`, `running`, `completing` ..., or an empty string if it is gone."
    if not shutil.which('squeue'):
        raise LabError('no squeue on this machine: ask on a login node of the cluster')
    done = subprocess.run(
        ['squeue', '--noheader', '--format=%T', f'--jobs={job_id}'], capture_output=True, text=True
    )
    if done.returncode and 'Invalid job id' not in done.stderr:
        raise LabError(f'squeue: {done.stderr.strip().splitlines()[-1]}')
    return done.stdout.strip().lower()


def waiting(folder: Path) -> str:
    "`Slurm job 12 is pending`, or an empty string for a run folder that Slurm does not have (any more)."
    job = job_of(folder)
    now = job and state(job)
    return f'Slurm job {job} is {now}' if now else ''
