"""train.py with a number planted in the noise of some examples, under python or torchrun:

    python planted.py nan 9 10 -- TRAIN-OPTIONS
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import sample
import train


def main():
    split = sys.argv.index("--")
    value, examples = float(sys.argv[1]), set(map(int, sys.argv[2:split]))
    del sys.argv[1 : split + 1]
    honest = train.Examples.on_device

    def planted(self, batch, device):
        x_0, y, noise, z, u = honest(self, batch, device)
        for row, k in zip(noise, batch[-1].tolist()):
            if k in examples and self.purpose == "train":
                row[0, 0, 0] = value
        return x_0, y, noise, z, u

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Examples, "on_device", planted)
        return train.main()


if __name__ == "__main__":
    sample.run_main(main)
