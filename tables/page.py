"""A table as one interactive page, which needs no network: rows to sort, lines to switch on and off, links to the runs.

Made by bokeh, which is optional: without it a table has no page.
"""

import html
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from drawing import COLOURS, coloured
from records import COST_TITLES, UNITS, Record, by_group

from utils import write_atomically

CURVES = {  # column of metrics.csv -> its panel; a group has those that its runs have
    "train_loss": "training loss (nats, or mean squared error)",
    **{f"{name}{end}": f"test {unit}{label}" for name, unit in UNITS.items()
       for end, label in (("", ""), ("_average", ", averaged weights"))},
    "lr": "learning rate (mean of the epoch)",
}
LOGARITHMIC = ["lr", "test_ppl", "test_ppl_average"]
COLUMNS = {  # of a record -> title and decimals; a group has those that its records have
    "finished": ("seeds finished", 0), "last_mean": ("last epoch", 2), "last_std": ("± last", 2),
    "average_mean": ("averaged weights", 2), "average_std": ("± averaged", 2), "best_mean": ("best epoch", 2),
    "best_std": ("± best", 2), "train_acc_mean": ("training accuracy", 2),
    "train_clean_acc_mean": ("on true labels", 2), "steps_to_target": ("steps to target", 0),
    "seconds_to_target": ("seconds to target", 0),
    **{name: (title, 2) for name, title in COST_TITLES.items()},
}


def is_available() -> bool:
    """Whether pages can be made here."""
    return importlib.util.find_spec("bokeh") is not None


def write_html(path: Path, title: str, records: list[Record], highlight: Sequence[str] = ()) -> None:
    """The page of a table, beside the folder `runs`: for every group the curves and the rows. The lines of `highlight`
    are shown first, by default those that the pictures show in colour.
    """
    from bokeh.embed import file_html
    from bokeh.layouts import column
    from bokeh.models.widgets import Div
    from bokeh.resources import INLINE

    head = (
        f"<h1>{html.escape(title)}</h1>Click the head of a column to sort by it, and a name beside a picture to show "
        "or hide its lines. Means over the seeds, ± one standard deviation; time, passes and memory relative to fixed "
        "(text: sgd+val). The best epoch is picked on test data. Provenance: <a href='README.md'>README.md</a>."
    )
    parts = [Div(text=head, width=1200)]
    shown = coloured([record for record in records if "runs" in record], highlight)
    for members in by_group(records).values():
        parts.append(Div(text=f"<h2>{html.escape(members[0]['title'])}</h2>"))
        finished = [record for record in members if "runs" in record]
        if finished:
            parts.append(_curves(finished, shown))
        parts.append(_rows(members))
    write_atomically(path, file_html(column(*parts), INLINE, title).encode(errors="backslashreplace"))


def _curves(members: list[Record], shown: list[str]) -> Any:
    """A row of panels. The legend of the last one shows and hides the lines of all."""
    from bokeh.layouts import row
    from bokeh.models.annotations import Legend, LegendItem

    panels = [_panel(name, members, shown) for name in CURVES if name in members[0]["runs"][0][-1]]
    items = []
    for place, record in enumerate(members):
        *others, last = [panel.renderers[place] for panel in panels]
        for other in others:
            last.js_link("visible", other, "visible")
        items.append(LegendItem(label=record["method"], renderers=[last]))
    legend = Legend(items=items, click_policy="hide", label_text_font_size="9pt", glyph_height=12, spacing=-2)
    panels[-1].add_layout(legend, "right")
    panels[-1].width += 260
    for panel in panels[1:]:
        panel.x_range = panels[0].x_range  # they zoom together
    return row(*panels)


def _panel(name: str, members: list[Record], shown: list[str]) -> Any:
    """One column of metrics.csv against epochs: the mean over the seeds of every record, in their order."""
    from bokeh.models import Range1d
    from bokeh.plotting import figure

    panel = figure(
        width=380, height=340, x_axis_label="epoch", y_axis_label=CURVES[name],
        y_axis_type="log" if name in LOGARITHMIC else "linear",
        tools="pan,wheel_zoom,box_zoom,reset,hover", tooltips="$name: @y{0.0000} in epoch @x",
    )
    panel.toolbar.logo = None
    if name.startswith("test_r2"):  # a diverging run explains less than nothing
        panel.y_range = Range1d(start=0, end=100)
    labels = sorted([record["method"] for record in members], key=lambda label: label not in shown)
    for record in members:
        place = labels.index(record["method"])  # the lines shown get the first colours
        epochs = [rows for rows in zip(*record["runs"], strict=False) if name in rows[0]]
        means = [statistics.mean(row[name] for row in rows) for rows in epochs]
        panel.line(
            [rows[0]["epoch"] for rows in epochs], means, name=record["method"], visible=record["method"] in shown,
            color=COLOURS[place % len(COLOURS)], line_dash=["solid", "dashed", "dotted"][place // len(COLOURS) % 3],
            line_width=3 if record["is_ours"] else 1.5,
        )
    return panel


def _rows(members: list[Record]) -> Any:
    """The sortable rows, with a link to the run folder of every seed."""
    from bokeh.models import ColumnDataSource
    from bokeh.models.widgets import DataTable, HTMLTemplateFormatter, NumberFormatter, TableColumn

    data: dict[str, list[Any]] = {"method": [record["method"] for record in members]}
    columns = [TableColumn(field="method", title="method", width=300)]
    for name, (title, decimals) in COLUMNS.items():
        values = [record.get(name) for record in members]
        if any(value is not None for value in values):
            data[name] = values
            formatter = NumberFormatter(format=f"0.{'0' * decimals}" if decimals else "0", null_format="–")
            columns.append(TableColumn(field=name, title=title, width=105, formatter=formatter))
    data["runs"] = [
        " ".join(f"<a href='runs/{quote(name)}/'>{seed}</a>" for seed, name in record["names"].items())
        for record in members
    ]
    columns.append(TableColumn(
        field="runs", title="runs (seeds)", width=110, sortable=False,
        formatter=HTMLTemplateFormatter(template="<%= value %>"),
    ))
    return DataTable(
        source=ColumnDataSource(data), columns=columns, index_position=None, width=sum(c.width for c in columns),
        height=25 * len(members) + 35, fit_columns=False,
    )
