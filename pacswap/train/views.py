"""Side-by-side pictures of a run: what two networks see in the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from pacswap.recipes import EvaluateSection
from pacswap.surgery.modes import kept_modes
from pacswap.train.data.batches import normalized
from pacswap.train.data.split import Split
from pacswap.train.measure.infer import predict
from pacswap.train.measure.pictures import side_by_side, write_picture
from pacswap.train.setting import spread


class Views:
    """Collects the answers of networks to a few pictures, and draws two of them side by side.

    The pictures are spread evenly over the split: they are not chosen by what came out.

    Args:
        split: the pictures that are measured on.
        section: how the networks look at them; and how many.
    """

    def __init__(self, split: Split, section: EvaluateSection) -> None:
        self.split, self.section = split, section
        self.indices = spread(split, section.pictures)
        self.seen: dict[str, list[Tensor]] = {}

    def add(self, name: str, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep what a network sees.

        Args:
            name: what its answers are called.
            model: the network, in any mode.
            mean: of the channels of its pictures.
            std: of the channels of its pictures.
        """
        device = next(model.parameters()).device
        masks = []
        with kept_modes(model):
            model.eval()
            for index in self.indices:
                images = normalized(self.split.read(index)[0][None], mean, std, device)
                masks.append(predict(model, images, self.section)[0].argmax(0).cpu())
        self.seen[name] = masks

    def draw(self, before: str, after: str, folder: Path) -> tuple[Path, ...]:
        """Write one PNG per picture into a folder.

        Args:
            before: the name of one network.
            after: that of the other.
            folder: is made.

        Raises:
            TrainingError: they cannot be written.
        """
        paths = []
        for place, index in enumerate(self.indices):
            image, truth = self.split.read(index)
            name = self.split.samples[index].name
            drawn = side_by_side(
                image,
                truth,
                self.seen[before][place],
                self.seen[after][place],
                classes=self.split.classes,
                palette=self.split.palette,
                ignore_index=self.split.ignore_index,
                names=(before, after),
                title=name,
            )
            safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).stem)
            paths.append(write_picture(folder / f"{place + 1:02}_{safe}.png", drawn))
        return tuple(paths)
