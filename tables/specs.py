"""The tables as data: methods, presets, lines and published numbers. To add a table or a method, add its entry.

Arguments are written as on the command line of tables.py, FLAG=VALUE separated by spaces; a flag without a value ends
in "=". Their order is part of a run's name, so a change of order makes a new run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """One table: a section for every line, in it a row for every method."""

    title: str
    methods: list[str]
    presets: dict[str, str]  # preset -> the arguments that all its lines share
    lines: dict[str, dict[str, str]]  # preset -> line -> its own arguments, which override the preset's
    published: dict[str, dict[str, str]] = field(default_factory=dict)  # line -> method -> the paper's number
    text_methods: list[str] = field(default_factory=list)  # of the text lines, in a table that has images and text
    only_in_t_val: list[str] = field(default_factory=list)  # methods that t_val.png shows instead of table.png
    has_regret: bool = False  # every line also runs a grid of cosines, whose best is the zero mark of regret.py


# Peak rates at most a factor of 3 apart. A line of a table with regrets runs a cosine from each of its optimizer's;
# AdamW has Adam's.
GRIDS: dict[tuple[str, str], list[str]] = {
    ("images", "sgd"): ["0.035", "0.1", "0.3", "0.9", "2.7"],
    ("images", "momentum"): ["0.012", "0.035", "0.1", "0.3", "0.9"],
    ("images", "adam"): ["0.00018", "0.0005", "0.0014", "0.004", "0.012", "0.035"],
    ("text", "sgd"): ["0.9", "2.7", "8", "24", "72"],
    ("text", "momentum"): ["0.1", "0.3", "0.9", "2.7", "8"],
    ("text", "adam"): ["0.0005", "0.0014", "0.004", "0.012", "0.035"],
}
GRID_METHODS = {f"cosine {peak}": float(peak) for peaks in GRIDS.values() for peak in peaks}
DECAYING = ["cosine", "warmup-cosine", "linear", "wsd"]  # raced at three peaks: usual, measured and constant
MEASURED = {f"{name} (measured)": f"meta-test --schedule {name} --lr measured" for name in DECAYING}
FINDER = "cosine (Lightning finder)"
CONSTANT = {f"{name} (constant)": f"meta-test --schedule {name}" for name in DECAYING}  # cells.py sets the rate

METHODS: dict[str, str] = {  # the script and the arguments that make the method
    "MLR-SNet (learning)": "meta-train",
    "MLR-SNet (learning, lookahead, T_val 3)": "meta-train --meta-point lookahead --t-val 3",
    "MLR-SNet (learning, lookahead, T_val 10)": "meta-train --meta-point lookahead --t-val 10",
    "MLR-SNet (learning, lookahead, T_val 30)": "meta-train --meta-point lookahead --t-val 30",
    "MLR-SNet (learning, lookahead, T_val 100)": "meta-train --meta-point lookahead --t-val 100",
    "MLR-SNet (learning, average, T_val 3)": "meta-train --meta-point average --t-val 3",
    "MLR-SNet (learning, average, T_val 10)": "meta-train --meta-point average --t-val 10",
    "MLR-SNet (learning, average, T_val 30)": "meta-train --meta-point average --t-val 30",
    "MLR-SNet (learning, average, T_val 100)": "meta-train --meta-point average --t-val 100",
    # Twice the γ that the loss gives: for ten classes, and for about a hundred characters.
    "MLR-SNet (learning, average, T_val 10, gamma 1.34)": "meta-train --meta-point average --t-val 10 --gamma 1.34",
    "MLR-SNet (learning, average, T_val 10, gamma 17)": "meta-train --meta-point average --t-val 10 --gamma 17",
    "MLR-SNet (transferred)": "meta-test --schedule mlr-snet",
    # Learned without momentum: 0.9 makes a step ten times as long, and γ starts at 0.67 for ten classes.
    "MLR-SNet (transferred, gamma 0.067)": "meta-test --schedule mlr-snet --gamma 0.067",
    "MLR-SNet (transferred, average net)": "meta-test --schedule mlr-snet --nets average",
    "MLR-SNet (transferred, measured)": "meta-test --schedule mlr-snet --gamma measured",
    "MLR-SNet (transferred, average net, measured)": "meta-test --schedule mlr-snet --nets average --gamma measured",
    "fixed": "meta-test --schedule fixed",
    "fixed (measured)": "meta-test --schedule fixed --lr measured",
    "fixed 0.4": "meta-test --schedule fixed --lr 0.4",
    "fixed 5": "meta-test --schedule fixed --lr 5",
    "multistep": "meta-test --schedule multistep",
    "multistep (measured)": "meta-test --schedule multistep --lr measured",
    "exponential": "meta-test --schedule exponential",
    "cosine": "meta-test --schedule cosine",
    "cosine 0.5": "meta-test --schedule cosine --lr 0.5",
    "warmup-cosine": "meta-test --schedule warmup-cosine",
    "linear": "meta-test --schedule linear",
    "wsd": "meta-test --schedule wsd",
    **MEASURED,
    FINDER: "meta-test --schedule cosine --lr lightning",
    **CONSTANT,
    **{name: f"meta-test --schedule {name.replace(' ', ' --lr ')}" for name in GRID_METHODS},
    "sgdr": "meta-test --schedule sgdr",
    "onecycle": "meta-test --schedule onecycle",
    "adam": "meta-test --schedule fixed --optimizer adam",
    "sgd+val": "meta-test --schedule val",
    "adam+val": "meta-test --schedule val --optimizer adam",
    "plateau": "meta-test --schedule plateau",
    "greedy": "meta-test --schedule greedy",
    "hd": "meta-test --schedule hd",
    "hd-adam": "meta-test --schedule hd --optimizer adam",
    "rtho": "meta-test --schedule rtho",
    "l4mom": "meta-test --schedule l4mom",
    "l4adam": "meta-test --schedule l4adam",
    "schedule-free": "meta-test --schedule schedule-free",
    "schedule-free-adamw": "meta-test --schedule schedule-free --optimizer adamw",
    "prodigy": "meta-test --schedule prodigy --optimizer adam",
    "dadaptation": "meta-test --schedule dadaptation",
}

# Run folders carry these older names, and --only takes them as well: committed results are found by their commands.
OLDER_NAMES: dict[str, str] = {
    "MLR-SNet (learning)": "ours (train)",
    "MLR-SNet (learning, lookahead, T_val 3)": "lookahead 3",
    "MLR-SNet (learning, lookahead, T_val 10)": "lookahead 10",
    "MLR-SNet (learning, lookahead, T_val 30)": "lookahead 30",
    "MLR-SNet (learning, lookahead, T_val 100)": "lookahead 100",
    "MLR-SNet (learning, average, T_val 3)": "average 3",
    "MLR-SNet (learning, average, T_val 10)": "average 10",
    "MLR-SNet (learning, average, T_val 30)": "average 30",
    "MLR-SNet (learning, average, T_val 100)": "average 100",
    "MLR-SNet (learning, average, T_val 10, gamma 1.34)": "average 10 gamma 1.34",
    "MLR-SNet (learning, average, T_val 10, gamma 17)": "average 10 gamma 17",
    "MLR-SNet (transferred)": "ours (transfer)",
    "MLR-SNet (transferred, gamma 0.067)": "ours (transfer) gamma 0.067",
    "MLR-SNet (transferred, average net)": "ours (transfer) average",
}

# These adapt to the length of the run. Any other method's run on a long line also serves the shorter lines.
KNOWS_ITS_LENGTH = [
    "MLR-SNet (learning)", "MLR-SNet (transferred)", "MLR-SNet (transferred, gamma 0.067)", "multistep", "cosine 0.5",
    "onecycle", "MLR-SNet (transferred, measured)", "MLR-SNet (transferred, average net, measured)",
    "fixed (measured)", "multistep (measured)", *DECAYING, *MEASURED, *CONSTANT, FINDER, *GRID_METHODS,
]
WITHOUT_MOMENTUM = ["adam", "adam+val", "hd-adam", "l4mom", "l4adam", "schedule-free-adamw", "prodigy"]
OWN_DIRECTION = ["l4mom", "l4adam"]  # which stands in for the optimizer's
CLIPPED_SGD = [  # on text they start at rate 20
    "fixed", "onecycle", "schedule-free", "hd", "rtho", "plateau", "greedy", *DECAYING,
]

NETWORK_TITLES = {
    "resnet": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "resnet152": "ResNet-152", "resnet50-imagenet": "ResNet-50", "resnet8": "ResNet-8", "resnet20": "ResNet-20",
    "shufflenetv2": "ShuffleNetV2", "wideresnet": "WRN-28-10", "mobilenetv2": "MobileNetV2", "nasnet": "NASNet",
    "densenet121": "DenseNet-121", "vit": "a vision transformer", "lstm2": "2-layer LSTM", "lstm3": "3-layer LSTM",
    "gpt": "a causal transformer",
}
DATASET_TITLES = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar10-c": "CIFAR-10-C", "cifar100-c": "CIFAR-100-C",
    "svhn": "SVHN", "tinyimagenet": "TinyImageNet", "imagenet": "ImageNet", "digits": "scikit-learn's digits",
    "ptb": "Penn Treebank", "pydoc": "Python's documentation",
}

STAGE = [
    "MLR-SNet (learning)", "fixed", "multistep", "exponential", "cosine", "cosine 0.5", "sgdr", "onecycle", "adam",
    "hd", "hd-adam", "rtho", "l4mom", "l4adam", "schedule-free", "schedule-free-adamw", "prodigy",
]
LANGUAGE = ["MLR-SNet (learning)", "sgd+val", "adam+val", "hd", "rtho", "l4adam", "MLR-SNet (transferred)"]
TRANSFER = ["MLR-SNet (transferred)", "fixed", "multistep", "exponential", "cosine", "sgdr", "adam"]
META_POINTS = [
    "MLR-SNet (learning, lookahead, T_val 3)", "MLR-SNet (learning, lookahead, T_val 10)",
    "MLR-SNet (learning, lookahead, T_val 30)", "MLR-SNet (learning, lookahead, T_val 100)",
    "MLR-SNet (learning, average, T_val 3)", "MLR-SNet (learning, average, T_val 10)",
    "MLR-SNet (learning, average, T_val 30)", "MLR-SNet (learning, average, T_val 100)",
]
META_POINTS_NOT_AT_10 = [
    "MLR-SNet (learning, lookahead, T_val 3)", "MLR-SNet (learning, lookahead, T_val 30)",
    "MLR-SNet (learning, lookahead, T_val 100)", "MLR-SNet (learning, average, T_val 3)",
    "MLR-SNet (learning, average, T_val 30)", "MLR-SNet (learning, average, T_val 100)",
]
ROBUST = [
    "MLR-SNet (learning)", "MLR-SNet (transferred)", "fixed", "multistep", "cosine", "adam", "schedule-free", "prodigy",
]

IMAGES = {
    "paper": "num-epoch=200",
    "desk": "num-epoch=30 limit-train=10000 limit-test=5000",
    "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64",
}
IMAGES_WITH_MOMENTUM = {  # as in the paper's meta-test
    "paper": "num-epoch=200 momentum=0.9",
    "desk": "num-epoch=30 limit-train=10000 limit-test=5000 momentum=0.9",
    "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64 momentum=0.9",
}
FEW_IMAGES_WITH_MOMENTUM = "limit-test=2000 image-size=16 momentum=0.9"  # without it, so few steps fit hardly any data
TEXT = {
    "paper": "num-epoch=150",
    "desk": "num-epoch=8 embed-size=128 dropout=0.2",
    "smoke": "num-epoch=2 embed-size=16 limit-train=6000 limit-test=700 batch-size=4",
}


def _with_label_noise(problem: str, rates: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    """A line for every kind and rate of wrong labels. `problem` is "network=NAME dataset=NAME"."""
    name = problem.replace("network=", "").replace("dataset=", "")
    lines = {}
    for kind in kinds:
        for rate in rates:
            line = f"{name}, {float(rate):.0%} wrong labels ({kind})"
            lines[line] = f"{problem} label-noise={rate} noise-kind={kind}"
    return lines


def _with_both_optimizers(dataset: str, networks: Sequence[str]) -> dict[str, str]:
    """A line for every network with momentum, then one with AdamW."""
    lines = {}
    for optimizer, flag in (("momentum", "momentum=0.9"), ("AdamW", "optimizer=adamw")):
        for network in networks:
            lines[f"{network} {dataset}, {optimizer}"] = f"network={network} dataset={dataset} {flag}"
    return lines


# Published numbers: test accuracy (%) or perplexity at the last epoch; ~ marks those read off plots.
TABLES: dict[str, Table] = {
    "first": Table(  # shows learning within two minutes: wrong labels keep the training loss from vanishing
        title="A first look: digits with 40 % wrong training labels",
        methods=["MLR-SNet (learning)", "fixed", "cosine"],
        presets={
            "paper": "num-epoch=15 num-meta=200 label-noise=0.4",
            "desk": "num-epoch=15 num-meta=200 label-noise=0.4",
            "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64 label-noise=0.4",
        },
        lines={
            "paper": {"resnet8 digits": "network=resnet8 dataset=digits"},
            "desk": {"resnet8 digits": "network=resnet8 dataset=digits"},
            "smoke": {"resnet8 digits": "network=resnet8 dataset=digits"},
        },
    ),
    "cifar10-resnet": Table(
        title="Meta-train stage on CIFAR-10",
        methods=STAGE,
        presets=IMAGES,
        lines={
            "paper": {"resnet cifar10": "network=resnet dataset=cifar10"},
            "desk": {"resnet8 cifar10": "network=resnet8 dataset=cifar10"},
            "smoke": {"resnet8 digits": "network=resnet8 dataset=digits"},
        },
        published={
            "resnet cifar10": {
                "MLR-SNet (learning)": "~94.5 (a logged run: 92.36, best 94.37)", "multistep": "~93.7",
                "sgdr": "~90.8 (best ~93.8)", "exponential": "~90.7", "rtho": "~90.6", "adam": "~89.4", "hd": "~88.8",
                "l4mom": "~88.8", "fixed": "~88.3",
            },
        },
    ),
    "cifar100-wideresnet": Table(
        title="Meta-train stage on CIFAR-100",
        methods=STAGE,
        presets=IMAGES,
        lines={
            "paper": {"wideresnet cifar100": "network=wideresnet dataset=cifar100"},
            "desk": {"resnet20 cifar100": "network=resnet20 dataset=cifar100"},
            "smoke": {"resnet20 digits": "network=resnet20 dataset=digits"},
        },
        published={
            "wideresnet cifar100": {
                "MLR-SNet (learning)": "~79.6 (a logged run: 79.87, best 80.20)", "multistep": "~76.8",
                "exponential": "~72.2", "hd": "~70.3", "sgdr": "~68.6 (best ~76.7)", "fixed": "~68.5", "adam": "~67.8",
                "rtho": "~66.7", "l4mom": "~63.3",
            },
        },
    ),
    "ptb-lstm2": Table(
        title="Language modelling, two layers",
        methods=LANGUAGE,
        presets=TEXT,
        lines={
            "paper": {"lstm2 ptb": "network=lstm2 dataset=ptb"},
            "desk": {"lstm2 ptb": "network=lstm2 dataset=ptb"},
            "smoke": {"lstm2 pydoc": "network=lstm2 dataset=pydoc"},
        },
        published={
            "lstm2 ptb": {
                "MLR-SNet (learning)": "~70.6", "adam+val": "~71.1", "sgd+val": "~74.3", "rtho": "~77.0",
                "hd": "~77.2", "l4adam": "~83.5", "MLR-SNet (transferred)": "~71.5",
            },
        },
    ),
    "ptb-lstm3": Table(
        title="Language modelling, three layers",
        methods=LANGUAGE,
        presets=TEXT,
        lines={
            "paper": {"lstm3 ptb": "network=lstm3 dataset=ptb"},
            "desk": {"lstm3 ptb": "network=lstm3 dataset=ptb"},
            "smoke": {"lstm3 pydoc": "network=lstm3 dataset=pydoc"},
        },
        published={
            "lstm3 ptb": {
                "MLR-SNet (learning)": "~72.5", "adam+val": "~74.8", "sgd+val": "~76.0", "rtho": "~78.9",
                "hd": "~78.9", "l4adam": "~93",
            },
        },
    ),
    "networks": Table(
        title="The shipped schedules on other networks",
        methods=[*TRANSFER, "MLR-SNet (transferred, gamma 0.067)"],
        presets={
            "paper": "num-epoch=200 momentum=0.9",
            "desk": "num-epoch=15 limit-train=5000 limit-test=2000 momentum=0.9",
            "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64 momentum=0.9",
        },
        lines={
            "paper": {
                "shufflenetv2 cifar10": "network=shufflenetv2 dataset=cifar10",
                "mobilenetv2 cifar10": "network=mobilenetv2 dataset=cifar10",
                "nasnet cifar10": "network=nasnet dataset=cifar10",
            },
            "desk": {  # NASNet takes days
                "shufflenetv2 cifar10": "network=shufflenetv2 dataset=cifar10",
                "mobilenetv2 cifar10": "network=mobilenetv2 dataset=cifar10",
                "resnet8 cifar10": "network=resnet8 dataset=cifar10",
            },
            "smoke": {
                "shufflenetv2 digits": "network=shufflenetv2 dataset=digits",
                "mobilenetv2 digits": "network=mobilenetv2 dataset=digits",
                "nasnet digits": "network=nasnet dataset=digits",
            },
        },
        published={
            "shufflenetv2 cifar10": {
                "MLR-SNet (transferred)": "~91.4", "exponential": "~89.5", "multistep": "~88.8", "adam": "~87.8",
                "fixed": "~87.0", "sgdr": "~73.2",
            },
            "mobilenetv2 cifar10": {
                "exponential": "~93.4", "multistep": "~92.3", "MLR-SNet (transferred)": "~91.2", "fixed": "~90.5",
                "adam": "~89.7", "sgdr": "~76.0",
            },
            "nasnet cifar10": {
                "MLR-SNet (transferred)": "~95.0", "exponential": "~94.8", "multistep": "~94.7", "adam": "~90.5",
                "fixed": "~87.2", "sgdr": "~84.5",
            },
        },
    ),
    "datasets": Table(
        title="The shipped schedules on other data",
        methods=TRANSFER,
        text_methods=["MLR-SNet (transferred)", "sgd+val", "adam+val"],
        presets={"paper": "", "desk": "", "smoke": ""},
        lines={
            "paper": {
                "resnet svhn": "network=resnet dataset=svhn num-epoch=200 momentum=0.9",
                "resnet tinyimagenet": "network=resnet dataset=tinyimagenet num-epoch=200 momentum=0.9",
                "lstm2 ptb": "network=lstm2 dataset=ptb num-epoch=150",
            },
            "desk": {
                "resnet8 svhn":
                    "network=resnet8 dataset=svhn num-epoch=30 limit-train=10000 limit-test=5000 momentum=0.9",
                "resnet8 tinyimagenet":
                    "network=resnet8 dataset=tinyimagenet num-epoch=30 limit-train=10000 limit-test=5000 momentum=0.9",
                "lstm2 ptb": "network=lstm2 dataset=ptb num-epoch=8 embed-size=128 dropout=0.2",
            },
            "smoke": {
                "resnet8 digits":
                    "network=resnet8 dataset=digits num-epoch=2 limit-train=256 limit-test=100 batch-size=64 "
                    "momentum=0.9",
                "lstm2 pydoc":
                    "network=lstm2 dataset=pydoc num-epoch=2 embed-size=16 limit-train=6000 limit-test=700 "
                    "batch-size=4",
            },
        },
        published={
            "resnet svhn": {"MLR-SNet (transferred)": "~95.3 (others 93.0–96.1)"},
            "resnet tinyimagenet": {
                "MLR-SNet (transferred)": "~58", "multistep": "~59", "exponential": "~58.5", "fixed": "~51",
                "adam": "~41.7", "sgdr": "~40",
            },
            "lstm2 ptb": {"MLR-SNet (transferred)": "~71.5", "adam+val": "~71.2", "sgd+val": "~74.3"},
        },
    ),
    "imagenet": Table(
        title="The shipped schedules on ImageNet",
        methods=TRANSFER,
        presets={**IMAGES_WITH_MOMENTUM, "paper": "momentum=0.9 num-epoch=90"},
        lines={
            "paper": {"resnet50-imagenet imagenet": "network=resnet50-imagenet dataset=imagenet"},
            "desk": {"resnet50-imagenet imagenet": "network=resnet50-imagenet dataset=imagenet"},
            "smoke": {"resnet8 digits": "network=resnet8 dataset=digits"},
        },
        published={
            "resnet50-imagenet imagenet": {
                "MLR-SNet (transferred)": "~74.9", "exponential": "~76.1", "multistep": "~75.9", "fixed": "~66.5",
                "adam": "~66.6", "sgdr": "~56.2 (best ~75.8)",
            },
        },
    ),
    "epochs": Table(
        title="The shipped schedules stretched to other horizons",
        methods=["MLR-SNet (transferred)", "cosine", "fixed"],
        presets=IMAGES,
        lines={
            "paper": {
                "num-epoch 50": "network=resnet dataset=cifar10 num-epoch=50",
                "num-epoch 100": "network=resnet dataset=cifar10 num-epoch=100",
                "num-epoch 200": "network=resnet dataset=cifar10 num-epoch=200",
                "num-epoch 400": "network=resnet dataset=cifar10 num-epoch=400",
            },
            "desk": {
                "num-epoch 10": "network=resnet8 dataset=cifar10 num-epoch=10",
                "num-epoch 30": "network=resnet8 dataset=cifar10 num-epoch=30",
                "num-epoch 60": "network=resnet8 dataset=cifar10 num-epoch=60",
            },
            "smoke": {
                "num-epoch 1": "network=resnet8 dataset=digits num-epoch=1",
                "num-epoch 2": "network=resnet8 dataset=digits num-epoch=2",
            },
        },
    ),
    "t-val": Table(
        title="Sensitivity to T_val and to Adam's rate on MLR-SNet",
        methods=["MLR-SNet (learning)"],
        presets=IMAGES,
        lines={
            "paper": {
                "t-val 100, lr 3e-4": "network=resnet dataset=cifar10 t-val=100 lr=3e-4",
                "t-val 100, lr 1e-3": "network=resnet dataset=cifar10 t-val=100 lr=1e-3",
                "t-val 100, lr 3e-3": "network=resnet dataset=cifar10 t-val=100 lr=3e-3",
                "t-val 300, lr 3e-4": "network=resnet dataset=cifar10 t-val=300 lr=3e-4",
                "t-val 300, lr 1e-3": "network=resnet dataset=cifar10 t-val=300 lr=1e-3",
                "t-val 300, lr 3e-3": "network=resnet dataset=cifar10 t-val=300 lr=3e-3",
                "t-val 1000, lr 3e-4": "network=resnet dataset=cifar10 t-val=1000 lr=3e-4",
                "t-val 1000, lr 1e-3": "network=resnet dataset=cifar10 t-val=1000 lr=1e-3",
                "t-val 1000, lr 3e-3": "network=resnet dataset=cifar10 t-val=1000 lr=3e-3",
            },
            "desk": {
                "t-val 3, lr 1e-3": "network=resnet8 dataset=cifar10 t-val=3 lr=1e-3",
                "t-val 3, lr 3e-3": "network=resnet8 dataset=cifar10 t-val=3 lr=3e-3",
                "t-val 10, lr 1e-3": "network=resnet8 dataset=cifar10 t-val=10 lr=1e-3",
                "t-val 10, lr 3e-3": "network=resnet8 dataset=cifar10 t-val=10 lr=3e-3",
                "t-val 30, lr 1e-3": "network=resnet8 dataset=cifar10 t-val=30 lr=1e-3",
                "t-val 30, lr 3e-3": "network=resnet8 dataset=cifar10 t-val=30 lr=3e-3",
                "t-val 100, lr 1e-3": "network=resnet8 dataset=cifar10 t-val=100 lr=1e-3",
                "t-val 100, lr 3e-3": "network=resnet8 dataset=cifar10 t-val=100 lr=3e-3",
            },
            "smoke": {
                "t-val 1, lr 1e-3": "network=resnet8 dataset=digits t-val=1 lr=1e-3",
                "t-val 2, lr 1e-3": "network=resnet8 dataset=digits t-val=2 lr=1e-3",
            },
        },
    ),
    "horizon": Table(
        title="Where the meta gradient is taken, how often, and for how long a run",
        methods=[
            *META_POINTS, "MLR-SNet (transferred, average net)", "MLR-SNet (learning, average, T_val 10, gamma 1.34)",
            "fixed", "fixed 0.4", "cosine 0.5", "onecycle", "schedule-free", "prodigy",
        ],
        only_in_t_val=META_POINTS_NOT_AT_10,
        presets={
            "paper": "average=",
            "desk": "limit-train=5000 limit-test=2000 image-size=16 average=",
            "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64 average=",
        },
        lines={
            "paper": {
                "resnet cifar10, 50 epochs": "network=resnet dataset=cifar10 num-epoch=50",
                "resnet cifar10, 100 epochs": "network=resnet dataset=cifar10 num-epoch=100",
                "resnet cifar10, 200 epochs": "network=resnet dataset=cifar10 num-epoch=200",
                "wideresnet cifar100, 50 epochs": "network=wideresnet dataset=cifar100 num-epoch=50",
                "wideresnet cifar100, 100 epochs": "network=wideresnet dataset=cifar100 num-epoch=100",
                "wideresnet cifar100, 200 epochs": "network=wideresnet dataset=cifar100 num-epoch=200",
            },
            "desk": {  # fewer images for resnet20, which takes longer
                "resnet8 cifar10, 10 epochs": "network=resnet8 dataset=cifar10 num-epoch=10",
                "resnet8 cifar10, 30 epochs": "network=resnet8 dataset=cifar10 num-epoch=30",
                "resnet8 cifar10, 60 epochs": "network=resnet8 dataset=cifar10 num-epoch=60",
                "resnet20 cifar10, 10 epochs":
                    "network=resnet20 dataset=cifar10 limit-train=2000 limit-test=1000 num-epoch=10",
                "resnet20 cifar10, 30 epochs":
                    "network=resnet20 dataset=cifar10 limit-train=2000 limit-test=1000 num-epoch=30",
                "resnet20 cifar10, 60 epochs":
                    "network=resnet20 dataset=cifar10 limit-train=2000 limit-test=1000 num-epoch=60",
            },
            "smoke": {
                "resnet8 digits, 2 epochs": "network=resnet8 dataset=digits num-epoch=2",
                "resnet8 digits, 3 epochs": "network=resnet8 dataset=digits num-epoch=3",
            },
        },
    ),
    "horizon-text": Table(
        title="The same race on text",
        methods=[
            *META_POINTS, "MLR-SNet (transferred, average net)", "MLR-SNet (learning, average, T_val 10, gamma 17)",
            "fixed", "fixed 5", "cosine", "onecycle", "schedule-free", "prodigy",
        ],
        only_in_t_val=META_POINTS_NOT_AT_10,
        presets={
            "paper": "average=",
            "desk": "tokens=char embed-size=64 dropout=0.1 limit-train=50000 limit-test=20000 average=",
            "smoke": "num-epoch=2 embed-size=16 limit-train=6000 limit-test=700 batch-size=4 average=",
        },
        lines={
            "paper": {
                "lstm2 ptb, 40 epochs": "network=lstm2 dataset=ptb num-epoch=40",
                "lstm2 ptb, 80 epochs": "network=lstm2 dataset=ptb num-epoch=80",
                "lstm2 ptb, 150 epochs": "network=lstm2 dataset=ptb num-epoch=150",
                "lstm3 ptb, 40 epochs": "network=lstm3 dataset=ptb num-epoch=40",
                "lstm3 ptb, 80 epochs": "network=lstm3 dataset=ptb num-epoch=80",
                "lstm3 ptb, 150 epochs": "network=lstm3 dataset=ptb num-epoch=150",
            },
            "desk": {
                "lstm2 ptb, 10 epochs": "network=lstm2 dataset=ptb num-epoch=10",
                "lstm2 ptb, 30 epochs": "network=lstm2 dataset=ptb num-epoch=30",
                "lstm2 ptb, 60 epochs": "network=lstm2 dataset=ptb num-epoch=60",
            },
            "smoke": {
                "lstm2 pydoc, 2 epochs": "network=lstm2 dataset=pydoc num-epoch=2",
                "lstm2 pydoc, 3 epochs": "network=lstm2 dataset=pydoc num-epoch=3",
            },
        },
    ),
    "corruption": Table(
        title="Trained on corrupted images, tested on clean ones",
        methods=ROBUST,
        presets={  # the meta images are clean
            "paper": "num-epoch=200 num-meta=100",
            "desk": f"num-epoch=30 limit-train=2500 num-meta=200 {FEW_IMAGES_WITH_MOMENTUM}",
            "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64",
        },
        lines={
            "paper": {
                "resnet cifar10-c, Gaussian noise":
                    "network=resnet dataset=cifar10-c corruption=gaussian_noise severity=5",
                "resnet cifar10-c, fog": "network=resnet dataset=cifar10-c corruption=fog severity=5",
                "resnet cifar10-c, contrast": "network=resnet dataset=cifar10-c corruption=contrast severity=5",
                "resnet cifar10-c, JPEG compression":
                    "network=resnet dataset=cifar10-c corruption=jpeg_compression severity=5",
            },
            "desk": {
                "resnet8 cifar10, Gaussian noise":
                    "network=resnet8 dataset=cifar10 corruption=gaussian_noise severity=5",
                "resnet8 cifar10, contrast": "network=resnet8 dataset=cifar10 corruption=contrast severity=5",
                "resnet8 cifar10, pixelate": "network=resnet8 dataset=cifar10 corruption=pixelate severity=5",
            },
            "smoke": {
                "resnet8 digits, contrast": "network=resnet8 dataset=digits corruption=contrast severity=5",
            },
        },
    ),
    "label-noise": Table(
        title="Trained on wrong labels, tested on true ones",
        methods=ROBUST,
        presets={  # the meta images have their true labels
            "paper": "num-epoch=200",
            "desk":  # so few images can be memorised
                f"num-epoch=40 num-meta=200 {FEW_IMAGES_WITH_MOMENTUM} limit-train=1000 limit-test=1000 batch-size=32",
            "smoke": "num-epoch=2 limit-train=256 limit-test=100 batch-size=64",
        },
        lines={
            "paper": _with_label_noise("network=resnet dataset=cifar10", ("0.2", "0.4", "0.6"), ("uniform", "flip")),
            "desk": _with_label_noise("network=resnet8 dataset=cifar10", ("0.2", "0.4", "0.6"), ("uniform", "flip")),
            "smoke": _with_label_noise("network=resnet8 dataset=digits", ("0.4",), ("flip",)),
        },
    ),
    "sizes": Table(
        title="Nets learned on 10,000 images, used on other numbers of images",
        methods=[
            "MLR-SNet (transferred)", "MLR-SNet (transferred, average net)", "cosine", "fixed", "multistep",
        ],
        presets={
            "paper": "num-epoch=200 average=",
            "desk": f"{FEW_IMAGES_WITH_MOMENTUM} average=",
            "smoke": "num-epoch=2 limit-test=100 batch-size=64 average=",
        },
        lines={
            "paper": {
                "resnet cifar10, 1,000 images": "network=resnet dataset=cifar10 limit-train=1000",
                "resnet cifar10, 2,500 images": "network=resnet dataset=cifar10 limit-train=2500",
                "resnet cifar10, 5,000 images": "network=resnet dataset=cifar10 limit-train=5000",
                "resnet cifar10, 25,000 images": "network=resnet dataset=cifar10 limit-train=25000",
            },
            "desk": {  # of similar cost; the steps differ: 240, 400, 480 and 784
                "resnet8 cifar10, 1,000 images, 30 epochs":
                    "network=resnet8 dataset=cifar10 limit-train=1000 num-epoch=30",
                "resnet8 cifar10, 2,500 images, 20 epochs":
                    "network=resnet8 dataset=cifar10 limit-train=2500 num-epoch=20",
                "resnet8 cifar10, 5,000 images, 12 epochs":
                    "network=resnet8 dataset=cifar10 limit-train=5000 num-epoch=12",
                "resnet8 cifar10, 25,000 images, 4 epochs":
                    "network=resnet8 dataset=cifar10 limit-train=25000 num-epoch=4",
            },
            "smoke": {
                "resnet8 digits, 128 images": "network=resnet8 dataset=digits limit-train=128",
                "resnet8 digits, 256 images": "network=resnet8 dataset=digits limit-train=256",
            },
        },
    ),
    "networks-measured": Table(
        title="Other networks, with the usual and the measured rate",
        methods=[
            "MLR-SNet (transferred, measured)", "MLR-SNet (transferred, average net, measured)", "fixed",
            "fixed (measured)", "multistep", "multistep (measured)", "cosine", "cosine (measured)", "exponential",
            "sgdr", "adam",
        ],
        presets={
            "paper": "num-epoch=200 average=",
            "desk": "num-epoch=8 limit-train=2560 limit-test=1000 image-size=16 average=",
            "smoke": "num-epoch=2 limit-train=64 limit-test=100 batch-size=16 average=",
        },
        lines={
            "paper": _with_both_optimizers("cifar10", ("shufflenetv2", "mobilenetv2", "nasnet")),
            "desk": _with_both_optimizers("cifar10", ("shufflenetv2", "mobilenetv2", "resnet8")),
            "smoke": _with_both_optimizers("digits", ("resnet8",)),
        },
    ),
    "full-size": Table(
        title="All training images at full size",
        methods=[
            "MLR-SNet (learning)", "MLR-SNet (transferred)", "MLR-SNet (transferred, average net)", "cosine",
            "cosine (measured)", "multistep", "multistep (measured)", "fixed", "fixed (measured)", "wsd",
            "wsd (measured)", "schedule-free", "prodigy",
        ],
        presets={
            "desk": "num-epoch=30 precision=bf16 average= momentum=0.9",
            "smoke": "num-epoch=2 limit-train=64 limit-test=100 batch-size=16 average= momentum=0.9",
        },
        lines={
            "desk": {"resnet20 cifar10": "network=resnet20 dataset=cifar10"},
            "smoke": {"resnet8 digits": "network=resnet8 dataset=digits"},
        },
    ),
    "untuned": Table(
        title="No tuning: the regret against the best cosine of a grid",
        methods=[
            "MLR-SNet (transferred)", "MLR-SNet (transferred, average net)", "MLR-SNet (transferred, measured)",
            "MLR-SNet (transferred, average net, measured)", *DECAYING, *MEASURED,
            *CONSTANT, FINDER, "fixed", "fixed (measured)", "plateau", "greedy", "adam", "hd", "l4adam",
            "schedule-free", "prodigy", "dadaptation",
        ],
        has_regret=True,
        presets={"desk": "average=", "smoke": "average= num-epoch=2"},
        lines={
            "desk": {
                "resnet8 folder, 16 pixels, 5,000 images, SGD, 6 epochs":
                    "network=resnet8 dataset=folder image-size=16 limit-train=5000 limit-test=1000 num-epoch=6",
                "resnet8 folder, 24 pixels, 2,500 images, momentum, 4 epochs":
                    "network=resnet8 dataset=folder image-size=24 limit-train=2500 limit-test=1000 batch-size=64 "
                    "num-epoch=4 momentum=0.9",
                "resnet8 folder, 24 pixels, 2,500 images, momentum, 12 epochs":
                    "network=resnet8 dataset=folder image-size=24 limit-train=2500 limit-test=1000 batch-size=64 "
                    "num-epoch=12 momentum=0.9",
                "resnet8 folder, 32 pixels, 2,500 images, AdamW, 4 epochs":
                    "network=resnet8 dataset=folder image-size=32 limit-train=2500 limit-test=1000 batch-size=64 "
                    "num-epoch=4 optimizer=adamw",
                "resnet20 folder, 16 pixels, 2,500 images, momentum, 6 epochs":
                    "network=resnet20 dataset=folder image-size=16 limit-train=2500 limit-test=1000 batch-size=64 "
                    "num-epoch=6 momentum=0.9",
                "resnet20 digits, AdamW, 12 epochs":
                    "network=resnet20 dataset=digits num-epoch=12 optimizer=adamw",
                "shufflenetv2 folder, 16 pixels, 1,000 images, momentum, 8 epochs":
                    "network=shufflenetv2 dataset=folder image-size=16 limit-train=1000 limit-test=1000 "
                    "batch-size=32 num-epoch=8 momentum=0.9",
                "mobilenetv2 folder, 16 pixels, 1,000 images, SGD, 6 epochs":
                    "network=mobilenetv2 dataset=folder image-size=16 limit-train=1000 limit-test=1000 "
                    "batch-size=32 num-epoch=6",
                "vit folder, 16 pixels, 2,500 images, AdamW, 8 epochs":
                    "network=vit dataset=folder image-size=16 limit-train=2500 limit-test=1000 batch-size=64 "
                    "num-epoch=8 optimizer=adamw",
                "vit digits, momentum, 12 epochs":
                    "network=vit dataset=digits num-epoch=12 momentum=0.9",
                "lstm2 text, words, SGD, 6 epochs":
                    "network=lstm2 dataset=text tokens=word embed-size=64 dropout=0.1 limit-train=40000 "
                    "limit-test=10000 num-epoch=6",
                "lstm2 text, characters, AdamW, 20 epochs":
                    "network=lstm2 dataset=text tokens=char embed-size=64 dropout=0.1 limit-train=50000 "
                    "limit-test=10000 num-epoch=20 optimizer=adamw",
                "gpt text, words, AdamW, 4 epochs":
                    "network=gpt dataset=text tokens=word embed-size=64 dropout=0.1 limit-train=40000 "
                    "limit-test=10000 num-epoch=4 optimizer=adamw",
                "gpt text, characters, AdamW, 4 epochs":
                    "network=gpt dataset=text tokens=char embed-size=64 dropout=0.1 limit-train=50000 "
                    "limit-test=10000 num-epoch=4 optimizer=adamw",
                "gpt text, characters, AdamW, 16 epochs":
                    "network=gpt dataset=text tokens=char embed-size=64 dropout=0.1 limit-train=50000 "
                    "limit-test=10000 num-epoch=16 optimizer=adamw",
            },
            "smoke": {
                "resnet8 digits, momentum":
                    "network=resnet8 dataset=digits limit-train=64 limit-test=100 batch-size=16 momentum=0.9",
                "gpt pydoc, AdamW":
                    "network=gpt dataset=pydoc tokens=char embed-size=16 dropout=0 limit-train=6000 limit-test=700 "
                    "batch-size=4 optimizer=adamw",
            },
        },
    ),
    "own": Table(
        title="Your own class folders",
        methods=STAGE,
        presets=IMAGES,
        lines={
            "paper": {"resnet folder": "network=resnet dataset=folder"},
            "desk": {"resnet8 folder": "network=resnet8 dataset=folder"},
            "smoke": {"resnet8 folder": "network=resnet8 dataset=folder"},
        },
    ),
}
