"""Runs on a Slurm cluster, submitted through submitit.

A job that was preempted or ran out of time continues in the same folder.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from k2lab.lab.config import LabError, fill, lab_path, read_yaml, resolve, root, setting
from k2lab.lab.files import mask
from k2lab.lab.job import open_job, prepare, stage_module
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
    nodes: int = 1  # machines
    gpus_per_node: int = 0  # GPUs on each of them
    cpus_per_task: int = 4  # cores on each of them, where one task runs
    mem_gb: float = 16  # memory on each of them, GB; 0: all it has
    hours: float = 4  # time limit of one start
    timeouts: int = 20  # how often the time limit may stop a run before it is given up
    setup: list[str] = field(default_factory=list)  # shell lines before the command
    extra: dict = field(default_factory=dict)  # further sbatch parameters by their long names


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
    return config


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
) -> tuple[Path, str]:
    "Prepare a run of a stage and submit it: its folder and the Slurm job's id; a refusal leaves no folder."
    from k2lab.lab.runner import checked_notebook

    config = resolve(stage_module(stage).Config, stage, scale or setting('lab', 'scale'), changes)
    checked_notebook(stage)
    check_spread(dataclasses.asdict(config).get('processes', 1), cluster().nodes)
    folder = prepare(stage, scale, campaign, changes, refuse=False).folder
    try:
        return folder, submit(folder)
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


def submit(folder: Path) -> str:
    """Submit a prepared folder, or an interrupted or failed one to be continued; the Slurm job's id.

    submitit's files are in `slurm/` of the folder."""
    asked, job = cluster(), open_job(folder)
    check_free(folder, job.record['status'])
    check_spread(dataclasses.asdict(job.cfg).get('processes', 1), asked.nodes)
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
        'cpus_per_task': asked.cpus_per_task,
        'mem': f'{int(asked.mem_gb * 1024)}M',
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
    if nodes == 1:
        return command
    check_spread(int(command[command.index('--num_processes') + 1]), nodes)
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
