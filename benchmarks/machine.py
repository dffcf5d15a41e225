"""What every benchmark says about itself: with what and on which CPU it ran, and how it takes time."""

import csv, datetime, importlib, platform, shlex, statistics, sys, time
from pathlib import Path

SIDES = 'Both sides run in one process, in turns. *Wall* is elapsed time, *CPU* the time that the process had a core.'
RATIO = 'A ratio is how many times as long the reference takes: median (least to most).'


def cpu():
    "Name of the CPU's model."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def command():
    "The command line; folders of the user's own are printed as DIR, other absolute paths by their names."
    words = ['DIR' if Path(w).is_dir() else Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return f'`{shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])}`'


def heading(title, threads, packages, how=SIDES):
    "Lines of Markdown: title, command, date, CPU, threads, versions, and how times were taken."
    versions = ', '.join(f'{p} {importlib.import_module(p).__version__.split("+")[0]}' for p in packages)
    where = f'{cpu()}, {threads} thread{"s" * (threads > 1)}'
    about = f'{datetime.date.today()}; {where}; Python {platform.python_version()}, {versions}. {how}'
    return [f'# {title}', '', command(), '', about.strip(), '']


def seconds(call):
    "The call's result and its seconds (wall, CPU)."
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def clock(call, times=1):
    "The call's last result and its median seconds (wall, CPU)."
    taken = []
    for _ in range(times):
        result, t = seconds(call)
        taken.append(t)
    return result, tuple(statistics.median(t) for t in zip(*taken))


def alternate(sides, rounds):
    "Each of {name: function} once a round, in turn: last results, and seconds (wall, CPU) of each round."
    results, taken = {}, {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            results[name], t = seconds(call)
            taken[name].append(t)
    return results, taken


def ratios(theirs, ours):
    "[wall ratios, CPU ratios] of runs made in turn."
    return [[a[k] / b[k] for a, b in zip(theirs, ours)] for k in (0, 1)]


def spread(values):
    "Median and range."

    def digits(x):
        return f'{x:.0f}' if x >= 20 else f'{x:.1f}' if x >= 3 else f'{x:.2f}'

    return f'**{digits(statistics.median(values))}** ({digits(min(values))} to {digits(max(values))})'


def grow(table, jobs, columns, run, keep=lambda row: True):
    """Append to a CSV file the row run(*job) of each job that it lacks, at once; a job is the values of `columns`.
    Rows that are not to be kept go."""
    rows = [r for r in csv.DictReader(table.open()) if keep(r)] if table.exists() else []
    done = {tuple(r[c] for c in columns) for r in rows}
    for job in jobs:
        if tuple(map(str, job)) in done:
            continue
        rows.append(run(*job))
        print(rows[-1], flush=True)
        with table.open('w', newline='') as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)


def publish(lines, out):
    "Print, and write to `out` if it is given."
    text = '\n'.join(lines) + '\n'
    print(text)
    if not out:
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text)
