"""How long until the first iteration is done?

Floor: the bare parts (torch's import; the same model, loss, backward and update written by hand).
Peer: the same run with ``torch.optim.SGD``, whose constructor imports dynamo and inductor.
Bars: `import fastrunner` at most 0.1 s over `import torch`; from `import fastrunner` to the end of the first iteration
with our own optimizer at most 0.3 s over the bare parts.
Gate: tests/test_imports.py must be green first.

Every sample is a fresh interpreter that times itself. `import torch` takes seconds and stands on both sides of each
bar, so it is done before the clock starts, and its noise stays out. The cases take turns, each round in another order,
so that drift of the machine meets all of them alike; a bar compares within a round. The bars are on wall time;
processor time stands beside it, because it moves less when the machine is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RECORDS = Path(__file__).resolve().parent / "records"

TORCH = "import torch"
CLOCK = "import time; start = time.perf_counter(), time.process_time()"
STOP = "print('seconds', time.perf_counter() - start[0], time.process_time() - start[1])"
PARTS = """
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
batch = dict(img=torch.randn(16, 64), gt_label=torch.randint(10, (16,)))
"""
BARE = f"""
{PARTS}
torch.nn.functional.cross_entropy(model(batch["img"]), batch["gt_label"]).backward()
with torch.no_grad():
    for p in model.parameters():
        p.sub_(p.grad, alpha=0.1)
"""
RUN = """
import fastrunner
{parts}
model = fastrunner.supervised(model, torch.nn.functional.cross_entropy)
optimizer = {optimizer}
runner = fastrunner.build_runner(
    dict(type="IterBasedRunner", max_iters=1), default_args=dict(model=model, optimizer=optimizer)
)
runner.register_training_hooks(dict(policy="step", step=[100]), dict(grad_clip=dict(max_norm=1.0)))
runner.run([[batch]], [("train", 1)])
"""
OURS = "fastrunner.build_optimizer(model, dict(type='FusedSGD', lr=0.1, momentum=0.9))"
TORCHS = "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"

CASES = {  # name: (before the clock, under the clock)
    "import torch": ("", TORCH),
    "nothing": (TORCH, ""),
    "import fastrunner": (TORCH, "import fastrunner"),
    "from fastrunner import *": (TORCH, "from fastrunner import *"),
    "first iteration, bare parts": (TORCH, BARE),
    "first iteration, FusedSGD": (TORCH, RUN.format(parts=PARTS, optimizer=OURS)),
    "first iteration, torch.optim.SGD": (TORCH, RUN.format(parts=PARTS, optimizer=TORCHS)),
}
BARS = [  # (case, floor, seconds allowed over the floor)
    ("import fastrunner", "nothing", 0.1),
    ("first iteration, FusedSGD", "first iteration, bare parts", 0.3),
]


def sample(before: str, code: str) -> tuple[float, float]:
    """Wall and processor seconds that ``code`` takes in a fresh interpreter, by that interpreter's own clocks."""
    program = "\n".join((before, CLOCK, code, STOP))
    with tempfile.TemporaryDirectory() as folder:  # a run may write ./work_dirs
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise RuntimeError(f"a case failed:\n{code}\n{run.stderr}")
    wall, processor = run.stdout.split("seconds ")[-1].split()
    return float(wall), float(processor)


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    for case in CASES.values():
        sample(*case)  # reads the files into the page cache, and writes the .pyc
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    order, shuffle = list(CASES), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(sample(*CASES[name]))
    return samples


def summary(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest and median absolute deviation, all in the unit of the values."""
    middle = median(values)
    return dict(median=middle, min=min(values), max=max(values), mad=median([abs(v - middle) for v in values]))


def line(values: dict[str, float], sign: str = "") -> str:
    return "  ".join(f"{name} {value:{sign}6.3f}" for name, value in values.items())


def report(samples: dict[str, list[tuple[float, float]]]) -> list[dict[str, object]]:
    walls = {name: [wall for wall, _ in pairs] for name, pairs in samples.items()}
    processors = {name: [processor for _, processor in pairs] for name, pairs in samples.items()}
    print("\nseconds in a fresh interpreter")
    for name in samples:
        print(f"{name:<34} {line(summary(walls[name]))}  processor {median(processors[name]):6.3f}")
    bars: list[dict[str, object]] = []
    for name, floor, allowed in BARS:
        over = summary([a - b for a, b in zip(walls[name], walls[floor], strict=True)])
        bar = dict(
            case=name,
            floor=floor,
            allowed_s=allowed,
            over_s=over,
            over_of_minima_s=min(walls[name]) - min(walls[floor]),
            over_processor_s=median([a - b for a, b in zip(processors[name], processors[floor], strict=True)]),
            met=over["median"] <= allowed,
        )
        print(f"\n{'met' if bar['met'] else 'MISSED'}: {name} over {floor}, allowed {allowed} s")
        print(
            f"  {line(over, '+')}  of minima {bar['over_of_minima_s']:+.3f}  processor {bar['over_processor_s']:+.3f}"
        )
        bars.append(bar)
    return bars


def machine() -> dict[str, object]:
    import torch

    return dict(
        processor=platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        load_before=os.getloadavg(),
        python=platform.python_version(),
        torch=torch.__version__,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    arguments = parser.parse_args()
    facts = machine()
    print(f"torch {facts['torch']}, Python {facts['python']}, {facts['cores']} cores, load {os.getloadavg()[0]:.1f}")
    samples = measure(arguments.rounds)
    bars = report(samples)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / "import_time.json"
        path.write_text(json.dumps(dict(machine=facts, bars=bars, samples_s=samples), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
