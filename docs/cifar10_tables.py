"""Tables, lines and curves of the runs on CIFAR-10 that CPU cores have trained."""

import math
import statistics

from ablations import curves
from ablations.runs import score
from ablations.tables import mean_and_deviation, pooled_deviation
from docs.rows import (
    NOT_MEASURED,
    RESULTS,
    Row,
    accuracy,
    against_first,
    both,
    by_variant,
    last_of,
    markdown,
    recorded,
)

CURVES = [RESULTS / f"{name}.jsonl" for name in ("cifar10_cpu_runs", "cifar10_cpu_two_hours", "cifar10_cpu_long")]

# Variants of the screen whose overrides are long, as they are called in the table.
SCREEN_NAMES = {
    "first": "first",
    "smaller_crops": "crops from 0.08 of the area, both views",
    "plain_target": "target view without crop, flip and RandAugment",
    "decoder_32": "decoder at 32 px with 16 channels",
    "wider_encoder": "encoder of width 36, decoder with 20 channels",
    "twice_the_rate": "learning rates 2e-3",
    "no_zero_starts": "`initialization=torch` (no layers that start at zero)",
    "more_noise": "timesteps by log-SNR: logit-normal, mean -1, standard deviation 1.5",
    "grey": "greyscale with probability 0.1, both views",
    "latent_256_plain_target": "latent of 256 and plain target",
    "latent_256_plain_target_v": "latent of 256, plain target and v",
    "latent_512_plain_target": "latent of 512 and plain target",
}

# Variants of the runs on CPU cores, by stage and variant.
RUN_NAMES = {
    ("train", "run"): "SODA, {of} epochs",
    ("hour", "soda"): "SODA, {of} epochs",
    ("constant_rate", "soda"): "SODA, {of} epochs, constant rate",
    ("reference", "recipe"): "the reference's schedule, views and z",
    ("simclr", "smaller_crops"): "SimCLR",
    ("simclr", "simclr"): "SimCLR with SODA's crops",
    ("supervised", "supervised"): "supervised",
}


def screened(epochs: int) -> dict[str, list[Row]]:
    """Returns the rows of the runs of the screen on CIFAR-10 that have this length, by variant."""
    return by_variant(row for row in recorded("cifar10_cpu_screen") if row["of_epochs"] == epochs)


