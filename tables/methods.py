"""The methods that the tables race: every rival with its usual settings, and more.

To add one, add a line: its name, its script and the flags that make it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baselines import SCHEDULES


@dataclass(frozen=True)
class Method:
    """A way to train: a script, with flags that override those of a table's line."""

    name: str
    script: str  # meta-train or meta-test
    flags: Mapping[str, str]  # without dashes -> value

    @property
    def schedule(self) -> str:
        return self.flags.get("schedule", "mlr-snet")

    @property
    def is_ours(self) -> bool:
        return self.schedule == "mlr-snet"

    @property
    def knows_length(self) -> bool:
        """Whether it adapts to the length of the run. If not, a long run begins like a short one."""
        return self.is_ours or SCHEDULES[self.schedule].knows_length

    @property
    def has_own_direction(self) -> bool:
        """Whether its direction stands in for that of a line's optimizer."""
        return not self.is_ours and SCHEDULES[self.schedule].own_direction

    @property
    def has_momentum(self) -> bool:
        """Whether the momentum of a line is for it."""
        return not (self.has_own_direction or "optimizer" in self.flags)

    @property
    def has_initial_lr(self) -> bool:
        """Whether a line may set the rate that its schedule starts from."""
        return not self.is_ours and "lr" not in self.flags and SCHEDULES[self.schedule].rate == "initial"


def parse(text: str) -> dict[str, str]:
    """The arguments in "FLAG=VALUE FLAG=VALUE"."""
    return dict(word.split("=", 1) for word in text.split())


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
GRID = {f"cosine {peak}": float(peak) for peaks in GRIDS.values() for peak in peaks}
DECAYING = ["cosine", "linear", "wsd"]  # raced from the usual and from the measured rate
MEASURED = [f"{name} (measured)" for name in DECAYING]
CONSTANT = "cosine (constant)"  # from one rate per optimizer, which cells.py sets
PLAIN = {
    name: f"meta-test schedule={name}" + ("" if "sgd" in rival.usual_lr else " optimizer=adamw")
    for name, rival in SCHEDULES.items() if name != "val"  # named by its optimizer below
}
RECOMMENDED = "meta-test schedule=mlr-snet nets=recommended gamma=measured warmup=0.05 cooldown=0.2"
FLAGS: dict[str, str] = {  # name -> script and flags
    "MLR-SNet (learning)": "meta-train",
    "MLR-SNet (learning, cool-down)": "meta-train cooldown=0.2",
    "MLR-SNet (learning, average)": "meta-train meta-point=average",
    "MLR-SNet (learning, average, cool-down)": "meta-train meta-point=average cooldown=0.2",
    "MLR-SNet (transferred)": "meta-test schedule=mlr-snet",
    "MLR-SNet (transferred, without momentum)": "meta-test schedule=mlr-snet momentum=0",  # as the authors' script
    "MLR-SNet (recommended)": RECOMMENDED,
    "MLR-SNet (recommended, AdamW)": f"{RECOMMENDED} optimizer=adamw",
    **PLAIN,
    **{f"{name} (measured)": f"meta-test schedule={name} lr=measured" for name in ("multistep", *DECAYING)},
    CONSTANT: "meta-test schedule=cosine",
    **{name: f"meta-test schedule=cosine lr={peak:g}" for name, peak in GRID.items()},
    "adam": "meta-test schedule=fixed optimizer=adam",
    "sgd+val": "meta-test schedule=val",
    "adam+val": "meta-test schedule=val optimizer=adam",
    "schedule-free-adamw": "meta-test schedule=schedule-free optimizer=adamw",
}
METHODS = {name: Method(name, text.split()[0], parse(text.partition(" ")[2])) for name, text in FLAGS.items()}
