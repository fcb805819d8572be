"""The flags of meta-train and meta-test, and what --resume takes from a run's args.json."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import DATASETS, IMAGES, PREDICTIONS, PUBLISHED_CORRUPTED, TEXTS, TOKENS
from data.corruption import CORRUPTIONS, NOISE_KINDS
from mlr_snet import SHIPPED
from models import IMAGE_NETWORKS, LANGUAGE_MODELS, NETWORKS
from training.checkpoint import MAY_CHANGE
from training.command_line import Parser, folder, number, number_or
from training.folder import contents, read_record
from utils import ROOT, plain

# The flags whose defaults depend on the modality; one of the other modality only is refused.
IMAGE_DEFAULTS = {"num_epoch": 200, "batch_size": 128, "wd": 5e-4, "num_meta": 0, "image_size": None, "workers": None,
                  "skip_bad_images": False, "corruption": None, "severity": None, "label_noise": None,
                  "noise_kind": None, "predict": "class", "accumulate": 1}
TEXT_DEFAULTS = {"num_epoch": 150, "batch_size": 32, "wd": 5e-6, "seq_len": 35, "tokens": "word", "embed_size": 512,
                 "dropout": 0.5, "clip": 0.25}

FILES = """\
files in --out:
  args.json              arguments, versions, commit and hardware
  metrics.csv, run.png   a row for every epoch, and its picture
  cost.json              passes, measuring steps, peak memory
  checkpoint.pth         what --resume continues from
  network.pth            the trained weights; network_average.pth with --average
  mlr_snet_<epoch>.pth   meta-train: the MLR-SNet after every epoch
  lr_scale.json, .png    where the scale was measured: what was tried
  events.*               loss, rate and metrics for TensorBoard

"""


def refused(text: str) -> None:
    """The argparse type of flags of the authors' language-modelling script that mean something else here."""
    raise argparse.ArgumentTypeError("is a flag of the authors' script; use --network lstm2 or lstm3, and --embed-size")


