"""Draws the losses of runs, for example in two precisions, over those of runs that differ in the seed alone.

    python benches/loss_curves.py curves.png f32=runs/f32-0 f32=runs/f32-1 f32=runs/f32-2 bf16=runs/bf16-0

Runs of the first name are the yardstick. For each other run it prints how far its smoothed loss is from that of the yardstick's run of the same
seed, beside how far the yardstick's runs are from their mean: medians and maxima over the steps. It ends with exit status 1 if one of the former
is larger. Drawing takes matplotlib (`pip install matplotlib`)."""

import argparse
import json
import math
import statistics
import sys
import tomllib
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    plt = None

# Each point is the mean of so many logged losses: one loss is that of one batch, and noisy.
WINDOW = 20


def read(run):
    """Seed of a run, its steps, and its smoothed losses."""
    config = tomllib.loads((run / "config.toml").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["loss"] for line in lines if "loss" in line}  # what a resume did again counts once
    steps = sorted(logged)
    losses = [logged[step] for step in steps]
    smooth = [statistics.fmean(losses[i - WINDOW + 1 : i + 1]) for i in range(WINDOW - 1, len(losses))]
    if not smooth:
        sys.exit(f"{run}: {len(losses)} losses are logged, and {WINDOW} make one point: let it run on, or set log.every")
    return config["train"]["seed"], steps[WINDOW - 1 :], smooth


def distances(ours, theirs):
    return [abs(a - b) for a, b in zip(ours, theirs)]


def told(what, values):
    """Median and maximum; of what is not all numbers, none."""
    numbers = (statistics.median(values), max(values)) if all(map(math.isfinite, values)) else (math.nan, math.nan)
    print("{}: median {:.2g}, at most {:.2g}".format(what, *numbers))
    return numbers


def draw(picture, yardstick, steps, of_seed, others):
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    axes.fill_between(steps, [min(at) for at in zip(*of_seed.values())], [max(at) for at in zip(*of_seed.values())], color="0.85",
                      label=f"{yardstick}, {len(of_seed)} seeds")  # fmt: skip
    for name, seed, _, losses in others:
        axes.plot(steps, of_seed[seed], color="tab:blue", linewidth=1.5, label=f"{yardstick}, seed {seed}")
        axes.plot(steps, losses, color="tab:orange", linewidth=1.5, linestyle="--", label=f"{name}, seed {seed}")
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} logged", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("runs", nargs="+", metavar="NAME=RUN")
    arguments = arguments.parse_args()
    named = [run.partition("=") for run in arguments.runs]
    runs = [(name, *read(Path(folder))) for name, _, folder in named]
    if any(steps != runs[0][2] for _, _, steps, _ in runs):
        sys.exit("the runs have logged different steps: give all of them the same train.steps and log.every, and let them finish")

    yardstick, steps = runs[0][0], runs[0][2]
    of_seed = {seed: losses for name, seed, _, losses in runs if name == yardstick}
    others = [run for run in runs if run[0] != yardstick]
    if others and len(of_seed) < 2:
        sys.exit(f"runs of {yardstick} with two seeds at least are needed, to know how far seeds are apart")
    if alone := [seed for _, seed, _, _ in others if seed not in of_seed]:
        sys.exit(f"there is no run of {yardstick} with seed {alone[0]}")
    mean = [statistics.fmean(at) for at in zip(*of_seed.values())]
    apart = [d for losses in of_seed.values() for d in distances(losses, mean)]
    bounds = told(f"{yardstick}, {len(of_seed)} seeds, from their mean", apart)
    outside = []
    for name, seed, _, losses in others:
        found = told(f"{name}, seed {seed}, from {yardstick} of that seed", distances(losses, of_seed[seed]))
        if not all(value <= bound for value, bound in zip(found, bounds)):
            outside.append(f"{name}, seed {seed}")
    if plt:
        draw(arguments.picture, yardstick, steps, of_seed, others)
    else:
        print("NOT DRAWN: there is no matplotlib here")
    if outside:
        sys.exit(f"further apart than seeds are: {'; '.join(outside)}")


if __name__ == "__main__":
    main()
