"""Speed of the evaluation: our k-NN and scikit-learn's, the linear probe, and the views of the probe.

The features are random and form one cluster per class. The images are random.

python -m benchmarks.evaluation                    # CIFAR-10's sizes: 50,000 x 128, 10,000 queries
python -m benchmarks.evaluation --device cuda
python -m benchmarks.evaluation --bank 100000 --dim 512 --queries 2000 --only_knn
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.measure import machine, ratio, spread, take_turns
from config.reading import load_config
from datasets.views import Views
from evaluation.knn import knn_votes
from evaluation.linear_probe import LinearProbe
from utils.device import choose_device
from utils.randomness import uniforms

NUM_CLASSES, K = 10, 20


def peak_mb(device: torch.device) -> float:
    """Returns the peak memory in MB: of the GPU on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def forget_peak(device: torch.device) -> None:
    """Resets the peak of `peak_mb`, so that only later allocations raise it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bank",
        type=int,
        default=50_000,
        help="number of training features for k-NN (its bank) and for the probe; default: %(default)s",
    )
    parser.add_argument(
        "--queries", type=int, default=10_000, help="number of features that k-NN classifies; default: %(default)s"
    )
    parser.add_argument("--dim", type=int, default=128, help="dimensions of each feature vector; default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help="device to compute on: auto, cpu, cuda or mps; default: %(default)s"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds in which k-NN and the probe are timed; default: %(default)s",
    )
    parser.add_argument(
        "--only_knn",
        action="store_true",
        help="only measure the memory that our k-NN needs; default: measure everything",
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    print(f"bank {args.bank:,} x {args.dim}, {args.queries:,} queries; {machine(device)}")

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (args.bank,), generator=generator)
    centres = torch.randn(NUM_CLASSES, args.dim, generator=generator)
    bank = torch.nn.functional.normalize(centres[labels] + 3 * torch.randn(args.bank, args.dim, generator=generator))
    asked = torch.randint(0, NUM_CLASSES, (args.queries,), generator=generator)
    queries = torch.nn.functional.normalize(
        centres[asked] + 3 * torch.randn(args.queries, args.dim, generator=generator)
    )
    knn = partial(knn_votes, bank.to(device), labels.to(device), queries.to(device), K, NUM_CLASSES)

    forget_peak(device)
    before = peak_mb(device)
    votes = knn()
    print(f"peak memory that k-NN allocates in addition to bank and queries: {peak_mb(device) - before:.0f} MB")
    if args.only_knn:
        return
    theirs = KNeighborsClassifier(K, algorithm="brute").fit(bank.numpy(), labels.numpy())
    different = (votes.argmax(dim=1).cpu().numpy() != theirs.predict(queries.numpy())).sum()
    print(f"predictions that differ from scikit-learn's: {different} of {args.queries:,}")
    seconds = take_turns(
        {
            "scikit-learn": lambda: theirs.predict(queries.numpy()),
            "ours": knn,
        },
        args.rounds,
        device,
        warmup=1,
    )
    for name, each in seconds.items():
        print(f"k-NN, {name:12s} {spread(each)}")
    print(f"ours is {ratio(seconds['scikit-learn'], seconds['ours'])} as fast as scikit-learn")

    probe = LinearProbe(
        args.dim, NUM_CLASSES, epochs=args.rounds + 1, lr=1e-3, batch_size=128, generator=generator, device=device
    )
    epoch = take_turns(
        {"": partial(probe.train_epoch, bank.to(device), labels.to(device))}, args.rounds, device, warmup=1
    )[""]
    print(f"linear probe, one epoch in batches of 128: {spread(epoch)}")

    config = load_config("config/cifar10.yaml").views
    views = Views(config, encoder_size=32, decoder_size=32, mean=[0.5] * 3, std=[0.25] * 3, device=device)
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8).to(device)
    probe_view = load_config("config/cifar10.yaml").views.probe
    draw = partial(uniforms, range(512), seed=0, purpose="probe view")
    augmented = take_turns({"": lambda: views.augmented(pixels, draw, probe_view)}, 20, device)[""]
    per_image = statistics.median(augmented) / 512
    print(
        f"views of the probe: {1 / per_image:,.0f} images/s; "
        f"15 epochs of {args.bank:,} images: {15 * args.bank * per_image:.1f} s"
    )


if __name__ == "__main__":
    main()
