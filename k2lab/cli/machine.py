"""Commands about this machine: whether a scale can run on it, whether its numbers are right, a model served from it."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import psutil

from k2lab.cli.progress import Progress
from k2lab.cli.tables import wrapped_table
from k2lab.lab.config import SCALES, LabError, lab_path, load_env, one_of, root, setting
from k2lab.lab.display import clock
from k2lab.lab.files import as_json


def doctor(words: list, options: dict) -> int:
    "Print a line for each check of a scale; 1 if the scale cannot run here."
    from k2lab.scale.doctor import as_report, examine, verdict

    scale = one_of('scale', options['scale'] or setting('lab', 'scale'), SCALES)
    findings = examine(scale)
    report = as_report(scale, findings)
    if options['json']:
        print(as_json(report))
    else:
        print(*findings, verdict(scale, findings), sep='\n')
    return int(not report['can_run'])


def selftest(words: list, options: dict) -> int:
    "Test and measure the GPU or the CPU of this machine; 1 if a block fails."
    from k2lab.scale import selftest as s

    named = options['blocks']
    only = tuple(filter(None, named.replace(' ', '').split(','))) if named else ()
    if named is not None and not only:
        raise LabError(f"--blocks names no block; there are: {', '.join(s.BLOCKS)}")
    tell = lambda line: None if options['json'] else print(line, flush=True)
    record = s.selftest(words[0], only=only, tell=tell)
    if options['json']:
        print(as_json(record))
    else:
        print(f'\n{selftest_text(record)}')
    return int(record['status'] != 'complete')


def selftest_text(record: dict) -> str:
    "The table of a self-test as text, and where its run is."
    from k2lab.lab.records import standing
    from k2lab.scale.selftest import lines_of

    lines = [(block, what, value) for block, what, value in lines_of(record['selftest'])]
    return f"{wrapped_table(lines)}\n{record['folder']}: {standing(record)}"


# ---- a model, served ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    "A signal that asks this process to end."

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    "Within the block SIGINT, SIGTERM and SIGHUP raise `Stop`, unless who started us had them ignored."

    def stop(number, frame):
        raise Stop(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Model:
    "A checkpoint to serve: where it is, and the name that it is served by."

    place: str | Path
    name: str
    asked: str  # as it was named
    env: dict  # the names of the lab at a scale
    campaign: str


def lab_here() -> bool:
    "Whether there is a lab around here."
    with contextlib.suppress(LabError):
        return bool(root())
    return False


def find_model(asked: str, options: dict) -> Model:
    "The checkpoint that a word names: a folder, a name of the lab around here, or a hub id."
    from k2lab.lab.names import HUB_ID, parent_of, place_of
    from k2lab.lab.records import check_campaign

    scale = options['scale'] and one_of('scale', options['scale'], SCALES)
    env = load_env(scale or setting('lab', 'scale')) if lab_here() else {}
    campaign = check_campaign(options['campaign'] or 'scratch')
    folder = Path(asked).expanduser()
    if folder.is_dir() and ('/' in asked or asked.partition('@')[0] not in env.get('models', {})):
        folder = folder.resolve()
        return Model(folder, folder.name, str(folder), env, campaign)
    name = asked.partition('@')[0]
    if env:
        home = lab_path('runs') / campaign / 'serve'
        job = SimpleNamespace(campaign=campaign, scale=env['scale'], env=env, folder=home)
        return Model(place_of(parent_of(job, asked)), name, asked, env, campaign)
    if not HUB_ID.fullmatch(asked):
        raise LabError(
            f'{asked}: no such folder, no hub id (org/name), and no lab here knows names'
        )
    return Model(asked, name, asked, env, campaign)


DEVICE = 'from vllm.platforms import current_platform as p; print("device:", p.device_type)'


def vllm_device(python: str) -> tuple[str, str]:
    "`(the device that vLLM uses, '')` in an interpreter, or `('', why it does not work)`."
    if not python and importlib.util.find_spec('vllm') is None:
        return (
            '',
            "not installed: pip install 'k2lab[serve]', or --python of an environment that has it",
        )
    python = python or sys.executable
    if shutil.which(python) is None:
        return '', f'{python}: no such program'
    words, quiet = [python, '-c', DEVICE], os.environ | {'VLLM_LOGGING_LEVEL': 'ERROR'}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=quiet)
    except subprocess.TimeoutExpired:
        return '', f'{python} did not import it within 300 s'
    device = re.search(r'^device: (\w+)$', done.stdout, re.M)
    said = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
    return (device[1], '') if device else ('', f'{python} does not import it ({said})')


def engine_for(model: Model, options: dict) -> tuple[str, str]:
    "`(engine, why)`: as asked, else vLLM where it works and can serve the model; `LabError` if it is asked in vain."
    from k2lab.models.quantized import fetched, read_config
    from k2lab.serving.vllm import too_small

    asked = options['engine'] or ('vllm' if options['python'] or options['--'] else '')
    if asked and one_of('engine', asked, ('vllm', 'embedded')) == 'embedded':
        if options['python'] or options['--']:
            raise LabError('serve: --python and what stands after -- are for vLLM; leave them out')
        return asked, 'as asked'
    device, why = vllm_device(options['python'] or '')
    if not device:
        if asked:
            raise LabError(f'vLLM is {why}' if why.startswith('not ') else f'vLLM: {why}')
        return 'embedded', f'vLLM is {why}' if why.startswith('not ') else f'vLLM: {why}'
    if str(model.place).startswith('smoke:'):
        small = 'a random model'
    else:
        small = too_small(read_config(fetched(model.place, ['config.json'])))
    if small and not asked:
        return 'embedded', f'vLLM cannot serve it: {small}'
    return 'vllm', f'on {device}'


def number(name: str, text: str | None, default, kind: type = int):
    "The number of zero or more that an option was given, or its default; `LabError` for anything else."
    with contextlib.suppress(ValueError, TypeError):
        if (given := kind(text)) >= 0:
            return given
    if text is None:
        return default
    raise LabError(f"serve: --{name} is a number from 0 on, not '{text}'")


def config_for(options: dict):
    "The configuration of a server as far as the command line decides it; `LabError` if its port is taken."
    from k2lab.launch_teacher_vllm import Config
    from k2lab.serving.address import check_port, stays_here
    from k2lab.serving.vllm import options_of

    host, port = options['host'] or '127.0.0.1', number('port', options['port'], 8000)
    if not stays_here(host) and not options['public']:
        raise LabError(f'serve: other machines may reach {host}; add --public if they are to')
    asked = options_of(options['--'])
    cfg = Config(
        engine='vllm' if asked or options['python'] else 'embedded',
        host=host,
        public=bool(options['public']),
        port=port,
        key_env=options['key-env'] or 'K2LAB_API_KEY',
        python=options['python'] or '',
        vllm=asked,
        ready_s=number('ready-s', options['ready-s'], 3600, float),
    )
    check_port(host, cfg.port)
    return cfg


def check_fits(model: Model, cfg):
    "`LabError` if the plan of a model says that it does not fit this machine; a shape that nobody knows is tried."
    from k2lab.scale.plan import estimated, lacking, this_machine, work_of

    machine = this_machine()
    try:
        asked = dataclasses.replace(cfg, model=model.asked)
        work = work_of('launch_teacher_vllm', asked, model.env, model.campaign)
    except LabError:
        return
    if why := work and lacking(estimated(work, machine), machine):
        raise LabError(
            f'serve: {model.name} does not fit: {why[0]}; --anyway to start all the same'
        )


def new_home(name: str) -> Path:
    "A new folder that only this user can read, in the runs of the lab here or in the system's place for such."
    above = lab_path('runs') / '.serve' if lab_here() else None
    if above:
        above.mkdir(parents=True, exist_ok=True)
    word = re.sub(r'[^\w.-]+', '-', name)[:40]
    return Path(tempfile.mkdtemp(prefix=f'{date.today()}-{word}-', dir=above))


def key_place(served, variable: str, home: Path) -> dict:
    "Where the key of a server is: the variable that had it, or a new file that only this user can read."
    if os.environ.get(variable):
        return {'key_env': variable}
    file = home / 'key'
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as out:
        out.write(served.key)
    return {'key_file': str(file)}


def announce(about: dict, as_text: bool):
    "Print how a client reaches the server: one line of JSON, or text that ends in a line for a shell."
    if not as_text:
        print(as_json(about), flush=True)
        return
    key = f'${about["key_env"]}' if 'key_env' in about else f'$(cat {about["key_file"]})'
    where = f'in {key}' if 'key_env' in about else f'in {about["key_file"]}, for you alone'
    print(
        f'{about["model"]} is up after {clock(about["ready_s"])}, served by {about["engine"]}\n'
        f'  base_url  {about["base_url"]}\n  model     {about["model"]}\n  key       {where}\n'
        f'  log       {about["log"]}\n\n'
        f'export OPENAI_BASE_URL={about["base_url"]} OPENAI_API_KEY="{key}"\n',
        flush=True,
    )


def serve(words: list, options: dict) -> int:
    "Serve a model until a signal stops it; 0 then, 1 if the server ends by itself."
    from k2lab.launch_teacher_vllm import family_at
    from k2lab.serving.vllm import meant

    cfg = config_for(options)
    model = find_model(words[0], options)
    engine, why = engine_for(model, options)
    family = family_at(model.place) if engine == 'vllm' else 'other'
    cfg = dataclasses.replace(cfg, model=model.name, engine=engine, family=family)
    if why == 'on cpu' and not meant('kv_cache_memory_bytes', cfg.vllm):
        room = psutil.virtual_memory().available // 4  # else nearly all of the machine's memory
        cfg = dataclasses.replace(cfg, vllm={'kv_cache_memory_bytes': room} | cfg.vllm)
    if model.env and not options['anyway']:
        check_fits(model, cfg)
    progress = Progress(f'serve {model.name}')
    progress.note(f'{engine} ({why}), from {model.place}')
    with stoppable(), warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = lambda message, *rest, **more: progress.note(f'warning: {message}')
        return until_stopped(model, cfg, progress, not options['json'])


def until_stopped(model: Model, cfg, progress: Progress, as_text: bool) -> int:
    "Start a server, say where it is, and wait for a signal: 0, or 128 and its number if it was not up yet."
    from k2lab.launch_teacher_vllm import ending, last_line, serving

    home, up = new_home(model.name), False
    log = home / 'server.log'
    tell = lambda spent, line: progress.say(f'{progress.head}  loading {clock(spent)} · {line}')
    try:
        with serving(cfg, model.place, log, tell=tell) as served:
            about = dict(base_url=f'{served.url}/v1', model=served.model, engine=cfg.engine)
            about |= key_place(served, cfg.key_env, home)
            up = True
            progress.note('up; Ctrl-C stops it')
            announce(about | dict(log=str(log), ready_s=served.ready_s), as_text)
            served.process.wait()
            progress.note(
                f'the server {ending(served.process.returncode)}: {last_line(log)} (log: {log})'
            )
            return 1
    except Stop as stop:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            progress.note(f'stopped by {signal.Signals(stop.number).name}; log: {log}')
        return 0 if up else 128 + stop.number
    finally:
        (home / 'key').unlink(missing_ok=True)
