"""What each committed result says, in at most three sentences. The first of them is its line in the index.

A result's page and its line in tables/README.md are written by `python tables/tables.py --render tables/results/NAME`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A person's reading of a result. Title and question replace the table's, where there is a table."""

    text: str
    title: str = ""
    question: str = ""
    note: str = ""  # on how the runs were made, where their records do not say it


OLDER_RULE = "γ was measured by an older rule, which gave about half of today's."

READINGS: dict[str, Reading] = {
    "paper-setting-h200": Reading(
        "The learned rate falls by itself as in the authors' log, and the network ends at 91.10 % on JPEG images, "
        "where the authors' log ends at 92.36 %. [rates.csv](rates.csv) has their rates beside those of this run. No "
        "rival has been run in this setting, so nothing here confirms or refutes the paper's comparisons.",
        "The paper's own setting",
        "Does MLR-SNet learn on ResNet-18 and all of CIFAR-10 what it learned for the authors?",
        "The run was stopped after epochs 135 and 152 and resumed, the second time at commit 0f42f3c. Other programs "
        "used the GPU as well, so its seconds are not comparable.",
    ),
    "learn-and-use": Reading(
        "A schedule learned on ResNet-8 drives ShuffleNetV2 better than a fixed rate does. On training data both end "
        "level, so the lead may come from the low rate at the end. No schedule that lowers its rate was part of this "
        "race.",
        "Learned on one network, used on another", "Does what MLR-SNet learns on one network serve another?",
    ),
    "first-desk": Reading(
        "MLR-SNet, which is given no rate, ends above the fixed rate and below the cosine. Every method is best before "
        "its last epoch, since it begins to fit the wrong labels.",
    ),
    "cifar10-resnet-desk": Reading(
        "MLR-SNet is given no rate and beats every SGD schedule from the usual 0.1, but loses to a cosine from 0.5, to "
        "schedule-free and to Prodigy. Its rate falls early and stays below that of the better cosine until the last "
        "epochs. RTHO raises its rate and takes eight times as long.",
    ),
    "full-size-desk": Reading(
        "With averaged weights all thirteen methods end within two points; with live weights MLR-SNet ends behind the "
        "schedules that lower the rate. Neither the net that learns nor the average net lowers its rate far, and the "
        "three nets stop near a twentieth of γ.",
        note="Times are not comparable: the machines also did other work, and the cosine from the measured rate had "
        "two threads.",
    ),
    "full-size-seeds": Reading(
        "With averaged weights the net that learns and the cosine cannot be told apart; its live weights end six "
        "points behind.",
        "All training images at full size, three seeds",
        note="The first two seeds ran on a CPU and the third on an H200, except for multistep's. The second seed of "
        "the average net began on the H200 and ended on the CPU.",
    ),
    "networks-desk": Reading(
        "With the paper's γ, which does not know of momentum, the shipped nets hardly train ShuffleNetV2 and "
        "MobileNetV2. With about a tenth of it they lead on MobileNetV2 and tie on ShuffleNetV2; on ResNet-8, which "
        "tolerates the high rate, they lose to all but SGDR.",
        note="These runs are older than the measured scale: \"MLR-SNet (transferred)\" has the paper's γ, which is now "
        "`--gamma paper`.",
    ),
    "networks-measured-desk": Reading(
        "With a measured γ every network learns under either optimizer, and one net, the average one, serves both. "
        "With averaged weights it ends above the fixed rate in four of six columns. Measuring takes 150 training "
        "steps, nearly as many as these runs have.",
    ),
    "horizon-desk": Reading(
        "One step ahead, T_val decides the result; at averaged weights it hardly matters. What is learned there "
        "amounts to a good constant rate, near half of γ, and only the averaged weights are good. Schedule-free SGD "
        "leads on ResNet-8 and fails on ResNet-20, at its usual rate on both.",
    ),
    "horizon-tries": Reading(
        "A larger rate helps ResNet-8 at averaged weights, whether it comes from γ, from momentum or from a constant. "
        "A larger rate of Adam on MLR-SNet makes the schedule break down during the run. One seed cannot rank "
        "differences of this size.",
        "Variations at averaged weights", "What brings learning at averaged weights nearer to its best rivals?",
    ),
    "horizon-text-desk": Reading(
        "As on images, T_val decides the result one step ahead and hardly matters at averaged weights. MLR-SNet trains "
        "at about a quarter of the usual rate of 20, so it loses to all others over 10 epochs and ties over 60. With "
        "twice the γ it is level with the best from 30 epochs on.",
    ),
    "wikitext-2-lstm2": Reading(
        "MLR-SNet (learning) leads for six epochs and then loses to SGD at a rate that never fell; both beat Adam. One "
        "step ahead, it lowers the rate too early for so short a run. The shipped nets, learned on images, start near "
        "SGD's usual rate, which then falls even faster.",
        "Language modelling on WikiText-2",
    ),
    "shipped-schedules": Reading(
        "The three shipped nets come from a run on 10,000 images whose rate falls from 0.39 to 0.04. The network ends "
        "at 77.9 % on 2,000 test images and fits its training images.",
        "The run of the three shipped nets", "Where do the nets of meta-test come from?",
    ),
    "shipped-average": Reading(
        "The averaged weights end at 74.7 %, the live ones at 26.8 %. In the last epochs the rate climbs to all of γ "
        "and stays there. The shipped net is therefore the one after epoch 30, at 70.0 %.",
        "The run of the shipped average net", "Where does the net for averaged weights come from?",
    ),
    "corruption-desk": Reading(
        "Clean meta images do not make MLR-SNet robust here: it ends about level with the fixed rate, and "
        "schedule-free leads under every corruption. So few epochs fit half of the training images at most; what "
        "memorising would do in a long run is not shown.",
        note=OLDER_RULE,
    ),
    "label-noise-desk": Reading(
        "True meta labels do not make MLR-SNet robust here: it ends below schedule-free and the cosine on every line. "
        "It fits fewer wrong labels, but fewer true ones, too.",
        note=OLDER_RULE,
    ),
    "sizes-desk": Reading(
        "The average net carries over: at every size its averaged weights are level with a cosine or above it. The "
        "three nets for live weights lower the rate too early for such short runs, and the simplest is best, a fixed "
        "rate with averaged weights.",
        note=OLDER_RULE,
    ),
    "untuned-desk": Reading(
        "No method wins everywhere; the shipped average net with averaged weights is the only one with a negative mean "
        "regret on images and on text. On images alone WSD from the measured rate with averaged weights is ahead. "
        "Where MLR-SNet loses, the scale is to blame: the paper's γ is too high on MobileNetV2 under plain SGD, the "
        "measured rate too low on the LSTM on words.",
    ),
    "convergence": Reading(
        "Under the shipped nets SGD converges, but more slowly than the best known rate. They start close to a cosine "
        "and fall behind in longer runs, since the last of the three keeps its rate however long the run.",
    ),
    "calibration": Reading(
        "The measured scale is within a factor of 2 of the best peak on 78 % of the problems, the usual rate on 55 %. "
        "Measuring pays where the usual rate is far off, as on text. Where it is off by more than 3, it is mostly too "
        "high under Adam and too low under plain SGD on text.",
    ),
    "benchmark-resnet18-cpu": Reading(
        "On a CPU a meta step takes 2.02 plain steps, a lookahead through a second-order graph 3.04 to 7.17. A forward "
        "of MLR-SNet is lost in the noise. bf16 takes about half as long as fp32.",
        "Cost of ResNet-18 on a CPU",
    ),
    "benchmark-resnet18-cpu-memory": Reading(
        "On a CPU a meta step needs 1.28 times the memory of a plain step, a lookahead through a second-order graph "
        "more than three times.",
        "Memory of ResNet-18 on a CPU",
    ),
    "benchmark-resnet18-cpu-epoch": Reading(
        "With one meta step in 300 an epoch of ResNet-18 takes 1.02 times as long; with one at every step 2.28 times. "
        "These are single rounds.",
        "An epoch of ResNet-18 on a CPU",
    ),
    "benchmark-resnet18-h200": Reading(
        "On an H200 a meta step takes 3.48 plain steps, and an epoch with one in 300 takes 1.10 times as long. The "
        "host, which launches the many small kernels, seems to be the limit: bf16 is no faster than fp32, and a "
        "forward of MLR-SNet, some twenty tiny kernels, takes 0.44 ms.",
        "Cost of ResNet-18 on an H200",
    ),
    "benchmark-resnet8-cpu": Reading(
        "With one meta step in 300 an epoch of ResNet-8 takes 1.02 times as long, at averaged weights 1.05 times.",
        "An epoch of ResNet-8 on a CPU",
    ),
}
