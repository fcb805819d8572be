"""The methods that the tables race. To add one, add a line: its name, its script and the flags that make it."""

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
    def meta_point(self) -> str | None:
        """Where the meta gradient is taken, if the method sets it."""
        return self.flags.get("meta-point")

    @property
    def t_val(self) -> int | None:
        """The steps between two updates of MLR-SNet, if the method sets them."""
        return int(self.flags["t-val"]) if "t-val" in self.flags else None

    @property
    def knows_length(self) -> bool:
        """Whether it adapts to the length of the run. If not, a long run begins like a short one."""
        if "measured" in self.flags.values():
            return True
        if not self.is_ours:
            return SCHEDULES[self.schedule].knows_length
        if self.script == "meta-train":
            return self.t_val is None  # as many updates in a run of any length
        return self.flags.get("nets") != "average"  # the three nets share the run

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


def _learned(name: str, **flags: str) -> Method:
    return Method(name, "meta-train", _dashed(flags))


def _transferred(name: str, **flags: str) -> Method:
    return Method(name, "meta-test", {"schedule": "mlr-snet", **_dashed(flags)})


def _rival(name: str, schedule: str = "", **flags: str) -> Method:
    return Method(name, "meta-test", {"schedule": schedule or name, **_dashed(flags)})


def _dashed(flags: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in flags.items()}


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
DECAYING = ["cosine", "warmup-cosine", "linear", "wsd"]  # raced at three peaks: usual, measured and constant
MEASURED = [f"{name} (measured)" for name in DECAYING]
CONSTANT = [f"{name} (constant)" for name in DECAYING]  # cells.py sets the rate
FINDER = "cosine (Lightning finder)"
META_POINTS = [
    _learned(f"MLR-SNet (learning, {point}, T_val {t_val})", meta_point=point, t_val=t_val)
    for point in ("lookahead", "average")
    for t_val in ("3", "10", "30", "100")
]

METHODS: dict[str, Method] = {method.name: method for method in [
    _learned("MLR-SNet (learning)"),
    *META_POINTS,
    # Twice the γ that the loss gives: for ten classes, and for about a hundred characters.
    _learned("MLR-SNet (learning, average, T_val 10, gamma 1.34)", meta_point="average", t_val="10", gamma="1.34"),
    _learned("MLR-SNet (learning, average, T_val 10, gamma 17)", meta_point="average", t_val="10", gamma="17"),
    _transferred("MLR-SNet (transferred)"),
    # Learned without momentum: 0.9 makes a step ten times as long, and γ starts at 0.67 for ten classes.
    _transferred("MLR-SNet (transferred, gamma 0.067)", gamma="0.067"),
    _transferred("MLR-SNet (transferred, average net)", nets="average"),
    _transferred("MLR-SNet (transferred, measured)", gamma="measured"),
    _transferred("MLR-SNet (transferred, average net, measured)", nets="average", gamma="measured"),
    _rival("fixed"),
    _rival("fixed (measured)", "fixed", lr="measured"),
    _rival("fixed 0.4", "fixed", lr="0.4"),
    _rival("fixed 5", "fixed", lr="5"),
    _rival("multistep"),
    _rival("multistep (measured)", "multistep", lr="measured"),
    _rival("exponential"),
    *(_rival(name) for name in DECAYING),
    *(_rival(f"{name} (measured)", name, lr="measured") for name in DECAYING),
    *(_rival(f"{name} (constant)", name) for name in DECAYING),
    *(_rival(name, "cosine", lr=f"{peak:g}") for name, peak in GRID.items()),
    _rival("cosine 0.5", "cosine", lr="0.5"),
    _rival(FINDER, "cosine", lr="lightning"),
    _rival("sgdr"),
    _rival("onecycle"),
    _rival("adam", "fixed", optimizer="adam"),
    _rival("sgd+val", "val"),
    _rival("adam+val", "val", optimizer="adam"),
    _rival("plateau"),
    _rival("greedy"),
    _rival("hd"),
    _rival("hd-adam", "hd", optimizer="adam"),
    _rival("rtho"),
    _rival("l4mom"),
    _rival("l4adam"),
    _rival("schedule-free"),
    _rival("schedule-free-adamw", "schedule-free", optimizer="adamw"),
    _rival("prodigy", optimizer="adam"),
    _rival("dadaptation"),
]}
