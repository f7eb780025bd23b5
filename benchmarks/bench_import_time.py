"""How long until the first iteration is done?

Floor: the bare parts (torch's import; the same model, loss, backward and update written by hand).
Peer: the same run with ``torch.optim.SGD``, whose constructor imports dynamo and inductor.
Bars: `import fastrunner` at most 0.1 s over `import torch`; from `import fastrunner` to the end of the first iteration
with our own optimizer at most 0.3 s over the bare parts.
Gate: tests/test_imports.py must be green first.

Every sample is a fresh interpreter that times itself. `import torch` takes seconds and stands on both sides of each
bar, so it is done before the clock starts, and its noise stays out. Cases take turns; a bar compares within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastrunner.bench import machine
from fastrunner.bench.measure import Timing, difference, interleaved

RECORDS = Path(__file__).resolve().parent / "records"

TORCH = "import torch"
CLOCK = "import time; start = time.perf_counter_ns()"
STOP = "print('took', time.perf_counter_ns() - start)"
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


def sample(before: str, code: str) -> float:
    """Nanoseconds that ``code`` takes in a fresh interpreter, by that interpreter's own clock."""
    program = "\n".join((before, CLOCK, code, STOP))
    with tempfile.TemporaryDirectory() as folder:  # a run may write ./work_dirs
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise RuntimeError(f"a case failed:\n{code}\n{run.stderr}")
    return float(run.stdout.split("took ")[-1])


def report(samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    print("\nmilliseconds in a fresh interpreter")
    for name, values in samples.items():
        t = Timing(tuple(values))
        print(f"  {name:<34} median {t.median_ns / 1e6:7.1f}  min {t.min_ns / 1e6:7.1f}  mad {t.mad_ns / 1e6:6.1f}")
    bars = []
    for name, floor, allowed in BARS:
        over = difference(samples[name], samples[floor])
        met = over.median_ns <= allowed * 1e9
        minima = min(samples[name]) - min(samples[floor])
        print(
            f"{'met' if met else 'MISSED'}: {name} over {floor}: {over.median_ns / 1e6:.1f} ms, "
            f"at most {allowed * 1e3:.0f}"
        )
        print(
            f"  {over.confidence:.0%} sure: {over.low_ns / 1e6:.1f} to {over.high_ns / 1e6:.1f} ms; "
            f"smallest against smallest {minima / 1e6:.1f} ms"
        )
        bars.append(dict(case=name, floor=floor, allowed_s=allowed, over=asdict(over), minima_ns=minima, met=met))
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="samples a case; a round takes some 20 s")
    parser.add_argument("--record", action="store_true", help="write every sample to benchmarks/records/")
    arguments = parser.parse_args()
    facts = machine.facts(torch.device("cpu"))
    print(f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, load {facts['load'][0]:.2f}")
    cases = {name: partial(sample, *case) for name, case in CASES.items()}
    interleaved(cases, rounds=1)  # reads the files into the page cache, and writes the .pyc
    samples = interleaved(cases, arguments.rounds)
    bars = report(samples)
    if arguments.record:
        RECORDS.mkdir(exist_ok=True)
        path = RECORDS / f"{time.strftime('%Y-%m-%d')}_import_time.json"
        path.write_text(json.dumps(dict(machine=facts, bars=bars, samples_ns=samples), indent=1) + "\n")
        print(f"recorded in {path}")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
