"""A run on a Slurm cluster: its folder is submitted through submitit, and a job that was preempted or ran out of time goes on in the same folder."""

import contextlib, dataclasses, io, os, re, shlex, shutil, signal, subprocess, sys
from dataclasses import dataclass, field
from pathlib import Path

from k2lab.lab.config import LabError, fill, lab_path, read_yaml, resolve, root, setting
from k2lab.lab.job import open_job, prepare, stage_module
from k2lab.lab.records import read_run

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


# ---- submitting -----------------------------------------------------------------------------------------------------------


def cluster() -> Cluster:
    "The lab's configs/slurm.yaml; `LabError` for a mistake in it, or on a machine that cannot submit."
    path = lab_path('configs') / 'slurm.yaml'
    told = fill(Cluster, [(path, read_yaml(path))])
    if not shutil.which('sbatch'):
        raise LabError('no sbatch on this machine: submit from a login node of the cluster')
    return told


def check_spread(processes: int, nodes: int):
    "`LabError` unless every node gets the same number of processes."
    if processes % nodes:
        raise LabError(
            f'processes: {processes} cannot be spread over nodes: {nodes} (configs/slurm.yaml); take a multiple of {nodes}'
        )


def submit_stage(
    stage: str, scale: str = None, campaign: str = None, changes: dict = None
) -> tuple:
    "Prepare a run of a stage and submit it: `(its folder, the Slurm job's id)`; a refusal leaves no folder."
    told = resolve(stage_module(stage).Config, stage, scale or setting('lab', 'scale'), changes)
    check_spread(dataclasses.asdict(told).get('processes', 1), cluster().nodes)
    folder = prepare(stage, scale, campaign, changes).folder
    try:
        return folder, submit(folder)
    except LabError:
        shutil.rmtree(folder)
        raise


def submit(folder: Path) -> str:
    "The id of the Slurm job that will run a prepared folder, or continue an interrupted or failed one; submitit's files are in `slurm/`."
    import submitit
    from submitit.core.utils import FailedJobError

    asked, job, busy = cluster(), open_job(folder), waiting(folder)
    if busy:
        raise LabError(f'{folder}: {busy} already')
    if job.record['status'] in ('running', 'complete'):
        raise LabError(f"{folder}: {job.record['status']}; nothing to submit")
    check_spread(dataclasses.asdict(job.cfg).get('processes', 1), asked.nodes)
    job.record['slurm'] = dataclasses.asdict(
        asked
    )  # before the job can start and write the record itself
    job.write()
    # `exec`: the batch shell becomes Python, and gets the signals that Slurm sends to the batch shell
    executor = submitit.SlurmExecutor(
        job.folder / 'slurm',
        max_num_timeout=asked.timeouts,
        python=f'exec {shlex.quote(sys.executable)}',
    )
    executor.update_parameters(**sbatch_parameters(asked, job.stage))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return executor.submit(Resume(job.folder)).job_id
    except FailedJobError as e:
        raise LabError(f"{lab_path('configs') / 'slurm.yaml'}: {sbatch_error(e)}") from None


def sbatch_error(error: Exception) -> str:
    "What sbatch said, in one line."
    return (
        '; '.join(line.removeprefix('sbatch: error: ') for line in str(error).splitlines() if line)
        or 'sbatch refused the job'
    )


def sbatch_parameters(asked: Cluster, name: str) -> dict:
    "What submitit's SlurmExecutor is told; the job runs once, on the first node, and spreads itself from there."
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


# ---- on the node ----------------------------------------------------------------------------------------------------------


class Resume:
    "The work of a job: `k2lab resume FOLDER`, the same at the first start and at every later one. It is pickled, so it holds a path and nothing else."

    def __init__(self, folder: Path):
        self.folder, self.child = str(folder), None

    def __call__(self):
        "Run the folder and exit with the command's code, which makes the job COMPLETED or FAILED."
        if read_run(self.folder)['status'] == 'complete':
            return  # the node was lost after the run had ended
        self.child = subprocess.Popen([sys.executable, '-m', 'k2lab', 'resume', self.folder])
        signal.signal(
            signal.SIGTERM, lambda *_: self.child.terminate()
        )  # many clusters signal only the job's first process
        code = self.child.wait()
        if code:
            sys.exit(code)

    def checkpoint(self):
        "What to submit again; called by submitit before the time limit or at a preemption. Returns once the run has ended and said so in its record."
        from submitit.helpers import DelayedSubmission

        if self.child:
            self.child.terminate()
            with contextlib.suppress(ChildProcessError):
                os.waitid(
                    os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT
                )  # `wait` in `__call__` has its lock
        return DelayedSubmission(Resume(self.folder))


def across_nodes(command: list, environ: dict) -> list:
    "The `accelerate launch` command as it is; in a Slurm job of several nodes, the `srun` command that starts it once on each."
    nodes = int(environ.get('SLURM_JOB_NUM_NODES', 1))
    if nodes == 1:
        return command
    check_spread(int(command[command.index('--num_processes') + 1]), nodes)
    if 'SLURMD_NODENAME' not in environ:
        raise LabError(
            f'a Slurm job of {nodes} nodes, and this is none of them: submit with --on slurm'
        )
    at, port = (
        command.index('accelerate.commands.launch') + 1,
        20000 + int(environ['SLURM_JOB_ID']) % 10000,
    )  # below the ports that systems hand out
    machines = [
        '--num_machines',
        str(nodes),
        '--main_process_ip',
        environ['SLURMD_NODENAME'],
        '--main_process_port',
        str(port),
    ]
    # srun does not take over --cpus-per-task by itself since Slurm 22.05; the rank is each node's own, so a shell there fills it in
    cores = (
        [f"--cpus-per-task={environ['SLURM_CPUS_PER_TASK']}"]
        if 'SLURM_CPUS_PER_TASK' in environ
        else []
    )
    return [
        'srun',
        f'--nodes={nodes}',
        f'--ntasks={nodes}',
        '--ntasks-per-node=1',
        *cores,
        '--kill-on-bad-exit=1',
        'sh',
        '-c',
        f"exec {shlex.join(command[:at])} --machine_rank $SLURM_NODEID {shlex.join(machines + command[at:])}",
    ]


# ---- the queue ------------------------------------------------------------------------------------------------------------


def job_of(folder: Path) -> str:
    "The id of the last Slurm job that was submitted for a run folder, or an empty string."
    ids = [
        m[1]
        for p in Path(folder).glob('slurm/*_submission.sh')
        if (m := re.fullmatch(r'(\d+)_submission\.sh', p.name))
    ]
    return max(ids, key=int, default='')


def state(job_id: str) -> str:
    "What squeue says of a job: `pending`, `running`, `completing` ..., or an empty string when it is gone."
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
