"""The measures that the options of test.py name: opens the files that they need, and computes them."""

import logging
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from analysis.image_encoder import trained_encoder
from analysis.latent_diffusion import Fit
from analysis.prior import PriorError, open_fit, prior_path, priors_of
from config.errors import ConfigError
from evaluation.codec import Codec
from evaluation.factors import open_factors
from evaluation.measures import Measure, Measured, find_measures
from evaluation.measures.base import NUM_SAMPLES, Inputs
from evaluation.measures.disentanglement import NUM_TEST, NUM_TRAIN
from evaluation.measures.prior import Prior
from evaluation.measures.recording import Record, report
from evaluation.measures.subjects import Subjects, open_others, subjects_of
from evaluation.pretrained import load_inception, load_lpips
from experiment.trained import Trained, read_trained
from utils.cli import gather_user_errors
from utils.distributed.collectives import all_equal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measuring:
    """Measures that the options of test.py name, with all that they need.

    Attributes:
        left_out: measures that were named, but cannot be computed, with the reason.
    """

    trained: Trained
    codec: Codec
    inputs: Inputs
    prior: Fit | None
    measures: list[Measure]
    record: Record
    left_out: dict[str, str]

    def run(self) -> dict[str, Measured]:
        """Collective. Returns the tables of the measures by name, each printed and recorded when it is computed."""
        subjects = subjects_of(self.codec, self.inputs, priors_of(self.codec, self.prior))
        return report(((each.name, each.measure(subjects)) for each in self.measures), self.record)

    def check_complete(self) -> None:
        """Raises ConfigError if a measure was left out. Call it after the others are printed."""
        if self.left_out:
            raise ConfigError(f"{_failure(self.left_out)}; the other measures were printed")


def open_measures(args: Namespace, trained: Trained, codec: Codec, record: Record) -> Measuring:
    """Collective. Opens the files that the options of the measures name, and the diffusion prior beside the checkpoint.

    Raises UserError if one of these files cannot be used, or if none of the named measures can be computed. A prior
    that cannot be used is only logged, and left out, if the measure `prior` is not named.
    """
    experiment = codec.experiment
    other = None
    if args.features_of:
        reference = read_trained(None, Path(args.features_of), [])
        if reference.digest == trained.digest:
            logger.info(
                "--features_of names the checkpoint that is measured: by its own encoder, distances are too small"
            )
        if reference.config.encoder.time_dependent:
            raise ConfigError(
                f"--features_of {args.features_of}: z of its encoder depends on the timestep: name another checkpoint"
            )
        encoder = trained_encoder(reference, resize=True).to(experiment.device)
        other = (
            f"standardised z of {args.features_of}",
            lambda pixels: encoder(pixels.to(experiment.device))["z"].float(),
        )
    inputs = Inputs(
        open_others(args.others, experiment),
        other,
        load_inception(args.inception, experiment.device) if args.inception and find_spec("torch_fidelity") else None,
        load_lpips(args.lpips, experiment.device) if args.lpips and find_spec("torchmetrics") else None,
        args.num_samples or NUM_SAMPLES,
        open_factors(args.factors, NUM_TRAIN + NUM_TEST, experiment) if args.factors else None,
    )
    measures, left_out = find_measures(args.measures, experiment, inputs)
    if left_out and not measures:
        raise ConfigError(_failure(left_out))
    path, prior = prior_path(trained, codec.timestep), None
    try:
        prior = open_fit(path, trained, experiment, must_exist=True) if path.exists() else None
    except PriorError as error:
        if Prior.name in args.measures:
            raise
        logger.warning("the diffusion prior is left out: %s", error)
    if not all_equal(None if prior is None else prior.step):
        raise PriorError(f"the machines hold different files {path}: copy one of them to all, or remove all")
    return Measuring(trained, codec, inputs, prior, measures, record, left_out)


def measure_priors(trained: Trained, codec: Codec, fit: Fit) -> None:
    """Collective. Prints and records the measure `prior` of the mixture and of a fitted diffusion prior.

    If there are too few images for the measure, logs this.
    """
    obstacle = Prior().obstacle(codec.experiment, Inputs())
    if obstacle:
        logger.info("the prior is not measured: %s", obstacle)
        return
    subjects = Subjects(codec.experiment, {}, "z", codec=codec, priors=priors_of(codec, fit))
    record = Record(trained, codec.experiment)
    record.log_obstacle()
    report([(Prior.name, Prior().measure(subjects))], record)
    with gather_user_errors():
        record.check()


def _failure(left_out: dict[str, str]) -> str:
    return "; ".join(f"the measure {name} was not computed: {obstacle}" for name, obstacle in left_out.items())
