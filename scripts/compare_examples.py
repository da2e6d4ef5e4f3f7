"""Run both examples on cpu and on mps and compare them by the project's own figures.

    python scripts/compare_examples.py [resnet] [gpt] [--steps 30]

resnet: the first step's gradients, leaf by leaf, within 1e-3 norm-wise, and the mean of the last five losses within 2 % or 0.02.
gpt: from the same saved weights, greedy tokens equal up to a first place where the two best logits differ by less than 1e-3.
Every run happens in a process of its own, under JAX_MPS_HOST=error. Exits with 1 where a figure is missed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GRADIENT, LOSS_RELATIVE, LOSS_ABSOLUTE, MARGIN = 1e-3, 0.02, 0.02, 1e-3


def run(example: str, backend: str, *arguments: object) -> str:
    """The example's standard output; its progress bar goes to this process's standard error."""
    command = [sys.executable, str(EXAMPLES / example / "main.py"), *map(str, arguments)]
    print(f"+ JAX_PLATFORMS={backend}", *command, flush=True)
    environment = {**os.environ, "JAX_PLATFORMS": backend, "JAX_MPS_HOST": "error"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"{example} failed on {backend}")
    return done.stdout


def verdict(good: bool, text: str) -> bool:
    print(f"{'ok  ' if good else 'FAIL'} {text}", flush=True)
    return good


def compare_resnet(folder: Path, steps: int) -> bool:
    results = {}
    for backend in ("cpu", "mps"):
        path = folder / f"resnet-{backend}.npz"
        run("resnet", backend, "--steps", steps, "--dump", path)
        with np.load(path) as file:
            results[backend] = dict(file)
    cpu, mps = results["cpu"], results["mps"]
    errors = {name: float(np.linalg.norm(mps[name] - cpu[name]) / max(np.linalg.norm(cpu[name]), 1e-30)) for name in cpu if name.startswith("grad")}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    same_leaves = cpu.keys() == mps.keys()
    gradients = verdict(same_leaves and errors[worst] <= GRADIENT, f"resnet: {len(errors)} gradient leaves, worst {errors[worst]:.1e} at {worst}")
    means = [float(result["losses"][-5:].mean()) for result in (cpu, mps)]
    apart = abs(means[0] - means[1])
    text = f"resnet: mean of the last five losses {means[0]:.4f} on cpu, {means[1]:.4f} on mps"
    return verdict(apart <= max(LOSS_RELATIVE * means[0], LOSS_ABSOLUTE), text) and gradients


def greedy(output: str) -> tuple[list[int], list[float]]:
    lines = dict(line.split(":", 1) for line in output.splitlines() if line.startswith(("Greedy tokens:", "Top-two margins:")))
    return [int(t) for t in lines["Greedy tokens"].split()], [float(m) for m in lines["Top-two margins"].split()]


def compare_gpt(folder: Path, steps: int, count: int) -> bool:
    weights = folder / "gpt.npz"
    run("gpt", "cpu", "--steps", steps, "--sample", 0, "--save", weights)
    outputs = {backend: greedy(run("gpt", backend, "--steps", 0, "--load", weights, "--sample", 0, "--greedy", count)) for backend in ("cpu", "mps")}
    (want, margins), (got, _) = outputs["cpu"], outputs["mps"]
    first = next((i for i, pair in enumerate(zip(want, got, strict=True)) if pair[0] != pair[1]), None)
    if first is None:
        return verdict(len(want) == count, f"gpt: all {count} greedy tokens are equal")
    return verdict(margins[first] < MARGIN, f"gpt: {first} greedy tokens are equal; at the next one the logits differ by {margins[first]:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", metavar="resnet|gpt", help="default: both")
    parser.add_argument("--steps", type=int, default=30, help="of resnet")
    parser.add_argument("--gpt-steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    if unknown := set(options.examples) - {"resnet", "gpt"}:  # argparse's choices refuse an empty list on 3.12
        parser.error(f"no example named {', '.join(sorted(unknown))}: choose resnet, gpt")
    options.examples = options.examples or ["resnet", "gpt"]
    good = True
    with tempfile.TemporaryDirectory() as name:
        if "resnet" in options.examples:
            good &= compare_resnet(Path(name), options.steps)
        if "gpt" in options.examples:
            good &= compare_gpt(Path(name), options.gpt_steps, options.tokens)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
