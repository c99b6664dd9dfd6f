"""The picture grid: target, nearest public image, reconstruction and score, side by side."""

import numpy as np

from attacks.reconstruction.similarity import nearest, ssim
from audits.findings import ReconstructionFinding
from audits.reconstructions.drawings import Drawn
from audits.reconstructions.secrets import Floats, Secrets
from audits.roc import blank, rendered
from privkd.runs.folder import RunFolder

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
    marks = ["picked" if hit else "missed" for hit in right]
    captions = [f"{alike:.2f} {mark}" for alike, mark in zip(likeness, marks, strict=True)]
    success = finding.success
    title = (
        f"{finding.view}, {finding.attack}: picked {100 * success.estimate:.0f} % of {success.trials}, "
        f"chance {100 * success.chance:.0f} %"
    )
    return _rendered(np.stack(rows), captions, title)


def _rendered(pictures: Floats, captions: list[str], title: str) -> bytes:
    """All ``pictures`` ``[row, column, channel, height, width]`` as one image, with words around it."""
    rows, columns = pictures.shape[:2]
    mosaic, height, width = _mosaic(pictures)
    figure = blank(_SIDE * columns + 0.8, _SIDE * rows + 0.6)
    panel = figure.subplots()
    panel.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.set_xticks([(column + 0.5) * width - 1 for column in range(columns)], captions, fontsize=6)
    panel.set_yticks([(row + 0.5) * height - 1 for row in range(rows)], _TITLES, fontsize=7)
    panel.tick_params(length=0)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.set_title(title, fontsize=8)
    return rendered(figure, "png")


def _mosaic(pictures: Floats) -> tuple[Floats, int, int]:
    """One image of all, with white seams; and the height and width of a picture with its seam."""
    shown = _pixels(pictures)
    seam = [(0, 0), (0, 0), (0, 1), (0, 1)] + [(0, 0)] * (shown.ndim - 4)
    padded = np.pad(shown, seam, constant_values=1.0)
    rows, columns, height, width = padded.shape[:4]
    whole = np.moveaxis(padded, 1, 2).reshape(rows * height, columns * width, *padded.shape[4:])
    return whole[:-1, :-1], height, width


def _varied(secrets: Secrets) -> list[int]:
    """Indices of at most ten trials, one of each target before a second of any."""
    seen: dict[int, int] = {}
    ranks = []
    for secret in secrets.tolist():
        ranks.append((seen.get(secret, 0), secret))
        seen[secret] = seen.get(secret, 0) + 1
    return sorted(range(len(ranks)), key=ranks.__getitem__)[:_EXAMPLES]


def _pixels(pictures: Floats) -> Floats:
    """``[row, column, height, width, 3]`` for three channels, else their mean without the last axis."""
    clipped = np.clip(pictures, 0, 1)
    return np.moveaxis(clipped, 2, -1) if clipped.shape[2] == 3 else clipped.mean(axis=2)
