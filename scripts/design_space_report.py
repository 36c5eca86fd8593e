"""Tables and plots of what `design_space.py` found."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

MARKER = "<!-- All below is written by scripts/design_space.py; what stands above is kept. -->"
ROW_COLORS = ("#D55E00", "#CC79A7", "#0072B2", "#000000")
"""Of Okabe and Ito (2008), told apart by the colour-blind."""
RUNGS = {
    "": ("its own sampler, Euler", "#D55E00", ":", "^"),
    " + Heun": ("+ Heun", "#E69F00", "--", "s"),
    " + Heun + EDM steps": ("+ Heun + EDM steps", "#0072B2", "-", "o"),
}
EDM_SAMPLERS = {
    "EDM, Heun": ("EDM, Heun", "#000000", "-", "o"),
    "EDM, Euler": ("EDM, Euler", "#56B4E9", ":", "^"),
    "EDM, DPM-Solver++(2M)": ("EDM, DPM-Solver++(2M)", "#009E73", "-.", "D"),
    "EDM, Heun, churn": ("EDM, Heun, churn", "#CC79A7", "--", "v"),
}


def write_report(found: dict[str, Any], file: Path) -> None:
    """Writes the tables below the marker of a Markdown file, keeping the findings that people wrote above it."""
    above = file.read_text().partition(MARKER)[0] if file.exists() else "# The design space, repeated\n\n"
    parts = {"training": training_tables, "sampling": sampling_tables}
    below = [line for name, tables in parts.items() if name in found for line in [*tables(found[name]), ""]]
    file.write_text("\n".join([above + MARKER, "", *below]))


def training_tables(found: dict[str, Any]) -> list[str]:
    """Returns Frechet distances of every row at every mark, and those of VP as multiples of each row's."""
    marks, budget = found["marks"], found["budget"]
    distances = {name: over_seeds(runs) for name, runs in found["runs"].items()}
    spread = {name: [f"{mean(d):.3g} ± {deviation(d):.2g}" for d in values] for name, values in distances.items()}
    factors = {
        name: [f"{mean(vp) / mean(d):.3g}" for vp, d in zip(distances["VP"], values, strict=True)]
        for name, values in distances.items()
    }
    return [
        "## Training: Frechet distance to held-out digits",
        "",
        f"Mean ± standard deviation over {len(found['seeds'])} seeds. {found['trained_on']} digits are trained on, "
        f"{found['held_out']} held out; sigma_data {found['sigma_data']:.4f}. Batch {budget['batch_size']}, Adam at "
        f"{budget['learning_rate']:g}, {budget['channels']} channels, dropout {budget['dropout']:g}. Samples: Heun, 18 "
        f"steps, averaged weights; {found['trained_on']} of them, as many as the floor has, and twice that at the end.",
        "",
        *table(
            ["row", "untrained", *(f"{mark} steps" for mark in marks)],
            [[name, f"{found['untrained'][name]:.3g}", *values] for name, values in spread.items()]
            + [["floor: the digits trained on", "", *[f"{found['floor']:.3g}"] * len(marks)]],
        ),
        "",
        "VP's distance as a multiple of the row's:",
        "",
        *table(["row", *(f"{mark} steps" for mark in marks)], [[name, *values] for name, values in factors.items()]),
        "",
        provenance(found),
    ]


def sampling_tables(found: dict[str, Any]) -> list[str]:
    """Returns the error of every sampler against NFE on both data sets, and that of EDM's against rho."""
    titles = {
        "gaussian": "Gaussian: relative error of the samples' standard deviation",
        "digits": "Digits: RMS difference of pixels to the exact solution from the same noise",
    }
    lines = ["## Sampling: error with an exact denoiser", ""]
    for data, title in titles.items():
        body = [[name, *(f"{error:.2g}" for error in values)] for name, values in found["errors"][data].items()]
        lines += [f"{title}.", "", *table(["sampler", *(f"{nfe} NFE" for nfe in found["nfe"])], body), ""]
    rhos = [[data, *(f"{error:.3g}" for error in found["errors_of_rho"][data])] for data in titles]
    return [
        *lines,
        "The same errors of EDM's Heun at 35 NFE against the exponent rho of its steps.",
        "",
        *table(["data", *(f"{rho:g}" for rho in found["rho"])], rhos),
        "",
        f"{found['samples']} samples of the digits; their solution, by {found['reference']['steps']} steps of Heun, "
        f"moves by {found['reference']['error']:.1g} when these are halved. With churn (S_churn "
        f"{found['churn']['s_churn']:g}) the standard deviation is known to {found['churn']['resolution']:.1g}.",
        "",
        provenance(found),
    ]


