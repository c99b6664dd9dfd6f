"""The picture grid: target, nearest public image, reconstruction and score, side by side."""

import numpy as np

from attacks.reconstruction.similarity import nearest, ssim
from audits.curves import blank, rendered
from audits.reconstruction.drawings import Drawn
from audits.reconstruction.finding import ReconstructionFinding
from audits.reconstruction.secrets import Floats
from privkd.store import RunFolder

_EXAMPLES = 10
_SIDE = 0.85
_TITLES = ("target", "nearest public", "reconstruction")


def write_grid(folder: RunFolder, finding: ReconstructionFinding, drawn: Drawn, public: Floats) -> str:
    """Draw some trials as a PNG in the run's folder, and return its name there."""
    name = f"audit/reconstruction-{finding.view}-{finding.attack}.png"
    folder.write_bytes(name, draw_grid(finding, drawn, public))
    return name


def draw_grid(finding: ReconstructionFinding, drawn: Drawn, public: Floats) -> bytes:
    """One column a trial, as PNG; trials with different targets come first.

    ``public`` are the public images ``[image, channel, height, width]``. Under each reconstruction stand its
    structural similarity to the target, and whether the target was picked.
    """
    assert drawn.images is not None
    chosen = _varied(drawn.secrets)
    images, targets = drawn.images[chosen], drawn.targets[chosen]
    rows = (targets, public[nearest(images, public)], images)
    likeness = ssim(images, targets)
    right = drawn.table[chosen].argmax(axis=1) == drawn.secrets[chosen]
    figure = blank(_SIDE * len(chosen) + 1.0, _SIDE * len(rows) + 0.8)
    panels = figure.subplots(len(rows), len(chosen), squeeze=False)
    for row, (title, shown) in enumerate(zip(_TITLES, rows, strict=True)):
        for column, image in enumerate(shown):
            panel = panels[row, column]
            panel.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
        panels[row, 0].set_ylabel(title, fontsize=7)
    for column, panel in enumerate(panels[-1]):
        mark = "picked" if right[column] else "missed"
        panel.set_xlabel(f"{likeness[column]:.2f} {mark}", fontsize=6)
    success = finding.success
    figure.suptitle(
        f"{finding.view}, {finding.attack}: picked {100 * success.estimate:.0f} % of {success.trials}, "
        f"chance {100 * success.chance:.0f} %",
        fontsize=8,
    )
    return rendered(figure, "png")


def _varied(secrets: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> list[int]:
    """Indices of at most ten trials, one of each target before a second of any."""
    seen: dict[int, int] = {}
    ranks = []
    for secret in secrets.tolist():
        ranks.append((seen.get(secret, 0), secret))
        seen[secret] = seen.get(secret, 0) + 1
    return sorted(range(len(ranks)), key=ranks.__getitem__)[:_EXAMPLES]


def _pixels(image: Floats) -> Floats:
    """``[height, width]`` for one channel, ``[height, width, 3]`` for three, else their mean."""
    clipped = np.clip(image, 0, 1)
    return np.moveaxis(clipped, 0, -1) if len(clipped) == 3 else clipped.mean(axis=0)
