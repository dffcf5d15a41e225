"""What every benchmark of the masks says about itself: where, when and with what it ran, and how it takes time."""
import datetime, importlib, os, platform, shlex, statistics, sys, time
from pathlib import Path


SIDES = 'Both sides run in one process, in turns. *Wall* is elapsed time; *CPU* is the time that this process had a core, which does not grow while others have it.'

def heading(title, threads, packages, how=SIDES):
    "Lines of Markdown: title, command, date, machine, versions, and how times were taken."
    versions = ', '.join(f'{p} {importlib.import_module(p).__version__.split("+")[0]}' for p in packages)
    load = f', load average {os.getloadavg()[0]:.0f} at the end (others work on it too)' if hasattr(os, 'getloadavg') else ''
    return [f'# {title}', '', f'`python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}`'.replace(' `', '`'), '',
            f'{datetime.date.today()}; {threads} {"core" if threads == 1 else "cores"} of a shared {os.cpu_count()}-core {platform.machine().replace("_", "-")} machine{load}; Python {platform.python_version()}, {versions}. {how}', '']


def clock(call, times=1):
    "The call's last result and its median seconds (wall, CPU)."
    taken = []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return result, tuple(statistics.median(t) for t in zip(*taken))


def publish(lines, out):
    "Print, and write to `out` if it is given."
    text = '\n'.join(lines) + '\n'
    print(text)
    if out: Path(out).parent.mkdir(parents=True, exist_ok=True); Path(out).write_text(text)