def provenance(found: dict[str, Any]) -> str:
    """Returns a sentence on where the numbers are from."""
    made = found["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"Commit {made['commit']}; {versions}; {made['workers']} workers of one thread on {made['cpu_count']} cores: "
        f"{made['wall_seconds'] / 60:.1f} minutes, {made['cpu_seconds'] / 60:.1f} of processor time."
    )


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table, numbers to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def over_seeds(runs: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Returns for every mark the Frechet distance of every seed."""
    return list(zip(*(run["frechet_distance"] for run in runs), strict=True))


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation, 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def plot_training(found: dict[str, Any], file: Path) -> None:
    """Draws Frechet distance against steps: means, and bands from the least to the greatest of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="optimizer steps", ylabel="Frechet distance to held-out digits"
    )
    for (name, runs), color, marker in zip(found["runs"].items(), ROW_COLORS, "^vso", strict=True):
        distances = over_seeds(runs)
        axes.plot(found["marks"], [mean(d) for d in distances], color=color, marker=marker, label=name)
        axes.fill_between(
            found["marks"], [min(d) for d in distances], [max(d) for d in distances], color=color, alpha=0.2, lw=0
        )
    axes.axhline(found["floor"], color="0.5", ls="--", label="floor: digits trained on")
    axes.set_xticks(found["marks"], [str(mark) for mark in found["marks"]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def plot_sampling(found: dict[str, Any], file: Path) -> None:
    """Draws error against NFE, a column of Table 1 to a column of panels, and at the right error against rho."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = figure.subplots(2, 5)
    scales = ("relative error of standard deviation", 1e-4), ("RMS error of pixels", 1e-3)
    for row, (label, least), (data, errors) in zip(panels, scales, found["errors"].items(), strict=True):
        for axes, column in zip(row, ("VP", "VE", "iDDPM"), strict=False):
            styles = {column + rung: style for rung, style in RUNGS.items()}
            draw_samplers(axes, found["nfe"], errors, styles | {"EDM, Heun": EDM_SAMPLERS["EDM, Heun"]})
            axes.set_title(f"{column}, {data.title()}")
        draw_samplers(row[3], found["nfe"], errors, EDM_SAMPLERS)
        row[3].set_title(f"EDM, {data.title()}")
        for axes in row[:4]:
            axes.set(yscale="log", ylim=(least, 10))
        row[4].semilogy(found["rho"], found["errors_of_rho"][data], color="#000000", marker="o", ms=4)
        row[4].set(xlabel="rho of EDM, Heun", ylim=(0.03, 6), title=f"35 NFE, {data.title()}")
        row[4].grid(alpha=0.3)
        row[0].set_ylabel(label)
    handles = dict(zip(*panels[0, 0].get_legend_handles_labels()[::-1], strict=True))
    handles |= dict(zip(*panels[0, 3].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=90)


def draw_samplers(axes: Any, nfe: list[int], errors: dict[str, list[float]], styles: dict[str, tuple]) -> None:
    """Draws the errors of those samplers that there are into one panel."""
    for name, (label, color, line, marker) in styles.items():
        if name in errors:
            axes.plot(nfe, errors[name], color=color, ls=line, marker=marker, ms=4, label=label)
    axes.set(xscale="log", xlabel="NFE")
    axes.set_xticks(nfe, [str(n) for n in nfe])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
