"""train.py whose data are spoilt: in some examples, one value of the noise is not what it was.

    python planted.py nan 9 10 -- OPTIONS OF TRAIN.PY         # NaN in examples 9 and 10
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import dataset
import train

draw_batch = dataset.Examples.on_device


def main():
    end = sys.argv.index("--")
    value, spoilt = float(sys.argv[1]), [int(word) for word in sys.argv[2:end]]
    sys.argv = [sys.argv[0], *sys.argv[end + 1:]]

    def draw_spoilt_batch(examples, batch, device):
        x_0, y, noise, z, u = draw_batch(examples, batch, device)
        positions = batch[-1].tolist()
        for row, k in enumerate(positions):
            if k in spoilt and examples.purpose == "train":
                noise[row, 0, 0, 0] = value
        return x_0, y, noise, z, u

    dataset.Examples.on_device = draw_spoilt_batch
    try:
        return train.main()
    finally:
        dataset.Examples.on_device = draw_batch


if __name__ == "__main__":
    common.run_main(main)