def add_task_arguments(parser: argparse.ArgumentParser, network: str) -> None:
    """The flags of what is trained, which meta-train and meta-test share; `network` is the default."""
    positive = number(int, 1, 2**31 - 1)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, metavar="NAME",
        help=f"images: {', '.join(IMAGES)}; text: {', '.join(TEXTS)}; digits and pydoc need no download "
        "(default: cifar10, for a language model ptb)")
    add("--data-root", type=Path, default=ROOT / "data" / "downloads", metavar="DIR",
        help="the data, or where to download it (default: data/downloads)")
    add("--limit-train", type=positive, metavar="N", help="use N class-balanced images, or the first N tokens")
    add("--limit-test", type=positive, metavar="N", help="the same for testing")
    add("--num-meta", type=number(int, 0, 2**31 - 1), metavar="N",
        help="images to steer MLR-SNet or validate (default: meta-train 1000, of cifar10-c 100, meta-test 0)")
    add("--image-size", type=positive, metavar="N",
        help="resize to N×N pixels (default: folder 32, tinyimagenet 64, imagenet 224)")
    add("--workers", type=number(int, 0, 1000), metavar="N",
        help="processes that read tinyimagenet or imagenet (default: cores, up to 8)")
    add("--skip-bad-images", action="store_true", default=None, help="leave out unreadable files, and report them")
    add("--corruption", metavar="NAME",
        help=f"damage the training images: {', '.join(CORRUPTIONS)}; for "
        "cifar10-c and cifar100-c the name of the file")
    add("--severity", type=number(int, 0, 5), metavar="N", help="severity of --corruption, 0 (none) to 5 (default: 3)")
    add("--label-noise", type=number(float, 0, 1), metavar="RATE",
        help="give this share of the training images a wrong label (default: 0)")
    add("--noise-kind", choices=NOISE_KINDS, metavar="KIND",
        help="wrong labels: uniform (any), flip (one for each class) or flip2 (one of two) (default: uniform)")
    add("--predict", choices=PREDICTIONS, metavar="WHAT",
        help="class, angle (by which an image was turned) or noise (that was added to it) (default: class)")
    add("--tokens", choices=TOKENS, metavar="UNIT", help="unit of the text: word or char (default: word)")
    add("--seq-len", "--seq_len", type=positive, metavar="N", help="tokens per sequence (default: 35)")

    add = parser.add_argument_group("network and optimizer").add_argument
    add("--network", choices=NETWORKS, metavar="NAME",
        help=f"images: {', '.join(IMAGE_NETWORKS)}; text: {', '.join(LANGUAGE_MODELS)} (default: {network}, for text "
        "lstm2)")
    add("--embed-size", "--embed_size", type=positive, metavar="N",
        help="width of a language model's embedding and hidden layers (default: 512)")
    add("--dropout", type=number(float, 0, 1, below=True), metavar="RATE",
        help="dropout of a language model (default: 0.5)")
    add("--clip", type=number(float, 0, above=True), metavar="NORM",
        help="largest norm of the gradient, for text (default: 0.25)")
    add("--init", type=Path, metavar="FILE", help="start from a run's network.pth (default: random weights)")
    add("--optimizer", "--optim", choices=["sgd", "adam", "adamw"], default="sgd", metavar="NAME",
        help="sgd, adam or adamw (default: sgd)")
    add("--momentum", type=number(float, 0, 1, below=True), default=0.0, metavar="RHO",
        help="momentum of SGD (default: 0)")
    add("--wd", type=number(float, 0), metavar="WD", help="weight decay (default: images 5e-4, text 5e-6)")
    add("--average", action="store_true", help="also evaluate and save a running average of the weights")
    add("--average-decay", type=number_or(number(float, 0, 1, below=True), "auto"), default="auto",
        metavar="RATE", help="decay of the average per step; auto averages over a twentieth of the run (default: auto)")
    add("--model", "--num_layers", "--hidden_size", type=refused, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_scale(add: Callable[..., Any]) -> None:
    """--gamma, --warmup and --cooldown, for the group of flags whose add_argument is given."""
    add("--warmup", type=number(float, 0, 1), default=0.0, metavar="SHARE",
        help="share of the run in which MLR-SNet's rate rises linearly at the start (default: 0)")
    add("--cooldown", type=number(float, 0, 1), default=0.0, metavar="SHARE",
        help="share of the run in which it falls linearly to 0 at the end (default: 0, the paper)")
    add("--gamma", type=number_or(number(float, 0, above=True), "auto", "paper", "measured"), default="auto",
        metavar="GAMMA",
        help="LR scale, the largest rate MLR-SNet can give: a number, paper (the paper's formula) or measured (twice "
        "the peak that short training finds); auto is paper for SGD without momentum and with classes, else measured "
        "(default: auto)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the run and its device, which meta-train and meta-test share."""
    positive = number(int, 1, 2**31 - 1)
    add = parser.add_argument_group("run").add_argument
    add("--num-epoch", "--max_epoch", dest="num_epoch", type=positive, metavar="N",
        help="epochs (default: images 200, imagenet 90, text 150)")
    add("--batch-size", "--batch_size", type=positive, metavar="N",
        help="per step, over all ranks (default: images 128, text 32)")
    add("--accumulate", type=positive, metavar="N",
        help="take each batch of images in N micro-batches, which needs less memory; the meta batch stays whole "
        "(default: 1)")
    add("--test-every", type=positive, default=1, metavar="N",
        help="evaluate on the test data after every N-th epoch, and the last (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="seed of all that is random: weights, data order, meta set, damage, dropout (default: 0)")
    add("--out", type=folder, metavar="DIR",
        help="the run's folder, new unless --resume (default: result/NETWORK_DATASET beside the script)")
    add("--resume", action="store_true", help="continue the run in --out with its own arguments")
    add("--help", "-h", action="help", help="show this and exit")

    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda or another; auto is cuda where there is one (default: auto)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", metavar="TYPE",
        help="type of the forward pass, fp32 or bf16 (default: fp32)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--deterministic", action="store_true", help="use only algorithms that torch calls deterministic")


def parse_run_arguments(
    parser: Parser, script: Path, argv: list[str] | None, network: str, num_meta: int = 0
) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, with --out and the defaults settled, and the names of those that the command line gives.

    --resume takes the run's own arguments and refuses others. `network` and `num_meta` are the defaults for images.
    """
    args = parser.parse_args(argv)
    unset = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marked).items() if value is not unset}
    args.script = script.stem
    _settle_problem(args, network)
    args.out = (args.out or script.parent / "result" / f"{args.network}_{args.dataset}").absolute()
    try:
        if args.resume:
            args = _resumed(parser, args, given)
        else:
            refuse_used(args.out)
        _settle(args, num_meta)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, given


def refuse_used(out: Path) -> None:
    """ValueError unless the folder is new or empty: what lies there is another run's, or the user's; and where it, or
    the folder that it would lie in, cannot be written to.
    """
    place = next(path for path in (out, *out.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ValueError(f"--out {out}: {place} is not a folder that can be written to")
    names = contents(out)
    if {"args.json", "checkpoint.pth", "metrics.csv"} & set(names):
        raise ValueError(f"--out {out} holds another run; continue it with --resume or give another --out")
    if names:
        raise ValueError(f"--out {out} holds files that a run could overwrite, such as {names[0]}; give a new folder")


def _resumed(parser: Parser, args: argparse.Namespace, given: set[str]) -> argparse.Namespace:
    """The arguments of the run in --out. ValueError where args.json cannot give them, or differs from those given."""
    record = args.out / "args.json"
    if not record.exists():
        if (args.out / "checkpoint.pth").exists():
            raise ValueError(f"{record} is missing beside checkpoint.pth; restore it or start a new run elsewhere")
        raise ValueError(f"--resume: no run in {args.out}; give its folder as --out, or leave --resume out")
    stored = read_record(args.out, "arguments")
    script = stored.get("script", args.script)
    if script != args.script:
        raise ValueError(f"--out {args.out} holds a run of {script}.py; resume it with that script")
    if stored.keys() != vars(args).keys():
        different = ", ".join(sorted(stored.keys() ^ vars(args).keys()))
        raise ValueError(f"{record} is of another version of this software (missing or unknown: {different}); "
                         "start a new run in another --out")
    parser.set_defaults(**stored)  # argparse reads a default that is a string as it reads a flag's value
    resumed = parser.parse_args([])
    for name in given - {*MAY_CHANGE}:
        if plain(getattr(args, name)) != plain(getattr(resumed, name)):
            flag = f"--{name.replace('_', '-')}"
            own = flag if stored[name] is None else f"{flag} {stored[name]}"
            raise ValueError(f"--resume continues with the run's own {own}; leave {flag} out")
    resumed.out, resumed.resume = args.out, True
    for name in given & {"data_root", "workers"}:  # the checkpoint knows the data by their fingerprint
        setattr(resumed, name, getattr(args, name))
    return resumed


def _settle_problem(args: argparse.Namespace, network: str) -> None:
    """Give the network or the data set that was left out the default that fits the other."""
    is_text = args.dataset in TEXTS or (args.dataset is None and args.network in LANGUAGE_MODELS)
    args.dataset = args.dataset or ("ptb" if is_text else "cifar10")
    args.network = args.network or ("lstm2" if is_text else network)


def _settle(args: argparse.Namespace, num_meta: int) -> None:
    """Give the flags that were left out the defaults of the modality. ValueError for those that do not fit."""
    is_text = args.dataset in TEXTS
    fitting = LANGUAGE_MODELS if is_text else IMAGE_NETWORKS
    if args.network not in fitting:
        kind = "text" if is_text else "images"
        raise ValueError(
            f"--network {args.network} is not for {kind}; for {args.dataset} choose from {', '.join(fitting)}"
        )
    if args.momentum and args.optimizer != "sgd":
        raise ValueError(f"--momentum belongs to --optimizer sgd; leave it out with {args.optimizer}")
    if args.warmup + args.cooldown > 1:
        raise ValueError(f"--warmup {args.warmup:g} --cooldown {args.cooldown:g}: give shares, together at most 1")
    keeps_average = args.average or getattr(args, "meta_point", None) == "average"
    if args.average_decay != "auto" and not keeps_average:
        raise ValueError("--average-decay belongs to --average or --meta-point average; leave it out")
    if not is_text and (args.predict == "noise") != (args.network == "denoiser"):
        raise ValueError("--network denoiser and --predict noise belong together; give both")
    images = IMAGE_DEFAULTS | {"num_meta": min(num_meta, PUBLISHED_CORRUPTED.get(args.dataset, num_meta))}
    if args.dataset == "imagenet":
        images["num_epoch"] = 90
    own, other = (TEXT_DEFAULTS, images) if is_text else (images, TEXT_DEFAULTS)
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not apply to --dataset {args.dataset}; leave it out")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def net_files(nets: list[str | Path]) -> str | list[Path]:
    """What load_schedules takes: a shipped name, files, or of one meta-train run its snapshots at 1/200, 1/2 and 1."""
    if len(nets) == 1 and str(nets[0]) in SHIPPED:
        return str(nets[0])
    paths = [Path(net) for net in nets]
    if len(paths) > 1 or not paths[0].is_dir():
        return paths
    if not (paths[0] / "mlr_snet_1.pth").exists():
        raise ValueError(f"nets {paths[0]}: holds no nets of meta-train.py; give .pth files")
    num_epochs = read_record(paths[0], "arguments", "num_epoch")
    epochs = [max(1, round(num_epochs / 200)), max(1, num_epochs // 2), num_epochs]
    return [paths[0] / f"mlr_snet_{epoch}.pth" for epoch in epochs]
