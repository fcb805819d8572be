"""The tables as data: their questions, methods and lines. To add a table, add its entry.

A line is what one section of a table trains: a network, a data set and further flags of the scripts, written as
FLAG=VALUE; a flag without a value ends in "=".
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from methods import CONSTANT, DECAYING, MEASURED, parse

from data import TEXTS

Arguments = dict[str, str]  # of a script: flag without dashes -> value, "" for a flag without one

SMOKE = {
    "images": "network=resnet8 dataset=digits num-epoch=2 limit-train=64 limit-test=100 batch-size=16 num-meta=100 "
              "t-val=auto",
    "text": "dataset=pydoc num-epoch=2 embed-size=16 limit-train=6000 limit-test=700 batch-size=4",
}
SMOKE_DIFFERENCES = {"num-epoch": ("2", "3"), "limit-train": ("64", "128"), "t-val": ("1", "2")}  # of two lines


@dataclass(frozen=True)
class Table:
    """One table: a section for every line, in it a row for every method."""

    title: str
    question: str
    methods: list[str]
    presets: dict[str, list[Arguments]]  # "paper", "desk" -> its lines; "smoke" follows from "desk"
    named_by: tuple[str, ...] = ()  # the flags that tell its lines apart, beside network and data set
    text_methods: list[str] = field(default_factory=list)  # of the text lines, in a table that has images and text
    has_regret: bool = False  # every line also runs a grid of cosines, whose best is the zero mark of regret.py
    own_data: bool = False  # whoever runs it brings the data, for the smoke, too

    @property
    def preset_names(self) -> list[str]:
        return [*self.presets, "smoke"]

    def lines(self, preset: str) -> list[Arguments]:
        return self.presets[preset] if preset in self.presets else self._smoke()

    def _smoke(self) -> list[Arguments]:
        """The first and the last line of the desk at the smallest sizes, without a download. What they are named by
        still differs.
        """
        ends = [self.presets["desk"][0], self.presets["desk"][-1]]
        kinds = ["text" if line["dataset"] in TEXTS else "images" for line in ends]
        small = []
        for place, (line, kind) in enumerate(zip(ends, kinds, strict=True)):
            arguments = line | parse(SMOKE[kind])
            if self.own_data:
                arguments["dataset"] = line["dataset"]
            for name, values in SMOKE_DIFFERENCES.items():
                if name in self.named_by and kinds[0] == kinds[1] and ends[0].get(name) != ends[1].get(name):
                    arguments[name] = values[place]
            if arguments not in small:
                small.append(arguments)
        return small


def lines(shared: str, *choices: Sequence[str]) -> list[Arguments]:
    """A line for every combination of one of each of the choices, which override what is shared."""
    return [parse(" ".join([shared, *combination])) for combination in itertools.product(*choices)]


def flag(name: str, *values: str) -> list[str]:
    """The choices of one flag."""
    return [f"{name}={value}" for value in values]


LEARNING = [
    "MLR-SNet (learning)", "MLR-SNet (learning, cool-down)", "MLR-SNet (learning, average)",
    "MLR-SNet (learning, average, cool-down)",
]
STEERED = [LEARNING[0], LEARNING[-1]]  # the paper's flags, and the recommended ones
SHIPPED = ["MLR-SNet (transferred)", "MLR-SNet (recommended)"]
CLASSIC = ["fixed", "multistep", "exponential", "cosine", "sgdr", "adam"]
STAGE = [*STEERED, *CLASSIC, "hd", "rtho", "l4mom", "schedule-free"]
LANGUAGE = [*STEERED, *SHIPPED, "sgd+val", "adam+val", "hd", "rtho", "l4adam"]
TRANSFER = ["MLR-SNet (transferred, without momentum)", *CLASSIC]  # as the paper: the rivals with a line's momentum
ROBUST = [*STEERED, "MLR-SNet (recommended)", "fixed", "multistep", "cosine", "cosine (measured)", "schedule-free"]

DESK = "num-epoch=30 limit-train=10000 limit-test=5000"
SMALL = "image-size=16 limit-test=2000"  # at full size so few steps fit hardly any data
FEW = f"network=resnet8 dataset=cifar10 {SMALL} num-meta=200 limit-train=1000 batch-size=32 num-epoch=60 test-every=3"
TEXT_DESK = "num-epoch=8 embed-size=128 dropout=0.2 limit-train=100000"
SMALL_LEARNING = f"dataset=folder {SMALL} limit-train=4000 num-epoch=20 average="
UNTUNED_IMAGES = "dataset=folder limit-test=1000 average= test-every=4"
SMALL_TEXT = "dataset=text embed-size=64 dropout=0.1 limit-test=10000 average="
NOISES = [flag("noise-kind", "uniform", "flip"), flag("label-noise", "0.2", "0.4", "0.6")]

TABLES: dict[str, Table] = {
    "first": Table(
        title="A first look: handwritten digits",
        question="Does a schedule that is given no rate reach what a cosine from the usual one reaches?",
        methods=[LEARNING[-1], "MLR-SNet (recommended)", "cosine"],
        presets=dict.fromkeys(("paper", "desk"), lines("network=resnet8 dataset=digits num-epoch=15 num-meta=200")),
    ),
    "cifar10-resnet": Table(
        title="Meta-train stage",
        question="Which schedule trains a residual network best, each with its usual settings?",
        methods=STAGE,
        presets={
            "paper": lines("network=resnet dataset=cifar10 num-epoch=200"),
            "desk": lines(f"network=resnet8 dataset=cifar10 {DESK} image-size=16"),
        },
    ),
    "paper-regime": Table(
        title="The paper's regime on a small network",
        question="Does a learned schedule end above hand-made ones in a training of the paper's length?",
        methods=[*STEERED, *SHIPPED, *CLASSIC, "cosine (measured)", "multistep (measured)", "schedule-free"],
        presets=dict.fromkeys(
            ("paper", "desk"),
            lines("network=resnet8 dataset=cifar10 image-size=16 num-epoch=200 test-every=5 t-val=300"),
        ),
    ),
    "cifar100-wideresnet": Table(
        title="Meta-train stage, a hundred classes",
        question="Which schedule is best with a hundred classes, each with its usual settings?",
        methods=STAGE,
        presets={
            "paper": lines("network=wideresnet dataset=cifar100 num-epoch=200"),
            "desk": lines(f"network=resnet20 dataset=cifar100 {DESK}"),
        },
    ),
    "ptb-lstm2": Table(
        title="Language modelling, two layers",
        question="Which schedule trains a two-layer LSTM best, and do nets learned on images carry over?",
        methods=LANGUAGE,
        presets={
            "paper": lines("network=lstm2 dataset=ptb num-epoch=150"),
            "desk": lines(f"network=lstm2 dataset=ptb {TEXT_DESK}"),
        },
    ),
    "ptb-lstm3": Table(
        title="Language modelling, three layers",
        question="Which schedule trains a three-layer LSTM best?",
        methods=LANGUAGE,
        presets={
            "paper": lines("network=lstm3 dataset=ptb num-epoch=150"),
            "desk": lines(f"network=lstm3 dataset=ptb {TEXT_DESK}"),
        },
    ),
    "networks": Table(
        title="The shipped schedules on other networks",
        question="Do the shipped nets drive networks that they have not seen?",
        methods=[*TRANSFER, "MLR-SNet (recommended)", "MLR-SNet (recommended, AdamW)"],
        presets={  # at home without NASNet, which takes days
            "paper": lines("dataset=cifar10 num-epoch=200 momentum=0.9",
                           flag("network", "shufflenetv2", "mobilenetv2", "nasnet")),
            "desk": lines(f"dataset=cifar10 {SMALL} limit-train=2500 batch-size=64 num-epoch=15 momentum=0.9 "
                          "test-every=3", flag("network", "shufflenetv2", "mobilenetv2")),
        },
    ),
    "datasets": Table(
        title="The shipped schedules on other data",
        question="Do the shipped nets, learned on CIFAR-10, drive the training on other data?",
        methods=TRANSFER,
        text_methods=["MLR-SNet (transferred)", "sgd+val", "adam+val"],
        presets={
            "paper": [*lines("network=resnet num-epoch=200 momentum=0.9", flag("dataset", "svhn", "tinyimagenet")),
                      *lines("network=lstm2 dataset=ptb num-epoch=150")],
            "desk": [*lines(f"network=resnet8 {DESK} momentum=0.9", flag("dataset", "svhn", "tinyimagenet")),
                     *lines(f"network=lstm2 dataset=ptb {TEXT_DESK}")],
        },
    ),
    "imagenet": Table(
        title="The shipped schedules on ImageNet",
        question="Do the shipped nets drive the training of a large network on large images?",
        methods=TRANSFER,
        presets={
            "paper": lines("network=resnet50-imagenet dataset=imagenet momentum=0.9 num-epoch=90"),
            "desk": lines(f"network=resnet50-imagenet dataset=imagenet momentum=0.9 {DESK}"),
        },
    ),
    "epochs": Table(
        title="The shipped schedules stretched to other horizons",
        question="Do the shipped nets serve shorter and longer runs than the one they come from?",
        methods=[*SHIPPED, "cosine", "cosine (measured)"],
        presets={
            "paper": lines("network=resnet dataset=cifar10", flag("num-epoch", "50", "100", "200", "400")),
            "desk": lines(f"network=resnet8 dataset=cifar10 {SMALL} limit-train=5000",
                          flag("num-epoch", "10", "30", "90")),
        },
        named_by=("num-epoch",),
    ),
    "learning": Table(
        title="Learning while training: where the meta gradient is taken, and the cool-down",
        question="Which flags of meta-train.py train a network as well as a cosine whose peak was tuned?",
        methods=[*LEARNING, "wsd (measured)"],
        has_regret=True,
        presets={
            "desk": [
                *lines(SMALL_LEARNING, [
                    "network=resnet8", "network=resnet8 momentum=0.9", "network=resnet20 optimizer=adamw",
                ]),
                *lines(f"{SMALL_TEXT} network=lstm2 tokens=word limit-train=40000 num-epoch=6"),
            ],
        },
        named_by=("optimizer",),
    ),
    "t-val": Table(
        title="Sensitivity to T_val",
        question="How far does the result depend on how often MLR-SNet learns?",
        methods=LEARNING,
        presets={
            "paper": lines("network=resnet dataset=cifar10 num-epoch=200", flag("t-val", "100", "300", "1000")),
            "desk": lines(f"network=resnet8 {SMALL_LEARNING}", flag("t-val", "3", "10", "30")),
        },
        named_by=("t-val",),
    ),
    "corruption": Table(
        title="Trained on corrupted images, tested on clean ones",
        question="Does a small clean meta set make the learned schedule robust to damaged training images?",
        methods=ROBUST,
        presets={
            "paper": lines("network=resnet dataset=cifar10-c num-epoch=200 num-meta=100 severity=5",
                           flag("corruption", "gaussian_noise", "fog", "contrast", "jpeg_compression")),
            "desk": lines(f"{FEW} severity=5", flag("corruption", "gaussian_noise", "contrast")),
        },
        named_by=("corruption",),
    ),
    "label-noise": Table(
        title="Trained on wrong labels, tested on true ones",
        question="Do meta images with true labels make the learned schedule robust to wrong training labels?",
        methods=ROBUST,
        presets={
            "paper": lines("network=resnet dataset=cifar10 num-epoch=200", *NOISES),
            "desk": lines(f"{FEW} label-noise=0.4", flag("noise-kind", "uniform", "flip")),
        },
        named_by=("label-noise", "noise-kind"),
    ),
    "sizes": Table(
        title="Nets learned on 10,000 images, used on other numbers of images",
        question="Do the shipped nets serve other amounts of data than they were learned on?",
        methods=[*SHIPPED, "cosine", "cosine (measured)"],
        presets={  # at home of similar cost; the steps differ: 240, 400, 480 and 784
            "paper": lines("network=resnet dataset=cifar10 num-epoch=200",
                           flag("limit-train", "1000", "2500", "5000", "25000")),
            "desk": lines(f"network=resnet8 dataset=cifar10 {SMALL} momentum=0.9", [
                "limit-train=1000 num-epoch=30", "limit-train=2500 num-epoch=20", "limit-train=5000 num-epoch=12",
                "limit-train=25000 num-epoch=4",
            ]),
        },
        named_by=("limit-train", "num-epoch"),
    ),
    "full-size": Table(
        title="All training images at full size",
        question="What is left of the differences when a small network trains on all images for 30 epochs?",
        methods=[*STEERED, "MLR-SNet (recommended)", "cosine", "wsd (measured)", "schedule-free"],
        presets={
            "desk": lines("network=resnet20 dataset=cifar10 num-epoch=30 momentum=0.9 test-every=3"),
        },
    ),
    "untuned": Table(
        title="No tuning: the regret against the best cosine of a grid",
        question="Which method is best on many problems if nobody tunes anything?",
        methods=[
            "MLR-SNet (recommended)", "MLR-SNet (transferred)", *DECAYING, *MEASURED, CONSTANT, "greedy",
            "schedule-free", "schedule-free-adamw", "schedule-free-radam", "prodigy-cosine", "dadaptation-cosine",
        ],
        has_regret=True,
        presets={
            "desk": [
                *lines(UNTUNED_IMAGES, [
                    "network=resnet8 image-size=16 limit-train=5000 num-epoch=6",
                    "network=resnet8 image-size=24 limit-train=2500 batch-size=64 num-epoch=4 momentum=0.9",
                    "network=resnet8 image-size=24 limit-train=2500 batch-size=64 num-epoch=12 momentum=0.9",
                    "network=resnet8 image-size=32 limit-train=2500 batch-size=64 num-epoch=4 optimizer=adamw",
                    "network=resnet20 image-size=16 limit-train=2500 batch-size=64 num-epoch=6 momentum=0.9",
                ]),
                *lines("network=resnet20 dataset=digits num-epoch=12 optimizer=adamw average= test-every=4"),
                *lines(UNTUNED_IMAGES, [
                    "network=shufflenetv2 image-size=16 limit-train=1000 batch-size=32 num-epoch=8 momentum=0.9",
                    "network=mobilenetv2 image-size=16 limit-train=1000 batch-size=32 num-epoch=6",
                    "network=vit image-size=16 limit-train=2500 batch-size=64 num-epoch=8 optimizer=adamw",
                    # These six were chosen before any result on them was seen.
                    "network=resnet8 predict=angle image-size=16 limit-train=2500 batch-size=64 num-epoch=8 "
                    "momentum=0.9",
                    "network=denoiser predict=noise image-size=16 limit-train=2500 batch-size=64 num-epoch=8 "
                    "optimizer=adamw",
                    "network=convnet image-size=16 limit-train=2500 batch-size=64 num-epoch=8 momentum=0.9",
                    "network=resnet8 image-size=16 limit-train=1000 batch-size=16 num-epoch=8",
                    "network=convnet image-size=8 limit-train=2000 batch-size=32 num-epoch=32 optimizer=adamw",
                    "network=resnet8 image-size=16 limit-train=5000 batch-size=256 accumulate=4 num-epoch=10 "
                    "momentum=0.9",
                ]),
                *lines("network=vit dataset=digits num-epoch=12 momentum=0.9 average= test-every=4"),
                *lines(f"{SMALL_TEXT} test-every=4", [
                    "network=lstm2 tokens=word limit-train=40000 num-epoch=6",
                    "network=lstm2 tokens=char limit-train=50000 num-epoch=20 optimizer=adamw",
                    "network=gpt tokens=word limit-train=40000 num-epoch=4 optimizer=adamw",
                    "network=gpt tokens=char limit-train=50000 num-epoch=4 optimizer=adamw",
                    "network=gpt tokens=char limit-train=50000 num-epoch=16 optimizer=adamw",
                ]),
            ],
        },
        named_by=(
            "predict", "image-size", "limit-train", "tokens", "batch-size", "accumulate", "optimizer", "num-epoch",
        ),
    ),
    "own": Table(
        title="Your own class folders",
        question="Which schedule is best on your images?",
        methods=STAGE,
        presets={
            "paper": lines("network=resnet dataset=folder num-epoch=200"),
            "desk": lines("network=resnet8 dataset=folder num-epoch=30"),
        },
        own_data=True,
    ),
}
