"""How long until the first iteration is done?

Floor: the bare parts (torch's import; the same model, loss, backward and update written by hand).
Peer: the same run with ``torch.optim.SGD``, whose constructor imports dynamo and inductor.
Bars: `import fastrunner` at most 0.1 s over `import torch`; from `import fastrunner` to the end of the first iteration
with our own optimizer at most 0.3 s over the bare parts.
Gate: tests/test_imports.py must be green first.

Every sample is a fresh interpreter that times itself, so the start of Python is not counted. The cases take turns,
each round in another order, so that drift of the machine meets all of them alike; a bar compares within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records"

CLOCK = "import time; start = time.perf_counter()"
STOP = "print('seconds', time.perf_counter() - start)"
PARTS = """
import torch
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

CASES = {
    "import torch": "import torch",
    "import torch, fastrunner": "import torch, fastrunner",
    "from fastrunner import *": "from fastrunner import *",
    "first iteration, bare parts": BARE,
    "first iteration, FusedSGD": RUN.format(parts=PARTS, optimizer=OURS),
    "first iteration, torch.optim.SGD": RUN.format(parts=PARTS, optimizer=TORCHS),
}
BARS = [  # (case, floor, seconds allowed over the floor)
    ("import torch, fastrunner", "import torch", 0.1),
    ("first iteration, FusedSGD", "first iteration, bare parts", 0.3),
]


def sample(code: str) -> float:
    """Seconds that ``code`` takes in a fresh interpreter, by that interpreter's own clock."""
    program = "\n".join((CLOCK, code, STOP))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"a case failed:\n{code}\n{run.stderr}")
    return float(run.stdout.split("seconds ")[-1])


def measure(rounds: int) -> dict[str, list[float]]:
    for code in CASES.values():
        sample(code)  # reads the files into the page cache, and writes the .pyc
    samples: dict[str, list[float]] = {name: [] for name in CASES}
    order, shuffle = list(CASES), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(sample(CASES[name]))
    return samples


def mad(values: list[float]) -> float:
    """Median absolute deviation, in the unit of the values."""
    middle = statistics.median(values)
    return statistics.median(abs(v - middle) for v in values)


def report(samples: dict[str, list[float]]) -> list[dict[str, object]]:
    for name, values in samples.items():
        print(
            f"{name:<34} median {statistics.median(values):6.3f} s   min {min(values):6.3f}   "
            f"max {max(values):6.3f}   mad {mad(values):5.3f}"
        )
    bars: list[dict[str, object]] = []
    for name, floor, allowed in BARS:
        over = [a - b for a, b in zip(samples[name], samples[floor], strict=True)]
        median, minima = statistics.median(over), min(samples[name]) - min(samples[floor])
        met = median <= allowed
        bars.append(dict(case=name, floor=floor, allowed_s=allowed, median_s=median, minima_s=minima, met=met))
        print(
            f"{'met   ' if met else 'MISSED'} {name} - {floor}: median {median:+.3f} s, "
            f"minima {minima:+.3f}, mad {mad(over):.3f}, allowed {allowed}"
        )
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