def controls() -> str:
    """Returns the lines of README.md on the controls of the runs, and on the noise schedules, paired by seed."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in recorded("cifar10_cpu_runs"):
        if row["complete"]:
            runs.setdefault((row["stage"], row["variant"]), []).append(row)
    ours = runs.pop(("hour", "soda"))
    runs.pop(("constant_rate", "soda"), None)  # not another method
    found = [f"{name}{_dagger(runs[kind])}: {both(runs[kind])}" for kind, name in RUN_NAMES.items() if kind in runs]
    groups = screened(2)
    linear = {row["seed"]: score(row) for row in groups["linear"]}
    gains = [score(row) - linear[row["seed"]] for row in groups["first"] if row["seed"] in linear]
    seeds = "1 seed" if len(gains) == 1 else f"{len(gains)} seeds"
    most = max(len(last_of(rows)) for kind, rows in runs.items() if kind in RUN_NAMES)
    return (
        f"The same narrow encoder, trained for {ours[0]['of_epochs']} epochs by other methods "
        f"({'one seed' if most == 1 else f'{most} seeds'}; †: pooled features): "
        f"{'; '.join(found)}. Floors: {floor_line()}.\n"
        "The paper's [noise schedule](docs/schedules.md) alone is "
        f"{mean_and_deviation(gains)} points better than the reference's (mean of k-NN and probe; two epochs, {seeds})."
    )


def _dagger(rows: list[Row]) -> str:
    return "†" if any("pooled" in protocol for row in rows for protocol in row["table"]) else ""


def screen() -> str:
    """Returns the table of the screen on CIFAR-10, after one and two epochs. The best variant is bold."""
    lengths = {"1 epoch": screened(1), "2 epochs": screened(2)}
    others = {"1 epoch": lengths["2 epochs"].values(), "2 epochs": lengths["1 epoch"].values()}
    differences = {length: against_first(groups, others[length]) for length, groups in lengths.items()}
    groups = lengths["1 epoch"]
    best = max(groups, key=lambda variant: statistics.mean(map(score, groups[variant])))
    head, lines = ["variant", "GFLOP per image"], []
    for variant, (row, *_) in groups.items():
        name = SCREEN_NAMES.get(variant) or f"`{' '.join(row['overrides'])}`"
        line = [f"**{name}**" if variant == best else name, f"{row['step_gflop']:.2f}"]
        for length, measured in lengths.items():
            rows = measured.get(variant, [])
            minutes = f"{statistics.mean(row['seconds'] for row in rows) / 60:.0f}" if rows else ""
            line += [both(rows) if rows else "", differences[length].get(variant, ""), minutes]
        lines.append(line)
    for length in lengths:
        head += [f"{length}: k-NN / linear", "against the first", "minutes"]
    return markdown(head, lines)


def screen_ties() -> str:
    """Returns the sentences on the differences that the table of the screen calls ties."""
    groups = [rows for epochs in (1, 2) for rows in screened(epochs).values()]
    deviation = pooled_deviation([[score(row) for row in rows] for rows in groups])
    assert deviation is not None
    pairs, single = (2 * deviation * math.sqrt(2 / n) for n in (2, 1))
    return (
        f"Pooled over all variants and both lengths, the mean of k-NN and linear has a standard deviation of "
        f"{deviation:.2f} over seeds.\nDifferences of two pairs of runs are therefore ties up to {pairs:.1f}, those of "
        f"one pair up to {single:.1f}."
    )


def run_name(kind: tuple[str, str], of_epochs: int | None) -> str:
    """Returns the name of a run on CPU cores, by its stage and variant."""
    return RUN_NAMES.get(kind, ", ".join(kind)).format(of=of_epochs)


def readme_line(rows: list[Row], config: str) -> list[str]:
    """Returns the line of README.md about the last evaluation in `rows`, which are those of the runs of a config."""
    newest = max(rows, key=lambda row: row["images"])
    same = [row for row in rows if (row["images"], row["of_epochs"]) == (newest["images"], newest["of_epochs"])]
    done = "" if newest["complete"] else f"{newest['epochs']:g} of "
    minutes = sorted(row["seconds"] / 60 for row in same)
    seeds = f"{minutes[0]:.0f} minutes, one seed"
    if len(same) > 1:
        seeds = f"{minutes[0]:.0f} to {minutes[-1]:.0f} minutes each, {len(same)} seeds"
    page = "training.md#one-hour-on-a-cpu" if config == "cifar10_cpu.yaml" else "results.md#cifar-10-on-cpu-cores"
    data = "CIFAR-10 ([JPEG copy](docs/results.md#cifar-10-on-cpu-cores-a-screen))"
    return [
        f"{data}, a narrow model, {done}{newest['of_epochs']} epochs ({newest['images']:,} images)",
        both(same),
        f"[{seeds}, AVX512-BF16 cores](docs/{page}): "
        f"`python train.py --config config/{config} --use_amp data.name=folder data.root=DIR`",
    ]


def runs() -> str:
    """Returns the table of the runs on CPU cores: each evaluation, as the mean over seeds."""
    groups: dict[tuple[str, str], dict[tuple[int, float], list[Row]]] = {kind: {} for kind in RUN_NAMES}
    for row in recorded("cifar10_cpu_two_hours") + recorded("cifar10_cpu_long") + recorded("cifar10_cpu_runs"):
        of_kind = groups.setdefault((row["stage"], row["variant"]), {})
        of_kind.setdefault((row["of_epochs"], row["epochs"]), []).append(row)
    lines = []
    for kind, points in groups.items():
        for (of_epochs, epochs), rows in sorted(points.items()):
            name = run_name(kind, of_epochs)
            seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
            lines.append([f"{name}, after {epochs:g}", seeds, f"{rows[0]['images']:,}", both(rows), both(rows, "top3")])
        if not points:
            lines.append([run_name(kind, None), "", "", NOT_MEASURED, ""])
    return markdown(["run", "seeds", "images", "top-1", "top-3"], lines)


def slopes() -> str:
    """Returns the table of the gain of each run's last doubling of the number of images."""
    return curves.markdown_table(named_curves())


def floors() -> dict[str, tuple[float, float]]:
    """Returns k-NN and linear probe of the baselines, by name."""
    (row,) = recorded("cifar10_floors")
    names = next(iter(row["table"].values()))
    return {name: (accuracy(row, "k-NN", encoder=name), accuracy(row, "linear", encoder=name)) for name in names}


def floor_line() -> str:
    """Returns name, k-NN and linear probe of each of the floors, as text."""
    return "; ".join(f"{name}: {knn:.1f} / {linear:.1f}" for name, (knn, linear) in floors().items())


def named_curves() -> dict[str, curves.Curve]:
    """Returns the curves of the runs on CPU cores, with the names that they have in the table."""
    names = {
        f"{path.stem}: {row['stage']}, {row['variant']}": run_name((row["stage"], row["variant"]), row["of_epochs"])
        for path in CURVES
        for row in recorded(path.stem)
    }
    return {names[name]: curve for name, curve in curves.read_curves(CURVES).items()}
